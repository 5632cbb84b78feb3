"""What is known of a trial: plain data that every part of a search shares, and that `tune.ledger` keeps on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Scalar = str | int | float | bool | None
Point = dict[str, Scalar]
"""What was drawn for a trial, {parameter: value}; a parameter that its trial does not have is absent (`tune.space`)."""

Status = Literal["waiting", "running", "finished", "stopped", "failed"]
"""waiting: drawn, not begun; running: begun and not ended, also where the search was killed; finished: trained to its
end; stopped: by the scheduler; failed: its reason says why."""
ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a trial reported after an evaluation of the validation part."""

    epoch: int
    step: int  # optimiser steps done
    seconds: float  # this trial has trained so far, all sessions together
    metrics: dict[str, float]  # val/..., and the last train/... and speed/...


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of training of one member of a population (`tune.population`)."""

    number: int  # of the stretch, from 0
    parent: str | None  # name of the member whose weights it starts from; None: from the member's own
    point: Point  # what it trains with
    first_step: int  # optimiser steps done before it
    last_step: int  # and after it


@dataclass(kw_only=True)
class TrialRecord:
    """One trial, or one member of a population."""

    number: int  # from 1
    name: str  # of its folder and its MLflow run
    point: Point
    status: Status = "waiting"
    reason: str = ""  # why it ended, for people
    reports: list[Report] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)  # of a member of a population
    config: dict[str, Any] = field(default_factory=dict)  # resolved and nested, as its config.yaml has it
    weights: int = 0  # trainable weights of the network
    flops: int = 0  # of a forward pass of one image (`mdnet_dist.cost`)
    run_id: str = ""  # MLflow's
    seconds: float = 0.0  # of wall clock, all sessions together, starts included

    def values(self, metric: str) -> list[float]:
        """All finite values of a metric, in the order of reports."""
        found = [report.metrics[metric] for report in self.reports if metric in report.metrics]
        return [value for value in found if math.isfinite(value)]

    def score(self, metric: str, mode: Literal["min", "max"]) -> float | None:
        """The best value of a metric; None where the trial failed, or never reported it."""
        values = [] if self.status == "failed" else self.values(metric)
        if not values:
            return None
        return max(values) if mode == "max" else min(values)


def best_trial(trials: list[TrialRecord], metric: str, mode: Literal["min", "max"]) -> TrialRecord | None:
    """The trial with the best score, of equal ones the first; None where none has one."""
    scored = [(score, trial) for trial in trials if (score := trial.score(metric, mode)) is not None]
    if not scored:
        return None
    choose = max if mode == "max" else min
    return choose(scored, key=lambda pair: pair[0])[1]


def shown(value: Scalar) -> str:
    """A drawn value as people read it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe(point: Mapping[str, Scalar]) -> str:
    """A point on one line: `blend.beta linear, blend.beta.linear.start 0.12`."""
    return ", ".join(f"{name} {shown(value)}" for name, value in point.items())
