"""One number or label that a search varies: its range, its values on a grid, and who chooses among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from tune.records import Scalar

Kind = Literal["choice", "uniform", "log_uniform", "integers"]
KINDS: tuple[Kind, ...] = ("choice", "uniform", "log_uniform", "integers")
Path = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One number or label that a search varies."""

    name: str
    kind: Kind
    path: Path  # where its distribution stands below the space; path[0] is the key of the configuration
    places: tuple[Path, ...] = ()  # and where its options or its two bounds stand
    labels: tuple[Scalar, ...] = ()  # of a choice
    low: float = 0  # of a range; whole numbers where the kind is integers
    high: float = 0
    step: float | None = None
    parent: tuple[str, Scalar] | None = None  # the choice, and the label of it, with which this one exists

    def choose(self, chooser: Chooser) -> Scalar:
        """A value."""
        if self.kind == "choice":
            return chooser.category(self.name, self.labels)
        if self.kind == "integers":
            return chooser.integer(self.name, int(self.low), int(self.high), int(self.step or 1))
        return chooser.real(self.name, self.low, self.high, self.kind == "log_uniform", self.step)

    def problem(self, value: Scalar) -> str:
        """Why this cannot be a value of it; empty where it can."""
        if self.kind == "choice":
            if any(value == label and type(value) is type(label) for label in self.labels):
                return ""
            return f"must be one of {', '.join(map(str, self.labels))}"
        wanted = int if self.kind == "integers" else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool) or not self.low <= value <= self.high:
            number = "a whole number" if self.kind == "integers" else "a number"
            return f"must be {number} from {self.low:g} to {self.high:g}"
        if self.step and not divides(self.step, value - self.low):
            return f"must be {self.low:g} plus a multiple of {self.step:g}"
        return ""

    def ends(self) -> list[Scalar]:
        """Its labels, or both ends of its range."""
        return list(self.labels) if self.kind == "choice" else [self.low, self.high]

    def count(self, points: int) -> int:
        """How many values a grid has of it."""
        if self.kind == "choice":
            return len(self.labels)
        if self.step:
            return steps_in(self.low, self.high, self.step) + 1
        return min(points, int(self.high - self.low) + 1) if self.kind == "integers" else points

    def grid(self, points: int) -> list[Scalar]:
        """Those values: labels, steps, or so many evenly spaced ones with both ends."""
        if self.kind == "choice":
            return list(self.labels)
        last = self.count(points) - 1
        if self.kind == "integers":
            low, width, step = int(self.low), int(self.high - self.low), int(self.step or 0)
            return [low + (step * index if step else round(width * index / last)) for index in range(last + 1)]
        if self.step:
            return [at_step(self.low, self.high, self.step, index) for index in range(last + 1)]
        log = self.kind == "log_uniform"
        return [between(self.low, self.high, index / last, log=log) for index in range(last + 1)]


def divides(step: float, width: float) -> bool:
    """Whether so wide a range is made of whole steps, up to what floating point loses."""
    if isinstance(step, int) and isinstance(width, int):
        return width % step == 0
    return abs(width / step - round(width / step)) <= 1e-6


class Chooser(Protocol):
    """Picks the value of one parameter after another."""

    def category(self, name: str, labels: Sequence[Scalar]) -> Scalar:
        """One of the labels."""

    def real(self, name: str, low: float, high: float, log: bool, step: float | None) -> float:
        """A number from low to high; with a step, low plus a multiple of it."""

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        """A whole number from low to high, low plus a multiple of the step."""


class RandomChooser:
    """Independent uniform draws; log_uniform's are uniform in the logarithm."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def category(self, name: str, labels: Sequence[Scalar]) -> Scalar:
        """One of the labels, each as likely."""
        return labels[int(self.generator.integers(len(labels)))]

    def real(self, name: str, low: float, high: float, log: bool, step: float | None) -> float:
        """A number from low to high."""
        if step is not None:
            return at_step(low, high, step, int(self.generator.integers(steps_in(low, high, step) + 1)))
        return between(low, high, float(self.generator.random()), log=log)

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        """A whole number from low to high."""
        return low + step * int(self.generator.integers((high - low) // step + 1))


def between(low: float, high: float, fraction: float, *, log: bool = False) -> float:
    """The number at a fraction (0..1) of the way from low to high; both ends are exact."""
    if fraction in (0.0, 1.0):
        return high if fraction else low
    if log:
        value = math.exp(math.log(low) + (math.log(high) - math.log(low)) * fraction)
    else:
        value = low + (high - low) * fraction
    return min(high, max(low, value))


def steps_in(low: float, high: float, step: float) -> int:
    """How many steps lead from low to high."""
    return round((high - low) / step)


def at_step(low: float, high: float, step: float, index: int) -> float:
    """The number so many steps above low, without what floating point adds: 0.3, not 0.30000000000000004."""
    if index == steps_in(low, high, step):
        return high
    value = low + step * index
    short = float(f"{value:.12g}")
    return short if abs(short - value) < 1e-6 * step else value
