"""The space of a search: how it is written, what is drawn, and what the draws mean."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnet_dist.config import RunConfig, Section
from mdnet_dist.config_check import sections_in
from mdnet_dist.errors import InputError
from tune.parameter import KINDS, Parameter, at_step, between
from tune.records import Point, Scalar
from tune.space import RandomChooser, Space, SpaceError

UNIT = {"uniform": [0.0, 1.0]}
BETA: dict[str, Any] = {
    "choice": [
        {"kind": "constant", "value": {"uniform": [0.05, 0.95]}},
        {"kind": "linear", "start": UNIT, "end": {"uniform": [0, 1], "step": 0.1}},
        {"kind": "sigmoid", "start": 0.1, "end": UNIT, "steepness": {"log_uniform": [4, 40]}},
        {"kind": "piecewise", "knots": [[0, UNIT], [1, {"choice": [0.25, 1]}]]},
    ]
}
EXAMPLE: dict[str, Any] = {
    "blend.beta": BETA,
    "blend.eta": {"choice": {"balanced": "balanced", "constant": {"log_uniform": [0.3, 30]}}},
    "model.image.concat_depth": {"choice": [0, 1, "full"]},
    "train.global_batch": {"integers": [16, 64], "step": 16},
    "train.max_bad_steps": {"integers": [1, 4]},
}
BELOW = {
    "constant": {"blend.beta.constant.value"},
    "linear": {"blend.beta.linear.start", "blend.beta.linear.end"},
    "sigmoid": {"blend.beta.sigmoid.end", "blend.beta.sigmoid.steepness"},
    "piecewise": {"blend.beta.piecewise.knots.0.1", "blend.beta.piecewise.knots.1.1"},
}


def draws(space: Space, count: int, seed: int = 0) -> Iterator[Point]:
    chooser = RandomChooser(np.random.default_rng(seed))
    return (space.draw(chooser) for _ in range(count))


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(SpaceError) as caught:
        Space.parse(values, "a.yaml")
    message = str(caught.value)
    assert "\n" not in message and message.endswith(caught.value.problem)
    return message


# ----------------------------------------------------------------------------------------------------------- parameters


def test_parameters_are_named_and_ordered_as_they_are_walked() -> None:
    parameters = Space.parse(EXAMPLE, "a.yaml").parameters()
    assert {name: (found.kind, found.parent) for name, found in parameters.items()} == {
        "blend.beta": ("choice", None),
        "blend.beta.constant.value": ("uniform", ("blend.beta", "constant")),
        "blend.beta.linear.start": ("uniform", ("blend.beta", "linear")),
        "blend.beta.linear.end": ("uniform", ("blend.beta", "linear")),
        "blend.beta.sigmoid.end": ("uniform", ("blend.beta", "sigmoid")),
        "blend.beta.sigmoid.steepness": ("log_uniform", ("blend.beta", "sigmoid")),
        "blend.beta.piecewise.knots.0.1": ("uniform", ("blend.beta", "piecewise")),
        "blend.beta.piecewise.knots.1.1": ("choice", ("blend.beta", "piecewise")),
        "blend.eta": ("choice", None),
        "blend.eta.constant": ("log_uniform", ("blend.eta", "constant")),
        "model.image.concat_depth": ("choice", None),
        "train.global_batch": ("integers", None),
        "train.max_bad_steps": ("integers", None),
    }
    names = list(parameters)
    assert all(names.index(found.parent[0]) < names.index(name) for name, found in parameters.items() if found.parent)
    assert names[:3] == ["blend.beta", "blend.beta.constant.value", "blend.beta.linear.start"]
    assert parameters["model.image.concat_depth"].labels == (0, 1, "full")
    steepness, batch = parameters["blend.beta.sigmoid.steepness"], parameters["train.global_batch"]
    assert (steepness.low, steepness.high, steepness.step) == (4.0, 40.0, None)
    assert (batch.low, batch.high, batch.step) == (16, 64, 16)
    assert Space.parse(EXAMPLE, "").keys() == list(EXAMPLE)


def test_parameters_know_where_they_stand() -> None:
    parameters = Space.parse(EXAMPLE, "a.yaml").parameters()
    assert parameters["blend.beta"].places[1] == ("blend.beta", "choice", 1)
    assert parameters["blend.eta"].places == (
        ("blend.eta", "choice", "balanced"),
        ("blend.eta", "choice", "constant"),
    )
    knot = parameters["blend.beta.piecewise.knots.0.1"]
    assert knot.path == ("blend.beta", "choice", 3, "knots", 0, 1)
    assert knot.places == ((*knot.path, "uniform", 0), (*knot.path, "uniform", 1))

    def at(path: tuple[str | int, ...]) -> Any:
        node: Any = EXAMPLE
        for step in path:
            node = node[step]
        return node

    for parameter in parameters.values():
        assert parameter.kind in at(parameter.path)
        if parameter.kind != "choice":
            assert [at(place) for place in parameter.places] == parameter.ends()


def test_a_choice_may_stand_in_a_choice() -> None:
    inner = {"choice": {"low": {"uniform": [0, 1]}, "high": 5}}
    space = Space.parse({"a": {"choice": {"x": inner, "y": 7}}}, "")
    assert list(space.parameters()) == ["a", "a.x", "a.x.low"]
    seen = {json.dumps(sorted(point)) for point in draws(space, 200)}
    assert seen == {'["a"]', '["a", "a.x"]', '["a", "a.x", "a.x.low"]'}
    assert space.values({"a": "x", "a.x": "high"}) == {"a": 5}
    assert space.values({"a": "x", "a.x": "low", "a.x.low": 0.5}) == {"a": 0.5}
    assert space.values({"a": "y"}) == {"a": 7}
    assert space.grid_size(3) == 5 == len(space.grid(3))


# ---------------------------------------------------------------------------------------------------------------- draws


def test_conditional_parameters_exist_only_with_their_option() -> None:
    seen: Counter[Scalar] = Counter()
    always = {"blend.beta", "blend.eta", "model.image.concat_depth", "train.global_batch", "train.max_bad_steps"}
    for point in draws(Space.parse(EXAMPLE, ""), 2000):
        kind = str(point["blend.beta"])
        seen[kind] += 1
        eta = {"blend.eta.constant"} if point["blend.eta"] == "constant" else set()
        assert set(point) == always | BELOW[kind] | eta
    assert set(seen) == set(BELOW)
    # Each of four options with probability 1/4: within five standard deviations.
    assert all(abs(count - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for count in seen.values())


@given(seed=st.integers(0, 2**32))
def test_draws_are_of_the_space_and_mean_what_was_drawn(seed: int) -> None:
    space = Space.parse(EXAMPLE, "")
    (point,) = draws(space, 1, seed)
    assert json.loads(json.dumps(point)) == point
    assert all(type(value) in (str, int, float) for value in point.values())
    values = space.values(json.loads(json.dumps(point)))
    assert list(values) == list(EXAMPLE)
    beta = values["blend.beta"]
    assert beta["kind"] == point["blend.beta"]
    match beta["kind"]:
        case "constant":
            assert beta == {"kind": "constant", "value": point["blend.beta.constant.value"]}
            assert 0.05 <= beta["value"] <= 0.95
        case "linear":
            assert list(beta) == ["kind", "start", "end"]
            assert beta["end"] in [number / 10 for number in range(11)]
        case "sigmoid":
            assert beta["start"] == 0.1 and 4 <= beta["steepness"] <= 40
        case "piecewise":
            assert [knot[0] for knot in beta["knots"]] == [0, 1]
            assert beta["knots"][0][1] == point["blend.beta.piecewise.knots.0.1"]
            assert beta["knots"][1][1] in (0.25, 1)
    eta = point["blend.eta.constant"] if point["blend.eta"] == "constant" else "balanced"
    assert values["blend.eta"] == eta
    assert values["model.image.concat_depth"] in (0, 1, "full")
    assert values["train.global_batch"] in (16, 32, 48, 64)
    assert values["train.max_bad_steps"] in (1, 2, 3, 4)


def test_draws_are_spread_as_their_distributions_say() -> None:
    space = Space.parse(
        {"u": {"uniform": [2, 4]}, "l": {"log_uniform": [0.01, 100]}, "i": {"integers": [1, 3]},
         "s": {"uniform": [0, 1], "step": 0.5}},
        "",
    )  # fmt: skip
    points = list(draws(space, 4000))
    assert np.mean([point["u"] for point in points]) == pytest.approx(3, abs=0.05)
    logs = [math.log10(float(point["l"] or 0)) for point in points]
    assert np.mean(logs) == pytest.approx(0, abs=0.1)
    assert np.std(logs) == pytest.approx(4 / math.sqrt(12), abs=0.05)
    for name, values in (("i", [1, 2, 3]), ("s", [0, 0.5, 1])):
        counts = Counter(point[name] for point in points)
        assert sorted(counts) == values  # type: ignore[type-var]
        assert all(abs(count - 4000 / 3) < 5 * math.sqrt(4000 * 2 / 9) for count in counts.values())


def test_values_golden() -> None:
    space = Space.parse(EXAMPLE, "")
    point: Point = {
        "blend.beta": "linear",
        "blend.beta.linear.start": 0.25,
        "blend.beta.linear.end": 0.3,
        "blend.eta": "constant",
        "blend.eta.constant": 3,
        "model.image.concat_depth": "full",
        "train.global_batch": 48,
        "train.max_bad_steps": 2,
    }
    assert space.values(point) == {
        "blend.beta": {"kind": "linear", "start": 0.25, "end": 0.3},
        "blend.eta": 3,
        "model.image.concat_depth": "full",
        "train.global_batch": 48,
        "train.max_bad_steps": 2,
    }
    space.values(point)["blend.beta"]["start"] = 9
    assert space.values(point)["blend.beta"]["start"] == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend.bta": 1}, "parameter 'blend.bta' is not in the space; did you mean 'blend.beta'?"),
        ({"blend.eta.constant": 3.0}, "parameter 'blend.eta.constant' exists only with blend.eta constant"),
        ({"blend.beta": "cosine"}, "parameter 'blend.beta' is cosine; it must be one of constant, linear, sigmoid, p"),
        ({"model.image.concat_depth": False}, "parameter 'model.image.concat_depth' is False; it must be one of 0, 1"),
        ({"model.image.concat_depth": "1"}, "parameter 'model.image.concat_depth' is 1; it must be one of 0, 1, full"),
        ({"blend.beta.constant.value": 0.96}, "is 0.96; it must be a number from 0.05 to 0.95"),
        ({"blend.beta.constant.value": "x"}, "is x; it must be a number from 0.05 to 0.95"),
        ({"blend.beta.constant.value": math.nan}, "is nan; it must be a number from 0.05 to 0.95"),
        ({"blend.beta.constant.value": True}, "is True; it must be a number"),
        ({"train.global_batch": 17}, "parameter 'train.global_batch' is 17; it must be 16 plus a multiple of 16"),
        ({"train.global_batch": 16.0}, "is 16; it must be a whole number from 16 to 64"),
        ({"train.global_batch": None}, "parameter 'train.global_batch' is None; it must be a whole number"),
        ({"train.global_batch": ...}, "parameter 'train.global_batch' has no value; it must be a whole number"),
        ({"blend.beta": ...}, "parameter 'blend.beta.constant.value' exists only with blend.beta constant"),
        ({"blend.beta.constant.value": ...}, "parameter 'blend.beta.constant.value' has no value; it must be a number"),
    ],
)
def test_points_of_another_space_are_refused(changes: dict[str, Any], message: str) -> None:
    point: dict[str, Any] = {
        "blend.beta": "constant",
        "blend.beta.constant.value": 0.5,
        "blend.eta": "balanced",
        "model.image.concat_depth": 1,
        "train.global_batch": 32,
        "train.max_bad_steps": 1,
    }
    space = Space.parse(EXAMPLE, "")
    assert space.values(point)
    changed = {name: value for name, value in {**point, **changes}.items() if value is not ...}
    with pytest.raises(InputError) as caught:
        space.values(changed)
    assert message in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- grid


def test_the_grid_is_an_independent_product() -> None:
    space = Space.parse(EXAMPLE, "")
    grid = space.grid(3)
    beta = 3 + 3 * 11 + 3 * 3 + 3 * 2  # constant, linear, sigmoid, piecewise
    eta = 1 + 3
    assert space.grid_size(3) == len(grid) == beta * eta * 3 * 4 * 3
    assert len({json.dumps(point) for point in grid}) == len(grid)
    for point in grid:
        assert list(space.values(point)) == list(EXAMPLE)
    constant = [
        {
            "blend.beta": "constant",
            "blend.beta.constant.value": value,
            "blend.eta": "constant",
            "blend.eta.constant": factor,
            "model.image.concat_depth": depth,
            "train.global_batch": batch,
            "train.max_bad_steps": steps,
        }
        for value, factor, depth, batch, steps in itertools.product(
            [0.05, 0.5, 0.95], [0.3, 3.0, 30.0], [0, 1, "full"], [16, 32, 48, 64], [1, 3, 4]
        )
    ]
    found = [point for point in grid if point["blend.beta"] == "constant" and point["blend.eta"] == "constant"]
    assert [list(point) for point in found] == [list(point) for point in constant]
    for point, wanted in zip(found, constant, strict=True):
        assert point == pytest.approx(wanted)


def test_the_last_parameter_of_a_grid_changes_first() -> None:
    space = Space.parse({"a": {"choice": {"x": {"uniform": [0, 1]}, "y": 1}}, "b": {"integers": [1, 2]}}, "")
    assert space.grid(2) == [
        {"a": "x", "a.x": 0.0, "b": 1},
        {"a": "x", "a.x": 0.0, "b": 2},
        {"a": "x", "a.x": 1.0, "b": 1},
        {"a": "x", "a.x": 1.0, "b": 2},
        {"a": "y", "b": 1},
        {"a": "y", "b": 2},
    ]
    with pytest.raises(ValueError, match="1 points: both ends"):
        space.grid(1)


@pytest.mark.parametrize(
    ("distribution", "points", "values"),
    [
        ({"uniform": [0, 1]}, 5, [0, 0.25, 0.5, 0.75, 1]),
        ({"uniform": [0.1, 0.7], "step": 0.2}, 2, [0.1, 0.3, 0.5, 0.7]),
        ({"uniform": [-1, 1], "step": 2}, 7, [-1, 1]),
        ({"log_uniform": [0.01, 100]}, 5, [0.01, 0.1, 1, 10, 100]),
        ({"integers": [1, 3]}, 10, [1, 2, 3]),
        ({"integers": [-4, 5]}, 4, [-4, -1, 2, 5]),
        ({"integers": [0, 9], "step": 3}, 2, [0, 3, 6, 9]),
        ({"integers": [0, 2**40]}, 2, [0, 2**40]),
        ({"choice": [None, True, "x", 2.5]}, 2, [None, True, "x", 2.5]),
    ],
)
def test_values_on_the_grid(distribution: dict[str, Any], points: int, values: list[Scalar]) -> None:
    found = [point["a"] for point in Space.parse({"a": distribution}, "").grid(points)]
    assert found == [value if isinstance(value, str | None) else pytest.approx(value, rel=1e-12) for value in values]
    if distribution.get("choice") is None:
        assert (found[0], found[-1]) == (values[0], values[-1])
        assert {type(value) for value in found} == {int if "integers" in distribution else float}


def test_large_grids_are_counted_without_being_made() -> None:
    space = Space.parse({f"a{number}": {"integers": [1, 2**50], "step": 1} for number in range(1, 5)}, "")
    assert space.grid_size(3) == 2**200


@given(
    low=st.floats(-1e6, 1e6),
    step=st.floats(1e-6, 1e3),
    count=st.integers(1, 500),
    index=st.integers(0, 500),
)
def test_steps_reach_both_ends_and_stay_in_place(low: float, step: float, count: int, index: int) -> None:
    high = low + step * count
    index = min(index, count)
    value = at_step(low, high, step, index)
    assert low <= value <= high or math.isclose(value, low, rel_tol=1e-9)
    assert value == pytest.approx(low + step * index, abs=1e-5 * step + 1e-9)
    assert at_step(low, high, step, count) == high


def test_steps_are_short_numbers() -> None:
    assert [at_step(0.1, 0.7, 0.1, index) for index in range(7)] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert len({at_step(1e6, 1e6 + 1e-6, 1e-9, index) for index in range(0, 1001, 10)}) == 101


@given(ends=st.tuples(st.floats(1e-300, 1e300), st.floats(1e-300, 1e300)), fraction=st.floats(0, 1))
def test_between_never_leaves_the_range(ends: tuple[float, float], fraction: float) -> None:
    low, high = sorted(ends)
    for log in (False, True):
        assert low <= between(low, high, fraction, log=log) <= high
        assert (between(low, high, 0, log=log), between(low, high, 1, log=log)) == (low, high)


# --------------------------------------------------------------------------------------------------------------- probes


def test_probes_try_each_label_and_each_end_once() -> None:
    space = Space.parse(EXAMPLE, "")
    wanted = [(name, value) for name, found in space.parameters().items() for value in found.ends()]
    probes = list(space.probes())
    assert [(parameter.name, value) for parameter, value, _ in probes] == wanted
    for parameter, value, point in probes:
        assert point[parameter.name] == value
        assert space.values(point)
        differing = {name for name in point if name not in probes[0][2] or point[name] != probes[0][2][name]}
        above = {parameter.parent[0]} if parameter.parent else set()
        below = {name for name, other in space.parameters().items() if other.parent == (parameter.name, value)}
        siblings = {name for name, other in space.parameters().items() if other.parent == parameter.parent}
        assert differing <= {parameter.name} | above | below | siblings


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (
            0.5,
            "a.yaml: k: must be a distribution, such as {choice: [...]}, {uniform: [low, high]}, {log_uniform: [low,",
        ),
        (0.5, "; a constant is put under overrides"),
        ([1, 2], "k: must be a distribution"),
        ({}, "; a constant is put under overrides"),
        ({"kind": "linear"}, "k: must be a distribution, such as"),
        ({"beta": {"uniform": [0, 1]}}, "; keys below it are written with dots, as k.beta"),
        ({"unifrom": [0, 1]}, "a.yaml: k.unifrom: unknown distribution; did you mean 'uniform'?"),
        ({"loguniform": [0, 1]}, "k.loguniform: unknown distribution; did you mean 'log_uniform'?"),
        ({"integer": [0, 1], "step": 1}, "k.integer: unknown distribution; did you mean 'integers'?"),
        ({"choices": [1]}, "k.choices: unknown distribution; did you mean 'choice'?"),
        ({"choice": {"a": {"unifrom": [0, 1]}}}, "k.choice.a.unifrom: unknown distribution; did you mean 'uniform'?"),
        ({"choice": [{"kind": "x", "v": {"log-uniform": [1, 2]}}]}, "k.choice.0.v.log-uniform: unknown distribution"),
        ({"choice": [1], "uniform": [0, 1]}, "k: has choice and uniform; give one of them"),
        ({"uniform": [0, 1], "stpe": 0.1}, "k.stpe: unknown key of a uniform distribution; did you mean 'step'?"),
        ({"uniform": [0, 1], "log": True}, "k.log: unknown key of a uniform distribution; known: step, uniform"),
        ({"log_uniform": [1, 2], "step": 1}, "k.step: unknown key of a log_uniform distribution; known: log_uniform"),
        ({"choice": [1], "step": 1}, "k.step: unknown key of a choice distribution; known: choice"),
        ({"uniform": 1}, "k.uniform: must be two numbers, [low, high], but it is 1"),
        ({"uniform": [0]}, "k.uniform: must be two numbers, [low, high], but it is [0]"),
        ({"uniform": [0, 1, 2]}, "must be two numbers"),
        ({"uniform": ["0", 1]}, "must be two numbers"),
        ({"uniform": [0, True]}, "must be two numbers"),
        ({"uniform": [0, math.inf]}, "must be two numbers"),
        ({"uniform": [math.nan, 1]}, "must be two numbers"),
        ({"uniform": [0, 10**400]}, "must be two numbers"),
        ({"uniform": [0, {"uniform": [0, 1]}]}, "must be two numbers"),
        ({"uniform": [1, 1]}, "k.uniform: low 1 must be less than high 1"),
        ({"uniform": [2, 1]}, "k.uniform: low 2 must be less than high 1"),
        ({"uniform": [-1e308, 1e308]}, "k.uniform: -1e+308 and 1e+308 are too far apart"),
        ({"log_uniform": [0, 1]}, "k.log_uniform: low 0 must be above 0, because the logarithm is drawn"),
        ({"log_uniform": [-1, 1]}, "k.log_uniform: low -1 must be above 0"),
        ({"integers": [0.5, 2]}, "k.integers: must be two whole numbers, [low, high], but it is [0.5, 2]"),
        ({"integers": [1.0, 2]}, "must be two whole numbers"),
        ({"integers": [2**60, 2**61]}, "must be two whole numbers"),
        ({"integers": [3, 2]}, "k.integers: low 3 must be less than high 2"),
        ({"uniform": [0, 1], "step": 0}, "k.step: must be a number above 0, but it is 0"),
        ({"uniform": [0, 1], "step": -0.5}, "k.step: must be a number above 0"),
        ({"uniform": [0, 1], "step": math.nan}, "k.step: must be a number above 0"),
        ({"uniform": [0, 1], "step": None}, "k.step: must be a number above 0"),
        ({"uniform": [0, 1], "step": 0.3}, "k.step: 0.3 does not divide the range of 0 to 1"),
        ({"uniform": [0, 1], "step": 2}, "k.step: 2 does not divide the range of 0 to 1"),
        ({"uniform": [0, 1], "step": 1e-7}, "k.step: 1e-07 divides the range of 0 to 1 into over 1,000,000 steps"),
        ({"uniform": [0, 1], "step": 5e-324}, "into over 1,000,000 steps"),
        ({"integers": [0, 4], "step": 1.0}, "k.step: must be a whole number above 0, but it is 1.0"),
        ({"integers": [0, 4], "step": 3}, "k.step: 3 does not divide the range of 0 to 4"),
        ({"choice": []}, "k.choice: must be a list of options, or a mapping of labels to options, and not empty"),
        ({"choice": {}}, "k.choice: must be a list of options"),
        ({"choice": "abc"}, "k.choice: must be a list of options"),
        ({"choice": None}, "k.choice: must be a list of options"),
        ({"choice": [1, 1]}, "k.choice.1: label '1' is given twice; write choice as a mapping, {label: option, ...}"),
        ({"choice": [1, "1"]}, "k.choice.1: label '1' is given twice"),
        ({"choice": [1, True]}, "k.choice.1: label 'True' is given twice"),
        ({"choice": [1, 1.0]}, "k.choice.1: label '1.0' is given twice"),
        ({"choice": [{"kind": "a"}, {"kind": "a", "x": 1}]}, "k.choice.1: label 'a' is given twice"),
        ({"choice": [{"start": 1}]}, "k.choice.0: has no kind or form to be called by; write choice as a mapping"),
        ({"choice": [{"kind": {"choice": ["a"]}}]}, "k.choice.0: has no kind or form to be called by"),
        ({"choice": [1, {"uniform": [0, 1]}]}, "k.choice.1: has no kind or form to be called by"),
        ({"choice": [[1, 2]]}, "k.choice.0: has no kind or form to be called by"),
        ({"choice": {False: 1}}, "k.choice.False: label False must be a string; put it in quotes"),
        ({"choice": {1: 1}}, "k.choice.1: label 1 must be a string; put it in quotes"),
        ({"choice": [math.inf]}, "k.choice.0: must be finite, but it is inf"),
        ({"choice": {"a": {"x": [math.nan]}}}, "k.choice.a.x.0: must be finite, but it is nan"),
        ({"choice": [b"x"]}, "k.choice.0: must be a number, a string, true, false or null, but it is a bytes"),
        (
            {"choice": {"a": {"b": {"uniform": [0, 1]}}, "a.b": {"uniform": [0, 1]}}},
            "k.choice.a.b: parameter 'k.a.b' is there twice; call the option differently",
        ),
    ],
)
def test_what_is_refused(distribution: Any, message: str) -> None:
    assert message in refusal({"k": distribution})


def test_an_empty_space_is_refused() -> None:
    assert refusal({}).startswith("a.yaml: holds nothing; give {key: distribution}, such as {choice: [...]}")


def test_no_key_of_a_configuration_passes_for_a_distribution() -> None:
    def names(section: type[Section]) -> Iterator[str]:
        for name, field in section.model_fields.items():
            yield name
            for below in sections_in(field):
                yield from names(below)

    found = set(names(RunConfig))
    assert len(found) > 80 and not found & set(KINDS)
    for name in found:
        space = Space.parse({"k": {"choice": {"a": {name: 1}, "b": {name: {"uniform": [0, 1]}}}}}, "")
        assert list(space.parameters()) == ["k", f"k.b.{name}"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(
            st.sampled_from([*KINDS, "step", "kind", "a", "unifrom"]) | st.text(max_size=2), below, max_size=3
        )
    ),
    max_leaves=12,
)


@given(
    values=st.dictionaries(st.sampled_from(["a", "b.c"]), st.fixed_dictionaries({"choice": JUNK}) | JUNK, max_size=2)
)
def test_anything_is_a_space_or_refused(values: dict[str, Any]) -> None:
    try:
        space = Space.parse(values, "a.yaml")
    except SpaceError as error:
        assert str(error).startswith("a.yaml: ")
        return
    for point in draws(space, 3):
        assert set(space.values(point)) == set(values)
    assert all(isinstance(parameter, Parameter) for parameter in space.parameters().values())
