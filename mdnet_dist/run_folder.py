"""The folder of a run, `runs/NAME/` (docs/design.md section 3): found, made, and filled.

config.yaml        the resolved configuration
checkpoints/       `mdnet_dist.checkpoint`
model.safetensors, model.json    `mdnet_dist.export`
metrics.json       last evaluation, keys prefixed val/ or test/
predictions.jsonl  one line an image of the test part (of the validation part where there is no test part)
pictures/          confusion matrices, curves, some reports with their attention
explained/         pages on the best and the worst few images of the test part (`mdnet_dist.explain`)
mlflow_model/      the exported model as MLflow serves it (`mdnet_dist.served_model`)
metrics.jsonl      every logged point (`mdnet_dist.tracking`)
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mdnet_dist.config import RunConfig
from mdnet_dist.config_file import as_yaml
from mdnet_dist.errors import InputError
from mdnet_dist.shards import write_atomically

if TYPE_CHECKING:  # it wants torch, which a supervisor that looks for a folder does without
    from mdnet_dist.evaluation import Prediction

CONFIG, METRICS, PREDICTIONS = "config.yaml", "metrics.json", "predictions.jsonl"
PICTURES, EXPLAINED, SERVED = "pictures", "explained", "mlflow_model"


class Named(Protocol):
    """What has a folder: a run, or a search over runs."""

    @property
    def name(self) -> str:
        """Of the folder."""

    @property
    def runs_folder(self) -> str:
        """Where it is made."""


def new_run_folder(config: Named) -> Path:
    """Make the folder of a new run: runs/NAME, or the first free of runs/NAME-2, runs/NAME-3, ...

    Raises:
        InputError: it cannot be made.
    """
    number = 1
    while True:
        folder = Path(config.runs_folder) / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}; runs_folder must be a folder that can be written") from error
        else:
            return folder


def existing_run_folder(config: Named) -> Path:
    """The folder to resume: the newest of runs/NAME, runs/NAME-2, ...

    Raises:
        InputError: there is none.
    """
    folder, number = Path(config.runs_folder) / config.name, 2
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run to resume; start it without --resume")
    while (newer := folder.with_name(f"{config.name}-{number}")).is_dir():
        folder, number = newer, number + 1
    return folder


@contextmanager
def alone_in(lock: Path, who: str, wait_seconds: float = 0.0) -> Iterator[int]:
    """A lock on a folder. Its descriptor is given: where this process is killed, the lock lasts as long as the last one
    that has inherited it.

    Args:
        lock: file in the folder; made, and left there.
        who: works there, for the message.
        wait_seconds: how long to wait for another one to end.

    Raises:
        InputError: another one works there still.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait_seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise InputError(f"{lock.parent}: {who} still works there; wait for it, or stop it") from error
            time.sleep(0.1)
        try:
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # for processes that were forked meanwhile as well
    finally:
        os.close(descriptor)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the resolved configuration; `launch/train.py` takes it as it is."""
    write_atomically(folder / CONFIG, as_yaml(config))


def write_scores(folder: Path, metrics: Mapping[str, float], predictions: Sequence[Prediction]) -> None:
    """Write metrics.json and predictions.jsonl."""
    write_atomically(folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    lines = [json.dumps(prediction.as_line(), ensure_ascii=False) for prediction in predictions]
    write_atomically(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))


def refuse_links(folder: Path, base: Path) -> None:
    """Refuse to write to a folder through a link below `base`: a run folder of a stranger may lead anywhere.

    Args:
        base: a run's folder, or the one that the user has named; it may be a link itself.

    Raises:
        InputError: `folder`, or one between it and `base`, is a link.
    """
    for part in (folder, *folder.parents):
        if part == base:
            return
        if part.is_symlink():
            raise InputError(
                f"{part}: a link, through which nothing is written; remove it, or name a folder with --out"
            )


def file_name_of(key: str, taken: set[str]) -> str:
    """A sample's key as a plain file name that no other image has, whatever a file system makes of case.

    Args:
        taken: names that are given already, in lower case; this one is added.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[:80] or "image"
    name, number = plain, 1
    while name.lower() in taken:
        number += 1
        name = f"{plain}-{number}"
    taken.add(name.lower())
    return name
