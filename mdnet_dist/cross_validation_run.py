"""Training the folds of a cross-validation that are missing, each a job of the DeepSpeed launcher; then the table."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from tqdm import tqdm

from mdnet_dist.config_file import flatten
from mdnet_dist.console import duration
from mdnet_dist.cross_validation import (
    FIGURE,
    MAPS,
    RESULTS,
    SCORES,
    TABLE,
    FoldRun,
    Model,
    arguments_of,
    plan_folds,
    prepare_folder,
    results_of,
    scores_of,
    summary_metrics,
    table_text,
    values_of,
)
from mdnet_dist.errors import Preempted, TrainingFailed
from mdnet_dist.figures import draw_folds
from mdnet_dist.run_folder import CONFIG, alone_in
from mdnet_dist.shards import ShardManifest, write_atomically
from mdnet_dist.side_by_side import Job, Running, run_side_by_side
from mdnet_dist.signals import handled_by
from mdnet_dist.storage import open_source
from mdnet_dist.tracking import RUN_NAME, Tracker, open_parent, run_tags

LINE_SECONDS = 60.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `launch/cross_validate.py` was asked for."""

    config: str  # as `load_config` takes them
    overrides: list[str]
    models: list[Model]
    folds: list[int] | None = None  # None: all
    at_once: int = 1
    accelerators: int = 1  # for each fold
    gpus: int = 0  # of this machine
    out: Path | None = None  # None: RUNS/NAME-cv

    @property
    def folder(self) -> Path:
        """Where all is written."""
        config = self.models[0].config
        return self.out or Path(config.runs_folder) / f"{config.name}-cv"


def cross_validate(request: Request) -> Path:
    """Train what is missing, write and log the table; returns the folder.

    Raises:
        InputError: something the user gave is wrong, or another cross-validation works in the folder.
        TrainingFailed: a fold failed; the message names its log.
        Preempted: a signal asked to stop; folds that ran have written checkpoints.
    """
    config, folder = request.models[0].config, request.folder
    manifest = open_source(config.data).manifest()
    runs = plan_folds(request.models, manifest, request.folds, folder)
    prepare_folder(folder, request.models, runs)
    with (
        alone_in(folder / ".lock", "a cross-validation, or a fold that one has left running,") as lock,
        _stopped_by_signals(),
    ):
        tags = run_tags(request.accelerators, "gpu" if request.gpus else "cpu")
        tracker = open_parent(config.tracking, folder, flatten(config), tags, resume=(folder / RUN_NAME).exists())
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            _train_missing(request, runs, tracker.run_id, lock)
            _write_table(folder, plan_folds(request.models, manifest, None, folder), manifest, tracker)
            status = "FINISHED"
        except (Preempted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            tracker.close(status)
    return folder


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and SIGHUP (the terminal has gone) into `Preempted`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"stopped by {signal.Signals(number).name}; the same command goes on with what is missing")

    with handled_by(stop, (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)):
        yield


def _train_missing(request: Request, runs: Sequence[FoldRun], parent_run_id: str, lock: int) -> None:
    missing = [run for run in runs if scores_of(run.folder) is None]
    done = len(runs) - len(missing)
    print(f"{request.folder}: {len(runs)} runs, {done} of them done", flush=True)
    wordnet = Path(request.models[0].config.runs_folder) / "nltk_data"  # runs look beside their own folder
    os.environ.setdefault("NLTK_DATA", str(wordnet.resolve()))
    jobs = [
        Job(
            name=run.name,
            arguments=arguments_of(run, request.config, request.overrides, parent_run_id),
            log=run.log,
        )
        for run in missing
    ]
    with _Display(len(runs), done) as display:
        failed = run_side_by_side(
            jobs,
            request.at_once,
            request.accelerators,
            request.gpus,
            watch=display.watch,
            keep_open=[lock],
        )
    if failed is not None:
        raise TrainingFailed(
            f"{failed.job.name} ended with exit code {failed.exit_code()} ({failed.reason():.200}); its log is "
            f"{failed.job.log}; the same command goes on with what is missing"
        )


class _Display:
    """How far the folds are: one line that fits the terminal; elsewhere a line for each end, and one a minute."""

    def __init__(self, runs: int, done: int) -> None:
        self._runs, self._before, self._known = runs, done, 0
        self._told: set[str] = set()  # names of jobs whose start was told
        self._started, self._said = time.monotonic(), time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=runs, initial=done, unit="fold", disable=not self._terminal, dynamic_ncols=True)

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def watch(self, running: list[Running], done: list[Job]) -> None:
        """Show it."""
        for one in [one for one in running if one.job.name not in self._told]:
            self._told.add(one.job.name)
            tqdm.write(f"started   {one.job.name}, its log: {one.job.log}\n$ {one.command}", file=sys.stdout)
            sys.stdout.flush()
        for job in done[self._known :]:
            tqdm.write(f"done      {job.name}  ({self._before + len(done)} of {self._runs})", file=sys.stdout)
            sys.stdout.flush()
            self._bar.update(1)
        self._known = len(done)
        if self._terminal:
            self._bar.set_postfix_str("  |  ".join(map(_shown, running)), refresh=True)
        elif running and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            left = self._left(len(done))
            for one in running:
                print(f"running   {_shown(one)}{left}", flush=True)

    def _left(self, done: int) -> str:
        if not done:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self._runs - self._before - done)
        return f"  all left {duration(seconds)}"


def _shown(one: Running) -> str:
    step = re.search(r"step (\d+/\d+)", line := one.last_line())
    left = re.search(r"left ([\d:]+)", line)
    return one.job.name + (f" step {step[1]}" if step else "") + (f" left {left[1]}" if left else "")


def _write_table(folder: Path, runs: Sequence[FoldRun], manifest: ShardManifest, tracker: Tracker) -> None:
    results: dict[str, Any] = results_of(runs, manifest)
    scored = {fold for row in results.values() for fold in row["folds"]}
    folds = f"{len(scored)} folds" + (f" of {manifest.folds}" if len(scored) < manifest.folds else "")
    text = table_text(results, f"{folder.name}: {manifest.name}, {folds} by patient")
    write_atomically(folder / TABLE, text)
    write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    panels = {heading: values_of(results, name, factor) for name, heading, factor in (*SCORES, *MAPS)}
    draw_folds({heading: values for heading, values in panels.items() if values}, folder / FIGURE)
    for model, row in results.items():
        # At the number of folds: a store takes each step once, and with more folds there are other means.
        tracker.log_metrics(summary_metrics({model: row}), len(row["folds"]))
    for name in (CONFIG, TABLE, RESULTS, FIGURE):
        tracker.log_artifact(folder / name)
    print(f"\n{text}")
