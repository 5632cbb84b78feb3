"""Signals that ask to stop: a rank writes a checkpoint first, a program over several jobs ends them first."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1  # prctl(2)
_ENDED = -1  # the number of no process
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a program to stop; SIGHUP: its terminal has gone."""


@contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals] = STOPPING
) -> Iterator[None]:
    """Let a function handle signals, and give them back to whoever had them.

    One that is ignored stays so: nohup ignores SIGHUP. One whose handler is not Python's cannot be put back, and stays.
    Python lets only the main thread handle signals; in another nothing is changed.
    """
    main = threading.current_thread() is threading.main_thread()
    heeded = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)] if main else []
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class StopRequest:
    """Set by a signal, read between steps and between batches that are scored; all ranks then agree.

    Signals reach ranks one after another or only one of them: `mdnet_dist.watch` carries the wish to the others.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        # Python lets only the main thread handle signals. Ray Train runs training in another one, and stops it itself.
        heeded = self.SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._receive) for number in heeded}

    @property
    def handles(self) -> bool:
        """Whether this process can be told by signals at all."""
        return bool(self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def restore(self, *, ignore: bool = False) -> None:
        """Give the signals back to whoever had them. Args: ignore: or heed them no more: this program is ending."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)


def launcher_is_gone() -> bool:
    """Whether the launcher that started this process has ended; False where none did.

    SIGTERM ends DeepSpeed's launcher at once and leaves what it started behind (0.19.8, launcher/runner.py), so that
    ranks must notice it themselves. Whom to watch is noted at the first call.
    """
    launchers = _launchers()
    if not launchers:
        return False
    if os.getppid() != launchers[0]:
        return True
    return len(launchers) > 1 and _parent_of(launchers[0]) != launchers[1]


@functools.cache
def _launchers() -> tuple[int, ...]:
    """Process numbers of who started this process: DeepSpeed's are two, `deepspeed` and one a machine below it."""
    if "LOCAL_SIZE" not in os.environ:  # set by DeepSpeed's launcher and by `mdnet_dist.supervisor`
        return ()
    import psutil

    number = os.getppid()
    try:
        parent = psutil.Process(number)
        by_deepspeed = any("deepspeed.launcher.launch" in word for word in parent.cmdline())
        if not by_deepspeed:
            return (number,)
        runner = parent.ppid()
        if os.environ.get("CROSS_SIZE") == "1" and not _is_runner(runner):  # one machine
            runner = _ENDED  # it was told to stop before this process was started
        return number, runner
    except psutil.Error:  # it has ended since, or is not of this container
        return (number,)


def _is_runner(process: int) -> bool:
    """Whether a process is the `deepspeed` (or `ds`) that a person started."""
    import psutil

    return any("deepspeed" in word or word.endswith("/ds") for word in psutil.Process(process).cmdline()[:3])


def _parent_of(process: int) -> int | None:
    import psutil

    try:
        return int(psutil.Process(process).ppid())
    except psutil.NoSuchProcess:
        return None


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it ends. Linux only; elsewhere nothing
    changes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def ignore_in_worker(worker: int) -> None:
    """Start of a loader process: the signal is for the rank, which still needs its loaders until it has stopped.

    A rank that is killed takes them with it: they hold copies of its connections, and while these are open the other
    ranks do not notice.
    """
    die_with_parent()
    for number in (*StopRequest.SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
