"""What a person sees of a search while it runs: a table redrawn in place on a terminal, lines elsewhere.

`render` and `time_left` are functions of a `View`; `Display` decides when to show what they give, and where.
Names, reasons and drawn values come from files: characters that a terminal would obey are spelt out, and every
character counts as at least one column, so that no terminal shows a line longer than it was meant to be.
"""

from __future__ import annotations

import heapq
import math
import os
import shutil
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

from mdnet_dist.errors import one_line
from tune.records import ENDED, TrialRecord, best_trial, describe, shown

LEAST_WIDTH, LEAST_HEIGHT = 40, 8  # columns and lines; in less there is the header alone
REDRAW_SECONDS, LINE_SECONDS = 0.5, 60.0
FILE = "trials.csv"  # holds what the table has no room for
NAME_WIDTH, CELL_WIDTH, CHOICE_WIDTH = 24, 12, 16  # columns at most; numbers are never wider in practice
LEAST_NAME_WIDTH = 6
GAP = "  "


@dataclass(frozen=True, kw_only=True)
class View:
    """A search at one moment."""

    name: str
    metric: str  # what trials are compared by
    mode: Literal["min", "max"]
    trials: Sequence[TrialRecord]  # all that were drawn so far
    planned: int  # trials in all
    epochs: int  # of a trial that is not stopped
    elapsed_seconds: float  # of wall clock, all sessions together
    at_once: int  # trials side by side
    phase: str = "searching"  # or "confirming"; any other text is shown as it is

    def counts(self) -> Counter[str]:
        """{status: trials}; those that were not drawn yet are waiting."""
        counts = Counter[str](trial.status for trial in self.trials)
        counts["waiting"] += max(0, self.planned - len(self.trials))
        return counts


# ---------------------------------------------------------------------------------------------------------- time left


def time_left(view: View) -> float | None:
    """Seconds until all planned trials have ended; None while no trial says how long one takes.

    A trial that begins takes as long as ended ones did on average, early-stopped ones included (failed ones too, but
    alone they tell nothing); before any has ended, as long as begun ones will at their pace. A running trial takes
    its pace times the epochs that it lacks. What waits begins wherever a place becomes free first.
    """
    waiting = [trial for trial in view.trials if trial.status == "waiting"]
    running = [trial for trial in view.trials if trial.status == "running"]
    undrawn = max(0, view.planned - len(view.trials))
    if not waiting and not running and not undrawn:
        return 0.0
    ended = [trial for trial in view.trials if trial.status in ENDED]
    took = [_spent(trial) for trial in ended] if any(trial.status != "failed" for trial in ended) else []
    took = took or [full for trial in [*running, *waiting] if (full := _full_seconds(trial, view.epochs)) is not None]
    if not took:
        return None
    typical = sum(took) / len(took)
    lacks = sorted((_lacks(trial, view.epochs, typical) for trial in running), reverse=True)
    places = max(1, view.at_once)
    # Of more running ones than places, the last to end make room: only then are there fewer than places.
    free = [*lacks[:places], *[0.0] * (places - len(lacks))]
    heapq.heapify(free)
    for seconds in [*(_lacks(trial, view.epochs, typical) for trial in waiting), *[typical] * undrawn]:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def _spent(trial: TrialRecord) -> float:
    """Seconds of a trial so far: its own count may be older than its last report."""
    known = [trial.seconds, *(report.seconds for report in trial.reports[-1:])]
    return max([0.0, *(seconds for seconds in known if math.isfinite(seconds))])


def _full_seconds(trial: TrialRecord, epochs: int) -> float | None:
    """What a trial takes if it goes on to its end as it did until its last report; None before the first."""
    if not trial.reports or trial.reports[-1].epoch <= 0:
        return None
    seconds = trial.reports[-1].seconds
    seconds = seconds if math.isfinite(seconds) and seconds > 0 else _spent(trial)
    return seconds * max(1.0, epochs / trial.reports[-1].epoch)


def _lacks(trial: TrialRecord, epochs: int, typical_seconds: float) -> float:
    full = _full_seconds(trial, epochs)
    return max(0.0, (typical_seconds if full is None else full) - _spent(trial))


# ------------------------------------------------------------------------------------------------------- text that fits


def _columns(character: str) -> int:
    """Columns of a character on a terminal, or more: a mark over another counts as one.

    Pictures count as two: newer versions of Unicode made many of them wide, and terminals differ in their versions.
    """
    picture = character >= "\u2600" and unicodedata.category(character) in ("So", "No")
    return 2 if picture or unicodedata.east_asian_width(character) in "WF" else 1


def _width(text: str) -> int:
    return len(text) if text.isascii() else sum(map(_columns, text))


def _plain(text: str) -> str:
    """One line in which a terminal finds nothing to obey; a letter and its accent become one character if they can."""
    return one_line(unicodedata.normalize("NFC", text))


def _cut(text: str, width: int) -> str:
    """As much of a plain text as fits, with two dots where something is missing."""
    if _width(text) <= width:
        return text
    dots = ".."[: max(0, width)]
    kept, used = 0, len(dots)
    while used + _columns(text[kept]) <= width:
        used += _columns(text[kept])
        kept += 1
    return text[:kept].rstrip() + dots


def _pad(text: str, width: int, *, right: bool = False) -> str:
    text = _cut(text, width)
    blank = " " * (width - _width(text))
    return blank + text if right else text + blank


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"


def _clock(seconds: float | None) -> str:
    from mdnet_dist.console import duration  # here, because it imports torch

    return duration(max(0.0, seconds)) if seconds is not None and math.isfinite(seconds) else "?"


# -------------------------------------------------------------------------------------------------------------- render


def render(view: View, width: int, height: int) -> str:
    """The search as text: header, best trial, table.

    Args:
        width, height: columns and lines of the terminal; below 40 and 8 there is the header alone.

    Returns:
        at most `height` lines of at most `width` columns each, without a newline at the end.
    """
    if width <= 0 or height <= 0:
        return ""
    lines = [_header(view, width)]
    if width >= LEAST_WIDTH and height >= LEAST_HEIGHT:
        lines.append(_best_line(view, width))
        if view.trials:
            lines += _table(view, width, height - len(lines))
    return "\n".join(line.rstrip() for line in lines)


def _header(view: View, width: int) -> str:
    counts, elapsed, left = view.counts(), _clock(view.elapsed_seconds), _clock(time_left(view))
    w, r, d, s, f = (counts[status] for status in ("waiting", "running", "finished", "stopped", "failed"))
    name, phase = _plain(view.name), _plain(view.phase)
    middle = f"{w} waiting {r} running {d} done {s} stopped {f} failed{GAP}{elapsed}{GAP}left {left}"
    short = f"{w} wait {r} run {d} done {s} stop {f} fail{GAP}{elapsed}{GAP}left {left}"
    letters = f"{w}w {r}r {d}d {s}s {f}f"
    least = f"{letters} {elapsed} left {left}"
    forms = [
        f"{phase}{GAP}{form}" for form in (f"{_counts(view)}{GAP}elapsed {elapsed}{GAP}left {left}", middle, short)
    ]
    forms += [short, f"{phase}{GAP}{least}", least]
    wanted = min(_width(name), NAME_WIDTH)
    fitting = [form for form in forms if wanted + len(GAP) + _width(form) <= width]
    if not fitting:  # then the name is cut, and what passed is left out if that is not enough
        form = least if min(wanted, LEAST_NAME_WIDTH) + 1 + len(least) <= width else f"{letters} left {left}"
        return _cut(f"{_cut(name, max(LEAST_NAME_WIDTH, width - 1 - len(form)))} {form}", width)
    return f"{_cut(name, width - len(GAP) - _width(fitting[0]))}{GAP}{fitting[0]}"


def _counts(view: View) -> str:
    counts = view.counts()
    words = {"waiting": "waiting", "running": "running", "finished": "done", "stopped": "stopped", "failed": "failed"}
    return ", ".join(f"{counts[status]} {word}" for status, word in words.items())


def _best(view: View) -> tuple[str, TrialRecord] | None:
    best = best_trial(list(view.trials), view.metric, view.mode)
    return None if best is None else (_number(best.score(view.metric, view.mode)), best)


def _best_line(view: View, width: int) -> str:
    metric = _cut(_plain(view.metric), CELL_WIDTH * 2)
    best = _best(view)
    if best is None:
        return _cut(f"best so far{GAP}none yet, by {'highest' if view.mode == 'max' else 'lowest'} {metric}", width)
    score, trial = best
    parts = ["best so far", f"{metric} {score}" if width >= 1.5 * LEAST_WIDTH else score]
    return _cut(GAP.join([*parts, _cut(_plain(trial.name), NAME_WIDTH), _plain(describe(trial.point))]), width)


def _ordered(view: View) -> list[TrialRecord]:
    """Running ones, then those that ended with a score, the best first, then failed ones, then what waits."""

    def place(trial: TrialRecord) -> tuple[int, float, int]:
        score = trial.score(view.metric, view.mode)
        if trial.status == "running":
            return 0, 0.0, trial.number
        if trial.status == "waiting":
            return 3, 0.0, trial.number
        return (2, 0.0, trial.number) if score is None else (1, -score if view.mode == "max" else score, trial.number)

    return sorted(view.trials, key=place)


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: list[str]
    most: int = CELL_WIDTH  # columns
    right: bool = False

    def width(self) -> int:
        return min(self.most, max(map(_width, [self.heading, *self.cells])))


def _table(view: View, width: int, height: int) -> list[str]:
    trials, rows = _ordered(view), height - 1
    more = len(trials) - (rows - 1) if len(trials) > rows else 0
    trials = trials[: rows - 1] if more else trials
    columns = {
        "#": _Column("#", [str(trial.number) for trial in trials], right=True),
        "trial": _Column("trial", [_plain(trial.name) for trial in trials], NAME_WIDTH),
        "status": _Column("status", [str(trial.status) for trial in trials]),
        "epoch": _Column("epoch", [_epoch(trial, view.epochs) for trial in trials], right=True),
        "score": _Column("score", [_number(trial.score(view.metric, view.mode)) for trial in trials], right=True),
        "last": _Column("last", [_number(_last(trial, view.metric)) for trial in trials], right=True),
        "time": _Column("time", [_clock(_spent(trial)) if _begun(trial) else "" for trial in trials], right=True),
    }

    def taken() -> int:
        return sum(len(GAP) + column.width() for name, column in columns.items() if name != "trial")

    for dispensable, least in (("last", CELL_WIDTH), ("time", CELL_WIDTH), ("epoch", LEAST_NAME_WIDTH)):
        if taken() + min(columns["trial"].width(), least) > width:
            del columns[dispensable]
    name_width = min(columns["trial"].width(), width - taken())
    left = width - taken() - name_width
    for name, column in _choices(view, trials).items():
        if len(GAP) + column.width() <= left:
            columns[name] = column
            left -= len(GAP) + column.width()
    widths = [name_width if name == "trial" else column.width() for name, column in columns.items()]
    before_score = list(columns).index("score")
    shown_columns = list(zip(columns.values(), widths))
    lines = [GAP.join(_pad(column.heading, width_, right=column.right) for column, width_ in shown_columns)]
    for i, trial in enumerate(trials):
        cells = [_pad(column.cells[i], width_, right=column.right) for column, width_ in shown_columns]
        if trial.status == "failed" and trial.reason:  # in place of the score that it has not
            cells = [*cells[:before_score], _plain(trial.reason)]
        lines.append(_cut(GAP.join(cells), width))
    return lines + ([_cut(f"and {more} more: {FILE}", width)] if more else [])


def _begun(trial: TrialRecord) -> bool:
    return trial.status != "waiting" or bool(trial.reports)


def _epoch(trial: TrialRecord, epochs: int) -> str:
    return f"{trial.reports[-1].epoch if trial.reports else 0}/{epochs}" if _begun(trial) else ""


def _last(trial: TrialRecord, metric: str) -> float | None:
    """The metric's last value, also where it is not finite: a score would hide that."""
    return next((report.metrics[metric] for report in reversed(trial.reports) if metric in report.metrics), None)


def _choices(view: View, trials: Sequence[TrialRecord]) -> dict[str, _Column]:
    """Columns of the parameters that are never drawn as floats and differ between trials, by their full names."""
    names = list(dict.fromkeys(name for trial in view.trials for name in trial.point))
    columns = {}
    for name in names:
        values = [trial.point[name] for trial in view.trials if name in trial.point]
        told = {shown(trial.point[name]) if name in trial.point else "" for trial in view.trials}
        if any(isinstance(value, float) for value in values) or (len(told) == 1 and len(view.trials) > 1):
            continue
        cells = [_plain(shown(trial.point[name])) if name in trial.point else "" for trial in trials]
        columns[f"point {name}"] = _Column(_plain(_short(name, names)), cells, CHOICE_WIDTH)
    return columns


def _short(name: str, names: Sequence[str]) -> str:
    """The last parts of a dotted name, as few as no other name ends with."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = "." + ".".join(parts[-count:])
        if sum(("." + other).endswith(end) for other in names) == 1:
            return end[1:]
    return name


# ------------------------------------------------------------------------------------------------------------- display


class Display:
    """Shows a search on a stream while it runs.

    On a terminal the table is drawn over the last one. What others print in between pushes it down: the next redraw
    may leave some of the old table above, those after it are whole. Elsewhere there is a line for each trial that
    starts or ends, and one a minute for all.
    """

    def __init__(
        self,
        stream_out: TextIO | None = None,
        terminal: bool | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        size: Callable[[], os.terminal_size] = shutil.get_terminal_size,
    ) -> None:
        """Print nothing yet.

        Args:
            stream_out: None: standard output.
            terminal: whether a table can be redrawn there; None: if it is a terminal that can.
            clock: seconds since some moment.
            size: columns and lines of the terminal, asked before each redraw.
        """
        self._stream = sys.stdout if stream_out is None else stream_out
        able = os.environ.get("TERM") != "dumb"
        self._terminal = self._stream.isatty() and able if terminal is None else terminal
        self._bold = not os.environ.get("NO_COLOR")
        self._clock, self._size = clock, size
        self._view: View | None = None
        self._closed = False
        self._acted = -math.inf  # when the table was drawn, or the line of the minute printed
        self._drawn: list[str] = []  # the table's lines on the terminal
        self._below = True  # whether the cursor is under them, not at the end of the last
        self._told: dict[tuple[int, str], str] = {}  # status of each trial that an event was printed for

    def show(self, view: View) -> None:
        """Show it, or keep it for later where something was shown just now. Call this often."""
        if self._closed:
            return
        first, self._view = self._view is None or self._view.phase != view.phase, view
        now = self._clock()
        if self._terminal:
            if now - self._acted >= REDRAW_SECONDS:
                self._acted = now
                self._redraw()
            return
        # Of a search that is continued, each phase begins with what ended in an earlier session.
        before = [trial for trial in view.trials if first and trial.status in ENDED]
        self._told.update({(trial.number, trial.name): trial.status for trial in before})
        self._print_events(view)
        if first and not before:
            self._acted = now
        elif now - self._acted >= LINE_SECONDS:
            self._acted = now
            self._write(_summary(view) + "\n")

    def say(self, text: str) -> None:
        """Print a line, or several, above the table."""
        lines = [" ".join(map(one_line, line.expandtabs().split(" "))) for line in text.splitlines() or [""]]
        if self._drawn and not self._closed:
            self._redraw(above=lines)
        else:
            self._write("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Show the last state and leave it there, the cursor below it. Later calls of `show` do nothing."""
        if self._closed:
            return
        if self._view is not None and self._terminal:
            self._redraw()
            self._write("" if self._below else "\n")
        elif self._view is not None:
            self._write(_summary(self._view) + "\n")
        self._closed = True

    def _redraw(self, above: Sequence[str] = ()) -> None:
        """Write the lines `above` and the table over the last table, line by line.

        Nothing is cleared from the top of the screen on: tmux would keep all of that, each time, as if it had scrolled.
        """
        assert self._view is not None
        width, height = self._size()
        # A terminal that became narrower has broken our lines: they fill more rows now.
        rows = sum(max(1, math.ceil(_width(line) / max(1, width))) for line in self._drawn)
        up = rows - (0 if self._below else 1)
        # The last row is kept for the cursor, so that others print below the table, unless that leaves too few.
        self._drawn = render(self._view, width, height - 1 if height > LEAST_HEIGHT else height).split("\n")
        self._below = len(self._drawn) < height
        head, *table = self._drawn
        lines = [*above, f"\x1b[1m{head}\x1b[0m" if self._bold else head, *table]
        text = "\n".join(f"\x1b[K{line}" for line in lines) + ("\n\x1b[J" if self._below else "")
        self._write("\r" + (f"\x1b[{up}A" if up else "") + text)

    def _print_events(self, view: View) -> None:
        known = [trial for trial in view.trials if (trial.number, trial.name) in self._told]
        new = [trial for trial in view.trials if (trial.number, trial.name) not in self._told]
        for trial in [*known, *new]:  # what ended made room for what started
            key = trial.number, trial.name
            told = self._told.get(key)
            if trial.status in ("waiting", told):  # one that pauses waits too
                continue
            self._told[key] = trial.status
            name = _plain(trial.name)
            if told is None or told in ENDED:
                started = "started again  " if told else "started   "
                self._write(f"{started}{name}{GAP}{_plain(describe(trial.point))}".rstrip() + "\n")
            if trial.status in ENDED:
                self._write(f"{trial.status:<10}{name}{GAP}{_ending(trial, view)}\n")

    def _write(self, text: str) -> None:
        # A name must not end the search where the terminal's encoding lacks its letters.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _ending(trial: TrialRecord, view: View) -> str:
    if trial.status == "failed":
        return _plain(trial.reason) or "for no known reason"
    score = trial.score(view.metric, view.mode)
    scored = f"{_plain(view.metric)} {_number(score)}" if score is not None else "without a score"
    if trial.status == "stopped":
        return f"by the scheduler after epoch {trial.reports[-1].epoch if trial.reports else 0}{GAP}{scored}"
    return f"{scored}{GAP}in {_clock(_spent(trial))}"


def _summary(view: View) -> str:
    best, left = _best(view), time_left(view)
    parts = [_plain(view.phase), _counts(view), f"elapsed {_clock(view.elapsed_seconds)}"]
    parts += [f"left {_clock(left)}"] if left is not None else []
    parts += [f"best {best[0]} ({_plain(best[1].name)})"] if best else []
    return GAP.join(parts)
