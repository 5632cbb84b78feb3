"""What a search keeps on disk of its trials, so that nothing is lost whatever dies when.

    FOLDER/NAME/        the trial's run (`mdnet_dist.run_folder`)
    FOLDER/NAME.json    its record without reports, written by the search alone, whole or not at all
    FOLDER/NAME.log     what its first rank printed

Reports are not kept a second time: they follow from the run's own `metrics.jsonl`, which the trial writes before it
reports anything.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mdnet_dist.checkpoint import FOLDER as CHECKPOINTS
from mdnet_dist.checkpoint import checkpoint_of_step, copy_checkpoint
from mdnet_dist.config_check import first_problem
from mdnet_dist.errors import InputError
from mdnet_dist.shards import write_atomically
from mdnet_dist.tracking_files import METRICS_NAME, read_metrics
from tune.records import Point, Report, TrialRecord


class Ledger:
    """The trials of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> list[TrialRecord]:
        """All trials, by number, with what each has reported.

        Raises:
            InputError: a record is damaged.
        """
        trials = []
        for path in self.folder.glob("*.json"):
            try:
                trial = TypeAdapter(TrialRecord).validate_json(path.read_bytes())
            except ValidationError as error:
                raise InputError(
                    f"{path}: damaged ({first_problem(error)}); remove it, and the folder beside it, to lose this trial"
                ) from error
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from error
            if trial.name != path.stem:  # it names the folder that is read, copied and pruned
                raise InputError(f"{path}: is called '{trial.name:.80}' inside; give it back the name of its file")
            trial.reports = reports_of(self.run_folder(trial))
            trials.append(trial)
        return sorted(trials, key=lambda trial: trial.number)

    def write(self, trial: TrialRecord) -> None:
        """Keep what has changed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {name: value for name, value in asdict(trial).items() if name != "reports"}
        write_atomically(self.folder / f"{trial.name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def run_folder(self, trial: TrialRecord) -> Path:
        """Where its run lies, once it has begun."""
        return self.folder / trial.name

    def log(self, trial: TrialRecord) -> Path:
        """What it prints."""
        return self.folder / f"{trial.name}.log"

    def copy_weights(self, parent: TrialRecord, child: TrialRecord, step: int) -> None:
        """Let a trial go on from the checkpoint that another has written after `step` optimiser steps.

        What the trial itself has saved of later steps is deleted; its metrics stay, up to that step.

        Raises:
            InputError: the other one has no such checkpoint.
        """
        source = checkpoint_of_step(self.run_folder(parent), step)
        if source is None:
            raise InputError(
                f"{self.run_folder(parent) / CHECKPOINTS}: no checkpoint of step {step}; {child.name} cannot copy it"
            )
        copy_checkpoint(source, self.run_folder(child))


def reports_of(run_folder: Path) -> list[Report]:
    """What a trial has reported, read off its run's `metrics.jsonl`: the evaluations of the validation part."""
    reports: list[Report] = []
    training: dict[str, float] = {}
    started = None
    for entry in read_metrics(run_folder / METRICS_NAME):
        metrics: dict[str, float] = entry["metrics"]
        started = entry["time"] if started is None else started
        if "val/score" in metrics and math.isfinite(metrics.get("progress/epoch", math.nan)):
            reports.append(
                Report(
                    epoch=int(metrics["progress/epoch"]),
                    step=entry["step"],
                    seconds=round(entry["time"] - started, 3),
                    metrics={**training, **metrics},
                )
            )
        elif "train/loss_m" in metrics:
            training = metrics
    return reports


def trial_name(number: int, point: Point, labels: list[str]) -> str:
    """A trial's name: its number and what it chose, `007-linear-balanced-1`.

    Args:
        labels: the parameters that are choices; the first few are named.
    """
    chosen = [re.sub(r"[^A-Za-z0-9]+", "", str(point[label]))[:12] for label in labels[:4] if label in point]
    return "-".join([f"{number:03d}", *filter(None, chosen)])
