"""What can be said of trials from their records alone: parameters and options, what a step costs, beta's schedule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from mdnet_dist.config import (
    BetaSchedule,
    ConstantBeta,
    CosineBeta,
    DelayedStepBeta,
    LinearBeta,
    PiecewiseBeta,
    SigmoidBeta,
)
from mdnet_dist.config_check import first_problem
from mdnet_dist.errors import InputError
from tune.records import Scalar, TrialRecord, shown

Mode = Literal["min", "max"]
_ADAPTER: TypeAdapter[BetaSchedule] = TypeAdapter(BetaSchedule)


def parameters_of(trials: Sequence[TrialRecord]) -> list[str]:
    """The parameters of any trial, as points first name them, but those of an option behind their choice."""
    found = list(dict.fromkeys(name for trial in trials for name in trial.point))
    place = {name: number for number, name in enumerate(found)}

    def order(name: str) -> tuple[int, ...]:
        parts = name.split(".")
        above = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        family = next(start for start in above if start in place)
        option = ".".join(parts[: family.count(".") + 2])  # blend.beta.linear, of all that begins so the first place
        return place[family], min(place[n] for n in found if f"{n}.".startswith(f"{option}.")), place[name]

    return sorted(found, key=order)


def is_choice(parameter: str, trials: Sequence[TrialRecord]) -> bool:
    """Whether a parameter takes options, not numbers; concat_depth always does, because `full` is no number."""
    values = [trial.point[parameter] for trial in trials if parameter in trial.point]
    return parameter.endswith("concat_depth") or not all(is_number(value) for value in values)


def options_of(parameter: str, trials: Sequence[TrialRecord]) -> list[str]:
    """Labels of the options that trials drew: numbers rising, then words."""
    values = {shown(trial.point[parameter]): trial.point[parameter] for trial in trials if parameter in trial.point}
    return sorted(values, key=lambda label: (not is_number(values[label]), as_number(values[label]), label))


def seconds_per_step(trial: TrialRecord) -> float | None:
    """Seconds of an optimiser step, the median over reports; None where it reported no speed."""
    batch = inside(trial.config, "train", "global_batch")
    speeds = [speed for speed in trial.values("speed/images_per_second") if speed > 0]
    return statistics.median(batch / speed for speed in speeds) if speeds and batch else None


def depth_of(trial: TrialRecord) -> str | None:
    """Its concat_depth as a label; None where its configuration has none."""
    depth = inside(trial.config, "model", "image", "concat_depth")
    return None if depth is None else str(depth)


def schedule_of(trial: TrialRecord) -> BetaSchedule | None:
    """beta's schedule; None where its configuration has none. Raises: InputError: it is no schedule."""
    beta = inside(trial.config, "blend", "beta")
    return None if beta is None else read_schedule(beta)


def read_schedule(beta: Mapping[str, Any]) -> BetaSchedule:
    """A schedule from `blend.beta` of a configuration. Raises: InputError: it is none."""
    try:
        return _ADAPTER.validate_python(beta)
    except ValidationError as error:
        raise InputError(f"blend.beta {beta}: {first_problem(error)}") from error


def describe_schedule(beta: Mapping[str, Any]) -> str:
    """A schedule in words, as `linear 0.12 -> 0.83`. Raises: InputError: it is none."""
    schedule = read_schedule(beta)
    match schedule:
        case ConstantBeta():
            return f"constant {schedule.value:.3g}"
        case PiecewiseBeta():
            return _describe_knots(schedule.knots)
    ends = f"{schedule.start:.3g} -> {schedule.end:.3g}"
    match schedule:
        case LinearBeta() | CosineBeta():
            return f"{schedule.kind} {ends}"
        case SigmoidBeta():
            return f"sigmoid {ends} around {schedule.midpoint:.3g}, steepness {schedule.steepness:.3g}"
        case DelayedStepBeta():
            return f"delayed step {ends} at {schedule.at:.3g}"


def describe_eta(eta: Scalar | Mapping[str, Any]) -> str:
    """`balanced`, a number, or what eta is at which fractions of training."""
    return _describe_knots(eta["knots"]) if isinstance(eta, Mapping) else shown(eta)


def _describe_knots(knots: Sequence[Sequence[float]]) -> str:
    return "piecewise " + ", ".join(f"{value:.3g} at {fraction:.3g}" for fraction, value in knots)


def counted(number: int, what: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def inside(config: Mapping[str, Any], *keys: str) -> Any:
    """What stands at a place of a nested configuration; None where there is none."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def is_number(value: Scalar) -> bool:
    """True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_number(value: Scalar) -> float:
    """A number as float; of words infinity, so that they sort behind."""
    return float(value) if isinstance(value, (int, float)) else math.inf
