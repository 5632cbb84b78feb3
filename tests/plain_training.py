"""What training on several ranks is compared with: the same three updates by plain PyTorch in one process.

`torch.optim.SGD` and `torch.optim.AdamW` without DeepSpeed, the whole global batch in one forward pass, losses that are
means over it, and two backward passes whose gradients are blended by hand.

BatchNorm is frozen (fixed statistics, trained scale and shift): with statistics of a micro-batch no two ways of cutting
a global batch agree, in any program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdnet_dist.config import RunConfig, SgdGroup
from mdnet_dist.data import Batch
from mdnet_dist.distributed import rank, world_size
from mdnet_dist.export import ModelCard
from mdnet_dist.model.mdnet import NO_LABEL
from mdnet_dist.plan import accumulation_steps, micro_batches
from mdnet_dist.shards import SampleRecord
from mdnet_dist.trainer import Trainer
from mdnet_dist.vocabulary import PAD, SPECIAL_WORDS
from tests.networks import freeze_batch_norm, language_model_of, ragged_tokens
from tests.tiny import CLASSES, TOPICS, WORDS, tiny_config

GLOBAL_BATCH, STEPS = 7, 3  # seven does not divide by two ranks, nor by three micro-batches
BETA, ETA = 0.3, 5.0
SIDE_PX = 32
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One way of computing the same updates."""

    stage: int
    accumulation: int = 3
    clip_norm: float = 0.0
    from_shards: bool = False  # the batches of the tiny set through the reader, instead of `global_batches`

    def config(self, ranks: int, shards: Path, runs: Path) -> RunConfig:
        micro_batch = next(
            size
            for size in range(GLOBAL_BATCH, 0, -1)
            if accumulation_steps(GLOBAL_BATCH, size, ranks) == self.accumulation
        )
        constant = {"kind": "constant", "warmup": 0.0}
        # A large epsilon: with a small one Adam's first step has the size of the rate whatever the gradient, and would
        # turn the rounding of gradients that are nearly zero into differences of weights.
        adam = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.01, "schedule": constant}
        overrides = {
            "data.reports_per_image": 2,
            "model.language.dropout": 0.0,
            "blend": {"beta": {"kind": "constant", "value": BETA}, "eta": ETA},
            "optimizer.image": {"lr": 0.05, "weight_decay": 5e-3, "schedule": constant},
            "optimizer.head": adam,
            "optimizer.language": adam,
            # With seed 0 one bias of BatchNorm hardly moves: its gradient is what is left of a sum that cancels.
            "train.seed": 1,
            "train.global_batch": GLOBAL_BATCH,
            "train.micro_batch": micro_batch,
            "train.zero_stage": self.stage,
            "train.clip_norm": self.clip_norm,
            # ZeRO 3 would keep weights as small as these whole on every rank.
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        }
        return tiny_config(shards, runs, overrides)


def global_batches() -> list[Batch]:
    """Three global batches: ragged, and with what a rank may find in its share of them.

    With two ranks the first three images are the first rank's. In the first batch these have no label and in the second
    no report; in the third the last two images, which are a micro-batch with accumulation, have neither.
    """
    batches = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        words = len(WORDS) + len(SPECIAL_WORDS)
        tokens, lengths = ragged_tokens(step, GLOBAL_BATCH, 2, len(TOPICS), longest=6, words=words)
        labels = torch.randint(0, len(CLASSES), (GLOBAL_BATCH,), generator=generator)
        images = torch.randint(0, 256, (GLOBAL_BATCH, 3, SIDE_PX, SIDE_PX), generator=generator)
        none, first_three, last_two = slice(0, 0), slice(0, 3), slice(5, 7)
        unlabelled, silent = [(first_three, none), (none, first_three), (last_two, last_two)][step]
        labels[unlabelled] = NO_LABEL
        labels[4] = NO_LABEL
        tokens[silent], lengths[silent] = PAD, 0
        batches.append(
            Batch(
                keys=[f"{step}-{number}" for number in range(GLOBAL_BATCH)],
                records=[SampleRecord(patient="p", label=None, reports=[])] * GLOBAL_BATCH,
                images=images.to(torch.uint8),
                labels=labels,
                tokens=tokens,
                lengths=lengths,
                masks=[None] * GLOBAL_BATCH,
            )
        )
    return batches


def cut(batch: Batch, piece: slice) -> Batch:
    """A micro-batch as the loader would make it: no longer and with no more reports than its own samples need."""
    lengths = batch.lengths[piece]
    reports = 1 + max([0, *lengths.sum((0, 2)).nonzero().flatten().tolist()])
    longest = max(1, int(lengths.max()))
    return replace(
        batch,
        keys=batch.keys[piece],
        records=batch.records[piece],
        images=batch.images[piece],
        labels=batch.labels[piece],
        tokens=batch.tokens[piece, :reports, :, :longest],
        lengths=lengths[:, :reports],
        masks=batch.masks[piece],
    )


def share_of(batches: Iterable[Batch], config: RunConfig) -> Iterator[Batch]:
    """This rank's micro-batches of some global batches."""
    pieces = micro_batches(config.train.global_batch, config.train.micro_batch, world_size(), rank())
    return (cut(batch, piece) for batch in batches for piece in pieces)


# -------------------------------------------------------------------------------------------------------- plain PyTorch


@dataclass(frozen=True)
class PlainStep:
    """What the reference has after a step."""

    weights: dict[str, Tensor]
    loss_m: float
    loss_l: float
    norm_m: float  # of dL_M with respect to the map
    norm_l: float
    gradient_norm: float  # of the whole blended gradient, before clipping


def plain_pytorch(card: ModelCard, config: RunConfig, batches: Sequence[Batch]) -> list[PlainStep]:
    """The same training by ordinary means; first what it starts from, then what each step gives."""
    torch.manual_seed(config.train.seed)
    network = card.build()
    freeze_batch_norm(network)
    d, m, l = (list(part.parameters()) for part in network.parts().values())  # noqa: E741 (the paper's name)
    sgd, adam = config.optimizer.image, config.optimizer.head
    assert isinstance(sgd, SgdGroup)
    optimizers = [
        torch.optim.SGD(d, lr=sgd.lr, momentum=sgd.momentum, nesterov=True, weight_decay=sgd.weight_decay),
        torch.optim.AdamW([*m, *l], lr=adam.lr, betas=(0.9, 0.999), eps=adam.eps, weight_decay=adam.weight_decay),
    ]
    nan = math.nan
    steps = [PlainStep(whole_state(network), nan, nan, nan, nan, nan)]
    for batch in batches:
        features = network.image_model(card.normalise(batch.images))
        logits, sharpening_map = network.class_maps(features)
        loss_m = F.cross_entropy(logits, batch.labels, ignore_index=NO_LABEL)  # mean over those with a label
        told = language_model_of(network)(features, sharpening_map, batch.tokens, batch.lengths)
        words = told.targets != PAD
        loss_l = F.cross_entropy(told.logits[words], told.targets[words])  # mean over the words
        map_m, *gradients_m = torch.autograd.grad(loss_m, [features, *d, *m], retain_graph=True)
        map_l, *gradients_l = torch.autograd.grad(loss_l, [features, *d, *l])
        for weight, of_m, of_l in zip(d, gradients_m, gradients_l):
            weight.grad = (1 - BETA) * of_m + BETA * ETA * of_l
        for weight, gradient in zip([*m, *l], [*gradients_m[len(d) :], *gradients_l[len(d) :]], strict=True):
            weight.grad = gradient
        norm = nn.utils.clip_grad_norm_([*d, *m, *l], config.train.clip_norm or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        steps.append(
            PlainStep(
                whole_state(network),
                loss_m.item(),
                loss_l.item(),
                map_m.norm().item(),
                map_l.norm().item(),
                norm.item(),
            )
        )
    return steps


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_same_weights(ours: Weights, reference: dict[str, Tensor], before: dict[str, Tensor], what: str) -> None:
    """Equal to 1e-5 of how far each has moved, which is much finer than 1e-5 of the weight itself."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        moved = (expected.double() - before[name].double()).norm()
        rounding = 1e-7 * expected.double().norm()  # of a weight in fp32
        difference = (torch.from_numpy(ours[name]).double() - expected.double()).norm()
        assert difference <= 1e-5 * moved + rounding, f"{what}: {name} is {difference:.1e} off after moving {moved:.1e}"


# ------------------------------------------------------------------------------------------------------- on the ranks


def new_trainer(config: RunConfig, *, resume: bool = False) -> Trainer:
    trainer = Trainer(config, resume=resume)
    trainer._stop = None
    freeze_batch_norm(trainer.network)
    return trainer


def finish(trainer: Trainer) -> None:
    """Make room for the next one."""
    trainer.close()


def as_numpy(tensors: dict[str, Tensor]) -> Weights:
    return {name: value.numpy() for name, value in tensors.items()}


def as_tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in weights.items()}


def batches_of(trainer: Trainer, case: Case, first: int = 0, last: int = STEPS) -> Iterator[Batch]:
    """This rank's micro-batches of the steps from `first` up to `last`."""
    if case.from_shards:
        return iter(trainer.data.training_batches(trainer.config, first, last, pin_memory=False))
    return share_of(global_batches()[first:last], trainer.config)
