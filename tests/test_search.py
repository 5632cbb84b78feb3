"""`launch/tune_beta.py` as a person runs it, over a tiny set: searches that end, fail, are stopped and are killed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mdnet_dist.config import as_yaml, load_config
from mdnet_dist.run_folder import METRICS
from tests.conftest import REPOSITORY
from tests.test_train import _environment
from tests.tiny import tiny_config, tiny_set
from tune.ledger import Ledger, reports_of
from tune.population import lineage
from tune.records import TrialRecord

pytestmark = pytest.mark.timeout(900)  # Ray starts some ten processes for a trial, which takes long on a busy machine

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


@pytest.fixture
def search(tmp_path: Path) -> Path:
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
            env={**_environment(), **(environment or {})},
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


@pytest.mark.slow
def test_two_trials_of_two_workers_each(search: Path, tmp_path: Path) -> None:
    """And none reads test data: there is only rubbish where it should be."""
    next((tmp_path / "shards").glob("test-*.tar")).write_bytes(b"rubbish")
    code, out, err = run(search, "trials.workers=2", "trials.restarts=0", environment={"MARK": str(tmp_path)})
    assert (code, err) == (0, ""), err + out
    trials = trials_in(search)
    assert [trial.status for trial in trials] == ["finished", "finished"]
    assert all([report.epoch for report in trial.reports] == [1, 2] for trial in trials)

    folder = tmp_path / "runs" / "small"
    best = min(trials, key=lambda trial: trial.score(METRIC, "min") or 0)
    config = load_config(folder / "best.yaml")
    assert config.model.image.concat_depth == best.point["model.image.concat_depth"]
    assert config.blend.beta.kind == best.point["blend.beta"]
    assert config.train.epochs == 1, "best.yaml is as long as the base, not as the trials"
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished", "finished"]
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert {"parameters.png", "beta_schedules.png", "parallel_coordinates.png", "concat_depth.png"} <= pictures

    runs = mlflow_runs(search)
    parent = runs.pop("small")
    assert set(runs) == {trial.name for trial in trials}
    assert parent.data.tags["mlflow.note.content"] == (folder / "summary.md").read_text()
    assert best.name in parent.data.tags["mlflow.note.content"]
    for one in runs.values():
        assert one.info.status == "FINISHED"
        assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert one.data.tags["world_size"] == "2"
        assert one.data.tags["search.status"] == "finished"
        assert "test/dca" not in one.data.metrics
    assert f"best   deepspeed launch/train.py {folder / 'best.yaml'}" in out
    assert_nothing_is_left(search)


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


@pytest.mark.slow
def test_a_failing_trial_is_marked_and_the_search_goes_on(search: Path) -> None:
    """One option makes the loss infinite; with more such trials than the allowed share the search ends with 3."""
    options = (
        "trials.count=4",
        "searcher={kind: grid}",
        "space={optimizer.image.lr: {choice: [0.01, 1.0e+38]}, model.image.concat_depth: {choice: [0, 1]}}",
        "train.max_bad_steps=1",
    )
    code, out, err = run(search, *options)
    assert (code, err) == (0, ""), err + out
    trials = trials_in(search)
    assert [trial.status for trial in trials] == ["finished", "finished", "failed", "failed"]
    assert all("not finite" in trial.reason for trial in trials[2:])
    runs = mlflow_runs(search)
    for trial in trials[2:]:
        assert runs[trial.name].info.status == "FAILED"
        assert runs[trial.name].data.tags["search.reason"] == trial.reason
    assert "failed" in (search.parent / "runs" / "small" / "summary.md").read_text()

    (search.parent / "err.txt").unlink()
    code, out, err = run(search, *options, "trials.max_failed_share=0.4", "--resume")
    assert code == 3
    assert err.startswith("tune_beta.py: 2 of 4 trials failed, more than trials.max_failed_share 0.4 allows"), err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_population_finds_a_schedule_that_trains_alone(search: Path, tmp_path: Path) -> None:
    options = (
        "name=population",
        "trials={count: 3, overrides: [train.epochs=2]}",
        "scheduler={kind: pbt, every_epochs: 1}",
        "space={blend.beta.value: {uniform: [0.05, 0.95]}, blend.eta: {log_uniform: [0.3, 30]}}",
    )
    code, out, err = run(search, *options)
    assert (code, err) == (0, ""), err + out
    members = {trial.name: trial for trial in trials_in(search, "population")}
    assert [len(member.segments) for member in members.values()] == [2, 2, 2]
    copies = [member for member in members.values() if member.segments[1].parent]
    assert len(copies) == 1
    assert f"{copies[0].name} goes on from {copies[0].segments[1].parent}" in out
    assert all([report.epoch for report in member.reports] == [1, 2] for member in members.values())

    folder = tmp_path / "runs" / "population"
    best = load_config(folder / "best.yaml")
    winner = min(members.values(), key=lambda member: member.reports[-1].metrics[METRIC])
    stretches = lineage(members, winner.name)
    assert best.blend.beta.kind in ("constant", "piecewise")
    value = best.blend.beta.value if best.blend.beta.kind == "constant" else best.blend.beta.knots[0][1]
    assert value == pytest.approx(stretches[0].beta)
    confirmed = trials_in(search, "population", "confirm")
    assert [(trial.name, trial.status) for trial in confirmed] == [
        ("best-seed-0", "finished"),
        ("base-seed-0", "finished"),
    ]
    assert (folder / "confirm" / "best-seed-0" / METRICS).exists()
    assert (folder / "pictures" / "population.png").exists()
    assert set(mlflow_runs(search)) == {"population", *members, "best-seed-0", "base-seed-0"}


@pytest.fixture
def three_machines() -> Iterator[tuple[Any, list[Any]]]:
    """A cluster of raylets on this machine: a head without CPUs, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    # A machine counts as gone after three seconds instead of thirty.
    alive = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
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


def test_wrong_files_end_with_one_line_before_anything_starts(search: Path, tmp_path: Path) -> None:
    text = search.read_text()
    wrong = {
        "metric: val/": ("metrc: val/", "search.yaml line 10: metrc: unknown key; did you mean 'metric'?"),
        "kind: linear": ("kind: lineal", "lineal"),
        "[0, 1]}": ("[0, 9]}", "concat_depth 9 exceeds"),
        "{uniform: [0.05, 0.95]}": ("{unifrom: [0.05, 0.95]}", "uniform"),
    }
    for old, (new, message) in wrong.items():
        search.write_text(text.replace(old, new, 1))
        for name in ("out.txt", "err.txt"):
            (tmp_path / name).unlink(missing_ok=True)
        code, out, err = run(search)
        assert (code, out) == (2, "")
        assert message in err and err.startswith(f"tune_beta.py: {search}") and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()
