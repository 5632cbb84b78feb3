"""Which points a search tries, in which order, and what it learns."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from mdnet_dist.config_file import as_yaml
from tests.conftest import REPOSITORY
from tests.tiny import tiny_config
from tune.proposals import GridProposals, OptunaProposals, Proposals, RandomProposals, proposals_of
from tune.records import Point
from tune.search_config import load_search
from tune.space import Space

SPACE = Space.parse(
    {
        "blend.beta": {
            "choice": [
                {"kind": "constant", "value": {"uniform": [0, 1]}},
                {"kind": "linear", "start": {"uniform": [0.1, 0.7], "step": 0.2}, "end": {"uniform": [0, 1]}},
            ]
        },
        "blend.eta": {"choice": {"balanced": "balanced", "constant": {"log_uniform": [0.1, 10]}}},
        "model.image.concat_depth": {"choice": [0, 1, "full"]},
        "train.global_batch": {"integers": [16, 64], "step": 16},
        "optimizer.image.lr": {"uniform": [0, 1], "step": 0.33333333},
        "data.fold": {"choice": [None, 1]},
    },
    "",
)
"""Every kind of distribution; the steps of the last range do not fill it to the last digit."""


def asked(proposals: Proposals, number: int) -> Point:
    point = proposals.ask(number)
    assert point is not None
    return point


def score(point: Point) -> float:
    """Best, 1, with the linear schedule that ends at 0.8 and with a constant eta of 2."""
    if point["blend.beta"] != "linear":
        return 0.0
    eta = point.get("blend.eta.constant")
    near_eta = abs(math.log10(float(eta) / 2)) if isinstance(eta, float) else 1.0
    return 1.0 - abs(float(point["blend.beta.linear.end"] or 0) - 0.8) - 0.5 * near_eta


def search(proposals: Proposals, trials: int, first: int = 1) -> list[tuple[int, Point, float | None]]:
    """Ask and tell; every seventh trial fails."""
    told: list[tuple[int, Point, float | None]] = []
    for number in range(first, first + trials):
        point = asked(proposals, number)
        told.append((number, point, None if number % 7 == 0 else score(point)))
        proposals.tell(*told[-1])
    return told


# --------------------------------------------------------------------------------------------------------------- random


def test_random_points_depend_on_seed_and_number_alone() -> None:
    numbers = list(range(1, 101))
    straight = {number: asked(RandomProposals(SPACE, 3), number) for number in numbers}
    random.Random(0).shuffle(numbers)
    proposals = RandomProposals(SPACE, 3)
    for number in numbers:
        assert proposals.ask(number) == straight[number]
        proposals.tell(number, straight[number], 1.0)
        assert list(SPACE.values(straight[number])) == SPACE.keys()
    assert len({json.dumps(point) for point in straight.values()}) == 100
    other = RandomProposals(SPACE, 4)
    assert sum(other.ask(number) == straight[number] for number in numbers) == 0


# ----------------------------------------------------------------------------------------------------------------- grid


def test_a_grid_is_asked_in_order_and_ends() -> None:
    space = Space.parse({"a": {"choice": {"x": {"uniform": [0, 1]}, "y": 1}}, "b": {"integers": [1, 2]}}, "")
    proposals = GridProposals(space, 3)
    points = [asked(proposals, number) for number in range(1, 9)]
    assert points == space.grid(3)
    assert proposals.ask(9) is None and proposals.ask(0) is None
    points[0]["a"] = "changed"
    assert asked(proposals, 1)["a"] == "x"
    proposals.tell(1, points[1], None)
    assert GridProposals(space, 3, 8).grid == GridProposals(space, 3, 99).grid == space.grid(3)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 60])
def test_fewer_points_are_spread_over_the_grid(size: int) -> None:
    space = Space.parse({"a": {"choice": list(range(size))}}, "")
    for count in range(1, size + 1):
        places = [point["a"] for point in GridProposals(space, 2, count).grid]
        assert len(places) == count
        steps = np.diff(np.array(places, dtype=int))
        assert places[0] == 0 and (count == 1 or places[-1] == size - 1)
        assert count < 3 or 1 <= steps.min() <= steps.max() <= steps.min() + 1


# --------------------------------------------------------------------------------------------------------------- optuna


def test_optuna_proposes_points_of_the_space() -> None:
    proposals = OptunaProposals(SPACE, 0, "max", 5)
    seen = set()
    for _, point, _ in search(proposals, 40):
        assert list(SPACE.values(json.loads(json.dumps(point)))) == SPACE.keys()
        seen |= set(point)
    assert seen == set(SPACE.parameters())


@pytest.mark.parametrize("mode", ["max", "min"])
def test_optuna_beats_chance(mode: Any) -> None:
    sign = 1.0 if mode == "max" else -1.0

    def best(proposals: Proposals) -> float:
        found = []
        for number in range(1, 41):
            point = asked(proposals, number)
            found.append(score(point))
            proposals.tell(number, point, sign * found[-1])
        return float(np.mean(found[20:]))

    guided = [best(OptunaProposals(SPACE, seed, mode, 8)) for seed in range(4)]
    by_chance = [best(RandomProposals(SPACE, seed)) for seed in range(4)]
    assert np.mean(guided) > np.mean(by_chance) + 0.2


def knowledge(proposals: OptunaProposals) -> list[tuple[Any, ...]]:
    return [(trial.state, trial.values, trial.params, trial.distributions) for trial in proposals.study.trials]


def test_told_trials_are_as_good_as_own_ones() -> None:
    first = OptunaProposals(SPACE, 1, "max", 5)
    told = search(first, 20)
    ledger = json.loads(json.dumps(told))
    resumed = OptunaProposals(SPACE, 1, "max", 5)
    for number, point, value in ledger:
        resumed.tell(number, point, value)
    assert knowledge(resumed) == knowledge(first)
    states = [trial.state for trial in resumed.study.trials]
    assert states.count(optuna.trial.TrialState.FAIL) == 2 and len(states) == 20
    # So the search goes on as if it had never stopped.
    assert search(resumed, 10, first=21) == search(first, 10, first=21)
    ignorant = OptunaProposals(SPACE, 1, "max", 5)
    assert ignorant.ask(31) != resumed.ask(31)


def test_a_trial_drawn_before_a_break_is_told_after_it() -> None:
    before = OptunaProposals(SPACE, 2, "max", 2)
    running = asked(before, 1)
    after = OptunaProposals(SPACE, 2, "max", 2)
    later = asked(after, 2)
    after.tell(1, running, 0.5)
    after.tell(2, later, 0.25)
    assert {trial.value for trial in after.study.trials} == {0.25, 0.5}
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in after.study.trials)


def test_trials_side_by_side_differ_and_may_be_told_in_any_order() -> None:
    proposals = OptunaProposals(SPACE, 0, "max", 2)
    search(proposals, 10)
    points = {number: asked(proposals, number) for number in range(11, 19)}
    assert len({json.dumps(point) for point in points.values()}) == 8
    for number in (15, 11, 18, 12, 13, 14, 17, 16):
        proposals.tell(number, points[number], float(number))
    values = [trial.value for trial in proposals.study.trials[10:]]
    assert values == [float(number) for number in range(11, 19)]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_has_no_score_has_failed(value: float | None) -> None:
    asked_for, told = OptunaProposals(SPACE, 0, "max", 2), OptunaProposals(SPACE, 0, "max", 2)
    point = asked(asked_for, 1)
    for proposals in (asked_for, told):
        proposals.tell(1, point, value)
        (trial,) = proposals.study.trials
        assert trial.state == optuna.trial.TrialState.FAIL and trial.values is None
        assert proposals.ask(2)


def test_optuna_is_silent() -> None:
    code = (
        "from tune.proposals import OptunaProposals; from tune.space import Space\n"
        "p = OptunaProposals(Space.parse({'a': {'uniform': [0, 1]}}, ''), 0, 'max', 1)\n"
        "for n in range(4): p.tell(n, p.ask(n), None if n == 2 else 0.5)\n"
        "p.tell(9, {'a': 0.5}, 1.0); print(p.ask(5) is not None)"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("True\n", "", 0)


# --------------------------------------------------------------------------------------------------------- of a search


def test_a_search_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(as_yaml(tiny_config(tmp_path / "set", tmp_path / "runs")))
    Path("a.yaml").write_text(
        "name: a\nbase: base.yaml\nspace: {blend.eta: {uniform: [1, 3]}}\ntrials: {count: 4}\nscheduler: {kind: none}\n"
        "seed: 5\nmode: min\n"
    )
    by_chance = proposals_of(load_search("a.yaml"))
    assert isinstance(by_chance, RandomProposals) and by_chance.seed == 5
    grid = proposals_of(load_search("a.yaml", ["searcher={kind: grid, points: 5}"]))
    assert isinstance(grid, GridProposals)
    assert [point["blend.eta"] for point in grid.grid] == [1.0, 1.5, 2.0, 3.0]
    guided = proposals_of(load_search("a.yaml", ["searcher={kind: optuna, startup_trials: 3}"]))
    assert isinstance(guided, OptunaProposals)
    assert (guided.seed, guided.startup_trials) == (5, 3)
    assert guided.study.direction == optuna.study.StudyDirection.MINIMIZE
