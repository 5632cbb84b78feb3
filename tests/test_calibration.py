"""Reliability, expected calibration error and temperature scaling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist.figures import draw_reliability
from mdnet_dist.metrics.calibration import HIGHEST, LOWEST, fit_temperature, reliability


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def test_worked_example(tmp_path: Path) -> None:
    """Bins of a tenth: (0.5, 0.6] holds two images, (0.9, 1.0] three; 1.0 and 0.6 lie in the bins that they end."""
    found = reliability([0.55, 0.6, 0.95, 1.0, 0.91], [True, False, True, True, False], bins=10)
    assert found.images == [2, 3]
    assert found.lower == pytest.approx([0.5, 0.9])
    assert found.confidence == pytest.approx([0.575, 2.86 / 3])
    assert found.accuracy == pytest.approx([0.5, 2 / 3])
    assert found.error == pytest.approx((2 * 0.075 + 3 * (2.86 / 3 - 2 / 3)) / 5)
    draw_reliability(found, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 5000


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_error_against_a_loop(images: list[tuple[float, bool]], bins: int) -> None:
    confidences, correct = [sure for sure, _ in images], [right for _, right in images]
    found = reliability(confidences, correct, bins)
    assert sum(found.images) == len(images)
    total = 0.0
    for lower, upper in zip(found.lower, found.upper):
        inside = [(s, r) for s, r in images if lower < s <= upper or (s == 0 and lower == 0)]
        total += abs(sum(s for s, _ in inside) - sum(r for _, r in inside))
    assert found.error == pytest.approx(total / len(images))
    assert 0 <= found.error <= 1


def test_nothing_to_calibrate() -> None:
    with pytest.raises(ValueError, match="0 confidences"):
        reliability([], [])
    assert fit_temperature([], []) == 1.0
    assert fit_temperature(np.zeros((5, 3)), [0] * 5) == 1.0
    assert fit_temperature(np.random.default_rng(0).normal(size=(5, 1)), [0] * 5) == 1.0


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(true_temperature: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (20_000, 4))
    labels = [rng.choice(4, p=row) for row in softmax(logits / true_temperature)]
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(true_temperature, rel=0.05)
    errors = []
    for temperature in (1.0, fitted):
        probabilities = softmax(logits / temperature)
        correct = probabilities.argmax(1) == np.array(labels)
        errors.append(reliability(list(probabilities.max(1)), list(correct)).error)
    assert errors[1] < 0.015
    assert errors[1] <= errors[0] + 1e-3


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 40))
def test_no_temperature_is_more_likely(seed: int, classes: int, images: int) -> None:
    """Against a grid, with the smoothed targets written out; and a shift of an image's logits changes nothing."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 4, (images, classes)), rng.integers(0, classes, images)
    targets = np.full((images, classes), 1 / classes / (images + 1))
    targets[np.arange(images), labels] = (images + 1 / classes) / (images + 1)

    def loss(temperature: float) -> float:
        return float(-(targets * np.log(np.maximum(softmax(logits / temperature), 1e-300))).sum())

    fitted = fit_temperature(logits, labels.tolist())
    assert LOWEST * 0.999 <= fitted <= HIGHEST * 1.001
    assert loss(fitted) <= min(map(loss, np.geomspace(LOWEST, HIGHEST, 200))) + 1e-6
    assert fit_temperature(logits + rng.normal(0, 100, (images, 1)), labels.tolist()) == pytest.approx(fitted, rel=1e-6)


def test_a_small_set_without_a_mistake_does_not_make_the_network_certain() -> None:
    logits = np.eye(3)[[0, 1, 2, 0, 1]] * 4.0
    temperature = fit_temperature(logits, [0, 1, 2, 0, 1])
    assert softmax(logits / temperature).max() < 0.9
