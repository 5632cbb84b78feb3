"""The same network trained by plain PyTorch: no DeepSpeed, no data loading, no logging, batches in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mdnet_dist.benchmark.subject import Subject
from mdnet_dist.config import OptimizerConfig, SgdGroup
from mdnet_dist.data import Batch
from mdnet_dist.model.mdnet import NO_LABEL, MDNet


def torch_optimizers(network: MDNet, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """PyTorch's own optimizers, one for each part of the network, at the configured peak rates."""
    optimizers: list[torch.optim.Optimizer] = []
    for name, part in network.parts().items():
        group = getattr(config, name)
        if isinstance(group, SgdGroup):
            nesterov = group.nesterov and group.momentum > 0
            optimizers.append(
                torch.optim.SGD(
                    part.parameters(), group.lr, group.momentum, weight_decay=group.weight_decay, nesterov=nesterov
                )
            )
        else:
            optimizers.append(
                torch.optim.AdamW(part.parameters(), group.lr, group.betas, weight_decay=group.weight_decay)
            )
    return optimizers


def plain_step(subject: Subject, network: MDNet, *, bf16: bool) -> Callable[[Batch], None]:
    """A function that makes one update of the weights from a batch in memory, as `Trainer` would."""
    config = subject.config
    optimizers = torch_optimizers(network, config.optimizer)

    def step(batch: Batch) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(subject, network, batch, bf16=bf16).backward()
        if config.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.train.clip_norm)
        for optimizer in optimizers:
            optimizer.step()

    return step


def loss_of(subject: Subject, network: MDNet, batch: Batch, *, bf16: bool) -> Tensor:
    """L_M + L_L of a batch, each a mean."""
    with torch.autocast(subject.device.type, torch.bfloat16, enabled=bf16):
        losses = network(subject.images_of(batch), batch.labels, batch.tokens, batch.lengths)
    labelled = (batch.labels != NO_LABEL).sum().clamp(min=1)
    return losses.m / labelled + losses.l / max(1, int(batch.lengths.sum()))
