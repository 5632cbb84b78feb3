"""What can go wrong, and what is said of it. How programs end for it: `mdnet_dist.program`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST_LINE = 2000
"""Characters of a message: names in files may have any length."""


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what is wrong, where, and what would be right."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """White space single and control characters spelt out: names in files may hold what a terminal would obey.

    The middle of what is longer than `LONGEST_LINE` is left out.
    """
    line = printable(" ".join(text.split()))
    half = LONGEST_LINE // 2 - 3
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def printable(text: str) -> str:
    """A text of several lines with all other control characters spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def without_password(text: str) -> str:
    """`text` with `user:password@` taken out of every address: for files, messages and parameters.

    A password may hold a slash; then all is taken out up to the last @ of the word.
    """
    return re.sub(r"(?<=://)(?:[^/\s@\"']*:[^\s\"']*|[^/\s]+)@", "", text)


class TrainingFailed(Exception):
    """Training cannot go on. The message is one line that says why and what was written."""

    exit_code = 3


class RankLost(TrainingFailed):
    """Another rank was killed or hangs: the same job, started again from its last checkpoint, may well succeed."""

    supervised_exit_code = 75  # between a rank and `mdnet_dist.supervisor` alone: start again

    def __init__(self, message: str, *, speaks: bool = True, linger_seconds: float = 0.0) -> None:
        """Args:
        speaks: whether this rank prints it; the first may be the one that is lost.
        linger_seconds: how long this process is still of use to others when it has.
        """
        super().__init__(message)
        self.speaks, self.linger_seconds = speaks, linger_seconds


class LoaderLost(RuntimeError):
    """A process that reads data was killed."""


SUPERVISED = "MDNET_SUPERVISED"
"""Environment variable that `mdnet_dist.supervisor` sets for its ranks."""


class Preempted(Exception):
    """The job was told to stop and has written a checkpoint. The message is one line that names it."""

    exit_code = 143


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest known one, or all of them where none is near."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}"
