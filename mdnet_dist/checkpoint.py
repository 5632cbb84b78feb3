"""Checkpoints that appear whole or not at all, and that any number of ranks at any ZeRO stage can continue from.

    RUN/checkpoints/step-00000120/state.safetensors   weights and buffers by name, optimiser tensors as KEY/NAME
    RUN/checkpoints/step-00000120/state.json          `Progress`
    RUN/checkpoints/step-00000120/SHA256SUMS          of both, as `sha256sum -c` reads them

The files are written into a folder under another name, synchronised to disk, and the folder is renamed. Nothing in a
checkpoint is pickled: reading one executes nothing. One that is damaged later is found by its checksums; training then
goes on from the one before it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdnet_dist.config_check import first_problem
from mdnet_dist.console import say
from mdnet_dist.errors import InputError
from mdnet_dist.shards import sha256_of

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})")
_OPTIMIZER_KEY = "optimizer:"
_PARTIAL = ".partial"
_TENSORS, _STATE, _SUMS = "state.safetensors", "state.json", "SHA256SUMS"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training stands, besides the tensors."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # what is read is checked, what is made is not

    step: int  # updates tried so far; the next batch to read is this one of the plan
    updates: int  # updates done: steps without those skipped for a loss that is not finite
    bad_steps: int  # skipped in a row just before
    eta_norms: Annotated[list[float], Field(min_length=2, max_length=2)]  # running norms of `eta: balanced`
    epoch_end_due: bool  # the step was the last of its epoch, and what follows one (validation) is still to be done
    sequence: dict[str, int | str]  # what the order of the training images follows from: a resumed run must have it too
    score: float | None  # the validation score at this step, where it was evaluated here
    best_score: float | None  # the best so far


def save_checkpoint(
    run_folder: Path, progress: Progress, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]
) -> Path:
    """Write a checkpoint, whole or not at all; the first rank does it.

    Returns:
        its folder.

    Raises:
        InputError: it cannot be written: a full disk, a folder that is read-only or not a folder.
    """
    folder = run_folder / FOLDER / _step_name(progress.step)
    with _written_aside(folder) as aside:
        tensors = {**weights, **{_OPTIMIZER_KEY + key: value for key, value in optimizer_state.items()}}
        save_file({key: value.contiguous() for key, value in tensors.items()}, aside / _TENSORS)
        (aside / _STATE).write_text(json.dumps(asdict(progress), indent=1) + "\n", encoding="utf-8")
        sums = [f"{sha256_of(aside / name)}  {name}\n" for name in (_STATE, _TENSORS)]
        (aside / _SUMS).write_text("".join(sums), encoding="utf-8")
    return folder


@contextmanager
def _written_aside(folder: Path, deleted: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write a checkpoint into, which gets its name when it is whole and on disk.

    One that has this name already (the same step again, after a resume) is moved away and deleted afterwards; a kill
    between the two is mended by `_clean_up`.

    Args:
        folder: what it is called then.
        deleted: other checkpoints that are deleted just before.

    Raises:
        InputError: it cannot be written.
    """
    aside = _aside(folder)
    try:
        _clean_up(folder.parent)
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.iterdir(), aside):
            _synchronise(path)
        for checkpoint in deleted:
            _delete(checkpoint)
        if folder.exists():
            folder.rename(_replaced(folder))
        aside.rename(folder)
        _synchronise(folder.parent)
        shutil.rmtree(_replaced(folder), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{folder}: cannot be written ({reason}); make room there, then --resume") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """A name for a checkpoint that is not whole, or no longer."""
    return folder.with_name(f".{folder.name}{_PARTIAL}")


def _replaced(folder: Path) -> Path:
    """What a checkpoint is called while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced{_PARTIAL}")


def _clean_up(folder: Path) -> None:
    """Put back and remove what a writer left that was killed; there is one writer to a run."""
    for path in folder.glob(f".step-*.replaced{_PARTIAL}"):
        name = folder / path.name.removeprefix(".").removesuffix(f".replaced{_PARTIAL}")
        if not name.exists():
            path.rename(name)
    for path in folder.glob(f".step-*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _delete(checkpoint: Path) -> None:
    """Remove a checkpoint, whole or not at all: half of one must not stay under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted{_PARTIAL}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    folder = run_folder / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step_of)


def checkpoint_of_step(run_folder: Path, step: int) -> Path | None:
    """The run's checkpoint of a step; None where there is none."""
    return next((path for path in checkpoints(run_folder) if path.name == _step_name(step)), None)


def copy_checkpoint(checkpoint: Path, run_folder: Path) -> Path:
    """Make a checkpoint of one run the newest of another, whole or not at all; the other's later ones are deleted.

    Returns:
        the copy.

    Raises:
        InputError: it cannot be written.
    """
    folder = run_folder / FOLDER / checkpoint.name
    later = [path for path in checkpoints(run_folder) if _step_of(path) > _step_of(checkpoint)]
    with _written_aside(folder, deleted=later) as aside:
        for path in checkpoint.iterdir():
            shutil.copyfile(path, aside / path.name)
    return folder


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_progress(checkpoint: Path) -> Progress:
    """Read `state.json`.

    Raises:
        InputError: missing or damaged.
    """
    path = checkpoint / _STATE
    try:
        return TypeAdapter(Progress).validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise _damaged(path, first_problem(error)) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"{path}: damaged ({reason})")


def _check_sums(checkpoint: Path) -> None:
    """Raises: InputError: a file is not as it was written."""
    path = checkpoint / _SUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    for name in (_STATE, _TENSORS):
        try:
            if f"{sha256_of(checkpoint / name)}  {name}" not in lines:
                raise _damaged(checkpoint / name, f"its checksum is not that of {_SUMS}")
        except OSError as error:
            raise _damaged(checkpoint / name, error) from error


def load_checkpoint(checkpoint: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    """Read a checkpoint: where training stood, weights, optimiser tensors.

    Raises:
        InputError: missing or damaged.
    """
    progress = read_progress(checkpoint)
    path = checkpoint / _TENSORS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    _check_sums(checkpoint)
    optimizer_state = {
        key.removeprefix(_OPTIMIZER_KEY): tensors.pop(key) for key in list(tensors) if key.startswith(_OPTIMIZER_KEY)
    }
    return progress, tensors, optimizer_state


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there is none at all. Damaged ones after it are named and get
    another name, so that they count as checkpoints no more.

    Raises:
        InputError: there are some, and all of them are damaged; or their folder is read-only.
    """
    damaged: list[Path] = []
    try:
        _clean_up(run_folder / FOLDER)
        for path in reversed(checkpoints(run_folder)):
            if _is_whole(path):
                for later in damaged:
                    _set_aside(later)
                return path
            damaged.append(path)
    except OSError as error:
        raise InputError(f"{run_folder / FOLDER}: cannot be written ({error.strerror}); make it writable") from error
    if damaged:
        raise InputError(f"{run_folder / FOLDER}: every checkpoint is damaged; start a new run under another name")
    return None


def _set_aside(checkpoint: Path) -> None:
    """Give a damaged checkpoint a name under which whoever wants to look into it finds it."""
    aside, number = checkpoint.with_name(f"damaged-{checkpoint.name}"), 2
    while aside.exists():
        aside, number = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}"), number + 1
    checkpoint.rename(aside)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is as it was written; one that is not is named."""
    try:
        _check_sums(checkpoint)
        read_progress(checkpoint)
    except InputError as error:
        say(f"{error}; the checkpoint is passed over")
        return False
    return True


def best_checkpoint(run_folder: Path, *, whole: bool = False) -> Path | None:
    """The checkpoint with the best validation score, of equal ones the oldest; the last where none was scored.

    Args:
        whole: read them first, and pass over those that are damaged.
    """
    found = [path for path in checkpoints(run_folder) if not whole or _is_whole(path)]
    scored = [(score, path) for path in found if (score := _score(path)) is not None]
    if scored:
        return max(scored, key=lambda pair: pair[0])[1]
    return found[-1] if found else None


def _score(checkpoint: Path) -> float | None:
    """The validation score of a checkpoint; None where it has none, or is damaged: it must not end a sound run."""
    try:
        return read_progress(checkpoint).score
    except InputError:
        return None


def prune_checkpoints(run_folder: Path, keep_last: int, keep_best: int) -> None:
    """Delete all checkpoints but the newest and the best few."""
    found = checkpoints(run_folder)
    scores = {path: _score(path) for path in found}
    scored = sorted((path for path in found if scores[path] is not None), key=lambda path: -(scores[path] or 0.0))
    kept = {*found[-keep_last:], *scored[:keep_best]}
    for path in found:
        if path not in kept:
            _delete(path)
