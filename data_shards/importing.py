"""What all importers share: from a list of entries (image file, patient, split, label, reports) to a shard set.

An importer reads its format into a `Source`; `import_source` gives keys, splits and pseudonyms, and writes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from data_shards.folds import split_off_validation
from data_shards.identifiers import refuse_identifiers
from data_shards.prepare import prepare_pixels
from data_shards.writer import SAMPLES_PER_SHARD, Pixels, PlannedSample, check_patients, write_planned
from mdnet_dist.errors import InputError
from mdnet_dist.shards import CONCLUSION, Report, SampleRecord, ShardManifest

DEFAULT_FOLDS = 5
DEFAULT_VAL_SHARE = 0.15
SALT_BYTES = 16  # a shorter salt could be guessed, and names with it
PSEUDONYMISED = "pseudonymised"
"""Name of a set whose keys and patients are: a folder may be called after a patient."""
LONGEST_KEY = 64
LONGEST_SENTENCE = 20_000  # characters


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image of a source."""

    image: str  # path relative to the source's root, as the source writes it
    patient: str
    split: str | None
    label: str | None
    reports: list[Report]
    where: str  # file and line or name, for messages
    place: str  # the same without a name, for messages on what is pseudonymised
    mask: str | None = None  # as `image`


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an importer found."""

    name: str
    root: Path  # no file outside this folder is read
    entries: list[Entry]
    topics: list[str] | None = None  # None: in the order of first appearance, the conclusion last
    classes: list[str] | None = None  # None: the labels, sorted
    ignored: list[str] = field(default_factory=list)  # fields that mean nothing here


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user may choose, whatever the format."""

    name: str | None = None  # of the set; where None the folder's, which with a salt is not told
    topics: list[str] | None = None
    classes: list[str] | None = None
    folds: int | None = None  # deal patients anew, whatever splits the source has
    val_share: float | None = None  # of the training images, set aside for validation where the source does not
    max_side_px: int | None = None
    samples_per_shard: int = SAMPLES_PER_SHARD
    salt: bytes | None = None  # keys and patients become salted hashes, and messages hold no name
    force: bool = False


def import_source(source: Source, out: Path, options: ImportOptions) -> tuple[ShardManifest, list[str]]:
    """Write a source as a shard set.

    Returns:
        The set's manifest, and lines for the user on what was decided.

    Raises:
        InputError: a path that leaves the source's folder, a missing or unreadable file, an image listed twice,
            contradicting options, and all that `write_planned` refuses.
    """
    notes = []
    nameless = options.salt is not None
    if source.ignored:
        notes.append(f"ignored fields: {len(source.ignored) if nameless else ', '.join(source.ignored)}")
    entries = [replace(entry, where=entry.place) for entry in source.entries] if nameless else source.entries
    files = [_files(entry, source.root, nameless) for entry in entries]
    _refuse_repeats(entries, files, nameless)
    keys = make_keys([entry.image for entry in entries])
    if options.salt is not None:
        topics, classes = options.topics or source.topics or (), options.classes or source.classes or ()
        refuse_identifiers(entries, options.name, topics, classes)
        keys = [pseudonym(options.salt, "key", entry.image) for entry in entries]
        entries = [replace(entry, patient=pseudonym(options.salt, "patient", entry.patient)) for entry in entries]
    entries, folds = _assign_splits(entries, options, notes)
    plan = [
        PlannedSample(
            key=key,
            split=entry.split,
            record=SampleRecord(patient=entry.patient, label=entry.label, reports=entry.reports),
            load=_loader(image, mask, entry.where, options.max_side_px, nameless),
            where=entry.where,
        )
        for key, entry, (image, mask) in zip(keys, entries, files, strict=True)
    ]
    manifest = write_planned(
        plan,
        out,
        name=options.name or (source.name if options.salt is None else PSEUDONYMISED),
        topics=options.topics or source.topics or topics_in_order(entries),
        classes=options.classes or source.classes,
        samples_per_shard=options.samples_per_shard,
        folds=folds,
        force=options.force,
    )
    return manifest, notes


def resolve_inside(root: Path, relative: str, where: str, *, nameless: bool = False) -> Path:
    """The file that a path inside a source means.

    Args:
        nameless: messages do not hold the path.

    Raises:
        InputError: the path is absolute, climbs out with "..", or leads out of `root` through a link; or there is no
            such file, or it is not a plain file.
    """
    path = PurePosixPath(relative)
    shown = "" if nameless else f" '{relative}'" if relative.isprintable() else f" {relative!a:.80}"
    if path.is_absolute() or ".." in path.parts or "\0" in relative:
        raise InputError(f"{where}: path{shown} must be relative and stay inside {_folder(root, nameless)}")
    try:
        found = (root / path).resolve()
        inside = found.is_relative_to(root.resolve())
        is_file = inside and found.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, a lone surrogate
        raise InputError(f"{where}: path{shown} cannot be read ({type(error).__name__})") from (
            None if nameless else error
        )
    if not inside:
        raise InputError(f"{where}: path{shown} leads out of {_folder(root, nameless)} through a link")
    if not is_file:
        raise InputError(f"{where}: no such file" + ("" if nameless else f": {root / path}"))
    return found


def clean_text(value: object, what: str, where: str) -> str:
    """A string of a source with its white space made single.

    Raises:
        InputError: not a string, empty, far too long, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} must be a string, not {type(value).__name__}")
    text = " ".join(value.split())
    if not text:
        raise InputError(f"{where}: {what} is empty")
    if len(text) > LONGEST_SENTENCE:
        raise InputError(f"{where}: {what} has {len(text):,} characters, more than the {LONGEST_SENTENCE:,} of a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {what} is not valid Unicode") from error
    return text


def make_keys(images: Sequence[str]) -> list[str]:
    """A key for each image path: the path without the folders that all share and without its extension, in letters,
    digits, '-' and '_'. Where two would be equal, or one too long, the end of it is a hash of the path.
    """
    paths = [PurePosixPath(image).with_suffix("") for image in images]
    shared = os.path.commonpath([path.parent for path in paths]) if paths else ""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "-", path.relative_to(shared).as_posix()).strip("-") for path in paths]
    times = Counter(plain)
    keys = []
    for key, image in zip(plain, images, strict=True):
        if times[key] > 1 or not 0 < len(key) <= LONGEST_KEY:
            digest = hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            key = f"{key[: LONGEST_KEY - 13]}-{digest}"
        keys.append(key)
    return keys


def pseudonym(salt: bytes, kind: str, name: str) -> str:
    """A name that only the holder of the salt can link to the true one: 24 digits of an HMAC-SHA256."""
    return hmac.new(salt, f"{kind}:{name}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:24]


def read_salt(path: Path) -> bytes:
    """The content of a salt file without white space around it.

    Raises:
        InputError: no such file, or fewer than 16 bytes.
    """
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"{path}: the salt cannot be read ({error.strerror})") from error
    if len(salt) < SALT_BYTES:
        raise InputError(
            f"{path}: a salt needs at least {SALT_BYTES} bytes; `head -c 32 /dev/urandom | base64` makes one"
        )
    return salt


def topics_in_order(entries: Sequence[Entry]) -> list[str]:
    """Topics in the order of first appearance; the conclusion last, as reports end with it."""
    seen = dict.fromkeys(topic for entry in entries for report in entry.reports for topic in report)
    return [topic for topic in seen if topic != CONCLUSION] + [topic for topic in seen if topic == CONCLUSION]


def _files(entry: Entry, root: Path, nameless: bool) -> tuple[Path, Path | None]:
    image = resolve_inside(root, entry.image, entry.where, nameless=nameless)
    if entry.mask is None:
        return image, None
    return image, resolve_inside(root, entry.mask, entry.where, nameless=nameless)


def _folder(root: Path, nameless: bool) -> str:
    return "the source's folder" if nameless else str(root)


def _loader(
    image: Path, mask: Path | None, where: str, max_side_px: int | None, nameless: bool
) -> Callable[[], Pixels]:
    return partial(prepare_pixels, image, mask, where, max_side_px, nameless=nameless)


def _refuse_repeats(entries: Sequence[Entry], files: Sequence[tuple[Path, Path | None]], nameless: bool) -> None:
    first: dict[Path, str] = {}
    for entry, (image, _) in zip(entries, files, strict=True):
        if image in first:
            raise InputError(
                f"{entry.where}: image{'' if nameless else f' {entry.image!r}'} is there twice, first at "
                f"{first[image]}; "
                "give all its reports in one place"
            )
        first[image] = entry.where


def _assign_splits(entries: list[Entry], options: ImportOptions, notes: list[str]) -> tuple[list[Entry], int]:
    """Entries with their final splits, and the number of folds that the others (split None) are dealt into."""
    given = {entry.split for entry in entries}
    if options.folds is not None or given == {None}:
        if options.val_share:
            raise InputError(
                f"--val-share {options.val_share} and {options.folds or DEFAULT_FOLDS} folds: "
                "with folds, training takes one of them to validate on"
            )
        if given != {None}:
            notes.append(f"the source's splits are set aside: patients are dealt into {options.folds} folds")
        return [replace(entry, split=None) for entry in entries], options.folds or DEFAULT_FOLDS
    if "val" in given and options.val_share:
        raise InputError(f"--val-share {options.val_share}: the source has a validation part of its own")
    # Before patients move, so that the message says what the source says.
    check_patients((entry.patient, entry.split, entry.where) for entry in entries)
    share = DEFAULT_VAL_SHARE if options.val_share is None else options.val_share
    if "val" in given or "train" not in given or share == 0:
        return entries, 0
    patients: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        if entry.split == "train":
            patients[entry.patient][entry.label or ""] += 1
    if len(patients) < 2:
        notes.append("no validation part: one training patient cannot be divided")
        return entries, 0
    moved = split_off_validation(patients, share)
    images = sum(sum(patients[patient].values()) for patient in moved)
    notes.append(f"the source has no validation part: {len(moved)} training patients ({images} images) became one")
    return [
        replace(entry, split="val") if entry.split == "train" and entry.patient in moved else entry for entry in entries
    ], 0
