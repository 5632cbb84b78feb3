"""Random changes to training images that leave their reports true.

Each one says what it changes and why that cannot falsify a report, or whose reports it would falsify. All are off
unless the configuration turns them on, because that depends on the images and not on the program.

Images are uint8 arrays (height, width, 3).
"""

from __future__ import annotations

import numpy as np

from mdnet_dist.config import AugmentConfig

# Optical densities of haematoxylin, eosin and what is left over, in R, G, B: Ruifrok and Johnston, Anal. Quant. Cytol.
# Histol. 23 (2001), each row of length 1.
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)


def augment(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Apply what the configuration turns on. The same generator state gives the same image.

    Args:
        image: (size, size, 3) uint8.

    Returns:
        An image of the same shape.
    """
    # Every draw is made whether it is used or not: turning one change on does not alter the others' randomness.
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    # Not rng.integers, which draws as often as its bounds need.
    shift = np.floor(rng.random(2) * (2 * config.shift_px + 1)).astype(int) - config.shift_px
    stain, brightness = rng.standard_normal(2), rng.standard_normal()

    if config.quarter_turns:
        # A tissue field has no up side, and reports describe structures relative to each other (polarity is relative to
        # the surface, which turns along). Quarter turns move pixels without interpolating them: no grade can change.
        # Not for images taken in a standard position, such as chest radiographs.
        image = np.rot90(image, turns)
    if config.mirror and mirrored:
        # Tissue has no handedness. Not for images whose reports say left or right, nor where the heart's side matters.
        image = image[:, ::-1]
    if config.shift_px:
        # A few px do not move a finding out of the picture; the reflected border shows tissue like its neighbourhood.
        image = _shift(image, shift)
    if config.stain:
        # How strongly a slide is stained depends on the laboratory, and reports are about shapes. Not for images other
        # than haematoxylin and eosin, nor where staining itself is reported.
        image = _restain(image, 1 + config.stain * stain)
    if config.brightness:
        # Lamp and exposure vary. One factor for all channels keeps contrasts; keep it small where density is reported.
        factor = max(0.0, 1 + config.brightness * brightness)
        image = np.rint(np.clip(image * factor, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(image)


def _shift(image: np.ndarray, shift: np.ndarray) -> np.ndarray:
    margin = int(np.abs(shift).max())
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    top, left = margin + shift
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


def _restain(image: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Multiply the amounts of haematoxylin and eosin, which are additive in optical density (Beer and Lambert)."""
    scale = np.diag([max(0.0, strengths[0]), max(0.0, strengths[1]), 1.0])
    change = (np.linalg.inv(STAINS) @ scale @ STAINS).astype(np.float32)
    density = -np.log((image.astype(np.float32) + 1) / 256)
    return np.rint(np.clip(256 * np.exp(-(density @ change)) - 1, 0, 255)).astype(np.uint8)
