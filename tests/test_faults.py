"""What befalls a rank, a loader or the launcher, and how the job ends: one line, a code, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mdnet_dist.checkpoint import checkpoints
from mdnet_dist.config_file import as_yaml
from mdnet_dist.watch import Place, is_lost_peer, lost_ranks, standing_still
from tests.conftest import REPOSITORY
from tests.soak import write_figures
from tests.test_train import deepspeed
from tests.tiny import tiny_config, tiny_set

PATIENCE_SECONDS = 6.0
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", MLFLOW_DISABLE_TELEMETRY="true")
ENVIRONMENT["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as programs set it before they import torch


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that would take an hour."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_set(folder / "shards", train=40)
    endless = {"train.epochs": 5000, "evaluate.every_epochs": 5000, "train.checkpoint_every_epochs": 5000}
    endless |= {"train.patience_seconds": PATIENCE_SECONDS, "data.workers": 1}
    path = folder / "config.yaml"
    path.write_text(as_yaml(tiny_config(folder / "shards", folder / "runs", endless)))
    return path


@pytest.mark.slow
def test_what_befalls_one_rank(config: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.faults", str(config), str(config.parent / "runs")],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    told: dict[str, dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    for name, case in told.items():
        # One line, by whoever is left to say it, and no traceback: a lost rank is nobody's defect.
        assert len(case["said"]) == 1 and case["left"] == 0, (name, case)
        assert not case["traceback"], (name, case["said"], case["traceback"])

    stopped = "--resume continues from the newest checkpoint in "
    for name, lost, survivor in (("the last", 1, 0), ("the first", 0, 1)):
        case = told[f"{name} rank is killed"]
        assert case["codes"][survivor] == 3 and case["codes"][lost] == -signal.SIGKILL, case
        assert f"rank {lost} no longer answers: killed, or its machine is lost; {stopped}" in case["said"][0]
        assert case["seconds"] < 20, case
        case = told[f"{name} rank is stopped"]
        assert case["codes"][survivor] == 3 and case["codes"][lost] is None, case
        assert "nothing has moved for" in case["said"][0] and f"rank {lost} no longer answers" in case["said"][0]
        assert PATIENCE_SECONDS < case["seconds"] < PATIENCE_SECONDS + 20, case
        case = told[f"{name} rank is told to stop"]
        assert case["codes"] == [143, 143], case
        assert case["saved"] >= case["step"] and case["seconds"] < 30, case
        assert f"step {case['saved']}, --resume continues" in case["said"][0]
        case = told[f"{name} rank's loader is killed"]
        assert case["codes"] == [3, 3], case
        assert f"rank {lost}: a loader process was killed, for want of memory perhaps; {stopped}" in case["said"][0]
    case = told["the last rank's loader is stopped"]
    assert case["codes"] == [3, 3], case
    assert "rank 1 hangs, reading the data of step" in case["said"][0], case
    assert PATIENCE_SECONDS < case["seconds"] < PATIENCE_SECONDS + 20, case
    write_figures("faults", told)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_outlive_their_launcher_by_a_checkpoint(number: signal.Signals, config: Path) -> None:
    """DeepSpeed's launcher dies of the signal at once (a shell shows 143); its ranks save, and go."""
    name = f"launcher-{number.name}"
    run, log = config.parent / "runs" / name, config.parent / f"{name}.log"
    with launched(config, name, log) as launcher:
        while not (path := run / "metrics.jsonl").exists() or len(path.read_bytes().splitlines()) < 3:
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.1)
        started = psutil.Process(launcher.pid).children(recursive=True)
        assert len(started) >= 5, "one launcher on this machine, two ranks, their loaders"
        launcher.send_signal(number)
        assert launcher.wait(5) == -number
        _, alive = psutil.wait_procs(started, timeout=40)
        assert not alive, alive
    assert f"train.py: stopped by a signal; {checkpoints(run)[-1]} holds step" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_ranks_that_were_started_after_their_launcher_had_gone_stop_too(config: Path) -> None:
    """SIGTERM in the first seconds: the launcher's process below it goes on, and starts ranks without a parent."""
    run, log = config.parent / "runs" / "early", config.parent / "early.log"
    with launched(config, "early", log) as launcher:
        while not (started := psutil.Process(launcher.pid).children()):
            time.sleep(0.01)
        launcher.terminate()
        assert launcher.wait(5) == -signal.SIGTERM
        psutil.wait_procs(started, timeout=100)
        assert not started[0].is_running()
    assert "stopped by a signal" in log.read_text()
    assert not run.exists() or len(checkpoints(run)) == 1


@contextmanager
def launched(config: Path, name: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job of two ranks under DeepSpeed's launcher; at the end nothing of it is left."""
    with open(log, "w") as output:
        command = [*deepspeed(2), "launch/train.py", str(config), f"name={name}"]
        launcher = subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield launcher
    finally:
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # one that ends meanwhile
                if f"name={name}" in process.cmdline():
                    process.kill()
        launcher.wait()


# ------------------------------------------------------------------------------------------------------ the roll call


def at(begun: int, what: str = "computing step 7") -> Place:
    return Place(beat=1, begun=begun, what=what)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({0: at(5), 1: None}, "rank 1 no longer answers"),
        ({0: None, 1: at(5)}, "rank 0 no longer answers"),
        ({0: at(5), 1: None, 2: None}, "ranks 1, 2 no longer answer"),
        ({0: at(5), 1: at(4, "reading the data of step 7")}, "rank 1 hangs, reading the data of step 7"),
        ({0: at(5), 1: at(4, "x"), 2: at(4, "x")}, "ranks 1, 2 hang, x"),
        ({0: at(5), 1: at(5)}, "all ranks hang, computing step 7"),
        ({0: at(5)}, "rank 0 hangs, computing step 7"),
        (dict.fromkeys(range(1, 12)) | {0: at(1)}, "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more no longer answer"),
    ],
)
def test_who_keeps_the_others_waiting(places: dict[int, Place | None], said: str) -> None:
    assert standing_still(places) == said


def test_who_is_lost() -> None:
    assert lost_ranks({0: at(1), 1: None}) == "rank 1 no longer answers: killed, or its machine is lost"
    assert lost_ranks({0: at(1), 1: at(1)}) == "an exchange between ranks failed though all of them answer"


def test_places_survive_the_store() -> None:
    place = Place(beat=3, begun=14, what="scoring val, test after step 20")
    assert Place.parse(str(place).encode()) == place


def test_errors_of_the_network_are_told_from_others() -> None:
    assert is_lost_peer(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost_peer(torch.distributed.DistNetworkError("refused"))
    assert not is_lost_peer(RuntimeError("CUDA out of memory"))
    assert not is_lost_peer(ValueError("gloo"))
