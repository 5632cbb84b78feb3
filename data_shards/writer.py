"""Samples to shards: `OUT/PART-000000.tar` and `OUT/manifest.json` (format: `mdnet_dist.shards`).

Everything that can be wrong with records is found before the first image is read. Images are then read one at a time.
The samples of a part are put in the order of a hash of their keys: no shard is all one class where the input is
sorted, and the same samples give the same bytes whatever order they come in.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

from PIL import Image
from tqdm import tqdm

from data_shards.aside import Aside
from data_shards.folds import deal_into_folds
from data_shards.statistics import StatisticsBuilder
from mdnet_dist.errors import InputError, nearest
from mdnet_dist.images import decode_image, decode_mask
from mdnet_dist.shards import PartStatistics, SampleRecord, ShardInfo, ShardManifest, sha256_of
from mdnet_dist.vocabulary import tokenize

SPLITS = ("train", "val", "test")
SAMPLES_PER_SHARD = 256
KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
MASK_NAME = re.compile(r"[a-z0-9_]{1,24}")  # lower case: WebDataset lowers extensions


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The picture files of a sample, as they are stored."""

    image: bytes  # JPEG or PNG, 8-bit RGB or L
    extension: str  # "jpg" or "png"
    mask: bytes | None = None  # PNG, 8-bit, 0 or 255, same size as the image: the informative region
    extra_masks: Mapping[str, bytes] = field(default_factory=dict)  # written as KEY.NAME_mask.png


@dataclass(frozen=True, kw_only=True)
class Sample(Pixels):
    """One image with all that is known of it."""

    key: str  # letters, digits, - and _ only
    split: str | None  # train, val, test; None: dealt into a fold with its patient
    record: SampleRecord


@dataclass(frozen=True, kw_only=True)
class PlannedSample:
    """A sample whose picture files are not read yet."""

    key: str
    split: str | None
    record: SampleRecord
    load: Callable[[], Pixels]
    where: str = ""  # file and line it came from, for messages; the key where nothing is given

    @property
    def place(self) -> str:
        """Where the sample came from, as messages name it."""
        return self.where or f"sample '{self.key}'"


def write_shards(
    samples: Iterable[Sample],
    out: Path,
    *,
    name: str,
    topics: Sequence[str],
    classes: Sequence[str] | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    total: int | None = None,
    folds: int = 0,
    force: bool = False,
) -> ShardManifest:
    """Write samples that arrive one at a time, such as a generator's; their pictures wait on disk, not in memory.

    Args:
        samples: read once.
        out: the set's folder; appears whole or not at all.
        name: what the set is, for people.
        topics: in the order in which a report says them.
        classes: in the order of the network's outputs; sorted labels where None.
        samples_per_shard: at most; the shards of a part differ by one sample at most.
        total: how many samples will come, for the progress bar.
        folds: how many folds the patients without a split are dealt into.
        force: replace a shard set that is already at `out`.

    Raises:
        InputError: as `write_planned`.
    """
    with Aside(out, force) as aside:
        spool_path = aside.folder / "spool"
        with open(spool_path, "w+b") as spool:
            plan = [_spool(sample, spool) for sample in tqdm(samples, total=total, desc="samples", disable=None)]
            manifest = _write(plan, aside.folder, name, topics, classes, samples_per_shard, folds)
        spool_path.unlink()
    return manifest


def write_planned(
    plan: Sequence[PlannedSample],
    out: Path,
    *,
    name: str,
    topics: Sequence[str],
    classes: Sequence[str] | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    folds: int = 0,
    force: bool = False,
) -> ShardManifest:
    """Write samples that can be read in any order, such as files. Arguments as for `write_shards`.

    Raises:
        InputError: a duplicate or illegal key, a topic nobody declared, an empty report or sentence, a label that is
            not a class, a patient in two splits, a sample without a split where there are no folds, an image or mask
            that does not decode, a mask of another size than its image, a folder that is not empty or not writable.
    """
    with Aside(out, force) as aside:
        return _write(plan, aside.folder, name, topics, classes, samples_per_shard, folds)


def check_plan(plan: Sequence[PlannedSample], topics: Sequence[str], classes: Sequence[str]) -> None:
    """Check all that can be wrong with a set before an image is read.

    Raises:
        InputError: the first thing found, with its sample.
    """
    if not plan:
        raise InputError("no samples: a shard set needs at least one")
    for kind, names in (("topics", topics), ("classes", classes)):
        if len(set(names)) != len(names) or not all(names):
            raise InputError(f"{kind}: {', '.join(names)}: each must be given once and not be empty")
    check_patients((sample.record.patient, sample.split, sample.place) for sample in plan)
    place_of_key: dict[str, str] = {}
    for sample in plan:
        record, place = sample.record, sample.place
        if not KEY.fullmatch(sample.key):
            raise InputError(f"{place}: key '{sample.key}' must be 1 to 64 letters, digits, '-' or '_'")
        if sample.key in place_of_key:
            raise InputError(f"{place}: duplicate key '{sample.key}', also at {place_of_key[sample.key]}")
        place_of_key[sample.key] = place
        if record.label is not None and record.label not in classes:
            raise InputError(f"{place}: label '{record.label}' is not a class; {nearest(record.label, classes)}")
        check_reports(record, place, topics)


def check_patients(samples: Iterable[tuple[str, str | None, str]]) -> None:
    """Check that each patient is in one split. A sample here is its patient, split and place.

    Raises:
        InputError: for the first sample that is elsewhere than its patient's first one.
    """
    first: dict[str, tuple[str | None, str]] = {}
    for patient, split, place in samples:
        first_split, first_place = first.setdefault(patient, (split, place))
        if first_split != split:
            raise InputError(
                f"{place}: patient '{patient}' is in {split}, but in {first_split} at {first_place}; "
                "a patient's images must share a split"
            )


def check_reports(record: SampleRecord, place: str, topics: Sequence[str]) -> None:
    """Check that a sample has reports, and each a sentence on declared topics; in a set without topics it has none.

    Raises:
        InputError: otherwise, naming `place`, the report and the topic.
    """
    if not record.reports and topics:
        raise InputError(f"{place}: no reports; a sample needs at least one")
    for number, report in enumerate(record.reports, start=1):
        if not report:
            raise InputError(f"{place}: report {number} is empty; it needs a sentence on at least one topic")
        for topic, sentence in report.items():
            if topic not in topics:
                raise InputError(f"{place}: topic '{topic}' is not declared; {nearest(topic, topics)}")
            if not tokenize(sentence):
                raise InputError(
                    f"{place}: report {number}: the sentence on '{topic}' is empty; leave the topic out instead"
                )


def _write(
    plan: Sequence[PlannedSample],
    folder: Path,
    name: str,
    topics: Sequence[str],
    classes: Sequence[str] | None,
    samples_per_shard: int,
    folds: int,
) -> ShardManifest:
    if samples_per_shard < 1:
        raise InputError(f"samples per shard: {samples_per_shard}, but it must be at least 1")
    if classes is None:
        classes = sorted({sample.record.label for sample in plan if sample.record.label is not None})
    check_plan(plan, topics, classes)
    parts = _parts(plan, folds)
    shards: list[ShardInfo] = []
    statistics: dict[str, PartStatistics] = {}
    with tqdm(total=len(plan), desc="shards", unit="image", disable=None) as progress:
        for part, samples in parts.items():
            builder = StatisticsBuilder()
            shard_count = -(-len(samples) // samples_per_shard)
            for number in range(shard_count):
                path = folder / f"{part}-{number:06d}.tar"
                chunk = samples[len(samples) * number // shard_count : len(samples) * (number + 1) // shard_count]
                _write_shard(path, chunk, topics, builder, progress)
                shards.append(
                    ShardInfo(
                        file=path.name,
                        part=part,
                        samples=len(chunk),
                        bytes=path.stat().st_size,
                        sha256=sha256_of(path),
                    )
                )
            statistics[part] = builder.result()
    training = [part for part in parts if part == "train" or part.startswith("fold")]
    manifest = ShardManifest(
        name=name,
        topics=list(topics),
        classes=list(classes),
        vocabulary=sorted({word for part in training for word in statistics[part].words}),
        parts=statistics,
        shards=shards,
    )
    manifest.write(folder)
    return manifest


def _parts(plan: Sequence[PlannedSample], folds: int) -> dict[str, list[PlannedSample]]:
    """{part: its samples, mixed}; parts in the order train, val, test, fold0, fold1..."""
    undealt = [sample for sample in plan if sample.split is None]
    if undealt and not folds:
        raise InputError(
            f"{undealt[0].place}: no split; give every sample one of {', '.join(SPLITS)}, or ask for folds"
        )
    if undealt and len(undealt) < len(plan):
        other = next(sample for sample in plan if sample.split is not None)
        raise InputError(
            f"{undealt[0].place}: no split, but {other.place} is in {other.split}; give every sample a split, or none"
        )
    names: list[str] = list(SPLITS)
    if undealt:
        images: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for sample in undealt:
            images[sample.record.patient][sample.record.label or ""] += 1
        fold_of = deal_into_folds(images, folds)
        names = [f"fold{number}" for number in range(folds)]
        plan = [replace(sample, split=f"fold{fold_of[sample.record.patient]}") for sample in undealt]
    parts: dict[str, list[PlannedSample]] = {part: [] for part in names}
    for sample in sorted(plan, key=lambda sample: hashlib.sha256(sample.key.encode()).digest()):
        if sample.split not in parts:
            raise InputError(f"{sample.place}: split '{sample.split}'; {nearest(str(sample.split), names)}")
        parts[sample.split].append(sample)
    return {part: samples for part, samples in parts.items() if samples}


def _write_shard(
    path: Path, samples: Sequence[PlannedSample], topics: Sequence[str], builder: StatisticsBuilder, progress: tqdm
) -> None:
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                pixels = sample.load()
                image = check_pixels(pixels, sample.place)
                builder.add(sample.record, image)
                _add_member(tar, f"{sample.key}.{pixels.extension}", pixels.image)
                _add_member(tar, f"{sample.key}.json", _record_bytes(sample.record, topics))
                if pixels.mask is not None:
                    _add_member(tar, f"{sample.key}.mask.png", pixels.mask)
                for mask_name, mask in sorted(pixels.extra_masks.items()):
                    _add_member(tar, f"{sample.key}.{mask_name}_mask.png", mask)
                progress.update()
        file.flush()
        os.fsync(file.fileno())


def check_pixels(pixels: Pixels, place: str) -> Image.Image:
    """Check the picture files of a sample against the format; gives the decoded RGB image.

    Raises:
        InputError: one does not decode, is of the wrong format, or a mask is of another size than the image.
    """
    image = decode_image(pixels.image, f"{place}: image")
    signature = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG"}.get(pixels.extension)
    if signature is None or not pixels.image.startswith(signature):
        raise InputError(f"{place}: the image is not the '{pixels.extension}' it is called; jpg and png are stored")
    masks = dict(pixels.extra_masks) if pixels.mask is None else {"": pixels.mask, **pixels.extra_masks}
    for name, raw in masks.items():
        if name and not MASK_NAME.fullmatch(name):
            raise InputError(f"{place}: mask name '{name}' must be 1 to 24 lower-case letters, digits or '_'")
        height, width = decode_mask(raw, f"{place}: mask").shape
        if (width, height) != image.size:
            raise InputError(
                f"{place}: the mask is {width} x {height} and its image {image.width} x {image.height} pixels; "
                "both must be the same size"
            )
    return image


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A fresh TarInfo has time, owner and group 0 and no names in it: the same samples give the same bytes.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))


def _record_bytes(record: SampleRecord, topics: Sequence[str]) -> bytes:
    fields = asdict(record)
    fields["reports"] = [{topic: report[topic] for topic in topics if topic in report} for report in record.reports]
    if not record.grades:
        del fields["grades"]
    return json.dumps(fields, ensure_ascii=False).encode("utf-8")


def _spool(sample: Sample, spool: IO[bytes]) -> PlannedSample:
    """Append the sample's pictures to the spool file; the plan reads them back."""
    spool.seek(0, os.SEEK_END)
    start = spool.tell()
    extra = sorted(sample.extra_masks.items())
    pieces = [sample.image, sample.mask or b"", *(raw for _, raw in extra)]
    lengths = [spool.write(piece) for piece in pieces]
    has_mask, extension = sample.mask is not None, sample.extension
    names = [mask_name for mask_name, _ in extra]

    def load() -> Pixels:
        spool.seek(start)
        image, mask, *extra_masks = [spool.read(length) for length in lengths]
        return Pixels(
            image=image,
            extension=extension,
            mask=mask if has_mask else None,
            extra_masks=dict(zip(names, extra_masks, strict=True)),
        )

    return PlannedSample(key=sample.key, split=sample.split, record=sample.record, load=load)
