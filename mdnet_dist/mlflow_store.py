"""Where MLflow keeps runs, and how one of them is told of something: the only file that speaks to MLflow's tracking."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tqdm import tqdm

from mdnet_dist.config import TrackingConfig
from mdnet_dist.errors import InputError, one_line, without_password

# Something to tell the store: {"kind": "metrics" | "parameters" | "tags" | "artifact" | "status", ...}. Plain JSON,
# because the unsent file holds it. A metrics operation with "once" is left out where the store has that step already.
Operation = dict[str, Any]


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
    return sqlite_uri((checkout or (repository if in_repository else Path.cwd())) / "runs" / "mlflow.db")


def tracking_uri(config: TrackingConfig) -> str:
    """The store that runs of a configuration are logged to; of sqlite the same from every folder.

    Raises:
        InputError: MLflow keeps no runs there.
    """
    return checked_uri(config.uri or default_tracking_uri())


def prepare_store(uri: str) -> None:
    """Create the store where it does not exist yet, one process at a time: two that set up one file break it.

    Raises:
        InputError: the store does not answer, cannot be written, or has another MLflow version's tables.
    """
    connect(checked_uri(uri))


def database_path(uri: str) -> Path | None:
    """The absolute path in a `sqlite:///` URI; None for another kind of store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def sqlite_uri(path: Path, query: str = "") -> str:
    """The URI of a database file. In the path, SQLAlchemy reads % and ? as an escape and as the start of options."""
    return "sqlite:///" + str(path.absolute()).replace("%", "%25").replace("?", "%3F") + (query and f"?{query}")


def checked_uri(uri: str) -> str:
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
    return sqlite_uri(path, uri.partition("?")[2])


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


def open_client(uri: str) -> Any:
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


def connect(uri: str) -> Any:
    """`open_client`, its errors as one line.

    Raises:
        InputError: the store does not answer.
    """
    try:
        return open_client(uri)
    except Exception as error:  # requests', SQLAlchemy's, the operating system's, a missing driver
        old = "out-of-date database schema" in str(error)
        advice = f"back it up, then `mlflow db upgrade {uri}`" if old else "start it or set tracking.uri to another"
        raise InputError(
            without_password(f"MLflow store {uri} does not answer: {reason_of(error)}; {advice}")
        ) from error


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


def reason_of(error: BaseException) -> str:
    """What went wrong, in at most 200 characters, without passwords."""
    text = " ".join(str(error).split()).partition(" [SQL:")[0] or type(error).__name__
    system = re.search(r"\[Errno -?\d+\] [^'\")]+", text)  # the end of a long chain of HTTP errors
    return without_password(system[0] if system else text)[:200]


def _code(error: BaseException) -> str:
    return str(getattr(error, "error_code", ""))


def experiment_of(client: Any, name: str, uri: str) -> str:
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


def is_active(client: Any, run_id: str) -> bool:
    """Whether the store has the run, and nobody has deleted it."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except Exception as error:
        if _code(error) == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def run_named(client: Any, experiment_id: str, run_name: str, parent_run_id: str) -> str | None:
    """The id of the run of that name below a parent: one whose process was killed before it could write the id down."""
    quoted = run_name.replace("'", "")
    found = client.search_runs(
        [experiment_id], f"tags.mlflow.parentRunId = '{parent_run_id}' and attributes.run_name = '{quoted}'"
    )
    return str(found[0].info.run_id) if found else None


class NotDelivered(Exception):
    """What a store did not take; the cause says why."""

    def __init__(self, operations: list[Operation]) -> None:
        super().__init__(f"{len(operations)} operations")
        self.operations = operations


class Delivery:
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
            NotDelivered: with all operations that did not surely arrive. Deliver them again: what did arrive is then
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
                    self._client = self._client or open_client(self.uri)
                    getattr(self, f"_send_{kind}")(of_a_kind)
                    continue
            except Exception as error:
                if _code(error) == "INVALID_PARAMETER_VALUE":
                    # The store answers but will never take it, for instance because someone deleted the run.
                    say(f"MLflow refused {kind} of run {self.run_id}: {reason_of(error)}")
                    continue
                failure = failure or error
                blocked |= (
                    {"artifact"} if kind == "artifact" else {"metrics", "parameters", "tags", "artifact", "status"}
                )
            remaining += of_a_kind
        if failure:
            self._ask_first = True
            self._stored_steps.clear()
            raise NotDelivered(remaining) from failure

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


def as_text(value: Any, most_characters: int) -> str:
    """A value as JSON would write it, text without its quotes; too long for MLflow, it is cut with a mark."""
    text = without_password(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    mark = " ... (cut; whole in the config artifact)"
    return text if len(text) <= most_characters else text[: most_characters - len(mark)] + mark


def say(line: str) -> None:
    """One line on stderr that leaves a progress bar whole."""
    tqdm.write(f"tracking: {one_line(without_password(line))}", file=sys.stderr)
