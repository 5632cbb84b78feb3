"""What a benchmark finds: rows of a table, with the target each is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mdnet_dist.benchmark.timing import Spread


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number."""

    suite: str
    config: str  # demo, bcidr, ...; "" where it belongs to the machine alone
    name: str  # what was measured, or what by what
    value: float
    unit: str  # "x" for a ratio, "" for a share
    low: float | None = None  # quartiles of the repetitions
    high: float | None = None
    count: int = 1
    target: float | None = None
    better: Literal["more", "less"] = "more"
    note: str = ""

    @classmethod
    def of(cls, spread: Spread, **fields: Any) -> Row:
        """A row with the median and the quartiles of a `Spread`."""
        return cls(value=spread.median, low=spread.low, high=spread.high, count=spread.count, **fields)

    @property
    def met(self) -> bool | None:
        """Whether the target is; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "more" else self.value <= self.target

    def as_json(self) -> dict[str, Any]:
        """All fields, and `met`."""
        return asdict(self) | {"met": self.met}


def number(value: float) -> str:
    """Three significant digits, without an exponent where people would not write one."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = f"{value:.3g}"
        return f"{value:.0f}" if "e" in digits else digits
    return f"{value:.2e}"


def table(rows: Sequence[Row]) -> str:
    """The rows as people read them: one line each, a heading for each suite and configuration."""
    lines: list[str] = []
    cells = [_cells(row) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(4)] if cells else []
    group = None
    for row, line in zip(rows, cells):
        if (row.suite, row.config) != group:
            group = row.suite, row.config
            lines += ["", "  ".join(part for part in group if part)]
        what, value, spread, target = (text.ljust(width) for text, width in zip(line, widths))
        lines.append(f"  {what}  {value}  {spread}  {target}  {row.note}".rstrip())
    return "\n".join(lines).lstrip("\n")


def _cells(row: Row) -> tuple[str, str, str, str]:
    sign = "at least" if row.better == "more" else "at most"
    target = "" if row.target is None else f"{sign} {number(row.target)}: {'met' if row.met else 'MISSED'}"
    spread = "" if row.low is None or row.high is None else f"({number(row.low)} to {number(row.high)})"
    return row.name, f"{number(row.value)} {row.unit}".rstrip(), spread, target
