"""Nuclei of the synthetic urothelium: where they lie, how they are shaped, and which are mitotic figures.

Lengths are in pixels, angles in radians; r is the radius of an average nucleus. Images are indexed [row, column] and
have side S; arrays indexed by nucleus have length N. Stains are concentrations: 1 is an average nucleus's chromatin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

# What each grade looks like. Neighbouring grades are about a constant factor apart: equally easy to tell.
SPACING = {"normal": 1.50, "mild": 1.22, "moderate": 1.00, "severe": 0.82}
"""Crowding: distance of neighbours over the sum of their radii; random packing then covers about 0.55 / spacing**2."""
SIZE_SPREAD = {"normal": 0.03, "mild": 0.16, "moderate": 0.30, "severe": 0.48}
"""Pleomorphism: standard deviation of the logarithm of the nuclear radius."""
OUTLINE_SPREAD = {"normal": 0.01, "mild": 0.03, "moderate": 0.055, "severe": 0.085}
"""Pleomorphism: how far the outline departs from an ellipse, as a fraction of the radius."""
SHADE_SPREAD = {"normal": 0.03, "mild": 0.10, "moderate": 0.19, "severe": 0.30}
"""Pleomorphism: standard deviation of the chromatin's density from nucleus to nucleus."""
MEAN_RADIUS = {"normal": 0.92, "mild": 0.98, "moderate": 1.04, "severe": 1.10}
"""Pleomorphism: average radius in units of r; nuclei grow as they become atypical."""
MITOSES_PER_AREA = {"rare": 0.0004, "infrequent": 0.0070, "frequent": 0.0170}
"""Mitosis: figures per r**2 of urothelium."""
LEAST_MITOSES = {"rare": 0, "infrequent": 2, "frequent": 5}
HIGHEST_MITOSIS = {"rare": 0.35, "infrequent": 0.5, "frequent": 1.0}
"""Mitosis: how far above the basement membrane figures occur, as a fraction of the urothelium's thickness."""
NUCLEOLUS_SHARE = {"inconspicuous": 0.0, "prominent": 0.85}
"""Nucleoli: share of the nuclei that show one."""
ASPECT = 1.8  # long axis over short axis of an average nucleus


@dataclass(frozen=True, kw_only=True)
class Nuclei:
    """N ellipses with irregular outlines. Every field but `outline` has shape (N,)."""

    x: Floats
    y: Floats
    long: Floats  # half the long axis
    short: Floats  # half the short axis
    angle: Floats  # of the long axis, from the x axis towards the y axis
    shade: Floats  # haematoxylin of the chromatin
    nucleolus: Floats  # radius of the nucleolus; 0 where none is seen
    outline: Floats  # (N, 3, 2): cosine and sine amplitudes of the outline's harmonics 2 to 4, in radii

    def __len__(self) -> int:
        return len(self.x)

    def where(self, chosen: Bools) -> Nuclei:
        """Only the chosen ones. Args: chosen: (N,)."""
        return Nuclei(**{name: values[chosen] for name, values in vars(self).items()})


def ellipses(
    x: Floats,
    y: Floats,
    long: Floats,
    short: Floats,
    angle: Floats,
    shade: float,
    wobble: float,
    rng: np.random.Generator,
) -> Nuclei:
    """Nuclei of other cells than the urothelium's. Args: shade, wobble: of chromatin and outline, the same for all."""
    count = len(x)
    return Nuclei(
        x=x, y=y, long=long, short=short, angle=angle,
        shade=np.full(count, shade, np.float32),
        nucleolus=np.zeros(count, np.float32),
        outline=(wobble * rng.standard_normal((count, 3, 2))).astype(np.float32),
    )  # fmt: skip


def place_nuclei(
    grades: dict[str, str],
    allowed: Bools,
    depth: Floats,
    upward: Floats,
    lost: Bools,
    r: float,
    rng: np.random.Generator,
) -> Nuclei:
    """Put nuclei into the urothelium until no more fit at the spacing of the crowding grade.

    Args:
        grades: {topic: grade}.
        allowed: (S, S) where a centre may lie; not empty.
        depth: (S, S) distance from the basement membrane.
        upward: (S, S) angle of the direction from the basement membrane to the surface.
        lost: (S, S) where polarity is lost: nuclei lie in any direction and in no rows.
        r: radius of an average nucleus.
        rng: source of all randomness.
    """
    side = allowed.shape[0]
    pixels = np.flatnonzero(allowed)
    spacing = SPACING[grades["crowding"]]
    pleomorphism = grades["pleomorphism"]
    mean_radius = r * MEAN_RADIUS[pleomorphism]
    mean_long, mean_short = mean_radius * ASPECT**0.5, mean_radius / ASPECT**0.5

    # Random sequential packing: places are tried in random order, and one that is taken is dropped.
    tries = rng.choice(pixels, size=min(100 + int(50 * len(pixels) / r**2), 20_000))
    row_pitch = 1.9 * mean_long * spacing
    off_row = np.abs((depth.ravel()[tries] / row_pitch - 0.05) % 1.0 - 0.5)
    tries = tries[lost.ravel()[tries] | (off_row < 0.12)]
    count = len(tries)
    any_angle = rng.uniform(-np.pi / 2, np.pi / 2, count)
    try_angle = np.where(lost.ravel()[tries], any_angle, upward.ravel()[tries] + 0.10 * rng.standard_normal(count))
    spread = SIZE_SPREAD[pleomorphism]
    radius = mean_radius * np.exp(np.clip(spread * rng.standard_normal(count), -0.75, 0.75))
    aspect = ASPECT * np.exp(np.clip((0.05 + 0.35 * spread) * rng.standard_normal(count), -0.35, 0.35))
    long, short = radius * np.sqrt(aspect), radius / np.sqrt(aspect)

    taken = np.zeros((side, side), np.bool_)
    places: list[int] = []
    angles: list[float] = []
    for place, direction in zip(tries.tolist(), try_angle.tolist()):
        row, column = divmod(place, side)
        if taken[row, column]:
            continue
        # Sizes are used in the order in which places are found, so that packing cannot prefer small nuclei.
        nucleus = len(places)
        half_long = spacing * (long[nucleus] + mean_long)
        half_short = spacing * (short[nucleus] + mean_short)
        places.append(place)
        angles.append(direction)
        reach = int(half_long) + 1
        top, left = max(row - reach, 0), max(column - reach, 0)
        block = taken[top : row + reach + 1, left : column + reach + 1]
        dy = np.arange(top - row, top - row + block.shape[0])[:, None]
        dx = np.arange(left - column, left - column + block.shape[1])[None]
        cos, sin = np.cos(direction), np.sin(direction)
        block |= ((dx * cos + dy * sin) / half_long) ** 2 + ((dy * cos - dx * sin) / half_short) ** 2 < 1
    count = len(places)
    shade = 0.78 * np.exp(np.clip(SHADE_SPREAD[pleomorphism] * rng.standard_normal(count), -0.5, 0.42))
    has_nucleolus = rng.random(count) < NUCLEOLUS_SHARE[grades["nucleoli"]]
    nucleolus = has_nucleolus * np.maximum(0.30 * radius[:count], 0.24 * r)
    amplitude = OUTLINE_SPREAD[pleomorphism] * rng.standard_normal((count, 3, 2)) * np.array([[1.2], [1.0], [0.6]])
    return Nuclei(
        x=(np.array(places) % side).astype(np.float32),
        y=(np.array(places) // side).astype(np.float32),
        long=long[:count].astype(np.float32),
        short=short[:count].astype(np.float32),
        angle=np.array(angles, np.float32),
        shade=shade.astype(np.float32),
        nucleolus=nucleolus.astype(np.float32),
        outline=np.clip(amplitude, -0.2, 0.2).astype(np.float32),
    )


def choose_mitoses(
    grade: str, nuclei: Nuclei, height: Floats, area: float, r: float, rng: np.random.Generator
) -> Bools:
    """Which nuclei are in division: (N,), far from each other where possible.

    Args:
        grade: of mitosis.
        nuclei: those of the urothelium.
        height: (N,) distance from the basement membrane over the urothelium's thickness.
        area: of the urothelium, in pixels.
        r: radius of an average nucleus.
        rng: source of all randomness.
    """
    count = max(LEAST_MITOSES[grade], int(rng.poisson(0.05) + MITOSES_PER_AREA[grade] * area / r**2 + rng.random()))
    inside = np.flatnonzero(height < HIGHEST_MITOSIS[grade])
    chosen = np.zeros(len(nuclei), np.bool_)
    distance = np.full(len(nuclei), np.inf)
    for apart in (5 * r, 3 * r, 0):
        for nucleus in rng.permutation(inside):
            if chosen.sum() < count and distance[nucleus] > apart:
                chosen[nucleus] = True
                distance = np.minimum(distance, np.hypot(nuclei.x - nuclei.x[nucleus], nuclei.y - nuclei.y[nucleus]))
    return chosen
