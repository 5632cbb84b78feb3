"""The least time that a training step can take: for each of its layers the larger of arithmetic and memory traffic.

What runs is watched as it is dispatched. Counted are the layers of the network, forward and backward: convolutions,
matrix products, LSTM (arithmetic and bytes), BatchNorm, ReLU, pooling, padding, concatenation and sums of maps (bytes
alone). A layer's bytes are its inputs and outputs, each once. Not counted, and so no excuse: casts, copies, zeros, the
tanh of the attention, the optimiser, and all that goes on between layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mdnet_dist.benchmark.limits import ConvolutionShape, Limits

aten = torch.ops.aten
_ARITHMETIC = {aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
_MEMORY = {
    aten.native_batch_norm,
    aten.native_batch_norm_backward,
    aten.cudnn_batch_norm,
    aten.cudnn_batch_norm_backward,
    aten.relu,
    aten.relu_,
    aten.threshold_backward,
    aten.max_pool2d_with_indices,
    aten.max_pool2d_with_indices_backward,
    aten.avg_pool2d,
    aten.avg_pool2d_backward,
    aten.reflection_pad2d,
    aten.reflection_pad2d_backward,
    aten.cat,
    aten.add,
    aten.add_,
}
_OF_MAPS_ALONE = {aten.cat, aten.add, aten.add_}
"""Counted where they are layers, between maps of four dimensions."""
_LSTM_PASSES = {"mkldnn_rnn_layer": 1, "mkldnn_rnn_layer_backward": 2, "_cudnn_rnn": 1, "_cudnn_rnn_backward": 2}
"""Products with each weight: one forward, two backward."""


@dataclass(frozen=True)
class Layer:
    """One layer, forward or backward."""

    name: str
    dtype: torch.dtype
    flops: int
    bytes: int

    def seconds(self, limits: Limits, copy_bytes: float) -> float:
        """The least it can take. Args: copy_bytes: per second."""
        dtype = self.dtype if self.dtype in limits.matrix_flops else torch.float32
        return max(self.flops / limits.peak(dtype), self.bytes / copy_bytes)


@dataclass
class Watched(TorchDispatchMode):
    """`with Watched() as step:` a forward and backward pass; then `step.layers`."""

    layers: list[Layer] = field(default_factory=list)
    convolutions: list[ConvolutionShape] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        packet = function._overloadpacket
        name = packet.__name__
        read = list(_tensors([args, kwargs]))
        if packet in _ARITHMETIC or name in _LSTM_PASSES:
            flops = (
                _lstm_flops(name, read) if name in _LSTM_PASSES else flop_registry[packet](*args, **kwargs, out_val=out)
            )
            self._add(name, read, out, int(flops))
            if packet is aten.convolution:
                self.convolutions.append(
                    ConvolutionShape(tuple(args[0].shape), tuple(args[1].shape), tuple(args[3]), tuple(args[4]))
                )
        elif packet in _MEMORY and (packet not in _OF_MAPS_ALONE or all(tensor.dim() == 4 for tensor in read)):
            self._add(name, read, out, 0)
        return out

    def _add(self, name: str, read: list[Tensor], out: Any, flops: int) -> None:
        memory = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in [*read, *_tensors(out)]}
        self.layers.append(Layer(name, read[0].dtype, flops, sum(memory.values())))

    @property
    def flops(self) -> int:
        """Of all layers."""
        return sum(layer.flops for layer in self.layers)

    @property
    def typical_bytes(self) -> int:
        """Half of what the median of the larger layers reads and writes: about one map."""
        sizes = sorted(layer.bytes for layer in self.layers)
        return sizes[len(sizes) * 3 // 4] // 2 if sizes else 1 << 20

    def seconds(self, limits: Limits) -> float:
        """The roofline: the sum over layers of the larger of the two, at the bandwidth of maps of the usual size."""
        return math.fsum(layer.seconds(limits, limits.near_copy_bytes.median) for layer in self.layers)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _lstm_flops(name: str, read: Sequence[Tensor]) -> int:
    rows = read[0].shape[0] * read[0].shape[1]
    weights = sum(tensor.numel() for tensor in read[1:3])  # for the input and for the state
    return 2 * rows * weights * _LSTM_PASSES[name]
