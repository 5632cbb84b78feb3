"""From shards to batches: the same batches for any number of ranks and workers, and damage is never passed over."""

from __future__ import annotations

import gc
import gzip
import json
import multiprocessing
import os
import pickle
import random
import tarfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.writer import Sample, write_shards
from mdnet_dist import data, reading
from mdnet_dist.config import AugmentConfig, DataConfig
from mdnet_dist.data import (
    Batch,
    Encoder,
    EvaluationStream,
    Loader,
    TrainingStream,
    parts_of,
)
from mdnet_dist.errors import InputError
from mdnet_dist.images import encode_png, fit_to_square
from mdnet_dist.model.mdnet import NO_LABEL
from mdnet_dist.plan import epoch_order, micro_batches, reading_horizon
from mdnet_dist.reading import Damaged, check_shards, read_in_order, read_shard, scan_shard
from mdnet_dist.shards import PartStatistics, SampleRecord, ShardInfo, ShardManifest, load_manifest, sha256_of
from mdnet_dist.storage import LocalSource, ShardSource
from mdnet_dist.vocabulary import END, PAD, UNKNOWN, Vocabulary
from tests.damage import agree, change, members_of, start_of, write_members
from tests.tiny import CLASSES, TOPICS, WORDS, tiny_set

# PyTorch advises against more workers than cores; how many this machine has must not decide what is tested.
pytestmark = [pytest.mark.filterwarnings("ignore:This DataLoader will create"), pytest.mark.timeout(120)]

ALL_CHANGES = AugmentConfig(mirror=True, quarter_turns=True, shift_px=3, stain=0.1, brightness=0.1)
NO_CHANGES = AugmentConfig()
GLOBAL_BATCH, STEPS = 6, 8  # of 26 samples: 4 steps an epoch, 2 samples left over


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the other tests of tiny tensors; loader processes are forked from a process without other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Set:
    """A shard set on disk."""

    folder: Path
    manifest: ShardManifest

    @property
    def source(self) -> LocalSource:
        return LocalSource(self.folder)

    def encoder(self, **config: Any) -> Encoder:
        return encoder_of(self.folder, self.manifest.vocabulary, **config)


def encoder_of(folder: Path, words: list[str], **config: Any) -> Encoder:
    fields = {"shards": str(folder), "image_size": 24, "max_tokens": 6, "shuffle_window": 8, "reports_per_image": 2}
    return Encoder(DataConfig(**{**fields, **config}), TOPICS, CLASSES, Vocabulary(words))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Set:
    folder = tmp_path_factory.mktemp("tiny") / "set"
    return Set(folder, tiny_set(folder, train=26))


@pytest.fixture
def damaged(tmp_path: Path) -> Set:
    """A set of two shards, to be damaged by a test."""
    folder = tmp_path / "set"
    return Set(folder, tiny_set(folder, train=10, val=0, test=0))


def training_stream(
    shards: Set,
    *,
    ranks: int = 1,
    rank: int = 0,
    first_step: int = 0,
    steps: int = STEPS,
    augmentation: AugmentConfig = ALL_CHANGES,
    micro_batch: int = 2,
    seed: int = 5,
    left_out: dict[str, str] | None = None,
    **config: Any,
) -> TrainingStream:
    return TrainingStream(
        shards.encoder(**config),
        augmentation,
        shards.manifest,
        ["train"],
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
        seed=seed,
        first_step=first_step,
        steps=steps,
        ranks=ranks,
        rank=rank,
        left_out=left_out,
    )


def samples_in(batch: Batch) -> list[tuple[Any, ...]]:
    """A batch sample by sample, without the padding that depends on its neighbours."""
    sentences = [
        [[topic[:length].tolist() for topic, length in zip(*report)] for report in zip(tokens, lengths)]
        for tokens, lengths in zip(batch.tokens, batch.lengths)
    ]
    return [
        (key, image.numpy().tobytes(), int(label), [report for report in said if any(report)], record, mask)
        for key, image, label, said, record, mask in zip(
            batch.keys, batch.images, batch.labels, sentences, batch.records, batch.masks, strict=True
        )
    ]


def global_batches(shards: Set, ranks: int, workers: int, first_step: int = 0, **arguments: Any) -> list[list[Any]]:
    """What all ranks read, put together step by step."""
    read: list[list[Any]] = []
    for rank in range(ranks):
        stream = training_stream(shards, ranks=ranks, rank=rank, first_step=first_step, **arguments)
        pieces = len(micro_batches(GLOBAL_BATCH, 2, ranks, rank))
        batches = [samples_in(batch) for batch in Loader(stream, workers)]
        assert len(batches) == pieces * (STEPS - first_step)
        for number, batch in enumerate(batches):
            if len(read) <= number // pieces:
                read.append([])
            read[number // pieces] += batch
    return read


@pytest.fixture(scope="module")
def expected(tiny: Set) -> list[list[Any]]:
    return global_batches(tiny, ranks=1, workers=0)


# --------------------------------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_global_batches_do_not_depend_on_ranks_and_workers(
    ranks: int, workers: int, tiny: Set, expected: list[list[Any]]
) -> None:
    assert global_batches(tiny, ranks, workers) == expected


@pytest.mark.parametrize("first_step", range(1, STEPS))
def test_any_first_step_goes_on_as_if_nothing_had_happened(
    first_step: int, tiny: Set, expected: list[list[Any]]
) -> None:
    ranks, workers = (1, 0) if first_step % 4 else (2, 1)
    assert global_batches(tiny, ranks, workers, first_step) == expected[first_step:]


def test_batches_follow_the_plan(tiny: Set, expected: list[list[Any]]) -> None:
    shards = tiny.manifest.shards_of(["train"])
    keys = [sample.key for shard in shards for sample in read_shard(tiny.source, shard)]
    assert len(set(keys)) == 26
    for epoch in (0, 1):
        order = epoch_order([shard.samples for shard in shards], seed=5, epoch=epoch, global_batch=6, window=8)
        read = [[sample[0] for sample in batch] for batch in expected[4 * epoch : 4 * epoch + 4]]
        assert read == [[keys[number] for number in batch] for batch in order]


@pytest.mark.parametrize(("mib", "most_kept"), [(0, 0), (1, 5), (6, 26)])
def test_kept_squares_are_decoded_once_and_change_nothing(
    mib: int, most_kept: int, tiny: Set, expected: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "BYTES_A_PIXEL", 364)  # 1 MiB has room for 5 squares of 24 px
    decode, asked = data.decode_image, Counter[str]()

    def counted(raw: bytes, where: str) -> Image.Image:
        asked[where] += 1
        return decode(raw, where)

    monkeypatch.setattr(data, "decode_image", counted)
    assert global_batches(tiny, ranks=1, workers=0, decoded_cache_mib=mib) == expected

    samples = [sample for shard in tiny.manifest.shards_of(["train"]) for sample in read_shard(tiny.source, shard)]
    times = Counter(sample[0] for batch in expected for sample in batch)
    assert max(times.values()) > 1, "more than one epoch"
    kept = list(times)[:most_kept]  # a Counter keeps the order in which it met them
    assert asked == {one.where: 1 if one.key in kept else times[one.key] for one in samples if times[one.key]}


def test_what_is_damaged_is_told_of_in_each_epoch(damaged: Set) -> None:
    shard = damaged.manifest.shards_of(["train"])[0]
    key = change(damaged.folder / shard.file, "jpg|png", b"no picture")
    agree(damaged.folder)
    shards = Set(damaged.folder, load_manifest(damaged.folder))
    batches = list(training_stream(shards, steps=6, damaged="skip", shuffle_window=1))  # one step of 6 in 10 samples
    told = [message for batch in batches for message in batch.damaged]
    assert len(told) > 1 and len(set(told)) == 1 and key in told[0]
    assert key not in {read for batch in batches for read in batch.keys}


def test_a_stream_gives_the_same_twice_and_another_seed_another(tiny: Set, expected: list[list[Any]]) -> None:
    stream = training_stream(tiny)
    assert [samples_in(batch) for batch in stream] == [samples_in(batch) for batch in stream]
    assert global_batches(tiny, 1, 0, seed=6) != expected


def test_no_step_is_left(tiny: Set) -> None:
    assert list(training_stream(tiny, first_step=STEPS)) == []


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 1), (3, 2), (5, 0)])
def test_evaluation_covers_each_sample_once_in_order(ranks: int, workers: int, tiny: Set) -> None:
    parts = ["val", "test"]
    encoder = tiny.encoder()
    streams = [
        EvaluationStream(encoder, tiny.manifest, parts, batch=3, ranks=ranks, rank=rank) for rank in range(ranks)
    ]
    read = [sample for stream in streams for batch in Loader(stream, workers) for sample in samples_in(batch)]
    stored = [raw for shard in tiny.manifest.shards_of(parts) for raw in read_shard(tiny.source, shard)]
    assert [sample[0] for sample in read] == [raw.key for raw in stored]
    assert len(read) == 13
    for (_, pixels, _, said, record, mask), raw in zip(read, stored):
        plain = encoder.image(raw.image, raw.where)
        assert pixels == np.ascontiguousarray(plain.transpose(2, 0, 1)).tobytes(), "not as it is stored"
        assert len(said) == len(raw.record.reports), "not all reports"
        assert (record, mask) == (raw.record, raw.mask)


def test_more_ranks_than_samples_to_evaluate(tiny: Set) -> None:
    streams = [
        EvaluationStream(tiny.encoder(), tiny.manifest, ["val"], batch=3, ranks=9, rank=rank) for rank in range(9)
    ]
    assert sorted(key for stream in streams for batch in stream for key in batch.keys) == sorted(
        raw.key for shard in tiny.manifest.shards_of(["val"]) for raw in read_shard(tiny.source, shard)
    )


def test_loader_processes_end_with_the_loader(tiny: Set) -> None:
    batches = iter(Loader(training_stream(tiny), workers=2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert no_process_is_left()


def no_process_is_left() -> bool:
    gc.collect()
    for _ in range(200):
        if not multiprocessing.active_children():
            return True
        time.sleep(0.05)
    return False


# --------------------------------------------------------------------------------------------------- what is in a batch


def one_set(folder: Path, records: list[SampleRecord], image: Image.Image | None = None) -> Set:
    """A set of one shard with these records."""
    pixels = encode_png(image or Image.new("RGB", (20, 20), (10, 20, 30)))
    samples = [
        Sample(key=f"k{number}", split="train", record=record, image=pixels, extension="png")
        for number, record in enumerate(records)
    ]
    return Set(folder, write_shards(samples, folder, name="one", topics=TOPICS, classes=CLASSES))


def only_batch(shards: Set, **config: Any) -> Batch:
    count = len(shards.manifest.shards_of(["train"])) and shards.manifest.parts["train"].samples
    (batch,) = EvaluationStream(shards.encoder(**config), shards.manifest, ["train"], batch=count, ranks=1, rank=0)
    return batch


def test_tokens_and_lengths(tmp_path: Path) -> None:
    """R, K and T are the most that the batch has; what an image lacks has length 0."""
    reports: list[list[dict[str, str]]] = [
        [{"crowding": "Few nuclei."}],
        [
            {"pleomorphism": "marked", "conclusion": "High grade!"},
            {"crowding": "nuclei, nuclei; few nuclei few nuclei few"},
        ],
    ]
    records = [SampleRecord(patient="p", label=label, reports=said) for label, said in zip(["normal", None], reports)]
    shards = one_set(tmp_path / "set", records)
    words = ["few", "grade", "marked", "nuclei"]  # "high" is unknown
    shards.manifest = replace(shards.manifest, vocabulary=words)
    batch = only_batch(shards)
    order = [batch.keys.index(key) for key in ("k0", "k1")]
    few, grade, marked, nuclei = 4, 5, 6, 7
    cut = [nuclei, nuclei, few, nuclei, few, nuclei]  # max_tokens 6: no END where a sentence was cut
    tokens: list[list[list[list[int]]]] = [
        [[[], [few, nuclei, END], []], [[], [], []]],
        [[[marked, END], [], [UNKNOWN, grade, END]], [[], cut, []]],
    ]
    padded = [[[(said + [PAD] * 6)[:6] for said in report] for report in image] for image in tokens]
    assert batch.tokens[order].tolist() == padded
    assert batch.lengths[order].tolist() == [[list(map(len, report)) for report in image] for image in tokens]
    assert batch.labels[order].tolist() == [CLASSES.index("normal"), NO_LABEL]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.images.dtype) == (torch.int64, torch.int64, torch.uint8)
    assert batch.images.shape == (2, 3, 24, 24)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images[0, :, 0, 0].tolist() == [10, 20, 30]
    assert only_batch(shards, max_tokens=7).lengths.max() == 7


def test_reports_are_drawn_without_repetition_and_alike_often(tmp_path: Path) -> None:
    reports = [{"crowding": word} for word in WORDS[:3]]
    shards = one_set(tmp_path / "set", [SampleRecord(patient="p", label=None, reports=reports)] * 6)
    drawn: Counter[tuple[int, ...]] = Counter()
    for batch in training_stream(shards, steps=100, micro_batch=6):
        assert batch.tokens.shape[1] == 2
        for said in batch.tokens[:, :, TOPICS.index("crowding"), 0].tolist():
            assert len(set(said)) == 2
            drawn[tuple(said)] += 1
    assert len(drawn) == 6, "some order of some pair never comes"
    assert min(drawn.values()) > 55  # of 600 / 6 = 100, deviation 9


def test_the_augmentation_of_a_sample_changes_from_epoch_to_epoch(expected: list[list[Any]]) -> None:
    looks: dict[str, set[bytes]] = {}
    for batch in expected:
        for sample in batch:
            looks.setdefault(sample[0], set()).add(sample[1])
    times = Counter(sample[0] for batch in expected for sample in batch)
    assert all(len(looks[key]) == count for key, count in times.items())


def test_a_report_may_have_no_word_of_any_topic_left(tmp_path: Path) -> None:
    """A set may declare fewer topics than its reports have; and a set without topics still makes batches."""
    shards = one_set(tmp_path / "set", [SampleRecord(patient="p", label=None, reports=[{"crowding": "few"}])])
    encoder = Encoder(shards.encoder().config, [], [], Vocabulary([]))
    (batch,) = EvaluationStream(encoder, shards.manifest, ["train"], batch=1, ranks=1, rank=0)
    assert batch.tokens.shape == (1, 1, 0, 1)
    assert batch.lengths.shape == (1, 1, 0)


def test_a_batch_survives_the_way_out_of_a_loader_process(tiny: Set) -> None:
    """Also one without images, and one of which a field is empty."""
    for batch in [*training_stream(tiny, steps=2), tiny.encoder().collate([], tiny.encoder().room(0), [], ["broken"])]:
        received = pickle.loads(pickle.dumps(batch))
        assert samples_in(received) == samples_in(batch)
        assert received.images.is_contiguous(memory_format=torch.channels_last) or not batch.keys
        for name in ("images", "labels", "tokens", "lengths"):
            ours, theirs = getattr(batch, name), getattr(received, name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        assert (received.keys, received.damaged) == (batch.keys, batch.damaged)


def test_a_batch_moves_to_a_device() -> None:
    tensors = {name: torch.zeros(1) for name in ("images", "labels", "tokens", "lengths")}
    batch = Batch(keys=["k"], records=[], masks=[None], **tensors)
    moved = batch.to(torch.device("meta"))
    assert {name: getattr(moved, name).device.type for name in tensors} == {
        "images": "meta", "labels": "meta", "tokens": "meta", "lengths": "cpu",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ square pictures


def stripes(width: int, height: int) -> Image.Image:
    """Red on the left, green in the middle, blue on the right: a third each."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for band, channel in enumerate((0, 1, 2)):
        pixels[:, band * width // 3 : (band + 1) * width // 3, channel] = 255
    return Image.fromarray(pixels)


def test_pad_keeps_the_whole_image_on_its_mean_colour() -> None:
    square = fit_to_square(stripes(30, 10), 30, "pad")
    assert square.shape == (30, 30, 3)
    assert np.array_equal(square[10:20], np.asarray(stripes(30, 10)))
    assert np.unique(square[np.r_[:10, 20:30]].reshape(-1, 3), axis=0).tolist() == [[85, 85, 85]]
    tall = fit_to_square(stripes(30, 10).transpose(Image.Transpose.ROTATE_90), 30, "pad")
    assert np.array_equal(np.rot90(square), tall)


def test_crop_keeps_the_centre() -> None:
    assert np.array_equal(fit_to_square(stripes(30, 10), 10, "crop"), np.asarray(stripes(30, 10))[:, 10:20])
    assert (fit_to_square(stripes(30, 10), 20, "crop")[:, 3:17] == [0, 255, 0]).all()


def test_stretch_keeps_all_and_changes_shapes() -> None:
    square = fit_to_square(stripes(30, 10), 30, "stretch")
    assert (square == np.asarray(stripes(30, 10))[0]).all()


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (1, 700), (700, 1), (17, 16)])
def test_any_shape_becomes_a_square(fit: str, size: tuple[int, int]) -> None:
    square = fit_to_square(Image.new("RGB", size, (1, 2, 3)), 16, fit)
    assert (square.shape, square.dtype) == ((16, 16, 3), np.uint8)
    assert (square == [1, 2, 3]).all()


def test_a_square_of_the_right_size_is_not_touched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for fit in ("pad", "crop", "stretch"):
        assert np.array_equal(fit_to_square(Image.fromarray(pixels), 16, fit), pixels)


# ------------------------------------------------------------------------------------------------------------- damage


def read_all(shards: Set, workers: int = 0) -> None:
    for _ in Loader(training_stream(shards, steps=1, micro_batch=6), workers):
        pass
    for _ in Loader(EvaluationStream(shards.encoder(), shards.manifest, ["train"], batch=4, ranks=1, rank=0), workers):
        pass


def record(**fields: Any) -> bytes:
    return json.dumps({"patient": "p", "label": None, "reports": [{"crowding": "few"}], **fields}).encode()


DAMAGE: dict[str, tuple[Callable[[Path], str], str]] = {
    "no image": (lambda path: change(path, "jpg|png", None), "an image is missing"),
    "no record": (lambda path: change(path, "json", None), "its .json is missing"),
    "image does not decode": (lambda path: change(path, "jpg|png", b"\xff\xd8\xff" + b"x" * 50), "the image does not"),
    "no image at all": (lambda path: change(path, "jpg|png", b"hello"), "not a JPEG, PNG, TIFF or WebP image"),
    "empty image": (lambda path: change(path, "jpg|png", b""), "not a JPEG, PNG, TIFF or WebP image"),
    "not JSON": (lambda path: change(path, "json", b"{"), "not a sample record"),
    "not UTF-8": (lambda path: change(path, "json", b'{"patient": "\xff"}'), "not a sample record"),
    "JSON too deep": (lambda path: change(path, "json", b"[" * 100_000), "not a sample record"),
    "a list": (lambda path: change(path, "json", b"[1]"), "not a sample record"),
    "unknown field": (lambda path: change(path, "json", record(extra=1)), "not a sample record"),
    "sentence is a number": (lambda path: change(path, "json", record(reports=[{"crowding": 3}])), "must be strings"),
    "grades are a list": (lambda path: change(path, "json", record(grades=[1])), "not a sample record"),
    "unknown label": (lambda path: change(path, "json", record(label="high")), "label 'high' is not a class"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_samples_are_named(name: str, damaged: Set) -> None:
    path = damaged.folder / damaged.manifest.shards[1].file
    damage, message = DAMAGE[name]
    key = damage(path)
    with pytest.raises(InputError) as caught:
        read_all(damaged)
    assert str(caught.value).startswith(f"{path}, sample '{key}' at byte {start_of(path, key)}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["unknown label", "image does not decode"])
def test_errors_of_workers_arrive_as_they_were(name: str, workers: int, damaged: Set) -> None:
    DAMAGE[name][0](damaged.folder / damaged.manifest.shards[1].file)
    messages = []
    for count in (0, workers):
        with pytest.raises(InputError) as caught:
            read_all(damaged, count)
        assert "\n" not in str(caught.value)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert no_process_is_left()


def test_batches_before_the_damage_arrive(damaged: Set) -> None:
    change(damaged.folder / damaged.manifest.shards[1].file, "json", b"{", which=4)
    stream = EvaluationStream(damaged.encoder(), damaged.manifest, ["train"], batch=3, ranks=1, rank=0)
    arrived: list[str] = []
    with pytest.raises(InputError):
        for batch in Loader(stream, 1):
            arrived += batch.keys
    assert len(arrived) == 9


def test_shards_that_differ_from_the_manifest_are_named(damaged: Set) -> None:
    shards = damaged.manifest.shards
    path = damaged.folder / shards[1].file
    content = path.read_bytes()
    check_shards(damaged.source, shards)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for bad, message in (
        (content[:-1], f"{path}: {len(content) - 1} bytes, but the manifest says {len(content)}"),
        (content + b"\0", f"{path}: {len(content) + 1} bytes"),
        (b"", f"{path}: 0 bytes"),
        (bytes(flipped), f"{path}: its checksum differs"),
        (None, f"{path}: the manifest lists this shard, but it is not there"),
    ):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(InputError) as caught:
            check_shards(damaged.source, shards)
        assert str(caught.value).startswith(message)
        check_shards(damaged.source, shards, ranks=2, rank=0)  # the other rank's
        with pytest.raises(InputError):
            check_shards(damaged.source, shards, ranks=2, rank=1)


def test_every_shard_is_checked_by_some_rank(tiny: Set) -> None:
    for ranks in range(1, 12):
        for shard in tiny.manifest.shards:
            wrong = [replace(other, sha256="0" * 64) if other is shard else other for other in tiny.manifest.shards]
            found = 0
            for rank in range(ranks):
                try:
                    check_shards(tiny.source, wrong, ranks=ranks, rank=rank)
                except InputError:
                    found += 1
            assert found == 1
        if ranks > 2:
            break


def test_a_shard_that_went_after_the_check_is_named(damaged: Set) -> None:
    path = damaged.folder / damaged.manifest.shards[0].file
    path.unlink()
    with pytest.raises(InputError, match=r"train-000000\.tar: the manifest lists this shard, but it is not there$"):
        read_all(damaged)


@pytest.mark.parametrize("samples", [3, 4, 6, 7])
def test_a_wrong_count_is_an_error_wherever_the_shard_is_read(samples: int, damaged: Set) -> None:
    shards = damaged.manifest.shards
    wrong = replace(damaged.manifest, shards=[replace(shards[0], samples=samples), shards[1]])
    said = "5 samples" if samples > 5 else f"{samples + 1} or more samples"
    with pytest.raises(InputError) as caught:
        list(read_shard(damaged.source, wrong.shards[0]))
    message = f"{damaged.folder / shards[0].file}: {said}, but the manifest says {samples}; copy the shard again"
    assert str(caught.value) == message
    for stream in (
        training_stream(Set(damaged.folder, wrong), steps=1, micro_batch=6),
        EvaluationStream(damaged.encoder(), wrong, ["train"], batch=4, ranks=1, rank=0),
    ):
        with pytest.raises(InputError) as caught:
            list(stream)
        assert str(caught.value) == message


def test_a_shard_cut_off_anywhere_is_an_error(damaged: Set) -> None:
    """Never a sample less without an error; what is missing behind the last sample's data misses nothing."""
    shard = damaged.manifest.shards[0]
    path = damaged.folder / shard.file
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    whole = [(sample.key, sample.image, sample.record) for sample in read_shard(damaged.source, shard)]
    ends = {0, 1, 511, 512, 513, 1023, 1024, last.offset, last.offset_data, last.offset_data + last.size - 1}
    cuts = sorted(ends | {random.Random(cut).randrange(last.offset_data + last.size) for cut in range(150)})
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(InputError) as caught:
            list(read_shard(damaged.source, shard))
        assert str(caught.value).startswith(f"{path}")
    for cut in range(last.offset_data + last.size, len(content), 97):
        path.write_bytes(content[:cut])
        try:
            assert [(sample.key, sample.image, sample.record) for sample in read_shard(damaged.source, shard)] == whole
        except InputError as error:
            assert str(error).startswith(f"{path}")


@pytest.mark.parametrize("repair_header", [False, True])
def test_flipped_bytes_never_lose_a_sample_silently(repair_header: bool, damaged: Set) -> None:
    """200 random changes of a byte. With `repair_header` they are in headers, whose checksums are then made right."""
    shard = damaged.manifest.shards[0]
    path = damaged.folder / shard.file
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    rng = random.Random(1)
    errors = 0
    for _ in range(200):
        changed = bytearray(content)
        if repair_header:
            header = rng.choice(headers)
            changed[header + rng.choice([*range(101), *range(124, 136), *range(156, 512)])] = rng.choice(
                [0, 48, 55, 128, 255, *b"gxLKSV", rng.randrange(256)]
            )
            block = changed[header : header + 512]
            block[148:156] = b" " * 8
            changed[header + 148 : header + 156] = f"{sum(block):06o}\0 ".encode()
        else:
            changed[rng.randrange(headers[-1] + 600)] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            for _ in Loader(EvaluationStream(damaged.encoder(), replace(damaged.manifest, shards=[shard]), ["train"],
                                             batch=5, ranks=1, rank=0), 0):  # fmt: skip
                pass
            assert len(list(read_shard(damaged.source, shard))) == 5
        except InputError as error:
            errors += 1
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)
    assert errors > 10


def test_a_member_twice_or_a_sample_in_two_places_is_an_error(damaged: Set) -> None:
    shard = damaged.manifest.shards[0]
    path = damaged.folder / shard.file
    members = members_of(path)
    write_members(path, [members[0], *members])
    with pytest.raises(InputError, match="damaged after sample 0"):
        list(read_shard(damaged.source, shard))
    write_members(path, [*members[1:], members[0]])
    with pytest.raises(InputError, match="is missing"):
        list(read_shard(damaged.source, shard))


def test_compressed_shards_are_refused(damaged: Set) -> None:
    """They could hold any amount of data."""
    shard = damaged.manifest.shards[0]
    path = damaged.folder / shard.file
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="damaged after sample 0"):
        list(read_shard(damaged.source, shard))


def outcome(shards: Set, shard: ShardInfo) -> tuple[list[tuple[Any, ...]], str]:
    """What reading a shard gives, and the error in which it ends."""
    found: list[tuple[Any, ...]] = []
    try:
        for sample in scan_shard(shards.source, shard):
            found.append(
                (sample.message,) if isinstance(sample, Damaged) else (sample.where, sample.image, sample.mask)
            )
    except InputError as error:
        return found, str(error)
    return found, ""


def test_plain_headers_are_read_as_tarfile_reads_them(damaged: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples and the same words on damage, wherever a shard is cut off or a byte of a header is changed."""
    shard = damaged.manifest.shards[0]
    path, rng = damaged.folder / shard.file, np.random.default_rng(0)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    variants = [whole, b"", bytes(1024), *(whole[:end] for end in range(0, len(whole), 997))]
    variants += [whole[: place + more] for place in headers for more in (0, 1, 511, 512, 513)]
    fields = [0, 3, 99, 100, 107, 115, 124, 135, 136, 148, 154, 155, 156, 157, 257, 262, 263, 300, 329, 345, 400, 511]
    for place in headers[:7]:
        for field in fields:
            header = bytearray(whole[place : place + 512])
            header[field] = rng.choice([0, 9, *b" 017/.Lx", 200])
            for mended in (False, True):
                if mended:  # a checksum that is right again
                    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
                variants.append(whole[:place] + bytes(header) + whole[place + 512 :])
    fast = []
    for variant in variants:
        path.write_bytes(variant)
        fast.append(outcome(damaged, shard))
    monkeypatch.setattr(reading, "read_plain_header", lambda _: None)
    for variant, found in zip(variants, fast):
        path.write_bytes(variant)
        assert found == outcome(damaged, shard)
    assert fast[0][1] == "" and sum(bool(error) for _, error in fast) > 100


def test_shards_as_they_are_written_need_no_tarfile(tiny: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tarfile` takes five times as long."""
    monkeypatch.setattr(tarfile, "open", None)
    for shard in tiny.manifest.shards:
        assert len(list(read_shard(tiny.source, shard))) == shard.samples


def test_long_names_and_other_members_among_plain_ones(damaged: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading goes over to `tarfile` in the midst of a shard, and gives each sample once."""
    shard = damaged.manifest.shards[0]
    path = damaged.folder / shard.file
    expected = outcome(damaged, shard)[0]
    members = members_of(path)
    link = tarfile.TarInfo("link.jpg")
    link.type = tarfile.SYMTYPE
    for place in (0, 3, len(members)):
        long_name = tarfile.TarInfo("x" * 90 + "/" + "y" * 90)
        write_members(path, [*members[:place], (long_name, b""), (link, b""), *members[place:]])
        found, error = outcome(damaged, shard)
        assert ([sample[1:] for sample in found], error) == ([sample[1:] for sample in expected], "")


def test_members_that_claim_any_size_are_refused_before_they_are_read(damaged: Set) -> None:
    shard = damaged.manifest.shards[0]
    path = damaged.folder / shard.file
    sparse = tarfile.TarInfo("bomb.jpg")
    sparse.pax_headers = {"GNU.sparse.size": str(1 << 45), "GNU.sparse.map": "0,1"}
    holes = tarfile.TarInfo("bomb.jpg")
    holes.pax_headers = {"GNU.sparse.size": "100000", "GNU.sparse.map": "0,1"}
    large = tarfile.TarInfo("bomb.jpg")
    large.size = 1 << 40
    negative = tarfile.TarInfo("bomb.jpg")
    negative.pax_headers = {"size": "-5"}
    for member, message in (
        (sparse, "sparse or larger"),
        (holes, "sparse or larger"),
        (large, "sparse or larger"),
        (negative, "bomb.jpg"),
    ):
        path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + b"x" * 1024)
        with pytest.raises(InputError, match=message):
            list(read_shard(damaged.source, shard))


def test_nothing_in_a_shard_is_executed(damaged: Set, tmp_path: Path) -> None:
    """Members of other kinds are not read: pickles, modules, scripts."""
    shard = damaged.manifest.shards[0]
    path = damaged.folder / shard.file
    trace = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(trace),))

    payload = pickle.dumps(Payload())
    members = members_of(path)
    key = members[0][0].name.partition(".")[0]
    hostile = [
        (tarfile.TarInfo(f"{key}.{extension}"), payload)
        for extension in ("pkl", "pickle", "pyd", "pth", "pt", "cls", "jpg.pkl", "json.pyd", "npz", "ten", "__key__")
    ]
    write_members(path, [members[0], *hostile, *members[1:]])
    assert next(sample.key for sample in read_shard(damaged.source, shard)) == key
    read_all(Set(damaged.folder, damaged.manifest))
    assert not trace.exists()
    pickle.loads(payload)
    assert trace.exists(), "the payload does nothing, so the test says nothing"


def test_links_and_paths_in_a_shard_lead_nowhere(damaged: Set, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    shard = damaged.manifest.shards[0]
    path = damaged.folder / shard.file
    strangers = []
    for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("pipe.jpg", tarfile.FIFOTYPE)):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, str(tmp_path / "secret.jpg")
        strangers.append((member, b""))
    write_members(path, [*strangers, *members_of(path)])
    assert len(list(read_shard(damaged.source, shard))) == 5


# ------------------------------------------------------------------------------------------------------- how it is read


def test_each_shard_is_read_once_where_the_window_holds_it(tiny: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    original = reading.read_shard

    def counted(source: ShardSource, shard: ShardInfo, first_number: int = 0) -> Iterator[reading.RawSample]:
        opened[shard.file] += 1
        return original(source, shard, first_number)

    monkeypatch.setattr(reading, "read_shard", counted)
    shards = tiny.manifest.shards_of(["train"])
    numbers = np.random.default_rng(0).permutation(26)
    read = list(read_in_order(tiny.source, shards, numbers, horizon=26))
    assert [sample.number for sample in read] == numbers.tolist()
    assert opened == {shard.file: 1 for shard in shards}
    opened.clear()
    list(training_stream(tiny, steps=4, shuffle_window=26))
    assert opened == {shard.file: 1 for shard in shards}
    opened.clear()
    for _ in EvaluationStream(tiny.encoder(), tiny.manifest, ["train"], batch=4, ranks=1, rank=0):
        pass
    assert opened == {shard.file: 1 for shard in shards}


@dataclass(eq=False)
class Numbered:
    """A sample that is nothing but its number."""

    number: int


@pytest.mark.parametrize(
    ("shards", "samples", "global_batch", "window", "ranks", "workers"),
    [(60, 100, 32, 512, 1, 1), (60, 100, 32, 512, 4, 1), (60, 100, 32, 512, 2, 3), (7, 300, 31, 100, 1, 1)],
)
def test_what_waits_in_memory_is_bounded_on_large_sets(
    shards: int, samples: int, global_batch: int, window: int, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes cut shards in two, and the halves are read far apart: the second half must not wait for its turn.

    So a shard is opened once for each piece of it in the lanes of a rank, and hardly ever more often.
    """
    alive: weakref.WeakSet[Numbered] = weakref.WeakSet()
    opened: Counter[str] = Counter()
    most = 0

    def fake(source: ShardSource, shard: ShardInfo, first_number: int = 0) -> Iterator[Numbered]:
        nonlocal most
        opened[shard.file] += 1
        for number in range(first_number, first_number + samples):
            sample = Numbered(number)
            alive.add(sample)
            most = max(most, len(alive))
            yield sample

    monkeypatch.setattr(reading, "read_shard", fake)
    infos = [ShardInfo(file=str(n), part="train", samples=samples, bytes=0, sha256="") for n in range(shards)]
    order = epoch_order([samples] * shards, seed=0, epoch=0, global_batch=global_batch, window=window)
    pieces = micro_batches(global_batch, 8, ranks, 0)
    mine = np.concatenate([batch[piece] for batch in order for piece in pieces][0::workers])
    place = 0
    for sample in read_in_order(
        LocalSource(Path()), infos, mine, reading_horizon(global_batch, window, ranks * workers)
    ):
        assert sample.number == mine[place]
        place += 1
    assert place == len(mine)
    assert most <= 2 * window / ranks / workers + 4 * global_batch + 3
    touched = len(np.unique(mine // samples))
    assert sum(opened.values()) <= 2 * touched + 1, "shards are read again and again"


def test_first_step_of_a_later_epoch_opens_no_shard_of_an_earlier_one(tiny: Set) -> None:
    later = [batch.keys for batch in training_stream(tiny, first_step=5, steps=6)]
    assert sum(map(len, later)) == GLOBAL_BATCH


# ---------------------------------------------------------------------------------------------------------------- parts


def manifest_with(parts: list[str]) -> ShardManifest:
    nothing = PartStatistics(
        samples=1, patients=1, labels={}, words={}, conclusions={}, longest_sentence=1, image_mean=[], image_std=[]
    )
    every = dict.fromkeys(parts, nothing)
    return ShardManifest(name="", topics=[], classes=[], vocabulary=[], parts=every, shards=[])


def test_parts_to_train_validate_and_test_on() -> None:
    folds = manifest_with([f"fold{number}" for number in range(5)])
    assert parts_of(folds, 0) == (["fold2", "fold3", "fold4"], ["fold1"], ["fold0"])
    assert parts_of(folds, 4) == (["fold1", "fold2", "fold3"], ["fold0"], ["fold4"])
    assert parts_of(manifest_with(["train", "val", "test"]), None) == (["train"], ["val"], ["test"])
    assert parts_of(manifest_with(["train"]), None) == (["train"], [], [])


@pytest.mark.parametrize(
    ("parts", "fold", "message"),
    [
        (["train", "val"], 0, "data.fold 0: the shard set has no folds but train, val"),
        (["fold0", "fold1", "fold2"], 3, "data.fold 3: the shard set has 3 folds; give 0 to 2"),
        (["fold0", "fold1"], 0, "data.fold 0: the shard set has 2 folds"),
        (["fold0", "fold1", "fold2"], None, "data.fold: the shard set is dealt into 3 folds"),
        (["val", "test"], None, "data.shards: the set has no part 'train', only val, test"),
    ],
)
def test_parts_that_contradict_the_configuration(parts: list[str], fold: int | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parts_of(manifest_with(parts), fold)
    assert str(caught.value).startswith(message)


def test_a_set_survives_being_written_and_read(tiny: Set) -> None:
    assert load_manifest(tiny.folder) == tiny.manifest
    assert sha256_of(tiny.folder / tiny.manifest.shards[0].file) == tiny.manifest.shards[0].sha256
