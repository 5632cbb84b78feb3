"""`--auto-resume`: what it hands to the supervisor, and whole trainings whose processes are killed."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mdnet_dist import auto_resume
from mdnet_dist.auto_resume import add_options, check_options, run_supervised
from mdnet_dist.checkpoint import checkpoints, load_checkpoint
from mdnet_dist.config import RunConfig
from mdnet_dist.config_file import as_yaml
from mdnet_dist.errors import SUPERVISED, InputError
from tests.conftest import REPOSITORY
from tests.test_supervisor import runs, wait_until
from tests.tiny import tiny_config, tiny_set

SECONDS = 240.0
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")


# ------------------------------------------------------------------------------------------------------------- options


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    add_options(parser)
    return parser.parse_args(arguments)


class Handed:
    """Stands for `supervise`: remembers what it was given."""

    def __init__(self) -> None:
        self.command: list[str] = []
        self.ranks = 0
        self.keywords: dict[str, Any] = {}
        self.write: Callable[[Path], object] = lambda folder: None

    def __call__(self, command: list[str], ranks: int, **keywords: Any) -> int:
        self.command, self.ranks, self.keywords = command, ranks, keywords
        assert self.folder.is_dir()
        self.write(self.folder)
        return 75

    @property
    def folder(self) -> Path:
        return Path(self.command[self.command.index("--run-folder") + 1])


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Handed:
    """No launcher, no GPU, and nothing is started."""
    for name in (*LAUNCHER, "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    found = Handed()
    monkeypatch.setattr(auto_resume, "supervise", found)
    monkeypatch.setattr(auto_resume, "count_gpus", lambda: 0)
    return found


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path / "shards", tmp_path / "runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2"], "--ranks: only with --auto-resume N"),
        (["--fewer-ranks"], "--fewer-ranks: only with --auto-resume N"),
        (["--auto-resume", "-1"], "--auto-resume -1: must be a number of restarts, 0 or more"),
        (["--auto-resume", "1", "--ranks", "0"], "--ranks 0: must be 1 or more"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_options(parse(*arguments))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "arguments", [[], ["--resume"], ["--auto-resume", "0"], ["--auto-resume", "1", "--ranks", "1"]]
)
def test_others_are_taken(arguments: list[str]) -> None:
    check_options(parse(*arguments))


def test_a_new_run_is_made_here_and_named_to_the_ranks(handed: Handed, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    handed.write = lambda folder: (folder / "config.yaml").touch()
    arguments = ["train.py", "tiny.yaml", "train.epochs=2"]
    assert run_supervised(config, parse("--auto-resume", "3", "--ranks", "2"), arguments) == 75
    folder = tmp_path / "runs" / "tiny-2"
    assert handed.command == [sys.executable, "-u", *arguments, "--run-folder", str(folder)]
    assert handed.ranks == 2
    assert handed.keywords["restarts"] == 3
    assert handed.keywords["again"] == ["--resume"]
    assert handed.keywords["fewer_ranks"] is False
    assert folder.is_dir()


def test_a_run_that_wrote_nothing_leaves_no_folder(handed: Handed, config: RunConfig, tmp_path: Path) -> None:
    run_supervised(config, parse("--auto-resume", "0"), ["train.py"])
    assert handed.ranks == 1
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(("there", "continued"), [([], None), (["tiny"], "tiny"), (["tiny", "tiny-2"], "tiny-2")])
def test_with_resume_the_newest_run_is_continued_or_one_begun(
    handed: Handed, config: RunConfig, tmp_path: Path, there: list[str], continued: str | None
) -> None:
    for name in there:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    run_supervised(config, parse("--auto-resume", "1", "--resume", "--fewer-ranks"), ["train.py"])
    assert handed.folder == tmp_path / "runs" / (continued or "tiny")
    assert handed.command.count("--resume") == (continued is not None)
    assert handed.keywords["again"] == ([] if continued else ["--resume"])
    assert handed.keywords["fewer_ranks"] is True


def test_cores_are_shared_out_unless_someone_did(
    handed: Handed, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    run_supervised(config, parse("--auto-resume", "1", "--ranks", "4"), ["train.py"])
    environment = handed.keywords["environment"]
    assert environment([0, 1, 2, 3]) == {"OMP_NUM_THREADS": "3", "DS_ACCELERATOR": "cpu"}
    assert environment([0, 3])["OMP_NUM_THREADS"] == "6"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" not in environment([0, 1])


@pytest.mark.parametrize(
    ("visible", "left"), [(None, "0,2"), ("4,5,6", "4,6"), ("GPU-a,GPU-b,GPU-c", "GPU-a,GPU-c"), ("", "0,2")]
)
def test_the_gpu_of_a_rank_that_died_is_left_out(
    handed: Handed, config: RunConfig, monkeypatch: pytest.MonkeyPatch, visible: str | None, left: str
) -> None:
    monkeypatch.setattr(auto_resume, "count_gpus", lambda: 3)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run_supervised(config, parse("--auto-resume", "1"), ["train.py"])
    assert handed.ranks == 3, "by default as many as GPUs"
    assert handed.keywords["environment"]([0, 2]) == {"CUDA_VISIBLE_DEVICES": left}


def test_more_ranks_than_gpus_are_refused(
    handed: Handed, config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(auto_resume, "count_gpus", lambda: 1)
    with pytest.raises(InputError, match=r"^--ranks 2: this machine has 1 GPU$"):
        run_supervised(config, parse("--auto-resume", "1", "--ranks", "2"), ["train.py"])
    assert not (tmp_path / "runs").exists()


def test_the_launcher_says_how_many_ranks(handed: Handed, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    run_supervised(config, parse("--auto-resume", "1"), ["train.py"])
    assert handed.ranks == 2
    with pytest.raises(InputError, match=r"^--ranks 3: the launcher has started 2; leave it out$"):
        run_supervised(config, parse("--auto-resume", "1", "--ranks", "3"), ["train.py"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"^--auto-resume: 2 of the job's 4 ranks are on this machine; .* --resume$"):
        run_supervised(config, parse("--auto-resume", "1"), ["train.py"])


def test_a_sweep_is_refused() -> None:
    command = "launch/train_cifar.py launch/configs/cifar10_small.yaml --sweep concat_depth --auto-resume 1"
    finished = subprocess.run(
        [sys.executable, *command.split()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2
    assert finished.stderr == (
        "train_cifar.py: --auto-resume: for one run, not with --sweep; a sweep is continued by hand, with --resume\n"
    )


# The launcher's processes: the first waits for a signal and says which, the second waits for the first.
FIRST = """
import signal, sys, time
def told(number, frame):
    time.sleep(0.5)
    print(number)
    sys.exit(143)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
print("ready", flush=True)
time.sleep(100)
"""
SECOND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from mdnet_dist import auto_resume
runs = auto_resume._runs
auto_resume._runs = lambda process: print("waits", flush=True) or runs(process)
auto_resume.wait_for_the_first()
"""


@pytest.mark.parametrize(
    ("number", "arrives"), [(signal.SIGTERM, 15), (signal.SIGUSR1, 15), (signal.SIGINT, 2), (signal.SIGHUP, 15)]
)
def test_the_launchers_other_processes_wait_and_pass_signals_on(number: signal.Signals, arrives: int) -> None:
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env={**os.environ, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, program in (("0", FIRST), ("1", SECOND))
    )
    with first, second:
        try:
            assert first.stdout and first.stdout.readline() == "ready\n"
            assert second.stdout and second.stdout.readline() == "waits\n"
            second.send_signal(number)
            assert first.wait(10) == 143
            assert first.stdout.read() == f"{arrives}\n"
            second.communicate(timeout=10)
            assert second.returncode == 0
        finally:
            first.kill()
            second.kill()


# ------------------------------------------------------------------------------------------------------------ trainings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny set, a configuration `tiny.yaml`, and `runs/whole`: two ranks that nobody disturbed."""
    path = tmp_path_factory.mktemp("auto_resume")
    tiny_set(path / "shards")
    overrides = {"train.epochs": 30, "evaluate.every_epochs": 30, "blend.eta": "balanced"}
    (path / "tiny.yaml").write_text(as_yaml(tiny_config(path / "shards", path / "runs", overrides)))
    with training(path, "--auto-resume", "0", "--ranks", "2", "name=whole") as whole:
        output, errors = whole.communicate(timeout=SECONDS)
    assert whole.returncode == 0, errors
    assert "on 2 CPU ranks" in output
    return path


@contextlib.contextmanager
def training(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """`launch/train.py` in a process group of its own, of which nothing is left at the end."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", MLFLOW_DISABLE_TELEMETRY="true")
    process = subprocess.Popen(
        [sys.executable, *launcher, "launch/train.py", str(folder / "tiny.yaml"), *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [*processes_of(folder), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def processes_of(folder: Path, rank: int | None = None) -> list[int]:
    """What runs with this folder's configuration: all processes, or those of a rank that a supervisor has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            own = str(folder / "tiny.yaml") in process.cmdline() and runs(process.pid)
            environment = process.environ() if rank is not None and own else {}
            if own and (rank is None or (SUPERVISED in environment and environment["RANK"] == str(rank))):
                found.append(process.pid)
    return found


def wait_for_line(process: subprocess.Popen[str], start: str) -> str:
    """The next line of the output that begins so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"no line '{start}': {process.stderr and process.stderr.read()}")


def own_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("train.py: ")]


def assert_same_weights(one: Path, other: Path) -> None:
    (progress, *tensors), (other_progress, *other_tensors) = (
        load_checkpoint(checkpoints(run)[-1]) for run in (one, other)
    )
    assert progress == other_progress
    for found, expected in zip(tensors, other_tensors):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_a_run_whose_rank_was_killed_ends_with_the_same_weights(folder: Path) -> None:
    """And it is this run that goes on, though an older and a newer one of its name are there."""
    (folder / "runs" / "killed").mkdir()
    with training(folder, "--auto-resume", "2", "--ranks", "2", "name=killed") as process:
        wait_for_line(process, "step 10/")
        (folder / "runs" / "killed-3").mkdir()
        assert psutil.Process(process.pid).memory_info().rss < 60 * 2**20, "no torch in the supervisor"
        [rank] = processes_of(folder, rank=1)
        os.kill(rank, signal.SIGKILL)
        assert "at step" in wait_for_line(process, f"resuming {folder}/runs/killed-2 ")
        errors = process.communicate(timeout=SECONDS)[1]
        assert process.returncode == 0, errors
        assert processes_of(folder) == []
    lines = own_lines(errors)
    assert lines[-1] == ("train.py: rank 1 was killed by SIGKILL; starting again from the last checkpoint (1 of 2)"), (
        errors
    )
    assert_same_weights(folder / "runs" / "killed-2", folder / "runs" / "whole")
    assert [list((folder / "runs" / name).iterdir()) for name in ("killed", "killed-3")] == [[], []]


@pytest.mark.slow
def test_under_the_launcher_a_killed_rank_then_a_killed_launcher_then_the_same_command(folder: Path) -> None:
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_accelerators", "2")
    command = ("--auto-resume", "1", "--resume", "name=launched")
    with training(folder, *command, launcher=launcher) as process:
        wait_for_line(process, "step 10/")
        [rank] = processes_of(folder, rank=0)
        os.kill(rank, signal.SIGKILL)
        wait_for_line(process, "resuming ")
        wait_for_line(process, "step ")
        process.terminate()  # the runner alone, which ends at once
        errors = process.communicate(timeout=SECONDS)[1]
        wait_until(lambda: not processes_of(folder), "nothing is left", 60)
    lines = own_lines(errors)
    assert "train.py: rank 0 was killed by SIGKILL; starting again from the last checkpoint (1 of 1)" in lines
    assert "stopped by a signal" in lines[-1]
    stopped_at = load_checkpoint(checkpoints(folder / "runs" / "launched")[-1])[0].step
    assert 9 <= stopped_at < 90

    with training(folder, *command, launcher=launcher) as process:
        assert f"at step {stopped_at} of 90" in wait_for_line(process, "resuming ")
        errors = process.communicate(timeout=SECONDS)[1]
        assert process.returncode == 0, errors
    assert_same_weights(folder / "runs" / "launched", folder / "runs" / "whole")


@pytest.mark.slow
def test_fewer_ranks_go_on_and_a_signal_to_one_of_them_stops_the_run(folder: Path) -> None:
    with training(folder, "--auto-resume", "1", "--ranks", "2", "--fewer-ranks", "name=fewer") as process:
        wait_for_line(process, "step 10/")
        [rank] = processes_of(folder, rank=1)
        os.kill(rank, signal.SIGKILL)
        assert "on 1 CPU rank," in wait_for_line(process, "training ")
        wait_for_line(process, "step ")
        [rank] = processes_of(folder, rank=0)
        started = time.monotonic()
        os.kill(rank, signal.SIGUSR1)
        errors = process.communicate(timeout=SECONDS)[1]
        assert process.returncode == 143, errors
        assert time.monotonic() - started < 30
    assert "starting again from the last checkpoint on 1 rank (1 of 1)" in errors
    assert processes_of(folder) == []


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_not_tried_again(folder: Path) -> None:
    wrong = ("optimizer.image.lr=1e30", "train.max_bad_steps=1")
    with training(folder, "--auto-resume", "3", "--ranks", "2", "name=infinite", *wrong) as process:
        errors = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 3
    [line] = own_lines(errors)
    assert "not finite" in line


@pytest.mark.slow
def test_wrong_input_is_said_once_and_leaves_nothing(folder: Path) -> None:
    wrong = ("train.global_batch=1", "train.micro_batch=1")
    with training(folder, "--auto-resume", "3", "--ranks", "2", "name=wrong", *wrong) as process:
        errors = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 2
    [line] = own_lines(errors)
    assert "global_batch 1 is less than the 2 ranks" in line
    assert not (folder / "runs" / "wrong").exists()
