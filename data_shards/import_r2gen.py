"""Import a set in the layout that R2Gen and its successors use for IU X-Ray and MIMIC-CXR.

    FOLDER/annotation.json   {"train": [{"id", "image_path": [paths], "report", "split"}, ...], "val": ..., "test": ...}
    FOLDER/images/           the image paths are relative to it, or to FOLDER where there is no such folder

The report is one topic, "findings"; there are no labels. The patient is `subject_id` where the item has one, the part
`CXRn` of an IU X-Ray id, or else the id itself; `--patient-regex` says how to read other ids.
"""

from __future__ import annotations

import json
from pathlib import Path

from data_shards.import_bcidr import make_patient_reader, read_json_object
from data_shards.importing import Entry, Source, clean_text
from mdnet_dist.errors import InputError, nearest

TOPIC = "findings"
PATIENT = r"(CXR\d+)_"
SPLITS = ("train", "val", "test")


def read_r2gen(path: Path, patient_regex: str | None = None, views: str = "first", *, nameless: bool = False) -> Source:
    """Read an annotation file, or the `annotation.json` of a folder.

    Args:
        path: file or folder.
        patient_regex: from an id to its patient; wins over `subject_id`.
        views: "first": one sample an item, with its first image; "each": one sample an image.
        nameless: messages show nothing that the file holds, and the file without its folders.

    Raises:
        InputError: no such file, or one that is not as above.
    """
    if path.is_dir():
        path = path / "annotation.json"
    patient_of = make_patient_reader(patient_regex or PATIENT)
    folder = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    shown = path.name if nameless else str(path)
    content = read_json_object(path, shown)
    for split in content:
        if split not in SPLITS:
            raise InputError(f"{shown}: part{'' if nameless else f' {split[:40]!r}'}; {nearest(split, SPLITS)}")
    entries: list[Entry] = []
    for split, items in content.items():
        if not isinstance(items, list):
            raise InputError(f"{shown}: '{split}' must be a list")
        for number, item in enumerate(items, start=1):
            where = f"{shown}: {split} item {number}"
            place = f"{path.name}: {split} item {number}"
            if not isinstance(item, dict):
                raise InputError(f"{where}: must be an object with id, image_path and report")
            identity = item.get("id")
            if isinstance(identity, int) and not isinstance(identity, bool):
                identity = str(identity)
            identity = clean_text(identity, "'id'", where)
            where = where if nameless else f"{where} ({identity})"
            if item.get("split", split) != split:
                said = "another" if nameless else f"{json.dumps(item['split']):.40}"
                raise InputError(f"{where}: is listed in '{split}' but says split {said}")
            paths = item.get("image_path")
            if not isinstance(paths, list) or not paths or not all(isinstance(image, str) and image for image in paths):
                raise InputError(f"{where}: 'image_path' must be a list of at least one path")
            subject = item.get("subject_id")
            patient = patient_of(identity) if subject is None or patient_regex else str(subject)
            report = clean_text(item.get("report"), "'report'", where)
            entries.extend(
                Entry(
                    image=image,
                    patient=clean_text(patient, "the patient", where),
                    split=split,
                    label=None,
                    reports=[{TOPIC: report}],
                    where=where,
                    place=place,
                )
                for image in (paths if views == "each" else paths[:1])
            )
    if not entries:
        raise InputError(f"{shown}: no samples")
    return Source(name=path.resolve().parent.name, root=folder, entries=entries, topics=[TOPIC])
