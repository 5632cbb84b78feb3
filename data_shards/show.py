"""A picture of a shard set: some of its images, each with its label and first report."""

from __future__ import annotations

import io
import random
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data_shards.verify import pixels_of, read_shard
from data_shards.writer import check_reports
from mdnet_dist.errors import InputError
from mdnet_dist.images import decode_image, decode_mask
from mdnet_dist.shards import Report, SampleRecord, load_manifest, parse_record, write_atomically

CELL_INCHES = 3.0
LINE_INCHES = 0.15
LETTERS_A_LINE = 48
MAX_LINES = 16
COLUMNS = 4
GAP_INCHES = 0.2
TITLE_INCHES = 0.45
DOTS_PER_INCH = 140
MOST_DOTS = 60_000  # of a side: matplotlib draws no more than 65,536
OUTLINE_COLOUR = "#56B4E9"  # Okabe-Ito sky blue: far from the pinks and purples of a stain


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One cell of the picture."""

    key: str
    record: SampleRecord
    image: Image.Image
    mask: np.ndarray | None  # (height, width), bool


def show_set(
    folder: Path, out: Path, part: str | None = None, count: int = 12, seed: int = 0, masks: bool = False
) -> int:
    """Draw `count` random samples of a part (the first part where None) into the PNG file `out`.

    Args:
        masks: outline the mask of the informative region.

    Returns:
        How many samples were drawn: fewer than `count` where the part has fewer.

    Raises:
        InputError: no such set or part, a shard that cannot be read, or a picture that cannot be written.
    """
    manifest = load_manifest(folder)
    if count < 1:
        raise InputError(f"--count {count}: must be at least 1")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the picture is a PNG; its name must end with .png")
    part = part or next(iter(manifest.parts), "train")
    shards = manifest.shards_of([part])
    total = sum(shard.samples for shard in shards)
    if total < 1:
        raise InputError(f"{folder}: part '{part}' has no samples")
    chosen = sorted(random.Random(seed).sample(range(min(total, 1 << 62)), min(count, total)))
    shown, start = [], 0
    for shard in shards:
        numbers = {number - start for number in chosen if start <= number < start + shard.samples}
        if numbers:
            shown += _read(folder / shard.file, numbers, manifest.topics)
        start += shard.samples
    if len(shown) < len(chosen):
        raise InputError(f"{folder}: fewer samples than the manifest says; `python -m data_shards verify` finds where")
    picture = draw_grid(shown, manifest.topics, f"{manifest.name}, {part}", masks)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, picture)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    return len(shown)


def draw_grid(shown: Sequence[Shown], topics: Sequence[str], title: str, masks: bool) -> bytes:
    """The picture as a PNG file: a grid, and under each image its report."""
    columns = min(COLUMNS, len(shown))
    cells = [(sample, report_lines(sample.record.reports[0], topics) if topics else []) for sample in shown]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    row_inches = [
        max(_image_inches(sample.image)[1] + LINE_INCHES * len(lines) for sample, lines in row) + 0.55 for row in rows
    ]
    width, height = columns * (CELL_INCHES + GAP_INCHES) + GAP_INCHES, sum(row_inches) + TITLE_INCHES
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    _text(figure, GAP_INCHES, height - 0.3, title, fontsize=13, weight="bold")
    top = height - TITLE_INCHES
    for row, inches in zip(rows, row_inches, strict=True):
        for column, (sample, lines) in enumerate(row):
            _draw_cell(figure, GAP_INCHES + column * (CELL_INCHES + GAP_INCHES), top, sample, lines, masks)
        top -= inches
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; matplotlib says so once a letter.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(buffer, format="png", dpi=min(DOTS_PER_INCH, MOST_DOTS / height))
    return buffer.getvalue()


def _draw_cell(figure: Figure, left: float, top: float, sample: Shown, lines: Sequence[str], masks: bool) -> None:
    """One sample with its upper left corner at (left, top), inches from the lower left corner of the picture."""
    width, height = figure.get_size_inches()
    label = sample.record.label or "no label"
    _text(figure, left, top - 0.28, textwrap.shorten(label, 34), fontsize=9.5, weight="bold")
    image_width, image_height = _image_inches(sample.image)
    bottom = top - 0.35 - image_height
    axes = figure.add_axes((left / width, bottom / height, image_width / width, image_height / height))
    axes.set_axis_off()
    axes.imshow(sample.image, aspect="auto")
    if masks and sample.mask is not None and sample.mask.any() and not sample.mask.all():
        axes.contour(sample.mask, levels=[0.5], colors=[OUTLINE_COLOUR], linewidths=1.1)
    _text(figure, left, bottom - 0.06, "\n".join(lines), fontsize=7.5, linespacing=1.3, va="top", color="#222222")


def _text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches()
    # parse_math: what people wrote is text, whatever dollar signs it has.
    figure.text(x / width, y / height, text, parse_math=False, **style)


def _image_inches(image: Image.Image) -> tuple[float, float]:
    scale = CELL_INCHES / max(image.size)
    return image.width * scale, image.height * scale


def report_lines(report: Report, topics: Sequence[str]) -> list[str]:
    """A report as lines that fit under an image; the topic stands before its sentence where there are several."""
    lines: list[str] = []
    for topic in topics:
        if topic in report:
            sentence = report[topic] if len(topics) == 1 else f"{topic}: {report[topic]}"
            lines += textwrap.wrap(sentence, LETTERS_A_LINE, subsequent_indent="" if len(topics) == 1 else "   ")
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."]


def _read(path: Path, numbers: set[int], topics: Sequence[str]) -> list[Shown]:
    shown = []
    for number, (key, members) in enumerate(read_shard(path)):
        if number in numbers:
            place = f"{path}: sample '{key}'"
            pixels = pixels_of(members, place)
            if "json" not in members:
                raise InputError(f"{place}: no record; a sample has a .json")
            record = parse_record(members["json"], place)
            check_reports(record, place, topics)
            shown.append(
                Shown(
                    key=key,
                    record=record,
                    image=decode_image(pixels.image, place),
                    mask=None if pixels.mask is None else decode_mask(pixels.mask, place),
                )
            )
    return shown
