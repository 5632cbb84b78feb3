"""Under every ZeRO stage, on one rank and on two, with accumulation and without: the same weights as plain PyTorch.

BatchNorm is frozen for it; see `tests/plain_training.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from mdnet_dist.distributed import rank, world_size
from mdnet_dist.run_data import open_data
from mdnet_dist.step_report import StepReport
from mdnet_dist.trainer import Trainer
from tests.networks import one_thread  # noqa: F401 (a fixture)
from tests.plain_training import (
    GLOBAL_BATCH,
    SIDE_PX,
    STEPS,
    Case,
    Weights,
    as_numpy,
    as_tensors,
    assert_same_weights,
    batches_of,
    finish,
    global_batches,
    new_trainer,
    plain_pytorch,
)
from tests.ranks import run_ranks
from tests.tiny import tiny_set


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "shards"
    tiny_set(folder, train=GLOBAL_BATCH * STEPS + 2, val=1, test=1, side_px=SIDE_PX)
    return folder


def train(cases: list[Case], shards: Path, runs: Path) -> list[list[tuple[Weights, StepReport | None]]]:
    """For each case the weights at the start and after each step, with what the step reported."""
    results = []
    for case in cases:
        trainer = new_trainer(case.config(world_size(), shards, runs))
        batches = batches_of(trainer, case)
        steps: list[tuple[Weights, StepReport | None]] = [(as_numpy(trainer.engine.weights()), None)]
        for _ in range(STEPS):
            report = trainer.train_step(batches)
            steps.append((as_numpy(trainer.engine.weights()), report))
        assert next(batches, None) is None
        results.append(steps)
        finish(trainer)
    return results


def assert_equal_to_plain_pytorch(cases: list[Case], ranks: int, shards: Path, runs: Path) -> None:
    by_rank = run_ranks(train, ranks, cases, shards, runs)
    for number, case in enumerate(cases):
        config = case.config(ranks, shards, runs)
        data = open_data(config)
        batches = global_batches()
        if case.from_shards:
            whole = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": GLOBAL_BATCH})})
            batches = list(data.training_batches(whole, 0, STEPS, pin_memory=False))
        reference = plain_pytorch(data.card, config, batches)
        if case.clip_norm:
            assert all(step.gradient_norm > 1.5 * case.clip_norm for step in reference[1:]), "clips nothing"
        for which in range(ranks):
            for index, ((weights, report), expected) in enumerate(zip(by_rank[which][number], reference, strict=True)):
                what = f"{case}, rank {which}, step {index}"
                assert_same_weights(weights, expected.weights, reference[max(0, index - 1)].weights, what)
                assert all(np.array_equal(weights[name], by_rank[0][number][index][0][name]) for name in weights), what
                if report:
                    assert report.finite and report.moved and not report.stop
                    assert report.loss_m == pytest.approx(expected.loss_m, rel=1e-5), what
                    assert report.loss_l == pytest.approx(expected.loss_l, rel=1e-5), what
                    assert report.gradient_norm_m == pytest.approx(expected.norm_m, rel=1e-4), what
                    assert report.gradient_norm_l == pytest.approx(expected.norm_l, rel=1e-4), what


def test_two_ranks_under_zero_2_equal_plain_pytorch(shards: Path, tmp_path: Path) -> None:
    """The quick one of the cases below."""
    assert_equal_to_plain_pytorch([Case(stage=2)], 2, shards, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_and_accumulation_equals_plain_pytorch(ranks: int, shards: Path, tmp_path: Path) -> None:
    cases = [Case(stage, accumulation) for stage, accumulation in product(range(4), [1, 3])]
    cases += [Case(stage, clip_norm=0.2) for stage in (0, 2, 3)]
    cases += [Case(stage, from_shards=True) for stage in (0, 3)]
    assert_equal_to_plain_pytorch(cases, ranks, shards, tmp_path)


# ------------------------------------------------------------------------------------------------- save and continue


def train_and_save(cases: list[Case], shards: Path, runs: Path) -> list[tuple[Weights, Weights, Weights]]:
    """Two steps, a checkpoint, one more step: weights and optimiser state at the checkpoint, weights at the end."""
    results = []
    for case in cases:
        trainer = new_trainer(case.config(world_size(), shards, runs_of(runs, case, world_size())))
        batches = batches_of(trainer, case)
        for _ in range(2):
            trainer.train_step(batches)
        trainer.save(None)
        saved = as_numpy(trainer.engine.weights()), as_numpy(trainer.engine.optimizer_state())
        trainer.train_step(batches)
        results.append((*saved, as_numpy(trainer.engine.weights())))
        finish(trainer)
    return results


def continue_from(origins: list[tuple[Case, int]], cases: list[Case], shards: Path, runs: Path) -> list[tuple]:
    """Each checkpoint continued under each case: what was loaded, and the weights after one more step."""
    results = []
    for (origin, ranks), case in product(origins, cases):
        trainer = new_trainer(case.config(world_size(), shards, runs_of(runs, origin, ranks)), resume=True)
        assert (trainer.step, trainer.updates) == (2, 2)
        loaded = as_numpy(trainer.engine.weights()), as_numpy(trainer.engine.optimizer_state())
        report = trainer.train_step(batches_of(trainer, case, first=2))
        assert report.moved
        results.append((*loaded, as_numpy(trainer.engine.weights())))
        finish(trainer)
    return results


def runs_of(runs: Path, case: Case, ranks: int) -> Path:
    return runs / f"stage{case.stage}-ranks{ranks}"


@pytest.mark.slow
def test_a_checkpoint_continues_under_any_stage_and_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    uninterrupted: dict[tuple[Case, int], tuple[Weights, Weights, Weights]] = {}
    for ranks, origins in ((1, [Case(0)]), (2, [Case(2), Case(3)])):
        by_rank = run_ranks(train_and_save, ranks, origins, shards, tmp_path)
        uninterrupted |= {(origin, ranks): result for origin, result in zip(origins, by_rank[0], strict=True)}
    for ranks, stages in ((1, [Case(0), Case(3)]), (2, [Case(1), Case(2), Case(3)])):
        for continued in run_ranks(continue_from, ranks, list(uninterrupted), stages, shards, tmp_path):
            pairs = product(uninterrupted.items(), stages)
            for ((origin, (weights, state, final)), case), (loaded, loaded_state, continued_final) in zip(
                pairs, continued, strict=True
            ):
                what = f"from {origin} to {case} on {ranks} ranks"
                assert loaded.keys() == weights.keys() and loaded_state.keys() == state.keys(), what
                assert not [name for name in weights if not np.array_equal(loaded[name], weights[name])], what
                assert all(np.array_equal(loaded_state[key], state[key]) for key in state), what
                assert any(key.startswith("momentum_buffer/image_model") for key in state)
                assert any(key.startswith("exp_avg_sq/language_model") for key in state)
                assert_same_weights(continued_final, as_tensors(final), as_tensors(weights), what)


# ------------------------------------------------------------------------------------------------------- not a number


def spoil(trainer: Trainer, what: str) -> Callable[[], None]:
    """Make this rank's loss, or only its gradient, not a number; returns what ends that."""
    if what == "loss":
        whole = trainer._images
        setattr(trainer, "_images", lambda batch: whole(batch) * math.nan)  # noqa: B010 (a method, to mypy)
        return lambda: setattr(trainer, "_images", whole)

    def spoil_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * math.nan)

    return trainer.network.image_model.stem.register_forward_hook(spoil_gradient).remove


def train_with_one_bad_step(stages: list[int], what: str, shards: Path, runs: Path) -> list[list[tuple]]:
    """Three steps, of which the second is spoilt on the last rank alone: weights and report of each."""
    results = []
    for case in map(Case, stages):
        trainer = new_trainer(case.config(world_size(), shards, runs))
        batches = batches_of(trainer, case)
        steps: list[tuple] = [(as_numpy(trainer.engine.weights()), None, trainer.updates, trainer.bad_steps)]
        for step in range(STEPS):
            restore = spoil(trainer, what) if step == 1 and rank() == world_size() - 1 else None
            report = trainer.train_step(batches)
            if restore:
                restore()
            steps.append((as_numpy(trainer.engine.weights()), report, trainer.updates, trainer.bad_steps))
        results.append(steps)
        finish(trainer)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_where_one_rank_is_not_finite_no_rank_moves_and_training_goes_on(
    what: str, shards: Path, tmp_path: Path
) -> None:
    stages, ranks = [0, 1, 2, 3], 2
    by_rank = run_ranks(train_with_one_bad_step, ranks, stages, what, shards, tmp_path)
    first, _, third = global_batches()
    config = Case(0).config(ranks, shards, tmp_path)
    reference = plain_pytorch(open_data(config).card, config, [first, third])
    for which, (number, stage) in product(range(ranks), enumerate(stages)):
        place = f"{what} at stage {stage}, rank {which}"
        _, good_step, bad_step, last_step = by_rank[which][number]
        after_first, good, *_ = good_step
        after_bad, bad, updates, bad_steps = bad_step
        at_end, last, *end = last_step
        assert good.moved and not bad.moved and (updates, bad_steps) == (1, 1), place
        assert bad.finite == (what == "gradient"), place
        assert all(np.array_equal(after_bad[name], after_first[name]) for name in after_first), place
        assert last.moved and last.finite and end == [2, 0], place
        assert_same_weights(at_end, reference[2].weights, reference[1].weights, place)
