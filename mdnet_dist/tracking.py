"""Experiment tracking: the only file that knows MLflow's runs. Rank 0 alone uses it.

    tracker = open_tracker(config.tracking, run_folder, config.name, flatten(config), run_tags(world_size, "cuda"))
    tracker.log_metrics({"train/loss_m": 0.7}, step=10)
    tracker.close("FINISHED")

What a run folder gets:

    metrics.jsonl          every point, one JSON object a line {"step", "time" (s since 1970), "metrics"}; values that
                           are not finite are the strings "nan", "inf", "-inf", and are not sent to MLflow, which stores
                           infinity as 1.8e308
    mlflow_run.json        the MLflow run that belongs to the folder, so that a resumed run continues it
    mlflow_unsent.jsonl    only while the store does not answer: what it has not got yet

A thread talks to MLflow, so that a slow or dead store never holds up training. `python -m mdnet_dist.tracking
RUN_FOLDER` sends, after a run has ended, what its store has not got.

A point is never sent twice. After a resume or a failure the store is asked, metric by metric, which steps it has, and
those are left out: a ledger of our own could lag behind the store by the batch that was on its way when the job died.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import math
import os
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from tqdm import tqdm

from mdnet_dist import __version__
from mdnet_dist.config import TrackingConfig
from mdnet_dist.errors import InputError, one_line, without_password
from mdnet_dist.program import run_program
from mdnet_dist.shards import write_atomically

METRICS_NAME, RUN_NAME, UNSENT_NAME = "metrics.jsonl", "mlflow_run.json", "mlflow_unsent.jsonl"

RETRY_SECONDS = 30.0  # between two attempts to reach a store that did not answer
CLOSE_SECONDS = 20.0  # the longest that closing may take
QUEUE_OPERATIONS = 10_000  # held in memory for the thread; what exceeds it goes to the unsent file
BATCH_OPERATIONS = 200  # handed over together

# Something to tell the store: {"kind": "metrics" | "parameters" | "tags" | "artifact" | "status", ...}. Plain JSON,
# because the unsent file holds it. A metrics operation with "once" is left out where the store has that step already.
Operation = dict[str, Any]
_FIELDS: dict[str, dict[str, Any]] = {  # of each kind, and their types
    "metrics": {"step": int, "time_ms": int, "values": dict, "once": bool},
    "parameters": {"values": dict},
    "tags": {"values": dict},
    "artifact": {"path": str, "folder": str},
    "status": {"status": str, "time_ms": (int, type(None))},
}


# -------------------------------------------------------------------------------------------------- where the store is


def default_tracking_uri(checkout: Path | None = None) -> str:
    """MLFLOW_TRACKING_URI where set, else sqlite at `runs/mlflow.db`, with its artifacts beside it in `mlartifacts`.

    Args:
        checkout: folder that holds `runs/`; by default the repository that this file is in, or the current folder
            where the package is installed elsewhere.
    """
    if from_environment := os.environ.get("MLFLOW_TRACKING_URI"):
        return from_environment
    repository = Path(__file__).resolve().parent.parent
    in_repository = (repository / "setup.cfg").is_file() and (repository / "launch").is_dir()
    return _sqlite_uri((checkout or (repository if in_repository else Path.cwd())) / "runs" / "mlflow.db")


def tracking_uri(config: TrackingConfig) -> str:
    """The store that runs of a configuration are logged to; of sqlite the same from every folder.

    Raises:
        InputError: MLflow keeps no runs there.
    """
    return _checked_uri(config.uri or default_tracking_uri())


def prepare_store(uri: str) -> None:
    """Create the store where it does not exist yet, one process at a time: two that set up one file break it.

    Raises:
        InputError: the store does not answer, cannot be written, or has another MLflow version's tables.
    """
    _connect(_checked_uri(uri))


def database_path(uri: str) -> Path | None:
    """The absolute path in a `sqlite:///` URI; None for another kind of store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def _sqlite_uri(path: Path, query: str = "") -> str:
    # In the path, SQLAlchemy reads % and ? as an escape and as the start of options.
    return "sqlite:///" + str(path.absolute()).replace("%", "%25").replace("?", "%3F") + (query and f"?{query}")


def _checked_uri(uri: str) -> str:
    """The URI; sqlite's with an absolute path, because the current folder is another one in a Ray trial."""
    instead = "use sqlite:////absolute/path/mlflow.db or the http(s) address of an MLflow server"
    scheme, colon, _ = uri.partition(":")
    if not colon or scheme == "file":
        raise InputError(f"tracking.uri '{uri}': MLflow keeps runs in folders no more; {instead}")
    if scheme != "sqlite":
        return uri
    path = database_path(uri)
    if path is None or not path.name or path.name == ":memory:":
        raise InputError(f"tracking.uri '{uri}': names no database file; {instead}")
    return _sqlite_uri(path, uri.partition("?")[2])


# -------------------------------------------------------------------------------------------------- speaking to MLflow


def quieten() -> None:
    """Before MLflow is imported, set its environment where the user has not: no telemetry, no output, no long waits."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it logs a traceback for what is said here in one line
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the thread retries; MLflow's own take four minutes
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_UV_AUTO_DETECT": "false",  # else a model gets the files of whatever project one stands in
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):  # where another library has imported MLflow before, the variable comes too late
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])


def _client(uri: str) -> Any:
    """An MlflowClient whose store has answered; raises whatever that kind of store raises."""
    quieten()
    from mlflow.tracking import MlflowClient

    path = database_path(uri)
    if path is None:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        return client
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        return MlflowClient(tracking_uri=uri)  # creates the tables


def _connect(uri: str) -> Any:
    """`_client`, its errors as one line.

    Raises:
        InputError: the store does not answer.
    """
    try:
        return _client(uri)
    except Exception as error:  # requests', SQLAlchemy's, the operating system's, a missing driver
        old = "out-of-date database schema" in str(error)
        advice = f"back it up, then `mlflow db upgrade {uri}`" if old else "start it or set tracking.uri to another"
        raise InputError(without_password(f"MLflow store {uri} does not answer: {_reason(error)}; {advice}")) from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks; there the driver's prepare_store must do
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing alone is not enough: a loader process that another thread has forked meanwhile holds it too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """What went wrong, in at most 200 characters, without passwords."""
    text = " ".join(str(error).split()).partition(" [SQL:")[0] or type(error).__name__
    system = re.search(r"\[Errno -?\d+\] [^'\")]+", text)  # the end of a long chain of HTTP errors
    return without_password(system[0] if system else text)[:200]


def _code(error: BaseException) -> str:
    return str(getattr(error, "error_code", ""))


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment of that name, created where there is none."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = database_path(uri)
        location = (path.parent / "mlartifacts").as_uri() if path else None  # a server knows where its artifacts go
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception as error:
            if _code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment.lifecycle_stage != "active":
        raise InputError(f"tracking.experiment '{name}' was deleted in MLflow; restore it there or name another")
    return str(experiment.experiment_id)


def _is_active(client: Any, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except Exception as error:
        if _code(error) == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _run_named(client: Any, experiment_id: str, run_name: str, parent_run_id: str) -> str | None:
    """The id of the run of that name below a parent: one whose process was killed before it could write the id down."""
    quoted = run_name.replace("'", "")
    found = client.search_runs(
        [experiment_id], f"tags.mlflow.parentRunId = '{parent_run_id}' and attributes.run_name = '{quoted}'"
    )
    return str(found[0].info.run_id) if found else None


class _NotDelivered(Exception):
    """What a store did not take; the cause says why."""

    def __init__(self, operations: list[Operation]) -> None:
        super().__init__(f"{len(operations)} operations")
        self.operations = operations


class _Delivery:
    """Hands operations to one MLflow run, connecting when it must."""

    def __init__(self, folder: Path, uri: str, run_id: str, *, ask_first: bool) -> None:
        """Args: ask_first: the store may have points already, so ask it before sending."""
        self.folder, self.uri, self.run_id = folder, uri, run_id
        self._ask_first = ask_first
        self._client: Any = None
        self._stored_steps: dict[str, set[int]] = {}  # as they were when the store was asked

    def deliver(self, operations: list[Operation]) -> None:
        """Send in order.

        Raises:
            _NotDelivered: with all operations that did not surely arrive. Deliver them again: what did arrive is then
                left out. Artifacts that fail hold up nothing else, because they often go to another place, which may
                be closed to us while the store answers.
        """
        remaining: list[Operation] = []
        blocked: set[str] = set()
        failure: Exception | None = None
        for kind, group in itertools.groupby(operations, key=lambda operation: str(operation["kind"])):
            of_a_kind = list(group)
            try:
                if kind not in blocked:
                    self._client = self._client or _client(self.uri)
                    getattr(self, f"_send_{kind}")(of_a_kind)
                    continue
            except Exception as error:
                if _code(error) == "INVALID_PARAMETER_VALUE":
                    # The store answers but will never take it, for instance because someone deleted the run.
                    say(f"MLflow refused {kind} of run {self.run_id}: {_reason(error)}")
                    continue
                failure = failure or error
                blocked |= (
                    {"artifact"} if kind == "artifact" else {"metrics", "parameters", "tags", "artifact", "status"}
                )
            remaining += of_a_kind
        if failure:
            self._ask_first = True
            self._stored_steps.clear()
            raise _NotDelivered(remaining) from failure

    def _send_metrics(self, operations: list[Operation]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(_name(name), value, operation["time_ms"], operation["step"])
            for operation in operations
            for name, value in operation["values"].items()
            if not (operation["once"] and self._has(_name(name), operation["step"]))
        ]
        for batch in _batches(points, 1000):
            self._client.log_batch(self.run_id, metrics=batch)

    def _has(self, name: str, step: int) -> bool:
        if not self._ask_first:
            return False
        if name not in self._stored_steps:
            self._stored_steps[name] = {point.step for point in self._client.get_metric_history(self.run_id, name)}
        return step in self._stored_steps[name]

    def _send_parameters(self, operations: list[Operation]) -> None:
        """MLflow's parameters never change: one that a resumed run has with another value becomes a tag."""
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        given = {_name(name): value for operation in operations for name, value in operation["values"].items()}
        for batch in _batches([Param(name, value) for name, value in given.items() if name not in known], 100):
            self._client.log_batch(self.run_id, params=batch)
        changed = {f"changed.{name}": value for name, value in given.items() if known.get(name, value) != value}
        self._send_tags([{"values": changed}])

    def _send_tags(self, operations: list[Operation]) -> None:
        from mlflow.entities import RunTag

        for operation in operations:
            for batch in _batches([RunTag(_name(name), value) for name, value in operation["values"].items()], 100):
                self._client.log_batch(self.run_id, tags=batch)

    def _send_artifact(self, operations: list[Operation]) -> None:
        for operation in operations:
            path = self.folder / operation["path"]  # an absolute path stays as it is
            if path.exists():
                self._client.log_artifact(self.run_id, str(path), operation["folder"] or None)
            else:
                say(f"{path} is gone, so MLflow does not get it")

    def _send_status(self, operations: list[Operation]) -> None:
        status, time_ms = operations[-1]["status"], operations[-1]["time_ms"]
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status=status, end_time=time_ms)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Slices of at most `size`, MLflow's limit for one request."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _name(name: str) -> str:
    """A name in the characters that MLflow allows; topics and DeepSpeed's keys may have others."""
    return re.sub(r"[^/\w.\- :]", "_", name)[:250]


def _text(value: Any, most_characters: int) -> str:
    """A value as JSON would write it, text without its quotes; too long for MLflow, it is cut with a mark."""
    text = without_password(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    mark = " ... (cut; whole in the config artifact)"
    return text if len(text) <= most_characters else text[: most_characters - len(mark)] + mark


def say(line: str) -> None:
    """One line on stderr that leaves a progress bar whole."""
    tqdm.write(f"tracking: {one_line(without_password(line))}", file=sys.stderr)


# --------------------------------------------------------------------------------------------- files in the run folder


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, all values as floats again; a line that a kill cut off is left out."""
    entries = []
    for entry in _json_lines(path):
        with suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError):
            values = {str(name): float(value) for name, value in entry["metrics"].items()}
            entries.append({"step": int(entry["step"]), "time": float(entry["time"]), "metrics": values})
    return entries


def _json_lines(path: Path) -> Iterator[Any]:
    with suppress(FileNotFoundError), open(path, "rb") as file:
        yield from _parse(file)


def _parse(lines: Iterable[bytes]) -> Iterator[Any]:
    for line in lines:
        with suppress(ValueError, RecursionError):
            yield json.loads(line)


def _is_operation(found: Any) -> bool:
    """Whether a line of an unsent file is one: what is none would be tried again for ever."""
    kind = found.get("kind") if isinstance(found, dict) else None
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    return fields is not None and all(isinstance(found.get(name), types) for name, types in fields.items())


def _as_line(entry: Mapping[str, Any]) -> str:
    """One line of `metrics.jsonl`; JSON has no infinity."""
    values = {name: value if math.isfinite(value) else str(value) for name, value in entry["metrics"].items()}
    return json.dumps({**entry, "metrics": values}) + "\n"


def _as_operation(entry: Mapping[str, Any], *, once: bool) -> Operation:
    finite = {name: value for name, value in entry["metrics"].items() if math.isfinite(value)}
    time_ms = round(entry["time"] * 1000)
    return {"kind": "metrics", "step": entry["step"], "time_ms": time_ms, "values": finite, "once": once}


def _as_lines(operations: Iterable[Operation]) -> bytes:
    return "".join(json.dumps(operation) + "\n" for operation in operations).encode()


def _missing_in(journal: Iterable[Mapping[str, Any]], unsent: Iterable[Operation]) -> list[Operation]:
    """All that a store may lack: every point of metrics.jsonl, and the unsent operations which that does not cover."""
    others = [operation for operation in unsent if not operation.get("once")]
    return [_as_operation(entry, once=True) for entry in journal] + others


class _UnsentFile:
    """`mlflow_unsent.jsonl`: operations in order, one a line; the training thread and MLflow's both append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._outside: set[str] = set()  # artifacts elsewhere that this process has logged
        self.sealed = False  # nothing more may be written

    def __bool__(self) -> bool:
        return self.path.exists()

    def read(self) -> list[Operation]:
        """All operations."""
        return self._allowed(_json_lines(self.path))

    def _allowed(self, found: Iterable[Any]) -> list[Operation]:
        """The operations among lines of the file, without files of other folders unless this process has named them.

        A run folder may come from someone else, and what it names is sent to a store that it names, too.
        """
        operations = []
        for operation in filter(_is_operation, found):
            if operation["kind"] == "artifact" and not self._is_ours(operation["path"]):
                say(f"{one_line(operation['path']):.200} lies outside {self.path.parent}, so MLflow does not get it")
            else:
                operations.append(operation)
        return operations

    def _is_ours(self, place: str) -> bool:
        try:
            path = (self.path.parent / place).resolve()
            path.exists()  # finds out a name that is too long
            return place in self._outside or path.is_relative_to(self.path.parent.resolve())
        except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
            return False

    def append(self, operations: Iterable[Operation], *, last: bool = False) -> None:
        """Keep operations. With `last` the file stays as it is then, even if a thread that hung wakes up."""
        operations = list(operations)
        self._outside |= {operation["path"] for operation in operations if operation["kind"] == "artifact"}
        lines = _as_lines(operations)
        with self._lock:
            if lines and not self.sealed:
                with open(self.path, "ab") as file:
                    file.write(lines)
            self.sealed = self.sealed or last

    def write(self, lines: bytes) -> None:
        """Hold exactly these lines; without any there is no file."""
        if lines:
            write_atomically(self.path, lines)
        else:
            self.path.unlink(missing_ok=True)

    def deliver(self, delivery: _Delivery) -> None:
        """Send it piece by piece and take away what was sent; raises _NotDelivered where something stays."""
        failures: list[_NotDelivered] = []
        remaining: list[Operation] = []
        tried = 0
        with open(self.path, "rb") as file:
            while lines := list(itertools.islice(file, BATCH_OPERATIONS)):
                operations = self._allowed(_parse(lines))
                tried += len(operations)
                try:
                    delivery.deliver(operations)
                except _NotDelivered as failure:
                    failures.append(failure)
                    remaining += failure.operations
                    if {operation["kind"] for operation in failure.operations} != {"artifact"}:
                        break
            end = file.tell()
        with self._lock:
            if not self.sealed and (len(remaining) < tried or not tried):
                self.write(_as_lines(remaining) + self.path.read_bytes()[end:])
        if failures:
            raise failures[0]


# --------------------------------------------------------------------------------------------------------- the tracker


class Tracker:
    """One run's record, made by `open_tracker`. Logging never waits for the store and never ends training."""

    def __init__(self, delivery: _Delivery, unsent: _UnsentFile, experiment_id: str, *, appends: bool) -> None:
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
                file.write(("\n" if METRICS_NAME in self._said else "") + _as_line(entry))  # after half a line, maybe
        except OSError as error:
            self._say_once(METRICS_NAME, f"{self._folder / METRICS_NAME}: {error.strerror}; it will lack points")
        self._log(_as_operation(entry, once=not self._appends))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Send a file, or a folder with all in it, into the artifact folder `folder`. It must stay where it is."""
        path, home = path.absolute(), self._folder.absolute()
        place = path.relative_to(home) if path.is_relative_to(home) else path  # run folders get moved
        self._log({"kind": "artifact", "path": str(place), "folder": folder})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; one that exists changes."""
        self._log({"kind": "tags", "values": {name: _text(value, 8000) for name, value in tags.items()}})

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Set parameters; one that exists with another value keeps it, and a tag `changed.NAME` has the new one."""
        self._log({"kind": "parameters", "values": {name: _text(value, 6000) for name, value in parameters.items()}})

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
                self._keep(error.operations if isinstance(error, _NotDelivered) else operations)
            line = f"{self.uri} does not take everything ({_reason(error.__cause__ or error)}); training goes on"
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
        client = _connect(uri)
        if not run or not _is_active(client, run["run_id"]):
            experiment_id = _experiment(client, config.experiment, uri)
            nesting = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
            run_id = _run_named(client, experiment_id, run_name, parent_run_id) if resume and parent_run_id else None
            run_id = run_id or client.create_run(experiment_id, run_name=run_name, tags=nesting).info.run_id
            run = {"uri": without_password(uri), "experiment_id": experiment_id, "run_id": run_id}
    except Exception as error:
        if not run and isinstance(error, InputError):
            raise
        if not run:
            raise InputError(f"MLflow store {without_password(uri)} refuses a new run: {_reason(error)}") from error
        say(f"{_reason(error)}; training goes on, and {run_folder / UNSENT_NAME} keeps what it has not got")
    write_atomically(run_folder / RUN_NAME, json.dumps(run, indent=1) + "\n")

    appends = resume and resume_step is None
    unsent = _UnsentFile(run_folder / UNSENT_NAME)
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
        write_atomically(run_folder / METRICS_NAME, "".join(map(_as_line, journal)))
        # The job may have died with points in memory: offer all of them again, the store knows which it has. The
        # run is running again, so that an older status is out of date.
        missing = _missing_in(journal, [operation for operation in unsent.read() if operation["kind"] != "status"])
        unsent.write(_as_lines([*missing, {"kind": "status", "status": "RUNNING", "time_ms": None}]))
    delivery = _Delivery(run_folder, uri, run["run_id"], ask_first=resume)
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
    unsent = _UnsentFile(run_folder / UNSENT_NAME)
    operations = _missing_in(
        read_metrics(run_folder / METRICS_NAME),
        [operation for operation in unsent.read() if operation["kind"] != "status"],
    )
    operations += [
        {"kind": "tags", "values": {name: _text(value, 8000) for name, value in tags.items()}},
        {"kind": "status", "status": status, "time_ms": round(time.time() * 1000)},
    ]
    try:
        _Delivery(run_folder, _uri_of(run), run["run_id"], ask_first=True).deliver(operations)
        unsent.write(b"")
    except _NotDelivered as failure:
        unsent.write(_as_lines(failure.operations))
        reason = _reason(failure.__cause__ or failure)
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
    unsent = _UnsentFile(run_folder / UNSENT_NAME)
    _connect(uri)
    try:
        delivery = _Delivery(run_folder, uri, run["run_id"], ask_first=True)
        delivery.deliver(_missing_in(read_metrics(run_folder / METRICS_NAME), unsent.read()))
    except _NotDelivered as error:
        reason = _reason(error.__cause__ or error)
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
