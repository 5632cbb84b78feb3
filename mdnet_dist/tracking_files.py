"""What is recorded of a run in its own folder: every point, and what its MLflow store has not got yet.

metrics.jsonl          every point, one JSON object a line {"step", "time" (s since 1970), "metrics"}; values that
                       are not finite are the strings "nan", "inf", "-inf", and are not sent to MLflow, which stores
                       infinity as 1.8e308
mlflow_unsent.jsonl    only while the store does not answer: an `Operation` a line
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdnet_dist.errors import one_line
from mdnet_dist.mlflow_store import Delivery, NotDelivered, Operation, say
from mdnet_dist.shards import write_atomically

METRICS_NAME, UNSENT_NAME = "metrics.jsonl", "mlflow_unsent.jsonl"
BATCH_OPERATIONS = 200  # handed over together

_FIELDS: dict[str, dict[str, Any]] = {  # of each kind, and their types
    "metrics": {"step": int, "time_ms": int, "values": dict, "once": bool},
    "parameters": {"values": dict},
    "tags": {"values": dict},
    "artifact": {"path": str, "folder": str},
    "status": {"status": str, "time_ms": (int, type(None))},
}


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


def as_line(entry: Mapping[str, Any]) -> str:
    """One line of `metrics.jsonl`; JSON has no infinity."""
    values = {name: value if math.isfinite(value) else str(value) for name, value in entry["metrics"].items()}
    return json.dumps({**entry, "metrics": values}) + "\n"


def as_operation(entry: Mapping[str, Any], *, once: bool) -> Operation:
    """A line of `metrics.jsonl` for the store. Args: once: not where it has that step already."""
    finite = {name: value for name, value in entry["metrics"].items() if math.isfinite(value)}
    time_ms = round(entry["time"] * 1000)
    return {"kind": "metrics", "step": entry["step"], "time_ms": time_ms, "values": finite, "once": once}


def as_lines(operations: Iterable[Operation]) -> bytes:
    """Operations as an unsent file holds them."""
    return "".join(json.dumps(operation) + "\n" for operation in operations).encode()


def missing_in(journal: Iterable[Mapping[str, Any]], unsent: Iterable[Operation]) -> list[Operation]:
    """All that a store may lack: every point of metrics.jsonl, and the unsent operations which that does not cover."""
    others = [operation for operation in unsent if not operation.get("once")]
    return [as_operation(entry, once=True) for entry in journal] + others


class UnsentFile:
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
        lines = as_lines(operations)
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

    def deliver(self, delivery: Delivery) -> None:
        """Send it piece by piece and take away what was sent; raises NotDelivered where something stays."""
        failures: list[NotDelivered] = []
        remaining: list[Operation] = []
        tried = 0
        with open(self.path, "rb") as file:
            while lines := list(itertools.islice(file, BATCH_OPERATIONS)):
                operations = self._allowed(_parse(lines))
                tried += len(operations)
                try:
                    delivery.deliver(operations)
                except NotDelivered as failure:
                    failures.append(failure)
                    remaining += failure.operations
                    if {operation["kind"] for operation in failure.operations} != {"artifact"}:
                        break
            end = file.tell()
        with self._lock:
            if not self.sealed and (len(remaining) < tried or not tried):
                self.write(as_lines(remaining) + self.path.read_bytes()[end:])
        if failures:
            raise failures[0]
