"""The ranks of one job on this machine: started, watched, started again when one of them is lost.

What the ranks' exit codes (`mdnet_dist.errors`) lead to, the first that fits:

| ranks | job |
| --- | --- |
| all 0 | 0 |
| one 2 | 2: the input is wrong, and would be so again |
| one 3 | 3: the loss is not finite, and would be so again |
| told to stop, by a signal to this program or to a rank | 143, after Ctrl-C 130 |
| else: killed, 75 (`RankLost`: misses another one), any other code | started again; 3 after the last of the restarts |

Each rank has a session of its own: a signal reaches it once, from here, and what it leaves behind can be found by its
process group. When this program is killed, the ranks are told to stop by the kernel (on Linux) and notice it themselves
(`mdnet_dist.signals.launcher_is_gone`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from mdnet_dist.errors import SUPERVISED, InputError, Preempted, RankLost, TrainingFailed
from mdnet_dist.machine import free_port
from mdnet_dist.signals import STOPPING, die_with_parent, handled_by

GRACE_SECONDS = 20.0
"""How long ranks may go on that have lost one: they take 13 s at most to find out who it was (`mdnet_dist.watch`)."""
STOP_SECONDS = 60.0
"""How long ranks that are told to stop may take to write a checkpoint."""
POLL_SECONDS = 0.1

_INTERRUPTED = 130  # after Ctrl-C


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a rank ended."""

    code: int  # exit code, or minus the number of the signal that killed it
    overdue: bool = False  # it did not end by itself, and was killed from here

    @property
    def gone(self) -> bool:
        """Whether it died, by itself: rather than of the loss of another one, or because it was told to."""
        expected = (0, InputError.exit_code, TrainingFailed.exit_code, RankLost.supervised_exit_code)
        return not self.overdue and self.code not in expected and not self.stopped

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop: having no handler yet, it dies of that signal."""
        codes = (Preempted.exit_code, _INTERRUPTED, *(-number for number in STOPPING))
        return not self.overdue and self.code in codes


def supervise(
    command: Sequence[str],
    ranks: int,
    *,
    restarts: int,
    again: Sequence[str] = (),
    fewer_ranks: bool = False,
    environment: Callable[[Sequence[int]], Mapping[str, str]] = lambda places: {},
    told_to_stop: Callable[[], bool] = lambda: False,
    grace_seconds: float = GRACE_SECONDS,
    stop_seconds: float = STOP_SECONDS,
) -> int:
    """Run a job to its end, however often its ranks are lost. Whatever ends this function, no process is left behind.

    Args:
        command: of one rank; RANK, WORLD_SIZE and the like are in its environment.
        restarts: how often the job is started again at most.
        again: arguments that are added from the second start on.
        fewer_ranks: start again on the ranks that are left (`survivors`), else on as many as before.
        environment: what else is in the environment of all ranks, by the places that are in use: numbers of ranks at
            the first start.
        told_to_stop: whether the job is to stop for another reason than a signal to this program.
        grace_seconds: as `GRACE_SECONDS`.
        stop_seconds: as `STOP_SECONDS`.

    Returns:
        the exit code of the job.
    """
    places = list(range(ranks))
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    def stopped_by() -> int | None:
        return received[0] if received else signal.SIGTERM if told_to_stop() else None

    with handled_by(note):
        for start in range(restarts + 1):
            arguments = [*command, *(again if start else ())]
            with _started(arguments, len(places), environment(places)) as processes:
                endings, asked = _wait(processes, stopped_by, grace_seconds, stop_seconds)
            code = verdict(endings, asked)
            if code in (Preempted.exit_code, _INTERRUPTED) and any(ending.overdue for ending in endings):
                _say(f"{describe(endings)}: it did not stop in time; --resume continues")
            if code is not None:
                return code
            if start == restarts:
                break
            if fewer_ranks:
                places = survivors(places, endings)
            on = f" on {len(places)} rank{'s' if len(places) > 1 else ''}" if fewer_ranks else ""
            _say(f"{describe(endings)}; starting again from the last checkpoint{on} ({start + 1} of {restarts})")
    _say(f"{describe(endings)}; not started again ({restarts} of {restarts} restarts used), --resume continues")
    return TrainingFailed.exit_code


def verdict(endings: Sequence[Ending], asked: int | None) -> int | None:
    """The exit code of a job whose ranks have ended; None where it is worth starting again.

    Args:
        asked: signal that all ranks were sent to stop them.
    """
    codes = [ending.code for ending in endings]
    if not any(codes):
        return 0
    for code in (InputError.exit_code, TrainingFailed.exit_code):
        if code in codes:
            return code
    if asked is None and not any(ending.stopped for ending in endings):
        return None
    interrupted = asked == signal.SIGINT or (asked is None and {_INTERRUPTED, -signal.SIGINT} & set(codes))
    return _INTERRUPTED if interrupted else Preempted.exit_code


def survivors(places: Sequence[int], endings: Sequence[Ending]) -> list[int]:
    """The places to start again on: those of ranks that did not die by themselves, at least one.

    Who was killed by a signal or ended with an unexpected code counts as gone; where nobody did, who had to be killed
    because the others missed it.
    """
    gone = [ending.gone for ending in endings]
    if not any(gone):
        gone = [ending.overdue for ending in endings]
    left = [place for place, lost in zip(places, gone) if not lost]
    return left or list(places[:1])


def describe(endings: Sequence[Ending]) -> str:
    """Who was lost and how, in words."""
    lost = [(rank, ending) for rank, ending in enumerate(endings) if ending.gone]
    lost = lost or [(rank, ending) for rank, ending in enumerate(endings) if ending.overdue]
    told = [f"rank {rank} {_how(ending)}" for rank, ending in lost[:8]]
    return ", ".join(told) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "") or "a rank hung or was lost"


def _how(ending: Ending) -> str:
    if ending.overdue:
        return "hung and was ended"
    if ending.code > 0:
        return f"ended with code {ending.code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"was killed by {known.get(-ending.code, f'signal {-ending.code}')}"


# ------------------------------------------------------------------------------------------------------------ processes


@contextlib.contextmanager
def _started(command: Sequence[str], ranks: int, shared: Mapping[str, str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of one start; at the end what is left of them is killed, with all that they started."""
    processes: list[subprocess.Popen[bytes]] = []
    job = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "LOCAL_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        SUPERVISED: os.getpid(),
    }
    die_with_us = _dying_with(os.getpid())
    try:
        for rank in range(ranks):
            own = {name: str(value) for name, value in {**job, "RANK": rank, "LOCAL_RANK": rank}.items()}
            processes.append(
                subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **shared, **own},
                    start_new_session=True,
                    preexec_fn=die_with_us,
                )
            )
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    stopped_by: Callable[[], int | None],
    grace_seconds: float,
    stop_seconds: float,
) -> tuple[list[Ending], int | None]:
    """Wait until all have ended, by themselves or because their time is over.

    Returns:
        how each ended, and the signal that they were sent to stop them.
    """
    asked: int | None = None
    deadline: float | None = None
    overdue: set[int] = set()
    while running := [rank for rank, process in enumerate(processes) if process.poll() is None]:
        if asked is None and (number := stopped_by()) is not None:
            asked = number
            for process in processes:
                # No harm in what has ended: send_signal looks first. Whatever the signal was, ranks know SIGTERM.
                process.send_signal(signal.SIGINT if asked == signal.SIGINT else signal.SIGTERM)
            deadline = deadline or time.monotonic() + stop_seconds
        codes = [process.returncode for process in processes if process.returncode]
        if deadline is None and codes:
            saving = Preempted.exit_code in codes  # one that died of the signal itself had nothing to save
            deadline = time.monotonic() + (stop_seconds if saving else grace_seconds)
        if deadline is not None and time.monotonic() >= deadline:
            overdue |= set(running)
            for rank in running:
                processes[rank].kill()  # SIGTERM would make it save, together with ranks that are not there
        time.sleep(POLL_SECONDS)
    return [Ending(code=process.returncode, overdue=rank in overdue) for rank, process in enumerate(processes)], asked


def _dying_with(supervisor: int) -> Callable[[], None]:
    """What a rank does before its program starts: have itself told to stop when the supervisor ends.

    It runs between fork and exec, which is safe here: the supervisor has one thread.
    """

    def prepare() -> None:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != supervisor:  # it has ended meanwhile
            os._exit(Preempted.exit_code)

    return prepare


def _say(line: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr, flush=True)
