"""Painting cells into maps of stain: nuclei with chromatin and nucleoli, mitotic figures, cell borders.

A map is (S, S) float32 and holds a concentration of haematoxylin or eosin; painting changes it in place. Shapes are
as in `synth_nuclei`. All cells of a kind are computed as one (N, W, W) block of windows, then laid down one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_shards.synth_nuclei import Bools, Floats, Nuclei


def paint_nuclei(haematoxylin: Floats, eosin: Floats, nuclei: Nuclei) -> None:
    """Paint nuclei over what is there; where two overlap, the light passes both and the place is darker."""
    if not len(nuclei):
        return
    reach = int(np.ceil(1.25 * float(nuclei.long.max()))) + 2
    dx, dy = _offsets(nuclei.x, nuclei.y, reach)
    cos, sin = _column(np.cos(nuclei.angle)), _column(np.sin(nuclei.angle))
    long, short = _column(nuclei.long), _column(nuclei.short)
    u, v = (dx * cos + dy * sin) / long, (dy * cos - dx * sin) / short
    q = np.sqrt(u * u + v * v) + 1e-6
    # Harmonics of the outline: (c1 + i s1)**k = cos(k phi) + i sin(k phi).
    c1, s1 = u / q, v / q
    c, s = c1, s1
    rho = np.ones_like(q)
    for harmonic in range(nuclei.outline.shape[1]):
        c, s = c * c1 - s * s1, s * c1 + c * s1
        rho += _column(nuclei.outline[:, harmonic, 0]) * c + _column(nuclei.outline[:, harmonic, 1]) * s
    mean_radius = np.sqrt(long * short)
    inside = (1 - q / rho) * mean_radius  # distance from the outline, about; negative outside
    alpha = np.clip(inside + 0.5, 0, 1)
    rim = np.exp(-((inside / (0.20 * mean_radius)) ** 2))
    seen = _column((nuclei.nucleolus > 0).astype(np.float32))
    # A nucleus with a prominent nucleolus is vesicular: pale within, with a distinct membrane.
    chromatin = _column(nuclei.shade) * (1.0 - 0.38 * seen + (0.12 + 0.45 * seen) * rim)
    spot = np.clip((_column(nuclei.nucleolus) - np.hypot(u * long - 0.25 * short * seen, v * short)) * 1.2 + 0.5, 0, 1)
    spot = spot * seen
    chromatin = chromatin * (1 - spot) + 1.75 * spot
    for window, a, stain, dot in zip(_windows(nuclei.x, nuclei.y, reach, len(haematoxylin)), alpha, chromatin, spot):
        area, part = window
        haematoxylin[area] += a[part] * (stain[part] - 0.65 * haematoxylin[area])
        eosin[area] += a[part] * (0.25 + 0.5 * dot[part] - 0.55 * eosin[area])


def paint_mitoses(
    haematoxylin: Floats, eosin: Floats, figures: Nuclei, r: float, atypical: float, rng: np.random.Generator
) -> Bools:
    """Paint a mitotic figure in place of each nucleus: chromosomes without a membrane, in a cleared cell.

    Args:
        haematoxylin, eosin: the maps.
        figures: the nuclei that divide.
        r: radius of an average nucleus.
        atypical: share of the figures with three poles.
        rng: source of all randomness.

    Returns:
        (S, S) the pixels of the figures.
    """
    side = len(haematoxylin)
    mask = np.zeros((side, side), np.bool_)
    if not len(figures):
        return mask
    reach = int(np.ceil(2.4 * r)) + 2
    dx, dy = _offsets(figures.x, figures.y, reach)
    halo = np.clip((1.95 * r - np.hypot(dx, dy)) / (0.5 * r), 0, 1)
    for n, (area, part) in enumerate(_windows(figures.x, figures.y, reach, side)):
        clear = halo[n][part]
        haematoxylin[area] *= 1 - 0.93 * clear
        eosin[area] += clear * (0.20 - 0.8 * eosin[area])
        clump = np.zeros(clear.shape, np.float32)
        for x, y in _chromosomes(float(figures.angle[n]), atypical, rng) * r:
            distance = np.hypot(dx[n][part] - x, dy[n][part] - y)
            np.maximum(clump, np.clip(rng.uniform(0.30, 0.42) * r - distance + 0.5, 0, 1), out=clump)
        haematoxylin[area] += clump * (2.1 - haematoxylin[area])
        eosin[area] += clump * (0.35 - eosin[area])
        mask[area] |= clump > 0.4
    return mask


def _chromosomes(angle: float, atypical: float, rng: np.random.Generator) -> Floats:
    """Where the chromosomes of one figure lie, in units of r around its centre: (M, 2)."""
    line = np.linspace(-0.95, 0.95, 9)
    if rng.random() < atypical:  # three poles
        arms = angle + np.array([0.0, 2.1, 4.2]) + rng.normal(0, 0.2, 3)
        points = np.concatenate([np.outer(np.linspace(0.1, 1.15, 5), (np.cos(arm), np.sin(arm))) for arm in arms])
    else:
        phase = rng.choice(3, p=(0.5, 0.3, 0.2))
        if phase == 0:  # metaphase: a plate seen from the side
            points = np.stack([0 * line, line * rng.uniform(0.9, 1.1)], 1)
        elif phase == 1:  # anaphase: two plates that part
            gap = rng.uniform(0.6, 0.8)
            points = np.concatenate([np.stack([0 * line + shift, 0.8 * line], 1) for shift in (-gap, gap)])
        else:  # prometaphase: a ragged clump
            turn = np.linspace(0, 2 * np.pi, 10)
            points = rng.uniform(0.3, 0.85, (10, 1)) * np.stack([np.cos(turn), np.sin(turn)], 1)
        cos, sin = np.cos(angle), np.sin(angle)
        points = points @ np.array([[cos, sin], [-sin, cos]])
    return (points + rng.normal(0, 0.06, points.shape)).astype(np.float32)


def paint_cells(eosin: Floats, inside: Bools, lost: Bools, nuclei: Nuclei, r: float) -> None:
    """Paint the cytoplasm of each nucleus up to the border with the next cell.

    Args:
        eosin: the map.
        inside: (S, S) the urothelium.
        lost: (S, S) where polarity is lost: cells no longer hold together, and borders are pale gaps.
        nuclei: of all cells.
        r: radius of an average nucleus.
    """
    if not len(nuclei):
        return
    side = len(eosin)
    reach = int(np.ceil(4.0 * r))
    dx, dy = _offsets(nuclei.x, nuclei.y, reach)
    distance = np.hypot(dx, dy) - _column(np.sqrt(nuclei.long * nuclei.short))
    nearest = np.full((side, side), 4 * r, np.float32)
    second = np.full((side, side), 4 * r, np.float32)
    for (area, part), d in zip(_windows(nuclei.x, nuclei.y, reach, side), distance):
        near, here = nearest[area], d[part]
        np.minimum(second[area], np.maximum(near, here), out=second[area])
        np.minimum(near, here, out=near)
    border = np.clip(1 - (second - nearest) / (0.30 * r), 0, 1) * (nearest < 3 * r)
    eosin += inside * (np.where(lost, -0.30, 0.20) * border + 0.05 * np.clip(nearest / (2 * r), 0, 1) - 0.04)


def _offsets(x: Floats, y: Floats, reach: int) -> tuple[Floats, Floats]:
    """Distances (dx, dy) of the pixels of N windows from the cells' centres: each (N, W, W) with W = 2 reach + 1."""
    steps = np.arange(-reach, reach + 1, dtype=np.float32)
    dx = steps[None, None, :] - _column(x - np.floor(x))
    dy = steps[None, :, None] - _column(y - np.floor(y))
    return np.broadcast_arrays(dx, dy)  # type: ignore[return-value]


def _windows(x: Floats, y: Floats, reach: int, side: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """For each cell: where its window lies in the map, and which part of the window that is."""
    for column, row in zip(np.floor(x).astype(int).tolist(), np.floor(y).astype(int).tolist()):
        top, left = max(row - reach, 0), max(column - reach, 0)
        bottom, right = max(min(row + reach + 1, side), top), max(min(column + reach + 1, side), left)
        area = slice(top, bottom), slice(left, right)
        yield (
            area,
            (slice(top - row + reach, bottom - row + reach), slice(left - column + reach, right - column + reach)),
        )


def _column(values: Floats) -> Floats:
    """(N,) as (N, 1, 1), to meet windows."""
    return values[:, None, None]
