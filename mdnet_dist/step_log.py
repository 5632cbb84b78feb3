"""JSON lines of a run that belong to steps, such as which images each read; a resumed run cuts off what lies ahead.

{"step": 12, "keys": ["p01_a", "p07_c"]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdnet_dist.shards import write_atomically

SAMPLES, BAD_STEPS, DAMAGED = "samples.jsonl", "bad_steps.jsonl", "damaged.jsonl"


class StepLog:
    """One such file; made when the first line is written. The first rank writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, **fields: Any) -> None:
        """Add a line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **fields}, ensure_ascii=False) + "\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines in order; one that a kill has cut off is left out."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def cut(self, step: int) -> None:
        """Drop the lines of later steps, whole or not at all."""
        if self.path.exists():
            kept = [json.dumps(line, ensure_ascii=False) for line in self.read() if line["step"] <= step]
            write_atomically(self.path, "".join(f"{line}\n" for line in kept))
