"""Shard sets: dealing patients, writing, verifying, showing."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_shards.folds import deal_into_folds, dealing_cost, split_off_validation
from data_shards.show import report_lines, show_set
from data_shards.verify import read_shard, verify_set
from data_shards.writer import Sample, write_shards
from mdnet_dist.errors import InputError
from mdnet_dist.images import encode_jpeg, encode_mask, encode_png
from mdnet_dist.shards import SampleRecord, load_manifest
from tests.conftest import REPOSITORY

TOPICS = ["crowding", "conclusion"]
LABELS = ["high grade", "low grade"]

# ---------------------------------------------------------------------------------------------------------------------
# Dealing


@st.composite
def patient_counts(draw: st.DrawFn, fewest: int = 2) -> dict[str, dict[str, int]]:
    labels = ["a", "b", "c", ""][: draw(st.integers(1, 4))]
    patients = draw(st.integers(fewest, 40))
    counts = st.dictionaries(st.sampled_from(labels), st.integers(1, 9), min_size=1)
    return {f"p{number}": draw(counts) for number in range(patients)}


def held(patients: dict[str, dict[str, int]], place: dict[str, int], bins: int) -> np.ndarray:
    """(bins, 1 + labels) images in each bin."""
    labels = sorted({label for counts in patients.values() for label in counts})
    table = np.zeros((bins, 1 + len(labels)))
    for patient, number in place.items():
        for label, images in patients[patient].items():
            table[number, [0, 1 + labels.index(label)]] += images
    return table


@settings(max_examples=60, deadline=None)
@given(patients=patient_counts(), folds=st.integers(2, 6))
def test_folds_hold_every_patient_once_and_no_move_would_balance_them_better(
    patients: dict[str, dict[str, int]], folds: int
) -> None:
    if len(patients) < folds:
        with pytest.raises(InputError, match=f"{len(patients)} patients"):
            deal_into_folds(patients, folds)
        return
    fold_of = deal_into_folds(patients, folds)
    assert fold_of.keys() == patients.keys()
    assert set(fold_of.values()) == set(range(folds))
    assert fold_of == deal_into_folds(dict(reversed(patients.items())), folds), "depends on the order of the input"
    shares = np.full(folds, 1 / folds)
    cost = dealing_cost(held(patients, fold_of, folds), shares)
    for patient, fold in fold_of.items():
        for other in set(range(folds)) - {fold}:
            moved = dealing_cost(held(patients, {**fold_of, patient: other}, folds), shares)
            assert moved >= cost - 1e-6


def test_folds_of_bcidr_size_are_level() -> None:
    # 32 patients of 10 to 60 images, mostly of one class each: what cross-validation in the paper deals.
    generator = np.random.default_rng(3)
    patients = {}
    for number in range(32):
        main, images = "abcd"[number % 4], int(generator.integers(10, 61))
        patients[f"p{number}"] = {main: images - 5, "abcd"[(number + 1) % 4]: 5}
    table = held(patients, deal_into_folds(patients, 5), 5)
    share = table / table.sum(axis=0)
    assert np.abs(share[:, 0] - 0.2).max() < 0.02, "images"
    assert np.abs(share[:, 1:] - 0.2).max() < 0.08, "images of each label"


def test_many_small_patients_are_dealt_almost_exactly() -> None:
    patients = {f"p{number:03d}": {"abc"[number % 3]: 1} for number in range(150)}
    assert (held(patients, deal_into_folds(patients, 5), 5) == [[30, 10, 10, 10]] * 5).all()


@settings(max_examples=100, deadline=None)
@given(patients=patient_counts(), share=st.floats(0.01, 0.99))
def test_validation_takes_some_patients_and_leaves_some(patients: dict[str, dict[str, int]], share: float) -> None:
    chosen = split_off_validation(patients, share)
    assert 0 < len(chosen) < len(patients)
    assert chosen == split_off_validation(dict(reversed(patients.items())), share)


def test_validation_has_its_share_of_images_and_labels() -> None:
    patients = {f"p{number:03d}": {"ab"[number % 2]: 1 + number % 5} for number in range(100)}
    chosen = split_off_validation(patients, 0.15)
    images = Counter(label for patient in chosen for label, count in patients[patient].items() for _ in range(count))
    assert abs(sum(images.values()) / 300 - 0.15) < 0.01
    assert abs(images["a"] / 150 - 0.15) < 0.02


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        split_off_validation({"a": {"x": 1}, "b": {"x": 1}}, share)


def test_one_fold_or_one_patient_is_too_few() -> None:
    with pytest.raises(InputError, match="at least 2"):
        deal_into_folds({"a": {"x": 1}}, 1)
    with pytest.raises(InputError, match="at least two training patients"):
        split_off_validation({"a": {"x": 1}}, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def make_sample(number: int, split: str | None = "train", patients: int = 5, **changes: object) -> Sample:
    """Samples 0, 5, 10... are of patient 0; the first half of a hundred is of one class, the second of the other."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    label = LABELS[number >= 50]
    sample = Sample(
        key=f"image-{number:03d}",
        split=split,
        image=encode_png(Image.fromarray(pixels)),
        extension="png",
        mask=encode_mask(pixels[..., 0] > 99) if number % 2 else None,
        extra_masks={"mitosis": encode_mask(pixels[..., 1] > 99)} if number % 3 == 0 else {},
        record=SampleRecord(
            patient=f"{split}-{number % patients}",
            label=label,
            reports=[
                {"conclusion": f"{label.upper()}.", "crowding": "Nuclei are crowded, mildly."},
                {"conclusion": label},
            ],
            grades={"crowding": "mild"} if number % 2 else {},
        ),
    )
    return replace(sample, **changes)  # type: ignore[arg-type]


def write(samples: list[Sample], out: Path, **options: object) -> None:
    write_shards(samples, out, name="test set", **{"topics": TOPICS, **options})  # type: ignore[arg-type]


def three_parts() -> list[Sample]:
    return [make_sample(n, split) for split, many in (("train", 20), ("val", 5), ("test", 6)) for n in range(many)]


def unique(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, key=f"{sample.split}-{sample.key}") for sample in samples]


def record_with(**changes: object) -> SampleRecord:
    return replace(make_sample(1).record, **changes)  # type: ignore[arg-type]


def test_a_set_has_what_was_put_in(tmp_path: Path) -> None:
    samples = unique(three_parts())
    write(samples, tmp_path / "set", samples_per_shard=8)
    assert list(verify_set(tmp_path / "set")) == []
    manifest = load_manifest(tmp_path / "set")
    assert [(shard.file, shard.samples) for shard in manifest.shards] == [
        ("train-000000.tar", 6),
        ("train-000001.tar", 7),
        ("train-000002.tar", 7),
        ("val-000000.tar", 5),
        ("test-000000.tar", 6),
    ]
    assert manifest.classes == ["high grade"]
    assert manifest.vocabulary == ["are", "crowded", "grade", "high", "mildly", "nuclei"]
    found = {}
    for shard in manifest.shards:
        for key, members in read_shard(tmp_path / "set" / shard.file):
            assert key.startswith(shard.part)
            found[key] = members
    assert found.keys() == {sample.key for sample in samples}
    for sample in samples:
        expected = {sample.extension: sample.image}
        if sample.mask is not None:
            expected["mask.png"] = sample.mask
        expected.update({f"{name}_mask.png": mask for name, mask in sample.extra_masks.items()})
        members = dict(found[sample.key])
        record = json.loads(members.pop("json"))
        assert members == expected
        assert {"grades": {}, **record} == asdict(sample.record)
        assert list(record["reports"][0]) == TOPICS, "topics in the order in which a report says them"


def test_statistics_are_those_of_the_samples(tmp_path: Path) -> None:
    samples = [make_sample(n, extra_masks={}) for n in (0, 1, 60)]
    small = np.full((2, 2, 3), 90, dtype=np.uint8)
    samples[0] = replace(samples[0], image=encode_png(Image.fromarray(small)))
    samples[1] = replace(samples[1], record=replace(samples[1].record, label=None))
    write(samples, tmp_path / "set")
    said = load_manifest(tmp_path / "set").parts["train"]
    assert (said.samples, said.patients, said.longest_sentence) == (3, 2, 4)
    assert said.labels == {"high grade": 1, "low grade": 1}
    assert said.conclusions == {"high grade": {"high grade": 2}, "low grade": {"low grade": 2}}
    assert said.words == {"are": 3, "crowded": 3, "mildly": 3, "nuclei": 3, "grade": 6, "high": 4, "low": 2}
    # Each image counts once, whatever its size: the small one is a third of the mean.
    images = [np.asarray(Image.open(io.BytesIO(sample.image))) / 255 for sample in samples]
    same_size = np.stack([np.broadcast_to(images[0][:1, :1], images[1].shape), *images[1:]])
    assert said.image_mean == pytest.approx(same_size.mean(axis=(0, 1, 2)), abs=1e-6)
    assert said.image_std == pytest.approx(same_size.std(axis=(0, 1, 2)), abs=1e-6)


def test_the_same_samples_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    samples = unique(three_parts())
    write(samples, tmp_path / "a", samples_per_shard=8, classes=LABELS)
    write(samples[::-1], tmp_path / "b", samples_per_shard=8, classes=LABELS)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "val-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_sorted_input_does_not_give_a_shard_of_one_class(tmp_path: Path) -> None:
    write([make_sample(n) for n in range(100)], tmp_path / "set", samples_per_shard=25)
    for shard in load_manifest(tmp_path / "set").shards:
        labels = Counter(
            json.loads(members["json"])["label"] for _, members in read_shard(tmp_path / "set" / shard.file)
        )
        assert min(labels[label] for label in LABELS) >= 5


def test_samples_without_a_split_are_dealt_into_folds_by_patient(tmp_path: Path) -> None:
    write([make_sample(n, None, patients=20) for n in range(100)], tmp_path / "set", folds=5)
    manifest = load_manifest(tmp_path / "set")
    assert manifest.folds == 5 and list(manifest.parts) == [f"fold{n}" for n in range(5)]
    assert [statistics.samples for statistics in manifest.parts.values()] == [20] * 5
    assert list(verify_set(tmp_path / "set")) == []  # checks that no patient is in two parts
    assert manifest.vocabulary


# It leaves closing the files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = unique(three_parts())
    samples[0] = replace(samples[0], image=encode_jpeg(Image.new("RGB", (12, 8))), extension="jpg")
    write(samples, tmp_path / "set", samples_per_shard=8)
    files = [str(tmp_path / "set" / shard.file) for shard in load_manifest(tmp_path / "set").shards]
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(files, shardshuffle=False)}
    gc.collect()
    assert read.keys() == {sample.key for sample in samples}
    for sample in samples:
        mine = read[sample.key]
        assert mine[sample.extension] == sample.image
        assert json.loads(mine["json"])["patient"] == sample.record.patient
        assert mine.get("mask.png") == sample.mask
        assert mine.get("mitosis_mask.png") == sample.extra_masks.get("mitosis")


WRONG = {
    "duplicate key": ([make_sample(1), make_sample(1)], "sample 'image-001': duplicate key 'image-001'"),
    "key with a dot": ([make_sample(1, key="a.b")], "key 'a.b' must be 1 to 64 letters"),
    "key that is a path": ([make_sample(1, key="../a")], "key '../a' must be 1 to 64 letters"),
    "key too long": ([make_sample(1, key="k" * 65)], "must be 1 to 64 letters"),
    "unknown topic": (
        [make_sample(1, record=record_with(reports=[{"crowdin": "x"}]))],
        "topic 'crowdin' is not declared; did you mean 'crowding'",
    ),
    "no reports": ([make_sample(1, record=record_with(reports=[]))], "no reports"),
    "empty report": ([make_sample(1, record=record_with(reports=[{"crowding": "x"}, {}]))], "report 2 is empty"),
    "empty sentence": (
        [make_sample(1, record=record_with(reports=[{"crowding": " ."}]))],
        "report 1: the sentence on 'crowding' is empty",
    ),
    "unknown label": (
        [make_sample(1, record=record_with(label="low grad"))],
        "label 'low grad' is not a class; did you mean 'low grade'",
    ),
    "patient in two splits": (
        [make_sample(1), make_sample(2, "test", record=record_with())],
        "patient 'train-1' is in test, but in train at sample 'image-001'",
    ),
    "unknown split": ([make_sample(1, "training")], "split 'training'; did you mean 'train'"),
    "no split and no folds": ([make_sample(1, None)], "no split; give every sample one of"),
    "undecodable image": (
        [make_sample(1, image=b"\x89PNG broken")],
        "sample 'image-001': image: .*does not decode|not a",
    ),
    "wrong extension": ([make_sample(1, extension="jpg")], "is not the 'jpg' it is called"),
    "other extension": ([make_sample(1, extension="gif")], "is not the 'gif' it is called"),
    "mask of another size": (
        [make_sample(1, mask=encode_mask(np.ones((12, 8), bool)))],
        "mask is 8 x 12 and its image 12 x 8",
    ),
    "undecodable mask": ([make_sample(1, mask=b"nothing")], "sample 'image-001': mask: not a"),
    "mask name": ([make_sample(1, extra_masks={"a.b": encode_mask(np.ones((8, 12), bool))})], "mask name 'a.b'"),
    "nothing": ([], "no samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_samples_are_named_and_leave_nothing_behind(case: str, tmp_path: Path) -> None:
    samples, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        write(samples, tmp_path / "set", classes=LABELS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topics": ["crowding", "conclusion", "crowding"]}, "each must be given once"),
        ({"classes": ["high grade", ""]}, "not be empty"),
        ({"samples_per_shard": 0}, "at least 1"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write([make_sample(1)], tmp_path / "set", **options)


def test_some_splits_and_folds_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'image-002': no split, but sample 'image-001' is in train"):
        write([make_sample(1), make_sample(2, None)], tmp_path / "set", folds=2)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Sample]:
        yield make_sample(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path / "set", name="x", topics=TOPICS)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError, match=r"set: cannot be written \(File too large\)"):
            write([make_sample(n) for n in range(50)], tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_program_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    program = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "data_shards",
            "synth",
            "--out",
            str(tmp_path / "set"),
            "--images",
            "5000",
            "--size",
            "64",
        ],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Not before the first sample is written: a worker process that is just starting would say that it was cut off.
    while not any(spool.stat().st_size for spool in tmp_path.glob(".set.*/spool")):
        assert program.poll() is None, program.stderr and program.stderr.read()
        time.sleep(0.05)
    program.send_signal(number)
    _, said = program.communicate(timeout=60)
    assert program.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_only_shard_sets_are_replaced_and_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    write([make_sample(1)], out)  # an empty folder may be used
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"is not empty; .*--force"):
        write([make_sample(2)], out)
    with pytest.raises(InputError, match="no reports"):
        write([make_sample(2, record=record_with(reports=[]))], out, force=True)
    assert (out / "manifest.json").read_bytes() == before, "the old set must survive a failed replacement"
    write([make_sample(n) for n in range(3)], out, force=True)
    assert load_manifest(out).parts["train"].samples == 3
    (out / "thesis.doc").write_text("years of work")
    with pytest.raises(InputError, match="--force replaces shard sets only"):
        write([make_sample(1)], out, force=True)
    assert (out / "thesis.doc").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    with pytest.raises(InputError, match="is a file"):
        write([make_sample(1)], out / "manifest.json")
    with pytest.raises(InputError, match="cannot be written"):
        write([make_sample(1)], out / "manifest.json" / "set")


# ---------------------------------------------------------------------------------------------------------------------
# Verifying and showing


@pytest.fixture
def shard_set(tmp_path: Path) -> Path:
    write(unique(three_parts()), tmp_path / "set", samples_per_shard=10)
    return tmp_path / "set"


def rewrite(folder: Path, file: str, members: list[tuple[str, bytes]]) -> None:
    """Replace a shard and its checksum, as somebody who builds shards with another program would."""
    with tarfile.open(folder / file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    agree(folder)


def agree(folder: Path) -> None:
    """Make sizes and checksums of the manifest those of the files."""
    raw = json.loads((folder / "manifest.json").read_text())
    for shard in raw["shards"]:
        content = (folder / shard["file"]).read_bytes()
        shard.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(raw))


def members_of(folder: Path, file: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{end}", raw) for key, files in read_shard(folder / file) for end, raw in files.items()]


def test_verify_finds_damage_to_files(shard_set: Path) -> None:
    shard = shard_set / "train-000001.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:-512])
    assert "bytes, but the manifest says" in next(verify_set(shard_set))
    damaged = bytearray(good)
    damaged[2000] ^= 1
    shard.write_bytes(damaged)
    assert "train-000001.tar: checksum" in next(verify_set(shard_set))
    shard.unlink()
    assert "train-000001.tar: no such file" in next(verify_set(shard_set))
    shard.symlink_to("train-000000.tar")
    assert "train-000001.tar: no such file" in next(verify_set(shard_set))
    shard.unlink()
    shard.write_bytes(good)
    (shard_set / "train-000009.tar").write_bytes(good)
    assert list(verify_set(shard_set)) == [f"{shard_set / 'train-000009.tar'}: is not in the manifest"]


def test_verify_finds_damage_to_samples(shard_set: Path) -> None:
    file = "val-000000.tar"
    good = members_of(shard_set, file)
    names = [name for name, _ in good]
    json_at = next(n for n, name in enumerate(names) if name.endswith(".json"))
    image_at = next(n for n, name in enumerate(names) if name.endswith(".png") and "mask" not in name)
    record = json.loads(good[json_at][1])

    another = "val-0" if record["patient"] == "val-1" else "val-1"

    def with_record(**changes: object) -> list[tuple[str, bytes]]:
        raw = json.dumps({**record, **changes}).encode()
        return [*good[:json_at], (names[json_at], raw), *good[json_at + 1 :]]

    cases: list[tuple[list[tuple[str, bytes]], str]] = [
        (good[:json_at] + good[json_at + 1 :], "no record"),
        (good[:image_at] + good[image_at + 1 :], "0 images"),
        ([*good[: json_at + 1], (names[json_at][:-4] + "jpg", b""), *good[json_at + 1 :]], "2 images"),
        ([*good[: json_at + 1], good[json_at], *good[json_at + 1 :]], "is there twice"),
        ([*good, good[image_at]], "members that are not side by side"),
        ([*good, ("extra.pkl", b"")], "member 'extra.pkl' is none of"),
        ([*good, ("../../evil.json", b"")], "member '../../evil.json' is none of"),
        ([(name, b"{" if name == names[json_at] else raw) for name, raw in good], "not a sample record"),
        ([(name, raw[:99] if name == names[image_at] else raw) for name, raw in good], "does not decode"),
        (with_record(reports=[{"crowd": "x"}]), "topic 'crowd' is not declared"),
        (with_record(reports=[]), "no reports"),
        (with_record(label="benign"), "label 'benign' is not one of the classes high grade"),
        (with_record(patient="train-1"), "patient 'train-1' is in val and in train"),
        (with_record(reports=[{"crowding": "other words"}]), "part 'val': 'words' does not agree"),
        (with_record(patient=another), "part 'val': 'patients' does not agree"),
        (good[: names.index(next(n for n in names if not n.startswith(names[0][:13])))], "1 samples, but .* says 5"),
    ]
    for members, message in cases:
        rewrite(shard_set, file, members)
        problems = list(verify_set(shard_set))
        assert problems, message
        assert re.search(message, problems[0]), (message, problems)
        assert file in problems[0] or "manifest.json" in problems[0]
    rewrite(shard_set, file, good)
    assert list(verify_set(shard_set)) == []
    other = members_of(shard_set, "test-000000.tar")
    rewrite(shard_set, file, [*good, *other])
    assert "duplicate key, also in val-000000.tar" in " ".join(verify_set(shard_set))


def test_verify_checks_pixel_statistics(shard_set: Path) -> None:
    raw = json.loads((shard_set / "manifest.json").read_text())
    raw["parts"]["test"]["image_mean"][1] += 0.001
    raw["vocabulary"].append("zebra")
    (shard_set / "manifest.json").write_text(json.dumps(raw))
    problems = list(verify_set(shard_set))
    assert len(problems) == 2
    assert "part 'test': 'image_mean' does not agree" in problems[0]
    assert "vocabulary" in problems[1]


def test_a_shard_that_is_no_tar_is_named(shard_set: Path) -> None:
    for content in (b"", b"PK\3\4" + bytes(2000), bytes(10240), members_of(shard_set, "val-000000.tar")[0][1]):
        (shard_set / "val-000000.tar").write_bytes(content)
        agree(shard_set)
        assert "val-000000.tar" in next(verify_set(shard_set))


def test_links_and_devices_in_a_shard_are_refused(shard_set: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        with tarfile.open(shard_set / "val-000000.tar", "w") as tar:
            info = tarfile.TarInfo("a.json")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        agree(shard_set)
        assert "member 'a.json' is none of" in next(verify_set(shard_set))


def test_show_draws_a_picture(shard_set: Path, tmp_path: Path) -> None:
    assert show_set(shard_set, tmp_path / "a.png", count=5, masks=True) == 5
    assert show_set(shard_set, tmp_path / "b.png", count=5, masks=False) == 5
    assert show_set(shard_set, tmp_path / "c.png", part="val", count=99) == 5
    first, without, val = (
        np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("a.png", "b.png", "c.png")
    )
    assert first.shape == without.shape and (first != without).any(), "outlines are drawn on request only"
    assert first.shape[1] == val.shape[1]
    assert first.std() > 20
    with pytest.raises(InputError, match=r"part 'vall'.*did you mean 'val'"):
        show_set(shard_set, tmp_path / "d.png", part="vall")
    with pytest.raises(InputError, match=r"must end with \.png"):
        show_set(shard_set, tmp_path / "d.jpg")


def test_show_says_when_samples_are_missing(shard_set: Path, tmp_path: Path) -> None:
    for samples in (19, 10**7):
        raw = json.loads((shard_set / "manifest.json").read_text())
        raw["shards"][0]["samples"] = samples
        raw["shards"][0]["bytes"] = max(raw["shards"][0]["bytes"], samples * 2048)  # else it is refused as it is
        raw["parts"]["train"]["samples"] = sum(shard["samples"] for shard in raw["shards"] if shard["part"] == "train")
        (shard_set / "manifest.json").write_text(json.dumps(raw))
        with pytest.raises(InputError, match="fewer samples than the manifest says"):
            show_set(shard_set, tmp_path / "a.png")


def test_show_draws_any_text(tmp_path: Path) -> None:
    # Dollar signs would start a formula, and no font has all letters.
    text = "costs $x_{ $ and \\frac 細胞 " + "very " * 300 + "long"
    record = record_with(reports=[{"conclusion": text}])
    write([make_sample(1, record=record)], tmp_path / "set", topics=["conclusion"])
    assert show_set(tmp_path / "set", tmp_path / "a.png") == 1
    lines = report_lines({"conclusion": text}, ["conclusion"])
    assert len(lines) == 16 and lines[-1] == "..."
    assert report_lines({"b": "y", "a": "x"}, ["a", "b", "c"]) == ["a: x", "b: y"]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_shards", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_commands_from_drawing_to_showing(tmp_path: Path) -> None:
    out = tmp_path / "set"
    done = command("synth", "--out", out, "--images", 12, "--patients", 4, "--size", 64, "--seed", 7)
    assert done.returncode == 0, done.stderr
    assert "synthetic bladder set" in done.stdout and f"python -m data_shards show {out}" in done.stdout
    done = command("verify", out)
    assert done.returncode == 0 and "everything agrees" in done.stdout
    done = command("show", out, "--out", tmp_path / "a.png", "--count", 3)
    assert done.returncode == 0 and str(tmp_path / "a.png") in done.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000
    (out / "stray").write_text("")
    (out / "train-000000.tar").unlink()
    done = command("verify", out)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"data_shards: {out / 'train-000000.tar'}: no such file, but the manifest lists it\n"
    done = command("verify", "--all", out)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 3 and "2 problems" in done.stderr


def test_synthetic_sets_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = command(
            "synth", "--out", tmp_path / name, "--images", 9, "--patients", 6, "--size", 64, "--folds", 3, "--force"
        )
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "fold0-000000.tar",
        "fold1-000000.tar",
        "fold2-000000.tar",
        "manifest.json",
    ]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "nowhere"],
        ["show", "nowhere"],
        ["import", "nowhere", "--out", "x"],
        ["synth", "--out", "setup.cfg", "--images", "9"],
        ["synth", "--out", "x", "--images", "0"],
        ["import"],
        [],
    ],
)
def test_wrong_commands_end_with_code_2(arguments: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.strip()
    assert not (REPOSITORY / "x").exists()


def test_help_needs_nothing_heavy() -> None:
    code = "import sys, data_shards.__main__ as m; m.build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"numpy", "PIL", "matplotlib", "torch", "pydicom"} & set(done.stdout.split())
