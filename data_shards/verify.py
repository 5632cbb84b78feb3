"""Check a shard set against its manifest and its samples against the format, byte by byte and image by image."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from data_shards.statistics import StatisticsBuilder
from data_shards.writer import KEY, Pixels, check_pixels, check_reports
from mdnet_dist.errors import InputError
from mdnet_dist.plain_tar import MAX_MEMBER_BYTES, READING_FAILS, PlainTarInfo
from mdnet_dist.shards import (
    MANIFEST_NAME,
    PartStatistics,
    ShardInfo,
    ShardManifest,
    load_manifest,
    parse_record,
    sha256_of,
)

_MASK = re.compile(r"([a-z0-9_]{1,24})_mask\.png")
TOLERANCE = 2e-6  # of mean and deviation, which are written with six decimals


def verify_set(folder: Path) -> Iterator[str]:
    """Check everything, and give a line for each problem. Shows a progress bar.

    Raises:
        InputError: the manifest cannot be read.
    """
    manifest = load_manifest(folder)
    present = []
    for shard in manifest.shards:
        problem = _file_problem(folder, shard)
        if problem is None:
            present.append(shard)
        else:
            yield problem
    listed = {shard.file for shard in manifest.shards} | {MANIFEST_NAME}
    for path in sorted(folder.iterdir()):
        if path.name not in listed:
            yield f"{path}: is not in the manifest"
    complete = len(present) == len(manifest.shards)
    builders: dict[str, StatisticsBuilder] = {}
    place_of_key: dict[str, str] = {}
    part_of_patient: dict[str, str] = {}
    samples = sum(shard.samples for shard in present)
    with tqdm(total=samples, desc="verify", unit="image", disable=None) as progress:
        for shard in present:
            digest = sha256_of(folder / shard.file)
            if digest != shard.sha256:
                yield f"{folder / shard.file}: checksum {digest[:12]}..., but the manifest says {shard.sha256[:12]}..."
                complete = False
            builder = builders.setdefault(shard.part, StatisticsBuilder())
            count = 0
            try:
                for key, members in read_shard(folder / shard.file):
                    count += 1
                    progress.update()
                    place = f"{shard.file}: sample '{key}'"
                    try:
                        if key in place_of_key:
                            raise InputError(f"{place}: duplicate key, also in {place_of_key[key]}")
                        place_of_key[key] = shard.file
                        patient = _check_sample(key, members, place, manifest, builder)
                        part = part_of_patient.setdefault(patient, shard.part)
                        if part != shard.part:
                            raise InputError(f"{place}: patient '{patient}' is in {shard.part} and in {part}")
                    except InputError as error:
                        complete = False
                        yield f"{folder}: {error}"
            except InputError as error:
                complete = False
                yield str(error)
            else:
                if count != shard.samples:
                    complete = False
                    yield f"{folder / shard.file}: {count} samples, but the manifest says {shard.samples}"
    if complete:  # else the sums must differ, and would say so once more
        yield from _disagreements(folder, manifest, builders)


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard in their order: key and {extension: content}.

    Raises:
        InputError: not a plain file, or not a plain tar; a member that is no plain file of a known kind or too large;
            a key whose members are not side by side, or a member given twice.
    """
    if path.exists() and not path.is_file():  # to open a pipe or a device would wait for ever
        raise InputError(f"{path}: not a plain file; a shard is one")
    done: set[str] = set()
    key = ""
    members: dict[str, bytes] = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=PlainTarInfo) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                known = extension in ("jpg", "png", "json", "mask.png") or _MASK.fullmatch(extension)
                if not member.isreg() or not KEY.fullmatch(stem) or not known:
                    raise InputError(
                        f"{path}: member '{member.name:.120}' is none of KEY.jpg, KEY.png, KEY.json, KEY.mask.png"
                    )
                if member.size > MAX_MEMBER_BYTES:
                    raise InputError(f"{path}: member '{member.name}' has {member.size:,} bytes, too many")
                if stem != key:
                    if members:
                        yield key, members
                    done.add(key)
                    key, members = stem, {}
                    if key in done:
                        raise InputError(f"{path}: sample '{key}': duplicate key, or members that are not side by side")
                content = tar.extractfile(member)
                if content is None or extension in members:
                    raise InputError(f"{path}: sample '{key}': member '{extension}' is there twice")
                members[extension] = content.read()
        if members:
            yield key, members
    except READING_FAILS as error:
        raise InputError(f"{path}: behind sample '{key}': not a readable tar ({error})") from error


def pixels_of(members: dict[str, bytes], place: str) -> Pixels:
    """The picture files among a sample's members.

    Raises:
        InputError: no image, or two.
    """
    images = [extension for extension in ("jpg", "png") if extension in members]
    if len(images) != 1:
        raise InputError(f"{place}: {len(images)} images, but a sample has one, .jpg or .png")
    extra = {found[1]: raw for extension, raw in members.items() if (found := _MASK.fullmatch(extension))}
    return Pixels(image=members[images[0]], extension=images[0], mask=members.get("mask.png"), extra_masks=extra)


def _check_sample(
    key: str, members: dict[str, bytes], place: str, manifest: ShardManifest, builder: StatisticsBuilder
) -> str:
    """Check one sample, add it to the statistics, and give its patient."""
    if "json" not in members:
        raise InputError(f"{place}: no record; a sample has a .json")
    record = parse_record(members["json"], place)
    check_reports(record, place, manifest.topics)
    if record.label is not None and record.label not in manifest.classes:
        raise InputError(f"{place}: label '{record.label}' is not one of the classes {', '.join(manifest.classes)}")
    builder.add(record, check_pixels(pixels_of(members, place), place))
    return record.patient


def _file_problem(folder: Path, shard: ShardInfo) -> str | None:
    path = folder / shard.file
    if path.is_symlink() or not path.is_file():
        return f"{path}: no such file, but the manifest lists it"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"{path}: {size:,} bytes, but the manifest says {shard.bytes:,}"
    return None


def _disagreements(folder: Path, manifest: ShardManifest, builders: dict[str, StatisticsBuilder]) -> Iterator[str]:
    path = folder / MANIFEST_NAME
    words: set[str] = set()
    for part, said in manifest.parts.items():
        if part not in builders:
            yield f"{path}: part '{part}' has no shard"
            continue
        counted = builders[part].result()
        if part == "train" or part.startswith("fold"):
            words |= set(counted.words)
        for name in different_fields(said, counted):
            yield f"{path}: part '{part}': '{name}' does not agree with the samples; build the shard set again"
    if manifest.vocabulary != sorted(words):
        yield f"{path}: the vocabulary is not that of the training parts; build the shard set again"


def different_fields(said: PartStatistics, counted: PartStatistics) -> list[str]:
    """The names of the fields in which two statistics differ by more than rounding."""
    names = []
    for name, value in asdict(counted).items():
        other = getattr(said, name)
        if name in ("image_mean", "image_std"):
            close = len(other) == 3 and all(abs(a - b) <= TOLERANCE for a, b in zip(value, other))
            if not close:
                names.append(name)
        elif value != other:
            names.append(name)
    return names
