"""Import a manifest: JSON lines beside the images (docs/design.md section 2), the format for people's own data.

    {"image": "images/a.png", "patient": "p01", "split": "train", "label": "high grade", "mask": "masks/a.png",
     "reports": [{"pleomorphism": "...", "conclusion": "..."}, ...]}

`split` (train, val, test), `label` and `mask` may be null or absent, and so may a topic of a report. Other fields, such
as a licence, are ignored and named in the summary; one that looks like a slip of the pen is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards.importing import Entry, Source, clean_text
from mdnet_dist.errors import InputError, nearest
from mdnet_dist.shards import Report

FIELDS = ("image", "patient", "split", "label", "reports", "mask")
REQUIRED = ("image", "patient", "reports")
SPLITS = ("train", "val", "test")
LONGEST_LINE = 1 << 20  # bytes


def read_manifest(path: Path, *, nameless: bool = False) -> Source:
    """Read a manifest file, or the `manifest.jsonl` of a folder.

    Args:
        nameless: messages show nothing that a line holds, and the file without its folders.

    Raises:
        InputError: no such file, or a line that is not as above; the message has its number.
    """
    if path.is_dir():
        path = path / "manifest.jsonl"
    entries: list[Entry] = []
    ignored: dict[str, None] = {}
    shown = path.name if nameless else str(path)
    for number, line in _lines(path, shown):
        entry, others = parse_line(line, f"{shown} line {number}", nameless=nameless)
        entry = replace(entry, place=f"{path.name} line {number}")
        entries.append(entry)
        ignored.update(dict.fromkeys(others))
    if not entries:
        raise InputError(f"{shown}: no samples; each line of a manifest is one image")
    return Source(name=path.resolve().parent.name, root=path.parent, entries=entries, ignored=list(ignored))


def parse_line(line: bytes, where: str, *, nameless: bool = False) -> tuple[Entry, list[str]]:
    """Read one line of a manifest.

    Args:
        nameless: messages show nothing that the line holds.

    Returns:
        The entry, and the names of fields that mean nothing here.

    Raises:
        InputError: not a JSON object, a required field missing, a field of the wrong type or misspelt.
    """
    try:
        fields = json.loads(line, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        reason = "or a name given twice" if nameless else f"({error})"
        raise InputError(f"{where}: not valid JSON {reason}") from (None if nameless else error)
    if not isinstance(fields, dict):
        raise InputError(f"{where}: must be a JSON object, not {type(fields).__name__}")
    others = [name for name in fields if name not in FIELDS]
    for name in others:
        meant = [
            known for known in FIELDS if known not in fields and edits(name, known) <= (2 if len(known) > 5 else 1)
        ]
        if meant:
            unknown = "an unknown field" if nameless else f"unknown field '{name}'"
            raise InputError(f"{where}: {unknown}; did you mean '{meant[0]}'?")
    for name in REQUIRED:
        if fields.get(name) is None:
            raise InputError(f"{where}: '{name}' is missing; an image needs {', '.join(REQUIRED)}")
    image = clean_path(fields["image"], "'image'", where)
    place, where = where, where if nameless else f"{where} ({image})"
    patient = fields["patient"]
    if isinstance(patient, int) and not isinstance(patient, bool):
        patient = str(patient)
    split, label, mask = fields.get("split"), fields.get("label"), fields.get("mask")
    if split is not None and split not in SPLITS:
        hint = nearest(split, SPLITS) if isinstance(split, str) else f"known: {', '.join(SPLITS)}"
        shown = "" if nameless else f" {json.dumps(split):.80}"
        raise InputError(f"{where}: split{shown}; {hint}")
    entry = Entry(
        image=image,
        patient=clean_text(patient, "'patient'", where),
        split=split,
        label=None if label is None else clean_text(label, "'label'", where),
        reports=parse_reports(fields["reports"], where, nameless=nameless),
        mask=None if mask is None else clean_path(mask, "'mask'", where),
        where=where,
        place=place,
    )
    return entry, others


def parse_reports(value: Any, where: str, *, nameless: bool = False) -> list[Report]:
    """Check a list of reports; a topic whose sentence is null is missing. Args: nameless: as for `parse_line`.

    Raises:
        InputError: not a list of objects of strings, an empty list, an empty report or sentence.
    """
    if not isinstance(value, list) or not all(isinstance(report, dict) for report in value):
        raise InputError(f"{where}: 'reports' must be a list of objects, {{topic: sentence}}")
    if not value:
        raise InputError(f"{where}: 'reports' is empty; an image needs at least one")
    reports = []
    for number, report in enumerate(value, start=1):
        said = {
            clean_text(topic, f"report {number}: a topic", where): clean_text(
                sentence, f"report {number}: the sentence on " + ("a topic" if nameless else f"'{topic:.40}'"), where
            )
            for topic, sentence in report.items()
            if sentence is not None
        }
        if not said:
            raise InputError(f"{where}: report {number} is empty; it needs a sentence on at least one topic")
        reports.append(said)
    return reports


def clean_path(value: Any, what: str, where: str) -> str:
    """A path of a source, as it is but for its type.

    Raises:
        InputError: not a string, or an empty one.
    """
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {what} must be the path of a file")
    return value


def edits(a: str, b: str) -> int:
    """The number of slips between two words: a letter left out, added, changed, or swapped with its neighbour."""
    if abs(len(a) - len(b)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        above = row
        row = [i]
        for j in range(1, len(b) + 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before = above
    return row[-1]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{repeated:.40}' is given twice")
    return dict(pairs)


def _lines(path: Path, shown: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise InputError(
                        f"{shown} line {number}: longer than {LONGEST_LINE:,} bytes; one image is one line"
                    )
                if line.strip():
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise InputError(f"{shown}: cannot be read ({error.strerror})") from error
