"""What a step of training measured, known as soon as the device has computed it: a GPU may lag behind the host."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdnet_dist.distributed import world_size
from mdnet_dist.machine import peak_resident_bytes

MEASURED = ("loss_m", "loss_l", "squared_norm_m", "squared_norm_l", "stops", "eta", "moved")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step measured, over all ranks."""

    step: int  # optimiser steps done with it
    beta: float  # that it took
    eta: float
    rates: dict[str, float]  # learning rates, by part
    loss_m: float  # mean over the labelled images of the global batch
    loss_l: float  # mean over its real tokens
    gradient_norm_m: float  # of dL_M with respect to D's map, before it is scaled
    gradient_norm_l: float
    finite: bool
    moved: bool  # whether the weights were
    stop: bool  # whether some rank was told to stop
    waited_seconds: float  # for data, this rank
    keys: list[str]  # of the images that this rank read; empty for one that is damaged
    damaged: list[str]  # what is wrong with those, over all ranks (`Batch.damaged`)


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A step that the device may still be computing."""

    known: dict[str, Any]  # fields of its `StepReport` that are known already
    labelled: int  # images of the global batch
    tokens: int
    measured: Tensor  # (7) on the CPU: what `MEASURED` names; filled when `computed` has come
    computed: torch.cuda.Event | None  # None: it is there

    def report(self) -> StepReport:
        """What it measured; waits until the device has computed it."""
        if self.computed:
            self.computed.synchronize()
        measured = dict(zip(MEASURED, self.measured.tolist()))
        squares = measured["squared_norm_m"], measured["squared_norm_l"]
        finite = all(map(math.isfinite, (measured["loss_m"], measured["loss_l"], *squares)))
        norms = [math.sqrt(square) / world_size() if finite else math.nan for square in squares]
        return StepReport(
            **self.known,
            eta=measured["eta"],
            loss_m=measured["loss_m"] / self.labelled,
            loss_l=measured["loss_l"] / self.tokens,
            gradient_norm_m=norms[0],
            gradient_norm_l=norms[1],
            finite=finite,
            moved=bool(measured["moved"]),
            stop=measured["stops"] > 0,
        )


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a few numbers to the CPU, and what tells when they are there."""
    if values.device.type != "cuda":
        return values, None
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    there.copy_(values, non_blocking=True)
    computed = torch.cuda.Event()
    computed.record()
    return there, computed


@dataclass
class Pace:
    """Since the last logged step."""

    logged: int  # that step
    since: float = field(default_factory=time.monotonic)  # when it was, pauses for scoring and saving left out
    waited: float = 0.0  # seconds, for data


def as_text(measured: Mapping[str, float]) -> dict[str, str]:
    """The measurements of a step as the progress line shows them."""
    return {
        "loss M": f"{measured['train/loss_m']:.3f}",
        "L": f"{measured['train/loss_l']:.3f}",
        "beta": f"{measured['train/beta']:.2f}",
        "eta": f"{measured['train/eta']:.2f}",
        "|dM|": f"{measured['train/gradient_norm_m']:.1e}",
        "|dL|": f"{measured['train/gradient_norm_l']:.1e}",
        "images/s": f"{measured['speed/images_per_second']:.1f}",
        "wait": f"{measured['speed/data_wait_share']:.0%}",
        "GiB": f"{measured['speed/peak_memory_gib']:.1f}",
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory used so far: of the GPU where there is one, else of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
