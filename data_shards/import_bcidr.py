"""Import a set in the layout of BCIDR, the bladder cancer set of the MDNet paper.

    FOLDER/{train,val,test}_annotation.json   {NAME: {"caption": [5 strings], "label": 0..3}}
    FOLDER/Images/NAME.png

A caption is six sentences joined by ". ", in the order of `TOPICS`. A sentence other than the conclusion that says
"insufficient information" stands for a topic the reader could not judge: the topic is missing from that report.

NAME tells the patient: `H4_08_4` is of patient H4, `116974_009` of 116974, `1_00143_sub0_042` of 1_00143. A name of
another form counts as a patient of its own; `--patient-regex` says how to read others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.importing import Entry, Source, clean_text
from mdnet_dist.errors import InputError
from mdnet_dist.shards import CONCLUSION, Report

TOPICS = ["pleomorphism", "crowding", "polarity", "mitosis", "nucleoli", CONCLUSION]
CLASSES = ["normal", "low grade", "high grade", "insufficient information"]
NOT_JUDGED = "insufficient information"
PATIENT = r"(\d+_\d+(?=_sub\d)|[A-Za-z]*\d+)_"

# A full stop between digits is a decimal point.
_SENTENCE_END = re.compile(r"\.(?!\d)\s*")


def read_bcidr(folder: Path, patient_regex: str | None = None, *, nameless: bool = False) -> Source:
    """Read the annotation files of a folder.

    Args:
        folder: with these files.
        patient_regex: from an image's name to its patient.
        nameless: messages show no name, and files without their folders.

    Raises:
        InputError: no annotation file, or one that is not as above.
    """
    patient_of = make_patient_reader(patient_regex or PATIENT)
    entries: list[Entry] = []
    for split in ("train", "val", "test"):
        path = folder / f"{split}_annotation.json"
        if not path.exists():
            continue
        annotations = read_json_object(path, path.name if nameless else None)
        for number, (name, annotation) in enumerate(annotations.items(), start=1):
            place = f"{path.name}: item {number}"
            where = place if nameless else f"{path}: '{name:.80}'"
            if not isinstance(annotation, dict):
                raise InputError(f'{where}: must be {{"caption": [...], "label": 0..3}}')
            label = annotation.get("label")
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(CLASSES):
                raise InputError(f"{where}: label {json.dumps(label):.40} is not 0, 1, 2 or 3 ({', '.join(CLASSES)})")
            captions = annotation.get("caption")
            if not isinstance(captions, list) or not captions:
                raise InputError(f"{where}: 'caption' must be a list of at least one string")
            entries.append(
                Entry(
                    image=f"Images/{name}.png",
                    patient=patient_of(clean_text(name, "the name", where)),
                    split=split,
                    label=CLASSES[label],
                    reports=[
                        parse_caption(caption, f"{where}: caption {count}")
                        for count, caption in enumerate(captions, start=1)
                    ],
                    where=where,
                    place=place,
                )
            )
    if not entries:
        shown = "the folder" if nameless else folder
        raise InputError(f"{shown}: no samples in train_annotation.json, val_annotation.json or test_annotation.json")
    return Source(name=folder.resolve().name, root=folder, entries=entries, topics=TOPICS, classes=CLASSES)


def parse_caption(caption: Any, where: str) -> Report:
    """Split a caption into its six sentences.

    Raises:
        InputError: not a string of six sentences.
    """
    sentences = _SENTENCE_END.split(clean_text(caption, "the caption", where).rstrip(". "))
    if len(sentences) != len(TOPICS) or not all(sentence.strip() for sentence in sentences):
        raise InputError(
            f"{where}: {len(sentences)} sentences, but there must be {len(TOPICS)} joined by '. ': {', '.join(TOPICS)}"
        )
    return {
        topic: sentence.strip()
        for topic, sentence in zip(TOPICS, sentences, strict=True)
        if topic == CONCLUSION or NOT_JUDGED not in sentence.lower()
    }


def make_patient_reader(pattern: str) -> Callable[[str], str]:
    """A function from an image's name to its patient: the first group of `pattern`, matched at the name's start, or
    the whole match where it has no group; the name itself where it does not match.

    Raises:
        InputError: not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--patient-regex '{pattern}': not a regular expression ({error})") from error

    def patient_of(name: str) -> str:
        found = compiled.match(name)
        return (found[1] if compiled.groups else found[0]) or name if found else name

    return patient_of


def read_json_object(path: Path, shown: str | None = None) -> dict[str, Any]:
    """Read a JSON file whose top level is an object. Args: shown: the file in messages, instead of its path.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    where = shown or str(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: must be a JSON object, not {type(content).__name__}")
    return content
