"""The shard format: what `data_shards` writes and training reads (docs/design.md section 2). Standard library only.

    OUT/manifest.json        this file's `ShardManifest`
    OUT/PART-000000.tar      PART is train, val, test, or fold0..fold4

A sample is `KEY.jpg` or `KEY.png` (the image), `KEY.json` (`SampleRecord`) and, where people or a generator drew one,
`KEY.mask.png` (8-bit, 0 outside, 255 inside). Keys contain no dot, so that any WebDataset reader groups them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mdnet_dist.errors import InputError, nearest

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CONCLUSION = "conclusion"
"""The topic whose sentence names the diagnosis; a shard set need not have it."""

# People write reports, so the pieces are plain JSON types: {topic: sentence}; a missing topic is a missing key.
Report = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """`KEY.json`: all that is known of a sample but its pixels."""

    patient: str
    label: str | None  # the conclusion's class; None where nobody gave one
    reports: list[Report]  # one per reader; topics as in the manifest
    grades: dict[str, str] = field(default_factory=dict)  # {topic: true grade}, for scoring only; synthetic data


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar file of the set."""

    file: str  # name inside the set's folder
    part: str  # train, val, test or foldN
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PartStatistics:
    """What training must know of a part before it reads a sample. A run adds up the parts it trains on."""

    samples: int
    patients: int
    labels: dict[str, int]  # {class: images}
    words: dict[str, int]  # {word: times}, over all reports, tokenised as `mdnet_dist.vocabulary.tokenize` does
    conclusions: dict[str, dict[str, int]]  # {class: {conclusion sentence, tokenised and joined by spaces: times}}
    longest_sentence: int  # tokens of the longest sentence of any topic
    image_mean: list[float]  # per channel (R, G, B), of pixels scaled to 0..1, each image counted once
    image_std: list[float]


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """`manifest.json` of a shard set."""

    name: str  # what the set is, for people
    topics: list[str]  # in the order in which a report says them
    classes: list[str]  # conclusion classes, in the order of the network's outputs
    vocabulary: list[str]  # sorted words of the training parts (of all folds where there are folds)
    parts: dict[str, PartStatistics]
    shards: list[ShardInfo]
    format: int = FORMAT_VERSION

    @property
    def folds(self) -> int:
        """How many folds the set was dealt into; 0 where it has train, val and test."""
        return sum(part.startswith("fold") for part in self.parts)

    def shards_of(self, parts: Iterable[str]) -> list[ShardInfo]:
        """The shards of these parts, in the manifest's order.

        Raises:
            InputError: a part that the set does not have.
        """
        wanted = list(parts)
        for part in wanted:
            if part not in self.parts:
                raise InputError(f"part '{part}' is not in this shard set; {nearest(part, self.parts)}")
        return [shard for shard in self.shards if shard.part in wanted]

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, whole or not at all."""
        write_atomically(folder / MANIFEST_NAME, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def load_manifest(folder: str | os.PathLike[str]) -> ShardManifest:
    """Read and check the manifest of the shard set in `folder`.

    Raises:
        InputError: no such folder or manifest, not JSON, another format version, a missing or unknown field, a shard
            name that leaves the folder, or a shard that is listed twice.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a shard set has one, written by `python -m data_shards synth|import --out {folder}`"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); build the shard set again") from error
    try:
        if raw["format"] != FORMAT_VERSION:
            raise InputError(f"{path}: format {raw['format']}, but this version reads format {FORMAT_VERSION}")
        raw["parts"] = {part: PartStatistics(**statistics) for part, statistics in raw["parts"].items()}
        raw["shards"] = [ShardInfo(**shard) for shard in raw["shards"]]
        manifest = ShardManifest(**raw)
        for found in (*manifest.parts.values(), *manifest.shards, manifest):
            _check_types(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a shard manifest ({error}); build the shard set again") from error
    seen: set[str] = set()
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or shard.file in ("", ".", ".."):
            raise InputError(f"{path}: shard '{shard.file}' is not a plain file name inside the folder")
        if shard.file in seen:
            raise InputError(f"{path}: shard '{shard.file}' is listed twice")
        seen.add(shard.file)
    return manifest


def _check_types(found: Any) -> None:
    """Check the fields of a dataclass that was filled from JSON against their annotations.

    Raises:
        TypeError: the first field that is of another type, or a count below zero.
    """
    for name, kind in get_type_hints(type(found)).items():
        value = getattr(found, name)
        if not _is_of_type(value, kind) or (kind is int and value < 0):
            raise TypeError(f"'{name}' is not of type {getattr(kind, '__name__', kind)}")


def _is_of_type(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(_is_of_type(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of_type(item, inner[1]) for item in value.values())
    if isinstance(value, bool):  # Python counts it as an int; JSON does not
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` under another name first, then rename: readers see the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_record(raw: bytes, where: str) -> SampleRecord:
    """Read `KEY.json`.

    Args:
        raw: the member's bytes.
        where: shard and key, for the error message.

    Raises:
        InputError: not JSON, or not a sample record.
    """
    try:
        fields: dict[str, Any] = json.loads(raw)
        record = SampleRecord(**fields)
        well_formed = (
            isinstance(record.patient, str)
            and (record.label is None or isinstance(record.label, str))
            and isinstance(record.grades, dict)
            and all(isinstance(grade, str) for grade in record.grades.values())
            and isinstance(record.reports, list)
            and all(
                isinstance(report, dict) and all(isinstance(sentence, str) for sentence in report.values())
                for report in record.reports
            )
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{where}: not a sample record ({error}); `python -m data_shards verify` checks a set"
        ) from error
    if not well_formed:
        raise InputError(f"{where}: not a sample record; patient, label, sentences and grades must be strings")
    return record
