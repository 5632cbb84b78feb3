"""D and M: sizes, widths, units and class maps against arithmetic written out by hand."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mdnet_dist.config import CifarImageModel, MedicalImageModel
from mdnet_dist.model.class_maps import ClassMaps
from mdnet_dist.model.image_model import ImageModel, Unit, build_stage
from tests.networks import freeze_batch_norm, one_thread  # noqa: F401 (a fixture)

DEPTHS = [0, 1, 2, "full"]


def parameters_of(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


# ------------------------------------------------------------------------------------------------------------- sizes


def test_ecnet_56_12_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        image_model = ImageModel(CifarImageModel(depth=56, widening=12))
        head = ClassMaps(image_model.channels, 10)
    assert image_model.channels == 768
    assert parameters_of(image_model) + parameters_of(head) == 7_918_362


@pytest.mark.parametrize("depth", [0, 1, 2, 3, "full"])
def test_ecnet_keeps_the_promised_widths(depth: Any) -> None:
    with torch.device("meta"):
        model = ImageModel(CifarImageModel(depth=29, widening=2, concat_depth=depth))
        images = torch.empty(2, 3, 32, 32)
        y, widths = model.stem(images), []
        for stage in model.stages:
            y = stage(y)
            widths.append(tuple(y.shape[1:]))
        assert model(images).shape == y.shape
    added = 2 if depth in (0, 1) else 4 if depth == "full" else depth + 1  # three units a stage
    assert widths == [(32 * added, 32, 32), (64 * added, 16, 16), (64 * added, 8, 8)]
    assert model.channels == 64 * added


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_medical_map_is_14_by_14(depth: Any) -> None:
    with torch.device("meta"):
        model = ImageModel(MedicalImageModel(concat_depth=depth))
        shape = model(torch.empty(1, 3, 224, 224)).shape
    channels = {0: 512, 1: 512, 2: 768, "full": 1024}[depth]  # the last stage has 3 units and nOut 256
    assert shape == (1, channels, 14, 14) and model.channels == channels


def count_by_hand(channels_in: int, nout: int, units: int, depth: int) -> int:
    """Weights of a stage: three convolutions, the projection, and two numbers for each channel of each BatchNorm."""
    total, width = 0, channels_in
    for index in range(units):
        out = nout if index < depth else 2 * nout if index == 0 else width
        inner = out // 4
        total += width * inner + 9 * inner * inner + inner * out + 2 * (width + 2 * inner)
        total += width * out if index == 0 else 0
        width = (2 * nout if index == 0 else width + nout) if index < depth else out
    return total


@settings(max_examples=25, deadline=None)
@given(
    channels_in=st.integers(1, 12),
    nout=st.integers(1, 5).map(lambda quarter: 4 * quarter),
    units=st.integers(1, 5),
    depth=st.one_of(st.integers(0, 6), st.just("full")),
    stride=st.sampled_from([1, 2]),
)
def test_every_stage_has_its_width_its_weights_and_its_concatenations(
    channels_in: int, nout: int, units: int, depth: Any, stride: int
) -> None:
    with torch.device("meta"):
        stage, width = build_stage(channels_in, nout, units, stride, depth)
        shape = stage(torch.empty(2, channels_in, 6, 6)).shape
    concatenated = units if depth == "full" else min(depth, units)
    assert width == nout * (1 + max(1, concatenated))
    assert shape == (2, width, 6 // stride, 6 // stride)
    assert [unit.concatenate for unit in stage] == [index < concatenated for index in range(units)]
    assert [isinstance(unit.shortcut, nn.Conv2d) for unit in stage] == [index == 0 for index in range(units)]
    assert parameters_of(stage) == count_by_hand(channels_in, nout, units, concatenated)


# ------------------------------------------------------------------------------------------------- what it computes


def normalised(y: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """BatchNorm in training: each channel to zero mean and unit (biased) variance over batch and positions."""
    mean = y.mean((0, 2, 3), keepdim=True)
    variance = ((y - mean) ** 2).mean((0, 2, 3), keepdim=True)
    scaled = (y - mean) / (variance + 1e-5).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def unit_by_hand(unit: Any, y: Tensor, stride: int) -> Tensor:
    norm1, _, conv1, norm2, _, conv2, norm3, _, conv3 = unit.residual
    x = F.conv2d(normalised(y, norm1).clamp(min=0), conv1.weight, stride=stride)
    x = F.conv2d(normalised(x, norm2).clamp(min=0), conv2.weight, padding=1)
    x = F.conv2d(normalised(x, norm3).clamp(min=0), conv3.weight)
    kept = y if isinstance(unit.shortcut, nn.Identity) else F.conv2d(y, unit.shortcut.weight, stride=stride)
    return torch.cat([x, kept], 1) if unit.concatenate else x + kept


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "stride", "concatenate", "project"),
    [
        (6, 8, 2, True, True),
        (6, 8, 1, True, True),
        (8, 8, 1, True, False),
        (12, 8, 1, True, False),
        (6, 8, 2, False, True),
        (8, 8, 1, False, False),
    ],
)
def test_a_unit_equals_one_written_by_hand(
    channels_in: int, channels_out: int, stride: int, concatenate: bool, project: bool
) -> None:
    torch.manual_seed(1)
    unit = Unit(channels_in, channels_out, stride, concatenate=concatenate, project=project).double()
    for weight in unit.parameters():
        nn.init.normal_(weight)
    y = torch.randn(3, channels_in, 6, 6, dtype=torch.double)
    untouched = y.clone()
    ours = unit(y)
    torch.testing.assert_close(ours, unit_by_hand(unit, y, stride), rtol=1e-9, atol=1e-9)
    assert torch.equal(y, untouched), "the input is still needed by the shortcut and must not be changed in place"
    if concatenate and not project:
        assert torch.equal(ours[:, channels_out:], y), "what came before goes on as it is"


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("form", ["medical", "cifar"])
def test_the_whole_image_model_equals_one_written_by_hand(form: str, depth: Any) -> None:
    torch.manual_seed(2)
    model: Any
    if form == "cifar":
        model = ImageModel(CifarImageModel(depth=20, widening=1, concat_depth=depth)).double()
        strides = [1, 2, 2]
    else:
        config = MedicalImageModel(
            stem_channels=4, stage_channels=[4, 8], units_per_stage=[3, 2], stage_strides=[1, 2], concat_depth=depth
        )
        model, strides = ImageModel(config).double(), [1, 2]
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    if form == "cifar":
        y = F.conv2d(images, model.stem.weight, padding=1)
    else:
        y = F.max_pool2d(F.conv2d(images, model.stem[0].weight, stride=2, padding=3), 3, 2, 1)
    for stage, stride in zip(model.stages, strides):
        for index, unit in enumerate(stage):
            y = unit_by_hand(unit, y, stride if index == 0 else 1)
    expected = normalised(y, model.last[0]).clamp(min=0)
    torch.testing.assert_close(model(images), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_trains_a_step(depth: Any) -> None:
    torch.manual_seed(3)
    model = ImageModel(CifarImageModel(depth=20, widening=1, concat_depth=depth))
    head = ClassMaps(model.channels, 4)
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.02)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(head(model(images))[0], labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_concatenated_outputs_reach_the_classifier_through_weights_of_their_own() -> None:
    """docs/design.md section 1: F_2 w_1 + F_1 w_2 + W y w_3, where a residual stage has (F_2 + F_1 + W y) w."""
    torch.manual_seed(4)
    built, width = build_stage(4, 8, 2, 1, "full")
    stage: Any = built.double()
    freeze_batch_norm(stage)
    y = torch.randn(2, 4, 5, 5, dtype=torch.double)
    first = stage[0]
    after_first = torch.cat([first.residual(y), first.shortcut(y)], 1)
    pieces = [stage[1].residual(after_first), first.residual(y), first.shortcut(y)]
    weight = torch.randn(width, dtype=torch.double)
    expected = sum(torch.einsum("bchw,c->b", piece, part) for piece, part in zip(pieces, weight.split(8), strict=True))
    torch.testing.assert_close(torch.einsum("bchw,c->b", stage(y), weight), expected)


# -------------------------------------------------------------------------------------------------------- class maps


def test_class_maps_average_to_the_logits() -> None:
    torch.manual_seed(5)
    head = ClassMaps(6, 4).double()
    nn.init.normal_(head.bias)
    features = torch.rand(3, 6, 4, 5, dtype=torch.double)
    logits, _ = head(features)
    maps = head.maps(features)
    assert maps.shape == (3, 4, 20)
    torch.testing.assert_close(maps.mean(2) + head.bias, logits)
    by_hand = torch.stack([head.weight[2, c] * features[1, c] for c in range(6)]).sum(0)
    torch.testing.assert_close(maps[1, 2], by_hand.flatten())


def test_the_sharpening_map_is_the_spread_over_classes_standardised_and_detached() -> None:
    torch.manual_seed(6)
    head = ClassMaps(6, 4)
    features = torch.rand(5, 6, 3, 3, requires_grad=True)
    _, sharpening_map = head(features)
    assert not sharpening_map.requires_grad
    for image, found in zip(features.detach().flatten(2).double(), sharpening_map):
        votes = [[float(weight.detach().double() @ image[:, p]) for weight in head.weight] for p in range(9)]
        spread = [statistics.pstdev(of_position) for of_position in votes]
        mean, deviation = statistics.fmean(spread), statistics.pstdev(spread)
        assert found.tolist() == pytest.approx([(value - mean) / deviation for value in spread], abs=1e-3)
    with torch.no_grad():
        # What adds the same to every class changes no probability, and not what the attention is told.
        head.weight.add_(torch.randn(6))
        torch.testing.assert_close(head(features)[1], sharpening_map, rtol=1e-3, atol=1e-3)
        # Nor does the scale of the classifier.
        head.weight.mul_(20)
    torch.testing.assert_close(head(features)[1], sharpening_map, rtol=1e-3, atol=1e-3)


def test_without_several_classes_nothing_is_sharpened() -> None:
    assert ClassMaps(6, 1)(torch.rand(2, 6, 3, 3))[1].abs().max() == 0


def test_rounding_of_a_flat_map_is_not_blown_up_to_a_signal() -> None:
    torch.manual_seed(7)
    head = ClassMaps(3, 2)
    _, sharpening_map = head(torch.ones(2, 3, 4, 4))
    assert sharpening_map.abs().max() < 0.5, "a real map is scaled to a mean square of 1"
