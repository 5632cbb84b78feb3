"""What ranks tell each other beside training: who was told to stop, who no longer answers, who stands still.

Training exchanges tensors, and a rank that waits for a tensor can neither ask nor answer. So a thread on every rank
talks to the others through a store of its own, which the first rank holds:

- A signal reaches one rank, or only the launcher. Within a second every rank's `StopRequest` knows of it.
- Every rank counts what it begins (`Watch.begin`). When something fails because a rank is gone, or nothing has moved
  for `train.patience_seconds`, the ranks call the roll: who does not answer is lost, and of those who answer the one
  that is furthest behind is what the others wait for. A second thread keeps the time, because the first may itself be
  waiting for a store that no longer answers.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mdnet_dist.distributed import is_first, new_store, rank, world_size
from mdnet_dist.errors import LoaderLost, RankLost
from mdnet_dist.program import end_without_the_others
from mdnet_dist.signals import StopRequest, launcher_is_gone

POLL_SECONDS = 0.5
ROLL_CALL_SECONDS = 3.0  # in which a rank that lives has said so several times
LINGER_SECONDS = ROLL_CALL_SECONDS + 2.0  # by which ranks may begin a roll call later than the first
STORE_SECONDS = 10.0  # longest wait for the store in a roll call


_outlasting: list[Any] = []
"""Stores that others may still ask when the watch itself has ended, until this process does."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands, as it told the others."""

    beat: int  # how often it has spoken
    begun: int  # how much it has begun
    what: str  # the last of it

    def __str__(self) -> str:
        return f"{self.beat} {self.begun} {self.what}"

    @staticmethod
    def parse(text: bytes) -> Place:
        """What `str` wrote."""
        beat, begun, what = text.decode().split(" ", 2)
        return Place(beat=int(beat), begun=int(begun), what=what)


class Watch:
    """The watch of one rank over all."""

    def __init__(self, stop: StopRequest, patience_seconds: float, last_resort: str) -> None:
        """Begin. Collective.

        Args:
            stop: of this rank; set where any rank was told to stop, or the launcher has gone.
            patience_seconds: longest time without `begin` or `moved`.
            last_resort: what a person can do when the job has ended, for the message.
        """
        self._stop, self._patience_seconds, self._last_resort = stop, patience_seconds, last_resort
        self._store = new_store() if world_size() > 1 else None
        self._begun, self._what = 0, "training begins"
        self._told = False  # another rank has said why it ends
        self._moved_at = time.monotonic()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=function, name=name, daemon=True)
            for name, function in (("watch", self._talk), ("patience", self._keep_time))
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, what: str) -> None:
        """Note what this rank turns to; every rank notes the same, in the same order."""
        self._begun += 1
        self._what = what
        self._moved_at = time.monotonic()

    def moved(self) -> None:
        """Note that what was begun goes on; ranks may do so as often as each likes."""
        self._moved_at = time.monotonic()

    def close(self) -> None:
        """End the watch of this rank."""
        self._closed.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)

    # ------------------------------------------------------------------------------------------------------ talking

    def _talk(self) -> None:
        """The thread that talks: says that this rank lives, and carries the wish to stop."""
        beat, told = 0, False
        while not self._closed.wait(POLL_SECONDS):
            if launcher_is_gone():
                self._stop.received = True
            if self._store is None:
                continue
            try:
                beat += 1
                self._store.set(_place_key(rank()), str(Place(beat=beat, begun=self._begun, what=self._what)))
                if self._stop.received and not told:
                    self._store.set("stop", "1")
                    told = True
                elif not told and self._store.check(["stop"]):
                    self._stop.received = told = True
                self._told = self._told or self._store.check(["told"])
            except RuntimeError:  # the first rank is gone, or has done all it had to do
                self._store = None

    # ---------------------------------------------------------------------------------------------------- roll call

    def rank_lost(self) -> RankLost:
        """What to raise when an exchange with other ranks has failed: who is lost. Takes some seconds."""
        self._patience_seconds = math.inf  # this rank does move: towards its end
        places = self._call_the_roll()
        return self._lost(lost_ranks(places), places)

    def rank_ends(self, why: str) -> RankLost:
        """What to raise when this rank cannot go on for a reason of its own; the others then say nothing."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set("told", "1")
        _outlasting.append(self._store)
        line = f"rank {rank()}: {why}; {self._last_resort}"
        return RankLost(line, linger_seconds=LINGER_SECONDS if is_first() else 0.0)

    def _lost(self, what: str, places: Mapping[int, Place | None]) -> RankLost:
        _outlasting.append(self._store)
        answering = [number for number, place in places.items() if place is not None]
        return RankLost(
            f"{what}; {self._last_resort}",
            # The first that answers. All do where the first rank is lost with the store: then none knows of the others.
            speaks=rank() == min(answering) and not self._told,
            # The store ends with the first rank, and others may be asking it still.
            linger_seconds=LINGER_SECONDS if rank() == 0 and len(answering) > 1 else 0.0,
        )

    def _keep_time(self) -> None:
        """The thread that keeps the time: ends this process where nothing moves any more."""
        interval = min(1.0, self._patience_seconds / 4)
        looked = time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            if now - looked > interval + 5:  # this process itself was stopped for a while, and may go on
                self._moved_at = now
            looked = now
            if now - self._moved_at > self._patience_seconds:
                places = self._call_the_roll()
                if self._closed.is_set() or time.monotonic() - self._moved_at < self._patience_seconds:
                    continue  # it has moved after all
                line = f"nothing has moved for {now - self._moved_at:.0f} s: {standing_still(places)}"
                # The main thread hangs, and nothing else can end it.
                end_without_the_others(self._lost(line, places))

    def _call_the_roll(self) -> dict[int, Place | None]:
        """Where every rank stands; None for one that has not spoken for `ROLL_CALL_SECONDS`.

        Where the store does not answer, the first rank is lost and of the others only this one is known.
        """
        here = {rank(): Place(beat=0, begun=self._begun, what=self._what)}
        if world_size() == 1:
            return dict(here)
        found: list[dict[int, Place]] = []

        def look() -> None:
            store = self._store
            if store is not None:
                for pause in (0.0, ROLL_CALL_SECONDS):
                    time.sleep(pause)
                    with suppress(RuntimeError):  # the first rank is gone, and the store with it
                        found.append(_places(store))

        # In a thread of its own: a store whose process was stopped answers never.
        thread = threading.Thread(target=look, name="roll call", daemon=True)
        thread.start()
        thread.join(ROLL_CALL_SECONDS + STORE_SECONDS)
        if len(found) < 2:
            return {0: None, **here}
        before, after = found
        spoke = {n: place for n, place in after.items() if n not in before or place.beat > before[n].beat}
        return {**dict.fromkeys(range(world_size())), **spoke, **here}


def _place_key(number: int) -> str:
    return f"place/{number}"


def _places(store: Any) -> dict[int, Place]:
    """What each rank said last; without ranks that have not said anything yet."""
    keys = {number: _place_key(number) for number in range(world_size())}
    return {number: Place.parse(store.get(key)) for number, key in keys.items() if store.check([key])}


def lost_ranks(places: Mapping[int, Place | None]) -> str:
    """Who does not answer, in words."""
    silent = [number for number, place in places.items() if place is None]
    if not silent:
        return "an exchange between ranks failed though all of them answer"
    return f"{_numbered(silent)} no longer answer{'s' if len(silent) == 1 else ''}: killed, or its machine is lost"


def standing_still(places: Mapping[int, Place | None]) -> str:
    """Who keeps the others waiting, in words."""
    silent = [number for number, place in places.items() if place is None]
    if silent:
        return f"{_numbered(silent)} no longer answer{'s' if len(silent) == 1 else ''}"
    answering = {number: place for number, place in places.items() if place is not None}
    least = min(place.begun for place in answering.values())
    behind = [number for number, place in answering.items() if place.begun == least]
    what = answering[behind[0]].what
    who = "all ranks hang" if len(behind) == len(answering) > 1 else f"{_numbered(behind)} hang"
    return f"{who}{'s' if len(behind) == 1 else ''}, {what}"


def _numbered(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def is_killed_loader(error: BaseException) -> bool:
    """Whether an error says that a loader process was killed: by the kernel, most often, where memory runs out."""
    # torch raises it wherever this process is when it hears of that (torch/utils/data/_utils/signal_handling.py).
    return isinstance(error, LoaderLost) or (isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error))


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that an exchange between ranks failed.

    gloo's errors are plain RuntimeErrors that name its sources or the connection (torch 2.13); NCCL's and the stores'
    are `torch.distributed.DistError`.
    """
    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
