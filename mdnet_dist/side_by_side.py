"""Several programs of the DeepSpeed launcher, some of them at a time: started, watched, stopped.

Each gets a process group of its own and writes to a log file. To stop one, the group is signalled, not the launcher
alone: that would leave its ranks behind without a parent. The ranks write a checkpoint and end; the group is killed
only if something of it is still there after `STOP_SECONDS`. A signal that asks this program to stop is obeyed when
that is done, and not before: in the middle of starting or stopping a job it would leave processes behind.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mdnet_dist.errors import InputError
from mdnet_dist.machine import free_port
from mdnet_dist.signals import handled_by

STOP_SECONDS = 60.0
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program to run."""

    name: str
    arguments: list[str]  # of the launcher, after its own options: the script and what it is given
    log: Path  # what it prints goes there, after what is there


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What one of the programs that run side by side may use."""

    accelerators: int  # GPUs, or processes on CPUs
    slot: int = 0  # its place among those that run side by side
    side_by_side: int = 1
    gpus: int = 0  # of this machine

    def launcher_options(self) -> list[str]:
        """On GPUs: which; on CPUs: how many processes."""
        if not self.gpus:
            return ["--num_accelerators", str(self.accelerators)]
        first = self.slot * self.accelerators
        numbers = gpu_numbers(self.gpus)[first : first + self.accelerators]
        return ["--include", "localhost:" + ",".join(numbers)]

    def environment(self) -> dict[str, str]:
        """Variables that share out the CPU's cores."""
        if self.gpus:
            return {}
        processes = self.side_by_side * self.accelerators
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), "DS_ACCELERATOR": "cpu"}


def gpu_numbers(gpus: int) -> list[str]:
    """The machine's numbers of the GPUs that this program may use.

    Beside --include the launcher ignores CUDA_VISIBLE_DEVICES (0.19.8, launcher/runner.py), so that it must be given
    what is visible here by the numbers of the machine: else it would take GPUs that are somebody else's.

    Raises:
        InputError: CUDA_VISIBLE_DEVICES names GPUs in a way that the launcher does not know.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible:
        return [str(number) for number in range(gpus)]
    numbers = [number.strip() for number in visible.split(",")][:gpus]
    if not all(number.isdigit() for number in numbers):
        raise InputError(f"CUDA_VISIBLE_DEVICES {visible}: the DeepSpeed launcher wants GPUs by number, as 0,1")
    return numbers


def launcher_command(arguments: Sequence[str], devices: Devices) -> list[str]:
    """The DeepSpeed launcher of this Python, on a port that no other job has."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [sys.executable, launcher, "-q", "--master_port", str(free_port()), *devices.launcher_options(), *arguments]


class Running:
    """A job that has been started."""

    def __init__(self, job: Job, devices: Devices, keep_open: Sequence[int] = ()) -> None:
        """Args: keep_open: file descriptors that it inherits, so that a lock lasts as long as it does."""
        self.job, self.devices = job, devices
        self.command = shlex.join(["deepspeed", *devices.launcher_options(), *job.arguments])  # as a person types it
        command = launcher_command(job.arguments, devices)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a", encoding="utf-8") as log:
            log.write(f"$ {self.command}\n")
            log.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **devices.environment()},
                start_new_session=True,
                pass_fds=tuple(keep_open),
            )

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def last_line(self) -> str:
        """What it printed last."""
        return next(reversed(self._last_lines()), "")

    def reason(self) -> str:
        """Why it failed: the line with which its program ended (`program.run_program`), else what was printed last."""
        own = f"{Path(self.job.arguments[0]).name}: "
        return next((line for line in reversed(self._last_lines()) if line.startswith(own)), self.last_line())

    def _last_lines(self) -> list[str]:
        with open(self.job.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            text = log.read().decode("utf-8", "replace")
        since_its_start = text.rpartition(f"$ {self.command}\n")[2]
        return [line.strip() for line in since_its_start.splitlines() if line.strip()]

    def ask_to_stop(self) -> None:
        """Send SIGTERM to all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait_until_gone(self, seconds: float) -> None:
        """Wait until no process of it is left; kill what is left after so many seconds."""
        deadline = time.monotonic() + seconds
        while self._is_there() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _is_there(self) -> bool:
        self._process.poll()  # a launcher that has ended and was not waited for counts as a process
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


def run_side_by_side(
    jobs: Sequence[Job],
    at_once: int,
    accelerators: int,
    gpus: int,
    *,
    watch: Callable[[list[Running], list[Job]], None],
    keep_open: Sequence[int] = (),
) -> Running | None:
    """Run all jobs, `at_once` of them at a time, in order; stop at the first that fails.

    Whatever ends this function, no process is left behind. A signal that asks to stop ends it: the jobs are stopped,
    and then the signal does what it would have done at once without this function.

    Args:
        accelerators: for each job.
        gpus: of this machine; 0 runs on CPUs.
        watch: called a few times a second with what runs and what has ended well.

    Returns:
        the job that failed; None where all ended with exit code 0.
    """
    waiting, done = list(jobs), list[Job]()
    running: list[Running] = []
    side_by_side = min(at_once, len(waiting))
    with _signals_held_back() as received, _stopped_at_the_end(running):
        while (waiting or running) and not received:
            free = sorted(set(range(side_by_side)) - {one.devices.slot for one in running})
            for slot in free[: len(waiting)]:
                devices = Devices(accelerators=accelerators, slot=slot, side_by_side=side_by_side, gpus=gpus)
                running.append(Running(waiting.pop(0), devices, keep_open))
            watch(running, done)
            time.sleep(POLL_SECONDS)
            for one in [one for one in running if one.exit_code() is not None]:
                if one.exit_code() != 0:
                    return one  # as one of the running, because ranks may have outlived their launcher
                running.remove(one)
                done.append(one.job)
        watch(running, done)
        return None


@contextlib.contextmanager
def _stopped_at_the_end(running: list[Running]) -> Iterator[None]:
    try:
        yield
    finally:
        for one in running:
            one.ask_to_stop()
        for one in running:
            one.wait_until_gone(STOP_SECONDS)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[list[int]]:
    """The signals that asked to stop so far; the first of them is raised again at the end."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    try:
        with handled_by(note):
            yield received
    finally:
        if received:
            signal.raise_signal(received[0])
