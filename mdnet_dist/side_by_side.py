"""Several programs of the DeepSpeed launcher, some of them at a time: started, watched, stopped.

Each gets a process group of its own and writes to a log file. To stop one, the group is signalled, not the launcher
alone: that would leave its ranks behind without a parent. The ranks write a checkpoint and end; the group is killed
only if something of it is still there after `STOP_SECONDS`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
        return ["--include", "localhost:" + ",".join(str(first + number) for number in range(self.accelerators))]

    def environment(self) -> dict[str, str]:
        """Variables that share out the CPU's cores."""
        if self.gpus:
            return {}
        processes = self.side_by_side * self.accelerators
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), "DS_ACCELERATOR": "cpu"}


def launcher_command(arguments: Sequence[str], devices: Devices) -> list[str]:
    """The DeepSpeed launcher of this Python, on a port that no other job has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [sys.executable, launcher, "-q", "--master_port", str(port), *devices.launcher_options(), *arguments]


class Running:
    """A job that has been started."""

    def __init__(self, job: Job, devices: Devices, keep_open: Sequence[int] = ()) -> None:
        """Args: keep_open: file descriptors that it inherits, so that a lock lasts as long as it does."""
        self.job, self.devices = job, devices
        command = launcher_command(job.arguments, devices)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a", encoding="utf-8") as log:
            log.write("$ deepspeed " + " ".join([*devices.launcher_options(), *job.arguments]) + "\n")
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
        with open(self.job.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

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

    Whatever ends this function, an exception from a signal included, no process is left behind.

    Args:
        accelerators: for each job.
        gpus: of this machine; 0 runs on CPUs.
        watch: called a few times a second with what runs and what has ended well.

    Returns:
        the job that failed; None where all ended with exit code 0.
    """
    waiting, done = list(jobs), list[Job]()
    running: list[Running] = []
    try:
        while waiting or running:
            free = sorted(set(range(at_once)) - {one.devices.slot for one in running})
            for slot in free[: len(waiting)]:
                devices = Devices(accelerators=accelerators, slot=slot, side_by_side=at_once, gpus=gpus)
                running.append(Running(waiting.pop(0), devices, keep_open))
            watch(running, done)
            time.sleep(POLL_SECONDS)
            for one in [one for one in running if one.exit_code() is not None]:
                running.remove(one)
                if one.exit_code() != 0:
                    return one
                done.append(one.job)
        watch(running, done)
        return None
    finally:
        for one in running:
            one.ask_to_stop()
        for one in running:
            one.wait_until_gone(STOP_SECONDS)
