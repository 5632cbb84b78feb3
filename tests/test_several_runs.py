"""Several runs one after another in one process, as a sweep, folds and a search's trials do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdnet_dist.trainer import Trainer
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_set

# The same run first and last: what came between must leave no trace.
STAGES = (0, 2, 1, 0)


def train_one_after_another(shards: Path, runs: Path) -> list[dict[str, float]]:
    """Train, close, train again; the scores of each run."""
    scores = []
    for stage in STAGES:
        trainer = Trainer(tiny_config(shards, runs, {"train.zero_stage": stage}))
        trainer.train()
        scores.append(trainer.finish().metrics)
        trainer.close()
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_trainers_follow_each_other_in_one_process(ranks: int, tmp_path: Path) -> None:
    tiny_set(tmp_path / "shards", train=16, val=3, test=4)
    by_rank = run_ranks(train_one_after_another, ranks, tmp_path / "shards", tmp_path / "runs")
    assert all(scores == by_rank[0] for scores in by_rank)
    first, *between, last = by_rank[0]
    assert first == last
    for scores in between:
        assert scores["test/loss_m"] == pytest.approx(first["test/loss_m"], rel=1e-4)
        assert scores["test/loss_l"] == pytest.approx(first["test/loss_l"], rel=1e-4)
