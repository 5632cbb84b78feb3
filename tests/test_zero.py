"""Under every ZeRO stage, on one rank and on two, with accumulation and without: the same weights as plain PyTorch.

The reference is one process without DeepSpeed: `torch.optim.SGD` and `torch.optim.AdamW`, the whole global batch in one
forward pass, losses that are means over it, and two backward passes whose gradients are blended by hand.

BatchNorm is frozen here (fixed statistics, trained scale and shift): with statistics of a micro-batch no two ways of
cutting a global batch agree, in any program.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mdnet_dist.config import RunConfig
from mdnet_dist.data import Batch
from mdnet_dist.export import ModelCard
from mdnet_dist.model.mdnet import NO_LABEL, MDNet
from mdnet_dist.plan import accumulation_steps, micro_batches
from mdnet_dist.shards import SampleRecord
from mdnet_dist.vocabulary import PAD
from tests.networks import IMAGE_SIZE, TINY_IMAGE_MODEL, TINY_LANGUAGE_MODEL, freeze_batch_norm, ragged_tokens
from tests.networks import one_thread  # noqa: F401 (a fixture)
from tests.ranks import run_ranks

TOPICS, CLASSES = ("crowding", "mitosis", "conclusion"), ("high", "low", "normal")
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
GLOBAL_BATCH, STEPS = 7, 3
BETA, ETA = 0.3, 5.0
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One way of computing the same updates."""

    stage: int
    accumulation: int
    clip_norm: float = 0.0

    def micro_batch(self, ranks: int) -> int:
        return next(
            size
            for size in range(GLOBAL_BATCH, 0, -1)
            if accumulation_steps(GLOBAL_BATCH, size, ranks) == self.accumulation
        )


# -------------------------------------------------------------------------------------------------- data and settings


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ragged samples: several or single reports, topics missing, labels missing."""
    from data_shards.writer import Sample, write_shards
    from mdnet_dist.images import encode_png

    rng = np.random.default_rng(0)
    samples = []
    for number in range(GLOBAL_BATCH * STEPS + 2):
        reports = []
        for _ in range(1 + number % 3):
            topics = [topic for topic in TOPICS if rng.random() < 0.6] or [TOPICS[0]]
            reports.append({topic: " ".join(rng.choice(WORDS, rng.integers(1, 6))) for topic in topics})
        samples.append(
            Sample(
                key=f"s{number:02d}",
                split="train",
                image=encode_png(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)),
                extension="png",
                record=SampleRecord(
                    patient=f"p{number}", label=None if number % 4 == 0 else CLASSES[number % 3], reports=reports
                ),
            )
        )
    folder = tmp_path_factory.mktemp("set") / "shards"
    write_shards(samples, folder, name="ragged", topics=TOPICS, classes=CLASSES, samples_per_shard=5)
    return folder


def config_of(case: Case, ranks: int, shards: Path, runs: Path) -> RunConfig:
    constant = {"kind": "constant", "warmup": 0.0}
    # A large epsilon: with a small one Adam's first step has the size of the rate whatever the gradient, and would
    # turn the rounding of gradients that are nearly zero into differences of weights.
    adam = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.01, "schedule": constant}
    return RunConfig.model_validate(
        {
            "name": "zero",
            "runs_folder": str(runs),
            "data": {
                "shards": str(shards), "image_size": IMAGE_SIZE, "reports_per_image": 2, "workers": 0,
                "max_tokens": 8,
            },
            "model": {"image": TINY_IMAGE_MODEL.model_dump(), "language": TINY_LANGUAGE_MODEL.model_dump()},
            "blend": {"beta": {"kind": "constant", "value": BETA}, "eta": ETA},
            "optimizer": {
                "image": {"lr": 0.05, "weight_decay": 5e-3, "schedule": constant},
                "head": adam,
                "language": adam,
            },
            "train": {
                "epochs": 1, "global_batch": GLOBAL_BATCH, "micro_batch": case.micro_batch(ranks),
                "zero_stage": case.stage, "clip_norm": case.clip_norm,
            },
            # ZeRO 3 would keep weights as small as these on every rank.
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        }
    )  # fmt: skip


def global_batches() -> list[Batch]:
    """Three global batches of seven: ragged, and with what a rank may find in its share of them.

    With two ranks the first three images are the first rank's. In the first batch these have no label and in the second
    no report; in the third the last two have neither.
    """
    batches = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens, lengths = ragged_tokens(step, GLOBAL_BATCH, reports=2, topics=len(TOPICS), longest=6)
        labels = torch.randint(0, len(CLASSES), (GLOBAL_BATCH,), generator=generator)
        images = torch.randint(0, 256, (GLOBAL_BATCH, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
        unlabelled, silent = [(slice(0, 3), slice(0, 0)), (slice(0, 0), slice(0, 3)), (slice(5, 7), slice(5, 7))][step]
        labels[unlabelled] = NO_LABEL
        labels[4] = NO_LABEL
        tokens[silent], lengths[silent] = PAD, 0
        batches.append(
            Batch(
                keys=[f"{step}-{i}" for i in range(GLOBAL_BATCH)],
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
    reports = max(1, int(lengths.sum((0, 2)).count_nonzero()))
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


def share_of(batches: Sequence[Batch], config: RunConfig, ranks: int, rank: int) -> Iterator[Batch]:
    """A rank's micro-batches of some global batches."""
    pieces = micro_batches(config.train.global_batch, config.train.micro_batch, ranks, rank)
    return (cut(batch, piece) for batch in batches for piece in pieces)
