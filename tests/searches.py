"""`launch/tune_beta.py` as a person runs it, over a tiny set, and what it leaves: on disk, in MLflow, as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdnet_dist.config_file import as_yaml
from tests.conftest import REPOSITORY
from tests.test_train import _environment
from tests.tiny import tiny_config, tiny_set
from tune.ledger import Ledger, reports_of
from tune.records import TrialRecord

TIMEOUT_SECONDS = 900
"""Of a test: Ray starts some ten processes for a trial, which takes long on a busy machine."""
RAY = {"RAY_worker_niceness": "0"}
"""Ray starts workers at the lowest priority but four: beside another busy program they would get 3 % of a core."""
COMMAND = [sys.executable, "launch/tune_beta.py"]
SPACE = """\
  blend.beta:
    choice:
      - {kind: constant, value: {uniform: [0.05, 0.95]}}
      - {kind: linear, start: {uniform: [0.0, 1.0]}, end: {uniform: [0.0, 1.0]}}
  model.image.concat_depth: {choice: [0, 1]}
"""
METRIC = "val/loss_m"
"""A network this small says nothing right, so that its scores are all zero; its losses differ."""


def write_search(tmp_path: Path) -> Path:
    """A search file over a tiny set: two trials of two epochs, nothing stopped, nothing confirmed."""
    tiny_set(tmp_path / "shards")
    (tmp_path / "base.yaml").write_text(as_yaml(tiny_config(tmp_path / "shards", tmp_path / "runs")))
    path = tmp_path / "search.yaml"
    path.write_text(
        f"name: small\nruns_folder: {tmp_path / 'runs'}\nbase: {tmp_path / 'base.yaml'}\nspace:\n{SPACE}"
        f"metric: {METRIC}\nmode: min\ntrials: {{count: 2, overrides: [train.epochs=2]}}\nscheduler: {{kind: none}}\n"
        "confirm: {seeds: 0}\n"
    )
    return path


def started(search: Path, *overrides: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """The command, in a session of its own as a terminal gives it one; what it prints goes to out.txt and err.txt."""
    with open(search.parent / "out.txt", "ab") as out, open(search.parent / "err.txt", "ab") as err:
        return subprocess.Popen(
            [*COMMAND, str(search), *overrides],
            cwd=REPOSITORY,
            env={**_environment(), **RAY, **(environment or {})},
            stdout=out,
            stderr=err,
            start_new_session=True,
            # Where this test runs in the background of a shell, SIGINT is ignored, and would stay so.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def run(search: Path, *overrides: str, seconds: float = 400, **more: Any) -> tuple[int, str, str]:
    """Run it to its end: exit code, standard output, standard error."""
    process = started(search, *overrides, **more)
    try:
        process.wait(seconds)
    finally:
        end_session(process)
    return process.returncode, (search.parent / "out.txt").read_text(), (search.parent / "err.txt").read_text()


def end_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(10)


def trials_in(search: Path, name: str = "small", folder: str = "trials") -> list[TrialRecord]:
    return Ledger(search.parent / "runs" / name / folder).read()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the search ended before"
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def validated(search: Path) -> list[int]:
    """How many evaluations each trial that has begun has behind it."""
    folder = search.parent / "runs" / "small" / "trials"
    return [len(reports_of(path.parent)) for path in sorted(folder.glob("*/metrics.jsonl"))]


def processes_of(search: Path) -> dict[int, str]:
    """{id: command} of what has MARK in its environment: the search itself, Ray, workers and their loaders."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.name != str(os.getpid()) and str(search.parent) in (path / "environ").read_text(errors="replace"):
                found[int(path.name)] = (path / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
        except OSError:
            continue  # it has ended meanwhile
    return {pid: command for pid, command in found.items() if command}


def assert_nothing_is_left(search: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while commands := processes_of(search):
        assert time.monotonic() < deadline, "\n".join(commands.values())
        time.sleep(0.5)


def mlflow_runs(search: Path) -> dict[str, Any]:
    """{name: run} of the store, each name once."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{search.parent / 'runs' / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    names = [run.info.run_name for run in runs]
    assert len(names) == len(set(names)), names
    for one in runs:
        if any(name == METRIC for name in one.data.metrics):
            steps = [point.step for point in client.get_metric_history(one.info.run_id, METRIC)]
            assert len(steps) == len(set(steps)), f"{one.info.run_name} has points twice: {steps}"
    return dict(zip(names, runs))
