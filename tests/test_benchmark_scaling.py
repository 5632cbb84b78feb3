"""The measurement of two ranks: which rounds count, what their rows say, and real ranks on a tiny set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mdnet_dist.benchmark.cluster_plan import HALVES
from mdnet_dist.benchmark.ranks import Exchanges, Steps, interval, started, together
from mdnet_dist.benchmark.rows import Row
from mdnet_dist.benchmark.scaling_suite import QUIET, Measured, Round, foretold, rows_of, undisturbed
from tests.tiny import tiny_config, tiny_set

ROUND = Round(
    alone=1.0, busy=1.0, weak=1.0, half=0.6, strong=0.6, exchanging=0.0, alone_processor=1.0, weak_processor=1.0
)


def steps(begun: float, ended: float, processor: float, exchanging: float = 0.0) -> Steps:
    return Steps(begun=begun, ended=ended, processor=processor, exchanging=exchanging)


def measured(*rounds: Round, gradients: float = 0.0, small: float = 0.0) -> Measured:
    return Measured(
        images=32,
        rounds=list(rounds),
        exchange_gradients=[gradients] * 3,
        exchange_small=[small] * 3,
        exchanges=5,
        exchanged_bytes=4000,
        weights=1000,
    )


def row(rows: list[Row], part: str) -> Row:
    return next(one for one in rows if part in one.name)


def test_an_interval_ends_with_the_last_rank() -> None:
    assert interval([steps(1.0, 3.0, 2.0), steps(1.5, 3.5, 2.0)]) == pytest.approx(2.5)


def test_a_rank_that_waits_for_another_was_not_held_up() -> None:
    assert steps(0.0, 2.0, 1.5, exchanging=0.5).held_up == pytest.approx(0.0)
    assert steps(0.0, 2.0, 1.0, exchanging=0.5).held_up == pytest.approx(0.25)


def test_rounds_that_other_programs_disturbed_do_not_count() -> None:
    quiet = [replace(ROUND, held_up=QUIET / 2)] * 4
    assert undisturbed([replace(ROUND, held_up=0.5), *quiet, replace(ROUND, held_up=0.3)]) == quiet
    disturbed = [replace(ROUND, held_up=share) for share in (0.9, 0.2, 0.4, 0.3, 0.5)]
    assert [one.held_up for one in undisturbed(disturbed)] == [0.2, 0.3, 0.4, 0.5]
    assert "OTHER PROGRAMS" in row(rows_of(measured(*disturbed), "demo", 0), "weak scaling").note


def test_rows_tell_shared_cores_from_exchange() -> None:
    rows = rows_of(measured(*[replace(ROUND, busy=1.25, weak=2.0)] * 4), "demo", 0)
    assert row(rows, "weak scaling").value == pytest.approx(0.5)
    assert row(rows, "of two jobs").value == pytest.approx(0.8)
    assert row(rows, "2 ranks by two jobs").value == pytest.approx(0.625)
    assert row(rows, "strong scaling").value == pytest.approx(1 / 0.6)
    assert row(rows, "half the batch").value == pytest.approx(1 / 0.6)
    assert row(rows, "weak scaling").met is False


def test_processor_time_knows_nothing_of_other_programs() -> None:
    disturbed = replace(ROUND, alone=3.0, weak=9.0, alone_processor=1.0, weak_processor=1.1)
    rows = rows_of(measured(*[disturbed] * 4, gradients=0.1, small=0.0125), "demo", 0)
    assert row(rows, "by processor time").value == pytest.approx(1.0 / (1.1 + 0.1 + 4 * 0.0125))


def test_the_plan_foretells_ranks_that_behave_as_it_thinks() -> None:
    # 0.2 s whatever the batch, 0.025 s an image; gradients 0.1 s, each of four small exchanges 0.01 s.
    exchange = 0.1 + 4 * 0.01
    found = measured(replace(ROUND, weak=1.0 + exchange, strong=0.6 + exchange), gradients=0.1, small=0.01)
    assert foretold(found, 1.0, 64, 0) == pytest.approx(1.0 + exchange)
    assert foretold(found, 1.0, 32, 0) == pytest.approx(0.6 + exchange)
    errors = [one for one in rows_of(found, "demo", 0) if one.name.startswith("plan's error")]
    assert [one.value for one in errors] == pytest.approx([0.0] * 3, abs=1e-9)
    assert all(one.met for one in errors)


def test_exchanges_are_counted_with_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from mdnet_dist.benchmark import ranks

    for name in ranks._COLLECTIVES:  # put back at the end
        monkeypatch.setattr(dist, name, lambda *arguments, **named: "done")
    exchanges = Exchanges()
    assert dist.all_reduce(torch.zeros(9)) == "done"
    exchanges.begin(False)
    dist.all_reduce(torch.zeros(3))
    dist.all_reduce(tensor=torch.zeros(5, dtype=torch.float64))
    dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(4))
    seconds, times, sizes = exchanges.end()
    dist.barrier()
    assert (times, sizes) == (
        {"all_reduce": 2, "all_gather_into_tensor": 1},
        {"all_reduce": 52, "all_gather_into_tensor": 32},
    )
    assert seconds >= 0


@pytest.mark.slow
def test_ranks_exchange_the_bytes_that_the_plan_counts(tmp_path: Path) -> None:
    tiny_set(tmp_path / "tiny")
    found = {}
    for stage in (0, 1):
        config = tiny_config(tmp_path / "tiny", tmp_path, {"train.zero_stage": stage, "train.epochs": 100})
        with started(config, [2, 1] if stage == 0 else [2]) as groups:
            pair = groups[0]
            measured_steps = pair.steps(8, 2)
            pair.ask("weights")
            weights = pair.answers()[0]
            found[stage] = (weights, measured_steps[0].exchanged_bytes)
            if stage == 0:
                both = together([groups[1], pair], 4, 1)
                assert len(both) == 3 and both[0].exchanges == {}  # one rank alone has none to exchange with
                assert all(rank.exchanges["all_reduce"] >= 3 for rank in measured_steps)
                pair.ask("no_such_question")
                with pytest.raises(RuntimeError, match="no_such_question"):
                    pair.answers()
    for stage, (weights, sizes) in found.items():
        halves = 2 * sizes["all_reduce"] + sizes.get("all_gather_into_tensor", 0)
        small = 8192  # counts, losses, running statistics
        assert HALVES[stage] * weights * 4 <= halves < HALVES[stage] * weights * 4 + 2 * small
