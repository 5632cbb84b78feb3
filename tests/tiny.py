"""A shard set of tiny random images with every irregularity that training must bear, and a network small enough for it.

Reports are ragged: an image has one to four, sentences differ in length, topics are missing, some images have no label,
some a mask. Images differ in size and shape. The same arguments give the same set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_shards.writer import Sample, write_shards
from mdnet_dist.config import RunConfig
from mdnet_dist.config_file import apply_override, check_config
from mdnet_dist.images import encode_jpeg, encode_mask, encode_png
from mdnet_dist.shards import CONCLUSION, Report, SampleRecord, ShardManifest

TOPICS = ["pleomorphism", "crowding", CONCLUSION]
CLASSES = ["high grade", "low grade", "normal"]
WORDS = ["nuclei", "large", "small", "uniform", "marked", "mild", "crowded", "ground-glass", "few", "severe"]


def tiny_set(
    folder: Path,
    *,
    train: int = 24,
    val: int = 6,
    test: int = 7,
    folds: int = 0,
    side_px: int = 32,
    samples_per_shard: int = 5,
    seed: int = 0,
) -> ShardManifest:
    """Write a shard set.

    Args:
        train, val, test: samples in each part; with `folds` all of them are dealt into folds instead.
        side_px: of the smaller images; the larger ones have up to 1.5 times as much.
    """
    rng = np.random.default_rng(seed)
    samples = [
        tiny_sample(rng, f"{split}_{number:03d}", None if folds else split, side_px)
        for split, count in (("train", train), ("val", val), ("test", test))
        for number in range(count)
    ]
    return write_shards(
        samples,
        folder,
        name="tiny",
        topics=TOPICS,
        classes=CLASSES,
        samples_per_shard=samples_per_shard,
        folds=folds,
    )


def tiny_sample(rng: np.random.Generator, key: str, split: str | None, side_px: int = 32) -> Sample:
    """A random image with random reports; every third sample has a mask, every fifth no label."""
    number = int(key[-3:])
    height, width = rng.integers(side_px, side_px * 3 // 2 + 1, size=2)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    png = number % 2 == 0
    label = None if number % 5 == 4 else CLASSES[number % len(CLASSES)]
    return Sample(
        key=key,
        split=split,
        # A patient has two images, which lie in the same part.
        record=SampleRecord(patient=f"{split}-{number // 2}", label=label, reports=_reports(rng, label)),
        image=encode_png(image) if png else encode_jpeg(image),
        extension="png" if png else "jpg",
        mask=encode_mask(rng.random((height, width)) < 0.5) if number % 3 == 0 else None,
    )


def _reports(rng: np.random.Generator, label: str | None) -> list[Report]:
    reports = []
    for _ in range(rng.integers(1, 5)):
        report = {topic: " ".join(rng.choice(WORDS, rng.integers(1, 9))) for topic in TOPICS if rng.random() < 0.7}
        if label and CONCLUSION in report:
            report[CONCLUSION] = f"{label} carcinoma"
        reports.append(report or {TOPICS[0]: "nuclei"})
    return reports


def tiny_config(shards: Path, runs: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A run on a tiny set that takes seconds.

    Args:
        shards: folder of the set.
        runs: folder for the run's folder and its MLflow store.
        overrides: {dotted key: value}, the value as it would be in YAML.
    """
    values: dict[str, Any] = {
        "name": "tiny",
        "runs_folder": str(runs),
        "data": {"shards": str(shards), "image_size": 32, "max_tokens": 6, "workers": 0},
        "model": {
            "image": {"stem_channels": 8, "stage_channels": [8, 8], "units_per_stage": [2, 1], "stage_strides": [1, 2]},
            "language": {"embedding": 8, "hidden": 12, "attention": 8},
        },
        "train": {"epochs": 1, "global_batch": 8, "micro_batch": 4, "log_every_steps": 1},
        "evaluate": {"batch": 4, "pictures": 0},
        "tracking": {"uri": f"sqlite:///{runs.absolute() / 'mlflow.db'}"},
    }
    for key, value in (overrides or {}).items():
        apply_override(values, f"{key}={json.dumps(value)}")
    return check_config(values, "tiny")
