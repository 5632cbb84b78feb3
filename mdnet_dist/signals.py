"""Signals that ask to stop: a rank writes a checkpoint first, a program over several jobs ends them first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

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
    """Set by a signal, read once a step; all ranks then agree, because signals reach them one after another."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        # Python lets only the main thread handle signals. Ray Train runs training in another one, and stops it itself.
        heeded = self.SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._receive) for number in heeded}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def ignore_in_worker(worker: int) -> None:
    """Start of a loader process: the signal is for the rank, which still needs its loaders until it has stopped."""
    for number in (*StopRequest.SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
