"""Population based training: draws, copies, lines of descent and the schedules made of them."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist.config import BetaSchedule, BlendConfig, ConstantBeta, PiecewiseBeta
from mdnet_dist.errors import InputError
from mdnet_dist.schedules import beta_at, eta_at
from tune.population import (
    BETA,
    EDGE,
    ETA,
    TICKS,
    Settings,
    Stretch,
    first_points,
    last_winner,
    lineage,
    next_segments,
    schedule_of,
)
from tune.records import Point, Report, Scalar, Segment, Status, TrialRecord

MANY = settings(max_examples=1000, deadline=None)


@st.composite
def all_settings(draw: st.DrawFn) -> Settings:
    low = draw(st.floats(0, 0.99))
    eta_low = draw(st.floats(1e-4, 1e3))
    return Settings(
        beta=(low, draw(st.floats(max(low + 0.001, 2 * EDGE), 1))),
        eta=draw(st.sampled_from([None, (eta_low, eta_low * draw(st.floats(1.01, 1e4)))])),
        eta_log=draw(st.booleans()),
        copied_share=draw(st.floats(0, 0.5)),
        resampled_share=draw(st.sampled_from([0.0, 0.25, 1.0])),
        step=draw(st.floats(0.01, 5)),
        seed=draw(st.integers(0, 2**31)),
    )


SCORES = st.lists(
    st.one_of(st.none(), st.floats(-5, 5), st.sampled_from([0.0, 1.0, math.nan])), min_size=1, max_size=20
)
MODES = st.sampled_from(["min", "max"])


def number(value: Scalar) -> float:
    assert isinstance(value, float)
    return value


def inside(drawn: Settings, point: Point) -> bool:
    low, high = drawn.beta
    if not max(low, EDGE) <= number(point[BETA]) <= min(high, 1 - EDGE):
        return False
    return drawn.eta is None or drawn.eta[0] <= number(point[ETA]) <= drawn.eta[1]


def log_odds(value: Scalar) -> float:
    return math.log(number(value) / (1 - number(value)))


# ---------------------------------------------------------------------------------------------------------------- draws


@given(all_settings(), st.integers(1, 30))
@MANY
def test_first_points_are_in_bounds_with_one_in_each_part(drawn: Settings, members: int) -> None:
    points = first_points(drawn, members)
    assert points == first_points(drawn, members)
    assert all(inside(drawn, point) for point in points)
    assert all(set(point) == ({BETA} if drawn.eta is None else {BETA, ETA}) for point in points)

    def parts(name: str, low: float, high: float, scale: Callable[[float], float]) -> list[float]:
        places = sorted((scale(number(point[name])) - scale(low)) / (scale(high) - scale(low)) for point in points)
        return [place * members - part for part, place in enumerate(places)]

    low, high = drawn.beta
    found = parts(BETA, max(low, EDGE), min(high, 1 - EDGE), float)
    if drawn.eta is not None:
        found += parts(ETA, *drawn.eta, math.log if drawn.eta_log else float)
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in found)


def test_axes_are_dealt_independently_and_seeds_differ() -> None:
    base = {"beta": (0.1, 0.9), "eta": (0.1, 10.0)}
    points = first_points(Settings(**base), 200)  # type: ignore[arg-type]
    betas, etas = ([number(point[name]) for point in points] for name in (BETA, ETA))
    assert abs(statistics.correlation(betas, list(map(math.log, etas)))) < 0.2
    assert sum(eta < 1 for eta in etas) == 100
    linear = first_points(Settings(**base, eta_log=False), 200)  # type: ignore[arg-type]
    assert sum(number(point[ETA]) < 5.05 for point in linear) == 100
    assert first_points(Settings(**base, seed=1), 200) != points  # type: ignore[arg-type]
    assert first_points(Settings(beta=(0.1, 0.9)), 0) == []


# --------------------------------------------------------------------------------------------------------------- copies


@given(all_settings(), SCORES, MODES, st.integers(0, 50))
@MANY
def test_the_bottom_copies_the_top(
    drawn: Settings, scores: list[float | None], mode: Literal["min", "max"], generation: int
) -> None:
    points = first_points(drawn, len(scores))
    before = [dict(point) for point in points]
    segments = next_segments(drawn, generation, scores, points, mode)
    assert segments == next_segments(drawn, generation, scores, points, mode)
    assert points == before
    assert len(segments) == len(scores)
    assert all(inside(drawn, point) for _, point in segments)

    def worth(member: int) -> float:
        score = scores[member]
        assert score is not None
        return score if mode == "max" else -score

    good = [member for member, score in enumerate(scores) if score is not None and math.isfinite(score)]
    failed = len(scores) - len(good)
    share = 0 if len(scores) < 2 else min(max(1, round(drawn.copied_share * len(scores))), len(scores) // 2)
    copies = {member: parent for member, (parent, _) in enumerate(segments) if parent is not None}
    assert len(copies) == (max(share, failed) if good and len(scores) > 1 else 0)
    assert not set(copies) & set(copies.values()), "top and bottom overlap"
    for member, source in copies.items():
        assert source in good
        assert sum(worth(other) > worth(source) for other in good) < share, "not copied from the top"
        assert member not in good or sum(worth(other) < worth(member) for other in good) < share - failed
    for member, (parent, point) in enumerate(segments):
        if parent is None:
            assert point == points[member]


@given(all_settings(), st.integers(0, 1000))
@MANY
def test_a_copy_is_one_step_from_its_parent(drawn: Settings, generation: int) -> None:
    drawn = Settings(**{**drawn.__dict__, "resampled_share": 0.0, "copied_share": 0.5})
    points = first_points(drawn, 6)
    low, high = (log_odds(min(1 - EDGE, max(EDGE, bound))) for bound in drawn.beta)
    for parent, point in next_segments(drawn, generation, [1.0, 2, 3, 4, 5, 6], points, "max"):
        if parent is None:
            continue
        there = log_odds(points[parent][BETA])
        wanted = [there + drawn.step, there - drawn.step]
        wanted = [2 * high - place if place > high else 2 * low - place if place < low else place for place in wanted]
        wanted = [min(high, max(low, place)) for place in wanted]
        assert min(abs(log_odds(point[BETA]) - place) for place in wanted) < 1e-6
        if drawn.eta is not None:
            ratio = abs(math.log(number(point[ETA]) / number(points[parent][ETA])))
            assert ratio <= drawn.step + 1e-9


def test_a_step_is_reflected_at_the_bounds() -> None:
    """Log-odds of 0.5 are 0, of 0.6 log 1.5: a step of log 2 from 0.5 upwards ends as far below 0.6 as it went over."""
    drawn = Settings(beta=(0.2, 0.6), eta=(1.0, 10.0), resampled_share=0.0, step=math.log(2))
    found = set()
    for generation in range(100):
        _, (parent, point) = next_segments(drawn, generation, [1, 0], [{BETA: 0.5, ETA: 8.0, "x": "y"}, {}], "max")
        assert parent == 0 and point["x"] == "y"
        found.add((round(number(point[BETA]), 9), round(number(point[ETA]), 9)))
    odds = 1.5**2 / 2
    betas, etas = {round(odds / (1 + odds), 9), round(1 / 3, 9)}, {4.0, 6.25}
    assert found == set(itertools.product(betas, etas))


def test_shares_of_what_is_drawn() -> None:
    """Parents, directions and resampling are as frequent as they should be."""
    drawn = Settings(beta=(0.01, 0.99), copied_share=0.4, resampled_share=0.25, step=0.5)
    points: list[Point] = [{BETA: 0.5} for _ in range(5)]
    parents, moves = [], []
    for generation in range(4000):
        for parent, point in next_segments(drawn, generation, [0.0, 4, 3, 2, 1], points, "max"):
            if parent is not None:
                parents.append(parent)
                moves.append(round(log_odds(point[BETA]), 6))
    assert set(parents) == {1, 2} and len(parents) == 8000
    assert parents.count(1) / 8000 == pytest.approx(0.5, abs=0.03)
    assert moves.count(0.5) / 8000 == pytest.approx(0.375, abs=0.03)
    assert moves.count(-0.5) / 8000 == pytest.approx(0.375, abs=0.03)


def test_what_is_drawn_depends_on_seed_and_generation() -> None:
    drawn = [Settings(beta=(0, 1), seed=seed) for seed in (0, 1)]
    points = first_points(drawn[0], 20)
    scores = [float(member) for member in range(20)]
    outcomes = [
        repr(next_segments(setting, generation, scores, points, "max")) for setting in drawn for generation in range(5)
    ]
    assert len(set(outcomes)) == 10


def test_failed_members_copy_and_are_not_copied() -> None:
    drawn = Settings(beta=(0, 1), copied_share=0.25)
    points = first_points(drawn, 5)
    parents = [parent for parent, _ in next_segments(drawn, 1, [None, 0.1, math.nan, 0.3, None], points, "max")]
    assert parents == [3, None, 3, None, 3]
    parents = [parent for parent, _ in next_segments(drawn, 1, [None, 0.1, 0.2, 0.3, 0.4], points, "min")]
    assert parents == [1, None, None, None, None]
    for scores in ([None] * 5, [], [1.0], [None]):
        assert next_segments(drawn, 1, scores, points[: len(scores)], "max") == [
            (None, point) for point in points[: len(scores)]
        ]


@pytest.mark.parametrize("value", [None, "balanced", True])
def test_a_point_without_its_number_is_named(value: Scalar) -> None:
    with pytest.raises(
        InputError, match=rf"member 2 of generation 7: blend\.eta must be a number, but it is {value!r}"
    ):
        next_segments(Settings(beta=(0, 1), eta=(1, 2)), 7, [0, 1], [{}, {BETA: 0.5, ETA: value}], "max")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beta": (0.5, 0.5)}, "bounds of beta 0.5, 0.5: must rise within 0..1 and not lie within 0.001 of an end"),
        ({"beta": (-0.1, 0.5)}, "bounds of beta -0.1, 0.5: must rise"),
        ({"beta": (0.1, 1.5)}, "bounds of beta 0.1, 1.5: must rise"),
        ({"beta": (0.0, 0.001)}, "not lie within 0.001 of an end"),
        ({"beta": (0.9995, 1)}, "not lie within 0.001 of an end"),
        ({"beta": (math.nan, 1)}, "bounds of beta nan, 1: must rise"),
        ({"eta": (0, 1)}, "bounds of eta 0, 1: must rise and be finite and above 0"),
        ({"eta": (2, 1)}, "bounds of eta 2, 1: must rise"),
        ({"eta": (1, math.inf)}, "bounds of eta 1, inf: must rise and be finite"),
        ({"copied_share": 0.51}, "copied_share 0.51: must be from 0 to 0.5"),
        ({"copied_share": -1}, "copied_share -1: must be from 0 to 0.5"),
        ({"resampled_share": 1.1}, "resampled_share 1.1: must be from 0 to 1"),
        ({"step": 0}, "step 0: must be finite and above 0"),
        ({"step": math.nan}, "step nan: must be finite and above 0"),
    ],
)
def test_wrong_settings_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Settings(**{"beta": (0.1, 0.9), **changed})


# -------------------------------------------------------------------------------------------------------------- descent


def record(name: str, segments: Sequence[tuple[str | None, float, float | None, int, int]]) -> TrialRecord:
    """A member of (parent, beta, eta, first step, last step)."""
    made = []
    for place, (parent, beta, eta, first, last) in enumerate(segments):
        point: Point = {BETA: beta} if eta is None else {BETA: beta, ETA: eta}
        made.append(Segment(number=place, parent=parent, point=point, first_step=first, last_step=last))
    return TrialRecord(number=1, name=name, point={}, segments=made)


def history() -> dict[str, TrialRecord]:
    """c copied b in stretch 3, which had copied a in stretch 2, whose stretch 1 was a copy of c's stretch 0."""
    return {
        "a": record("a", [(None, 0.1, 1.0, 0, 10), ("c", 0.25, 4.0, 10, 20), (None, 0.25, 4.0, 20, 30)]),
        "b": record("b", [(None, 0.2, 2.0, 0, 10), (None, 0.2, 2.0, 10, 20), ("a", 0.5, 4.0, 20, 30)]),
        "c": record(
            "c",
            [
                (None, 0.3, 3.0, 0, 10),
                (None, 0.3, 3.0, 10, 20),
                (None, 0.3, 3.0, 20, 30),
                ("b", 0.6, 5.0, 30, 45),
                (None, 0.6, 5.0, 45, 60),
            ],
        ),
    }


def pieces(stretches: Sequence[Stretch]) -> list[tuple[int, int, float, float | None]]:
    return [(piece.first_step, piece.last_step, piece.beta, piece.eta) for piece in stretches]


def test_copies_of_copies() -> None:
    found = lineage(history(), "c")
    assert pieces(found) == [
        (0, 10, 0.3, 3.0),
        (10, 20, 0.25, 4.0),
        (20, 30, 0.5, 4.0),
        (30, 45, 0.6, 5.0),
        (45, 60, 0.6, 5.0),
    ]
    assert pieces(lineage(history(), "b")) == [(0, 10, 0.3, 3.0), (10, 20, 0.25, 4.0), (20, 30, 0.5, 4.0)]
    assert schedule_of(found, 60) == {
        "beta": {
            "kind": "piecewise",
            "knots": [
                [0.0, 0.3],
                [0.1666, 0.3],
                [0.1667, 0.25],
                [0.3333, 0.25],
                [0.3334, 0.5],
                [0.5, 0.5],
                [0.5001, 0.6],
            ],
        },
        "eta": {
            "kind": "piecewise",
            "knots": [[0.0, 3.0], [0.1666, 3.0], [0.1667, 4.0], [0.5, 4.0], [0.5001, 5.0]],
        },
    }


def test_broken_histories_are_named() -> None:
    def change(name: str, place: int, **values: Any) -> dict[str, TrialRecord]:
        members = history()
        segment = members[name].segments[place]
        members[name].segments[place] = Segment(**{**segment.__dict__, **values})
        return members

    without_a, without_stretch = history(), history()
    del without_a["a"]
    del without_stretch["a"].segments[1]
    twice = history()
    twice["b"].segments.append(twice["b"].segments[2])
    for members, message in (
        (without_a, "member 'a', stretch 1: must be in the history once, but is 0 times"),
        (without_stretch, "member 'a', stretch 1: must be in the history once, but is 0 times"),
        (twice, "member 'b', stretch 2: must be in the history once, but is 2 times"),
        ({"c": record("c", [])}, "member 'c', stretch 0: must be in the history once, but is 0 times"),
        (
            change("b", 2, last_step=29),
            "member 'c', stretch 3: starts at step 30, but stretch 2 of 'b', which it goes on from, ends at step 29",
        ),
        (change("a", 1, last_step=21), "member 'b', stretch 2: starts at step 20, but stretch 1 of 'a'"),
        (change("a", 1, last_step=10), "member 'b', stretch 2: starts at step 20, but stretch 1 of 'a'"),
        (change("c", 4, last_step=45), "member 'c', stretch 4: must end behind step 45, but ends at 45"),
        (
            change("c", 0, first_step=1),
            "member 'c', stretch 0: must start at step 0 from new weights, but starts at step 1 from its own weights",
        ),
        (
            change("c", 0, parent="a"),
            "'c', stretch 0: must start at step 0 from new weights, but starts at step 0 from a",
        ),
        (change("a", 1, point={}), "member 'a', stretch 1: blend.beta.value must be a number, but it is None"),
        (change("a", 1, point={BETA: "x"}), "member 'a', stretch 1: blend.beta.value must be a number, but it is 'x'"),
        (change("a", 1, point={BETA: 0.1, ETA: None}), "member 'a', stretch 1: blend.eta must be a number, but it is"),
        (
            change("a", 1, point={BETA: 0.1}),
            "member 'a', stretch 1: blend.eta is given in some stretches of the history",
        ),
    ):
        with pytest.raises(InputError) as caught:
            lineage(members, "c")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@st.composite
def searches(draw: st.DrawFn) -> tuple[dict[str, TrialRecord], dict[str, list[tuple[int, int, float, float | None]]]]:
    """A search with random scores and failures: its members, and the history that each one's weights carried along."""
    drawn = draw(all_settings())
    chance = random.Random(draw(st.integers(0, 2**31)))
    count, generations = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    points = first_points(drawn, count)
    members = {f"m{place}": TrialRecord(number=place + 1, name=f"m{place}", point={}) for place in range(count)}
    carried: list[list[tuple[int, int, float, float | None]]] = [[] for _ in range(count)]
    segments: list[tuple[int | None, Point]] = [(None, point) for point in points]
    step = 0
    for generation in range(generations):
        if generation:
            scores = [None if chance.random() < 0.2 else chance.random() for _ in range(count)]
            segments = next_segments(drawn, generation, scores, [point for _, point in segments], "max")
        end = step + chance.randint(1, 50)
        # Weights are copied all at once: a copy of its parent as it was at the end of the stretch before.
        carried = [list(carried[place if parent is None else parent]) for place, (parent, _) in enumerate(segments)]
        for place, (parent, point) in enumerate(segments):
            eta = None if drawn.eta is None else number(point[ETA])
            carried[place].append((step, end, number(point[BETA]), eta))
            members[f"m{place}"].segments.append(
                Segment(
                    number=generation,
                    parent=None if parent is None else f"m{parent}",
                    point=point,
                    first_step=step,
                    last_step=end,
                )
            )
        step = end
    return members, {f"m{place}": list(pieces) for place, pieces in enumerate(carried)}


@given(searches())
@MANY
def test_a_line_of_descent_is_what_the_weights_carried_along(
    search: tuple[dict[str, TrialRecord], dict[str, list[tuple[int, int, float, float | None]]]],
) -> None:
    members, carried = search
    for name, expected in carried.items():
        assert pieces(lineage(members, name)) == expected
        assert expected[0][0] == 0
        assert all(left[1] == right[0] for left, right in itertools.pairwise(expected))


# ------------------------------------------------------------------------------------------------------------- schedule


@st.composite
def descents(draw: st.DrawFn, shortest: int = 1, longest: int = 300) -> list[Stretch]:
    """Stretches of `shortest` to `longest` steps, neighbours often with the same values."""
    betas, etas = st.floats(0.001, 0.999), st.floats(1e-3, 1e3)
    searched = draw(st.booleans())
    stretches: list[Stretch] = []
    first, beta, eta = 0, draw(betas), draw(etas)
    for _ in range(draw(st.integers(1, 10))):
        beta = draw(st.one_of(st.just(beta), betas))
        eta = draw(st.one_of(st.just(eta), etas))
        last = first + draw(st.integers(shortest, longest))
        stretches.append(Stretch(first_step=first, last_step=last, beta=beta, eta=eta if searched else None))
        first = last
    return stretches


def blend_of(stretches: Sequence[Stretch], total_steps: int) -> BlendConfig:
    values = schedule_of(stretches, total_steps)
    assert set(values) == ({"beta"} if stretches[0].eta is None else {"beta", "eta"})
    return BlendConfig.model_validate(values)


def value_of_eta(blend: BlendConfig, fraction: float) -> float:
    assert not isinstance(blend.eta, str)
    return eta_at(blend.eta, fraction)


@given(descents())
@MANY
def test_up_to_5000_steps_each_is_trained_with_its_own_values_again(stretches: list[Stretch]) -> None:
    total = stretches[-1].last_step
    assert total <= TICKS / 2
    blend = blend_of(stretches, total)
    for stretch in stretches:
        for step in {stretch.first_step, (stretch.first_step + stretch.last_step) // 2, stretch.last_step - 1}:
            fraction = (step + 0.5) / total  # as the trainer asks
            assert beta_at(blend.beta, fraction) == pytest.approx(stretch.beta, abs=1e-12)
            if stretch.eta is not None:
                assert value_of_eta(blend, fraction) == pytest.approx(stretch.eta, rel=1e-12)


def deviation_of_beta(stretches: Sequence[Stretch], beta: BetaSchedule) -> tuple[float, float]:
    """Largest and mean distance from the stretches' own values, exactly: between two places the distance is a line."""
    total = stretches[-1].last_step
    bends = [knot[0] for knot in beta.knots] if isinstance(beta, PiecewiseBeta) else []
    largest = mean = 0.0
    for stretch in stretches:
        first, last = stretch.first_step / total, stretch.last_step / total
        places = [first, *[bend for bend in bends if first < bend < last], last]
        for left, right in itertools.pairwise(places):
            ends = [beta_at(beta, place) - stretch.beta for place in (left, right)]
            size = abs(ends[0]) + abs(ends[1])
            largest = max(largest, *map(abs, ends))
            if ends[0] * ends[1] >= 0:
                mean += (right - left) * size / 2
            else:
                mean += (right - left) * (ends[0] ** 2 + ends[1] ** 2) / size / 2
    return largest, mean


@given(descents(shortest=200, longest=100_000))
@MANY
def test_a_schedule_deviates_next_to_changes_only(stretches: list[Stretch]) -> None:
    """By no more than the change, and on average by half a tick of it; however long the training is."""
    blend = blend_of(stretches, stretches[-1].last_step)
    largest, mean = deviation_of_beta(stretches, blend.beta)
    changes = [abs(later.beta - earlier.beta) for earlier, later in itertools.pairwise(stretches)]
    assert largest <= max(changes, default=0) + 1e-12
    assert sum(changes) / 4 / TICKS - 1e-12 <= mean <= sum(changes) / 2 / TICKS + 1e-12


def test_knots_at_quarters_would_deviate_by_an_eighth_of_each_change() -> None:
    """What the docstring of `schedule_of` says of the other choice."""
    stretches = [Stretch(first_step=40 * n, last_step=40 * n + 40, beta=0.1 + 0.2 * n, eta=None) for n in range(4)]
    knots = [[(40 * n + place) / 160, 0.1 + 0.2 * n] for n in range(4) for place in (10, 30)]
    _, mean = deviation_of_beta(stretches, PiecewiseBeta(kind="piecewise", knots=knots))
    assert mean == pytest.approx(3 * 0.2 / 8 / 4)
    assert deviation_of_beta(stretches, blend_of(stretches, 160).beta)[1] < mean / 500


@given(descents(longest=30_000), st.integers(1, 200_000))
@MANY
def test_any_schedule_is_a_valid_configuration(stretches: list[Stretch], total: int) -> None:
    """Also where the fractions refer to another length than was trained."""
    values = schedule_of(stretches, total)
    blend = blend_of(stretches, total)
    assert blend.model_dump(mode="json", include=set(values)) == values
    for section in values.values():
        if not isinstance(section, dict) or section["kind"] != "piecewise":
            continue
        fractions = [fraction for fraction, _ in section["knots"]]
        assert fractions[0] == 0 and fractions[-1] <= 1
        assert all(later > earlier for earlier, later in itertools.pairwise(fractions))
        assert all(round(fraction, 4) == fraction for fraction in fractions)
        assert len(fractions) <= 2 * len(stretches) - 1
        assert len({value for _, value in section["knots"]}) > 1


def test_what_never_changed_is_constant() -> None:
    stretches = [Stretch(first_step=10 * n, last_step=10 * n + 10, beta=0.3, eta=2.0) for n in range(5)]
    assert schedule_of(stretches, 50) == {"beta": {"kind": "constant", "value": 0.3}, "eta": 2.0}
    assert blend_of(stretches, 50).beta == ConstantBeta(kind="constant", value=0.3)
    alone = [Stretch(first_step=0, last_step=10, beta=0.3, eta=None)]
    assert schedule_of(alone, 10) == {"beta": {"kind": "constant", "value": 0.3}}


def test_stretches_that_no_knot_can_show() -> None:
    def knots(*last_steps: int, total: int) -> Any:
        firsts = [0, *last_steps]
        stretches = [
            Stretch(first_step=first, last_step=last, beta=place / 10, eta=None)
            for place, (first, last) in enumerate(itertools.pairwise(firsts))
        ]
        beta = schedule_of(stretches, total)["beta"]
        return beta.get("knots", beta.get("value"))

    million = 1_000_000
    assert knots(10, million, total=million) == [[0.0, 0.0], [0.0001, 0.1]], "the first lies within a tick"
    assert knots(500_000, 500_010, million, total=million) == [[0.0, 0.0], [0.5, 0.0], [0.5001, 0.2]]
    assert knots(500_000, 500_100, million, total=million) == [[0.0, 0.0], [0.5, 0.0], [0.5001, 0.1], [0.5002, 0.2]]
    assert knots(999_990, million, total=million) == [[0.0, 0.0], [0.9999, 0.0], [1.0, 0.1]]
    assert knots(50, 100, 150, total=100) == [[0.0, 0.0], [0.5, 0.0], [0.5001, 0.1]], "the last lies behind the end"
    assert knots(100, 150, total=100) == 0.0


# --------------------------------------------------------------------------------------------------------------- winner


def reported(name: str, values: list[float], status: Status = "finished") -> TrialRecord:
    reports = [Report(epoch=n, step=n, seconds=0.0, metrics={"val/x": value}) for n, value in enumerate(values)]
    reports.append(Report(epoch=9, step=9, seconds=0.0, metrics={"val/other": 5.0}))
    return TrialRecord(number=1, name=name, point={}, reports=reports, status=status)


def test_the_last_report_decides() -> None:
    records = [
        reported("high once", [9.0, 1.0]),
        reported("a", [0.0, 3.0]),
        reported("b", [1.0, 3.0]),
        reported("failed", [7.0], status="failed"),
        reported("diverged", [7.0, math.nan]),
        reported("silent", []),
    ]
    members = {record.name: record for record in records}
    for mode, name in (("max", "a"), ("min", "high once")):
        best = last_winner(members, "val/x", mode)  # type: ignore[arg-type]
        assert best is not None and best.name == name
    assert last_winner({name: members[name] for name in ("failed", "diverged", "silent")}, "val/x", "max") is None
    assert last_winner({}, "val/x", "max") is None


# ------------------------------------------------------------------------------------------------------------ it works


def gain(beta: float, fraction: float) -> float:
    """Of one step of a made-up training: best at 0.15 at the start and at 0.85 at the end."""
    return math.exp(-(((beta - (0.15 + 0.7 * fraction)) / 0.2) ** 2))


def test_it_finds_a_schedule_where_the_best_beta_moves() -> None:
    """Better than any constant; and the schedule of the winner's descent alone earns what the winner earned."""
    generations, steps = 30, 10
    total = generations * steps
    constant = max(
        sum(gain(beta / 100, (step + 0.5) / total) for step in range(total)) / total for beta in range(1, 100)
    )
    earned, earned_again = [], []
    for seed in range(20):
        drawn = Settings(beta=(0.02, 0.98), copied_share=0.25, resampled_share=0.1, step=0.5, seed=seed)
        names = [f"m{place}" for place in range(12)]
        members = {name: TrialRecord(number=1, name=name, point={}) for name in names}
        weights = [0.0] * 12  # what they have earned
        segments: list[tuple[int | None, Point]] = [(None, point) for point in first_points(drawn, 12)]
        for generation in range(generations):
            if generation:
                segments = next_segments(drawn, generation, weights, [point for _, point in segments], "max")
            first, last = generation * steps, (generation + 1) * steps
            weights = [weights[place if parent is None else parent] for place, (parent, _) in enumerate(segments)]
            for place, (parent, point) in enumerate(segments):
                beta = number(point[BETA])
                weights[place] += sum(gain(beta, (step + 0.5) / total) for step in range(first, last))
                members[names[place]].segments.append(
                    Segment(
                        number=generation,
                        parent=None if parent is None else names[parent],
                        point=point,
                        first_step=first,
                        last_step=last,
                    )
                )
                report = Report(epoch=generation, step=last, seconds=0.0, metrics={"val/x": weights[place]})
                members[names[place]].reports.append(report)
        winner = last_winner(members, "val/x", "max")
        assert winner is not None
        earned.append(max(weights) / total)
        blend = blend_of(lineage(members, winner.name), total)
        again = [gain(beta_at(blend.beta, (step + 0.5) / total), (step + 0.5) / total) for step in range(total)]
        earned_again.append(sum(again) / total)
    assert earned_again == pytest.approx(earned, rel=1e-9)
    assert statistics.mean(earned) > 1.2 * constant
    assert min(earned) > constant
