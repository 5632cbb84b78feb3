"""The one optimizer moves each part to the last bit as PyTorch's own would."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdnet_dist.config import (
    AdamGroup,
    AdamWConfig,
    OptimizerConfig,
    ScheduleConfig,
    SgdAdamConfig,
    SgdConfig,
    SgdGroup,
)
from mdnet_dist.optimizer import PartOptimizer
from tests.networks import gradient_of, one_thread  # noqa: F401 (one_thread is a fixture)

CONSTANT = ScheduleConfig(kind="constant", warmup=0.0)
SGD_ADAM = SgdAdamConfig(
    image=SgdGroup(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, schedule=CONSTANT),
    head=AdamGroup(lr=2e-3, betas=[0.8, 0.99], eps=1e-6, weight_decay=0.01, schedule=CONSTANT),
    language=AdamGroup(lr=4e-3, schedule=CONSTANT),
)
ADAMW = AdamWConfig(
    kind="adamw",
    image=AdamGroup(lr=1e-3, weight_decay=0.05, schedule=CONSTANT),
    head=AdamGroup(lr=2e-3, schedule=CONSTANT),
    language=AdamGroup(lr=4e-3, betas=[0.5, 0.9], schedule=CONSTANT),
)

SGD = SgdConfig(
    kind="sgd",
    image=SgdGroup(lr=0.1, weight_decay=5e-4, schedule=CONSTANT),
    head=SgdGroup(lr=0.2, momentum=0.5, weight_decay=0.0, schedule=CONSTANT),
    language=SgdGroup(lr=0.01, momentum=0.0, nesterov=False, schedule=CONSTANT),
)


def random_parts(seed: int = 0) -> dict[str, list[nn.Parameter]]:
    torch.manual_seed(seed)
    shapes = {"image": [(3, 4, 5), (7,)], "head": [(2, 3), (2,)], "language": [(11, 3), (), (5,)]}
    return {name: [nn.Parameter(torch.randn(shape)) for shape in shapes[name]] for name in shapes}


def set_gradients(parts: dict[str, list[nn.Parameter]], step: int) -> None:
    """Gradients of very different sizes, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    for weights in parts.values():
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator) * 10 ** float(
                torch.randint(-4, 2, (), generator=generator)
            )


def own_optimizers(
    parts: dict[str, list[nn.Parameter]], config: OptimizerConfig, *, fused: bool
) -> list[torch.optim.Optimizer]:
    """PyTorch's optimizers, one for each part."""
    made: list[torch.optim.Optimizer] = []
    for name, weights in parts.items():
        group = getattr(config, name)
        if isinstance(group, SgdGroup):
            options: dict[str, Any] = {"momentum": group.momentum, "nesterov": group.nesterov, "fused": fused}
            made.append(torch.optim.SGD(weights, lr=group.lr, weight_decay=group.weight_decay, **options))
        else:
            options = {"betas": tuple(group.betas), "eps": group.eps, "fused": fused}
            made.append(torch.optim.AdamW(weights, lr=group.lr, weight_decay=group.weight_decay, **options))
    return made


def flat(parts: dict[str, list[nn.Parameter]]) -> list[Tensor]:
    return [weight.detach().clone() for weights in parts.values() for weight in weights]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        SGD_ADAM,
        ADAMW,
        SGD,
        SGD_ADAM.model_copy(update={"image": SGD_ADAM.image.model_copy(update={"nesterov": False})}),
        SGD_ADAM.model_copy(update={"image": SGD_ADAM.image.model_copy(update={"momentum": 0.0, "nesterov": False})}),
    ],
    ids=["sgd_adam", "adamw", "sgd", "sgd without nesterov", "sgd without momentum"],
)
def test_every_part_moves_as_torch_moves_it(config: OptimizerConfig) -> None:
    """Bit for bit as by PyTorch's fused functions, and but for rounding as by its plain ones."""
    ours, theirs, plain = random_parts(), random_parts(), random_parts()
    optimizer = PartOptimizer(ours, config)
    references = [*own_optimizers(theirs, config, fused=True), *own_optimizers(plain, config, fused=False)]
    optimizer.schedule(0.3)
    for step in range(8):
        before = flat(ours)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        set_gradients(plain, step)
        optimizer.step()
        for reference in references:
            reference.step()
        assert optimizer.moved
        assert not any(torch.equal(a, b) for a, b in zip(before, flat(ours), strict=True))
        assert equal(flat(ours), flat(theirs)), f"after step {step}"
        for one, other in zip(flat(ours), flat(plain), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


def test_rates_follow_each_parts_own_schedule() -> None:
    config = SgdAdamConfig(
        image=SgdGroup(lr=1.0, schedule=ScheduleConfig(kind="cosine", warmup=0.2, end=0.1)),
        head=AdamGroup(lr=1.0, schedule=ScheduleConfig(kind="step", warmup=0.0, milestones=[0.5, 0.7], factor=0.1)),
        language=AdamGroup(lr=2.0, schedule=CONSTANT),
    )
    optimizer = PartOptimizer(random_parts(), config)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0]
    expected = {
        0.1: (0.5, 1.0, 2.0),
        0.2: (1.0, 1.0, 2.0),
        0.6: (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2, 0.1, 2.0),
        0.8: (0.1 + 0.9 * (1 + math.cos(math.pi * 0.75)) / 2, 0.01, 2.0),
        1.0: (0.1, 0.01, 2.0),
    }
    for fraction, rates in expected.items():
        optimizer.schedule(fraction)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0, 0.0]


def test_a_weight_without_a_gradient_stays() -> None:
    parts = random_parts()
    optimizer = PartOptimizer(parts, SGD_ADAM)
    optimizer.schedule(0.5)
    set_gradients(parts, 0)
    for weight in (*parts["head"], parts["language"][1]):
        weight.grad = None
    before = {id(weight): weight.detach().clone() for weights in parts.values() for weight in weights}
    optimizer.step()
    stayed = [torch.equal(before[id(weight)], weight.detach()) for weights in parts.values() for weight in weights]
    assert stayed == [False, False, True, True, False, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["image", "head", "language"])
def test_one_gradient_that_is_not_finite_keeps_all_weights_and_the_state(part: str, value: float) -> None:
    parts = random_parts()
    optimizer = PartOptimizer(parts, SGD_ADAM)
    optimizer.schedule(0.5)
    set_gradients(parts, 0)
    optimizer.step()
    weights, state = flat(parts), copy.deepcopy(optimizer.state_dict())
    set_gradients(parts, 1)
    gradient_of(parts[part][0]).flatten()[1] = value
    optimizer.step()
    assert not optimizer.moved
    assert equal(flat(parts), weights)
    for key, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[name], state["state"][key][name]) for name in values)
    # The step after it is what it would have been.
    set_gradients(parts, 2)
    optimizer.step()
    undisturbed = random_parts()
    other = PartOptimizer(undisturbed, SGD_ADAM)
    other.schedule(0.5)
    for step in (0, 2):
        set_gradients(undisturbed, step)
        other.step()
    assert optimizer.moved and equal(flat(parts), flat(undisturbed))


def test_a_step_can_be_skipped() -> None:
    parts = random_parts()
    optimizer = PartOptimizer(parts, SGD_ADAM)
    optimizer.schedule(0.5)
    set_gradients(parts, 0)
    weights = flat(parts)
    optimizer.next_moves = torch.tensor(False)
    optimizer.step()
    assert not optimizer.moved and equal(flat(parts), weights)
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("config", [SGD_ADAM, ADAMW, SGD], ids=["sgd_adam", "adamw", "sgd"])
def test_state_taken_over_continues_bit_for_bit(config: OptimizerConfig) -> None:
    """What a checkpoint holds: the state tensors of a weight's shape, and one count of updates for all."""
    parts, later = random_parts(), random_parts(1)
    first, second = PartOptimizer(parts, config), PartOptimizer(later, config)
    for step in range(3):
        first.schedule(0.5)
        set_gradients(parts, step)
        first.step()
    for group, other_group in zip(first.param_groups, second.param_groups, strict=True):
        for weight, other in zip(group["params"], other_group["params"], strict=True):
            other.data.copy_(weight.data)
            state = second.state_of(other, group["rule"])
            for key, value in state.items():
                if key != "step":
                    value.copy_(first.state[weight][key])
    second.set_updates(3)
    second.schedule(0.5)
    set_gradients(parts, 3)
    set_gradients(later, 3)
    first.step()
    second.step()
    assert equal(flat(parts), flat(later))
