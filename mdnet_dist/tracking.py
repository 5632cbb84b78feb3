"""Experiment tracking: a run's record in its folder and in MLflow. Rank 0 alone uses it.

    tracker = open_tracker(config.tracking, run_folder, config.name, flatten(config), run_tags(world_size, "cuda"))
    tracker.log_metrics({"train/loss_m": 0.7}, step=10)
    tracker.close("FINISHED")

A run folder gets `metrics.jsonl` and, while the store does not answer, `mlflow_unsent.jsonl` (`tracking_files`); and
`mlflow_run.json`, the MLflow run that belongs to it, so that a resumed run continues it.

A thread talks to MLflow, so that a slow or dead store never holds up training. `python -m mdnet_dist.tracking
RUN_FOLDER` sends, after a run has ended, what its store has not got.

A point is never sent twice. After a resume or a failure the store is asked, metric by metric, which steps it has, and
those are left out: a ledger of our own could lag behind the store by the batch that was on its way when the job died.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from mdnet_dist import __version__
from mdnet_dist.config import TrackingConfig
from mdnet_dist.errors import InputError, without_password
from mdnet_dist.mlflow_store import (
    Delivery,
    NotDelivered,
    Operation,
    as_text,
    connect,
    experiment_of,
    is_active,
    reason_of,
    run_named,
    say,
    tracking_uri,
)
from mdnet_dist.program import run_program
from mdnet_dist.shards import write_atomically
from mdnet_dist.tracking_files import (
    BATCH_OPERATIONS,
    METRICS_NAME,
    UNSENT_NAME,
    UnsentFile,
    as_line,
    as_lines,
    as_operation,
    missing_in,
    read_metrics,
)

RUN_NAME = "mlflow_run.json"

RETRY_SECONDS = 30.0  # between two attempts to reach a store that did not answer
CLOSE_SECONDS = 20.0  # the longest that closing may take
QUEUE_OPERATIONS = 10_000  # held in memory for the thread; what exceeds it goes to the unsent file


class Tracker:
    """One run's record, made by `open_tracker`. Logging never waits for the store and never ends training."""

    def __init__(self, delivery: Delivery, unsent: UnsentFile, experiment_id: str, *, appends: bool) -> None:
        self.run_id, self.uri = delivery.run_id, without_password(delivery.uri)
        page = f"{self.uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{self.run_id}"
        self.url = page if self.uri.startswith("http") else None  # of the run's page, where the store is a server
        self._delivery, self._unsent, self._appends = delivery, unsent, appends
        self._folder = delivery.folder
        self._queue: queue.Queue[Operation | None] = queue.Queue(QUEUE_OPERATIONS)
        self._on_its_way: list[Operation] = []
        self._retry_at = 0.0  # time.monotonic()
        self._said: set[str] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record {name: value} after `step` optimiser steps."""
        values = {name: float(value) for name, value in metrics.items()}
        entry = {"step": step, "time": round(time.time(), 3), "metrics": values}
        try:
            with open(self._folder / METRICS_NAME, "a", encoding="utf-8") as file:
                file.write(("\n" if METRICS_NAME in self._said else "") + as_line(entry))  # after half a line, maybe
        except OSError as error:
            self._say_once(METRICS_NAME, f"{self._folder / METRICS_NAME}: {error.strerror}; it will lack points")
        self._log(as_operation(entry, once=not self._appends))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Send a file, or a folder with all in it, into the artifact folder `folder`. It must stay where it is."""
        path, home = path.absolute(), self._folder.absolute()
        place = path.relative_to(home) if path.is_relative_to(home) else path  # run folders get moved
        self._log({"kind": "artifact", "path": str(place), "folder": folder})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; one that exists changes."""
        self._log({"kind": "tags", "values": {name: as_text(value, 8000) for name, value in tags.items()}})

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Set parameters; one that exists with another value keeps it, and a tag `changed.NAME` has the new one."""
        self._log({"kind": "parameters", "values": {name: as_text(value, 6000) for name, value in parameters.items()}})

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Send what is left, for at most `CLOSE_SECONDS`, and say what did not arrive. A second call does nothing.

        A tracker that appends to a run (an evaluation) leaves the run's status as it was.
        """
        if self._closed:
            return
        if not self._appends:
            self._log({"kind": "status", "status": status, "time_ms": round(time.time() * 1000)})
        self._closed = True
        deadline = time.monotonic() + CLOSE_SECONDS
        with suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        # A thread that still runs hangs in a request: what it holds counts as not sent.
        hangs = self._thread.is_alive()
        self._keep([*self._on_its_way, *self._drain()] if hangs else [], last=True)
        if hangs:
            self._queue.put(None)  # so that it ends when it wakes up
        if self._unsent:
            say(
                f"{self.uri} has not got everything; the rest is in {self._unsent.path}, and "
                f"`python -m mdnet_dist.tracking {self._folder}` sends it"
            )

    def _log(self, operation: Operation) -> None:
        if self._closed:
            raise RuntimeError("this tracker is closed")
        try:
            self._queue.put_nowait(operation)
        except queue.Full:
            self._keep([operation])

    def _drain(self) -> list[Operation]:
        operations = []
        with suppress(queue.Empty):
            while operation := self._queue.get_nowait():
                operations.append(operation)
        return operations

    def _send_all(self) -> None:
        """The thread: hand over what is in the queue; what the store does not take goes to the unsent file."""
        closing = False
        while not closing:
            wait_seconds = max(0.0, self._retry_at - time.monotonic()) if self._unsent else None
            batch: list[Operation | None] = []
            with suppress(queue.Empty):
                batch.append(self._queue.get(timeout=wait_seconds))
                while len(batch) < BATCH_OPERATIONS:
                    batch.append(self._queue.get_nowait())
            closing = None in batch
            self._on_its_way = [operation for operation in batch if operation is not None]
            if self._unsent and not closing and time.monotonic() < self._retry_at:
                self._keep(self._on_its_way)
            else:
                self._send(self._on_its_way)
            self._on_its_way = []

    def _send(self, operations: list[Operation]) -> None:
        behind = bool(self._unsent)
        if behind:  # then in order, after what waits there
            self._keep(operations)
        try:
            if behind:
                self._unsent.deliver(self._delivery)
            else:
                self._delivery.deliver(operations)
        except Exception as error:  # whatever it is, training must not end of it
            if self._unsent.sealed:
                return  # closed long ago
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not behind:
                self._keep(error.operations if isinstance(error, NotDelivered) else operations)
            line = f"{self.uri} does not take everything ({reason_of(error.__cause__ or error)}); training goes on"
            self._say_once("store", f"{line}, and {self._unsent.path} keeps what it has not got")

    def _keep(self, operations: list[Operation], *, last: bool = False) -> None:
        try:
            self._unsent.append(operations, last=last)
        except OSError as error:
            self._say_once(UNSENT_NAME, f"{self._unsent.path}: {error.strerror}; MLflow will lack some entries")

    def _say_once(self, subject: str, line: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            say(line)


def open_tracker(
    config: TrackingConfig,
    run_folder: Path,
    run_name: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    resume: bool = False,
    resume_step: int | None = None,
    parent_run_id: str | None = None,
) -> Tracker:
    """Start an MLflow run for a run folder, or continue the folder's.

    Args:
        config: which store, which experiment.
        run_folder: where the local record goes; created.
        run_name: as MLflow shows it.
        parameters: flattened configuration.
        tags: see `run_tags`.
        resume: continue the run that the folder names. That the store does not answer is then no error: what it lacks
            is kept and sent later. A run that its store has lost is begun anew, with all points of metrics.jsonl.
        resume_step: with `resume`, the step from which training goes on: later points leave metrics.jsonl, and no
            point is sent twice. Without it the tracker appends (an evaluation): steps may repeat, the status stays.
        parent_run_id: the run of the same experiment under which this one is shown; another process may own it.

    Raises:
        InputError: the store does not answer, is of a kind that MLflow gave up, or the experiment was deleted.
    """
    uri = tracking_uri(config)
    run_folder.mkdir(parents=True, exist_ok=True)
    run = _read_run(run_folder) if resume else {}
    if run.get("uri") != without_password(uri):
        run = {}
    try:
        client = connect(uri)
        if not run or not is_active(client, run["run_id"]):
            experiment_id = experiment_of(client, config.experiment, uri)
            nesting = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
            run_id = run_named(client, experiment_id, run_name, parent_run_id) if resume and parent_run_id else None
            run_id = run_id or client.create_run(experiment_id, run_name=run_name, tags=nesting).info.run_id
            run = {"uri": without_password(uri), "experiment_id": experiment_id, "run_id": run_id}
    except Exception as error:
        if not run and isinstance(error, InputError):
            raise
        if not run:
            raise InputError(f"MLflow store {without_password(uri)} refuses a new run: {reason_of(error)}") from error
        say(f"{reason_of(error)}; training goes on, and {run_folder / UNSENT_NAME} keeps what it has not got")
    write_atomically(run_folder / RUN_NAME, json.dumps(run, indent=1) + "\n")

    appends = resume and resume_step is None
    unsent = UnsentFile(run_folder / UNSENT_NAME)
    if not resume:
        write_atomically(run_folder / METRICS_NAME, "")
        unsent.write(b"")
    elif resume_step is not None:
        journal = [
            entry
            for entry in read_metrics(run_folder / METRICS_NAME)
            # What is scored at the end is scored again.
            if entry["step"] <= resume_step and not all(name.startswith("final/") for name in entry["metrics"])
        ]
        write_atomically(run_folder / METRICS_NAME, "".join(map(as_line, journal)))
        # The job may have died with points in memory: offer all of them again, the store knows which it has. The
        # run is running again, so that an older status is out of date.
        missing = missing_in(journal, [operation for operation in unsent.read() if operation["kind"] != "status"])
        unsent.write(as_lines([*missing, {"kind": "status", "status": "RUNNING", "time_ms": None}]))
    delivery = Delivery(run_folder, uri, run["run_id"], ask_first=resume)
    tracker = Tracker(delivery, unsent, run["experiment_id"], appends=appends)
    tracker.log_parameters(parameters)
    tracker.log_tags(tags)
    return tracker


def open_parent(
    config: TrackingConfig,
    folder: Path,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    resume: bool = False,
) -> Tracker:
    """Start, or continue, a run under which others are shown: they are opened with its `run_id` as `parent_run_id`.

    Args:
        folder: of its local record, as a run's folder; its name is the run's.
        parameters: what the runs below share.
        resume: continue the run that the folder names, where there is one, with all its points.

    Raises:
        InputError: as `open_tracker`.
    """
    everything = sys.maxsize if resume else None
    return open_tracker(config, folder, folder.name, parameters, tags, resume=resume, resume_step=everything)


def reopen_tracker(run_folder: Path) -> Tracker | None:
    """Append to the MLflow run of a folder whose training has ended, where it is in the user's own store.

    That is the one that MLFLOW_TRACKING_URI names, or the default. A folder may come from a stranger, and so may the
    store that it or its configuration names: what is told to that one, from one's own data, leaves the house.

    Returns:
        None where the folder was never logged, or on another store, which is said.

    Raises:
        InputError: as `open_tracker`.
    """
    run = _read_run(run_folder)
    if not run:
        return None
    own = TrackingConfig()
    if run["uri"] != without_password(tracking_uri(own)):
        uri = run["uri"]
        say(f"{run_folder} belongs to the MLflow store {uri}, which is not told; MLFLOW_TRACKING_URI={uri} tells it")
        return None
    return open_tracker(own, run_folder, run_folder.name, {}, {}, resume=True)


def end_run(run_folder: Path, status: Literal["FINISHED", "FAILED", "KILLED"], tags: Mapping[str, str]) -> None:
    """Complete the MLflow run of a folder whose process was stopped from outside: all points, tags, status.

    What the store does not take is kept in the folder, as by any tracker; a folder that was never logged is left alone.
    """
    run = _read_run(run_folder)
    if not run:
        return
    unsent = UnsentFile(run_folder / UNSENT_NAME)
    operations = missing_in(
        read_metrics(run_folder / METRICS_NAME),
        [operation for operation in unsent.read() if operation["kind"] != "status"],
    )
    operations += [
        {"kind": "tags", "values": {name: as_text(value, 8000) for name, value in tags.items()}},
        {"kind": "status", "status": status, "time_ms": round(time.time() * 1000)},
    ]
    try:
        Delivery(run_folder, _uri_of(run), run["run_id"], ask_first=True).deliver(operations)
        unsent.write(b"")
    except NotDelivered as failure:
        unsent.write(as_lines(failure.operations))
        reason = reason_of(failure.__cause__ or failure)
        say(f"{run['uri']} does not take everything ({reason}); `python -m mdnet_dist.tracking {run_folder}` sends it")


def run_id_of(run_folder: Path) -> str | None:
    """The id of a folder's MLflow run; None where it was never logged."""
    return _read_run(run_folder).get("run_id")


def _uri_of(run: Mapping[str, str]) -> str:
    """The store that `mlflow_run.json` names; with a password, where the environment has it: the folder does not."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri if without_password(uri) == run["uri"] else run["uri"]


def _read_run(run_folder: Path) -> dict[str, str]:
    """`mlflow_run.json`; empty where there is none."""
    try:
        run = json.loads((run_folder / RUN_NAME).read_text(encoding="utf-8"))
        return {name: str(run[name]) for name in ("uri", "experiment_id", "run_id")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{run_folder / RUN_NAME}: damaged ({error}); remove it to begin a new MLflow run") from error


def run_tags(world_size: int, device: str) -> dict[str, str]:
    """What a run was made with: git commit (`-dirty` with changes), versions, ranks, device; no name of the machine."""
    tags = {"git_commit": _git_commit(), "python": platform.python_version(), "world_size": str(world_size)}
    tags |= {"device": device, "version.mdnet_dist": __version__}
    for package in ("torch", "deepspeed", "webdataset", "ray", "mlflow"):
        with suppress(metadata.PackageNotFoundError):
            tags[f"version.{package}"] = metadata.version(package)
    return tags


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # installed without its repository, or no git


# ------------------------------------------------------------------------------------------- sending what was not sent


def send_again(run_folder: Path) -> None:
    """Send what the store of a run that has ended lacks: points of metrics.jsonl, and all of the unsent file.

    Raises:
        InputError: not a run folder, or the store does not answer.
    """
    run = _read_run(run_folder)
    if not run:
        raise InputError(f"{run_folder / RUN_NAME}: no such file; name the folder of a run that was logged to MLflow")
    uri = _uri_of(run)
    unsent = UnsentFile(run_folder / UNSENT_NAME)
    connect(uri)
    try:
        delivery = Delivery(run_folder, uri, run["run_id"], ask_first=True)
        delivery.deliver(missing_in(read_metrics(run_folder / METRICS_NAME), unsent.read()))
    except NotDelivered as error:
        reason = reason_of(error.__cause__ or error)
        raise InputError(f"MLflow store {run['uri']} did not take everything: {reason}") from error
    unsent.write(b"")


def main() -> None:
    """`python -m mdnet_dist.tracking RUN_FOLDER`."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise InputError("usage: python -m mdnet_dist.tracking RUN_FOLDER (sends what its MLflow store has not got)")
    send_again(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: its MLflow store has everything")


if __name__ == "__main__":
    run_program(main)
