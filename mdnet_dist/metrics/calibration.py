"""Whether probabilities mean what they say: reliability, expected calibration error, temperature scaling.

Guo, Pleiss, Sun, Weinberger: "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BINS = 15
"""Of equal width between 0 and 1, as in the paper."""
LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures between which is searched; what lies outside is no question of scale any more."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability diagram in numbers: a row for each bin that holds an image."""

    lower: list[float]  # of the bin, exclusive; the first bin holds 0 too
    upper: list[float]  # inclusive
    images: list[int]
    confidence: list[float]  # mean probability of the predicted class
    accuracy: list[float]  # share that was right

    @property
    def error(self) -> float:
        """The expected calibration error: |accuracy - confidence|, averaged over the images."""
        gaps = [abs(right - sure) * count for right, sure, count in zip(self.accuracy, self.confidence, self.images)]
        return sum(gaps) / sum(self.images)


def reliability(confidences: Sequence[float], correct: Sequence[bool], bins: int = BINS) -> Reliability:
    """Sort predictions into bins by their confidence.

    Args:
        confidences: probability of each image's predicted class.
        correct: whether that class was right.

    Raises:
        ValueError: no image, or not as many of both.
    """
    sure, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not len(sure) or len(sure) != len(right):
        raise ValueError(f"{len(sure)} confidences and {len(right)} outcomes; as many of both are needed, and one")
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    filled = np.unique(place)
    return Reliability(
        lower=[float(edges[k]) for k in filled],
        upper=[float(edges[k + 1]) for k in filled],
        images=[int((place == k).sum()) for k in filled],
        confidence=[float(sure[place == k].mean()) for k in filled],
        accuracy=[float(right[place == k].mean()) for k in filled],
    )


def fit_temperature(logits: ArrayLike, labels: Sequence[int]) -> float:
    """The temperature T that makes softmax(logits / T) most likely on held-out images.

    The negative log-likelihood is convex in 1/T, so that its derivative has one zero. Where a small set is predicted
    without a mistake, the best T would be 0; so the targets are smoothed, as Platt did it for two classes, but by the
    weight of one image that belongs to all classes alike: a mistake-free set of n images promises no more.

    Args:
        logits: (n, N), of images with a label.
        labels: n class numbers.

    Returns:
        T between `LOWEST` and `HIGHEST`; 1.0 without images or where no logit differs.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.size == 0:
        return 1.0
    n, classes = values.shape
    values = values - values.mean(axis=1, keepdims=True)
    if classes < 2 or not np.any(values):
        return 1.0
    targets = np.full((n, classes), 1.0 / classes)
    targets[np.arange(n), np.asarray(labels)] += n
    targets /= n + 1

    def slope(inverse: float) -> float:
        """Derivative of the negative log-likelihood with respect to 1/T; it grows with 1/T."""
        scaled = values * inverse
        probabilities = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        return float(((probabilities - targets) * values).sum())

    low, high = np.log(1.0 / HIGHEST), np.log(1.0 / LOWEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(float(np.exp(middle))) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))
