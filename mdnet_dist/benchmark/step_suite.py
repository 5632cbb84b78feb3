"""The training step: against a straightforward program, against plain PyTorch, against what the machine can do at most.

The step that is measured is the whole one: `Trainer.train_until` with its loader processes, DeepSpeed, logging to
MLflow, gradient norms, running statistics. It runs in blocks of steps, in turn with blocks of the others. Before each
block a loader has filled its queue, so the first steps of a block, which use that up, are not counted; and while others
run it has nothing to do.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdnet_dist.benchmark.limits import Limits, measure_limits
from mdnet_dist.benchmark.plain import loss_of, plain_step
from mdnet_dist.benchmark.roofline import Watched
from mdnet_dist.benchmark.rows import Row
from mdnet_dist.benchmark.straightforward import Straightforward
from mdnet_dist.benchmark.subject import Subject
from mdnet_dist.benchmark.timing import Spread, Times, in_turn, wait_for
from mdnet_dist.console import Progress
from mdnet_dist.data import Batch
from mdnet_dist.distributed import computes_in_bf16
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.tracking import open_tracker
from mdnet_dist.trainer import Trainer
from mdnet_dist.vocabulary import SPECIAL_WORDS

UNCOUNTED_STEPS = 4
"""Of a block: what a loader process has ready when it begins, and one more."""
WORDS_OF_A_SENTENCE, TOPICS = 20, 6
"""T and K at which the language model's share of a step is asked for."""


def measure(subject: Subject) -> list[Row]:
    """All rows of one configuration."""
    bf16 = computes_in_bf16(subject.config.train.precision, subject.device)
    limits, step_flops, roofline_seconds = _roofline(subject, bf16=bf16)
    rows = _limits(subject, limits)
    times, waits = _side_by_side(subject, bf16=bf16)
    images = subject.batch
    in_bf16 = "bf16" if bf16 else "fp32"

    def row(name: str, spread: Spread, **fields: Any) -> None:
        rows.append(Row.of(spread, suite="step", config=subject.name, name=name, **fields))

    row(f"images/s, {in_bf16}, batch {images}", images / times.of("trainer"), unit="", note="the whole step")
    row("  faster than the straightforward step", times.ratio("straightforward", "trainer"), unit="x", target=4.0)
    row("  the same without loading and DeepSpeed", times.ratio("straightforward", "plain"), unit="x")
    row("  of plain PyTorch on batches in memory", times.ratio("plain", "trainer"), unit="x", target=0.95)
    roofline = Spread.of([roofline_seconds / seconds for seconds in times.seconds["trainer"]])
    row(
        "  of the roofline",
        roofline,
        unit="x",
        target=0.5 if subject.device.type == "cuda" else 0.6,
        note=f"{roofline_seconds * 1e3:.1f} ms a step",
    )
    peak = limits.peak(torch.bfloat16 if bf16 else torch.float32)
    row(
        "  MFU",
        Spread.of([step_flops / peak / seconds for seconds in times.seconds["trainer"]]),
        unit="",
        note=f"{step_flops / 1e9:.3g} GFLOP a step at {peak / 1e12:.3g} TFLOP/s",
    )
    row("  waits for data", Spread.of(waits), unit="", target=0.02, better="less", note="share of the step")
    return rows + _language_model(subject, bf16=bf16)


def seconds_of_a_step(subject: Subject) -> float:
    """The median of a few steps on batches in memory."""
    bf16 = computes_in_bf16(subject.config.train.precision, subject.device)
    step = plain_step(subject, subject.network(), bf16=bf16)
    return in_turn({"step": lambda: step(subject.batches[0])}, subject.device).of("step").median


def _limits(subject: Subject, limits: Limits) -> list[Row]:
    def row(name: str, spread: Spread, unit: str) -> Row:
        scale = 1e12 if unit == "TFLOP/s" else 1e9
        scaled = Spread(
            median=spread.median / scale, low=spread.low / scale, high=spread.high / scale, count=spread.count
        )
        return Row.of(scaled, suite="limits", config=subject.name, name=name, unit=unit)

    rows = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        rows.append(row(f"matrix product, {name}", limits.matrix_flops[dtype], "TFLOP/s"))
        rows.append(row(f"convolution of its own shapes, {name}", limits.convolution_flops[dtype], "TFLOP/s"))
    rows.append(row("copy, out of every cache", limits.copy_bytes, "GB/s"))
    rows.append(row("copy of the size of a map", limits.near_copy_bytes, "GB/s"))
    return rows


def _roofline(subject: Subject, *, bf16: bool) -> tuple[Limits, int, float]:
    """The limits, the FLOPs of a step and the least seconds it can take."""
    network = subject.network()
    with Watched() as watched:
        loss_of(subject, network, subject.batches[0], bf16=bf16).backward()
    rounds = 5 if subject.short else 12
    limits = measure_limits(subject.device, watched.convolutions, watched.typical_bytes, rounds=rounds)
    return limits, watched.flops, watched.seconds(limits)


def _side_by_side(subject: Subject, *, bf16: bool) -> tuple[Times, list[float]]:
    """Seconds a step of trainer, plain PyTorch and the straightforward program, and the trainer's shares of waiting."""
    steps = 6 if subject.short else 12
    rounds = 5 if subject.short else 9
    straightforward = Straightforward(
        subject.network(), subject.config.optimizer, clip_norm=subject.config.train.clip_norm
    )
    plain = plain_step(subject, subject.network(), bf16=bf16)
    batch = subject.batches[0]
    in_nchw = subject.data.card.normalise(batch.images).contiguous()
    seconds: dict[str, list[float]] = {"trainer": [], "plain": [], "straightforward": []}
    waits: list[float] = []
    with ExitStack() as stack:
        run_steps = stack.enter_context(_Running(subject, steps * (rounds + 1)))
        blocks: dict[str, Callable[[int], float]] = {
            "trainer": run_steps.block,
            "plain": lambda count: _timed(lambda: plain(batch), count, subject.device),
            "straightforward": lambda count: _timed(
                lambda: straightforward.step(in_nchw, batch), max(1, count // 3), subject.device
            ),
        }
        for number in range(rounds + 1):
            taken_by = {}
            for name, block in blocks.items():
                time.sleep(0.3)  # the loader fills its queue
                taken_by[name] = block(steps)
            if number:  # the first round warms up
                for name, taken in taken_by.items():
                    seconds[name].append(taken)
                waits.append(run_steps.waited_seconds / (steps * taken_by["trainer"]))
    return Times(seconds=seconds), waits


def _timed(thing: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds of one of several calls."""
    thing()
    wait_for(device)
    started = time.perf_counter()
    for _ in range(count):
        thing()
    wait_for(device)
    return (time.perf_counter() - started) / count


class _Running:
    """A training of its own, in a folder that goes away, of which blocks of steps are run."""

    def __init__(self, subject: Subject, most_steps: int) -> None:
        self._subject = subject
        self._most_steps = most_steps
        self._stack = ExitStack()
        self.waited_seconds = 0.0  # for data, in the last block

    def __enter__(self) -> _Running:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mdnet-benchmark-")))
        steps = self._most_steps + (self._most_steps + 1) * UNCOUNTED_STEPS
        # Nothing is scored or saved between the steps: that is the overhead suite's.
        changes: dict[str, dict[str, object]] = {
            "train": {"epochs": steps, "checkpoint_every_epochs": steps + 1},
            "evaluate": {"every_epochs": steps + 1},
            "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        }
        config = self._subject.changed(**changes).config.model_copy(update={"runs_folder": str(folder)})
        self._trainer = Trainer(config)
        self._stack.callback(self._trainer.close)
        self._tracker = open_tracker(config.tracking, self._trainer.folder, config.name, {}, {})
        self._stack.callback(self._tracker.close, "FINISHED")
        pinned = self._subject.device.type == "cuda"
        self._loader = iter(self._trainer.data.training_batches(config, 0, self._trainer.steps, pinned))
        self._stack.callback(self._stop_loader)
        self._progress = Progress(self._trainer.steps, 0, config.train.log_every_steps)
        self._stack.callback(self._progress.close)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    def _stop_loader(self) -> None:
        del self._loader

    def _batches(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(self._loader)
            self.waited_seconds += time.perf_counter() - started
            yield batch

    def block(self, steps: int) -> float:
        """Seconds of one of so many steps."""
        self._run(UNCOUNTED_STEPS)
        wait_for(self._subject.device)
        self.waited_seconds = 0.0
        started = time.perf_counter()
        self._run(steps)
        wait_for(self._subject.device)
        return (time.perf_counter() - started) / steps

    def _run(self, steps: int) -> None:
        trainer = self._trainer
        with redirect_stdout(io.StringIO()):  # its progress
            trainer.train_until(trainer.step + steps, self._batches(), self._progress, self._tracker)


# ------------------------------------------------------------------------------------------------ the language model


def _language_model(subject: Subject, *, bf16: bool) -> list[Row]:
    """What L costs where maps are 14 x 14 (224 px), every topic is said, and every sentence has 20 words."""
    network = subject.network()
    if network.language_model is None or subject.config.data.image_size < MAP_14_PX:
        return []
    step = plain_step(subject, network, bf16=bf16)
    one, five = (_told(subject, reports) for reports in (1, 5))
    times = in_turn(
        {"R=1": lambda: step(one), "R=5": lambda: step(five), "without L": _without_language(subject, bf16=bf16)},
        subject.device,
        rounds=4 if subject.short else 10,
        warm_up=1,
    )
    seconds = times.seconds
    share = Spread.of([1 - below / above for below, above in zip(seconds["without L"], seconds["R=1"])])
    report = Spread.of([five / 5 / one for five, one in zip(seconds["R=5"], seconds["R=1"])])
    largest = _largest_kept(subject, network, five, bf16=bf16)
    fields: dict[str, Any] = {"suite": "language model", "config": subject.name, "better": "less"}
    setting = f"K={TOPICS}, T={WORDS_OF_A_SENTENCE}, {subject.config.data.image_size} px"
    return [
        Row.of(share, name="share of the step", unit="", target=1 / 3, note=f"{setting}, R=1", **fields),
        Row.of(report, name="a report at R=5 by one at R=1", unit="x", target=0.4, note=setting, **fields),
        Row(
            value=largest,
            name="largest tensor kept for backward",
            unit="of B K R T P hidden",
            target=0.1,
            note="R=5; a program that keeps one of B K R P hidden for every word has 1",
            **fields,
        ),
    ]


MAP_14_PX = 224
"""Side of the smallest image whose map is that large."""


def _told(subject: Subject, reports: int) -> Batch:
    """A batch whose sentences are there and long, of random words."""
    batch = subject.batches[0]
    shape = len(batch.labels), reports, TOPICS
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(
        len(SPECIAL_WORDS), len(subject.data.card.vocabulary), (*shape, WORDS_OF_A_SENTENCE), generator=generator
    )
    return replace(batch, tokens=words.to(subject.device), lengths=torch.full(shape, WORDS_OF_A_SENTENCE))


def _without_language(subject: Subject, *, bf16: bool) -> Callable[[], None]:
    """The same step of D and M alone."""
    network = subject.network()
    network.language_model = None
    step = plain_step(subject, network, bf16=bf16)
    return lambda: step(subject.batches[0])


def _largest_kept(subject: Subject, network: MDNet, batch: Batch, *, bf16: bool) -> float:
    """The largest piece of memory that L keeps for the backward pass, in numbers of fp32 by B K R T P hidden."""
    assert network.language_model is not None
    with torch.no_grad(), torch.autocast(subject.device.type, torch.bfloat16, enabled=bf16):
        seen = network.see(subject.images_of(batch))
    features = seen.features.requires_grad_()
    kept = [0]

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes() // 4)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast(subject.device.type, torch.bfloat16, enabled=bf16):
        told = network.language_model(features, seen.sharpening_map, batch.tokens, batch.lengths)
        network.language_model.word_losses(told).sum()
    return max(kept) / (batch.tokens.numel() * features[0, 0].numel() * network.language_model.lstm.hidden_size)
