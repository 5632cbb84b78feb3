"""Ranks that are killed, hang, fail or are told to stop, and what a supervisor makes of it. Most of them are stubs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnet_dist.supervisor import Ending, describe, survivors, verdict
from tests.conftest import REPOSITORY

# What a rank does is told by argv[2]: [[first start: rank 0, rank 1, ...], [second start: ...], ...]. It writes down
# how it was started. A number is an exit code; a rank that "misses" another one ends with 75 a moment after it has
# gone.
RANK = """
import json, os, signal, subprocess, sys, time
folder, plan, options = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "PLACES"]
rank = int(os.environ["RANK"])
start = sum(name.startswith("started") and name.endswith(f"-{rank}") for name in os.listdir(folder))
action = plan[start][rank]

def told(number, frame):
    if action == "ignore":
        return
    time.sleep(0.3)
    open(f"{folder}/saved-{rank}", "w").write(str(number))
    sys.exit(143)

if action in ("save", "ignore"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, told)
if action == "leave":
    subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with open(f"{folder}/aside-{rank}", "w") as file:
    json.dump({"pid": os.getpid(), "options": options, **{name: os.environ.get(name) for name in names}}, file)
os.rename(f"{folder}/aside-{rank}", f"{folder}/started-{start}-{rank}")
if isinstance(action, int):
    time.sleep(0.1)
    sys.exit(action)
deadline = time.monotonic() + 5
while len([name for name in os.listdir(folder) if name.startswith(f"started-{start}")]) < len(plan[start]):
    assert time.monotonic() < deadline
    time.sleep(0.01)
if action in ("kill", "leave"):
    os.kill(os.getpid(), signal.SIGKILL)
if action == "misses":
    time.sleep(0.5)
    sys.exit(75)
while True:
    time.sleep(1)
"""

SUPERVISOR = """
import json, signal, sys
from mdnet_dist.supervisor import supervise
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
sys.argv[0] = "train.py"
folder, plan, keywords = sys.argv[1:4]
command = [sys.executable, "-S", "-c", sys.argv[4], folder, plan]
places = lambda used: {"PLACES": ",".join(map(str, used))}
sys.exit(supervise(command, len(json.loads(plan)[0]), again=["--resume"], environment=places, **json.loads(keywords)))
"""

Plan = list[list[int | str]]


class Supervised:
    """A supervisor of stubs, in a process of its own."""

    def __init__(self, folder: Path, plan: Plan, **keywords: object) -> None:
        self.folder = folder
        given = json.dumps({"restarts": 0, "grace_seconds": 2.0, "stop_seconds": 3.0} | keywords)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(folder), json.dumps(plan), given, RANK],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def started(self) -> dict[str, dict]:
        """{"START-RANK": how}."""
        paths = sorted(self.folder.glob("started-*"))
        return {path.name.removeprefix("started-"): json.loads(path.read_text()) for path in paths}

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: set(names) <= self.started().keys(), f"{names} have started")

    def end(self) -> tuple[int, list[str]]:
        """The exit code and the lines on stderr; nothing that was started may be left."""
        errors = self.process.communicate(timeout=60)[1]
        self.assert_nothing_is_left()
        return self.process.returncode, errors.splitlines()

    def assert_nothing_is_left(self) -> None:
        groups = {how["pid"] for how in self.started().values()}
        assert groups
        assert not [one for one in psutil.process_iter() if runs(one.pid) and group_of(one.pid) in groups]


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[type[Supervised]]:
    """`Supervised`; whatever a failed test leaves is killed."""
    started: list[Supervised] = []

    def start(plan: Plan, **keywords: object) -> Supervised:
        started.append(Supervised(tmp_path, plan, **keywords))
        return started[-1]

    yield start  # type: ignore[misc]
    for one in started:
        one.process.kill()
        one.process.communicate()
        for how in one.started().values():
            try:
                os.killpg(how["pid"], signal.SIGKILL)
            except ProcessLookupError:
                continue


def runs(pid: int) -> bool:
    """Whether a process does; one that has ended and that nobody waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def wait_until(condition, what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------ started, ended


def test_each_rank_is_told_who_it_is(stubs) -> None:
    one = stubs([[0, 0, 0]])
    assert one.end() == (0, [])
    started = one.started()
    assert sorted(started) == ["0-0", "0-1", "0-2"]
    for rank in range(3):
        how = started[f"0-{rank}"]
        assert [how[name] for name in ("RANK", "LOCAL_RANK")] == [str(rank)] * 2
        assert [how[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")] == ["3"] * 3
        assert how["MASTER_ADDR"] == "127.0.0.1"
        assert how["PLACES"] == "0,1,2"
        assert how["options"] == []
    assert len({how["MASTER_PORT"] for how in started.values()}) == 1
    assert 1024 < int(started["0-0"]["MASTER_PORT"]) < 65536


def test_a_killed_rank_starts_all_ranks_again(stubs) -> None:
    one = stubs([["misses", "kill"], [0, 0]], restarts=3)
    code, lines = one.end()
    assert code == 0
    assert lines == ["train.py: rank 1 was killed by SIGKILL; starting again from the last checkpoint (1 of 3)"]
    started = one.started()
    assert sorted(started) == ["0-0", "0-1", "1-0", "1-1"]
    assert started["0-0"]["options"] == []
    assert started["1-0"]["options"] == ["--resume"]
    assert started["1-0"]["WORLD_SIZE"] == "2"


def test_restarts_are_counted_and_end(stubs) -> None:
    one = stubs([["misses", "kill"], ["kill", 75], [1, "misses"]], restarts=2)
    code, lines = one.end()
    assert code == 3
    assert lines == [
        "train.py: rank 1 was killed by SIGKILL; starting again from the last checkpoint (1 of 2)",
        "train.py: rank 0 was killed by SIGKILL; starting again from the last checkpoint (2 of 2)",
        "train.py: rank 0 ended with code 1; not started again (2 of 2 restarts used), --resume continues",
    ]
    assert {how["options"] == ["--resume"] for name, how in one.started().items() if name[0] != "0"} == {True}


@pytest.mark.parametrize("code", [2, 3])
def test_what_would_happen_again_is_not_tried_again(stubs, code: int) -> None:
    started = time.monotonic()
    one = stubs([[code, code]], restarts=3)
    assert one.end() == (code, []), "the rank has said why"
    assert time.monotonic() - started < 3


def test_wrong_input_of_one_rank_ends_the_job_though_others_hang(stubs) -> None:
    one = stubs([[2, "ignore"]], restarts=3, grace_seconds=0.5)
    assert one.end() == (2, [])


def test_ranks_that_heed_nothing_are_killed_after_the_grace(stubs) -> None:
    one = stubs([["kill", "ignore"], [0, 0]], restarts=1, grace_seconds=1.0)
    started = time.monotonic()
    code, lines = one.end()
    assert code == 0
    assert lines == ["train.py: rank 0 was killed by SIGKILL; starting again from the last checkpoint (1 of 1)"]
    assert 1.0 < time.monotonic() - started < 8.0


def test_a_rank_that_others_miss_is_killed_and_named(stubs) -> None:
    one = stubs([["misses", "ignore"], [0, 0]], restarts=1, grace_seconds=0.5)
    code, lines = one.end()
    assert code == 0
    assert lines == ["train.py: rank 1 hung and was ended; starting again from the last checkpoint (1 of 1)"]


def test_what_a_killed_rank_left_behind_is_killed(stubs) -> None:
    one = stubs([["leave"], [0]], restarts=1)
    assert one.end()[0] == 0  # `end` asserts that the process group is gone


def test_fewer_ranks_go_on_where_they_are_left(stubs) -> None:
    one = stubs([["misses", "kill", "misses"], [75, 1], [0]], restarts=3, fewer_ranks=True)
    code, lines = one.end()
    assert code == 0
    assert [line.partition("; ")[2] for line in lines] == [
        "starting again from the last checkpoint on 2 ranks (1 of 3)",
        "starting again from the last checkpoint on 1 rank (2 of 3)",
    ]
    started = one.started()
    assert [started[name]["PLACES"] for name in ("0-0", "1-0", "2-0")] == ["0,1,2", "0,2", "0"]
    assert [started[name]["WORLD_SIZE"] for name in ("0-0", "1-0", "2-0")] == ["3", "2", "1"]
    assert "2-1" not in started


def test_the_last_rank_is_started_again_all_the_same(stubs) -> None:
    one = stubs([["kill"], [0]], restarts=1, fewer_ranks=True)
    code, lines = one.end()
    assert code == 0
    assert "on 1 rank (1 of 1)" in lines[0]


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_all_ranks_and_nothing_is_started_again(stubs, number: signal.Signals) -> None:
    one = stubs([["save", "save"]], restarts=3)
    one.wait_for("0-0", "0-1")
    one.process.send_signal(number)
    assert one.end() == (143, [])
    assert [(one.folder / f"saved-{rank}").read_text() for rank in range(2)] == ["15", "15"]


def test_ctrl_c_is_passed_on(tmp_path: Path, stubs) -> None:
    one = stubs([["save", "save"]], restarts=3)
    one.wait_for("0-0", "0-1")
    one.process.send_signal(signal.SIGINT)
    assert one.end() == (130, [])
    assert (tmp_path / "saved-0").read_text() == "2"


def test_a_signal_to_one_rank_stops_the_job(stubs) -> None:
    """The others learn it from that rank (`mdnet_dist.watch`): here they end by themselves."""
    one = stubs([["save", 143]], restarts=3)
    one.wait_for("0-0")
    os.kill(one.started()["0-0"]["pid"], signal.SIGTERM)
    assert one.end() == (143, [])


def test_a_rank_without_a_handler_yet_is_stopped_as_well(stubs) -> None:
    one = stubs([["sleep", "save"]], restarts=3)
    one.wait_for("0-0", "0-1")
    one.process.terminate()
    assert one.end() == (143, [])


def test_ranks_that_do_not_stop_are_killed_in_time(stubs) -> None:
    one = stubs([["ignore", "save"]], restarts=3, stop_seconds=1.0)
    one.wait_for("0-0", "0-1")
    started = time.monotonic()
    one.process.terminate()
    code, lines = one.end()
    assert code == 143
    assert lines == ["train.py: rank 0 hung and was ended: it did not stop in time; --resume continues"]
    assert time.monotonic() - started < 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_ranks_stop_when_their_supervisor_is_killed(stubs) -> None:
    one = stubs([["save", "save"]], restarts=3)
    one.wait_for("0-0", "0-1")
    one.process.kill()
    assert one.process.wait() == -signal.SIGKILL
    wait_until(lambda: len(list(one.folder.glob("saved-*"))) == 2, "both ranks have saved")
    ranks = [how["pid"] for how in one.started().values()]
    wait_until(lambda: not any(map(runs, ranks)), "both ranks have ended")


# ------------------------------------------------------------------------------------------------------------ decisions

CODES = st.sampled_from([0, 1, 2, 3, 75, 130, 143, 255, -1, -2, -6, -9, -10, -11, -15])
ENDINGS = st.lists(
    st.builds(lambda code, overdue: Ending(code=-9 if overdue else code, overdue=overdue), CODES, st.booleans()),
    min_size=1,
    max_size=9,
)


@given(ENDINGS, st.sampled_from([None, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
def test_a_job_is_started_again_only_for_a_lost_rank(endings: list[Ending], asked: signal.Signals | None) -> None:
    code, codes = verdict(endings, asked), {ending.code for ending in endings if not ending.overdue}
    assert code in (None, 0, 2, 3, 130, 143)
    assert (code == 0) == all(ending.code == 0 for ending in endings)
    assert (code == 2) == (2 in codes)
    if code is None:
        assert asked is None
        assert not codes & {2, 3, 130, 143, -15, -10, -1, -2}
        assert codes & {1, 75, 255, -6, -9, -11} or any(ending.overdue for ending in endings)
        assert describe(endings)
    elif not codes & {2, 3} and asked is not None and code:
        assert code == (130 if asked == signal.SIGINT else 143)


@given(ENDINGS)
def test_those_who_died_do_not_survive(endings: list[Ending]) -> None:
    places = [10 * number for number in range(len(endings))]
    left = survivors(places, endings)
    assert left
    assert left == sorted(set(left))
    died = [place for place, ending in zip(places, endings) if ending.code in (1, 255, -6, -9, -11) and ending.gone]
    if len(died) < len(places):
        assert not set(died) & set(left)
    if died:
        assert left == ([place for place in places if place not in died] or places[:1])


def test_what_happened_is_told_in_words() -> None:
    missed, overdue = Ending(code=75), Ending(code=-9, overdue=True)
    assert describe([missed, missed]) == "a rank hung or was lost"
    assert describe([missed, overdue]) == "rank 1 hung and was ended"
    assert describe([Ending(code=-11), overdue]) == "rank 0 was killed by SIGSEGV"
    assert describe([Ending(code=1), missed, Ending(code=-63)]) == (
        "rank 0 ended with code 1, rank 2 was killed by signal 63"
    )
    assert describe([Ending(code=1)] * 10).endswith("rank 7 ended with code 1 and 2 more")
