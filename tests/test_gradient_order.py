"""Gradients arrive in the same order whatever the batch: ZeRO 2 and 3 exchange them by order of arrival, without names.

Two ranks whose orders differ add up unlike weights, in silence. It happened: over packed sentences PyTorch runs another
LSTM on the CPU where all are equally long, and the weights received their gradients in another order.
"""

from __future__ import annotations

import pytest
import torch

from mdnet_dist.vocabulary import PAD
from tests.networks import one_thread, random_inputs, tiny_network  # noqa: F401 (one_thread is a fixture)


def arrival(lengths: torch.Tensor, sharpening: str) -> list[str]:
    """Names of the weights in the order in which they receive gradients for a batch with these lengths."""
    network = tiny_network(sharpening=sharpening)
    arrived: list[str] = []
    for name, weight in network.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    inputs = random_inputs(0, images=len(lengths), reports=lengths.shape[1])
    tokens = torch.full((*lengths.shape, int(lengths.max().clamp(min=1))), PAD)
    tokens[torch.arange(tokens.shape[-1]) < lengths[..., None]] = 5
    losses = network(inputs.images, inputs.labels, tokens, lengths)
    (losses.m + losses.l).backward()
    return arrived


@pytest.mark.parametrize("sharpening", ["cam", "none"])
def test_the_order_does_not_depend_on_the_reports(sharpening: str) -> None:
    orders = [
        arrival(lengths, sharpening)
        for lengths in (
            torch.tensor([[[3, 2, 4]], [[1, 2, 5]]]),
            torch.tensor([[[0, 2, 4]], [[0, 0, 0]]]),
            torch.tensor([[[5, 5, 5]], [[5, 5, 5]]]),
            torch.tensor([[[1, 1, 1]], [[1, 1, 1]]]),
            torch.zeros(2, 1, 3, dtype=torch.long),
            torch.tensor([[[3, 2, 4], [1, 0, 0]], [[1, 2, 5], [5, 4, 0]]]),
        )
    ]
    assert len(orders[0]) == len(list(tiny_network(sharpening=sharpening).parameters())), "every weight gets a gradient"
    assert all(order == orders[0] for order in orders)
