"""beta, eta and learning rates as functions of the fraction of training done, so that they transfer between lengths."""

from __future__ import annotations

import math

from mdnet_dist.config import (
    BetaSchedule,
    ConstantBeta,
    CosineBeta,
    DelayedStepBeta,
    LinearBeta,
    PiecewiseBeta,
    PiecewiseEta,
    ScheduleConfig,
    SigmoidBeta,
)


def beta_at(schedule: BetaSchedule, fraction: float) -> float:
    """beta of Eq. 12, in 0..1, when `fraction` (0..1) of training is done."""
    match schedule:
        case ConstantBeta():
            return schedule.value
        case LinearBeta():
            progress = fraction
        case CosineBeta():
            progress = (1 - math.cos(math.pi * fraction)) / 2
        case SigmoidBeta():
            # The logistic function, as a tanh that no steepness overflows.
            progress = (1 + math.tanh(schedule.steepness * (fraction - schedule.midpoint) / 2)) / 2
        case DelayedStepBeta():
            progress = float(fraction >= schedule.at)
        case PiecewiseBeta():
            low, high, share = _between(schedule.knots, fraction)
            return low + (high - low) * share
    return schedule.start + (schedule.end - schedule.start) * progress


def eta_at(schedule: float | PiecewiseEta, fraction: float) -> float:
    """eta of Eq. 12 when `fraction` (0..1) of training is done; `balanced` is `EtaBalance`'s.

    Interpolated in log eta: eta is a factor, and a doubling is as much anywhere.
    """
    if not isinstance(schedule, PiecewiseEta):
        return float(schedule)
    low, high, share = _between(schedule.knots, fraction)
    return float(low ** (1 - share) * high**share)


def _between(knots: list[list[float]], fraction: float) -> tuple[float, float, float]:
    """The values of the knots left and right of a fraction and the share of the way between them that is done.

    Outside the knots both values are the nearest one's and the share is 0.
    """
    before = [knot for knot in knots if knot[0] <= fraction]
    after = [knot for knot in knots if knot[0] > fraction]
    if not before or not after:
        value = (after[0] if after else before[-1])[1]
        return value, value, 0.0
    (left, low), (right, high) = before[-1], after[0]
    return low, high, (fraction - left) / (right - left)


def learning_rate_factor(schedule: ScheduleConfig, fraction: float) -> float:
    """What a group's learning rate is multiplied by when `fraction` (0..1) of training is done."""
    if fraction < schedule.warmup:
        return fraction / schedule.warmup
    match schedule.kind:
        case "constant":
            return 1.0
        case "step":
            return schedule.factor ** sum(fraction >= milestone for milestone in schedule.milestones)
        case "cosine":
            progress = (fraction - schedule.warmup) / (1 - schedule.warmup) if schedule.warmup < 1 else 1.0
            return schedule.end + (1 - schedule.end) * (1 + math.cos(math.pi * progress)) / 2
