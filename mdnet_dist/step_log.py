"""JSON lines of a run that belong to steps, such as which images each read; a resumed run cuts off what lies ahead.

{"step": 12, "keys": ["p01_a", "p07_c"]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdnet_dist.console import say
from mdnet_dist.errors import InputError
from mdnet_dist.shards import write_atomically

SAMPLES, BAD_STEPS, DAMAGED = "samples.jsonl", "bad_steps.jsonl", "damaged.jsonl"


class StepLog:
    """One such file; made when the first line is written. The first rank writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, **fields: Any) -> None:
        """Add a line.

        Raises:
            InputError: it cannot be written.
        """
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **fields}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}; make room there, then --resume") from error

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines in order; what is none, as one that a kill has cut off, is left out."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = json.loads(raw)
                except (ValueError, RecursionError):
                    line = None
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line
                else:
                    say(f"{self.path} line {number}: cut off or damaged; it is left out")

    def cut(self, step: int) -> None:
        """Drop the lines of later steps, whole or not at all."""
        if self.path.exists():
            kept = [json.dumps(line, ensure_ascii=False) for line in self.read() if line["step"] <= step]
            write_atomically(self.path, "".join(f"{line}\n" for line in kept))
