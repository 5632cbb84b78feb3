"""Import CIFAR-10 or CIFAR-100, in whichever form one has it.

    SOURCE/data_batch_1 ... 5, test_batch, batches.meta          CIFAR-10, "python version"
    SOURCE/train, test, meta                                     CIFAR-100, "python version"
    SOURCE/data_batch_1.bin ... 5, test_batch.bin, batches.meta.txt             CIFAR-10, "binary version"
    SOURCE/train.bin, test.bin, fine_label_names.txt, coarse_label_names.txt    CIFAR-100, "binary version"
    SOURCE/labels.csv                                            image files; columns split, file, label, class

The formats are described at https://www.cs.toronto.edu/~kriz/cifar.html. An image is 3,072 bytes: 1,024 of red, then of
green, then of blue, row by row. Arrays become PNG files; JPEG files stay as they are (`data_shards.prepare`). There
are no reports: the set has classes and no topics, and each image counts as a patient of its own.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data_shards.importing import clean_text, make_keys, resolve_inside
from data_shards.plain_pickle import PickledArray, read_plain_pickle
from data_shards.prepare import prepare_pixels
from data_shards.writer import SAMPLES_PER_SHARD, SPLITS, Pixels, PlannedSample, write_planned
from mdnet_dist.errors import InputError
from mdnet_dist.images import encode_png
from mdnet_dist.shards import SampleRecord, ShardManifest

SIDE_PX = 32
IMAGE_BYTES = 3 * SIDE_PX * SIDE_PX
MAX_CSV_BYTES = 1 << 28
Labels = Literal["fine", "coarse"]


@dataclass(frozen=True, kw_only=True)
class CifarSet:
    """What a source holds."""

    name: str
    classes: list[str]  # in the order of their numbers
    samples: list[PlannedSample]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One file of images as arrays."""

    images: np.ndarray  # (N, 3, 32, 32), uint8
    labels: np.ndarray  # (N), integers
    path: Path


def import_cifar(
    source: Path,
    out: Path,
    *,
    labels: Labels = "fine",
    validation: int = 0,
    name: str | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    force: bool = False,
) -> ShardManifest:
    """Write a source as a shard set with the parts train and test, and val where images are set aside for it.

    Args:
        labels: of CIFAR-100, its 100 fine or 20 coarse classes.
        validation: how many training images become the validation part, the same number of each class as far as
            possible.

    Raises:
        InputError: whatever is wrong with the source, and all that `write_planned` refuses.
    """
    found = read_cifar(source, labels)
    return write_planned(
        _set_aside(found.samples, validation),
        out,
        name=name or found.name,
        topics=[],
        classes=found.classes,
        samples_per_shard=samples_per_shard,
        force=force,
    )


def read_cifar(source: Path, labels: Labels = "fine") -> CifarSet:
    """Read a source in the format that its file names tell.

    Raises:
        InputError: they tell none, a file is missing or damaged, or `labels` are coarse where there are only ten.
    """
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    formats: dict[str, Callable[[], CifarSet]] = {
        "labels.csv": lambda: _read_csv(source),
        "data_batch_1": lambda: _read_arrays(source, "CIFAR-10", _read_pickle, "", "labels", "batches.meta"),
        "data_batch_1.bin": lambda: _read_arrays(
            source, "CIFAR-10", _read_binary, ".bin", "labels", "batches.meta.txt"
        ),
        "meta": lambda: _read_arrays(source, "CIFAR-100", _read_pickle, "", f"{labels}_labels", "meta"),
        "train.bin": lambda: _read_arrays(
            source, "CIFAR-100", _read_binary, ".bin", f"{labels}_labels", f"{labels}_label_names.txt"
        ),
    }
    for marker, read in formats.items():
        if (source / marker).is_file():
            if labels == "coarse" and marker not in ("meta", "train.bin"):
                raise InputError(f"{source}: --labels coarse: only CIFAR-100 has coarse labels")
            return read()
    raise InputError(
        f"{source}: not CIFAR: no {', '.join(formats)}; name the unpacked folder, as cifar-10-batches-py, or one with "
        "image files and labels.csv"
    )


# --------------------------------------------------------------------------------------------------------------- arrays


def _read_arrays(
    source: Path, name: str, read: Callable[[Path, str], _Batch], suffix: str, labels: str, meta: str
) -> CifarSet:
    ten = name == "CIFAR-10"
    files = {"train": [f"data_batch_{number}" for number in range(1, 6)] if ten else ["train"]}
    files["test"] = ["test_batch"] if ten else ["test"]
    classes = _class_names(source / meta, "label_names" if ten else f"{labels.removesuffix('s')}_names")
    samples: list[PlannedSample] = []
    for split, names in files.items():
        number = 0
        for file in names:
            batch = read(source / f"{file}{suffix}", labels)
            if wrong := [int(label) for label in batch.labels if not 0 <= label < len(classes)]:
                raise InputError(f"{batch.path}: label {wrong[0]}, but {meta} names {len(classes)} classes")
            for index, (image, label) in enumerate(zip(batch.images, batch.labels, strict=True)):
                key = f"{split}-{number:05d}"
                samples.append(
                    _planned(key, split, classes[label], f"{batch.path}: image {index}", partial(_as_png, image))
                )
                number += 1
    return CifarSet(name=name if ten else f"{name}, {labels.replace('_', ' ')}", classes=classes, samples=samples)


def _as_png(image: np.ndarray) -> Pixels:
    """(3, 32, 32) to a PNG file."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    return Pixels(image=encode_png(picture), extension="png")


def _read_pickle(path: Path, labels: str) -> _Batch:
    """A batch of the python version. Args: labels: the key of its labels."""
    content = read_plain_pickle(path)
    for key in ("data", labels):
        if key not in content:
            raise InputError(f"{path}: no '{key}' in it; it has {', '.join(map(ascii, sorted(content)[:8])) or 'none'}")
    images = _integers(content["data"], f"{path}: data")
    numbers = _integers(content[labels], f"{path}: {labels}")
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != IMAGE_BYTES:
        raise InputError(f"{path}: data must be N x {IMAGE_BYTES} bytes, not {images.dtype} of shape {images.shape}")
    if numbers.shape != images.shape[:1]:
        raise InputError(f"{path}: {len(images)} images, but {labels} has the shape {numbers.shape}")
    return _Batch(images=images.reshape(-1, 3, SIDE_PX, SIDE_PX), labels=numbers, path=path)


def _integers(value: Any, where: str) -> np.ndarray:
    try:
        if isinstance(value, PickledArray):
            return value.values()
        if isinstance(value, list) and all(type(number) is int for number in value):
            return np.array(value, dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{where}: {error}") from error
    raise InputError(f"{where}: must be a list or an array of integers, not a {type(value).__name__}")


def _read_binary(path: Path, labels: str) -> _Batch:
    """A file of the binary version: records of one label (CIFAR-10) or coarse and fine label, and the image."""
    raw = _read_file(path)
    label_bytes = 1 if labels == "labels" else 2
    record = label_bytes + IMAGE_BYTES
    if not raw or len(raw) % record:
        raise InputError(f"{path}: {len(raw):,} bytes are not records of {record:,}; the file is cut off or another")
    records = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return _Batch(
        images=records[:, label_bytes:].reshape(-1, 3, SIDE_PX, SIDE_PX),
        labels=records[:, 1 if labels == "fine_labels" else 0].astype(np.int64),
        path=path,
    )


def _class_names(path: Path, key: str) -> list[str]:
    """Names by number: from a text file, one a line, or from a pickle's `key`."""
    if path.suffix == ".txt":
        try:
            found: Any = _read_file(path).decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a text file ({error.reason})") from error
        found = [line for line in found if line.strip()]
    else:
        found = read_plain_pickle(path).get(key)
    if not isinstance(found, list) or not found:
        raise InputError(f"{path}: no class names; '{key}' must be a list of them")
    names = [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in found]
    return [clean_text(name, "a class name", str(path)) for name in names]


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


# ---------------------------------------------------------------------------------------------------------------- files


def _read_csv(source: Path) -> CifarSet:
    path = source / "labels.csv"
    rows = list(_csv_rows(path))
    if not rows:
        raise InputError(f"{path}: no images in it")
    keys = make_keys([row["file"] for _, row in rows])
    number_of: dict[str, tuple[str, str]] = {}
    seen: dict[Path, str] = {}
    samples = []
    for key, (where, row) in zip(keys, rows, strict=True):
        image = resolve_inside(source, row["file"], where)
        if image in seen:
            raise InputError(f"{where}: file '{row['file']}' is there twice, first at {seen[image]}")
        seen[image] = where
        if row["split"] not in SPLITS:
            raise InputError(f"{where}: split '{row['split']}' must be one of {', '.join(SPLITS)}")
        number, first = number_of.setdefault(row["class"], (row["label"], where))
        if number != row["label"]:
            raise InputError(f"{where}: class '{row['class']}' has label {row['label']}, but {number} at {first}")
        load = partial(prepare_pixels, image, None, where)
        samples.append(_planned(key, row["split"], row["class"], where, load))
    classes = sorted(number_of, key=lambda name: int(number_of[name][0]))
    if [int(number_of[name][0]) for name in classes] != list(range(len(classes))):
        given = ", ".join(f"{name} {number_of[name][0]}" for name in classes[:12])
        raise InputError(f"{path}: labels must number the classes from 0, each its own; it has {given}")
    return CifarSet(name=source.resolve().name, classes=classes, samples=samples)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and columns of each line.

    Raises:
        InputError: not CSV with these columns, or a field that is empty or no number.
    """
    columns = ("split", "file", "label", "class")
    raw = _read_file(path)
    if len(raw) > MAX_CSV_BYTES:
        raise InputError(f"{path}: more than {MAX_CSV_BYTES:,} bytes")
    try:
        reader = csv.DictReader(raw.decode("utf-8-sig").splitlines(), strict=True)
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise InputError(f"{path}: no column '{column}'; the first line must name {', '.join(columns)}")
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            cells = {column: clean_text(row[column], f"'{column}'", where) for column in columns}
            if not (cells["label"].isascii() and cells["label"].isdigit() and len(cells["label"]) < 6):
                raise InputError(f"{where}: label '{cells['label']:.40}' must be a number from 0")
            yield where, cells
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from error


# --------------------------------------------------------------------------------------------------------------- shared


def _planned(key: str, split: str, label: str, where: str, load: Callable[[], Pixels]) -> PlannedSample:
    record = SampleRecord(patient=key, label=label, reports=[])
    return PlannedSample(key=key, split=split, record=record, load=load, where=where)


def _set_aside(samples: Sequence[PlannedSample], validation: int) -> list[PlannedSample]:
    """The samples with so many of train moved to val: class by class in turn, which of a class by a hash of the key."""
    if not validation:
        return list(samples)
    if any(sample.split == "val" for sample in samples):
        raise InputError(f"--val {validation}: the source has a validation part of its own")
    by_class: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        if sample.split == "train":
            by_class[str(sample.record.label)].append(sample.key)
    training = sum(map(len, by_class.values()))
    if validation >= training:
        raise InputError(f"--val {validation}: there are {training} training images, and some must stay")
    ranked: list[tuple[int, str, str]] = []
    for label, keys in sorted(by_class.items()):
        ordered = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
        ranked += [(place, label, key) for place, key in enumerate(ordered)]
    moved = {key for _, _, key in sorted(ranked)[:validation]}
    return [replace(sample, split="val") if sample.key in moved else sample for sample in samples]
