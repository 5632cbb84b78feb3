"""Processes that train, one thread each, and measure steps when they are told to: what `scaling_suite` compares.

Forks of a process that has imported everything, so that a group starts in a second or two. Groups that are not measured
wait for the next request and need no processor.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mdnet_dist.benchmark.timing import wait_for
from mdnet_dist.config import RunConfig
from mdnet_dist.data import Batch
from mdnet_dist.distributed import barrier, leave
from mdnet_dist.machine import free_port
from mdnet_dist.signals import die_with_parent
from mdnet_dist.trainer import Trainer

SECONDS_AT_MOST = 300.0
"""For one request; the first start on a machine may compile an operator of DeepSpeed."""

_COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all_single", "barrier",
    "broadcast", "broadcast_object_list", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Some steps of one rank. Times are of a clock that all processes of this machine share."""

    begun: float  # seconds
    ended: float
    processor: float  # seconds of processor time
    exchanging: float  # seconds in exchanges, waiting for the other rank included
    exchanges: dict[str, int] = field(default_factory=dict)  # {collective: times a step}
    exchanged_bytes: dict[str, int] = field(default_factory=dict)  # {collective: bytes a step that a rank hands over}

    @property
    def seconds(self) -> float:
        """From begin to end."""
        return self.ended - self.begun

    @property
    def held_up(self) -> float:
        """Share of the time in which a CPU's rank neither computed nor exchanged: another program had its core."""
        return max(0.0, 1 - (self.processor + self.exchanging) / self.seconds)


def interval(ranks: Sequence[Steps]) -> float:
    """Seconds from where the first rank began to where the last one had done."""
    return max(rank.ended for rank in ranks) - min(rank.begun for rank in ranks)


class Group:
    """Ranks of one job, ready to be asked."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = list(pipes)

    def ask(self, name: str, *arguments: Any) -> None:
        """Have every rank begin `Session.NAME(*arguments)`."""
        for pipe in self._pipes:
            pipe.send((name, arguments))

    def answers(self) -> list[Any]:
        """What the ranks gave, in their order.

        Raises:
            RuntimeError: a rank failed, died or gave nothing for `SECONDS_AT_MOST`; with its traceback.
        """
        deadline = time.monotonic() + SECONDS_AT_MOST
        found: dict[Connection, Any] = {}
        while len(found) < len(self._pipes):
            waiting = [pipe for pipe in self._pipes if pipe not in found]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{len(waiting)} of {len(self._pipes)} ranks did not answer in {SECONDS_AT_MOST} s")
            for pipe in waiting:
                if pipe in ready:
                    found[pipe] = _received(pipe)
        return [found[pipe] for pipe in self._pipes]

    def steps(self, *arguments: Any) -> list[Steps]:
        """`Session.steps` of every rank."""
        self.ask("steps", *arguments)
        return self.answers()


def together(groups: Sequence[Group], *arguments: Any) -> list[Steps]:
    """`Session.steps` of all ranks of several jobs, at the same time."""
    for group in groups:
        group.ask("steps", *arguments)
    return [steps for group in groups for steps in group.answers()]


@contextlib.contextmanager
def started(config: RunConfig, sizes: Sequence[int]) -> Iterator[list[Group]]:
    """Jobs of `sizes` ranks, all waiting. Rank r of each has device r, but jobs of one rank count up: 0, 1, ...

    Args:
        config: its run folders are made below a folder that is removed at the end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes: list[Any] = []
    groups: list[list[Connection]] = []
    alone = itertools.count()
    with tempfile.TemporaryDirectory(prefix="mdnet-benchmark-") as folder:
        try:
            for number, ranks in enumerate(sizes):
                groups.append([])
                place = Path(folder, str(number))
                place.mkdir()
                port = free_port()
                for rank in range(ranks):
                    job = {
                        "RANK": rank,
                        "LOCAL_RANK": next(alone) if ranks == 1 else rank,
                        "WORLD_SIZE": ranks,
                        "LOCAL_WORLD_SIZE": ranks,
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": port,
                    }
                    here, there = context.Pipe()
                    environment = {name: str(value) for name, value in job.items()}
                    processes.append(context.Process(target=_serve, args=(there, environment, config, place)))
                    processes[-1].start()
                    there.close()
                    groups[-1].append(here)
            found = [Group(pipes) for pipes in groups]
            for group in found:
                group.answers()
            yield found
            for pipes in groups:
                for pipe in pipes:
                    pipe.send(None)
            for process in processes:
                process.join(SECONDS_AT_MOST)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
            for pipe in itertools.chain(*groups):
                pipe.close()


def _received(pipe: Connection) -> Any:
    try:
        answer, failure = pipe.recv()
    except EOFError:
        raise RuntimeError("a rank of the benchmark died") from None
    if failure is not None:
        raise RuntimeError(f"a rank of the benchmark failed:\n{failure}")
    return answer


# ------------------------------------------------------------------------------------------------------------ in a rank


class Session:
    """A trainer in one rank, with batches in memory."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.exchanges = Exchanges()
        self.trainer = Trainer(config, with_test=False, folder=folder)
        self.exchanges.device = self.trainer.device
        self._batches: dict[int, Iterator[Batch]] = {}

    def steps(self, global_batch: int, count: int, wait: bool = False) -> Steps:
        """Train some steps, from the same moment on all ranks. Collective.

        Args:
            global_batch: images in a step; a rank computes its share at once.
            wait: for a GPU around each exchange: its time is then known, and that of the steps no more.
        """
        trainer = self.trainer
        train = trainer.config.train.model_copy(update={"global_batch": global_batch, "micro_batch": global_batch})
        trainer.config = trainer.config.model_copy(update={"train": train})
        if global_batch not in self._batches:
            loader = trainer.data.training_batches(trainer.config, 0, 4, pin_memory=False)
            self._batches[global_batch] = itertools.cycle([batch.to(trainer.device) for batch in loader])
        barrier()
        self.exchanges.begin(wait)
        begun, processor = time.monotonic(), time.process_time()
        for _ in range(count):
            trainer.train_step(self._batches[global_batch])
        wait_for(trainer.device)
        ended, processor = time.monotonic(), time.process_time() - processor
        seconds, times, sizes = self.exchanges.end()
        return Steps(
            begun=begun,
            ended=ended,
            processor=processor,
            exchanging=seconds,
            exchanges={name: number // count for name, number in times.items()},
            exchanged_bytes={name: number // count for name, number in sizes.items()},
        )

    def exchange(self, numbers: int, times: int) -> list[float]:
        """Seconds of adding up so many fp32 numbers over the ranks, repeatedly. Collective."""
        values = torch.zeros(numbers, device=self.trainer.device)
        seconds = []
        for _ in range(times):
            barrier()
            wait_for(self.trainer.device)
            begun = time.monotonic()
            dist.all_reduce(values)
            wait_for(self.trainer.device)
            seconds.append(time.monotonic() - begun)
        return seconds

    def weights(self) -> int:
        """Numbers in the gradient."""
        return sum(weight.numel() for weight in self.trainer.network.parameters() if weight.requires_grad)


class Exchanges:
    """What goes through torch's collectives: how often, how many bytes, how long."""

    def __init__(self) -> None:
        """Put a wrapper around each. Before DeepSpeed is imported: it keeps references to some of them."""
        self.device = torch.device("cpu")
        self._on = self._wait = False
        self._seconds, self._times, self._bytes = 0.0, dict[str, int](), dict[str, int]()
        for name in _COLLECTIVES:
            setattr(dist, name, self._noting(name, getattr(dist, name)))

    def begin(self, wait: bool) -> None:
        """Note what follows. Args: wait: for the device around each exchange."""
        self._on, self._wait = True, wait
        self._seconds, self._times, self._bytes = 0.0, {}, {}

    def end(self) -> tuple[float, dict[str, int], dict[str, int]]:
        """Seconds, {collective: times} and {collective: bytes} since `begin`."""
        self._on = False
        return self._seconds, self._times, self._bytes

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*arguments: Any, **named: Any) -> Any:
            if not self._on:
                return function(*arguments, **named)
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            # The larger of what goes in and what comes out: the whole of what is gathered or scattered.
            size = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            self._times[name] = self._times.get(name, 0) + 1
            self._bytes[name] = self._bytes.get(name, 0) + size
            if self._wait:
                wait_for(self.device)
            begun = time.monotonic()
            result = function(*arguments, **named)
            if self._wait:
                wait_for(self.device)
            self._seconds += time.monotonic() - begun
            return result

        return noted


def _serve(pipe: Connection, environment: dict[str, str], config: RunConfig, folder: Path) -> None:
    """A rank's program: answer requests until there are no more."""
    die_with_parent()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        session = Session(config, folder)
        pipe.send((None, None))
        while (request := pipe.recv()) is not None:
            name, arguments = request
            pipe.send((getattr(session, name)(*arguments), None))
    except EOFError:  # whoever asks has gone
        return
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    finally:
        leave()
