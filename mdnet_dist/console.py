"""What a person sees of a run: a progress bar on a terminal, lines elsewhere, tables. The first rank alone prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from mdnet_dist.distributed import is_first
from mdnet_dist.errors import printable


class Progress:
    """Steps done, and what the last of them measured."""

    def __init__(self, steps: int, first_step: int, log_every_steps: int) -> None:
        self._steps, self._every = steps, log_every_steps
        self._terminal = is_first() and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=not self._terminal, dynamic_ncols=True)
        self._first, self._started = first_step, time.monotonic()

    def step_done(self, step: int, measured: Mapping[str, str]) -> None:
        """Show the step's number (1 is the first). Args: measured: {name: value} to show behind it."""
        self._bar.update(1)
        if self._terminal:
            self._bar.set_postfix(measured, refresh=False)
        elif is_first() and (step % self._every == 0 or step == self._steps):
            seconds = (time.monotonic() - self._started) / max(1, step - self._first) * (self._steps - step)
            told = "  ".join(f"{name} {value}" for name, value in measured.items())
            say(f"step {step}/{self._steps}  {told}  left {duration(seconds)}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def say(text: str) -> None:
    """Print on the first rank, above the progress bar where there is one; a terminal obeys nothing of it."""
    if is_first():
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


def table(rows: Sequence[str], columns: Mapping[str, Mapping[str, float] | None], decimals: int = 3) -> str:
    """Numbers by row and column; what a column lacks is left blank, columns that are None are left out.

    Args:
        rows: names of the numbers.
        columns: {heading: {name: number}}.
    """
    shown = {heading: values for heading, values in columns.items() if values}
    present = [row for row in rows if any(row in values for values in shown.values())]
    cells = [
        [f"{values[row]:.{0 if row == 'images' else decimals}f}" if row in values else "" for values in shown.values()]
        for row in present
    ]
    first = max(map(len, present), default=0)
    widths = [max([len(heading), *(len(line[i]) for line in cells)]) for i, heading in enumerate(shown)]
    lines = [" " * first + "".join(f"  {heading:>{width}}" for heading, width in zip(shown, widths))]
    lines += [
        f"{row:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(line, widths))
        for row, line in zip(present, cells)
    ]
    return printable("\n".join(lines))


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 where it is less than an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
