"""What a network costs: its weights by part, and the arithmetic of one image.

FLOPs are those of D and M on one image, forward: convolutions and matrix products alone, a multiplication with its
addition counted as two (some papers count it as one). What L needs depends on the words it says and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdnet_dist.model.mdnet import MDNet


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one network."""

    parameters: dict[str, int]  # {image, head, language: trainable weights}; without language where nothing is said
    flops: int  # of a forward pass of one image through D and M

    @property
    def weights(self) -> int:
        """Trainable weights of all parts."""
        return sum(self.parameters.values())


def cost_of(build: Callable[[], MDNet], image_size: int) -> Cost:
    """Count without memory or arithmetic: the network is built without data, whatever its size.

    Args:
        build: makes the network, as `ModelCard.build`.
        image_size: side in px of the square it sees.
    """
    with torch.device("meta"), torch.no_grad():
        network = build().eval()
        images = torch.empty(1, 3, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            logits, _ = network.class_maps(network.image_model(images), network.sharpen)
        del logits
    parameters = {
        name: sum(weight.numel() for weight in part.parameters() if weight.requires_grad)
        for name, part in network.parts().items()
    }
    return Cost(parameters=parameters, flops=counter.get_total_flops())


def as_flops(flops: float) -> str:
    """A number of FLOPs as people write it: 2.6 GFLOP."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP"
    return f"{flops:.0f} FLOP"
