"""Procedural fields of bladder tissue in H&E stain: architecture, cells, stain, focus. A pure function of its inputs.

A field shows stroma with vessels, urothelium above its basement membrane, and lumen. Its geometry is one map, the
depth of each pixel: negative in the stroma, 0 at the basement membrane, then rising to the surface at the thickness.
Light passes the stains by Beer and Lambert: RGB = glass * exp(-(H * haematoxylin + E * eosin)).
Lengths are in pixels; r is the radius of an average nucleus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data_shards.synth_nuclei import Bools, Floats, Nuclei, choose_mitoses, ellipses, place_nuclei
from data_shards.synth_paint import paint_cells, paint_mitoses, paint_nuclei

INSUFFICIENT_KINDS = ("out of focus", "crushed", "stroma", "lumen")
"""Why an image cannot be judged; `draw_field` draws one for insufficient information."""
LOST_SHARE = {"not lost": 0.0, "partially lost": 0.5, "completely lost": 1.0}
"""Polarity: share of the urothelium in which nuclei lie in any direction and in no rows."""
THICKNESS = {"normal": (8.5, 10.0), "low grade": (8.5, 10.5), "high grade": (9.0, 11.5)}
"""Of the urothelium, in r, by conclusion."""
FLAT_SHARE = {"normal": 0.9, "low grade": 0.1, "high grade": 0.15}
"""How often the mucosa is flat rather than papillary, by conclusion."""
UNDERNEATH = {"pleomorphism": "mild", "crowding": "moderate", "mitosis": "rare", "nucleoli": "inconspicuous"}
"""What lies under a field that cannot be judged."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the slides of one patient look."""

    haematoxylin: Floats  # (3,) optical density of R, G, B at concentration 1
    eosin: Floats  # (3,)
    glass: Floats  # (3,) light that passes the bare slide, 0..255
    blur: float  # standard deviation of the focus, in units of r


@dataclass(frozen=True, kw_only=True)
class Field:
    """One image and what is true of it."""

    image: NDArray[np.uint8]  # (S, S, 3)
    urothelium: Bools  # (S, S)
    mitoses: Bools  # (S, S) pixels of the mitotic figures
    nuclei: Nuclei  # of the urothelium, without mitotic figures
    figures: Nuclei  # the nuclei in whose place mitotic figures were painted


def nuclear_radius_px(size_px: int) -> float:
    """r in an image of this side: larger images show both more cells and larger ones (128 px: 4.8; 512 px: 9.6)."""
    return 4.8 * (size_px / 128) ** 0.5


def draw_style(rng: np.random.Generator) -> Style:
    """The stain and focus of one patient's slides."""
    haematoxylin = np.array([0.92, 0.92, 0.40]) * rng.uniform([0.88, 0.92, 0.8], [1.12, 1.08, 1.25])
    eosin = np.array([0.12, 0.78, 0.34]) * rng.uniform([0.6, 0.9, 0.8], [1.5, 1.1, 1.25])
    return Style(
        haematoxylin=(haematoxylin * rng.uniform(0.85, 1.2)).astype(np.float32),
        eosin=(eosin * rng.uniform(0.75, 1.25)).astype(np.float32),
        glass=np.array(rng.uniform([236, 233, 236], [248, 246, 249]), np.float32),
        blur=rng.uniform(0.05, 0.14),
    )


def draw_field(grades: dict[str, str], style: Style, size_px: int, rng: np.random.Generator) -> Field:
    """Draw one field.

    Args:
        grades: {topic: true grade}; only the conclusion where it is insufficient information.
        style: of the patient.
        size_px: side S of the image.
        rng: source of all randomness.
    """
    r = nuclear_radius_px(size_px)
    unclear = "" if len(grades) > 1 else str(rng.choice(INSUFFICIENT_KINDS))
    if unclear:
        grades = {**UNDERNEATH, "polarity": str(rng.choice(list(LOST_SHARE))), "conclusion": "low grade"}
    depth, thickness = _architecture(grades["conclusion"], unclear, size_px, r, rng)
    # Where polarity is lost, the umbrella cells are gone too and the surface is ragged.
    disorder = _patches((depth > 0) & (depth < thickness), LOST_SHARE[grades["polarity"]], 9 * r, rng)
    lost = disorder > 0.5
    thickness = thickness + (0.10 + 0.45 * disorder) * r * _noise(size_px, 1.5 * r, rng)
    urothelium = (depth > 0) & (depth < thickness)

    haematoxylin, eosin = _ground(depth, thickness, disorder, r, rng)
    gradient_y, gradient_x = np.gradient(depth)
    upward = np.arctan2(gradient_y, gradient_x)
    _paint_stroma(haematoxylin, eosin, depth, upward, r, rng)
    allowed = urothelium & (depth > 0.8 * r) & (thickness - depth > np.where(lost, 0.7 * r, 1.8 * r))
    nuclei = place_nuclei(grades, allowed if allowed.any() else urothelium, depth, upward, lost, r, rng)
    at = nuclei.y.astype(int), nuclei.x.astype(int)
    dividing = choose_mitoses(grades["mitosis"], nuclei, depth[at] / thickness[at], float(urothelium.sum()), r, rng)
    dividing &= not unclear  # a figure that nobody could tell for one would be marked
    paint_cells(eosin, urothelium, lost, nuclei, r)
    paint_nuclei(haematoxylin, eosin, nuclei.where(~dividing))
    haematoxylin *= 1 + 0.13 * _noise(size_px, 0.4 * r, rng)  # chromatin is granular
    atypical = 0.25 if grades["conclusion"] == "high grade" else 0.0
    mitoses = paint_mitoses(haematoxylin, eosin, nuclei.where(dividing), r, atypical, rng)
    if unclear == "crushed":
        haematoxylin, eosin = _crush(haematoxylin, eosin, r, rng)
    blur = r * (rng.uniform(0.7, 1.1) if unclear == "out of focus" else style.blur * rng.uniform(0.8, 1.25))
    return Field(
        image=_photograph(haematoxylin, eosin, style, blur, rng),
        urothelium=urothelium,
        mitoses=mitoses,
        nuclei=nuclei.where(~dividing),
        figures=nuclei.where(dividing),
    )


def _architecture(
    conclusion: str, unclear: str, size_px: int, r: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Depth of each pixel, and the local thickness of the urothelium: each (S, S)."""
    # Smooth maps: computed on a coarse grid and enlarged.
    coarse = 64
    centres = (np.arange(coarse) + 0.5) * (size_px / coarse) - size_px / 2
    direction = rng.uniform(0, 2 * np.pi)
    along = centres[None] * np.cos(direction) + centres[:, None] * np.sin(direction)
    across = centres[:, None] * np.cos(direction) - centres[None] * np.sin(direction)
    bend = _noise(coarse, 0.5 * coarse, rng)
    thickness = rng.uniform(*THICKNESS[conclusion]) * r
    if unclear == "stroma":
        thickness = rng.uniform(2.0, 3.0) * r
        depth = along + rng.uniform(-0.40, -0.33) * size_px + 0.8 * r * bend
    elif unclear == "lumen":
        thickness = rng.uniform(3.0, 4.5) * r
        depth = along + rng.uniform(0.36, 0.42) * size_px + thickness + 0.8 * r * bend
    elif rng.random() < FLAT_SHARE[conclusion]:
        depth = along + rng.uniform(0.35, 0.65) * thickness + 1.2 * r * bend
    else:
        return _papillae(along, across + 1.5 * r * bend, thickness, size_px, r, rng)
    return _enlarge(depth, size_px), np.full((size_px, size_px), thickness, np.float32)


def _papillae(
    along: Floats, across: Floats, thickness: float, size_px: int, r: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Papillae side by side, cut lengthwise (each a stroma core with a round tip) or across (islands)."""
    core = rng.uniform(1.6, 2.6) * r
    pitch = 2 * (thickness + core) * rng.uniform(0.88, 1.12)
    shift = rng.uniform(-0.35, 0.35) * pitch
    lengthwise = rng.random() < 0.6
    reach = int(size_px / pitch) + 1
    distances = []
    for column in range(-reach, reach + 1):
        if lengthwise:
            tips = [(-9.0 * size_px, rng.uniform(0.05, 0.6) * size_px)]
        else:
            row_shift = (0.5 * (column % 2) + rng.uniform(-0.15, 0.15)) * pitch
            tips = [
                (row * pitch + row_shift, row * pitch + row_shift + rng.uniform(0, 0.3) * pitch)
                for row in range(-reach, reach + 1)
            ]
        middle = column * pitch + shift + rng.uniform(-0.5, 0.5) * r
        for base, tip in tips:
            beyond = np.maximum(np.maximum(along - tip, base - along), 0)
            distances.append(np.hypot(across - middle, beyond) - core * rng.uniform(0.8, 1.2))
    nearest, second = np.partition(np.stack(distances), 1, axis=0)[:2]
    # Two papillae that meet leave a cleft: half way between their cores the surface is reached.
    local = np.minimum(thickness, (nearest + second) / 2 - 0.35 * r)
    return _enlarge(nearest, size_px), _enlarge(np.maximum(local, 2 * r), size_px)


def _ground(
    depth: Floats, thickness: Floats, disorder: Floats, r: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Maps of haematoxylin and eosin (S, S) before any nucleus: lumen, cytoplasm, fibres, basement membrane."""
    side = len(depth)
    cloud = _noise(side, 2.5 * r, rng)
    phase = depth * (2 * np.pi / (1.3 * r)) + 3.0 * _noise(side, 3 * r, rng) + 1.2 * _noise(side, 0.9 * r, rng)
    fibres = np.sin(phase) * np.clip(0.6 + 0.5 * cloud, 0, 1.3)
    stroma = np.clip(-depth / (0.3 * r) + 0.5, 0, 1)
    surface = np.clip((thickness - depth) / 1.2 + 0.5, 0, 1)
    umbrella = np.clip(1.3 - (thickness - depth) / (1.5 * r), 0, 1) * (1 - disorder)
    cytoplasm = 0.40 + 0.04 * cloud + 0.32 * umbrella
    connective = 0.62 + 0.14 * fibres + 0.07 * cloud
    debris = 0.10 * np.clip(_noise(side, 0.8 * r, rng) - 1.7, 0, 1)
    eosin = surface * (stroma * connective + (1 - stroma) * cytoplasm) + (1 - surface) * debris
    eosin += (0.32 - 0.24 * disorder) * np.exp(-((depth / (0.28 * r)) ** 2)) * surface
    haematoxylin = surface * (0.10 - 0.04 * stroma + 0.02 * cloud) + (1 - surface) * 0.01
    return haematoxylin.astype(np.float32), eosin.astype(np.float32)


def _paint_stroma(
    haematoxylin: Floats, eosin: Floats, depth: Floats, upward: Floats, r: float, rng: np.random.Generator
) -> None:
    """Add capillaries with red cells, spindle-shaped nuclei along the fibres, and a few lymphocytes."""
    side = len(depth)
    deep = np.flatnonzero(depth < -1.2 * r)
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    for centre in rng.choice(deep, size=min(12, int(rng.poisson(len(deep) / (60 * r * r)))) if len(deep) else 0):
        y, x = divmod(int(centre), side)
        angle = upward[y, x] + np.pi / 2
        dx, dy = columns - x, rows - y
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / (rng.uniform(1.4, 2.6) * r)
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / (rng.uniform(0.8, 1.2) * r)
        q = np.sqrt(u * u + v * v)
        lumen = np.clip((1 - q) * 4 + 0.5, 0, 1) * (depth < 0)
        wall = np.exp(-(((q - 1.05) / 0.16) ** 2)) * (depth < 0)
        eosin += lumen * (0.05 - eosin) + 0.25 * wall
        haematoxylin += 0.16 * wall
        for _ in range(rng.integers(1, 6)):
            red_x, red_y = x + rng.normal(0, 0.7) * r, y + rng.normal(0, 0.7) * r
            red = np.clip(0.48 * r - np.hypot(columns - red_x, rows - red_y) + 0.5, 0, 1) * lumen
            eosin += red * (1.15 - eosin)
    count = int(rng.poisson(len(deep) / (20 * r * r)))
    if not len(deep) or not count:
        return
    at = rng.choice(deep, size=count)
    lymphocyte = rng.random(count) < 0.2
    spindles = ellipses(
        (at % side).astype(np.float32),
        (at // side).astype(np.float32),
        (np.where(lymphocyte, 0.6, 1.35) * r * rng.uniform(0.85, 1.15, count)).astype(np.float32),
        (np.where(lymphocyte, 0.55, 0.36) * r * rng.uniform(0.85, 1.15, count)).astype(np.float32),
        (upward.ravel()[at] + np.pi / 2 + 0.2 * rng.standard_normal(count)).astype(np.float32),
        0.85, 0.04, rng,
    )  # fmt: skip
    paint_nuclei(haematoxylin, eosin, spindles)


def _crush(haematoxylin: Floats, eosin: Floats, r: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Smear both maps along one direction, as forceps do: nuclei become dark streaks."""
    side = len(eosin)
    angle = rng.uniform(0, np.pi)
    sway = 0.9 * r * _noise(side, 5 * r, rng)
    rows, columns = np.mgrid[:side, :side]
    steps = np.linspace(-2.4, 2.4, 13) * r
    smeared_h, smeared_e = np.zeros_like(haematoxylin), np.zeros_like(eosin)
    for step in steps:
        y = np.clip(rows + step * np.sin(angle) + sway * np.cos(angle), 0, side - 1).astype(int)
        x = np.clip(columns + step * np.cos(angle) - sway * np.sin(angle), 0, side - 1).astype(int)
        smeared_h += haematoxylin[y, x] / len(steps)
        smeared_e += eosin[y, x] / len(steps)
    return 1.5 * smeared_h, smeared_e


def _photograph(
    haematoxylin: Floats, eosin: Floats, style: Style, blur: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """The stain maps as the camera sees them: (S, S, 3). Args: blur: standard deviation in pixels."""
    haematoxylin = haematoxylin * rng.uniform(0.95, 1.05)
    eosin = eosin * rng.uniform(0.93, 1.07)
    density = haematoxylin[..., None] * style.haematoxylin + eosin[..., None] * style.eosin
    light = style.glass * np.exp(-np.maximum(density, 0))
    sharp = Image.fromarray(np.clip(light + 0.5, 0, 255).astype(np.uint8))
    seen = np.asarray(sharp.filter(ImageFilter.GaussianBlur(blur)), np.float32)
    seen = seen + 1.5 * rng.standard_normal(seen.shape, dtype=np.float32)
    return np.clip(seen + 0.5, 0, 255).astype(np.uint8)


def _patches(region: Bools, share: float, scale: float, rng: np.random.Generator) -> Floats:
    """A map, (S, S), that is 1 in patches covering this share of the region and 0 elsewhere, with soft borders."""
    noise = _noise(len(region), scale, rng)
    if share in (0.0, 1.0):
        return np.full_like(noise, share)
    return np.clip((np.quantile(noise[region], share) - noise) / 0.4 + 0.5, 0, 1).astype(np.float32)


def _noise(side: int, scale: float, rng: np.random.Generator) -> Floats:
    """A smooth random map, (side, side), of about zero mean and unit variance; `scale` pixels from bump to bump."""
    knots = max(int(np.ceil(side / scale)) + 1, 2)
    return _enlarge(1.25 * rng.standard_normal((knots, knots)), side)


def _enlarge(small: Floats | NDArray[np.float64], side: int) -> Floats:
    """A square map at another resolution, bicubic."""
    image = Image.fromarray(np.ascontiguousarray(small, dtype=np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32)
