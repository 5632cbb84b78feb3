"""CIFAR in each of its forms to shards and back, and files that are damaged or hostile."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_shards.import_cifar import IMAGE_BYTES, import_cifar, read_cifar
from data_shards.plain_pickle import PickledArray, read_plain_pickle
from data_shards.verify import verify_set
from mdnet_dist.errors import InputError
from mdnet_dist.images import decode_image, encode_jpeg
from mdnet_dist.reading import read_shard
from mdnet_dist.shards import load_manifest
from mdnet_dist.storage import LocalSource
from tests.conftest import REPOSITORY, shared_data

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # {file: (N x 3072 bytes, N labels)}


def random_arrays(files: list[str], classes: int, count: int = 6) -> Arrays:
    rng = np.random.default_rng(len(files))
    return {
        file: (rng.integers(0, 256, (count, IMAGE_BYTES), dtype=np.uint8), rng.integers(0, classes, count))
        for file in files
    }


def ten_files() -> list[str]:
    return [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


# ------------------------------------------------------------------------------------- pickles as Python 2 wrote them


def python2_batch(images: np.ndarray, labels: list[int], key: str = "labels") -> bytes:
    """Protocol 2 with byte strings and numpy's old module names, opcode by opcode as cPickle wrote it."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01"
    array += number(images.shape[0]) + number(images.shape[1]) + b"\x86" + dtype + b"\x89" + text(images.tobytes())
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    pieces = [text(b"batch_label"), text(b"training batch 1 of 5"), text(key.encode()), listed, text(b"data")]
    return b"\x80\x02}q\x01(" + b"".join(pieces) + array + b"tbu."


def write_python_10(folder: Path, arrays: Arrays) -> None:
    """The files of cifar-10-batches-py."""
    folder.mkdir()
    for file, (images, labels) in arrays.items():
        (folder / file).write_bytes(python2_batch(images, labels.tolist()))
    (folder / "batches.meta").write_bytes(pickle.dumps({"num_cases_per_batch": 6, "label_names": TEN}, 0))


def write_binary_10(folder: Path, arrays: Arrays) -> None:
    """The files of cifar-10-batches-bin."""
    folder.mkdir()
    for file, (images, labels) in arrays.items():
        records = np.concatenate([labels.astype(np.uint8)[:, None], images], axis=1)
        (folder / f"{file}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")


def stored(folder: Path) -> dict[str, list[tuple[str, np.ndarray]]]:
    """{part: label and pixels of its samples by key} of a shard set, which must be sound."""
    assert list(verify_set(folder)) == []
    manifest, parts = load_manifest(folder), {}
    assert manifest.topics == [] and manifest.vocabulary == []
    for part in manifest.parts:
        samples = [sample for shard in manifest.shards_of([part]) for sample in read_shard(LocalSource(folder), shard)]
        samples.sort(key=lambda sample: sample.key)
        assert all(sample.record.reports == [] for sample in samples)
        parts[part] = [
            (str(sample.record.label), np.asarray(decode_image(sample.image, sample.key))) for sample in samples
        ]
    return parts


def assert_holds(folder: Path, arrays: Arrays, classes: list[str]) -> None:
    """All pixels and labels, in the order of the files."""
    parts = stored(folder)
    assert load_manifest(folder).classes == classes
    for part in ("train", "test"):
        files = [file for file in arrays if file.startswith("test") == (part == "test")]
        expected = [
            (classes[label], image.reshape(3, 32, 32).transpose(1, 2, 0))
            for file in files
            for image, label in zip(*arrays[file], strict=True)
        ]
        assert [label for label, _ in parts[part]] == [label for label, _ in expected]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(parts[part], expected, strict=True))


@pytest.mark.parametrize("write", [write_python_10, write_binary_10])
def test_cifar_10_keeps_every_pixel_and_label(tmp_path: Path, write: Callable[[Path, Arrays], None]) -> None:
    arrays = random_arrays(ten_files(), 10)
    write(tmp_path / "source", arrays)
    import_cifar(tmp_path / "source", tmp_path / "set", samples_per_shard=7)
    assert_holds(tmp_path / "set", arrays, TEN)


@pytest.mark.parametrize("labels", ["fine", "coarse"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar_100_has_both_kinds_of_labels(tmp_path: Path, labels: Any, binary: bool, protocol: int) -> None:
    arrays = random_arrays(["train", "test"], 20)
    names = {"fine": [f"fine {n}" for n in range(100)], "coarse": [f"coarse {n}" for n in range(20)]}
    source = tmp_path / "source"
    source.mkdir()
    for file, (images, coarse) in arrays.items():
        fine = coarse * 5 + 3
        if binary:
            records = np.concatenate([np.stack([coarse, fine], axis=1).astype(np.uint8), images], axis=1)
            (source / f"{file}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"coarse_labels": coarse, "fine_labels": list(fine), "data": images, "filenames": ["x.png"] * 6}
            (source / file).write_bytes(pickle.dumps(batch, protocol))
    if binary:
        for kind, listed in names.items():
            (source / f"{kind}_label_names.txt").write_text("\n".join(listed))
    else:
        meta = {f"{kind}_label_names": [name.encode() for name in listed] for kind, listed in names.items()}
        (source / "meta").write_bytes(pickle.dumps(meta, protocol))
    import_cifar(source, tmp_path / "set", labels=labels)
    wanted = {
        file: (images, coarse * 5 + 3 if labels == "fine" else coarse) for file, (images, coarse) in arrays.items()
    }
    assert_holds(tmp_path / "set", wanted, names[labels])


def write_folder(folder: Path, per_class: int = 4) -> dict[str, list[tuple[str, bytes]]]:
    """JPEG files and labels.csv; {split: class and file in the order of names}."""
    rng = np.random.default_rng(0)
    lines, files = ["split,file,label,class"], {"train": [], "test": []}  # type: ignore[var-annotated]
    for split in files:
        for number, name in enumerate(["cat", "ant"]):
            for index in range(per_class):
                path = folder / split / name / f"{index:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_jpeg(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))))
                lines.append(f"{split},{path.relative_to(folder)},{number},{name}")
                files[split].append((name, path.read_bytes()))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return files


def test_a_folder_keeps_its_files(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "source")
    import_cifar(tmp_path / "source", tmp_path / "set")
    manifest = load_manifest(tmp_path / "set")
    assert manifest.classes == ["cat", "ant"], "in the order of their numbers"
    for part, wanted in files.items():
        found = [
            sample
            for shard in manifest.shards_of([part])
            for sample in read_shard(LocalSource(tmp_path / "set"), shard)
        ]
        assert sorted((str(s.record.label), s.image) for s in found) == sorted(wanted)


def test_real_files_keep_their_bytes(tmp_path: Path) -> None:
    source = shared_data("cifar10_jpeg")
    samples = read_cifar(source).samples
    assert len(samples) == 6000
    for sample in samples[::500]:
        split, name, number = sample.key.split("-")
        assert sample.load().image == (source / split / name / f"{number}.jpg").read_bytes()
        assert (sample.split, sample.record.label) == (split, name)


@pytest.mark.parametrize(("validation", "of_each"), [(2, [1, 1]), (3, [1, 2]), (6, [3, 3])])
def test_validation_takes_of_each_class_alike_and_only_from_training(
    tmp_path: Path, validation: int, of_each: list[int]
) -> None:
    files = write_folder(tmp_path / "source")
    for name in ("one", "two"):
        import_cifar(tmp_path / "source", tmp_path / name, validation=validation)
    manifest = load_manifest(tmp_path / "one")
    assert sorted(manifest.parts["val"].labels.values()) == of_each
    assert manifest.parts["train"].samples == 8 - validation
    assert manifest.parts["test"].samples == len(files["test"])
    assert manifest == load_manifest(tmp_path / "two")


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    write_folder(tmp_path / "source")
    command = [sys.executable, "-m", "data_shards", "import-cifar", str(tmp_path / "source"), "--out"]
    ended = subprocess.run(
        [*command, str(tmp_path / "set"), "--val", "2"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert "no topics" in ended.stdout and "- cat" in ended.stdout
    ended = subprocess.run(
        [*command, str(tmp_path / "two"), "--val", "8"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 2
    assert ended.stderr == "data_shards: --val 8: there are 8 training images, and some must stay\n"
    assert not (tmp_path / "two").exists()


# -------------------------------------------------------------------------------------------------------- wrong sources


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rewrite(path: Path, **changes: Any) -> None:
    batch = {"data": np.zeros((2, IMAGE_BYTES), np.uint8), "labels": [1, 2]} | changes
    path.write_bytes(pickle.dumps({key: value for key, value in batch.items() if value is not None}, 2))


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda s: (s / "data_batch_3").unlink(), ["data_batch_3", "No such file"]),
        (lambda s: (s / "batches.meta").unlink(), ["batches.meta", "No such file"]),
        (lambda s: truncate(s / "data_batch_2"), ["data_batch_2", "damaged"]),
        (lambda s: rewrite(s / "test_batch", labels=[1]), ["test_batch", "2 images", "(1,)"]),
        (lambda s: rewrite(s / "test_batch", labels=[1, 10]), ["test_batch", "label 10", "10 classes"]),
        (lambda s: rewrite(s / "test_batch", labels=[1, -1]), ["test_batch", "label -1"]),
        (lambda s: rewrite(s / "test_batch", labels=[1, 2.5]), ["test_batch: labels", "integers"]),
        (lambda s: rewrite(s / "test_batch", labels=[1, 10**30]), ["test_batch: labels"]),
        (lambda s: rewrite(s / "test_batch", labels=None), ["test_batch", "no 'labels'"]),
        (lambda s: rewrite(s / "test_batch", data=np.zeros((2, 5), np.uint8)), ["test_batch", "N x 3072", "(2, 5)"]),
        (lambda s: rewrite(s / "test_batch", data=np.zeros((2, IMAGE_BYTES), "i8")), ["test_batch", "int64"]),
        (lambda s: rewrite(s / "test_batch", data=np.zeros((2, IMAGE_BYTES), "f4")), ["test_batch: data", "integers"]),
        (lambda s: rewrite(s / "test_batch", data=np.array([1, "x"], object)), ["test_batch: data"]),
        (
            lambda s: (s / "batches.meta").write_bytes(pickle.dumps({"label_names": "abc"}, 2)),
            ["batches.meta", "names"],
        ),
    ],
)
def test_a_broken_python_version_is_named(tmp_path: Path, break_it: Callable[[Path], None], named: list[str]) -> None:
    write_python_10(tmp_path / "source", random_arrays(ten_files(), 10))
    break_it(tmp_path / "source")
    assert not lacking(named, refusal(tmp_path))


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["split,file,class"], ["labels.csv", "no column 'label'"]),
        ([], ["labels.csv", "no column 'split'"]),
        (["split,file,label,class"], ["labels.csv", "no images"]),
        (["split,file,label,class", "train,../x.jpg,0,cat"], ["line 2", "stay inside"]),
        (["split,file,label,class", "train,x.jpg,0,cat"], ["line 2", "no such file"]),
        (["split,file,label,class", "train,a.jpg"], ["line 2", "'label'"]),
        (["split,file,label,class", "train,a.jpg,zero,cat"], ["line 2", "label 'zero'"]),
        (["split,file,label,class", "early,a.jpg,0,cat"], ["line 2", "split 'early'"]),
        (["split,file,label,class", "train,a.jpg,1,cat"], ["labels.csv", "from 0", "cat 1"]),
        (["split,file,label,class", "train,a.jpg,0,cat", "train,b.jpg,0,dog"], ["labels.csv", "cat 0, dog 0"]),
        (["split,file,label,class", "train,a.jpg,0,cat", "train,b.jpg,1,cat"], ["line 3", "class 'cat'"]),
        (["split,file,label,class", "train,a.jpg,0,cat", "test,a.jpg,0,cat"], ["line 3", "twice"]),
        (["split,file,label,class", "train,c.jpg,0,cat"], ["line 2", "not a JPEG"]),
    ],
)
def test_a_broken_folder_is_named(tmp_path: Path, lines: list[str], named: list[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (source / name).write_bytes(encode_jpeg(Image.new("RGB", (32, 32), "red" if name == "a.jpg" else "blue")))
    (source / "c.jpg").write_text("no image")
    (source / "labels.csv").write_text("\n".join(lines))
    assert not lacking(named, refusal(tmp_path))


def test_other_sources_are_refused(tmp_path: Path) -> None:
    assert not lacking(["source", "no such folder"], refusal(tmp_path))
    (tmp_path / "source").mkdir()
    assert not lacking(["source", "not CIFAR", "labels.csv"], refusal(tmp_path))
    write_binary_10(tmp_path / "ten", random_arrays(ten_files(), 10))
    with pytest.raises(InputError, match="only CIFAR-100 has coarse labels"):
        import_cifar(tmp_path / "ten", tmp_path / "set", labels="coarse")
    truncate(tmp_path / "ten" / "data_batch_4.bin")
    with pytest.raises(InputError, match=r"data_batch_4\.bin: 18,437 bytes are not records of 3,073"):
        import_cifar(tmp_path / "ten", tmp_path / "set")


def refusal(tmp_path: Path) -> str:
    """What the import says instead of making a set."""
    with pytest.raises(InputError) as refused:
        import_cifar(tmp_path / "source", tmp_path / "set")
    assert not (tmp_path / "set").exists()
    return str(refused.value)


def lacking(named: list[str], message: str) -> list[str]:
    """What a message should name and does not."""
    return [name for name in named if name not in message]


# ------------------------------------------------------------------------------------------------------ hostile pickles


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def hashing_bomb() -> bytes:
    """A dictionary whose key is a tuple of twice the same tuple, sixty times: hashing it takes 2^60 steps."""
    doubled = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    return b"\x80\x02})" + doubled + b"K\x01s."


def text_bomb() -> bytes:
    """A megabyte of text that is turned into bytes twenty thousand times and kept."""
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x00"
    head = b"\x80\x02c_codecs\nencode\nq\x01" + b"U\x06latin1q\x02" + text + b"]("
    return head + b"h\x01h\x00h\x02\x86R" * 20_000 + b"e."


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (pickle.dumps({"data": Calls(os.system, "touch HERE")}, 2), "posix.system"),
    "os.system, protocol 4": (pickle.dumps({"data": Calls(os.system, "touch HERE")}, 4), "posix.system"),
    "builtins.eval": (pickle.dumps({"data": Calls(eval, "1")}, 4), "builtins.eval"),
    "getattr": (pickle.dumps({"data": Calls(getattr, "", "join")}, 2), "getattr"),
    "bytearray of a terabyte": (pickle.dumps({"data": Calls(bytearray, 1 << 40)}, 4), "builtins.bytearray"),
    "numpy.zeros": (pickle.dumps({"data": Calls(np.zeros, 1 << 40)}, 4), "numpy.zeros"),
    "INST": (b"(S'touch HERE'\nios\nsystem\n.", "damaged"),
    "NEWOBJ": (b"\x80\x02cnumpy\nndarray\n)\x81.", "damaged"),
    "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "numpy.ndarray.__init__"),
    "an extension code": (b"\x80\x02\x82\x01.", "damaged"),
    "a persistent id": (b"\x80\x02U\x01xQ.", "damaged"),
    "a memo entry far away": (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "dictionary"),
    "BYTEARRAY8 of exabytes": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".", "damaged"),
    "a frame of exabytes": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}", "damaged"),
    "a string of exabytes": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".", "damaged"),
    "a state for a function": (b"\x80\x02cnumpy.core.multiarray\nscalar\n}U\x01aK\x01sb.", "damaged"),
    "a state for a class": (b"\x80\x02cnumpy\nndarray\n(K\x01K\x02K\x03K\x04K\x05tb.", "damaged"),
    "a call of a call": (b"\x80\x02" + ARRAY + b")R.", "damaged"),
    "hashing for ever": (hashing_bomb(), "a key that is not a string"),
    "texts to bytes": (text_bomb(), "dictionary"),
    "nothing": (b"", "damaged"),
    "no stack": (b"\x80\x02.", "damaged"),
    "a list": (b"\x80\x02].", "dictionary"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    content, named = HOSTILE[what]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "batch"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(InputError) as refused:
        read_plain_pickle(path)
    assert str(path) in str(refused.value) and named in str(refused.value)
    assert time.monotonic() - started < 5
    assert not (tmp_path / "HERE").exists()


def test_the_hostile_pickles_are_hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["os.system"][0])
    assert (tmp_path / "HERE").exists()


@pytest.mark.parametrize("shape", [(1 << 40, IMAGE_BYTES), (10**5000,), (-1, -4), (2,) * 60, (True, 4), "x"])
def test_an_array_is_as_large_as_its_bytes(tmp_path: Path, shape: Any) -> None:
    array = PickledArray()
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": np.arange(4, dtype=np.uint8)}, 2))
    array = read_plain_pickle(path)["data"]
    assert array.values().tolist() == [0, 1, 2, 3]
    array.shape = shape
    with pytest.raises(ValueError):
        array.values()


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6),
    kind=st.sampled_from(["i1", "u1", "<i4", ">i4", "i8", ">u2"]),
    order=st.sampled_from("CF"),
    protocol=st.sampled_from([0, 1, 2, 3, 4, 5]),
    scalars=st.booleans(),
)
def test_arrays_of_integers_are_read_as_numpy_wrote_them(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], kind: str, order: Any, protocol: int, scalars: bool
) -> None:
    array = np.array(values).astype(kind).reshape(2, 3).copy(order=order)
    path = tmp_path_factory.getbasetemp() / "array"
    path.write_bytes(pickle.dumps({"a": array, "b": list(array[0]) if scalars else 0, "c": ["é", None, 1.5]}, protocol))
    read = read_plain_pickle(path)
    assert read["a"].values().dtype == array.dtype and np.array_equal(read["a"].values(), array)
    assert read["b"] == (array[0].tolist() if scalars else 0)
    assert read["c"] == ["é", None, 1.5]


@settings(max_examples=300, deadline=2000)
@given(seed=st.integers(0, 2**32), source=st.sampled_from(["python 2", "2", "4", "5"]))
def test_a_mutated_pickle_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int, source: str) -> None:
    images, labels = np.arange(2 * IMAGE_BYTES).astype(np.uint8).reshape(2, -1), [3, 4]
    if source == "python 2":
        content = bytearray(python2_batch(images, labels))
    else:
        content = bytearray(pickle.dumps({"data": images, "labels": np.array(labels), "n": labels}, int(source)))
    generator = random.Random(seed)
    # Most of the bytes are pixels: hit the others.
    places = [place for place in range(len(content)) if place < 250 or place > len(content) - 250]
    for _ in range(generator.randint(1, 6)):
        place = generator.choice(places) % len(content)
        match generator.randrange(3):
            case 0:
                content[place] = generator.randrange(256)
            case 1:
                del content[place : place + generator.randint(1, 4)]
            case 2:
                content[place:place] = generator.choice(
                    [b"(", b"}", b"]", b"R", b"b", b"q\x05", b"h\x01", b"\x85", b"s"]
                )
    path = tmp_path_factory.getbasetemp() / "test_batch"
    path.write_bytes(bytes(content))
    from data_shards.import_cifar import _read_pickle

    try:
        batch = _read_pickle(path, "labels")
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert batch.images.shape[1:] == (3, 32, 32) and len(batch.images) == len(batch.labels)


@settings(max_examples=100, deadline=2000)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    try:
        assert type(read_plain_pickle(path)) is dict
    except InputError as error:
        assert str(path) in str(error)


def test_python_itself_reads_the_written_batches_alike() -> None:
    """The batches that these tests write are what Python takes for such files."""
    images, labels = next(iter(random_arrays(ten_files(), 10).values()))
    batch = pickle.load(io.BytesIO(python2_batch(images, labels.tolist())), encoding="bytes")
    assert np.array_equal(batch[b"data"], images) and batch[b"labels"] == labels.tolist()
