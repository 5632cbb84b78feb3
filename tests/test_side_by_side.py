"""Several jobs at a time: started in order, watched, and nothing left of them. Plain Python stands for the launcher."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from mdnet_dist import side_by_side
from mdnet_dist.errors import InputError
from mdnet_dist.side_by_side import Devices, Job, Running, gpu_numbers, run_side_by_side

SLEEPS = "import time; print('started', flush=True); time.sleep(100)"
# A launcher that ends at once and leaves a rank behind.
ORPHANS = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); sys.exit(5)"
# A rank that wants a second to write its checkpoint.
SAVES = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)
    print('saved', flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print('started', flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's first argument is the program that runs instead of DeepSpeed's launcher."""

    def command(arguments: Sequence[str], devices: Devices) -> list[str]:
        return [sys.executable, "-S", "-c", *arguments]

    monkeypatch.setattr(side_by_side, "launcher_command", command)


def jobs(folder: Path, *programs: str) -> list[Job]:
    return [Job(name=str(k), arguments=[text], log=folder / f"{k}.log") for k, text in enumerate(programs)]


class Watcher:
    """Remembers what ran, and calls something once so many jobs have printed that they started."""

    def __init__(self, started: int = 0, then: Sequence[int] = ()) -> None:
        self.most, self.groups, self.done = 0, set[int](), list[str]()
        self._started, self._then = started, list(then)

    def __call__(self, running: list[Running], done: list[Job]) -> None:
        self.most = max(self.most, len(running))
        self.groups |= {one._process.pid for one in running}
        self.done = [job.name for job in done]
        if self._then and sum(one.last_line() == "started" for one in running) >= self._started:
            for number in self._then:
                os.kill(os.getpid(), number)
            self._then = []

    def assert_nothing_is_left(self) -> None:
        assert self.groups
        for group in self.groups:
            with pytest.raises(ProcessLookupError):
                os.killpg(group, 0)


def test_jobs_run_in_order_and_never_more_than_so_many(tmp_path: Path) -> None:
    watcher = Watcher()
    assert run_side_by_side(jobs(tmp_path, *["print('x')"] * 5), 2, 1, 0, watch=watcher) is None
    assert watcher.most == 2
    assert sorted(watcher.done) == list("01234")
    assert watcher.done[-1] in "34", "the last to start are the last to end"
    watcher.assert_nothing_is_left()


def test_the_first_that_fails_stops_the_others(tmp_path: Path) -> None:
    watcher = Watcher()
    programs = [SLEEPS, "import sys; print('x.py: why'); print('later'); sys.exit(3)", "print('never')"]
    failed = run_side_by_side(jobs(tmp_path, *programs), 2, 1, 0, watch=watcher)
    assert failed is not None
    assert (failed.job.name, failed.exit_code(), failed.last_line()) == ("1", 3, "later")
    assert not (tmp_path / "2.log").exists()
    watcher.assert_nothing_is_left()


def test_ranks_that_outlive_their_launcher_are_stopped(tmp_path: Path) -> None:
    watcher = Watcher()
    failed = run_side_by_side(jobs(tmp_path, ORPHANS), 1, 1, 0, watch=watcher)
    assert failed is not None
    assert failed.exit_code() == 5
    watcher.assert_nothing_is_left()


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_a_signal_is_obeyed_when_all_have_saved_and_stopped(tmp_path: Path, numbers: list[int]) -> None:
    """Also where a second signal comes while they stop: it must not cut that short."""
    watcher, obeyed = Watcher(started=2, then=numbers), list[int]()
    before = {number: signal.signal(number, lambda number, _: obeyed.append(number)) for number in set(numbers)}
    try:
        assert run_side_by_side(jobs(tmp_path, SAVES, SAVES, SLEEPS), 2, 1, 0, watch=watcher) is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(obeyed) == 1, "the program is told once, by the handler that it had"
    assert obeyed[0] in numbers
    watcher.assert_nothing_is_left()
    for name in "01":
        assert (tmp_path / f"{name}.log").read_text().splitlines()[-1] == "saved"
    assert not (tmp_path / "2.log").exists()


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watcher = Watcher(started=1, then=[signal.SIGHUP])
        program = "import time; print('started', flush=True); time.sleep(1)"
        assert run_side_by_side(jobs(tmp_path, program), 1, 1, 0, watch=watcher) is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert watcher.done == ["0"]


def test_it_runs_in_another_thread_and_an_exception_stops_the_jobs(tmp_path: Path) -> None:
    """As a search may call it."""
    groups, caught = set[int](), list[BaseException]()

    def watch(running: list[Running], done: list[Job]) -> None:
        groups.update(one._process.pid for one in running)
        raise LookupError("from the watcher")

    def call() -> None:
        try:
            run_side_by_side(jobs(tmp_path, SLEEPS), 1, 1, 0, watch=watch)
        except LookupError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert len(caught) == len(groups) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(groups.pop(), 0)


def test_why_it_failed_is_the_program_s_own_line(tmp_path: Path) -> None:
    """Not the launcher's remark behind it, nor a line of an earlier attempt in the same log."""
    log = tmp_path / "a.log"
    log.write_text("train.py: an older reason\n")
    job = Job(name="a", arguments=["pass", "launch/train.py"], log=log)
    running = Running(job, Devices(accelerators=1))
    running.wait_until_gone(30)
    assert running.reason() == ""
    assert log.read_text().splitlines()[-1] == "$ deepspeed --num_accelerators 1 pass launch/train.py"
    with open(log, "a") as file:
        file.write("pass: the reason\n[launch.py] exits with return code = 2\n")
    assert running.reason() == "pass: the reason"
    assert "return code" in running.last_line()


def test_the_command_is_what_a_person_types(tmp_path: Path) -> None:
    arguments = ["pass", "train.epochs=2", "deepspeed={a: 1}"]
    running = Running(Job(name="a", arguments=arguments, log=tmp_path / "a.log"), Devices(accelerators=2))
    running.wait_until_gone(30)
    assert running.command == "deepspeed --num_accelerators 2 pass train.epochs=2 'deepspeed={a: 1}'"


def test_gpus_are_the_visible_ones_by_the_machine_s_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_numbers(3) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,1,7")
    assert gpu_numbers(4) == ["4", "6", "1", "7"]
    devices = [Devices(accelerators=2, slot=slot, side_by_side=2, gpus=4) for slot in range(2)]
    assert [one.launcher_options()[1] for one in devices] == ["localhost:4,6", "localhost:1,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,GPU-1")
    with pytest.raises(InputError, match="GPU-8932f937,GPU-1: the DeepSpeed launcher wants GPUs by number"):
        gpu_numbers(2)


def test_cores_are_shared_by_those_that_run(tmp_path: Path) -> None:
    """One job alone has all cores, whatever number may run at once."""
    program = "import os; print(os.environ['OMP_NUM_THREADS'])"
    [job] = jobs(tmp_path, program)
    assert run_side_by_side([job], 64, 1, 0, watch=Watcher()) is None
    assert int(job.log.read_text().splitlines()[-1]) == (os.cpu_count() or 1)
