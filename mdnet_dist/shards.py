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
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin, get_type_hints

from mdnet_dist.errors import InputError, nearest

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MIN_SAMPLE_BYTES = 2048
"""A sample in a tar: image and record, a header and a block of content each."""
MAX_SAMPLES = 10**8
"""In a set: the order of an epoch lies in memory, in 8 bytes a sample."""
_SHA256 = re.compile("[0-9a-f]{64}")
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


def fingerprint(manifest: ShardManifest, parts: Sequence[str]) -> str:
    """What training on these parts follows from, besides the configuration, as a SHA-256 in hexadecimal.

    Sets of equal fingerprints give the same sequence of batches, and networks whose outputs mean the same: equal are
    topics, classes, words with their numbers, image statistics, and the shards in their order. Names of sets and of
    files do not count.

    Raises:
        InputError: a part that the set does not have.
    """
    shards = manifest.shards_of(parts)
    words: Counter[str] = Counter()
    for part in parts:
        words.update(manifest.parts[part].words)
    content = {
        "topics": manifest.topics,
        "classes": manifest.classes,
        "words": sorted(words.items()),
        "shards": [[shard.part, shard.samples, shard.sha256] for shard in shards],
        "images": [[manifest.parts[part].image_mean, manifest.parts[part].image_std] for part in parts],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_manifest(folder: str | os.PathLike[str]) -> ShardManifest:
    """Read and check the manifest of the shard set in `folder`.

    Raises:
        InputError: no such folder or manifest, or as `parse_manifest`.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a shard set has one, written by `python -m data_shards synth|import --out {folder}`"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_manifest(raw, str(path))


def parse_manifest(raw: bytes, where: str) -> ShardManifest:
    """Read and check `manifest.json`.

    Args:
        raw: the file's bytes.
        where: the file, for messages.

    Raises:
        InputError: not JSON, another format version, a missing or unknown field, a shard name that leaves the folder,
            a shard that appears twice under one name or two, more samples than its bytes can hold, parts that their
            shards do not add up to, or a topic or class that is empty or there twice.
    """
    try:
        fields = _loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); build the shard set again") from error
    try:
        if fields["format"] != FORMAT_VERSION:
            raise InputError(f"{where}: format {fields['format']}, but this version reads format {FORMAT_VERSION}")
        fields["parts"] = {part: PartStatistics(**statistics) for part, statistics in fields["parts"].items()}
        fields["shards"] = [ShardInfo(**shard) for shard in fields["shards"]]
        manifest = ShardManifest(**fields)
        for found in (*manifest.parts.values(), *manifest.shards, manifest):
            _check_types(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: not a shard manifest ({error}); build the shard set again") from error
    for kind, names in (("topics", manifest.topics), ("classes", manifest.classes)):
        if len(set(names)) != len(names) or not all(names):
            raise InputError(f"{where}: {kind}: {', '.join(names)}: each must be there once and not be empty")
    _check_shards(manifest, where)
    for part, statistics in manifest.parts.items():
        for name in ("image_mean", "image_std"):
            values = getattr(statistics, name)
            if len(values) != 3 or not all(0 <= value <= 1 for value in values):  # NaN is not
                raise InputError(f"{where}: part '{part}': '{name}' must be three numbers from 0 to 1")
        listed = sum(shard.samples for shard in manifest.shards if shard.part == part)
        if listed != statistics.samples:
            raise InputError(
                f"{where}: part '{part}' has {statistics.samples} samples, but its shards {listed}: one is missing "
                "from the list, or its count is wrong; copy the manifest again"
            )
    return manifest


def _check_shards(manifest: ShardManifest, where: str) -> None:
    """Check each shard's name, checksum and part.

    Raises:
        InputError: the first that cannot be right.
    """
    names: set[str] = set()
    name_of: dict[str, str] = {}
    for shard in manifest.shards:
        plain = Path(shard.file).name == shard.file and shard.file.isprintable()
        if not plain or shard.file in ("", ".", ".."):
            raise InputError(f"{where}: shard '{shard.file}' is not a plain file name inside the folder")
        if shard.file in names:
            raise InputError(f"{where}: shard '{shard.file}' is listed twice")
        names.add(shard.file)
        if not _SHA256.fullmatch(shard.sha256):  # a cache names files after it
            raise InputError(f"{where}: shard '{shard.file}': sha256 must be 64 hexadecimal digits in lower case")
        if shard.sha256 in name_of:
            raise InputError(
                f"{where}: the same shard appears twice, as '{name_of[shard.sha256]}' and as '{shard.file}': their "
                "checksums are equal; build the shard set again"
            )
        name_of[shard.sha256] = shard.file
        # Some leeway: a few samples without content are damage of a shard, which reading finds and may leave out.
        if shard.samples * MIN_SAMPLE_BYTES > shard.bytes + 5 * MIN_SAMPLE_BYTES:
            raise InputError(
                f"{where}: shard '{shard.file}' cannot have {shard.samples:,} samples in {shard.bytes:,} bytes: each "
                f"takes {MIN_SAMPLE_BYTES:,} or more; copy the manifest again"
            )
        if shard.part not in manifest.parts:
            raise InputError(
                f"{where}: shard '{shard.file}' is of part '{shard.part}', which the manifest lacks; "
                f"{nearest(shard.part, manifest.parts)}"
            )
    if (samples := sum(shard.samples for shard in manifest.shards)) > MAX_SAMPLES:
        raise InputError(f"{where}: {samples:,} samples, more than the {MAX_SAMPLES:,} that a set may have")


def _loads(text: str) -> Any:
    """JSON of which everything can be written again.

    Raises:
        ValueError: not JSON, or half a character (a lone surrogate), which no page or file of predictions can hold.
        RecursionError: nested too deeply.
    """
    found = json.loads(text)
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


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
    with open(path, "rb") as file:
        return digest_of(file)


def digest_of(file: BinaryIO) -> str:
    """The SHA-256 of what is left of an open file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
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
        fields: dict[str, Any] = _loads(raw.decode("utf-8"))
        record = SampleRecord(**fields)
        well_formed = (
            isinstance(record.patient, str)
            and (record.label is None or isinstance(record.label, str))
            and isinstance(record.grades, dict)
            and _are_strings(record.grades.values())
            and isinstance(record.reports, list)
            and all(isinstance(report, dict) and _are_strings(report.values()) for report in record.reports)
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{where}: not a sample record ({error}); `python -m data_shards verify` checks a set"
        ) from error
    if not well_formed:
        raise InputError(f"{where}: not a sample record; patient, label, sentences and grades must be strings")
    return record


def _are_strings(values: Iterable[object]) -> bool:
    return set(map(type, values)) <= {str}  # what JSON is read as has no subclasses
