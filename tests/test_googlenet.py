"""The GoogLeNet form of D against torchvision's published network, written down here by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mdnet_dist.config import GoogLeNetImageModel
from mdnet_dist.model.googlenet import GoogLeNet
from tests.networks import one_thread, relative_difference  # noqa: F401 (one_thread is a fixture)

INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}
"""Channels in, then those of torchvision's branches: 1; 2.0, 2.1; 3.0, 3.1; 4.1."""


def published_convolutions() -> dict[str, list[int]]:
    """{name: shape of its weight} in torchvision's googlenet, without its classifiers."""
    shapes = {"conv1": [64, 3, 7, 7], "conv2": [64, 64, 1, 1], "conv3": [192, 64, 3, 3]}
    for name, (enter, one, reduce3, three, reduce5, five, pooled) in INCEPTIONS.items():
        module = f"inception{name}"
        shapes[f"{module}.branch1"] = [one, enter, 1, 1]
        shapes[f"{module}.branch2.0"] = [reduce3, enter, 1, 1]
        shapes[f"{module}.branch2.1"] = [three, reduce3, 3, 3]
        shapes[f"{module}.branch3.0"] = [reduce5, enter, 1, 1]
        shapes[f"{module}.branch3.1"] = [five, reduce5, 3, 3]  # 5x5 in the paper
        shapes[f"{module}.branch4.1"] = [pooled, enter, 1, 1]
    return shapes


def published_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights by torchvision's names, in its shapes."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in published_convolutions().items():
        fan_in = shape[1] * shape[2] * shape[3]
        weights[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        weights[f"{name}.bn.weight"] = torch.rand(shape[0], generator=generator) + 0.5
        weights[f"{name}.bn.bias"] = torch.randn(shape[0], generator=generator) * 0.1
        weights[f"{name}.bn.running_mean"] = torch.randn(shape[0], generator=generator) * 0.1
        weights[f"{name}.bn.running_var"] = torch.rand(shape[0], generator=generator) + 0.5
        weights[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
    return weights


def published_forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The map of torchvision's googlenet in evaluation mode, layer by layer."""

    def unit(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, variance = weights[f"{name}.bn.running_mean"], weights[f"{name}.bn.running_var"]
        scale = weights[f"{name}.bn.weight"] / (variance + 0.001).sqrt()
        return ((x - mean[:, None, None]) * scale[:, None, None] + weights[f"{name}.bn.bias"][:, None, None]).clamp(0)

    def inception(x: Tensor, name: str) -> Tensor:
        name = f"inception{name}"
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        branches = [
            unit(x, f"{name}.branch1"),
            unit(unit(x, f"{name}.branch2.0"), f"{name}.branch2.1"),
            unit(unit(x, f"{name}.branch3.0"), f"{name}.branch3.1"),
            unit(pooled, f"{name}.branch4.1"),
        ]
        return torch.cat(branches, 1)

    x = F.max_pool2d(unit(x, "conv1", 2), 3, 2, ceil_mode=True)
    x = F.max_pool2d(unit(unit(x, "conv2"), "conv3"), 3, 2, ceil_mode=True)
    x = inception(inception(x, "3a"), "3b")
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    for name in ("4a", "4b", "4c", "4d", "4e"):
        x = inception(x, name)
    x = F.max_pool2d(x, 2, 2, ceil_mode=True)
    return inception(inception(x, "5a"), "5b")


def test_names_and_shapes_are_the_published_ones() -> None:
    ours = {name: list(value.shape) for name, value in GoogLeNet(GoogLeNetImageModel()).state_dict().items()}
    assert ours == {name: list(value.shape) for name, value in published_weights().items()}


def test_it_has_as_many_weights_as_the_published_network() -> None:
    """Counted by hand from the table: convolutions without bias, a scale and a shift for each channel."""
    shapes = published_convolutions().values()
    by_hand = sum(out * enter * high * wide + 2 * out for out, enter, high, wide in shapes)
    assert by_hand == 5_599_904
    assert sum(weight.numel() for weight in GoogLeNet(GoogLeNetImageModel()).parameters()) == by_hand


@pytest.mark.parametrize("side", [64, 90])  # also where pooling windows do not fill the map
def test_it_computes_what_the_published_network_computes(side: int) -> None:
    network, weights = GoogLeNet(GoogLeNetImageModel()), published_weights()
    network.load_state_dict(weights)
    network.eval()
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_difference(network(images), published_forward(weights, images)) < 1e-5


@pytest.mark.parametrize("width", [0.01, 0.21, 0.72, 1.0])
def test_any_width_gives_a_map_that_is_not_negative(width: float) -> None:
    torch.manual_seed(0)
    network = GoogLeNet(GoogLeNetImageModel(width=width))
    features = network(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, network.channels, 2, 2)
    assert features.min() >= 0 and features.isfinite().all()
    features.sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())
    assert all(weight.shape[0] % 4 == 0 for weight in network.parameters())
