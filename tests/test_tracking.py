"""Nothing logged is lost or doubled, whatever the store and the job do; training never waits for the store."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import mlflow_ui
from mdnet_dist import mlflow_store, tracking, tracking_files
from mdnet_dist.config import TrackingConfig
from mdnet_dist.errors import InputError
from mdnet_dist.machine import free_port
from tests.conftest import REPOSITORY

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A prepared sqlite store; making one takes seconds, so the tests share it and each has a run of its own."""
    store = mlflow_store.sqlite_uri(tmp_path_factory.mktemp("store") / "runs" / "mlflow.db")
    mlflow_store.prepare_store(store)
    return store


def client_of(uri: str) -> Any:
    """A client that has nothing to do with the tracker's."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def open_run(
    uri: str | None, folder: Path, parameters: dict[str, Any] | None = None, **options: Any
) -> tracking.Tracker:
    config = TrackingConfig(uri=uri, experiment="tests")
    return tracking.open_tracker(config, folder, folder.name, parameters or {}, {}, **options)


def history(uri: str, tracker: tracking.Tracker, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client_of(uri).get_metric_history(tracker.run_id, name)]


def steps_in(folder: Path) -> list[int]:
    return [entry["step"] for entry in tracking_files.read_metrics(folder / tracking_files.METRICS_NAME)]


# ------------------------------------------------------------------------------------------------------------ addresses


def test_importing_the_file_does_not_import_mlflow():
    code = "import sys, mdnet_dist.tracking, mdnet_dist.figures; print({'mlflow', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert run.stdout == "set()\n"


def test_default_store_is_in_the_checkout_unless_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow_store.default_tracking_uri() == f"sqlite:///{REPOSITORY}/runs/mlflow.db"
    assert mlflow_store.default_tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert mlflow_store.default_tracking_uri(tmp_path) == "http://127.0.0.1:5000"


@pytest.mark.parametrize("name", ["a b", "100%", "a?b", "a#b", "ü"])
def test_odd_folder_names_survive_the_uri(tmp_path, name):
    path = tmp_path / name / "mlflow.db"
    assert mlflow_store.database_path(mlflow_store.sqlite_uri(path)) == path
    assert mlflow_store.checked_uri(mlflow_store.sqlite_uri(path)) == mlflow_store.sqlite_uri(path)


def test_a_relative_sqlite_uri_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert mlflow_store.checked_uri("sqlite:///x.db?timeout=3") == f"sqlite:///{tmp_path}/x.db?timeout=3"


@pytest.mark.parametrize("bad", ["./mlruns", "mlruns", "file:///srv/mlruns", "", "sqlite://", "sqlite:///:memory:"])
def test_stores_that_cannot_serve_are_refused_with_what_to_use_instead(tmp_path, bad):
    with pytest.raises(InputError, match=r"tracking\.uri .*use sqlite:////absolute"):
        mlflow_store.prepare_store(bad)


@pytest.mark.parametrize("password", ["secret", "sec/secret", "sec@secret"])
def test_a_server_that_does_not_answer_is_an_input_error_without_its_password(tmp_path, monkeypatch, password):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:{password}@127.0.0.1:9")
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9 does not answer: ") as caught:
        open_run(None, tmp_path / "run")
    assert "secret" not in str(caught.value)
    assert not list((tmp_path / "run").iterdir())


def test_a_file_that_is_no_database_is_an_input_error(tmp_path):
    (tmp_path / "x.db").write_text("this is text, not a database" * 100)
    with pytest.raises(InputError, match=r"x\.db does not answer: .*not a database"):
        mlflow_store.prepare_store(f"sqlite:///{tmp_path}/x.db")


# --------------------------------------------------------------------------------------------------------- a real store


def test_what_is_logged_can_be_read_back(uri, tmp_path, capfd):
    parameters = {
        "train.epochs": 3,
        "data.fold": None,
        "knots": [[0.0, 0.5]],
        "text": "x" * 7000,
        "ok": True,
        "deepspeed.a(b)": "http://me:secret@host/",
        **{f"many.{number}": number for number in range(250)},
    }
    tracker = open_run(uri, tmp_path / "run", parameters)
    tracker.log_metrics({"train/loss_m": 0.5, "train/loss_l": float("nan"), "grades/N:C (ratio)": 1}, step=10)
    tracker.log_metrics({"train/loss_m": 0.25, "beta": float("-inf")}, step=20)
    (tmp_path / "run" / "report.txt").write_text("mild")
    tracker.log_artifact(tmp_path / "run" / "report.txt", "reports")
    (tmp_path / "outside.txt").write_text("x")
    tracker.log_artifact(tmp_path / "outside.txt")
    tracker.log_artifact(tmp_path / "run" / "never_written.txt")
    (tmp_path / "run" / "folder").mkdir()
    (tmp_path / "run" / "folder" / "b.txt").write_text("b")
    tracker.log_artifact(tmp_path / "run" / "folder", "reports")
    tracker.log_tags({"device": "cpu"})
    tracker.close("FINISHED")
    tracker.close("FAILED")
    line = f"tracking: {tmp_path}/run/never_written.txt is gone, so MLflow does not get it\n"
    assert capfd.readouterr() == ("", line), "MLflow's own lines are kept off the console"

    client = client_of(uri)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert history(uri, tracker, "train/loss_m") == [(10, 0.5), (20, 0.25)]
    assert set(run.data.metrics) == {"train/loss_m", "grades/N:C _ratio_"}, "values that are not finite stay here"
    read = run.data.params
    assert (read["train.epochs"], read["data.fold"], read["knots"], read["ok"]) == ("3", "null", "[[0.0, 0.5]]", "true")
    assert read["deepspeed.a_b_"] == "http://host/"
    assert len(read["text"]) == 6000 and read["text"].endswith("(cut; whole in the config artifact)")
    assert read["many.249"] == "249"
    assert run.data.tags["device"] == "cpu"
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["outside.txt", "reports"]
    copy = client.download_artifacts(tracker.run_id, "reports/report.txt", str(tmp_path))
    assert Path(copy).read_text() == "mild"
    beside = mlflow_store.database_path(uri).parent / "mlartifacts"
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(beside)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [10, 20]
    assert json.loads(lines[1])["metrics"] == {"train/loss_m": 0.25, "beta": "-inf"}
    assert not (tmp_path / "run" / tracking_files.UNSENT_NAME).exists()
    with pytest.raises(RuntimeError, match="closed"):
        tracker.log_tags({"late": "yes"})


def test_a_resumed_run_has_no_gap_and_no_doubles(uri, tmp_path, capfd):
    folder = tmp_path / "run"
    first = open_run(uri, folder, {"train.epochs": 1, "seed": 0})
    for step in range(1, 11):
        first.log_metrics({"loss": 1 / step}, step)
    first.close("KILLED")
    # What a kill leaves: points that were in memory and never reached the store, and half a line.
    with open(folder / "metrics.jsonl", "a") as file:
        for step in (11, 12, 13):
            file.write(
                json.dumps({"step": step, "time": 1e9 + step, "metrics": {"loss": 1 / step, "rare": 1.0}}) + "\n"
            )
        file.write('{"step": 14, "ti')

    second = open_run(uri, folder, {"train.epochs": 2, "seed": 0, "new": 1}, resume=True, resume_step=12)
    assert second.run_id == first.run_id
    assert steps_in(folder) == list(range(1, 13))
    for step in range(13, 21):
        second.log_metrics({"loss": 1 / step}, step)
    second.close("FINISHED")
    third = open_run(uri, folder, {"train.epochs": 2}, resume=True, resume_step=5)
    for step in range(6, 26):
        third.log_metrics({"loss": 1 / step}, step)
    wait_until(lambda: client_of(uri).get_run(first.run_id).info.status == "RUNNING")
    third.close("FINISHED")

    assert sorted(history(uri, first, "loss")) == [(step, 1 / step) for step in range(1, 26)]
    assert history(uri, first, "rare") == [(11, 1.0), (12, 1.0)]
    assert steps_in(folder) == list(range(1, 26))
    run = client_of(uri).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.epochs": "1", "seed": "0", "new": "1"}
    assert run.data.tags["changed.train.epochs"] == "2"
    assert "changed.seed" not in run.data.tags
    assert capfd.readouterr() == ("", "")


def test_an_evaluation_appends_and_leaves_the_status(uri, tmp_path):
    first = open_run(uri, tmp_path)
    first.log_metrics({"test/bleu4": 0.5}, 100)
    first.close("FAILED")
    second = open_run(uri, tmp_path, resume=True)
    second.log_metrics({"test/bleu4": 0.6}, 100)
    second.close("FINISHED")
    assert sorted(history(uri, first, "test/bleu4")) == [(100, 0.5), (100, 0.6)]
    assert steps_in(tmp_path) == [100, 100]
    assert client_of(uri).get_run(first.run_id).info.status == "FAILED"


def test_starting_anew_in_the_same_folder_begins_another_run(uri, tmp_path):
    first = open_run(uri, tmp_path)
    first.log_metrics({"loss": 1.0}, 1)
    first.close("FINISHED")
    second = open_run(uri, tmp_path)
    second.close("FINISHED")
    assert second.run_id != first.run_id
    assert steps_in(tmp_path) == []


def test_a_run_that_was_deleted_is_begun_anew_with_all_its_points(uri, tmp_path):
    first = open_run(uri, tmp_path)
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step)
    first.close("KILLED")
    client_of(uri).delete_run(first.run_id)
    second = open_run(uri, tmp_path, resume=True, resume_step=2)
    second.close("FINISHED")
    assert second.run_id != first.run_id
    assert history(uri, second, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_run_deleted_while_training_is_said_once_and_training_goes_on(uri, tmp_path, capsys):
    tracker = open_run(uri, tmp_path)
    wait_until(lambda: not tracker._queue.qsize() and not tracker._on_its_way)
    client_of(uri).delete_run(tracker.run_id)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close("FINISHED")
    assert f"MLflow refused metrics of run {tracker.run_id}" in capsys.readouterr().err
    assert steps_in(tmp_path) == [1]


def test_a_deleted_experiment_is_an_input_error(uri, tmp_path):
    client = client_of(uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(InputError, match=r"tracking\.experiment 'gone' was deleted"):
        tracking.open_tracker(TrackingConfig(uri=uri, experiment="gone"), tmp_path, "run", {}, {})


def test_a_damaged_run_file_is_an_input_error(uri, tmp_path):
    (tmp_path / "mlflow_run.json").write_text("{")
    with pytest.raises(InputError, match=r"mlflow_run\.json: damaged"):
        open_run(uri, tmp_path, resume=True, resume_step=1)


def test_runs_nest_under_a_run_of_another_process(uri, tmp_path):
    parent = open_run(uri, tmp_path / "search")
    children = [open_run(uri, tmp_path / name, parent_run_id=parent.run_id) for name in ("a", "b")]
    for tracker in (*children, parent):
        tracker.close("FINISHED")
    client = client_of(uri)
    experiment = client.get_experiment_by_name("tests").experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert {run.info.run_id for run in found} == {tracker.run_id for tracker in children}


def test_a_killed_run_of_a_parent_whose_id_was_never_written_down_goes_on_under_its_name(uri, tmp_path):
    parent, other = (open_run(uri, tmp_path / name) for name in ("search", "another"))
    lost = {}
    for owner in (parent, other):
        for name in ("001-a", "002-b"):
            child = open_run(uri, tmp_path / owner.run_id / name, parent_run_id=owner.run_id)
            child.close("KILLED")
            lost[owner.run_id, name] = child.run_id
    folder = tmp_path / parent.run_id / "002-b"
    (folder / tracking.RUN_NAME).unlink()
    (folder / tracking_files.METRICS_NAME).write_text(
        tracking_files.as_line({"step": 3, "time": 1e9, "metrics": {"loss": 0.5}})
    )
    again = open_run(uri, folder, resume=True, resume_step=3, parent_run_id=parent.run_id)
    again.log_metrics({"loss": 0.25}, 6)
    again.close("FINISHED")
    assert again.run_id == lost[parent.run_id, "002-b"] == tracking.run_id_of(folder)
    assert history(uri, again, "loss") == [(3, 0.5), (6, 0.25)]
    client = client_of(uri)
    experiment = client.get_experiment_by_name("tests").experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert {run.info.run_id for run in found} == {lost[parent.run_id, name] for name in ("001-a", "002-b")}

    stranger = open_run(uri, tmp_path / "003-c", resume=True, resume_step=0, parent_run_id=parent.run_id)
    new = open_run(uri, tmp_path / parent.run_id / "002-b", parent_run_id=parent.run_id)
    assert len({stranger.run_id, new.run_id, *lost.values()}) == 6, "no such run, or not resumed: a new one"
    for tracker in (stranger, new, parent, other):
        tracker.close("FINISHED")


# ----------------------------------------------------------------------------------------------- ended from outside


def test_a_run_whose_process_was_killed_is_completed_from_its_folder(uri, tmp_path, capfd):
    tracker = open_run(uri, tmp_path)
    for step in range(1, 6):
        tracker.log_metrics({"loss": 1 / step}, step)
    tracker.close("FINISHED")
    with open(
        tmp_path / tracking_files.METRICS_NAME, "a"
    ) as file:  # what was in memory when it was killed, and half a line
        for step in (6, 7):
            metrics = {"loss": 1 / step, "rare": float("nan")}
            file.write(tracking_files.as_line({"step": step, "time": 1e9 + step, "metrics": metrics}))
        file.write('{"step": 8, "ti')
    client_of(uri).update_run(tracker.run_id, status="RUNNING")
    for status, reason in (("KILLED", "behind"), ("FAILED", "after all")):
        tracking.end_run(tmp_path, status, {"search.reason": reason, "search.status": "stopped"})
        run = client_of(uri).get_run(tracker.run_id)
        assert (run.info.status, run.data.tags["search.reason"]) == (status, reason)
        assert run.data.tags["search.status"] == "stopped"
        assert sorted(history(uri, tracker, "loss")) == [(step, 1 / step) for step in range(1, 8)]
        assert not (tmp_path / tracking_files.UNSENT_NAME).exists()
    assert "rare" not in run.data.metrics
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_was_never_logged_is_left_alone(tmp_path):
    tracking.end_run(tmp_path / "never", "KILLED", {"a": "b"})
    (tmp_path / "metrics.jsonl").write_text("")
    tracking.end_run(tmp_path, "KILLED", {"a": "b"})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert tracking.run_id_of(tmp_path) is None


def test_run_tags_name_versions_and_nothing_of_the_machine():
    tags = tracking.run_tags(2, "cpu")
    assert {"git_commit", "python", "world_size", "device", "version.torch", "version.mlflow"} <= set(tags)
    assert tags["world_size"] == "2"
    assert socket.gethostname() not in " ".join(tags.values())
    in_git = (REPOSITORY / ".git").exists()
    assert (len(tags["git_commit"].removesuffix("-dirty")) == 40) == in_git


# ----------------------------------------------------------------------------------------------------- stores that fail


class FakeStore:
    """A store in memory that fails as it is told; stands for MlflowClient. `points` counts (name, step, value)."""

    def __init__(self) -> None:
        self.points: Counter[tuple[str, int, float]] = Counter()
        self.artifacts: list[str] = []
        self.status = "RUNNING"
        self.tags: dict[str, str] = {}
        self.failures: list[str] = []  # for each coming request: "" works, "before" or "after" it was carried out
        self.dead = False
        self.artifacts_closed = False

    def _request(self, carry_out: Any) -> None:
        failure = "before" if self.dead else self.failures.pop(0) if self.failures else ""
        if failure != "before":
            carry_out()
        if failure:
            raise ConnectionError("[Errno 104] Connection reset by peer")

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="fake"))

    def get_run(self, run_id: str) -> Any:
        self._request(lambda: None)
        info = SimpleNamespace(lifecycle_stage="active")
        return SimpleNamespace(info=info, data=SimpleNamespace(params={}))

    def get_metric_history(self, run_id: str, name: str) -> list[Any]:
        self._request(lambda: None)
        return [SimpleNamespace(step=step) for key, step, _ in self.points if key == name]

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        def carry_out() -> None:
            self.points.update((metric.key, metric.step, metric.value) for metric in metrics)
            self.tags.update({tag.key: tag.value for tag in tags})

        self._request(carry_out)

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        if self.artifacts_closed:
            raise PermissionError("[Errno 13] Permission denied: '/mlartifacts'")
        self._request(lambda: self.artifacts.append(Path(path).name))

    def update_run(self, run_id: str, status: str) -> None:
        self._request(lambda: setattr(self, "status", status))

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self.update_run(run_id, status)


@pytest.fixture
def fake(monkeypatch):
    store = FakeStore()

    def connect(_uri: str) -> FakeStore:
        store._request(lambda: None)
        return store

    monkeypatch.setattr(mlflow_store, "open_client", connect)
    return store


def wait_until(true: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


FAKE_URI = "http://tracker.invalid"


def test_training_goes_on_when_the_store_dies_and_catches_up_when_it_is_back(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    tracker = open_run(FAKE_URI, tmp_path)
    tracker.log_metrics({"loss": 1.0}, 1)
    wait_until(lambda: fake.points)
    fake.dead = True
    for step in range(2, 500):
        tracker.log_metrics({"loss": 1.0 / step}, step)
    (tmp_path / "a.txt").write_text("a")
    tracker.log_artifact(tmp_path / "a.txt")
    wait_until(lambda: (tmp_path / tracking_files.UNSENT_NAME).exists())
    wait_until(lambda: not tracker._queue.qsize() and not tracker._on_its_way)
    time.sleep(0.2)  # several attempts
    fake.dead = False
    wait_until(lambda: not (tmp_path / tracking_files.UNSENT_NAME).exists())
    tracker.log_metrics({"loss": 0.0}, 500)
    tracker.close("FINISHED")
    assert sorted(step for _, step, _ in fake.points.elements()) == list(range(1, 501))
    assert (fake.artifacts, fake.status) == (["a.txt"], "FINISHED")
    line, *more = capsys.readouterr().err.splitlines()
    assert not more, "said once"
    assert FAKE_URI in line and "Connection reset" in line and "training goes on" in line


def test_what_a_dead_store_did_not_get_is_kept_and_sent_later(fake, tmp_path, capsys, monkeypatch):
    tracker = open_run(FAKE_URI, tmp_path / "run", {"seed": 1})
    fake.dead = True
    tracker.log_metrics({"loss": 1.0}, 1)
    (tmp_path / "run" / "a.txt").write_text("a")
    tracker.log_artifact(tmp_path / "run" / "a.txt")
    tracker.log_tags({"best_step": "1"})
    tracker.close("FAILED")
    unsent = [json.loads(line) for line in (tmp_path / "run" / tracking_files.UNSENT_NAME).read_text().splitlines()]
    assert {"metrics", "artifact", "tags", "status"} <= {operation["kind"] for operation in unsent}
    closing_line = capsys.readouterr().err.splitlines()[-1]
    assert f"`python -m mdnet_dist.tracking {tmp_path / 'run'}`" in closing_line

    moved = (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.setattr(sys, "argv", ["tracking", str(moved)])
    with pytest.raises(InputError, match="does not answer"):
        tracking.main()
    assert (moved / tracking_files.UNSENT_NAME).exists()
    fake.dead = False
    for _ in range(2):  # the second time there is nothing to do
        tracking.main()
        assert fake.points == {("loss", 1, 1.0): 1}
        assert (set(fake.artifacts), fake.tags["best_step"], fake.status) == ({"a.txt"}, "1", "FAILED")
        assert not (moved / tracking_files.UNSENT_NAME).exists()


def test_sending_again_wants_a_run_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tracking", str(tmp_path)])
    with pytest.raises(InputError, match=r"mlflow_run\.json: no such file"):
        tracking.main()
    monkeypatch.setattr(sys, "argv", ["tracking"])
    with pytest.raises(InputError, match="usage"):
        tracking.main()


def test_a_store_that_is_down_when_a_run_resumes_does_not_stop_it(fake, tmp_path, capsys):
    tracker = open_run(FAKE_URI, tmp_path)
    for step in range(1, 9):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.close("KILLED")
    fake.dead = True
    tracker = open_run(FAKE_URI, tmp_path, resume=True, resume_step=6)
    for step in range(7, 11):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.close("FINISHED")
    assert "training goes on" in capsys.readouterr().err
    fake.dead = False
    tracking.send_again(tmp_path)
    assert fake.points == {("loss", step, float(step)): 1 for step in range(1, 11)}
    assert fake.status == "FINISHED"


def test_a_run_that_ends_while_its_store_is_down_keeps_everything(fake, tmp_path, capsys):
    tracker = open_run(FAKE_URI, tmp_path)
    tracker.log_metrics({"loss": 1.0}, 1)
    wait_until(lambda: fake.points)
    fake.dead = True
    tracker.log_metrics({"loss": 2.0}, 2)
    (tmp_path / "a.txt").write_text("a")
    tracker.log_artifact(tmp_path / "a.txt")
    tracker.close("FINISHED")
    capsys.readouterr()
    for reason in ("behind", "out of memory"):
        tracking.end_run(tmp_path, "FAILED", {"search.reason": reason})
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tracking: {FAKE_URI} does not take everything (")
        assert line.endswith(f"`python -m mdnet_dist.tracking {tmp_path}` sends it")
    assert (fake.points, fake.artifacts, fake.tags) == ({("loss", 1, 1.0): 1}, [], {})
    fake.dead = False
    tracking.send_again(tmp_path)
    assert fake.points == {("loss", 1, 1.0): 1, ("loss", 2, 2.0): 1}
    assert (fake.status, fake.tags["search.reason"]) == ("FAILED", "out of memory"), "the last word counts"
    assert set(fake.artifacts) == {"a.txt"}
    assert not (tmp_path / tracking_files.UNSENT_NAME).exists()


def test_closed_artifact_storage_holds_up_nothing_else(fake, tmp_path):
    tracker = open_run(FAKE_URI, tmp_path)
    fake.artifacts_closed = True
    for step in (1, 2):
        (tmp_path / f"{step}.txt").write_text("x")
        tracker.log_artifact(tmp_path / f"{step}.txt")
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.close("FINISHED")
    assert (fake.points.total(), fake.status) == (2, "FINISHED")
    unsent = (tmp_path / tracking_files.UNSENT_NAME).read_text().splitlines()
    assert [json.loads(line)["path"] for line in unsent] == ["1.txt", "2.txt"]
    fake.artifacts_closed = False
    tracking.send_again(tmp_path)
    assert fake.artifacts == ["1.txt", "2.txt"]


def test_a_store_that_hangs_holds_up_neither_training_nor_closing(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tracking, "QUEUE_OPERATIONS", 50)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.3)
    tracker = open_run(FAKE_URI, tmp_path)
    released = threading.Event()
    monkeypatch.setattr(fake, "log_batch", lambda *arguments, **named: released.wait())
    start = time.monotonic()
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.close("FINISHED")
    assert time.monotonic() - start < 5
    content = (tmp_path / tracking_files.UNSENT_NAME).read_bytes()
    kept = {json.loads(line).get("step") for line in content.splitlines()}
    assert set(range(1000)) <= kept
    assert "has not got everything" in capsys.readouterr().err
    released.set()
    tracker._thread.join(10)
    assert not tracker._thread.is_alive()
    assert (tmp_path / tracking_files.UNSENT_NAME).read_bytes() == content, (
        "a thread that wakes up late changes nothing"
    )


def test_a_run_folder_that_cannot_be_written_does_not_end_training(fake, tmp_path, capsys):
    tracker = open_run(FAKE_URI, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    for step in (1, 2):
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.close("FINISHED")
    assert fake.points.total() == 2
    assert capsys.readouterr().err.count("it will lack points") == 1


LAST_STEP = 12
LIFE = st.fixed_dictionaries(
    {
        "steps": st.integers(0, LAST_STEP),  # logged before it ends
        "requests": st.none() | st.integers(0, 3),  # carried out after its last step; None: it is not killed but closed
        "wrote": st.booleans(),  # a killed one got as far as writing its unsent file
        "checkpoint": st.integers(0, LAST_STEP),  # how many steps before its last one the next life begins
        "failures": st.lists(st.sampled_from(["", "before", "after"]), max_size=6),
    }
)


@settings(max_examples=40, deadline=None)
@given(lives=st.lists(LIFE, max_size=4), batch=st.integers(1, 4))
def test_every_point_arrives_once_through_failures_kills_and_resumes(lives, batch, tmp_path_factory):
    """The store fails before or after carrying out a request, and jobs die with points in memory."""
    folder, store, checkpoint = tmp_path_factory.mktemp("run"), FakeStore(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "RETRY_SECONDS", 0.0)
        for module in (tracking, tracking_files):
            patch.setattr(module, "BATCH_OPERATIONS", batch)
        for module in (tracking, tracking_files, mlflow_store):
            patch.setattr(module, "say", lambda line: None)
        patch.setattr(os, "fsync", lambda descriptor: None)  # slow, and the machine does not crash here
        complete = {"steps": LAST_STEP, "requests": None, "wrote": True, "checkpoint": 0, "failures": []}
        for number, life in enumerate([*lives, complete]):
            client = DyingClient(store)
            patch.setattr(mlflow_store, "open_client", lambda uri, client=client: client)
            resumed = {"resume": True, "resume_step": checkpoint} if number else {}
            tracker = open_run(FAKE_URI, folder, **resumed)
            store.failures = list(life["failures"])
            last = min(LAST_STEP, checkpoint + life["steps"])
            for step in range(checkpoint + 1, last + 1):
                tracker.log_metrics({"a": step / 2, "b": float("nan") if step % 3 else 1.0}, step)
            if life["requests"] is None:
                tracker.close("FINISHED")
            else:
                client.requests_left = life["requests"]
                tracker._unsent.sealed = not life["wrote"]
                tracker._queue.put(None)
                tracker._thread.join()
            checkpoint = max(0, last - life["checkpoint"])
        store.failures = []
        tracking.send_again(folder)
    expected = {("a", step, step / 2): 1 for step in range(1, LAST_STEP + 1)}
    expected |= {("b", step, 1.0): 1 for step in range(3, LAST_STEP + 1, 3)}
    assert store.points == expected
    assert steps_in(folder) == list(range(1, LAST_STEP + 1))


class DyingClient:
    """Passes requests on to a store until the process that it belongs to dies."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store
        self.requests_left: int | None = None  # None: it lives

    def __getattr__(self, name: str) -> Any:
        if self.requests_left is not None:
            if self.requests_left == 0:
                raise ConnectionError("dead")
            self.requests_left -= 1
        return getattr(self._store, name)


# --------------------------------------------------------------------------------------------------------------- the UI


def test_the_ui_says_what_to_do_where_there_is_no_store(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(sys, "argv", ["mlflow_ui.py"])
    with pytest.raises(InputError, match=r"mlflow\.db: no such file, so there are no runs yet; `make train`"):
        mlflow_ui.main()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracker.invalid")
    mlflow_ui.main()
    assert capsys.readouterr().out == "The runs are on an MLflow server already: https://tracker.invalid\n"


def test_the_ui_takes_the_next_free_port_but_insists_on_a_wanted_one(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(mlflow_ui, "FIRST_PORT", port)
        assert mlflow_ui.choose_port(None) > port
        with pytest.raises(InputError, match=f"--port {port}: .*in use"):
            mlflow_ui.choose_port(port)
    with pytest.raises(InputError, match="--port 70000"):
        mlflow_ui.choose_port(70000)


# ------------------------------------------------------------------------------------------------------- after training


def test_a_folder_is_told_to_the_users_own_store_only(uri, tmp_path, monkeypatch, capsys):
    open_run(uri, tmp_path / "run").close("FINISHED")
    run_id = tracking.run_id_of(tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    again = tracking.reopen_tracker(tmp_path / "run")
    again.log_metrics({"final/test/loss": 1.5}, step=7)
    again.close("FINISHED")
    assert again.run_id == run_id
    assert history(uri, again, "final/test/loss") == [(7, 1.5)]
    assert capsys.readouterr().err == ""
    assert tracking.reopen_tracker(tmp_path) is None, "was never logged"

    asked = []
    monkeypatch.setattr(mlflow_store, "open_client", asked.append)
    there = {"experiment_id": "1", "run_id": "x"}
    for stranger in ("http://stranger.invalid", "sqlite:////srv/mlflow.db", "sqlite:///run/mlflow.db", f"{uri}?a=b"):
        (tmp_path / "run" / tracking.RUN_NAME).write_text(json.dumps({"uri": stranger, **there}))
        assert tracking.reopen_tracker(tmp_path / "run") is None
        assert capsys.readouterr().err == (
            f"tracking: {tmp_path}/run belongs to the MLflow store {stranger}, which is not told; "
            f"MLFLOW_TRACKING_URI={stranger} tells it\n"
        )
    assert asked == []


def test_a_password_in_the_environment_reopens_a_run(tmp_path, monkeypatch):
    (tmp_path / tracking.RUN_NAME).write_text(
        json.dumps({"uri": "http://tracker.invalid", "experiment_id": "1", "run_id": "x"})
    )
    asked = []

    def client(uri):
        asked.append(uri)
        raise ConnectionError("not here")

    monkeypatch.setattr(mlflow_store, "open_client", client)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracker.invalid")
    tracking.reopen_tracker(tmp_path).close("FINISHED")
    assert asked and set(asked) == {"http://me:secret@tracker.invalid"}
    assert "secret" not in (tmp_path / tracking.RUN_NAME).read_text()


# ------------------------------------------------------------------------------------------------------ real processes

LOGS = """
import sys
from pathlib import Path
from mdnet_dist.config import TrackingConfig
from mdnet_dist.tracking import open_tracker
uri, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
tracker = open_tracker(TrackingConfig(uri=uri), folder, folder.name, {"seed": 1}, {"device": "cpu"})
print(tracker.run_id, flush=True)
for step in range(1, steps + 1):
    tracker.log_metrics({"loss": 1 / step}, step)
tracker.close("FINISHED")
"""


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A real MLflow server that answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "art")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
        )
    mlflow_ui.wait_until_it_answers(server, port)
    assert server.poll() is None, (folder / "server.log").read_text()
    return server


def kill(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
def test_two_processes_start_at_once_on_a_store_that_does_not_exist_yet(tmp_path):
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOGS, uri, str(tmp_path / name), "300"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            cwd=tmp_path,
        )
        for name in ("a", "b")
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [error for _, error in outputs] == ["", ""], "MLflow's own lines are kept off the console"
    client = client_of(uri)
    for run_id, _ in outputs:
        assert run_id.count("\n") == 1
        steps = [point.step for point in client.get_metric_history(run_id.strip(), "loss")]
        assert steps == list(range(1, 301))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "runs"}


@pytest.mark.slow
def test_a_killed_job_leaves_no_gap(uri, tmp_path):
    command = [sys.executable, "-c", LOGS, uri, str(tmp_path), "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        run_id = process.stdout.readline().strip()
        wait_until(lambda: len(steps_in(tmp_path)) > 2000)
        process.kill()
    logged = len(steps_in(tmp_path))
    tracker = open_run(uri, tmp_path, resume=True, resume_step=logged - 100)
    for step in range(logged - 99, logged + 11):
        tracker.log_metrics({"loss": 1 / step}, step)
    tracker.close("FINISHED")
    assert tracker.run_id == run_id
    assert [step for step, _ in history(uri, tracker, "loss")] == list(range(1, logged + 11))


@pytest.mark.slow
def test_a_real_server_that_is_killed_and_comes_back(tmp_path):
    port, folder = free_port(), tmp_path / "run"
    uri = f"http://127.0.0.1:{port}"
    server = start_server(tmp_path, port)
    try:
        tracker = open_run(uri, folder, {"seed": 1})
        assert tracker.url.startswith(f"{uri}/#/experiments/")
        for step in range(1, 101):
            tracker.log_metrics({"loss": 1 / step}, step)
        wait_until(lambda: len(history(uri, tracker, "loss")) == 100)
        kill(server)
        (folder / "report.txt").write_text("mild")
        for step in range(101, 201):
            tracker.log_metrics({"loss": 1 / step}, step)
        tracker.log_artifact(folder / "report.txt", "reports")
        start = time.monotonic()
        tracker.close("FINISHED")
        assert time.monotonic() - start < tracking.CLOSE_SECONDS + 1
        assert (folder / tracking_files.UNSENT_NAME).exists()

        again = [sys.executable, "-m", "mdnet_dist.tracking", str(folder)]
        refused = subprocess.run(again, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.count("\n") == 1 and f"MLflow store {uri} does not answer" in refused.stderr
        server = start_server(tmp_path, port)
        sent = subprocess.run(again, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert (sent.returncode, sent.stderr) == (0, "")
        assert sent.stdout == f"{folder}: its MLflow store has everything\n"

        assert history(uri, tracker, "loss") == [(step, 1 / step) for step in range(1, 201)]
        client = client_of(uri)
        assert client.get_run(tracker.run_id).info.status == "FINISHED"
        copy = client.download_artifacts(tracker.run_id, "reports/report.txt", str(tmp_path))
        assert Path(copy).read_text() == "mild"
        assert not (folder / tracking_files.UNSENT_NAME).exists()
    finally:
        kill(server)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP])
def test_the_ui_answers_shows_artifacts_and_leaves_no_process(uri, tmp_path, how):
    tracker = open_run(uri, tmp_path)
    (tmp_path / "report.txt").write_text("mild")
    tracker.log_artifact(tmp_path / "report.txt", "reports")
    tracker.close("FINISHED")
    command = [sys.executable, str(REPOSITORY / "launch" / "mlflow_ui.py"), "--port", str(free_port()), "--uri", uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path) as ui:
        line = ui.stdout.readline()
        address = line.split()[2]
        assert line == f"MLflow UI: {address} (Ctrl-C stops it)\n" and address.startswith("http://127.0.0.1:")
        assert b"<title>MLflow" in fetch(address)
        assert fetch(f"{address}/get-artifact?path=reports/report.txt&run_uuid={tracker.run_id}") == b"mild"
        children = descendants(ui.pid)
        assert len(children) >= 2
        ui.send_signal(how)
        assert ui.wait(20) == 0
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def fetch(address: str) -> bytes:
    from urllib.request import ProxyHandler, build_opener

    with build_opener(ProxyHandler({})).open(address, timeout=30) as answer:
        return bytes(answer.read())


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def test_a_process_forked_meanwhile_does_not_keep_the_store_locked(tmp_path: Path) -> None:
    """As a loader is, while the tracker's thread connects: it inherits the descriptor, and lives for hours."""
    with mlflow_store._alone_in(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        assert fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is None, "it raises where it is locked"
        os.close(descriptor)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
