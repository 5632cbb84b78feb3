"""SIGTERM and SIGUSR1: a request to write a checkpoint and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType


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
