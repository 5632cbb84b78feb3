"""Seconds of training until the diagnosis of the validation part is right in 85 %, against the straightforward program.

Both train the same network from the same weights on the same images with the same rates, and are scored by the same
code after each epoch, which is not counted. What differs is how a step is computed, and with it the rounding, so that
they reach the score after a like number of epochs but not after the same.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import torch

from mdnet_dist.benchmark.rows import Row
from mdnet_dist.benchmark.straightforward import Straightforward
from mdnet_dist.benchmark.subject import Subject
from mdnet_dist.benchmark.timing import Spread, wait_for
from mdnet_dist.errors import InputError
from mdnet_dist.evaluation import evaluate
from mdnet_dist.schedules import beta_at
from mdnet_dist.trainer import Trainer, Validation

T = TypeVar("T")

SCORE, ENOUGH = "dca", 0.85
SEEDS = 3
LARGEST_IMAGE_PX = 128
"""Of the configurations that a laptop trains to the end."""


def measure(subject: Subject) -> list[Row]:
    """All rows of one configuration; none of those that take hours.

    Raises:
        InputError: a seed does not come to the score.
    """
    if subject.config.data.image_size > LARGEST_IMAGE_PX and subject.device.type == "cpu":
        return []
    ours: list[float] = []
    theirs: list[float] = []
    epochs: dict[str, list[float]] = {"ours": [], "straightforward": []}
    for seed in range(1 if subject.short else SEEDS):
        of_seed = subject.changed(train={"seed": seed})
        for name, run, seconds in (("ours", _train, ours), ("straightforward", _train_straightforwardly, theirs)):
            taken, after = run(of_seed)
            seconds.append(taken)
            epochs[name].append(after)
    ratio = Spread.of([below / above for below, above in zip(theirs, ours)])
    fields: dict[str, Any] = {"suite": "quality", "config": subject.name}
    return [
        Row.of(Spread.of(ours), name=f"seconds to {SCORE} {ENOUGH}", unit="s", note=_after(epochs["ours"]), **fields),
        Row.of(Spread.of(theirs), name="  straightforward", unit="s", note=_after(epochs["straightforward"]), **fields),
        Row.of(ratio, name="  faster", unit="x", target=4.0, note="of each seed", **fields),
    ]


def _after(epochs: list[float]) -> str:
    return f"after {', '.join(f'{number:.0f}' for number in epochs)} epochs"


def _train(subject: Subject) -> tuple[float, float]:
    """Seconds and epochs to the score, by this project's trainer."""
    stopwatch = _Stopwatch(subject.device)
    reached: list[int] = []

    with tempfile.TemporaryDirectory(prefix="mdnet-benchmark-") as folder, redirect_stdout(io.StringIO()):
        config = subject.changed(
            evaluate={"every_epochs": 1}, train={"checkpoint_every_epochs": subject.config.train.epochs}
        ).config.model_copy(update={"runs_folder": folder})
        trainer = Trainer(config, with_test=False)
        trainer.nltk_data = Path(subject.config.runs_folder) / "nltk_data"
        scored, saved = trainer.evaluate, trainer.save
        trainer.evaluate = stopwatch.left_out(scored)  # type: ignore[method-assign]
        trainer.save = stopwatch.left_out(saved)  # type: ignore[method-assign]

        def goes_on(validation: Validation) -> bool:
            if validation.metrics[f"val/{SCORE}"] >= ENOUGH:
                reached.append(validation.epoch)
            return not reached

        stopwatch.begin()
        trainer.train(on_validation=goes_on)
        seconds = stopwatch.seconds()
        trainer.close()
    return seconds, float(_first(reached, subject))


def _train_straightforwardly(subject: Subject) -> tuple[float, float]:
    """The same by the straightforward program, which reads its batches with the same loader."""
    config, data = subject.config, subject.data
    network = subject.network(config.train.seed)
    steps = config.train.epochs * data.steps_per_epoch
    program = Straightforward(network, config.optimizer, clip_norm=config.train.clip_norm)
    stopwatch = _Stopwatch(subject.device)

    def score() -> float:
        network.eval()
        batches = data.evaluation_batches(config, data.validation, pin_memory=False)
        with torch.no_grad():
            found = evaluate(
                network,
                data.card,
                batches,
                device=subject.device,
                nltk_data=Path(config.runs_folder) / "nltk_data",
            )
        network.train()
        return found.metrics[SCORE]

    uncounted = stopwatch.left_out(score)
    reached: list[int] = []
    batches = iter(data.training_batches(config, 0, steps, subject.device.type == "cuda"))
    stopwatch.begin()
    for step in range(steps):
        batch = next(batches).to(subject.device)
        program.beta = beta_at(config.blend.beta, (step + 0.5) / steps)
        program.schedule((step + 0.5) / steps)
        program.step(data.card.normalise(batch.images).contiguous(), batch)
        if (step + 1) % data.steps_per_epoch == 0 and uncounted() >= ENOUGH:
            reached.append((step + 1) // data.steps_per_epoch)
            break
    return stopwatch.seconds(), float(_first(reached, subject))


def _first(reached: list[int], subject: Subject) -> int:
    if not reached:
        raise InputError(
            f"{subject.name}: {SCORE} of the validation part stays below {ENOUGH} in {subject.config.train.epochs} "
            "epochs; raise train.epochs"
        )
    return reached[0]


class _Stopwatch:
    """Counts seconds, but for those of some calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = 0.0
        self._left_out = 0.0

    def begin(self) -> None:
        self._begun, self._left_out = self._now(), 0.0

    def seconds(self) -> float:
        return self._now() - self._begun - self._left_out

    def left_out(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, whose time does not count."""

        def called(*arguments: object, **keywords: object) -> T:
            before = self._now()
            try:
                return function(*arguments, **keywords)
            finally:
                self._left_out += self._now() - before

        return called

    def _now(self) -> float:
        wait_for(self._device)
        return time.perf_counter()
