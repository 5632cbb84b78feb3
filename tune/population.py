"""Population based training of beta and eta, as pure functions of numbers.

Method: Jaderberg et al., "Population Based Training of Neural Networks", arXiv 1711.09846, 2017, made synchronous.
All members train a stretch of steps with their own beta (and eta); then those at the bottom go on with the weights of
one at the top and with its values, changed a little (truncation selection; perturb or resample). What trained the
winner's last weights are the values along its line of descent, and those are a schedule. Nothing is kept between calls:
a search that was killed between two stretches decides the same again.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mdnet_dist.errors import InputError
from tune.records import Point, Segment, TrialRecord

BETA = "blend.beta.value"
ETA = "blend.eta"
EDGE = 1e-3
"""beta stays this far from 0 and 1, where its log-odds are infinite and no perturbation would lead away."""
TICKS = 10_000
"""Fractions of training in a schedule are whole multiples of 1 / TICKS: four digits."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a population is drawn and changed.

    Raises:
        InputError: a value outside its range.
    """

    beta: tuple[float, float]
    """Lowest and highest beta, in 0..1; nearer than `EDGE` to 0 and 1 nothing is drawn."""
    eta: tuple[float, float] | None = None
    """Lowest and highest eta, above 0; None: eta is not searched."""
    eta_log: bool = True
    """Whether eta is drawn uniformly in log eta, or in eta. It is perturbed in log eta in either case."""
    copied_share: float = 0.25
    """Share of the members, counted from the bottom, that copy one of as many at the top; 0..0.5."""
    resampled_share: float = 0.25
    """Probability that a copied value is drawn anew instead of perturbed; 0..1."""
    step: float = 0.5
    """Size of a perturbation, up or down: in the log-odds of beta, which treats both ends alike, and in log eta."""
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.beta
        if not (0 <= low < high <= 1 and low < 1 - EDGE and high > EDGE):
            raise InputError(f"bounds of beta {low}, {high}: must rise within 0..1 and not lie within {EDGE} of an end")
        if self.eta is not None and not 0 < self.eta[0] < self.eta[1] < math.inf:
            raise InputError(f"bounds of eta {self.eta[0]}, {self.eta[1]}: must rise and be finite and above 0")
        for name, most in (("copied_share", 0.5), ("resampled_share", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"{name} {getattr(self, name)}: must be from 0 to {most:g}")
        if not 0 < self.step < math.inf:
            raise InputError(f"step {self.step}: must be finite and above 0")

    def axes(self) -> dict[str, Axis]:
        """The searched parameters."""
        low, high = self.beta
        axes = {BETA: Axis(low=max(low, EDGE), high=min(high, 1 - EDGE), drawn_in="value", moved_in="log-odds")}
        if self.eta is not None:
            low, high = self.eta
            axes[ETA] = Axis(low=low, high=high, drawn_in="log" if self.eta_log else "value", moved_in="log")
        return axes


Scale = Literal["value", "log", "log-odds"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One searched parameter: its bounds, and the scales on which it is drawn uniformly and perturbed."""

    low: float
    high: float
    drawn_in: Scale
    moved_in: Scale

    def at(self, share: float) -> float:
        """The value at a share (0..1) of the way from low to high."""
        low, high = (_to_scale(bound, self.drawn_in) for bound in (self.low, self.high))
        return self._inside(_from_scale(low + (high - low) * share, self.drawn_in))

    def moved(self, value: float, distance: float) -> float:
        """A value perturbed. It is reflected at the bounds: clipped, a value at a bound would half the time stay.

        Where the distance is more than the range, the reflected value is clipped.
        """
        low, high = (_to_scale(bound, self.moved_in) for bound in (self.low, self.high))
        there = _to_scale(self._inside(value), self.moved_in) + distance
        there = 2 * high - there if there > high else 2 * low - there if there < low else there
        return self._inside(_from_scale(min(high, max(low, there)), self.moved_in))

    def _inside(self, value: float) -> float:
        return min(self.high, max(self.low, value))


def _to_scale(value: float, scale: Scale) -> float:
    if scale == "value":
        return value
    return math.log(value) if scale == "log" else math.log(value / (1 - value))


def _from_scale(value: float, scale: Scale) -> float:
    if scale == "value":
        return value
    return math.exp(value) if scale == "log" else 1 / (1 + math.exp(-value))


# ----------------------------------------------------------------------------------------------------------- the search


def first_points(settings: Settings, members: int) -> list[Point]:
    """What the members start with: a Latin hypercube, each axis cut into as many equal parts as there are members."""
    drawn = _random(settings, "first")
    points: list[Point] = [{} for _ in range(members)]
    for name, axis in settings.axes().items():
        parts = list(range(members))
        drawn.shuffle(parts)
        for point, part in zip(points, parts):
            point[name] = axis.at((part + drawn.random()) / members)
    return points


def next_segments(
    settings: Settings,
    generation: int,
    scores: Sequence[float | None],
    points: Sequence[Point],
    mode: Literal["min", "max"],
) -> list[tuple[int | None, Point]]:
    """For each member whose weights it goes on with, and what it trains with in the next stretch.

    The worst of a share copy one of the best of the same share, drawn evenly. A member without a (finite) score has
    failed: it is among the worst, copies also where there are more of its kind than the share, and is not copied. Where
    all have failed nobody copies.

    Args:
        generation: number of the next stretch; it and the seed alone decide what is drawn.
        scores: of the members' weights at the end of the last stretch.
        points: what they trained it with.

    Returns:
        (index of the member it copies, the new point), or (None, its own point) for a member that goes on.

    Raises:
        InputError: a copied point without a number for a searched parameter.
    """
    sign = 1 if mode == "min" else -1
    values = [math.inf if score is None or not math.isfinite(score) else sign * score for score in scores]
    ranking = sorted(range(len(values)), key=lambda member: values[member])  # of equal members the first is the better
    failed = values.count(math.inf)
    share = _copied(settings, len(values))
    top = ranking[: min(share, len(values) - failed)]
    bottom = ranking[len(values) - max(share, failed) :] if top else []

    drawn = _random(settings, str(generation))
    segments: list[tuple[int | None, Point]] = [(None, dict(point)) for point in points]
    for member in sorted(bottom):
        parent = drawn.choice(top)
        point = dict(points[parent])
        for name, axis in settings.axes().items():
            value = _number(point, name, f"member {parent + 1} of generation {generation}")
            resampled, position, up = drawn.random() < settings.resampled_share, drawn.random(), drawn.random() < 0.5
            point[name] = axis.at(position) if resampled else axis.moved(value, settings.step if up else -settings.step)
        segments[member] = parent, point
    return segments


def _copied(settings: Settings, members: int) -> int:
    """How many copy: one at least, and no more than half, so that no member is at the top and at the bottom."""
    return min(max(1, round(settings.copied_share * members)), members // 2)


def _random(settings: Settings, purpose: str) -> random.Random:
    return random.Random(f"population {settings.seed} {purpose}")


def _number(point: Point, name: str, where: str) -> float:
    value = point.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {name} must be a number, but it is {value!r}")
    return float(value)


# ----------------------------------------------------------------------------------------------------------- the winner


def last_winner(members: Mapping[str, TrialRecord], metric: str, mode: Literal["min", "max"]) -> TrialRecord | None:
    """The member with the best last report of a metric, of equal ones the first; None where none has one.

    The last one and not the best one: a line of descent explains the weights of the end. A member that failed, or whose
    last report of the metric is not finite, does not count.
    """
    scored = []
    for member in members.values():
        values = [report.metrics[metric] for report in member.reports if metric in report.metrics]
        if member.status != "failed" and values and math.isfinite(values[-1]):
            scored.append((values[-1], member))
    if not scored:
        return None
    choose = max if mode == "max" else min
    return choose(scored, key=lambda pair: pair[0])[1]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps that were trained with the same values."""

    first_step: int  # optimiser steps done before it
    last_step: int  # and after it
    beta: float
    eta: float | None  # None: not searched


def lineage(members: Mapping[str, TrialRecord], winner: str) -> list[Stretch]:
    """What trained the weights that a member ends with, from step 0 on, a stretch for each segment.

    Segment g of a member goes on from segment g - 1 of its parent, or else of its own.

    Raises:
        InputError: a history with a hole in it; the message names the member and the stretch.
    """
    name, segment = winner, _segment(members, winner, None)
    stretches: list[Stretch] = []
    while True:
        where = f"member '{name}', stretch {segment.number}"
        eta = _number(segment.point, ETA, where) if ETA in segment.point else None
        beta = _number(segment.point, BETA, where)
        if segment.last_step <= segment.first_step:
            raise InputError(f"{where}: must end behind step {segment.first_step}, but ends at {segment.last_step}")
        if stretches and (eta is None) != (stretches[0].eta is None):
            raise InputError(f"{where}: {ETA} is given in some stretches of the history only; give it in all or none")
        stretches.insert(0, Stretch(first_step=segment.first_step, last_step=segment.last_step, beta=beta, eta=eta))
        if segment.number == 0:
            if segment.parent is not None or segment.first_step != 0:
                start = f"at step {segment.first_step} from {segment.parent or 'its own weights'}"
                raise InputError(f"{where}: must start at step 0 from new weights, but starts {start}")
            return stretches
        name = name if segment.parent is None else segment.parent
        before = _segment(members, name, segment.number - 1)
        if before.last_step != segment.first_step:
            raise InputError(
                f"{where}: starts at step {segment.first_step}, but stretch {before.number} of '{name}', which it goes "
                f"on from, ends at step {before.last_step}"
            )
        segment = before


def _segment(members: Mapping[str, TrialRecord], name: str, number: int | None) -> Segment:
    """A member's segment of that number, or its last one.

    Raises:
        InputError: no such member, no such segment, or several.
    """
    segments = members[name].segments if name in members else []
    if number is None:
        number = max((segment.number for segment in segments), default=0)
    found = [segment for segment in segments if segment.number == number]
    if len(found) != 1:
        raise InputError(f"member '{name}', stretch {number}: must be in the history once, but is {len(found)} times")
    return found[0]


def schedule_of(stretches: Sequence[Stretch], total_steps: int) -> dict[str, Any]:
    """The values of a configuration's blend section that train as a line of descent did.

    Neighbouring stretches with the same value are one. Each change is a pair of knots 1 / `TICKS` apart around it, so
    that all stretches stay constant: of straight lines between knots these lose least. Knots farther inside would train
    with values that nobody tried; at the first and last quarters of stretches of equal length they would be off by an
    eighth of each change on average. Up to TICKS / 2 steps in all, each step gets exactly the value that it was trained
    with. Stretches shorter than 1 / TICKS of training may be lost.

    Args:
        stretches: as `lineage` gives them.
        total_steps: of the training that the fractions refer to; what lies behind it is left out.

    Returns:
        {"beta": a constant or piecewise section}, and where eta was searched {"eta": a number or a piecewise section}.
    """
    beta = _level_or_knots([(stretch.first_step, stretch.beta) for stretch in stretches], total_steps)
    schedule: dict[str, Any] = {"beta": beta if isinstance(beta, dict) else {"kind": "constant", "value": beta}}
    etas = [(stretch.first_step, stretch.eta) for stretch in stretches if stretch.eta is not None]
    if etas:
        schedule["eta"] = _level_or_knots(etas, total_steps)
    return schedule


def _level_or_knots(levels: Sequence[tuple[int, float]], total_steps: int) -> float | dict[str, Any]:
    """The value, or a piecewise section, of what changes at steps: [(first step, value), ...]."""
    ticks, values = [0], [levels[0][1]]
    for (_, before), (step, value) in itertools.pairwise(levels):
        left = step * TICKS // total_steps
        if value == before or left >= TICKS:
            continue
        if left > ticks[-1]:
            ticks.append(left)
            values.append(before)
        if left + 1 > ticks[-1]:
            ticks.append(left + 1)
            values.append(value)
        else:  # the stretch before lies within one tick
            values[-1] = value
    if len(set(values)) == 1:
        return values[0]
    return {"kind": "piecewise", "knots": [[tick / TICKS, value] for tick, value in zip(ticks, values)]}
