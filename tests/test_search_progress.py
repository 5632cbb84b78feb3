"""What a search shows while it runs: text that fits any terminal, an honest time left, redraws that leave no traces."""

from __future__ import annotations

import fcntl
import io
import os
import random
import re
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from tune.progress import Display, View, render, time_left
from tune.records import Report, Status, TrialRecord

METRIC = "val/bleu-4"


def trial(number: int, status: Status = "running", scores: list[float] | None = None, **fields: object) -> TrialRecord:
    """A trial with a report after each epoch, 60 seconds apart."""
    reports = [
        Report(epoch=k, step=10 * k, seconds=60.0 * k, metrics={METRIC: score})
        for k, score in enumerate(scores or [], start=1)
    ]
    values: dict[str, object] = {"name": f"t{number:03d}", "point": {}, "seconds": 60.0 * len(reports), **fields}
    return TrialRecord(number=number, status=status, reports=reports, **values)  # type: ignore[arg-type]


def view_of(trials: list[TrialRecord], **fields: object) -> View:
    values: dict[str, object] = {
        "name": "bladder",
        "metric": METRIC,
        "mode": "max",
        "planned": len(trials),
        "epochs": 4,
        "elapsed_seconds": 754.0,
        "at_once": 2,
        **fields,
    }
    return View(trials=trials, **values)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- text that fits

NASTY = ["\x1b[2J", "a\nb", "日本語の検索", "e\u0301", "\u202eabc", "🇩🇪" * 9, "👩‍🔬", "\ud800", "\t", "\x00", "x" * 300]
texts = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(NASTY) | st.just("t001")
numbers = st.floats() | st.floats(0, 1)
reports = st.builds(
    Report,
    epoch=st.integers(0, 60),
    step=st.integers(0, 9999),
    seconds=numbers,
    metrics=st.dictionaries(st.sampled_from([METRIC, "train/loss"]), numbers),
)
scalars = texts | st.integers() | numbers | st.booleans() | st.none()
records = st.builds(
    TrialRecord,
    number=st.integers(0, 10**6),
    name=texts,
    point=st.dictionaries(texts | st.sampled_from(["a.rate", "b.rate", "a.kind"]), scalars, max_size=5),
    status=st.sampled_from(["waiting", "running", "finished", "stopped", "failed"]),
    reason=texts,
    reports=st.lists(reports, max_size=3),
    seconds=numbers,
)
views = st.builds(
    View,
    name=texts,
    metric=st.just(METRIC),
    mode=st.sampled_from(["min", "max"]),
    trials=st.lists(records, max_size=12),
    planned=st.integers(0, 40),
    epochs=st.integers(0, 60),
    elapsed_seconds=numbers,
    at_once=st.integers(0, 8),
    phase=texts,
)


def columns(text: str) -> int:
    """Columns on a terminal that draws marks over the letter before, and flags as two letters."""
    wide = sum(unicodedata.east_asian_width(c) in ("W", "F") or "\U0001f1e6" <= c <= "\U0001f1ff" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


@settings(max_examples=250, deadline=None)
@given(views, st.integers(-2, 200), st.integers(-1, 30))
def test_any_search_fits_any_terminal(view: View, width: int, height: int) -> None:
    text = render(view, width, height)
    lines = text.split("\n") if text else []
    assert len(lines) <= max(0, height)
    for line in lines:
        assert line.isprintable()
        assert columns(line) <= width
        assert len(line) <= width
    left = time_left(view)
    assert left is None or left >= 0
    if width < 40 or height < 8:
        assert len(lines) == (width > 0 and height > 0)
        return
    assert lines[1].startswith("best so far")
    more = re.fullmatch(r"and (\d+) more: trials\.csv", lines[-1])
    rows = lines[3:-1] if more else lines[3:]
    assert len(rows) + (int(more[1]) if more else 0) == len(view.trials)
    assert not more or len(lines) == height  # nothing is left out while there is room


@settings(max_examples=100, deadline=None)
@given(views, st.integers(60, 200))
def test_running_trials_come_first_and_then_the_best(view: View, width: int) -> None:
    trials = [trial(k, one.status, one.values(METRIC)) for k, one in enumerate(view.trials, start=1)]
    rows = render(view_of(trials, mode=view.mode), width, 30).split("\n")[3:]
    shown = [trials[int(row.split()[0]) - 1] for row in rows]
    kinds = [
        0 if t.status == "running" else 3 if t.status == "waiting" else 2 if t.score(METRIC, view.mode) is None else 1
        for t in shown
    ]
    assert len(shown) == len(trials)
    assert kinds == sorted(kinds)
    scores = [t.score(METRIC, view.mode) for t, kind in zip(shown, kinds) if kind == 1]
    assert scores == sorted(scores, reverse=view.mode == "max")


def example() -> View:
    def point(beta: str, rate: float, batch: int) -> dict[str, object]:
        return {"blend.beta": beta, "optim.rate": rate, "train.batch": batch, "data.fold": 0}

    trials = [
        trial(1, "finished", [0.11, 0.31, 0.29, 0.33], point=point("linear", 0.012, 16)),
        trial(2, "stopped", [0.2, 0.1], point=point("constant", 0.5, 8)),
        trial(3, "failed", point=point("linear", 1.5, 32), reason="loss is nan at step 17\nof epoch 1, " + "x" * 60),
        trial(4, "finished", [0.41, 0.39, 0.4, float("nan")], point=point("constant", 0.003, 16)),
        trial(5, "running", [0.3], point=point("linear", 0.02, 8), seconds=95.0),
        trial(6, "running", point=point("constant", 0.001, 32), name="日本\x1b[2J"),
        trial(7, "waiting", point=point("linear", 0.07, 8)),
    ]
    return view_of(trials, planned=9)


def test_golden_100_by_24() -> None:
    assert (
        render(example(), 100, 24)
        == """\
bladder  searching  3 waiting, 2 running, 2 done, 1 stopped, 1 failed  elapsed 12:34  left 7:25
best so far  val/bleu-4 0.4100  t004  blend.beta constant, optim.rate 0.003, train.batch 16, data...
#  trial        status    epoch   score    last  time  beta      batch
5  t005         running     1/4  0.3000  0.3000  1:35  linear    8
6  日本\\x1b[2J  running     0/4                  0:00  constant  32
4  t004         finished    4/4  0.4100     nan  4:00  constant  16
1  t001         finished    4/4  0.3300  0.3300  4:00  linear    16
2  t002         stopped     2/4  0.2000  0.1000  2:00  constant  8
3  t003         failed      0/4  loss is nan at step 17 of epoch 1, xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..
7  t007         waiting                                linear    8"""
    )


def test_golden_60_by_12_and_by_9() -> None:
    whole = """\
bladder  3 wait 2 run 2 done 1 stop 1 fail  12:34  left 7:25
best so far  val/bleu-4 0.4100  t004  blend.beta constant,..
#  trial        status    epoch   score    last  time  batch
5  t005         running     1/4  0.3000  0.3000  1:35  8
6  日本\\x1b[2J  running     0/4                  0:00  32
4  t004         finished    4/4  0.4100     nan  4:00  16
1  t001         finished    4/4  0.3300  0.3300  4:00  16
2  t002         stopped     2/4  0.2000  0.1000  2:00  8
3  t003         failed      0/4  loss is nan at step 17 of..
7  t007         waiting                                8"""
    assert render(example(), 60, 12) == whole
    assert render(example(), 60, 9).split("\n") == [*whole.split("\n")[:8], "and 2 more: trials.csv"]


def test_golden_40_by_8_and_below() -> None:
    assert (
        render(example(), 40, 8)
        == """\
bladder  3w 2r 2d 1s 1f 12:34 left 7:25
best so far  0.4100  t004  blend.beta..
#  trial        status    epoch   score
5  t005         running     1/4  0.3000
6  日本\\x1b[2J  running     0/4
4  t004         finished    4/4  0.4100
1  t001         finished    4/4  0.3300
and 3 more: trials.csv"""
    )
    heads = {
        39: "bladder  3w 2r 2d 1s 1f 12:34 left 7:25",
        37: "blad.. 3w 2r 2d 1s 1f 12:34 left 7:25",
        36: "bladder 3w 2r 2d 1s 1f left 7:25",
        20: "blad.. 3w 2r 2d 1s..",
        1: ".",
    }
    assert {width: render(example(), width, 8) for width in heads} == heads
    assert render(example(), 200, 7).startswith("bladder  searching  3 waiting, ")
    assert "\n" not in render(example(), 200, 7)


def test_a_search_without_trials_says_what_it_looks_for() -> None:
    lines = render(view_of([], planned=5, mode="min", phase="confirming"), 100, 24).split("\n")
    assert lines == [
        "bladder  confirming  5 waiting, 0 running, 0 done, 0 stopped, 0 failed  elapsed 12:34  left ?",
        "best so far  none yet, by lowest val/bleu-4",
    ]


def test_choices_are_named_by_as_little_as_tells_them_apart() -> None:
    first = {"image.kind": "a", "text.kind": 1, "deep": None, "same": "x", "rate": 0.1}
    second = {"image.kind": "b", "text.kind": 2, "same": "x", "rate": 1}
    view = view_of([trial(1, point=first), trial(2, point=second)])
    lines = render(view, 100, 24).split("\n")
    assert lines[2].split()[7:] == ["image.kind", "text.kind", "deep"]
    assert lines[3].split()[-3:] == ["a", "1", "None"]
    assert lines[4].split()[-2:] == ["b", "2"]


def test_long_names_and_values_leave_room_for_others() -> None:
    trials = [
        trial(k, name=f"e\u0301{k}" + "n" * 50, point={"kind": str(k) + "v" * 50, "depth": k}, scores=[0.1])
        for k in (1, 2)
    ]
    assert render(view_of(trials), 110, 24).split("\n")[2:] == [
        "#  trial                     status   epoch   score    last  time  kind              depth",
        "1  é1nnnnnnnnnnnnnnnnnnnn..  running    1/4  0.1000  0.1000  1:00  1vvvvvvvvvvvvv..  1",
        "2  é2nnnnnnnnnnnnnnnnnnnn..  running    1/4  0.1000  0.1000  1:00  2vvvvvvvvvvvvv..  2",
    ]


# ---------------------------------------------------------------------------------------------------------- time left


class Search:
    """Trials in places side by side, each with its own seconds for an epoch, some of them stopped on the way."""

    def __init__(self, epoch_seconds: list[float], last_epochs: list[int], epochs: int, at_once: int) -> None:
        self._epochs, self._at_once = epochs, at_once
        free = [0.0] * at_once
        self._plan = []  # (start, seconds of an epoch, epochs that it trains)
        for seconds, last in zip(epoch_seconds, last_epochs):
            start = min(free)
            free[free.index(start)] = start + seconds * last
            self._plan.append((start, seconds, last))
        self.seconds = max(free)

    def at(self, now: float) -> View:
        trials = []
        for number, (start, seconds, last) in enumerate(self._plan, start=1):
            if start > now:
                continue
            done = min(last, int((now - start) / seconds + 1e-9))
            status: Status = "running" if done < last else "finished" if last == self._epochs else "stopped"
            reports = [Report(epoch=k, step=k, seconds=k * seconds, metrics={}) for k in range(1, done + 1)]
            spent = min(now - start, last * seconds)
            trials.append(trial(number, status, seconds=spent))
            trials[-1].reports.extend(reports)
        return view_of(trials, planned=len(self._plan), epochs=self._epochs, at_once=self._at_once)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 8), st.floats(1, 1000), st.floats(0, 0.999))
def test_time_left_of_equal_trials_is_exact(n: int, at_once: int, epochs: int, seconds: float, share: float) -> None:
    search = Search([seconds] * n, [epochs] * n, epochs, at_once)
    now = share * search.seconds
    left = time_left(search.at(now))
    if now < 0.99 * seconds:
        assert left is None  # the first epoch has not ended
    elif now > 1.01 * seconds:
        assert left == pytest.approx(search.seconds - now, abs=1e-4 * search.seconds)


@pytest.mark.parametrize("stopped", [0.0, 0.4])
def test_time_left_of_unequal_trials_is_right_on_average(stopped: float) -> None:
    """At the middle of a search, over many searches; in no single one is it wrong by much."""
    ratios = []
    for seed in range(60):
        draw = random.Random(seed)
        last = [3 if draw.random() < stopped else 9 for _ in range(40)]
        search = Search([draw.uniform(20, 60) for _ in last], last, 9, 4)
        left = time_left(search.at(search.seconds / 2))
        assert left is not None
        ratios.append(left / (search.seconds / 2))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.15)
    assert 0.5 < min(ratios) < max(ratios) < 2


def test_time_left_worked_by_hand() -> None:
    assert time_left(view_of([], planned=3)) is None
    assert time_left(view_of([trial(1, "failed", seconds=3)], planned=3)) is None
    assert time_left(view_of([trial(1)], planned=3)) is None
    assert time_left(view_of([trial(1, "failed"), trial(2, "stopped", [0.1])])) == 0
    # One took 120 s, two places: the running one lacks 240 - 60 = 180 s; meanwhile one waiting runs for 120 s and the
    # next one until 240 s.
    trials = [trial(1, "stopped", [0.1, 0.1]), trial(2, "running", [0.1])]
    assert time_left(view_of(trials, planned=4)) == 240
    # A running one without a report has 30 of the typical 120 s behind it.
    trials[1] = trial(2, "running", seconds=30.0)
    assert time_left(view_of(trials, planned=2)) == 90
    # One that failed after 60 s lowers the mean to 90 s.
    assert time_left(view_of([*trials, trial(3, "failed", seconds=60.0)], planned=3)) == 60
    # Three running in two places lack 180, 120 and 60 s: what waits (120 s) begins when two of them have ended.
    trials = [trial(1, "stopped", [0.1, 0.1]), *(trial(k, "running", [0.1] * (k - 1)) for k in (2, 3, 4))]
    assert time_left(view_of(trials, planned=5)) == 240
    # One that pauses (it waits with a report) lacks three of its epochs.
    assert time_left(view_of([trial(1, "waiting", [0.1])])) == 180


# ------------------------------------------------------------------------------------------------------ lines elsewhere


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_events_in_order_and_each_once() -> None:
    out, clock = io.StringIO(), Clock()
    display = Display(out, clock=clock)

    def told(*trials: TrialRecord) -> list[str]:
        out.truncate(0)
        out.seek(0)
        view = view_of(list(trials), planned=6)
        display.show(view)
        once = out.getvalue().splitlines()
        display.show(view)
        assert out.getvalue().splitlines() == once
        return once

    first, second = trial(1, point={"a.rate": 0.1234567, "kind": "x\n"}), trial(2)
    third, fourth = trial(3, "waiting"), trial(4, "finished", [0.5, 0.75], name="four\x07")
    assert told(first, second, third) == ["started   t001  a.rate 0.123, kind x", "started   t002"]
    second = trial(2, "stopped", [0.3, 0.2])
    third.status = "running"
    assert told(fourth, third, second, first) == [
        "stopped   t002  by the scheduler after epoch 2  val/bleu-4 0.3000",
        "started   four\\x07",
        "finished  four\\x07  val/bleu-4 0.7500  in 2:00",
        "started   t003",
    ]
    first.status, first.reason = "failed", "out of\nmemory \x1b[2J"
    third.status = "waiting"  # it pauses
    assert told(first, second, third, fourth) == ["failed    t001  out of memory \\x1b[2J"]
    third.status = "running"
    assert told(first, second, third, fourth) == []
    first.status = "running"
    assert told(first, second, third, fourth) == ["started again  t001  a.rate 0.123, kind x"]
    third.status, first.status, first.reason = "finished", "failed", ""
    assert told(first, second, third, fourth) == [
        "failed    t001  for no known reason",
        "finished  t003  without a score  in 0:00",
    ]
    clock.now += 59.9
    assert told(first, second, third, fourth) == []
    clock.now += 0.2
    counts = "searching  2 waiting, 0 running, 2 done, 1 stopped, 1 failed"
    summary = f"{counts}  elapsed 12:34  left 1:00  best 0.7500 (four\\x07)"
    assert told(first, second, third, fourth) == [summary]
    out.truncate(0)
    out.seek(0)
    display.say("above\tall\x1b[2J\n  b")
    display.close()
    display.close()
    display.show(view_of([trial(9)]))
    assert out.getvalue().splitlines() == ["above   all\\x1b[2J", "  b", summary]


@settings(deadline=None, max_examples=60)
@given(st.lists(views, max_size=4))
def test_any_search_is_told_in_lines_that_no_terminal_obeys(shown: list[View]) -> None:
    out, clock = io.StringIO(), Clock()
    display = Display(out, clock=clock)
    for view in shown:
        clock.now += 40
        display.show(view)
    display.close()
    assert all(line.isprintable() for line in out.getvalue().split("\n"))


def test_a_search_that_is_continued_does_not_tell_what_ended_before() -> None:
    out = io.StringIO()
    display = Display(out, clock=Clock())
    view = view_of([trial(1, "finished", [0.5]), trial(2, "failed"), trial(3)], planned=3)
    display.show(view)
    display.show(view)
    assert out.getvalue().splitlines() == [
        "started   t003",
        "searching  0 waiting, 1 running, 1 done, 0 stopped, 1 failed  elapsed 12:34  left 0:30  best 0.5000 (t001)",
    ]


def test_each_phase_of_a_continued_search_begins_with_what_has_ended() -> None:
    out = io.StringIO()
    display = Display(out, clock=Clock())
    display.show(view_of([trial(1, "finished", [0.5])], planned=1))
    out.truncate(0)
    display.show(view_of([trial(1, "finished", [0.6], name="best-seed-0"), trial(2)], planned=2, phase="confirming"))
    told = out.getvalue()
    assert "started   t002" in told and "finished" not in told


def test_a_stream_that_lacks_letters_gets_question_marks() -> None:
    raw = io.BytesIO()
    display = Display(io.TextIOWrapper(raw, encoding="ascii"), terminal=False)
    display.show(view_of([trial(1, name="日本")]))
    assert raw.getvalue() == b"started   ??\n"


def test_nothing_is_printed_before_anything_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        out = io.StringIO()
        Display(out, terminal).close()
        assert out.getvalue() == ""


def test_standard_output_is_the_one_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    Display().say("here")
    assert capsys.readouterr().out == "here\n"


# ------------------------------------------------------------------------------------------------------------- terminal


class Screen:
    """As much of a terminal as the display needs: it wraps, scrolls, and breaks lines anew when it is resized."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.cells: list[list[str]] = [[]]  # rows, those that scrolled away first; "" is a wide character's second half
        self.joined: set[int] = set()  # rows that go on in the next
        self.row = self.column = self.top = 0

    def feed(self, text: str) -> None:
        for escape, amount, character in re.findall(r"(\x1b\[(\d*)[A-Za-z])|([\s\S])", text):
            if escape:
                self._obey(escape[-1], int(amount or 1))
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self._down()
            else:
                self._put(character)

    def _obey(self, what: str, amount: int) -> None:
        if what == "A":
            self.row = max(self.top, self.row - amount)
        elif what == "K":
            del self.cells[self.row][self.column :]
            self.joined.discard(self.row)
        elif what == "J":
            assert (self.row, self.column) != (self.top, 0), "tmux keeps a screen that is cleared from its top on"
            del self.cells[self.row][self.column :], self.cells[self.row + 1 :]
            self.joined = {row for row in self.joined if row < self.row}
        else:
            assert what == "m", what

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.cells):
            self.cells.append([])
        self.top = max(self.top, self.row - self.height + 1)

    def _put(self, character: str) -> None:
        assert character.isprintable()
        cells = [character, ""] if unicodedata.east_asian_width(character) in ("W", "F") else [character]
        if self.column + len(cells) > self.width:
            self.joined.add(self.row)
            self._down()
        row = self.cells[self.row]
        row += [" "] * (self.column - len(row))
        row[self.column : self.column + len(cells)] = cells
        self.column += len(cells)

    def resize(self, width: int, height: int) -> None:
        """The cursor must be at the end of all text, as it is between redraws."""
        assert self.row == len(self.cells) - 1
        lines = [""]
        for number, row in enumerate(self.cells):
            lines[-1] += "".join(row)
            if number not in self.joined:
                lines.append("")
        self.__init__(width, height)  # type: ignore[misc]
        self.feed("\n".join(lines[:-1]))

    def rows(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.cells[self.top :]]

    def all_rows(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.cells]


class Terminal(io.StringIO):
    """A stream to a screen, and a display on it."""

    def __init__(self, width: int, height: int, clock: Callable[[], float]) -> None:
        super().__init__()
        self.screen, self.writes = Screen(width, height), 0
        self.display = Display(self, True, clock=clock, size=self.size)

    def size(self) -> os.terminal_size:
        return os.terminal_size((self.screen.width, self.screen.height))

    def write(self, text: str) -> int:
        self.writes += 1
        self.screen.feed(text)
        return super().write(text)


def drawn(view: View, width: int, height: int) -> list[str]:
    """The screen when the table stands alone on it."""
    text = render(view, width, height - 1 if height > 8 else height)
    return text.split("\n")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_redraws_leave_one_table_whatever_the_size(data: st.DataObject) -> None:
    clock = Clock()
    terminal = Terminal(100, 24, clock)
    terminal.screen.feed("$ search\n")
    table: list[str] = []
    whole = True  # no table was ever too large for the screen that it was on, so that its upper part scrolled away
    for _ in range(data.draw(st.integers(1, 6), label="redraws")):
        count, width, height = (data.draw(st.integers(*bounds)) for bounds in ((0, 30), (20, 120), (2, 30)))
        if data.draw(st.booleans(), label="resized"):
            terminal.screen.resize(width, height)
            whole = whole and sum(-(-len(line) // width) for line in table) < height
        view = view_of([trial(k, "finished", [k / 100.0] * 4) for k in range(1, count + 1)], planned=40)
        clock.now += 1
        terminal.display.show(view)
        size = terminal.screen.width, terminal.screen.height
        table = drawn(view, *size)
        rows = terminal.screen.rows()
        assert [row for row in rows if row][-len(table) :] == table
        last = len(terminal.screen.all_rows()) - len(table) - 1
        assert all(row < last for row in terminal.screen.joined)  # no line of this table was broken
    heads = [row for row in terminal.screen.rows() if row.startswith("blad")]
    assert len(heads) == 1 or not whole
    terminal.display.close()
    assert (terminal.screen.rows()[-1], terminal.screen.column) == ("", 0)


def test_the_table_is_redrawn_at_most_twice_a_second() -> None:
    clock = Clock()
    terminal = Terminal(100, 24, clock)
    for tick in range(160):  # 10 seconds
        clock.now = 1000 + tick / 16
        terminal.display.show(view_of([trial(1)], elapsed_seconds=tick / 16))
    assert terminal.writes == 20
    assert "elapsed 0:09" in terminal.screen.rows()[0]
    terminal.display.show(view_of([trial(1, "finished", [0.5])], elapsed_seconds=99))
    terminal.display.close()
    assert "1 done" in terminal.screen.rows()[0]  # the last state, though it came too soon after the one before
    assert "elapsed 1:39" in terminal.screen.rows()[0]


@pytest.mark.parametrize("size", [(100, 24), (60, 12), (40, 8)])
@pytest.mark.parametrize("others", ["warning\n", "no newline", "one\ntwo\nthree\n", "z" * 250 + "\n"])
def test_output_of_others_harms_one_redraw_only(size: tuple[int, int], others: str) -> None:
    clock = Clock()
    terminal = Terminal(*size, clock)
    view = view_of([trial(k) for k in range(1, 31)], planned=40)
    terminal.display.show(view)
    terminal.screen.feed(others)
    for _ in range(2):
        clock.now += 1
        terminal.display.show(view)
        rows = [row for row in terminal.screen.rows() if row]
        assert rows[-len(drawn(view, *size)) :] == drawn(view, *size)
    before = terminal.screen.all_rows()
    for _ in range(3):
        clock.now += 1
        terminal.display.show(view)
    assert terminal.screen.all_rows() == before


@pytest.mark.parametrize("size", [(100, 24), (60, 12), (40, 8), (30, 3)])
def test_what_is_said_stands_above_the_table(size: tuple[int, int]) -> None:
    clock = Clock()
    terminal = Terminal(*size, clock)
    view = view_of([trial(k) for k in range(1, 31)], planned=40)
    terminal.display.say("first")
    terminal.display.show(view)
    terminal.display.say("second\nthird \x1b[2J")
    clock.now += 1
    terminal.display.show(view)
    terminal.display.close()
    terminal.display.say("last")
    said = ["first", "second", "third \\x1b[2J"]
    assert terminal.screen.all_rows() == [*said, *drawn(view, *size), "last", ""]


def test_bold_is_all_the_decoration_and_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for refused in ("", "1"):
        monkeypatch.setenv("NO_COLOR", refused)
        terminal = Terminal(100, 24, Clock())
        terminal.display.show(view_of([trial(1)]))
        terminal.display.close()
        styles = re.findall(r"\x1b\[(\d*)m", terminal.getvalue())
        assert styles == ([] if refused else ["1", "0"] * 2)


PROGRAM = """
import sys
from tests.test_search_progress import trial, view_of
from tune.progress import Display

display = Display()
for step, line in enumerate(sys.stdin):
    display._acted = 0  # the test does not want to wait for the next redraw
    display.show(view_of([trial(k, scores=[0.5] * step) for k in range(1, 20)], planned=40))
display.close()
print("the end")
"""


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_on_a_real_terminal_that_is_resized(term: str) -> None:
    outer, inner = os.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": term, "PYTHONIOENCODING": "utf-8"}
    received: list[str] = []

    def resize(width: int, height: int) -> None:
        fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read() -> None:
        try:
            while data := os.read(outer, 65536):
                received.append(data.decode())
        except OSError:  # how Linux says that the other side was closed
            return

    def wait(pattern: str) -> str:
        until = time.monotonic() + 60
        while not re.search(pattern, "".join(received)):
            assert time.monotonic() < until, received
            time.sleep(0.01)
        text = "".join(received)
        received.clear()
        return text

    resize(100, 24)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    program = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(program, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=inner) as child:
        os.close(inner)
        assert child.stdin is not None

        def step() -> None:
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()

        if term == "dumb":
            step()
            text = wait("started   t019\r\n")
            assert "\x1b" not in text
        else:
            screen = Screen(100, 24)
            for number, (width, height) in enumerate([(100, 24), (60, 12), (40, 8), (120, 15)]):
                resize(width, height)
                screen.resize(width, height)
                step()
                screen.feed(wait(rf" {number}/4[\s\S]*(trials\.csv|t019[^\n]*)(\r\n\x1b\[J)?$"))
                view = view_of([trial(k, scores=[0.5] * number) for k in range(1, 20)], planned=40)
                assert [row for row in screen.rows() if row] == drawn(view, width, height)
        child.stdin.close()
        assert "the end" in wait("the end\r\n")
        assert child.wait(60) == 0
    reader.join(10)
    os.close(outer)
