"""What a run costs besides its steps: starting, scoring, saving, memory.

A real run of `launch/train.py` is measured, in a process of its own and over a few epochs, by stopwatches around what
it calls; nothing is left out and nothing added. Its seconds a step, an evaluation and a checkpoint, times as many as
the configuration has, are the shares of the whole run. A network that has seen one epoch says longer sentences than a
trained one, so that the share of evaluations comes out too large rather than too small. On CPUs it has one thread:
several wait for each other without resting, and whatever else runs on the machine slows them down tenfold.
"""

from __future__ import annotations

import functools
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from mdnet_dist.benchmark.rows import Row
from mdnet_dist.benchmark.scaling_suite import LARGE_PX
from mdnet_dist.benchmark.subject import Subject
from mdnet_dist.benchmark.timing import Spread, wait_for
from mdnet_dist.config import RunConfig
from mdnet_dist.config_file import as_yaml
from mdnet_dist.distributed import outside_of_a_job
from mdnet_dist.step_report import peak_memory_bytes

HELP_SECONDS = 1.0
SHARE = 0.1
"""Of a run's wall clock, for evaluations and for checkpoints."""
WARM_STEPS = 3
"""Steps that are left out: kernels are chosen, buffers made."""
PROGRAM = Path("launch", "train.py")


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One call of what a stopwatch is on. Seconds since the program was started."""

    name: str
    begun: float
    ended: float

    @property
    def seconds(self) -> float:
        """From begin to end."""
        return self.ended - self.begun


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes in training, of the process or of its GPU."""

    before: int  # the first step: imports, weights, optimiser's state
    gradients: int
    activations: int  # kept for the backward pass, each storage once
    batch: int
    peak: int  # up to the end of a later step

    @property
    def needed(self) -> int:
        """Bytes of all that must be held at once."""
        return self.before + self.gradients + self.activations + self.batch


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A run that was measured."""

    laps: list[Lap]
    memory: Memory
    seconds: float  # from start to end of the process

    def seconds_of(self, name: str) -> list[float]:
        """Of every call."""
        return [lap.seconds for lap in self.laps if lap.name == name]


def measure(subject: Subject) -> list[Row]:
    """The rows of a configuration; of one whose run would take too long on a CPU none."""
    if subject.device.type == "cpu" and subject.config.data.image_size >= LARGE_PX:
        return []
    epochs = 1 if subject.short else 4
    watched = watch_run(subject.config, epochs)
    return [
        *_help_rows(3 if subject.short else 9),
        *start_rows(watched, subject.name),
        *share_rows(watched, subject.config, subject.data.steps_per_epoch, subject.name),
        *memory_rows(watched.memory, subject.name),
    ]


# ----------------------------------------------------------------------------------------------------------------- rows


def _help_rows(times: int) -> list[Row]:
    """How long a person waits for `--help`; the interpreter alone beside it."""
    help_text, nothing = [], []
    for _ in range(times):
        help_text.append(_seconds_of([sys.executable, str(PROGRAM), "--help"]))
        nothing.append(_seconds_of([sys.executable, "-c", "pass"]))
    row = functools.partial(Row.of, suite="overhead", config="", unit="s")
    return [
        row(Spread.of(help_text), name=f"{PROGRAM} --help", target=HELP_SECONDS, better="less"),
        row(Spread.of(nothing), name="python -c pass"),
    ]


def start_rows(watched: Watched, config: str) -> list[Row]:
    """From the start of the program to the end of its first step, and what takes how much of that."""
    first = next(lap for lap in watched.laps if lap.name == "step")
    before = {lap.name: lap for lap in reversed(watched.laps) if lap.ended <= first.begun}  # the first of each name
    trainer, deepspeed, engine = before["trainer"], before["DeepSpeed"], before["engine"]
    parts = {
        "imports (torch, ours)": trainer.begun,
        "import of DeepSpeed": deepspeed.seconds,
        "opening the data": before["data"].seconds,
        "network and engine": engine.seconds,
        "MLflow and its store": before["tracking"].seconds,
        "first batch and step": first.ended - first.begun,
    }
    parts["the rest"] = first.ended - sum(parts.values())
    rows = [Row(suite="overhead", config=config, name="time to the end of the first step", value=first.ended, unit="s")]
    for name, seconds in parts.items():
        value = seconds / first.ended
        rows.append(
            Row(suite="overhead", config=config, name=f"  {name}", value=value, unit="", note=f"{seconds:.2f} s")
        )
    return rows


def share_rows(watched: Watched, config: RunConfig, steps_per_epoch: int, name: str) -> list[Row]:
    """What the whole run of a configuration spends on evaluations, checkpoints and results."""
    train = config.train
    begins = [lap.begun for lap in watched.laps if lap.name == "step"]
    breaks = [lap.begun for lap in watched.laps if lap.name in ("evaluate", "save")]
    steps = [
        after - before
        for before, after in zip(begins[WARM_STEPS:], begins[WARM_STEPS + 1 :])
        if not any(before < moment < after for moment in breaks)
    ]
    finish = next(lap for lap in watched.laps if lap.name == "finish")
    within = [lap for lap in watched.laps if lap.name == "evaluate" and lap.ended <= finish.begun]
    last = [lap.seconds for lap in watched.laps if lap.name == "evaluate" and lap.begun >= finish.begun]
    final = sum(last)
    # The first one loads WordNet. A later one takes what those within training took, or as much as the one of the same
    # part at the end, which looks for images besides.
    one = statistics.fmean([lap.seconds for lap in within[1:]] or last[:1])
    evaluations = -(-train.epochs // config.evaluate.every_epochs)
    # A new best score is saved besides: at most one an evaluation, and not twice after the same epoch.
    saves = min(train.epochs, train.epochs // train.checkpoint_every_epochs + evaluations)
    if train.checkpoint_every_steps:
        saves += train.epochs * steps_per_epoch // train.checkpoint_every_steps
    seconds = {
        "steps": train.epochs * steps_per_epoch * statistics.median(steps),
        "start": begins[0],
        "evaluations": within[0].seconds + (evaluations - 1) * one + final,
        "checkpoints": saves * statistics.fmean(watched.seconds_of("save")),
        "results": watched.seconds - finish.begun - final,
    }
    whole = sum(seconds.values())
    row = functools.partial(Row, suite="overhead", config=name, unit="")
    return [
        row(
            name="evaluations' share of the run",
            value=seconds["evaluations"] / whole,
            target=SHARE,
            better="less",
            note=f"the first {within[0].seconds:.2f} s, {evaluations - 1} of {one:.2f} s, {final:.2f} s at the end",
        ),
        row(
            name="checkpoints' share of the run",
            value=seconds["checkpoints"] / whole,
            target=SHARE,
            better="less",
            note=f"{saves} of {statistics.fmean(watched.seconds_of('save')):.3f} s",
        ),
        row(name="  both together", value=(seconds["evaluations"] + seconds["checkpoints"]) / whole),
        row(name="  the start's", value=seconds["start"] / whole),
        row(name="  pictures', pages' and the served model's", value=seconds["results"] / whole),
        row(name="  steps'", value=seconds["steps"] / whole, note=f"of {whole:.0f} s in all"),
    ]


def memory_rows(memory: Memory, config: str) -> list[Row]:
    """The peak of training by what had to be held."""
    named = {
        "before the first step": memory.before,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "batch": memory.batch,
    }
    told = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in named.items())
    return [
        Row(
            suite="overhead",
            config=config,
            name="peak memory by what must be held",
            value=memory.peak / memory.needed,
            unit="x",
            better="less",
            note=f"{memory.peak / 2**20:.0f} MiB; {told}",
        )
    ]


def _seconds_of(command: list[str]) -> float:
    begun = time.monotonic()
    subprocess.run(command, cwd=_checkout(), stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - begun


def _checkout() -> Path:
    """Where launch/ is."""
    return Path(__file__).resolve().parents[2]


# ----------------------------------------------------------------------------------------------------------- a real run


def watch_run(config: RunConfig, epochs: int) -> Watched:
    """Train so many epochs with `launch/train.py`, evaluating after each, in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="mdnet-benchmark-") as folder:
        changed = {
            "runs_folder": folder,
            "data": config.data.model_copy(update={"shards": _absolute(config.data.shards)}),
            "train": config.train.model_copy(update={"epochs": epochs}),
            "evaluate": config.evaluate.model_copy(update={"every_epochs": 1}),
            "tracking": config.tracking.model_copy(update={"uri": f"sqlite:///{Path(folder, 'mlflow.db')}"}),
        }
        described, found = Path(folder, "config.yaml"), Path(folder, "laps.json")
        described.write_text(as_yaml(config.model_copy(update=changed)))
        wordnet = Path(config.runs_folder, "nltk_data").absolute()
        environment = {"OMP_NUM_THREADS": "1"} | ({"NLTK_DATA": str(wordnet)} if wordnet.is_dir() else {})
        begun = time.monotonic()
        program = subprocess.run(
            [sys.executable, "-m", __name__, repr(begun), str(found), str(described)],
            cwd=_checkout(),
            env={**outside_of_a_job(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.monotonic() - begun
        if program.returncode:
            raise RuntimeError(f"{PROGRAM} ended with code {program.returncode}:\n{program.stdout[-3000:]}")
        told = json.loads(found.read_text())
    return Watched(laps=[Lap(**lap) for lap in told["laps"]], memory=Memory(**told["memory"]), seconds=seconds)


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).absolute())


class Stopwatches:
    """In the process that trains: notes when what it calls begins and ends, and the memory of its first steps."""

    def __init__(self, begun: float) -> None:
        """Args: begun: `time.monotonic` at the start of the process."""
        self._begun = begun
        self.laps: list[Lap] = []
        self.memory: Memory | None = None
        self._before = self._peak = 0

    def put_on(self, owner: Any, attribute: str, name: str) -> None:
        """Time every call of `owner.attribute`."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.monotonic()
            try:
                return function(*arguments, **named)
            finally:
                ended = time.monotonic()
                self.laps.append(Lap(name=name, begun=begun - self._begun, ended=ended - self._begun))

        setattr(owner, attribute, timed)

    def step(self, trainer: Any, batches: Any, launch: Callable[..., Any]) -> Any:
        """A training step, with a look at the memory before the first, after the third and inside the fourth."""
        number = trainer.step
        if number == 0:
            self._before = _memory_now(trainer.device)
        if number != WARM_STEPS:
            launched = launch(trainer, batches)
            if number == 0:
                wait_for(trainer.device)
            if number == WARM_STEPS - 1:
                self._peak = peak_memory_bytes(trainer.device)
            return launched
        held = {tensor.untyped_storage().data_ptr() for tensor in trainer.network.state_dict(keep_vars=True).values()}
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        def unchanged(tensor: torch.Tensor) -> torch.Tensor:
            return tensor

        batch = next(batches)
        with torch.autograd.graph.saved_tensors_hooks(note, unchanged):
            launched = launch(trainer, iter([batch]))
        weights = [weight for weight in trainer.network.parameters() if weight.requires_grad]
        self.memory = Memory(
            before=self._before,
            gradients=sum(weight.numel() * weight.element_size() for weight in weights),
            activations=sum(size for place, size in saved.items() if place not in held),
            batch=sum(tensor.nbytes for tensor in (batch.images, batch.labels, batch.tokens)),
            peak=self._peak,
        )
        return launched

    def as_json(self) -> Mapping[str, Any]:
        """What `watch_run` reads."""
        assert self.memory is not None, "the run had too few steps"
        return {"laps": [vars(lap) for lap in self.laps], "memory": vars(self.memory)}


def _memory_now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _main(begun: str, found: str, config: str) -> None:
    """Run `launch/train.py CONFIG` under stopwatches and write what they say."""
    from mdnet_dist import engine, run, trainer

    watches = Stopwatches(float(begun))
    launch = trainer.Trainer._launch

    def step(self: trainer.Trainer, batches: Any) -> Any:
        return watches.step(self, batches, launch)

    trainer.Trainer._launch = step  # type: ignore[method-assign]
    for owner, attribute, name in (
        (engine, "_import_deepspeed", "DeepSpeed"),
        (trainer, "open_data", "data"),
        (engine.Engine, "__init__", "engine"),
        (trainer.Trainer, "__init__", "trainer"),
        (trainer.Trainer, "_launch", "step"),
        (trainer.Trainer, "evaluate", "evaluate"),
        (trainer.Trainer, "save", "save"),
        (trainer.Trainer, "finish", "finish"),
        (run, "_start_tracking", "tracking"),
    ):
        watches.put_on(owner, attribute, name)
    sys.argv = [str(PROGRAM), config]
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    finally:
        Path(found).write_text(json.dumps(watches.as_json()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
