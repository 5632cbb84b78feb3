"""Random changes to training images that leave their reports true.

Each one says what it changes and why that cannot falsify a report, or whose reports it would falsify. All are off
unless the configuration turns them on, because that depends on the images and not on the program.

Every training image comes through here, so that time counts (docs/performance.md): Pillow turns, pieces of rows are
shifted whole, staining and brightness are one pass in single precision. Kinds of work do not alternate from image to
image: code that has just run for the image before runs in three quarters of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from mdnet_dist.config import AugmentConfig

# Optical densities of haematoxylin, eosin and what is left over, in R, G, B: Ruifrok and Johnston, Anal. Quant. Cytol.
# Histol. 23 (2001), each row of length 1.
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)
_UNMIXING = np.linalg.inv(STAINS)

_PIXELS_AT_ONCE = 4
"""Side by side in a matrix product, whose time goes into its many rows and not into multiplying."""

_TURNED_AND_MIRRORED = {
    # (quarter turns to the left, mirrored left and right afterwards)
    (1, False): Image.Transpose.ROTATE_90,
    (2, False): Image.Transpose.ROTATE_180,
    (3, False): Image.Transpose.ROTATE_270,
    (0, True): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, True): Image.Transpose.TRANSVERSE,
    (2, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (3, True): Image.Transpose.TRANSPOSE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What is random about the changes of one image."""

    turns: int  # by 90 degrees to the left
    mirrored: bool
    down: int  # px, as `right`
    right: int
    haematoxylin: float  # of mean 0 and deviation 1, as all that follow
    eosin: float
    brightness: float


def draw(config: AugmentConfig, rng: np.random.Generator) -> Draw:
    """Draw for one image. The same generator state gives the same, and leaves the same state behind.

    Every draw is made whether it is used or not: turning one change on does not alter the others' randomness.
    """
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    # Not rng.integers, which draws as often as its bounds need.
    places = 2 * config.shift_px + 1
    down, right = int(rng.random() * places) - config.shift_px, int(rng.random() * places) - config.shift_px
    return Draw(
        turns=turns,
        mirrored=mirrored,
        down=down,
        right=right,
        haematoxylin=rng.standard_normal(),
        eosin=rng.standard_normal(),
        brightness=rng.standard_normal(),
    )


def augment(
    images: Sequence[Image.Image], draws: Sequence[Draw], config: AugmentConfig, out: Sequence[np.ndarray]
) -> None:
    """Apply what the configuration turns on.

    Args:
        images: squares in RGB; they stay as they are.
        out: for each image (size, size, 3) uint8, contiguous; gets the changed one.
    """
    for image, drawn, pixels in zip(images, draws, out):
        # Quarter turns: a tissue field has no up side, and reports describe structures relative to each other (polarity
        # is relative to the surface, which turns along). They move pixels without interpolating them: no grade can
        # change. Not for images taken in a standard position, such as chest radiographs.
        # Mirroring: tissue has no handedness. Not for images whose reports say left or right, nor where the heart's
        # side matters.
        turned = _TURNED_AND_MIRRORED.get((drawn.turns * config.quarter_turns, drawn.mirrored and config.mirror))
        image = image if turned is None else image.transpose(turned)
        # A few px do not move a finding out of the picture; the reflected border shows tissue like its neighbourhood.
        _shift(np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(pixels.shape), drawn.down, drawn.right, pixels)
    # Lamp and exposure vary. One factor for all channels keeps contrasts; keep it small where density is reported.
    brightness = np.maximum(0.0, 1 + config.brightness * np.array([drawn.brightness for drawn in draws]))
    if config.stain and draws:
        # How strongly a slide is stained depends on the laboratory, and reports are about shapes. Not for images other
        # than haematoxylin and eosin, nor where staining itself is reported.
        strengths = 1 + config.stain * np.array([[drawn.haematoxylin, drawn.eosin] for drawn in draws])
        at_once = brightness < 2  # else it would show that nothing is rounded in between
        _restain(out, strengths, np.where(at_once, brightness, 1.0))
        brightness = np.where(at_once, 1.0, brightness)
    for pixels, factor in zip(out, brightness):
        if factor != 1:
            grey_levels = np.rint(np.minimum(np.arange(256) * factor, 255)).astype(np.uint8)
            pixels[:] = grey_levels[pixels]


@lru_cache(maxsize=1024)
def _reflected(size: int, shift: int) -> np.ndarray:
    """Where each of `size` places is found in an image that is moved and goes on as in a mirror at its borders."""
    period = max(1, 2 * (size - 1))
    places = np.abs(np.arange(size) + shift) % period
    return np.minimum(places, period - places)


def _shift(image: np.ndarray, down: int, right: int, out: np.ndarray) -> None:
    """Fill `out` with what lies `down` and `right` of each pixel."""
    size = len(image)
    rows = image[_reflected(size, down)] if down else image
    # Pieces of rows are copied fast and single pixels slowly: only those of the border.
    first, last = min(size, max(0, -right)), max(0, min(size, size - right))
    if first < last:
        out[:, first:last] = rows[:, first + right : last + right]
    columns = _reflected(size, right)
    for border in (slice(0, first), slice(max(first, last), size)):
        if border.start < border.stop:
            out[:, border] = rows[:, columns[border]]


def _restain(images: Sequence[np.ndarray], strengths: np.ndarray, brightness: np.ndarray) -> None:
    """Multiply the amounts of two stains, which are additive in optical density (Beer and Lambert), then all light.

    Args:
        images: of each (size, size, 3) uint8, contiguous; they are changed.
        strengths: (images, 2) factors of haematoxylin and eosin.
        brightness: (images) factors of light.
    """
    size = len(images[0])
    change = _UNMIXING * np.insert(np.maximum(0.0, strengths), 2, 1.0, axis=1)[:, None] @ STAINS  # (images, 3, 3)
    together = _PIXELS_AT_ONCE if size % _PIXELS_AT_ONCE == 0 else 1
    changes = np.zeros((len(images), together, 3, together, 3), dtype=np.float32)
    changes[:, np.arange(together), :, np.arange(together)] = change
    mixings = changes.reshape(-1, 3 * together, 3 * together)
    # A density is log 256 - log(grey level + 1); what the first of the two comes to is a factor in the end.
    factors = np.tile(brightness[:, None] * 256 ** (1 - change.sum(1)), size).astype(np.float32)
    # torch takes half of NumPy's time for logarithms and exponentials; both work on the same two pieces of memory.
    densities, light = np.empty((2, size, 3 * size), dtype=np.float32)
    torch_densities, torch_light = torch.from_numpy(densities), torch.from_numpy(light)
    rows, mixed = (values.reshape(size, -1, 3 * together) for values in (densities, light))
    for image, mixing, factor, lamp in zip(images, mixings, torch.from_numpy(factors), brightness):
        np.copyto(densities, image.reshape(densities.shape))
        torch_densities.add_(1).log_()
        # Row by row: BLAS would share one large product among threads, which costs more than it brings.
        np.matmul(rows, mixing, out=mixed)
        torch_light.exp_().mul_(factor).add_(0.5 - lamp).clamp_(0, 255 * min(1.0, lamp) + 0.5)
        np.copyto(image, light.reshape(image.shape), casting="unsafe")  # rounded down, hence the half
