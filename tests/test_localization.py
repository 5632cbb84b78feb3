"""Attention against annotations: hand-made maps with known scores, and what must hold of any map."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mdnet_dist.evaluation import Prediction, score
from mdnet_dist.metrics.localization import (
    Localization,
    coverage,
    evidence,
    localize,
    mean_localization,
    mean_of_maps,
    uniform,
)
from tests.saved import untrained_run
from tests.test_evaluate import evaluated
from tests.tiny import tiny_config, tiny_set

LEFT = np.zeros((8, 8), dtype=bool)
LEFT[:, :4] = True

maps = arrays(np.float64, (4, 4), elements=st.floats(0, 10, width=32))
masks = arrays(np.bool_, (12, 12)).filter(lambda mask: mask.any() and not mask.all())


# ------------------------------------------------------------------------------------------------- maps known by hand


def test_energy_of_a_hand_made_map() -> None:
    """Weights 3, 1 / 4, 2 on a mask that covers the left half and nothing of the right: (3 + 4) / 10."""
    assert localize(np.array([[3.0, 1.0], [4.0, 2.0]]), LEFT).energy == pytest.approx(0.7)
    corner = np.zeros((8, 8), dtype=bool)
    corner[:2, :4] = True  # half of the upper left position
    assert localize(np.array([[3.0, 1.0], [4.0, 2.0]]), corner).energy == pytest.approx(0.15)


def test_pointing_hits_where_the_map_is_highest() -> None:
    assert localize(np.array([[1.0, 1.0], [5.0, 1.0]]), LEFT).pointing == 1.0
    assert localize(np.array([[1.0, 1.0], [1.0, 5.0]]), LEFT).pointing == 0.0
    assert localize(np.array([[5.0, 1.0], [1.0, 5.0]]), LEFT).pointing == 0.5  # two places, one of them inside


def test_the_best_threshold_finds_the_mask() -> None:
    """A map that is highest on the left: some threshold cuts it at the mask's border."""
    assert localize(np.array([[1.0, 0.0], [1.0, 0.0]]), LEFT).iou == pytest.approx(1.0)
    assert localize(np.array([[0.0, 1.0], [0.0, 1.0]]), LEFT).iou == pytest.approx(
        0.5
    )  # all of it is the best there is


def test_entropy_of_hand_made_maps() -> None:
    assert localize(np.array([[1.0, 1.0], [0.0, 0.0]]), LEFT).entropy == pytest.approx(math.log(2) / math.log(4))
    assert localize(np.array([[0.0, 7.0], [0.0, 0.0]]), LEFT).entropy == 0.0
    assert localize(np.array([[1.0]]), LEFT).entropy == 1.0  # one position has no choice


def test_evidence_is_what_exceeds_the_mean() -> None:
    assert evidence(np.array([[-3.0, -1.0], [1.0, 3.0]])).tolist() == [[0.0, 0.0], [1.0, 3.0]]
    assert evidence(np.full((2, 2), 5.0)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_coverage_counts_pixels_of_sides_that_do_not_divide() -> None:
    mask = np.zeros((5, 5), dtype=bool)
    mask[:3, 0] = True
    # Rows 0 to 2 belong to the first of two positions, columns likewise: 3 of its 9 pixels are inside.
    assert coverage(mask, (2, 2)).tolist() == [[1 / 3, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("mask", [np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)])
def test_a_mask_that_tells_nothing_is_refused(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="something inside and something outside"):
        localize(np.ones((2, 2)), mask)


# ------------------------------------------------------------------------------------------------------ of all maps


@given(masks, st.integers(1, 6), st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None)
def test_an_even_map_scores_as_uniform(mask: np.ndarray, side: int, value: float) -> None:
    found, chance = localize(np.full((side, side), value), mask), uniform(mask)
    assert found.pointing == pytest.approx(chance.pointing)
    assert found.iou == pytest.approx(chance.iou)
    assert found.entropy == pytest.approx(1.0)
    if 12 % side == 0:  # else positions have unequally many pixels
        assert found.energy == pytest.approx(chance.energy)


@given(maps, masks)
@settings(max_examples=300, deadline=None)
def test_bounds_and_invariances(weights: np.ndarray, mask: np.ndarray) -> None:
    found = localize(weights, mask)
    assert all(-1e-9 <= value <= 1 + 1e-9 for value in vars(found).values())
    assert found.iou >= mask.mean() - 1e-9  # the lowest threshold takes all of the image
    mirrored = localize(weights[:, ::-1].copy(), mask[:, ::-1].copy())
    assert vars(mirrored) == pytest.approx(vars(found), abs=1e-6)
    outside = localize(weights, ~mask)
    assert found.energy + outside.energy == pytest.approx(1.0)


@given(maps, masks)
@settings(max_examples=100, deadline=None)
def test_the_best_iou_is_that_of_a_plain_search(weights: np.ndarray, mask: np.ndarray) -> None:
    """On a map as large as its mask nothing is enlarged: try every value of it as the threshold."""
    large = np.kron(np.round(weights, 1), np.ones((3, 3)))
    share = large / large.sum() if large.sum() > 0 else np.ones_like(large)
    best = max(
        (above & mask).sum() / (above | mask).sum() for above in (share >= value * (1 - 1e-6) for value in share.flat)
    )
    assert localize(large, mask).iou == pytest.approx(best)


# -------------------------------------------------------------------------------------------------- over many images


def test_means_over_images_and_topics() -> None:
    one = Localization(energy=0.2, pointing=1.0, iou=0.4, entropy=0.9)
    other = Localization(energy=0.6, pointing=0.0, iou=0.8, entropy=0.5)
    assert vars(mean_of_maps([one, other])) == pytest.approx(
        {"energy": 0.4, "pointing": 0.5, "iou": 0.6, "entropy": 0.7}
    )
    found = mean_localization([{"a": one, "b": other}, {"a": other}])
    assert found["energy/a"] == pytest.approx(0.4)
    assert found["energy/b"] == pytest.approx(0.6)
    assert mean_localization([]) == {}


def test_an_evaluation_scores_every_image_with_a_mask(tmp_path: Path) -> None:
    tiny_set(tmp_path / "shards", test=22)
    folder, card = untrained_run(tiny_config(tmp_path / "shards", tmp_path / "runs"))
    found = evaluated(folder)
    masked = [prediction for prediction in found.predictions if prediction.localization]
    assert [prediction.key for prediction in masked] == [f"test_{number:03d}" for number in range(0, 22, 3)]
    assert found.metrics["masked_images"] == len(masked) == 8
    for kind in ("energy", "pointing", "iou", "entropy"):
        assert {f"{kind}/{name}" for name in ("class_map", "sentences", "uniform")} <= set(found.metrics)
    said = [set(prediction.localization) - {"class_map", "sentences", "uniform"} for prediction in masked]
    assert set.union(*said) <= set(card.topics)
    assert set.union(*said)
    assert found.metrics["energy/uniform"] == pytest.approx(0.5, abs=0.05)  # the masks are coin tosses
    without = [_without_maps(prediction) for prediction in found.predictions]
    assert not any("/uniform" in name for name in score(without, card))


def _without_maps(prediction: Prediction) -> Prediction:
    return Prediction(**{**vars(prediction), "localization": {}})
