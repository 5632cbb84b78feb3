"""Weights and FLOPs against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdnet_dist.config import CifarImageModel, LanguageModelConfig, MedicalImageModel, ModelConfig
from mdnet_dist.cost import as_flops, cost_of
from mdnet_dist.model.mdnet import MDNet


def cifar(depth: int, widening: int, concat_depth: Any) -> ModelConfig:
    return ModelConfig(image=CifarImageModel(depth=depth, widening=widening, concat_depth=concat_depth))


def flops_by_hand(depth: int, k: int, concat_depth: Any, classes: int, side: int = 32) -> int:
    """2 x (channels in) x (kernel area) x (channels out) x (positions), convolution by convolution."""

    def convolution(channels_in: int, channels_out: int, kernel: int, positions: int) -> int:
        return 2 * channels_in * kernel * kernel * channels_out * positions

    total, width, units = convolution(3, 16, 3, side * side), 16, (depth - 2) // 9
    for nout, stride in ((16 * k, 1), (32 * k, 2), (32 * k, 2)):
        side //= stride
        for unit in range(units):
            concatenates = concat_depth == "full" or unit < concat_depth
            out = nout if concatenates else 2 * nout if unit == 0 else width
            # The stride is in the first 1x1 convolution and in the projection: all positions are those after it.
            total += convolution(width, out // 4, 1, side * side)
            total += convolution(out // 4, out // 4, 3, side * side)
            total += convolution(out // 4, out, 1, side * side)
            total += convolution(width, out, 1, side * side) if unit == 0 else 0
            width = (2 * nout if unit == 0 else width + nout) if concatenates else out
    return total + 2 * width * classes  # M's linear map


@pytest.mark.parametrize("concat_depth", [0, 1, 2, "full"])
@pytest.mark.parametrize(("depth", "widening"), [(20, 1), (29, 2)])
def test_flops_are_those_of_each_convolution(depth: int, widening: int, concat_depth: Any) -> None:
    cost = cost_of(lambda: MDNet(cifar(depth, widening, concat_depth), 0, 10, 0), 32)
    network = MDNet(cifar(depth, widening, concat_depth), 0, 10, 0)
    assert cost.flops == flops_by_hand(depth, widening, concat_depth, 10)
    assert cost.weights == sum(weight.numel() for weight in network.parameters())


def test_ecnet_56_12_costs_what_its_authors_say() -> None:
    cost = cost_of(lambda: MDNet(cifar(56, 12, 1), 0, 10, 0), 32)
    assert cost.weights == 7_918_362
    assert cost.parameters == {"image": 7_910_672, "head": 768 * 10 + 10}


def test_parts_are_counted_apart_and_nothing_is_allocated_or_drawn() -> None:
    language = LanguageModelConfig(embedding=8, hidden=12, attention=8)
    config = ModelConfig(image=MedicalImageModel(), language=language)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    cost = cost_of(lambda: MDNet(config, 3, 4, 20), 224)
    assert torch.equal(before, torch.get_rng_state())
    network = MDNet(config, 3, 4, 20)
    assert cost.parameters == {
        name: sum(weight.numel() for weight in part.parameters()) for name, part in network.parts().items()
    }
    assert set(cost.parameters) == {"image", "head", "language"}
    # 7x7 stem at 112 x 112 alone has 2 x 3 x 49 x 64 x 12,544.
    assert cost.flops > 2 * 3 * 49 * 64 * 112 * 112
    # As much again for each position more: twice the side, four times the arithmetic (but for M's linear map).
    assert cost_of(lambda: MDNet(config, 3, 4, 20), 448).flops == pytest.approx(4 * cost.flops, rel=1e-4)
    # A network of a terabyte is counted too.
    wide = ModelConfig(image=CifarImageModel(depth=20, widening=20_000))
    assert cost_of(lambda: MDNet(wide, 0, 10, 0), 32).weights > 10**12 / 4


@pytest.mark.parametrize(
    ("flops", "text"), [(999, "999 FLOP"), (1e6, "1 MFLOP"), (2_634_000_000, "2.63 GFLOP"), (4.2e13, "42 TFLOP")]
)
def test_flops_as_people_write_them(flops: float, text: str) -> None:
    assert as_flops(flops) == text
