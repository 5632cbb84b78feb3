"""A folder of images to a file of reports: `launch/predict.py`.

JSON lines, one an image: {"image", "predicted_label", "probabilities" {class: p}, "report" {topic: sentence}}; or CSV
with a column for each of these, for people who open it in a spreadsheet.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from tqdm import tqdm

from mdnet_dist.errors import InputError
from mdnet_dist.export import ModelCard
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.predict import Answer, Decoder, answer_files

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".dcm"}
DICOM_MAGIC = b"DICM"  # behind 128 bytes; DICOM files often have no suffix
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001
"""A spreadsheet takes a cell that begins so for a formula, and a formula can send the sheet away."""


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder and the folders below it, sorted by path; or the one file itself.

    What is hidden is left out, and so is what has another suffix (without one: what is no DICOM).

    Raises:
        InputError: no such folder, or no image in it.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one with images")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and _is_image(path)
    ]
    if not found:
        raise InputError(f"{folder}: no image in it; {', '.join(sorted(SUFFIXES))} and DICOM without a suffix are read")
    return found


def _is_image(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES:
        return not path.is_dir()  # a broken link is reported, not passed over
    if path.suffix or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == DICOM_MAGIC
    except OSError:
        return False


def predict_folder(
    network: MDNet,
    card: ModelCard,
    folder: Path,
    out: Path,
    decoder: Decoder,
    *,
    device: torch.device | str = "cpu",
    batch: int = 16,
    beam_width: int = 1,
) -> tuple[int, int]:
    """Write the network's report on every image of a folder.

    An image that cannot be read is named on stderr and left out. The file appears whole or not at all.

    Args:
        out: ends with .jsonl or .csv.

    Returns:
        how many images were reported on, how many were left out.

    Raises:
        InputError: no image, none that can be read, or the file cannot be written.
    """
    paths = find_images(folder)
    root = folder if folder.is_dir() else folder.parent
    told = skipped = 0
    with _whole_or_not(out) as file, tqdm(total=len(paths), unit="image", disable=None) as bar:
        write_row = _csv_rows(file, card) if out.suffix.lower() == ".csv" else _json_rows(file)
        answers = answer_files(
            network, card, paths, inside(root, decoder), device=device, batch=batch, beam_width=beam_width
        )
        for path, _, answer in answers:
            bar.update(1)
            if isinstance(answer, InputError):
                skipped += 1
                tqdm.write(f"skipped: {answer}", file=sys.stderr)
            else:
                told += 1
                write_row(_printable(path.relative_to(root)), answer)
        if not told:
            raise InputError(f"{folder}: none of its {len(paths)} image files can be read; the lines above say why")
    return told, skipped


def inside(root: Path, decoder: Decoder) -> Decoder:
    """A decoder that refuses links out of a folder, and what is no file: on a pipe one would wait for ever."""

    def decode_inside(path: Path) -> Image.Image:
        if not path.resolve().is_relative_to(root.resolve()):
            raise InputError(f"{path}: a link that leaves the folder")
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        return decoder(path)

    return decode_inside


def check_out(out: Path) -> None:
    """Raises: InputError: another suffix than .jsonl or .csv, or a folder."""
    if out.suffix.lower() not in (".jsonl", ".csv"):
        raise InputError(f"--out {out}: must end with .jsonl or .csv")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file")


@contextmanager
def _whole_or_not(out: Path) -> Iterator[TextIO]:
    """A file beside `out` that takes its name when all went well."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        if aside.exists():
            aside.unlink()


def _json_rows(file: TextIO) -> Any:
    def write(image: str, answer: Answer) -> None:
        file.write(json.dumps({"image": image, **answer.as_line()}, ensure_ascii=False) + "\n")

    return write


def _csv_rows(file: TextIO, card: ModelCard) -> Any:
    writer = csv.writer(file)
    classes, topics = [f"p({name})" for name in card.classes], [f"report: {topic}" for topic in card.topics]
    writer.writerow([guarded(cell) for cell in ("image", "predicted_label", *classes, *topics)])

    def write(image: str, answer: Answer) -> None:
        probabilities = [f"{answer.probabilities[name]:.6f}" for name in card.classes]
        sentences = [guarded(answer.report.get(topic, "")) for topic in card.topics]
        writer.writerow([guarded(image), guarded(answer.predicted_label or ""), *probabilities, *sentences])

    return write


def guarded(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe goes before what looks like one."""
    return f"'{cell}" if cell.lstrip(" ").startswith(FORMULA_STARTS) else cell


def _printable(path: Path) -> str:
    """A path as text; bytes of a name that are not UTF-8 are spelt out."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")
