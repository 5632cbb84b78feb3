"""What the machine can do at most: arithmetic, memory bandwidth. Measured, because data sheets know other machines.

FLOPs count a multiplication with its addition as two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from mdnet_dist.benchmark.timing import Spread, in_turn

MATRIX = 2048
"""Side of the square matrices: large enough for the peak, small enough to be quick on two cores."""
LARGE_BYTES = 1 << 28
"""Of a copy that no cache holds."""


@dataclass(frozen=True)
class ConvolutionShape:
    """Of one convolution: input (B, C, H, W), weight (out, C, k, k), and how it is applied."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Of the forward pass."""
        height, width = (
            (side + 2 * pad - kernel) // stride + 1
            for side, pad, kernel, stride in zip(self.input[2:], self.padding, self.weight[2:], self.stride)
        )
        out, *rest = self.weight
        return 2 * self.input[0] * height * width * out * rest[0] * rest[1] * rest[2]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one device; rates by dtype where they depend on it."""

    matrix_flops: dict[torch.dtype, Spread]  # per second
    convolution_flops: dict[torch.dtype, Spread]  # per second, the best of the network's own shapes, forward
    copy_bytes: Spread  # per second, read and written, of memory that no cache holds
    near_copy_bytes: Spread  # per second, of tensors of the size that the network's layers exchange

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s that matrices or convolutions reach here, whichever is more."""
        return max(self.matrix_flops[dtype].median, self.convolution_flops[dtype].median)


def measure_limits(
    device: torch.device, shapes: Iterable[ConvolutionShape], layer_bytes: int, *, rounds: int = 8
) -> Limits:
    """Measure all of them.

    Args:
        shapes: of the network's convolutions; the dozen with the most arithmetic is tried.
        layer_bytes: what one layer hands to the next, typically.
    """
    tried = sorted(set(shapes), key=lambda shape: -shape.flops)[:12]
    matrix_flops, convolution_flops = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (torch.randn(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
        matrix_flops[dtype] = 2 * MATRIX**3 / best_of(partial(torch.mm, one, other), device, rounds)
        convolution_flops[dtype] = max(
            (shape.flops / best_of(_convolution(shape, dtype, device), device, rounds) for shape in tried),
            key=lambda rate: rate.median,
        )
    return Limits(
        matrix_flops=matrix_flops,
        convolution_flops=convolution_flops,
        copy_bytes=_copy_rate(LARGE_BYTES, device, rounds),
        near_copy_bytes=_copy_rate(layer_bytes, device, 4 * rounds),
    )


def best_of(thing: Callable[[], object], device: torch.device, rounds: int) -> Spread:
    """Seconds of one thing, of the faster half of the rounds: a limit is what is possible, not what is usual."""
    seconds = sorted(in_turn({"it": thing}, device, rounds=rounds).seconds["it"])
    return Spread.of(seconds[: max(1, len(seconds) // 2)])


def _convolution(shape: ConvolutionShape, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    images = torch.randn(shape.input, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape.weight, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(images, weight, None, shape.stride, shape.padding)


def _copy_rate(size_bytes: int, device: torch.device, rounds: int) -> Spread:
    source = torch.ones(max(1, size_bytes // 4), device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / best_of(lambda: target.copy_(source), device, rounds)
