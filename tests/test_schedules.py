"""beta, learning rates and eta as functions of the fraction of training done."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mdnet_dist.checkpoint import Progress, read_progress, save_checkpoint
from mdnet_dist.config import (
    BetaSchedule,
    ConstantBeta,
    CosineBeta,
    DelayedStepBeta,
    LinearBeta,
    PiecewiseBeta,
    PiecewiseEta,
    RunConfig,
    ScheduleConfig,
    SigmoidBeta,
)
from mdnet_dist.eta_balance import EtaBalance
from mdnet_dist.schedules import beta_at, eta_at, learning_rate_factor
from mdnet_dist.trainer import Trainer

FRACTIONS = st.floats(0, 1)
ENDS = {"start": FRACTIONS, "end": FRACTIONS}


def knots_at(fractions: list[float], values: list[float]) -> list[list[float]]:
    return [list(knot) for knot in zip(sorted(set(fractions)), values)]


RISING_OR_FALLING = st.one_of(
    st.builds(ConstantBeta, kind=st.just("constant"), value=FRACTIONS),
    st.builds(LinearBeta, kind=st.just("linear"), **ENDS),
    st.builds(CosineBeta, kind=st.just("cosine"), **ENDS),
    st.builds(
        SigmoidBeta,
        kind=st.just("sigmoid"),
        midpoint=FRACTIONS,
        steepness=st.floats(0, 1e300, exclude_min=True),
        **ENDS,
    ),
    st.builds(DelayedStepBeta, kind=st.just("delayed_step"), at=FRACTIONS, **ENDS),
)
PIECEWISE = st.builds(
    PiecewiseBeta,
    kind=st.just("piecewise"),
    knots=st.builds(knots_at, st.lists(FRACTIONS, min_size=1, max_size=6), st.lists(FRACTIONS, min_size=6, max_size=6)),
)
STEEP = SigmoidBeta(kind="sigmoid", start=0, end=1, midpoint=1, steepness=1e300)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (ConstantBeta(kind="constant", value=0.3), {0: 0.3, 0.4: 0.3, 1: 0.3}),
        (LinearBeta(kind="linear", start=0.2, end=0.8), {0: 0.2, 0.25: 0.35, 0.5: 0.5, 1: 0.8}),
        (LinearBeta(kind="linear", start=0.8, end=0.2), {0: 0.8, 0.25: 0.65, 1: 0.2}),
        (CosineBeta(kind="cosine", start=0, end=1), {0: 0, 1 / 3: 0.25, 0.5: 0.5, 2 / 3: 0.75, 1: 1}),
        (
            SigmoidBeta(kind="sigmoid", start=0.1, end=0.9, midpoint=0.4, steepness=10),
            {0.4: 0.5, 0.4 + math.log(3) / 10: 0.7, 0.4 - math.log(3) / 10: 0.3, 1: 0.1 + 0.8 / (1 + math.exp(-6))},
        ),
        (STEEP, {0: 0, 0.999: 0, 1: 0.5}),
        (DelayedStepBeta(kind="delayed_step", start=0.1, end=0.9, at=0.5), {0: 0.1, 0.4999: 0.1, 0.5: 0.9, 1: 0.9}),
        (DelayedStepBeta(kind="delayed_step", start=0.1, end=0.9, at=0), {0: 0.9, 1: 0.9}),
        (
            PiecewiseBeta(kind="piecewise", knots=[[0.2, 0.4], [0.4, 1], [0.8, 0]]),
            {0: 0.4, 0.1: 0.4, 0.2: 0.4, 0.3: 0.7, 0.4: 1, 0.5: 0.75, 0.6: 0.5, 0.8: 0, 1: 0},
        ),
        (PiecewiseBeta(kind="piecewise", knots=[[0.5, 0.25]]), {0: 0.25, 0.5: 0.25, 1: 0.25}),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_beta_at_known_points(schedule: BetaSchedule, points: dict[float, float]) -> None:
    for fraction, beta in points.items():
        assert beta_at(schedule, fraction) == pytest.approx(beta, abs=1e-12)


@given(st.one_of(RISING_OR_FALLING, PIECEWISE), FRACTIONS)
@example(STEEP, 0.0)
@example(PiecewiseBeta(kind="piecewise", knots=[[0, 0.3], [5e-324, 1], [1, 0]]), 0.5)
def test_beta_stays_between_0_and_1(schedule: BetaSchedule, fraction: float) -> None:
    assert 0 <= beta_at(schedule, fraction) <= 1


@given(RISING_OR_FALLING, st.lists(FRACTIONS, min_size=2, max_size=10))
def test_beta_goes_one_way_from_start_to_end(schedule: BetaSchedule, fractions: list[float]) -> None:
    betas = [beta_at(schedule, fraction) for fraction in sorted(fractions)]
    if isinstance(schedule, ConstantBeta):
        assert set(betas) == {schedule.value}
        return
    assert not isinstance(schedule, PiecewiseBeta)
    assert betas == sorted(betas, reverse=schedule.end < schedule.start)
    low, high = sorted((schedule.start, schedule.end))
    assert all(low - 1e-15 <= beta <= high + 1e-15 for beta in betas)


@given(PIECEWISE)
def test_piecewise_goes_through_its_knots(schedule: PiecewiseBeta) -> None:
    for fraction, beta in schedule.knots:
        assert beta_at(schedule, fraction) == pytest.approx(beta, abs=1e-15)


@given(PIECEWISE, FRACTIONS)
def test_piecewise_stays_between_neighbouring_knots(schedule: PiecewiseBeta, fraction: float) -> None:
    knots = schedule.knots
    left = [beta for at, beta in knots if at <= fraction][-1:]
    right = [beta for at, beta in knots if at >= fraction][:1]
    assert min(left + right) - 1e-12 <= beta_at(schedule, fraction) <= max(left + right) + 1e-12


# ------------------------------------------------------------------------------------------------------- learning rates


def test_warm_up_rises_linearly_from_0() -> None:
    schedule = ScheduleConfig(kind="constant", warmup=0.2)
    assert [learning_rate_factor(schedule, fraction) for fraction in (0, 0.05, 0.1, 0.2, 0.7, 1)] == pytest.approx(
        [0, 0.25, 0.5, 1, 1, 1]
    )


@given(FRACTIONS, FRACTIONS, st.floats(0, 0.99))
def test_cosine_is_its_closed_form(fraction: float, end: float, warmup: float) -> None:
    factor = learning_rate_factor(ScheduleConfig(kind="cosine", end=end, warmup=warmup), fraction)
    if fraction < warmup:
        assert factor == pytest.approx(fraction / warmup)
    else:
        # half the angle instead of the whole: cos^2(x / 2) = (1 + cos x) / 2
        half = math.pi / 2 * (fraction - warmup) / (1 - warmup)
        assert factor == pytest.approx(end + (1 - end) * math.cos(half) ** 2, abs=1e-12)
    assert 0 <= factor <= 1


def test_cosine_starts_whole_and_ends_at_its_end() -> None:
    schedule = ScheduleConfig(kind="cosine", end=0.1, warmup=0.1)
    assert learning_rate_factor(schedule, 0.1) == 1
    assert learning_rate_factor(schedule, 0.55) == pytest.approx(0.55)
    assert learning_rate_factor(schedule, 1) == pytest.approx(0.1)
    assert learning_rate_factor(ScheduleConfig(kind="cosine", end=0.1, warmup=1), 1) == pytest.approx(0.1)
    assert learning_rate_factor(ScheduleConfig(kind="cosine", warmup=0), 0) == 1


def test_steps_multiply_at_each_milestone() -> None:
    """EcNet's: divided by 5 at 60, 120 and 160 of 200 epochs."""
    schedule = ScheduleConfig(kind="step", warmup=0, milestones=[0.3, 0.6, 0.8], factor=0.2)
    factors = [learning_rate_factor(schedule, epoch / 200) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert factors == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])


@given(st.sampled_from(["cosine", "step", "constant"]), FRACTIONS, st.lists(FRACTIONS, min_size=2, max_size=10))
def test_rates_fall_once_warm(kind: str, warmup: float, fractions: list[float]) -> None:
    schedule = ScheduleConfig(kind=kind, warmup=warmup)  # type: ignore[arg-type]
    warm = [learning_rate_factor(schedule, fraction) for fraction in sorted(fractions) if fraction >= warmup]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(warm))


# ------------------------------------------------------------------------------------------------------------------ eta

ETAS = st.floats(1e-6, 1e6)
PIECEWISE_ETA = st.builds(
    PiecewiseEta,
    kind=st.just("piecewise"),
    knots=st.builds(knots_at, st.lists(FRACTIONS, min_size=1, max_size=6), st.lists(ETAS, min_size=6, max_size=6)),
)


@given(ETAS, FRACTIONS)
def test_a_number_is_eta_throughout(eta: float, fraction: float) -> None:
    assert eta_at(eta, fraction) == eta


def test_eta_at_known_points() -> None:
    schedule = PiecewiseEta(kind="piecewise", knots=[[0.2, 1], [0.4, 4], [0.8, 0.25]])
    points = {0: 1, 0.2: 1, 0.3: 2, 0.25: math.sqrt(2), 0.4: 4, 0.5: 2, 0.6: 1, 0.7: 0.5, 0.8: 0.25, 1: 0.25}
    for fraction, eta in points.items():
        assert eta_at(schedule, fraction) == pytest.approx(eta, rel=1e-12)
    assert eta_at(PiecewiseEta(kind="piecewise", knots=[[0.5, 3]]), 0.9) == 3.0


@given(PIECEWISE_ETA, FRACTIONS)
def test_log_eta_is_piecewise_straight(schedule: PiecewiseEta, fraction: float) -> None:
    """The same as beta's interpolation, of logarithms squeezed into 0..1."""
    reach = math.log(1e6)
    squeezed = [[at, min(1.0, max(0.0, (math.log(eta) / reach + 1) / 2))] for at, eta in schedule.knots]
    level = beta_at(PiecewiseBeta(kind="piecewise", knots=squeezed), fraction)
    assert math.log(eta_at(schedule, fraction)) == pytest.approx((2 * level - 1) * reach, abs=1e-9)


@given(PIECEWISE_ETA)
def test_eta_goes_through_its_knots(schedule: PiecewiseEta) -> None:
    for fraction, eta in schedule.knots:
        assert eta_at(schedule, fraction) == eta
    assert eta_at(schedule, 0) == schedule.knots[0][1]
    assert eta_at(schedule, 1) == schedule.knots[-1][1]


def test_the_trainer_asks_in_the_middle_of_each_step() -> None:
    values = {
        "name": "a",
        "data": {"shards": "set"},
        "blend": {"eta": {"kind": "piecewise", "knots": [[0, 1], [1, 16]]}},
    }
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.steps, trainer.eta = RunConfig.model_validate(values), 2, EtaBalance(0.9)
    trainer.eta.update(torch.tensor([3.0, 1.0], dtype=torch.float64))
    for trainer.step, eta in ((0, 2.0), (1, 8.0)):
        assert float(trainer.current_eta) == pytest.approx(eta)
    for given_eta, eta in (("balanced", 3.0), (5.0, 5.0)):
        trainer.config = RunConfig.model_validate({**values, "blend": {"eta": given_eta}})
        assert float(trainer.current_eta) == pytest.approx(eta)


NORMS = st.floats(0.02, 100)  # the clamp is far


def test_eta_is_1_before_anything_was_measured() -> None:
    assert EtaBalance(0.9).eta == 1


@given(NORMS, NORMS, st.floats(0, 0.999))
def test_eta_of_steady_norms_is_their_ratio_from_the_first_step(norm_m: float, norm_l: float, memory: float) -> None:
    """Both running norms start at 0 and so carry the same bias, which the ratio is free of."""
    balance = EtaBalance(memory)
    for _ in range(3):
        balance.update(torch.tensor([norm_m, norm_l], dtype=torch.float64))
        assert float(balance.eta) == pytest.approx(norm_m / norm_l, rel=1e-9)


@given(NORMS, NORMS)
def test_at_beta_one_half_both_losses_weigh_alike(norm_m: float, norm_l: float) -> None:
    balance = EtaBalance(0.98)
    balance.update(torch.tensor([norm_m, norm_l], dtype=torch.float64))
    beta = 0.5
    assert (1 - beta) * norm_m == pytest.approx(beta * float(balance.eta) * norm_l, rel=1e-9)


def test_eta_follows_a_change_at_the_pace_of_its_memory() -> None:
    balance = EtaBalance(0.9)
    for _ in range(200):
        balance.update(torch.tensor([2.0, 1.0], dtype=torch.float64))
    for step in range(1, 51):
        balance.update(torch.tensor([4.0, 1.0], dtype=torch.float64))
        assert float(balance.eta) == pytest.approx(4 - 2 * 0.9**step, rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1e300), st.floats(0, 1e300)), max_size=20), st.floats(0, 0.999))
def test_eta_is_clamped_whatever_was_measured(norms: list[tuple[float, float]], memory: float) -> None:
    balance = EtaBalance(memory)
    for norm_m, norm_l in norms:
        balance.update(torch.tensor([norm_m, norm_l], dtype=torch.float64))
    assert 1 / EtaBalance.LARGEST <= balance.eta <= EtaBalance.LARGEST
    assert balance.eta.isfinite()


def test_eta_continues_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, first = EtaBalance(0.97), EtaBalance(0.97)
    for step in range(20):
        whole.update(torch.tensor([1 / (step + 1), step / 7], dtype=torch.float64))
        first.update(torch.tensor([1 / (step + 1), step / 7], dtype=torch.float64))
    progress = Progress(
        step=20,
        updates=20,
        bad_steps=0,
        eta_norms=first.norms,
        epoch_end_due=False,
        sequence={},
        score=None,
        best_score=None,
    )
    second = EtaBalance(0.97)
    second.norms = read_progress(save_checkpoint(tmp_path, progress, {}, {})).eta_norms
    for step in range(20, 40):
        whole.update(torch.tensor([1 / (step + 1), step / 7], dtype=torch.float64))
        second.update(torch.tensor([1 / (step + 1), step / 7], dtype=torch.float64))
        assert whole.eta == second.eta
