"""Searches that are killed, stopped, or lose a worker or a machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.searches import (
    RAY,
    TIMEOUT_SECONDS,
    assert_nothing_is_left,
    end_session,
    mlflow_runs,
    processes_of,
    run,
    started,
    trials_in,
    validated,
    wait_for,
    write_search,
)

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A search file over a tiny set."""
    return write_search(tmp_path)


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(search: Path, tmp_path: Path) -> None:
    """SIGKILL to the driver while two trials run; nothing is run, or logged, twice."""
    options = ("trials.count=2", "trials.overrides=[train.epochs=14]")
    mark = {"MARK": str(tmp_path)}
    process = started(search, *options, environment=mark)
    try:
        wait_for(lambda: len(validated(search)) == 2 and min(validated(search)) >= 2, process)
        process.kill()
        process.wait(10)
        assert_nothing_is_left(search)
    finally:
        end_session(process)
    before = {trial.name: len(trial.reports) for trial in trials_in(search)}
    ids = {name: run.info.run_id for name, run in mlflow_runs(search).items()}
    assert all(0 < reports < 14 for reports in before.values())

    code, out, err = run(search, *options, "--resume", environment=mark)
    assert (code, err) == (0, ""), err + out
    trials = trials_in(search)
    assert [trial.status for trial in trials] == ["finished"] * 2
    assert all([report.epoch for report in trial.reports] == list(range(1, 15)) for trial in trials)
    runs = mlflow_runs(search)
    assert {name: runs[name].info.run_id for name in ids} == ids, "runs are continued, not begun again"
    assert all(run.info.status == "FINISHED" for run in runs.values())
    logs = [(tmp_path / "runs" / "small" / "trials" / f"{name}.log").read_text() for name in before]
    assert all(log.count("resuming") == 1 for log in logs)


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again(search: Path, tmp_path: Path) -> None:
    """SIGKILL to one of a trial's two ranks: both start again, from the last checkpoint, in the same session."""
    options = ("trials.count=1", "trials.workers=2", "trials.overrides=[train.epochs=12]")
    process = started(search, *options, environment={"MARK": str(tmp_path)})
    try:
        wait_for(lambda: sum(validated(search)) >= 2, process)
        ranks = [pid for pid, command in processes_of(search).items() if "RayTrainWorker" in command]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(400) == 0
    finally:
        end_session(process)
    [trial] = trials_in(search)
    assert trial.status == "finished"
    assert [report.epoch for report in trial.reports] == list(range(1, 13))
    log = (tmp_path / "runs" / "small" / "trials" / f"{trial.name}.log").read_text()
    assert "attempt 1 ended: a worker died" in log and log.count("resuming") == 1, log
    assert set(mlflow_runs(search)) == {"small", trial.name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, "tune_beta.py: stopped by SIGTERM; the same command")],
    ids=["SIGINT", "SIGTERM"],
)
def test_signals_stop_it_cleanly(search: Path, tmp_path: Path, number: signal.Signals, code: int, line: str) -> None:
    """Sent to the whole process group, as a terminal sends Ctrl-C and a job scheduler SIGTERM."""
    process = started(search, "trials.overrides=[train.epochs=1000]", environment={"MARK": str(tmp_path)})
    try:
        wait_for(lambda: sum(validated(search)) >= 1, process)
        os.killpg(process.pid, number)
        assert process.wait(90) == code
        assert_nothing_is_left(search)
    finally:
        end_session(process)
    err = (tmp_path / "err.txt").read_text()
    assert err.startswith(line) and err.count("\n") <= 1, err
    runs = mlflow_runs(search)
    assert runs.pop("small").info.status == "KILLED"
    for trial in trials_in(search):
        assert trial.status in ("running", "waiting")
        if trial.name in runs:
            assert runs[trial.name].info.status == "KILLED"
            assert runs[trial.name].data.tags["search.status"] == "interrupted"


@pytest.fixture
def three_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster of raylets on this machine: a head without CPUs, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    for name, value in RAY.items():
        monkeypatch.setenv(name, value)
    # A machine counts as gone after ten seconds instead of thirty; on busy cores fewer end machines that are there.
    alive = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 10}
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "_system_config": alive}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
    try:
        yield cluster, nodes
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_search_over_machines_outlives_one_of_them(
    search: Path, tmp_path: Path, three_machines: tuple[Any, list[Any]]
) -> None:
    """Two trials on two machines; one of these goes, and its trial goes on from its checkpoint on the other."""
    cluster, nodes = three_machines
    options = ("trials.overrides=[train.epochs=14]",)
    process = started(search, *options, environment={"RAY_ADDRESS": cluster.address, "MARK": str(tmp_path)})
    try:
        wait_for(lambda: len(validated(search)) == 2 and min(validated(search)) >= 2, process)
        cluster.remove_node(nodes[1], allow_graceful=False)
        assert process.wait(400) == 0
    finally:
        end_session(process)
    trials = trials_in(search)
    assert [trial.status for trial in trials] == ["finished", "finished"]
    assert all([report.epoch for report in trial.reports] == list(range(1, 15)) for trial in trials)
    logs = [(tmp_path / "runs" / "small" / "trials" / f"{trial.name}.log").read_text() for trial in trials]
    assert sum("resuming" in log for log in logs) == 1
    assert all(run.info.status == "FINISHED" for run in mlflow_runs(search).values())
