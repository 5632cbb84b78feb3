"""Times of a few things side by side: in turn, warm-up left out, the device waited for, medians with their spread.

Machines are shared and clocks drift. What is to be compared therefore runs in turn, A B A B, and a ratio is the median
of the ratios of neighbours, which a slow minute does not touch.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of repeated measurements of one number."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, median, high = statistics.quantiles([*values, values[0]][: max(2, len(values))], n=4, method="inclusive")
        return cls(median=median, low=low, high=high, count=len(values))

    def __rtruediv__(self, work: float) -> Spread:
        """A rate: so much work in each of these times."""
        return Spread(median=work / self.median, low=work / self.high, high=work / self.low, count=self.count)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of things that ran in turn, a list for each, all as long."""

    seconds: dict[str, list[float]]

    def of(self, name: str) -> Spread:
        """Seconds of one of them."""
        return Spread.of(self.seconds[name])

    def ratio(self, above: str, below: str) -> Spread:
        """Seconds of one by those of another, of neighbours in time: how many times faster `below` is."""
        return Spread.of([a / b for a, b in zip(self.seconds[above], self.seconds[below])])


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    things: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    warm_up: int = 2,
    rounds: int = 8,
    at_least_seconds: float = 0.0,
    most_rounds: int = 200,
) -> Times:
    """Time each of some things once a round, round after round.

    Args:
        warm_up: rounds that are not counted: caches fill, kernels are chosen, clocks rise.
        rounds: that are counted; more until `at_least_seconds` have passed, up to `most_rounds`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in things}
    collects = gc.isenabled()
    gc.disable()  # a collection belongs to nobody
    try:
        counted_from = 0.0
        number = -warm_up
        while number < rounds or (number < most_rounds and time.perf_counter() - counted_from < at_least_seconds):
            if number == 0:
                counted_from = time.perf_counter()
            gc.collect(0)
            for name, thing in things.items():
                wait_for(device)
                started = time.perf_counter()
                thing()
                wait_for(device)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - started)
            number += 1
    finally:
        if collects:
            gc.enable()
    return Times(seconds=seconds)
