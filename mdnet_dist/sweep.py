"""Runs that differ in one number, concat_depth, trained one after another in one job and compared in a table.

The sweep has a folder of its own, `runs/NAME/`, with the runs' folders in it, and `sweep.json` (what is done),
`table.md` and `table.png` beside them, written again after each run. In MLflow it is a run with the others under it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from mdnet_dist.config import RunConfig
from mdnet_dist.config_check import first_problem
from mdnet_dist.config_file import check_config, flatten
from mdnet_dist.console import say
from mdnet_dist.cost import as_flops, cost_of
from mdnet_dist.data import parts_of
from mdnet_dist.distributed import is_first, on_first, world_size
from mdnet_dist.engine import start_processes
from mdnet_dist.errors import InputError, Preempted
from mdnet_dist.figures import draw_sweep
from mdnet_dist.run import run_training
from mdnet_dist.run_folder import existing_run_folder, new_run_folder
from mdnet_dist.shards import write_atomically
from mdnet_dist.storage import open_source, place_of_set
from mdnet_dist.tracking import Tracker, open_parent, run_tags
from mdnet_dist.trainer import Result

STATE, TABLE, FIGURE = "sweep.json", "table.md", "table.png"
Depth = int | Literal["full"]
DEPTHS: tuple[Depth, ...] = (0, 1, "full")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run came to."""

    depth: Depth
    error: float  # top-1 error of the test part, a fraction
    images: int  # in it
    parameters: int
    flops: int  # a forward pass of one image (`mdnet_dist.cost`)
    seconds: float  # training and scoring, by the clock, all sessions together


@dataclass(kw_only=True)
class _State:
    """`sweep.json`."""

    config: dict[str, object]  # flattened, of what all runs share
    rows: list[Row] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)  # seconds of runs that were stopped, by depth


def run_sweep(config: RunConfig, depths: Sequence[Depth] = DEPTHS, *, resume: bool = False) -> tuple[Path, list[Row]]:
    """Train and score a run for each depth. Collective: every rank of the job calls it.

    Args:
        resume: go on with the newest sweep of this name: finished runs are kept, a begun one is continued.

    Returns:
        the sweep's folder, and its rows in the order of `depths`.

    Raises:
        InputError: as `run_training`; and a depth given twice or too large, a set without classes or test part, a
            sweep to resume that had another configuration.
    """
    if len(set(depths)) != len(depths) or not depths:
        raise InputError(f"--depths {' '.join(map(str, depths))}: name each depth once")
    runs = {depth: _run_config(config, depth) for depth in depths}
    manifest = open_source(config.data).manifest()
    if not manifest.classes or not parts_of(manifest, config.data.fold)[2]:
        raise InputError(
            f"{place_of_set(config.data)}: a sweep compares top-1 errors of the test part; the set has no such"
        )
    device = start_processes()
    folder = on_first(lambda: existing_run_folder(config) if resume else new_run_folder(config))
    state = on_first(lambda: _open_state(folder, config, resume))
    opened: list[Tracker] = []
    tags = run_tags(world_size(), device.type)
    parent_id = on_first(lambda: _open_parent(config, folder, tags, resume, opened))
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        for number, (depth, run) in enumerate(runs.items(), start=1):
            if any(row.depth == depth for row in state.rows):
                say(f"concat_depth {depth}: done before")
                continue
            say(f"\nrun {number} of {len(depths)}: concat_depth {depth}")
            run = run.model_copy(update={"runs_folder": str(folder)})
            begun = on_first(lambda run=run: (folder / run.name).is_dir())  # type: ignore[misc]
            started = time.monotonic()
            try:
                result = run_training(run, resume=begun, parent_run_id=parent_id)
            finally:
                state.spent[str(depth)] = state.spent.get(str(depth), 0.0) + time.monotonic() - started
                if is_first():  # not collective: a rank may have failed alone
                    _write_state(folder, state)
            state.rows.append(_row(depth, result, state.spent.pop(str(depth))))
            on_first(lambda: _write(folder, config.name, state, depths, opened))
        status = "FINISHED"
    except (Preempted, KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        for tracker in opened:
            tracker.close(status)
    return folder, _ordered(state.rows, depths)


def top1_error(result: Result) -> float | None:
    """Share of the test part's images whose class is not the most probable one; None without test part or classes."""
    accuracy = result.metrics.get("test/label_accuracy")
    return None if accuracy is None else 1 - accuracy


def sweep_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, its columns lined up for a terminal."""
    cells = [["concat_depth", "top-1 error %", "parameters", "FLOPs an image", "seconds"]]
    cells += [
        [
            str(row.depth),
            f"{100 * row.error:.2f}",
            f"{row.parameters:,}",
            as_flops(row.flops),
            f"{row.seconds:.0f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths))} |" for line in cells]
    lines.insert(1, f"| {' | '.join('-' * (width - 1) + ':' for width in widths)} |")
    return "\n".join(lines)


def _run_config(config: RunConfig, depth: Depth) -> RunConfig:
    """The configuration of one run; its checks are those of any configuration."""
    values = config.model_dump(mode="json")
    values["model"]["image"]["concat_depth"] = depth
    values["name"] = f"{config.name}-depth-{depth}"
    return check_config(values, f"concat_depth {depth}")


def _row(depth: Depth, result: Result, seconds: float) -> Row:
    card = result.data.card
    cost = cost_of(card.build, card.data["image_size"])
    return Row(
        depth=depth,
        error=1 - result.metrics["test/label_accuracy"],
        images=int(result.metrics["test/images"]),
        parameters=cost.weights,
        flops=cost.flops,
        seconds=round(seconds, 1),
    )


def _ordered(rows: Sequence[Row], depths: Sequence[Depth]) -> list[Row]:
    """Rows of these depths, in their order; then others, of an earlier session."""
    return sorted(rows, key=lambda row: depths.index(row.depth) if row.depth in depths else len(depths))


def _open_state(folder: Path, config: RunConfig, resume: bool) -> _State:
    shared = {key: value for key, value in flatten(config).items() if key != "model.image.concat_depth"}
    path = folder / STATE
    if resume and path.exists():
        try:
            state = TypeAdapter(_State).validate_json(path.read_bytes())
        except ValidationError as error:
            raise InputError(f"{path}: damaged ({first_problem(error)}); start another sweep") from error
        for key in sorted({*shared, *state.config}):
            if shared.get(key) != state.config.get(key):
                raise InputError(
                    f"{path}: the sweep has {key} {state.config.get(key)}, not {shared.get(key)}; its runs would not "
                    "be comparable; start another sweep, under another name"
                )
        return state
    if resume:
        raise InputError(f"{folder}: not the folder of a sweep; start it without --resume")
    state = _State(config=shared)
    _write_state(folder, state)
    return state


def _open_parent(config: RunConfig, folder: Path, tags: dict[str, str], resume: bool, opened: list[Tracker]) -> str:
    opened.append(open_parent(config.tracking, folder, flatten(config), tags, resume=resume))
    return opened[0].run_id


def _write_state(folder: Path, state: _State) -> None:
    write_atomically(folder / STATE, json.dumps(asdict(state), indent=1) + "\n")


def _write(folder: Path, name: str, state: _State, depths: Sequence[Depth], opened: list[Tracker]) -> None:
    """The table and its figure as far as they are, into the folder and into MLflow."""
    rows = _ordered(state.rows, depths)
    images = f"{rows[0].images:,} test images"
    write_atomically(
        folder / TABLE,
        f"{name}, {images}. FLOPs: of a forward pass of one image, a multiply-add counted as two.\n\n"
        f"{sweep_table(rows)}\n",
    )
    draw_sweep(
        [str(row.depth) for row in rows],
        [row.error for row in rows],
        [row.parameters for row in rows],
        [row.flops for row in rows],
        folder / FIGURE,
        title=f"{name}, {images}",
    )
    _write_state(folder, state)
    for tracker in opened:
        row = state.rows[-1]
        tracker.log_metrics(
            {
                f"depth_{row.depth}/top1_error": row.error,
                f"depth_{row.depth}/parameters": row.parameters,
                f"depth_{row.depth}/flops": row.flops,
                f"depth_{row.depth}/seconds": row.seconds,
            },
            len(state.rows),
        )
        tracker.log_artifact(folder / TABLE)
        tracker.log_artifact(folder / FIGURE)
