"""Damaged data: `strict` names it, `skip` leaves it out, counts it, and changes nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdnet_dist import data, reading
from mdnet_dist.damage import DamageCount
from mdnet_dist.data import Batch, EvaluationStream, Loader
from mdnet_dist.engine import start_processes
from mdnet_dist.errors import InputError
from mdnet_dist.evaluation import evaluate
from mdnet_dist.explain_run import explain_best_and_worst
from mdnet_dist.model.mdnet import NO_LABEL, Losses, MDNet
from mdnet_dist.plan import micro_batches
from mdnet_dist.reading import Skipping, check_shards, read_shard
from mdnet_dist.run_data import open_data, open_part
from mdnet_dist.saved import open_model, saved_config
from mdnet_dist.shards import MANIFEST_NAME, SampleRecord, load_manifest
from mdnet_dist.step_log import DAMAGED, SAMPLES, StepLog
from mdnet_dist.storage import LocalSource
from mdnet_dist.trainer import Trainer
from tests.damage import (
    CONTENT_DAMAGE,
    IMAGE,
    SAMPLE_DAMAGE,
    SHARD_DAMAGE,
    agree,
    change,
    keys_of,
    member_at,
    start_of,
)
from tests.networks import freeze_batch_norm
from tests.ranks import run_ranks
from tests.saved import untrained_run
from tests.test_data import GLOBAL_BATCH, STEPS, Set, samples_in, training_stream
from tests.tiny import tiny_config, tiny_set

pytestmark = [pytest.mark.filterwarnings("ignore:This DataLoader will create"), pytest.mark.timeout(120)]

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Set:
    """Six shards to train on, nothing wrong with any."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    return Set(folder, tiny_set(folder, train=26, val=4, test=7))


@pytest.fixture
def copied(whole: Set, tmp_path: Path) -> Set:
    """A copy of it, to be damaged."""
    return Set(shutil.copytree(whole.folder, tmp_path / "set"), whole.manifest)


def shard_path(shards: Set, number: int) -> Path:
    return shards.folder / shards.manifest.shards_of(["train"])[number].file


# ------------------------------------------------------------------------------------------------------------- strict


def png_sample(shards: Set) -> tuple[Path, int]:
    """A shard, and the number within it of a sample in its midst that is a PNG: those with an even number are."""
    for number in range(6):
        path = shard_path(shards, number)
        for which, key in enumerate(keys_of(path)[:-1]):
            if which > 0 and int(key[-3:]) % 2 == 0:
                return path, which
    raise AssertionError("no shard has one")


SIZE, CHECKSUM = "[0-9]+ bytes, but the manifest says [0-9]+; copy it again", "its checksum differs from the manifest's"
HEADER = r"damaged after sample \d+, at byte {at}, in or behind sample '{last}' at byte {begins} \(cut off, or a dam"
SAMPLE = "sample '{key}' at byte {start}: "


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("cut between samples", SIZE, HEADER),
        ("half a sample", SIZE, HEADER),
        ("cut inside a sample", SIZE, SAMPLE + r"member '{key}\.png' is cut off"),
        ("byte of a header", CHECKSUM, HEADER),
        ("a sample more", SIZE, "{more} or more samples, but the manifest says {samples}"),
        ("a sample less", f"{SIZE}|{CHECKSUM}", "{fewer} samples, but the manifest says {samples}"),
        ("image does not decode", f"{SIZE}|{CHECKSUM}", SAMPLE + "the image does not decode"),
        ("not JSON", f"{SIZE}|{CHECKSUM}", SAMPLE + "not a sample record"),
        ("byte of a picture", CHECKSUM, SAMPLE + "the image does not decode"),
        ("byte of a value", CHECKSUM, r"every sample still decodes, so a byte in some value changed\)$"),
    ],
)
def test_strict_says_where_a_shard_that_differs_first_fails(
    name: str, first: str, then: str, copied: Set, tmp_path: Path
) -> None:
    path, which = png_sample(copied)
    keys = keys_of(path)
    starts = [start_of(path, key) for key in keys]
    record = member_at(path, which, "json").offset
    at = starts[which] if name == "cut between samples" else record
    last = which - 1 if name == "cut between samples" else which
    ({**SAMPLE_DAMAGE, **SHARD_DAMAGE, **CONTENT_DAMAGE}[name])(path, which)
    with pytest.raises(InputError) as caught:
        open_data(tiny_config(copied.folder, tmp_path / "runs"))
    message = str(caught.value)
    then = then.format(at=at, last=keys[last], begins=starts[last], key=keys[which], start=starts[which],
                       samples=len(keys), fewer=len(keys) - 1, more=len(keys) + 1)  # fmt: skip
    assert re.match(re.escape(f"{path}: ") + f"(?:{first})", message), message
    assert re.search(r" \((reading fails first here: )?" + then, message), message


@pytest.mark.parametrize("name", ["cut between samples", "half a sample", "cut inside a sample", "byte of a header"])
def test_strict_names_shard_sample_and_byte_while_it_reads(name: str, copied: Set) -> None:
    """Where the manifest agrees with the damaged file, so that no checksum tells."""
    path = shard_path(copied, 1)
    keys, starts = keys_of(path), [start_of(path, key) for key in keys_of(path)]
    record = member_at(path, 2, "json").offset
    SHARD_DAMAGE[name](path, 2)
    agree(copied.folder)
    manifest = load_manifest(copied.folder)
    assert check_shards(copied.source, manifest.shards) == {}
    with pytest.raises(InputError) as caught:
        list(read_shard(copied.source, manifest.shards_of(["train"])[1]))
    if name == "cut inside a sample":
        assert str(caught.value).startswith(f"{path}, sample '{keys[2]}' at byte {starts[2]}: member '{keys[2]}.")
    else:
        at, last = (starts[2], 1) if name == "cut between samples" else (record, 2)
        found = len(keys[:last])  # a sample is known to be whole when the next one begins
        assert str(caught.value) == (
            f"{path}: damaged after sample {found}, at byte {at}, in or behind sample '{keys[last]}' at byte "
            f"{starts[last]} (cut off, or a damaged header); copy the shard again"
        )


def alarm(*_: Any) -> None:
    raise AssertionError("it hangs")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop", "outside"])
@pytest.mark.parametrize("policy", ["strict", "skip"])
def test_what_is_no_plain_file_is_never_opened(kind: str, policy: str, copied: Set, tmp_path: Path) -> None:
    path = shard_path(copied, 0)
    outside = tmp_path / "elsewhere.tar"
    path.rename(outside)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": Path("/dev/zero"), "loop": path, "outside": outside}[kind])
    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(20)
    try:
        overrides = {"data.damaged": policy, "data.most_damaged": 0.3, "train.global_batch": 4}
        config = tiny_config(copied.folder, tmp_path / "runs", overrides)
        said = "a link that leaves the folder" if kind == "outside" else "but it is not a plain file"
        if policy == "strict":
            with pytest.raises(InputError, match=re.escape(str(path)) + f".*{said}"):
                open_data(config)
            with pytest.raises(InputError, match=said):
                list(read_shard(copied.source, copied.manifest.shards_of(["train"])[0]))
        else:
            found = open_data(config)
            assert list(found.left_out) == [path.name] and said in found.left_out[path.name]
            assert sum(len(batch.damaged) for batch in found.training_batches(config, 0, 6, False)) > 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------------------- skip

GONE, VALUE = "gone", "byte of a value"
KINDS = [*SAMPLE_DAMAGE, *SHARD_DAMAGE, GONE, VALUE]


def damage_set(shards: Set, wanted: dict[int, tuple[str, int, bool]]) -> set[str]:
    """Damage some training shards; returns the keys of the samples that must be left out.

    Args:
        wanted: {number of the shard: kind, number of the sample, whether the manifest agrees with the damage}.
    """
    lost: set[str] = set()
    for agreed in (True, False):
        for number, (kind, which, agrees) in wanted.items():
            path = shard_path(shards, number)
            if (agrees and kind not in (GONE, VALUE, "empty")) != agreed:
                continue
            keys = keys_of(path)
            if kind in SAMPLE_DAMAGE:
                key = SAMPLE_DAMAGE[kind](path, which)
                lost |= {key} if agreed else set(keys)
                continue
            lost |= set(keys)
            if kind == GONE:
                path.unlink()
            elif kind == VALUE:
                CONTENT_DAMAGE[kind](path, which)
            else:
                SHARD_DAMAGE[kind](path, which)
        if agreed:
            agree(shards.folder)
    shards.manifest = load_manifest(shards.folder)
    return lost


def left_out_of(shards: Set, ranks: int) -> dict[str, str]:
    left_out: dict[str, str] = {}
    for rank in range(ranks):
        left_out |= check_shards(shards.source, shards.manifest.shards, ranks=ranks, rank=rank, skip=True)
    return left_out


def batches_of(stream: Any, workers: int) -> Iterator[Batch]:
    """What a loader with so many processes would give, without starting any."""
    streams = []
    for worker in range(workers):
        info = SimpleNamespace(num_workers=workers, id=worker)
        streams.append(_with_worker(stream, info))
    active = list(streams)
    while active:
        for one in list(active):
            try:
                yield next(one)
            except StopIteration:
                active.remove(one)


def _with_worker(stream: Any, info: Any) -> Iterator[Batch]:
    original = data.get_worker_info
    data.get_worker_info = lambda: info  # type: ignore[assignment]
    try:
        batches = iter(stream)
        first = next(batches, None)  # it asks which worker it is when it begins
    finally:
        data.get_worker_info = original
    return iter([]) if first is None else _chained(first, batches)


def _chained(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest


def global_batches(
    shards: Set, ranks: int, workers: int, left_out: dict[str, str] | None = None, **config: Any
) -> list[list[Any]]:
    """The samples of each step over all ranks; and each batch must tell of as many damaged ones as it has blanks."""
    steps: list[list[Any]] = [[] for _ in range(STEPS)]
    for rank in range(ranks):
        pieces = micro_batches(GLOBAL_BATCH, 2, ranks, rank)
        stream = training_stream(shards, ranks=ranks, rank=rank, left_out=left_out, **config)
        batches = list(batches_of(stream, workers))
        assert len(batches) == len(pieces) * STEPS, "steps were lost"
        for number, batch in enumerate(batches):
            size = pieces[number % len(pieces)].stop - pieces[number % len(pieces)].start
            assert len(batch.keys) == len(batch.images) == len(batch.labels) == len(batch.lengths) == size
            assert len(batch.damaged) == batch.keys.count("")
            steps[number // len(pieces)] += samples_in(batch)
    return steps


@pytest.fixture(scope="module")
def expected(whole: Set) -> list[list[Any]]:
    return global_batches(whole, 1, 1)


def blank_of(shards: Set) -> tuple[Any, ...]:
    parts = shards.manifest.parts["train"]
    colour = np.rint(np.array([round(value, 6) for value in parts.image_mean]) * 255).astype(np.uint8)
    pixels = np.broadcast_to(colour[:, None, None], (3, 24, 24))
    return "", pixels.tobytes(), NO_LABEL, [], SampleRecord(patient="", label=None, reports=[]), None


def without(batches: list[list[Any]], lost: set[str], blank: tuple[Any, ...]) -> list[list[Any]]:
    return [[blank if sample[0] in lost else sample for sample in batch] for batch in batches]


@settings(
    deadline=None,
    max_examples=300 if os.environ.get("MDNET_SOAK") else 12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    wanted=st.dictionaries(
        st.integers(0, 5), st.tuples(st.sampled_from(KINDS), st.integers(1, 3), st.booleans()), max_size=4
    ),
    ranks=st.integers(1, 4),
    workers=st.integers(1, 3),
)
def test_skip_changes_nothing_but_what_is_damaged(
    wanted: dict[int, tuple[str, int, bool]],
    ranks: int,
    workers: int,
    whole: Set,
    expected: list[list[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Order, keys, pixels and reports of all others, for any ranks and workers; as many steps of as many images."""
    folder = tmp_path_factory.mktemp("damaged")
    shards = Set(shutil.copytree(whole.folder, folder / "set"), whole.manifest)
    try:
        lost = damage_set(shards, wanted)
        left_out = left_out_of(shards, ranks)
        found = global_batches(shards, ranks, workers, left_out, damaged="skip")
        assert found == without(expected, lost, blank_of(whole))

        read: list[str] = []
        told: list[str] = []
        for rank in range(ranks):
            stream = EvaluationStream(
                shards.encoder(damaged="skip"), shards.manifest, ["train"], batch=4, ranks=ranks, rank=rank,
                left_out=left_out,
            )  # fmt: skip
            for batch in batches_of(stream, workers):
                assert len(batch.keys) == len(batch.images) == len(batch.labels) == len(batch.tokens)
                told += batch.damaged
                read += batch.keys
        stored = [key for shard in whole.manifest.shards_of(["train"]) for key in keys_of(whole.folder / shard.file)]
        assert (
            sorted(read) == sorted(set(stored) - lost) if workers > 1 else read == [k for k in stored if k not in lost]
        )
        assert len(told) == len(lost)
        names = {shard_path(shards, number).name for number in wanted}
        assert {re.findall(r"train-\d+\.tar", message)[0] for message in told} == (names if lost else set())
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [1, 2])
def test_skip_in_real_loader_processes(
    ranks: int, workers: int, copied: Set, whole: Set, expected: list[list[Any]]
) -> None:
    lost = damage_set(
        copied, {0: ("no record", 1, True), 1: ("half a sample", 2, True), 3: (GONE, 0, False), 4: (VALUE, 1, False)}
    )
    left_out = left_out_of(copied, ranks)
    found: list[list[Any]] = [[] for _ in range(STEPS)]
    for rank in range(ranks):
        stream = training_stream(copied, ranks=ranks, rank=rank, left_out=left_out, damaged="skip")
        pieces = len(micro_batches(GLOBAL_BATCH, 2, ranks, rank))
        for number, batch in enumerate(Loader(stream, workers)):
            found[number // pieces] += samples_in(batch)
    assert found == without(expected, lost, blank_of(whole))


def test_a_shard_that_goes_while_it_is_read(copied: Set, whole: Set, expected: list[list[Any]]) -> None:
    """What was read before stays; what comes later is blank; no step is lost; and it may come back."""
    path = shard_path(copied, 2)
    keys, hidden = set(keys_of(path)), path.with_name("hidden")
    batches = iter(training_stream(copied, damaged="skip"))
    path.rename(hidden)
    first_epoch = [samples_in(next(batches)) for _ in range(12)]  # 4 steps of 3 micro-batches
    hidden.rename(path)
    rest = [samples_in(batch) for batch in batches]
    in_steps = [[s for batch in some[n : n + 3] for s in batch] for some in (first_epoch, rest) for n in (0, 3, 6, 9)]
    assert in_steps == [*without(expected[:4], keys, blank_of(whole)), *expected[4:]]


def test_a_read_that_fails_after_it_began(copied: Set, whole: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or a server that gives up in the midst of a shard."""
    path, original, calls = shard_path(copied, 1), reading.scan_shard, [0]
    keys = keys_of(path)

    def fails(source: Any, shard: Any, first_number: int = 0) -> Iterator[Any]:
        for found, sample in enumerate(original(source, shard, first_number)):
            if shard.file == path.name and found == 2:
                calls[0] += 1
                if calls[0] > 1:  # not while the shard is looked through
                    raise InputError(f"{path}: gave up")
            yield sample

    monkeypatch.setattr(reading, "scan_shard", fails)
    stream = EvaluationStream(copied.encoder(damaged="skip"), copied.manifest, ["train"], batch=4, ranks=1, rank=0)
    batches = list(stream)
    stored = [key for shard in whole.manifest.shards_of(["train"]) for key in keys_of(whole.folder / shard.file)]
    assert [key for batch in batches for key in batch.keys] == [key for key in stored if key not in keys[2:]]
    assert [message for batch in batches for message in batch.damaged] == [f"{path}: gave up"] * (len(keys) - 2)


def test_strict_is_the_default_and_skip_without_damage_is_the_same(whole: Set, expected: list[list[Any]]) -> None:
    assert whole.encoder().config.damaged == "strict"
    assert global_batches(whole, 2, 1, {}, damaged="skip") == expected


def test_each_shard_is_looked_through_once_by_a_stream(whole: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    original = Skipping.reason_to_leave_out

    def counted(self: Skipping, source: Any, shard: Any) -> str | None:
        if shard.file not in self._sound:
            looked.append(shard.file)
        return original(self, source, shard)

    monkeypatch.setattr(Skipping, "reason_to_leave_out", counted)
    list(training_stream(whole, damaged="skip"))
    assert sorted(looked) == [shard.file for shard in whole.manifest.shards_of(["train"])]


# ------------------------------------------------------------------------------------------- a blank adds to no loss


def tiny_model(shards: Set, tmp_path: Path) -> tuple[MDNet, Any]:
    card = open_data(
        tiny_config(shards.folder, tmp_path / "runs", {"data.image_size": 24, "train.global_batch": 6})
    ).card
    torch.manual_seed(1)
    return card.build(), card


def gradients(network: MDNet, card: Any, batch: Batch, images: torch.Tensor) -> tuple[Losses, dict[str, torch.Tensor]]:
    network.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    losses = network(card.normalise(images), batch.labels, batch.tokens, batch.lengths)
    (losses.m + 0.5 * losses.l).backward()
    return losses, {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


def batch_with_a_blank(shards: Set, whole: Set) -> tuple[Batch, Batch]:
    """A batch of six with one blank, and the same batch undamaged."""
    key = SAMPLE_DAMAGE["image does not decode"](shard_path(shards, 0), 2)
    streams = [training_stream(one, micro_batch=6, steps=5, damaged="skip") for one in (shards, whole)]
    for damaged, same in zip(*streams):
        if key in same.keys:
            assert damaged.keys.index("") == same.keys.index(key)
            return damaged, same
    raise AssertionError("the damaged sample never came")


def test_a_blank_adds_nothing_to_either_loss_or_gradient(copied: Set, whole: Set, tmp_path: Path) -> None:
    """Bit for bit where batch normalisation keeps images apart: whatever is in its place, no weight hears of it."""
    damaged, same = batch_with_a_blank(copied, whole)
    place = damaged.keys.index("")
    network, card = tiny_model(whole, tmp_path)
    freeze_batch_norm(network)
    losses, found = gradients(network, card, damaged, damaged.images)
    assert found and all(bool(value.isfinite().all()) for value in found.values())
    for value in (0, 77, 255):
        images = damaged.images.clone()
        images[place] = value
        other_losses, other = gradients(network, card, damaged, images)
        assert torch.equal(losses.m, other_losses.m) and torch.equal(losses.l, other_losses.l)
        assert all(torch.equal(found[name], other[name]) for name in found)

    kept = [number for number in range(6) if number != place]
    rest = replace(
        same, labels=same.labels[kept], tokens=same.tokens[kept], lengths=same.lengths[kept], images=same.images[kept]
    )
    alone_losses, alone = gradients(network.eval(), card, rest, rest.images)
    losses, found = gradients(network.eval(), card, damaged, damaged.images)
    for one, other in zip(losses, alone_losses):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for name, value in found.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)


def test_a_blank_is_the_image_without_its_label_and_reports(copied: Set, whole: Set, tmp_path: Path) -> None:
    """In training mode too: the step is that of a batch whose image has neither, the picture the mean colour."""
    damaged, same = batch_with_a_blank(copied, whole)
    place = damaged.keys.index("")
    network, card = tiny_model(whole, tmp_path)
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels, lengths, tokens = same.labels.clone(), same.lengths.clone(), same.tokens.clone()
    labels[place], lengths[place], tokens[place] = NO_LABEL, 0, 0
    bare = replace(same, labels=labels, lengths=lengths, tokens=tokens)
    (losses, found), (other_losses, other) = (gradients(network, card, one, damaged.images) for one in (damaged, bare))
    for one, two in zip(losses, other_losses):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    for name, value in found.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)
    normalised = card.normalise(damaged.images)[place]
    assert float(normalised.abs().max()) < 0.01, "the mean colour is what convolutions see beyond the border"


def test_a_batch_of_blanks_is_a_batch(copied: Set, whole: Set, tmp_path: Path) -> None:
    for shard in copied.manifest.shards_of(["train"]):
        (copied.folder / shard.file).unlink()
    (batch,) = training_stream(copied, micro_batch=6, steps=1, damaged="skip")
    assert batch.keys == [""] * 6 and len(batch.damaged) == 6
    network, card = tiny_model(whole, tmp_path)
    losses, found = gradients(network, card, batch, batch.images)
    assert losses.m.item() == losses.l.item() == 0
    assert all(not value.any() for value in found.values())


# ------------------------------------------------------------------------------------------------------- how much


def test_the_share_is_of_the_epoch_or_of_what_was_read() -> None:
    count = DamageCount(0.01)
    count.begin(200)
    assert count.add(4, ["a", "a"]) == ["a"]
    count.check()  # 2 of 200
    assert count.add(4, ["b", "a", "c"]) == ["b", "c"]
    with pytest.raises(InputError) as caught:
        count.check()
    assert str(caught.value) == ("5 of 200 images read are damaged, more than data.most_damaged 0.01; first: a")
    count.begin(200)
    assert count.add(4, ["c", "d"]) == ["d"], "told once a run"
    count.check()  # counted anew
    small = DamageCount(0.5, "images of val")
    small.add(4, ["x", "y"])
    small.check()
    small.add(1, ["z"])
    with pytest.raises(
        InputError, match=r"^3 of 5 images of val are damaged, more than data.most_damaged 0\.5; first: x$"
    ):
        small.check()


def test_with_nothing_allowed_one_is_too_much() -> None:
    count = DamageCount(0.0)
    count.begin(10**6)
    count.add(10, [])
    count.check()
    count.add(10, ["x"])
    with pytest.raises(InputError, match="1 of 1000000"):
        count.check()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1), st.integers(0, 500), st.floats(0, 1))
def test_it_stops_exactly_when_the_share_is_exceeded(
    batches: list[tuple[int, int]], expected: int, most: float
) -> None:
    count, images, damaged = DamageCount(most), 0, 0
    count.begin(expected)
    for size, bad in batches:
        bad = min(size, bad)
        images, damaged = images + size, damaged + bad
        count.add(size, ["x"] * bad)
        if damaged / max(images, expected) > most + 1e-12:
            with pytest.raises(InputError):
                count.check()
            return
        if damaged / max(images, expected) < most - 1e-12:
            count.check()


def test_too_many_damaged_shards_stop_a_run_before_it_starts(copied: Set, tmp_path: Path, capsys: Any) -> None:
    shard_path(copied, 0).unlink()
    overrides = {"data.damaged": "skip", "data.most_damaged": 0.1, "train.global_batch": 4}
    lost = copied.manifest.shards_of(["train"])[0].samples
    with pytest.raises(InputError) as caught:
        open_data(tiny_config(copied.folder, tmp_path / "runs", overrides))
    assert str(caught.value) == (
        f"{lost} of 26 images of train are damaged, more than data.most_damaged 0.1; first: {shard_path(copied, 0)}: "
        "the manifest lists this shard, but it is not there"
    )
    assert f"left out: {shard_path(copied, 0)}: the manifest lists" in capsys.readouterr().out
    found = open_data(tiny_config(copied.folder, tmp_path / "runs", overrides | {"data.most_damaged": 0.2}))
    assert list(found.left_out) == [shard_path(copied, 0).name]
    assert (found.samples, found.steps_per_epoch) == (26, 6), "an epoch is as long as ever"
    assert len(list(found.training_records())) == 26 - lost


def ranks_left_out(shards: str, runs: str) -> tuple[list[str], str]:
    """What a rank knows to be left out, and what it says where that is too much."""
    start_processes()
    overrides = {"data.damaged": "skip", "data.most_damaged": 0.5, "train.global_batch": 4}
    left_out = list(open_data(tiny_config(Path(shards), Path(runs), overrides)).left_out)
    try:
        open_data(tiny_config(Path(shards), Path(runs), overrides | {"data.most_damaged": 0.1}))
    except InputError as error:
        return left_out, str(error)
    return left_out, ""


@pytest.mark.slow
def test_all_ranks_know_what_is_left_out(copied: Set, tmp_path: Path) -> None:
    for number in (0, 1):  # one is looked at by each rank
        shard_path(copied, number).unlink()
    first, second = run_ranks(ranks_left_out, 2, str(copied.folder), str(tmp_path / "runs"))
    assert first == second
    assert first[0] == [shard_path(copied, number).name for number in (0, 1)]
    assert "more than data.most_damaged 0.1" in first[1]


def train_on_damage(shards: str, runs: str, most_damaged: float, resumed: bool) -> dict[str, Any]:
    """Two epochs; the images of each step by the ledger, and how it ended."""
    overrides = {
        "data.damaged": "skip",
        "data.most_damaged": most_damaged,
        "train.global_batch": 4,
        "train.micro_batch": 2,
        "train.epochs": 2,
        "train.ledger": True,
        "data.workers": 1,
    }
    trainer = Trainer(tiny_config(Path(shards), Path(runs), overrides), resume=resumed)
    error = ""
    try:
        with trainer.watched():
            trainer.train()
    except InputError as caught:
        error = str(caught)
    finite = bool(torch.isfinite(torch.cat([weight.flatten() for weight in trainer.engine.weights().values()])).all())
    trainer.close()
    return {"error": error, "step": trainer.step, "finite": finite, "folder": trainer.folder}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_leaves_out_what_is_damaged_and_counts_it(ranks: int, copied: Set, tmp_path: Path) -> None:
    """A sample whose image does not decode, and a shard that is missing: told once, in the ledger as blanks."""
    lost_key = SAMPLE_DAMAGE["image does not decode"](shard_path(copied, 1), 1)
    agree(copied.folder)
    lost = {lost_key, *keys_of(shard_path(copied, 0))}
    shard_path(copied, 0).unlink()
    by_rank = run_ranks(train_on_damage, ranks, str(copied.folder), str(tmp_path / "runs"), 0.5, False)
    assert all(found["error"] == "" and found["finite"] and found["step"] == 12 for found in by_rank)
    folder = by_rank[0]["folder"]
    ledger = list(StepLog(folder / SAMPLES).read())
    assert [line["step"] for line in ledger] == list(range(1, 13)), "an epoch is as long as ever"
    assert all(len(line["keys"]) == 4 for line in ledger)
    seen = [key for line in ledger for key in line["keys"]]
    assert not lost & set(seen)
    assert seen.count("") >= len(lost), "each of them once an epoch, but for the remainder"
    told = [message for line in StepLog(folder / DAMAGED).read() for message in line["messages"]]
    assert len(told) == len(set(told)) == 2, told
    assert any("the manifest lists this shard, but it is not there" in message for message in told)
    assert any(f"sample '{lost_key}' at byte" in message and "does not decode" in message for message in told)


@pytest.mark.slow
def test_training_stops_on_all_ranks_when_too_much_is_damaged(copied: Set, tmp_path: Path) -> None:
    for number in range(5):
        SAMPLE_DAMAGE["not JSON"](shard_path(copied, number), 0)
    agree(copied.folder)
    by_rank = run_ranks(train_on_damage, 2, str(copied.folder), str(tmp_path / "runs"), 0.1, False)
    errors = {found["error"] for found in by_rank}
    assert len(errors) == 1 and len({found["step"] for found in by_rank}) == 1
    error = errors.pop()
    assert "3 of 26 images read are damaged, more than data.most_damaged 0.1; first: " in error
    assert "sample '" in error and "at byte" in error


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def saved(copied: Set, tmp_path: Path) -> Path:
    overrides = {"data.damaged": "skip", "data.most_damaged": 0.5, "train.global_batch": 4, "evaluate.batch": 2}
    return untrained_run(tiny_config(copied.folder, tmp_path / "runs", overrides))[0]


def test_evaluation_says_what_it_does_not_score(saved: Path, copied: Set, capsys: Any) -> None:
    network, card, _ = open_model(saved)
    config = saved_config(saved, card)
    data_of, parts = open_part(config, card, "test")
    whole_part = evaluate(network, card, data_of.evaluation_batches(config, parts, False), device=CPU)
    assert "damaged" not in whole_part.metrics and whole_part.damaged == []
    paths = [copied.folder / shard.file for shard in copied.manifest.shards_of(["test"])]
    lost = [SAMPLE_DAMAGE["image does not decode"](paths[-1], which) for which in (1, 2)]  # the last batch has no more
    lost.append(next(key for key in keys_of(paths[0]) if int(key[-3:]) % 3 == 0))
    change(paths[0], "mask.png", b"no mask", keys_of(paths[0]).index(lost[-1]))
    agree(copied.folder)
    capsys.readouterr()
    data_of, parts = open_part(config, card, "test")
    batches = list(data_of.evaluation_batches(config, parts, False))
    assert sum(len(batch.damaged) for batch in batches) == 3
    found = evaluate(network, card, batches, device=CPU, queries=data_of.queries(parts), most_damaged=0.5)
    assert {one.key for one in found.predictions} == {one.key for one in whole_part.predictions} - set(lost)
    assert (found.metrics["images"], found.metrics["damaged"], len(found.damaged)) == (4, 3, 3)
    said = capsys.readouterr().out
    assert "3 of 7 images are damaged and were not scored:\n" in said
    assert all(f"sample '{key}' at byte " in said for key in lost)
    with pytest.raises(InputError, match=r"^3 of 7 images read are damaged, more than data.most_damaged 0.4; first: "):
        evaluate(network, card, batches, device=CPU, most_damaged=0.4)
    with pytest.raises(InputError, match=r"^3 of 7 images read are damaged, more than data.most_damaged 0; first: "):
        evaluate(network, card, batches, device=CPU)

    strict = config.model_copy(update={"data": config.data.model_copy(update={"damaged": "strict"})})
    data_of, parts = open_part(strict, card, "test")
    with pytest.raises(InputError, match=r"sample 'test_\d+' at byte \d+: "):
        evaluate(network, card, data_of.evaluation_batches(strict, parts, False), device=CPU)


def test_a_part_with_nothing_left_is_an_error(saved: Path, copied: Set) -> None:
    network, card, _ = open_model(saved)
    config = saved_config(saved, card)
    data_of, parts = open_part(config, card, "val")
    for shard in copied.manifest.shards_of(["val"]):
        path = copied.folder / shard.file
        for which in range(len(keys_of(path))):
            change(path, IMAGE, b"nothing", which)
    batches = data_of.evaluation_batches(config, parts, False)
    with pytest.raises(InputError, match=r"^all 4 images are damaged, so that none can be scored; first: "):
        evaluate(network, card, batches, device=CPU, most_damaged=1.0)


def test_looking_through_a_damaged_set(saved: Path, copied: Set, tmp_path: Path) -> None:
    """Finding and explaining images leave out the same."""
    network, card, _ = open_model(saved)
    config = saved_config(saved, card)
    paths = [copied.folder / shard.file for shard in copied.manifest.shards_of(["test"])]
    lost = [SAMPLE_DAMAGE["image does not decode"](paths[0], 1), SAMPLE_DAMAGE["no record"](paths[-1], 1)]
    agree(copied.folder)
    data_of, parts = open_part(config, card, "test")
    damaged: list[str] = []
    kept = [sample.key for sample in data_of.samples_of(parts, damaged)]
    assert kept == [key for path in paths for key in keys_of(path) if key not in lost]
    assert [re.findall("test_[0-9]+", message)[0] for message in damaged] == lost
    assert len(list(data_of.samples_of(parts))) == len(kept) + 1, "without decoding the picture is not known to be bad"
    found = evaluate(network, card, data_of.evaluation_batches(config, parts, False), device=CPU, most_damaged=0.5)
    keys = explain_best_and_worst(
        network, card, found.predictions, config.data, parts, tmp_path / "pages", "pages", count=2
    )
    assert len(keys) == 2 and not set(keys) & set(lost)
    assert len(list((tmp_path / "pages").glob("test_*.html"))) == len(keys)


def test_a_saved_network_reads_as_the_run_says_and_sees_as_it_was_trained(saved: Path) -> None:
    """Where and how a set is read is the configuration's, what the network sees is the card's."""
    _, card, _ = open_model(saved)
    config = saved_config(saved, card)
    assert "cache" not in card.data and "shards" not in card.data
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"image_size": 64, "damaged": "strict", "cache": "elsewhere"})}
    )
    data_of, _ = open_part(other, card, "test")
    read = data_of.encoder.config
    assert (read.image_size, read.damaged, read.cache) == (card.data["image_size"], "strict", "elsewhere")


# ---------------------------------------------------------------------------------------------------------- manifests


def edited(shards: Set, edit: Callable[[dict[str, Any]], Any]) -> Path:
    raw = json.loads((shards.folder / MANIFEST_NAME).read_text())
    edit(raw)
    (shards.folder / MANIFEST_NAME).write_text(json.dumps(raw))
    return shards.folder / MANIFEST_NAME


def twice_under_two_names(raw: dict[str, Any]) -> None:
    shard = dict(raw["shards"][0])
    raw["shards"].append({**shard, "file": "again.tar"})
    raw["parts"]["train"]["samples"] += shard["samples"]


def more_samples_than_bytes(raw: dict[str, Any], size: int | None = None) -> None:
    """Agreeing with themselves. With a size that fits, they are only too many."""
    samples = 10**11 if size is None else size >> 11
    raw["parts"]["train"]["samples"] += samples - raw["shards"][0]["samples"]
    raw["shards"][0].update({"samples": samples} | ({} if size is None else {"bytes": size}))


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "twice under one name": (lambda raw: raw["shards"].append(raw["shards"][0]), "'train-000000.tar' is listed twice"),
    "twice under two names": (
        twice_under_two_names,
        "the same shard appears twice, as 'train-000000.tar' and as 'again.tar': their checksums are equal; build",
    ),
    "missing from the list": (lambda raw: raw["shards"].pop(1), "part 'train' has 26 samples, but its shards 2"),
    "a wrong count": (lambda raw: raw["shards"][0].update(samples=9), "part 'train' has 26 samples, but its shards 3"),
    "no shard of a part": (
        lambda raw: raw.update(shards=[s for s in raw["shards"] if s["part"] != "val"]),
        "part 'val' has 4 samples, but its shards 0: one is missing from the list, or its count is wrong; copy the",
    ),
    "a part that is not there": (
        lambda raw: raw["shards"][0].update(part="trian"),
        "shard 'train-000000.tar' is of part 'trian', which the manifest lacks; did you mean 'train'?",
    ),
    "a checksum with a path": (lambda raw: raw["shards"][0].update(sha256="../" * 9), "sha256 must be 64 hexadecimal"),
    "a checksum in capitals": (
        lambda raw: raw["shards"][0].update(sha256=raw["shards"][0]["sha256"].upper()),
        "shard 'train-000000.tar': sha256 must be 64 hexadecimal digits in lower case",
    ),
    "a name with an escape": (lambda raw: raw["shards"][0].update(file="a\x1b[2J.tar"), "is not a plain file name"),
    "a name with a zero byte": (lambda raw: raw["shards"][0].update(file="a\0.tar"), "is not a plain file name"),
    "more samples than bytes": (
        more_samples_than_bytes,
        "shard 'train-000000.tar' cannot have 100,000,000,000 samples in ",
    ),
    "samples without end": (
        lambda raw: more_samples_than_bytes(raw, 1 << 60),
        "samples, more than the 100,000,000 that a set may have",
    ),
    "a class twice": (lambda raw: raw["classes"].append("normal"), "low grade, normal, normal: each must be"),
    "a class without a name": (lambda raw: raw["classes"].append(""), "must be there once and not be empty"),
    "a topic twice": (lambda raw: raw["topics"].append(raw["topics"][0]), "conclusion, pleomorphism: each must"),
    "a topic without a name": (lambda raw: raw["topics"].append(""), "pleomorphism, crowding, conclusion, : each"),
    "a mean of two channels": (
        lambda raw: raw["parts"]["train"].update(image_mean=[0.5, 0.5]),
        "part 'train': 'image_mean' must be three numbers from 0 to 1",
    ),
    "a deviation that is no number": (
        lambda raw: raw["parts"]["val"].update(image_std=[0.5, float("nan"), 0.5]),
        "part 'val': 'image_std' must be three numbers from 0 to 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_cannot_be_right(name: str, copied: Set) -> None:
    edit, message = MANIFESTS[name]
    path = edited(copied, edit)
    for read in (lambda: load_manifest(copied.folder), LocalSource(copied.folder).manifest):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_a_manifest_that_is_no_file_is_not_opened(copied: Set) -> None:
    path = copied.folder / MANIFEST_NAME
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        LocalSource(copied.folder).manifest()
