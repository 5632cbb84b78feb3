"""How well a map of where the network looked agrees with an annotation.

    energy    share of the map's weight that lies inside (Wang et al., "Score-CAM", CVPR workshops 2020)
    pointing  whether the map's highest place lies inside (the pointing game of Zhang et al., IJCV 2018)
    iou       intersection over union of the mask and the map above the threshold that suits it best
    entropy   of the map, as a share of the largest possible: 1 is even, 0 is one position

A map that is the same everywhere scores the mask's share of the image in the first three and 1 in the last, which is
what `uniform` says: an attention that ignores the image reaches that without looking.

Shapes: h x w map positions, S px the side of the image that the network saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

CLASS_MAP, SENTENCES, UNIFORM = "class_map", "sentences", "uniform"
"""Beside the topics: the predicted class's map, the mean over all topics' maps, and a map that looks nowhere."""
_TIE = 1e-6  # values that differ by less, relatively, count as equal: enlarging a map rounds


@dataclass(frozen=True, kw_only=True)
class Localization:
    """Scores of one map of one image."""

    energy: float
    pointing: float  # 0 or 1; between them where several places are equally high
    iou: float
    entropy: float


def localize(weights: NDArray[np.floating], mask: NDArray[np.bool_]) -> Localization:
    """Score a map.

    Args:
        weights: (h, w), not negative; need not sum to 1. All zero counts as even.
        mask: (S, S) bool, on the same square.

    Raises:
        ValueError: a mask with nothing inside or nothing outside: every map would score the same.
    """
    if mask.all() or not mask.any():
        raise ValueError("a mask needs something inside and something outside")
    share = np.asarray(weights, dtype=np.float64)
    share = share / share.sum() if share.sum() > 0 else np.full(share.shape, 1 / share.size)
    large = _enlarged(share, mask.shape)
    positive = share[share > 0]
    return Localization(
        energy=float((share * coverage(mask, share.shape)).sum()),
        pointing=float(mask[large >= large.max() * (1 - _TIE)].mean()),
        iou=_best_iou(large, mask),
        entropy=float(-(positive * np.log(positive)).sum() / math.log(share.size)) if share.size > 1 else 1.0,
    )


def uniform(mask: NDArray[np.bool_]) -> Localization:
    """What a map scores that is the same everywhere."""
    inside = float(mask.mean())
    return Localization(energy=inside, pointing=inside, iou=inside, entropy=1.0)


def evidence(class_map: NDArray[np.floating]) -> NDArray[np.float64]:
    """A class activation map (h, w), in logits, as weights: by how much each position exceeds the map's mean.

    Logits have no zero of their own, so that only differences between positions say where the evidence lies.
    """
    logits = np.asarray(class_map, dtype=np.float64)
    return np.maximum(logits - logits.mean(), 0.0)


def coverage(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The share of each of the (h, w) positions' pixels that lies inside."""
    pixels = [
        (np.arange(side) * cells // side == np.arange(cells)[:, None]).astype(np.float64)  # of each row, each column
        for side, cells in zip(mask.shape, shape)
    ]
    counts = np.outer(pixels[0].sum(1), pixels[1].sum(1))
    return pixels[0] @ mask @ pixels[1].T / np.maximum(counts, 1)


def mean_localization(images: Iterable[Mapping[str, Localization]]) -> dict[str, float]:
    """Means over images: {"energy/class_map": ..., "energy/sentences": ..., "energy/TOPIC": ..., "energy/uniform"...}.

    Args:
        images: of each image with a mask {name of the map: its scores}, as `localize` and `uniform` give them.
    """
    values: dict[str, list[float]] = {}
    for maps in images:
        for name, scores in maps.items():
            for kind, value in asdict(scores).items():
                values.setdefault(f"{kind}/{name}", []).append(value)
    return {key: math.fsum(found) / len(found) for key, found in sorted(values.items())}


def mean_of_maps(maps: Iterable[Localization]) -> Localization:
    """The mean of several maps' scores, as of one image's topics."""
    rows = [asdict(scores) for scores in maps]
    return Localization(**{kind: math.fsum(row[kind] for row in rows) / len(rows) for kind in rows[0]})


def _enlarged(share: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    tensor = torch.from_numpy(share)[None, None]
    return F.interpolate(tensor, shape, mode="bilinear", align_corners=False)[0, 0].numpy()


def _best_iou(large: NDArray[np.float64], mask: NDArray[np.bool_]) -> float:
    """Intersection over union at the best threshold, among all that separate two values of the map."""
    order = np.argsort(-large, axis=None)  # cuts never part what is equal, so its order does not matter
    values, inside = large.ravel()[order], mask.ravel()[order].cumsum()
    above = np.arange(1, len(values) + 1)
    cuts = np.append(values[1:] < values[:-1] * (1 - _TIE), True)  # what is equal lies on one side
    union = above + inside[-1] - inside
    return float((inside / union)[cuts].max())
