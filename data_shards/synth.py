"""The synthetic bladder set: patients, their images and reports, in as many images as one asks for.

Every patient has a tumour (or none) and slides of one stain and focus. Every image draws its grades from what is
usual in such a tumour, now and then in a neighbouring one; its field is drawn, and its reports are written, from the
grades. The conclusion follows from the grades by the rule in `synth_reports`.

Deterministic: each random draw has a generator of its own, seeded by what it is for, so that neither the number of
processes nor the order of the work changes a byte.
"""

from __future__ import annotations

import io
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from PIL import Image

from data_shards.folds import split_off_validation
from data_shards.synth_nuclei import Bools
from data_shards.synth_reports import (
    CLASSES,
    GRADES,
    HIGH_GRADE,
    INSUFFICIENT,
    LOW_GRADE,
    NORMAL,
    TOPICS,
    conclusion,
    write_reports,
)
from data_shards.synth_tissue import draw_field, draw_style
from data_shards.writer import Sample
from mdnet_dist.errors import InputError
from mdnet_dist.shards import CONCLUSION, Report, SampleRecord

__all__ = ["CLASSES", "TOPICS", "synthesize"]

SMALLEST_SIZE_PX, LARGEST_SIZE_PX = 64, 1024
LARGEST_SEED = 2**32 - 1
TEST_SHARE, VAL_SHARE = 0.2, 0.1  # of the images
JPEG_QUALITY = 92
IMAGES_PER_JOB = 16  # of a worker process

PATIENT_SHARES = {NORMAL: 0.20, LOW_GRADE: 0.35, HIGH_GRADE: 0.45}
"""Share of the patients by what is usual in their tissue, from the least to the most atypical."""
NEIGHBOUR_SHARE = 0.25
"""How often an image looks like the tissue one step less or more atypical than the patient's."""
INSUFFICIENT_SHARE = 0.09
"""How often an image cannot be judged; 0.08 on real slides."""

GRADE_SHARES: dict[str, dict[str, tuple[int, ...]]] = {
    NORMAL: {
        "pleomorphism": (85, 15, 0, 0),
        "crowding": (85, 15, 0, 0),
        "polarity": (93, 7, 0),
        "mitosis": (100, 0, 0),
        "nucleoli": (96, 4),
    },
    LOW_GRADE: {
        "pleomorphism": (0, 75, 25, 0),
        "crowding": (10, 55, 35, 0),
        "polarity": (30, 65, 5),
        "mitosis": (75, 25, 0),
        "nucleoli": (92, 8),
    },
    HIGH_GRADE: {
        "pleomorphism": (0, 10, 50, 40),
        "crowding": (0, 20, 45, 35),
        "polarity": (0, 30, 70),
        "mitosis": (15, 35, 50),
        "nucleoli": (25, 75),
    },
}
"""{usual tissue: {topic: per cent of the images with each grade}}; the grades in the order of `GRADES`."""

# What a random generator is for; part of its seed.
_TISSUE, _STYLE, _GRADES, _FIELD, _REPORTS = range(5)


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """One image before it is drawn."""

    seed: int
    patient: int
    index: int  # among the patient's images
    size_px: int
    grades: dict[str, str]
    split: str | None

    def reports(self) -> list[Report]:
        """What the readers write of it."""
        return write_reports(self.grades, _rng(self.seed, _REPORTS, self.patient, self.index))


def synthesize(
    images: int, patients: int, size_px: int, seed: int, folds: bool, processes: int | None = None
) -> Iterator[Sample]:
    """Draw the set. The same arguments give the same bytes, with the same versions of numpy and Pillow.

    Args:
        images: how many, dealt evenly to the patients.
        patients: how many.
        size_px: side of the square images; nuclei are about 10 px wide at 128 px.
        seed: 0 to 2**32 - 1.
        folds: leave `Sample.split` None, for cross-validation; otherwise patients go to train, val and test so that
            about 70, 10 and 20 per cent of the images of each class are there.
        processes: how many draw; None for one on each core. With more than one, the calling program's main module
            must be importable without side effects, as for any use of `multiprocessing`.

    Raises:
        InputError: an argument out of its range.
    """
    if patients < 1:
        raise InputError(f"patients: {patients}, but there must be at least 1")
    if not folds and patients < 3:
        raise InputError(
            f"patients: {patients}, but train, val and test need one each; give at least 3, or ask for folds"
        )
    if images < patients:
        raise InputError(f"images: {images}, but {patients} patients need at least one image each")
    if not SMALLEST_SIZE_PX <= size_px <= LARGEST_SIZE_PX:
        raise InputError(f"size: {size_px} px, but it must be between {SMALLEST_SIZE_PX} and {LARGEST_SIZE_PX}")
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed: {seed}, but it must be between 0 and {LARGEST_SEED}")
    if processes is not None and processes < 1:
        raise InputError(f"processes: {processes}, but there must be at least 1")
    plans = plan_images(images, patients, size_px, seed, folds)
    jobs = [plans[start : start + IMAGES_PER_JOB] for start in range(0, images, IMAGES_PER_JOB)]
    workers = min(processes or os.cpu_count() or 1, len(jobs))
    return _draw_here(jobs) if workers == 1 else _draw_in_pool(jobs, workers)


def draw_grades(tissue: str, rng: np.random.Generator) -> dict[str, str]:
    """The true grades of an image: {topic: grade}, with the conclusion; only that where nothing can be judged.

    Args:
        tissue: what is usual in the patient.
        rng: source of all randomness.
    """
    if rng.random() < INSUFFICIENT_SHARE:
        return {CONCLUSION: INSUFFICIENT}
    if rng.random() < NEIGHBOUR_SHARE:
        kinds = list(GRADE_SHARES)
        here = kinds.index(tissue)
        tissue = str(rng.choice([kinds[near] for near in (here - 1, here + 1) if 0 <= near < len(kinds)]))
    grades = {
        topic: str(rng.choice(steps, p=np.array(GRADE_SHARES[tissue][topic]) / 100)) for topic, steps in GRADES.items()
    }
    return {**grades, CONCLUSION: conclusion(grades)}


def _rng(seed: int, purpose: int, patient: int = 0, index: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, patient, index])


def plan_images(images: int, patients: int, size_px: int, seed: int, folds: bool) -> list[ImagePlan]:
    """Every image with its grades and split; image i belongs to patient i mod patients."""
    # Dealt by quota, not drawn, so that few patients already have tissue of each kind.
    edges = np.cumsum(list(PATIENT_SHARES.values()))[:-1] * patients
    tissues = np.array(list(PATIENT_SHARES))[np.searchsorted(edges, np.arange(patients) + 0.5)]
    tissues = _rng(seed, _TISSUE).permutation(tissues)
    owners = [divmod(number, patients)[::-1] for number in range(images)]
    grades = [draw_grades(str(tissues[patient]), _rng(seed, _GRADES, patient, index)) for patient, index in owners]
    split: dict[str, str] = {}
    if not folds:
        counts: dict[str, Counter[str]] = {_name(patient): Counter() for patient in range(patients)}
        for (patient, _), true in zip(owners, grades):
            counts[_name(patient)][true[CONCLUSION]] += 1
        test = split_off_validation(counts, TEST_SHARE)
        rest = {patient: counts[patient] for patient in counts if patient not in test}
        val = split_off_validation(rest, VAL_SHARE / (1 - TEST_SHARE))
        split = {patient: "test" if patient in test else "val" if patient in val else "train" for patient in counts}
    return [
        ImagePlan(
            seed=seed, patient=patient, index=index, size_px=size_px, grades=true, split=split.get(_name(patient))
        )
        for (patient, index), true in zip(owners, grades)
    ]  # fmt: skip


def _name(patient: int) -> str:
    return f"p{patient + 1:03d}"


def _draw_here(jobs: Sequence[Sequence[ImagePlan]]) -> Iterator[Sample]:
    for job in jobs:
        for plan in job:
            yield _sample(plan)


def _draw_in_pool(jobs: Sequence[Sequence[ImagePlan]], workers: int) -> Iterator[Sample]:
    """The same samples in the same order; at most two jobs a worker are under way, however slow the reader is."""
    # Spawned, not forked: the caller may hold threads and locks.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
    try:
        under_way: deque[Future[list[Sample]]] = deque()
        for job in jobs:
            under_way.append(pool.submit(_samples, job))
            if len(under_way) > 2 * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; the parent alone ends the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _samples(job: Sequence[ImagePlan]) -> list[Sample]:
    return [_sample(plan) for plan in job]


def _sample(plan: ImagePlan) -> Sample:
    style = draw_style(_rng(plan.seed, _STYLE, plan.patient))
    field = draw_field(plan.grades, style, plan.size_px, _rng(plan.seed, _FIELD, plan.patient, plan.index))
    jpeg = io.BytesIO()
    Image.fromarray(field.image).save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return Sample(
        key=f"{_name(plan.patient)}-{plan.index + 1:04d}",
        split=plan.split,
        image=jpeg.getvalue(),
        extension="jpg",
        record=SampleRecord(
            patient=_name(plan.patient), label=plan.grades[CONCLUSION], reports=plan.reports(), grades=plan.grades
        ),
        mask=_png(field.urothelium),
        extra_masks={"mitosis": _png(field.mitoses)} if field.mitoses.any() else {},
    )


def _png(mask: Bools) -> bytes:
    png = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(png, "PNG")
    return png.getvalue()
