"""beta, eta and learning rates as functions of the fraction of training done, so that they transfer between lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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


class EtaBalance:
    """`eta: balanced`: the running ratio of the norms of dL_M and dL_L where they enter D.

    With it both losses weigh alike on theta_D at beta = 1/2. Every rank sees the same norms, those of the whole global
    batch, and so computes the same eta. The norms stay on the device that measured them: a GPU need not be waited for.
    """

    LARGEST = 1e4

    def __init__(self, memory: float) -> None:
        """Args: memory: share of the running norms that one step keeps."""
        self.memory = memory
        self._norms = torch.zeros(2, dtype=torch.float64)

    @property
    def norms(self) -> list[float]:
        """The running norms, of dL_M and of dL_L."""
        return [float(norm) for norm in self._norms]

    @norms.setter
    def norms(self, values: Sequence[float]) -> None:
        self._norms = torch.tensor(values, dtype=torch.float64)

    @property
    def eta(self) -> Tensor:
        """The factor for the coming step, (); 1 before anything was measured."""
        norm_m, norm_l = self._norms
        ratio = (norm_m / norm_l).clamp(1 / self.LARGEST, self.LARGEST)
        return torch.where((norm_m == 0) | (norm_l == 0), 1.0, ratio)

    def update(self, norms: Tensor) -> None:
        """Take in the norms (2) that a step measured; what is not finite is not taken in."""
        norms = norms.double()
        kept = self.memory * self._norms.to(norms.device) + (1 - self.memory) * norms
        self._norms = torch.where(norms.isfinite().all(), kept, self._norms.to(norms.device))
