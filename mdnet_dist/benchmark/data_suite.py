"""The data suite: what reading, decoding, changing and batching cost, against decoding alone.

One core and one thread, in this process, over the same pictures: `Image.open` and an array of each is the limit, and
the whole way from shards to micro-batches is held against it: as in the first epoch, and as in later ones, which find
squares in memory (`data.decoded_cache_mib`). Changes to images (`augment`) and fitting are work that decoding alone
does not do; the ratio without the changes, and the share of each stage, say how much of it.
"""

from __future__ import annotations

import copy
import io
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from mdnet_dist.augment import augment, draw
from mdnet_dist.benchmark.rows import Row
from mdnet_dist.benchmark.step_suite import seconds_of_a_step
from mdnet_dist.benchmark.subject import Subject
from mdnet_dist.benchmark.timing import Spread, in_turn
from mdnet_dist.config import AugmentConfig
from mdnet_dist.data import Batch, Loader, TrainingStream
from mdnet_dist.images import decode_image, fit_picture
from mdnet_dist.reading import RawSample, read_shard

MOST_IMAGES = 1024
"""In one repetition: an epoch of a small set."""
STAGE_IMAGES = 256
"""In one repetition of a stage: their pixels are in memory."""
WAIT_SHARE = 0.02
"""Of a step that may pass until its data are there."""


def measure(subject: Subject) -> list[Row]:
    """The rows of a configuration."""
    step_seconds = seconds_of_a_step(subject)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = _speed(subject)
    finally:
        torch.set_num_threads(before)
    return [*rows, _handing_over(subject, step_seconds)]


def stream_of(
    subject: Subject, augmentation: AugmentConfig, steps: int, seed: int = 0, *, keeps: bool = True
) -> TrainingStream:
    """Batches as one rank without loader processes reads them. Args: keeps: decoded squares, as configured."""
    data, encoder = subject.data, copy.copy(subject.data.encoder)
    if not keeps:
        encoder.config = encoder.config.model_copy(update={"decoded_cache_mib": 0})
    return TrainingStream(
        encoder,
        augmentation,
        data.manifest,
        data.train,
        global_batch=subject.batch,
        micro_batch=subject.config.train.micro_batch,
        seed=seed,
        first_step=0,
        steps=steps,
        ranks=1,
        rank=0,
    )


def _speed(subject: Subject) -> list[Row]:
    config, encoder, batch = subject.config, subject.data.encoder, subject.batch
    steps = min(subject.data.steps_per_epoch, max(1, MOST_IMAGES // batch))
    images = steps * batch
    whole, later = (stream_of(subject, config.augment, steps, keeps=keeps) for keeps in (False, True))
    unchanged = stream_of(subject, AugmentConfig(), steps, keeps=False)
    samples: list[RawSample] = []
    read_samples, read_bytes = 0, 0
    for shard in whole.shards:
        samples += itertools.islice(read_shard(whole.source, shard), images - len(samples))
        read_samples, read_bytes = read_samples + shard.samples, read_bytes + shard.bytes
        if len(samples) == images:
            break
    shards = whole.shards[: whole.shards.index(shard) + 1]

    few = samples[: min(STAGE_IMAGES, images)]
    size, fit = encoder.config.image_size, encoder.config.fit
    decoded = [decode_image(sample.image, sample.where) for sample in few]
    squares = [fit_picture(picture, size, fit) for picture in decoded]
    room = encoder.room(batch)
    reports = [sample.record.reports[: encoder.config.reports_per_image] for sample in few]
    pieces = [slice(start, start + batch) for start in range(0, len(few), batch)]

    def change() -> None:
        for piece in pieces:
            rngs = [np.random.default_rng([0, 0, sample.number]) for sample in few[piece]]
            draws = [draw(config.augment, rng) for rng in rngs]
            augment(squares[piece], draws, config.augment, list(room))

    def collate() -> list[Batch]:
        return [encoder.collate(few[piece], room[: len(few[piece])], reports[piece]) for piece in pieces]

    times = in_turn(
        {
            "bare": lambda: [_bare(sample.image) for sample in samples],
            "whole": lambda: sum(len(one.keys) for one in whole),
            "later": lambda: sum(len(one.keys) for one in later),  # warm-up was its first epoch
            "unchanged": lambda: sum(len(one.keys) for one in unchanged),
            "read": lambda: sum(1 for shard in shards for _ in read_shard(whole.source, shard)),
            "decode": lambda: [len(decode_image(sample.image, sample.where).size) for sample in few],
            "fit": lambda: [len(fit_picture(picture, size, fit).size) for picture in decoded],
            "augment": change,
            "collate": collate,
        },
        torch.device("cpu"),
        warm_up=1,
        rounds=4 if subject.short else 15,
    )
    named = {"suite": "data", "config": subject.name}
    bare = f"bare decode of {images} pictures, one core"
    rows = [
        Row.of(
            times.ratio("bare", "whole"), **named, name="whole path by bare decode", unit="x", target=0.9, note=bare
        ),
        Row.of(times.ratio("bare", "later"), **named, name="the same, later epochs", unit="x", target=0.9),
        Row.of(times.ratio("bare", "unchanged"), **named, name="first epoch, images not changed", unit="x"),
        Row.of(images / times.of("bare"), **named, name="bare decode", unit="images/s"),
        Row.of(images / times.of("whole"), **named, name="whole path", unit="images/s"),
        Row.of(images / times.of("later"), **named, name="whole path, later epochs", unit="images/s"),
        Row.of(read_samples / times.of("read"), **named, name="shards read, records parsed", unit="images/s"),
        Row.of(read_bytes / 1e6 / times.of("read"), **named, name="the same", unit="MB/s"),
    ]
    for stage, count in (
        ("read", read_samples),
        *((name, len(few)) for name in ("decode", "fit", "augment", "collate")),
    ):
        pairs = zip(times.seconds[stage], times.seconds["whole"])
        share = Spread.of([(a / count) / (b / images) for a, b in pairs])
        rows.append(Row.of(share, **named, name=f"{stage}: share of the whole path", unit="", better="less"))
    return rows


def _bare(raw: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def _handing_over(subject: Subject, step_seconds: float) -> Row:
    """What the process that trains spends on a batch that a loader process has ready."""
    steps = 12 if subject.short else 40
    stream = stream_of(subject, subject.config.augment, steps + 3)
    with _batches(stream, subject.device.type == "cuda") as batches:
        for _ in range(3):
            next(batches)
        seconds = []
        for _ in range(steps):
            time.sleep(step_seconds)
            started = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - started)
    return Row.of(
        Spread.of([one / step_seconds for one in seconds]),
        suite="data",
        config=subject.name,
        name="fetching a batch by a step",
        unit="",
        target=WAIT_SHARE,
        better="less",
        note=f"1 worker; the step is a sleep as long as one, {step_seconds:.3f} s",
    )


@contextmanager
def _batches(stream: TrainingStream, pin_memory: bool) -> Iterator[Iterator[Batch]]:
    """The batches of a loader process, which ends with the block."""
    batches = iter(Loader(stream, workers=1, pin_memory=pin_memory))
    try:
        yield batches
    finally:
        batches.close()  # type: ignore[attr-defined]  # it is a generator
