"""Hostile input: nothing in a file is executed, leaves its folder, fills the memory, or reaches a page, a terminal or a
spreadsheet as anything but text. What mutated files do is in tests/test_fuzz.py, where identifiers go in
tests/test_identifiers.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some
from PIL import Image

from data_shards import verify
from data_shards.import_bcidr import read_bcidr
from data_shards.import_cifar import read_cifar
from data_shards.import_manifest import read_manifest
from data_shards.import_r2gen import read_r2gen
from data_shards.importing import ImportOptions, Source, import_source
from data_shards.prepare import open_image
from data_shards.writer import write_shards
from mdnet_dist import console, reading
from mdnet_dist.config import GoogLeNetImageModel, ModelConfig
from mdnet_dist.errors import LONGEST_LINE, InputError, one_line, printable
from mdnet_dist.evaluation import evaluate
from mdnet_dist.explain import Entry, index, page
from mdnet_dist.explain_run import explain, explain_sources
from mdnet_dist.images import MAX_PIXELS, decode_image, decode_mask, scale_to_8_bit
from mdnet_dist.pretrained import pretrained_weights
from mdnet_dist.reading import read_shard, scan_shard
from mdnet_dist.run import draw_evaluation
from mdnet_dist.run_data import open_data, open_part
from mdnet_dist.saved import open_model, saved_config
from mdnet_dist.shards import MANIFEST_NAME, SampleRecord, ShardInfo, load_manifest, parse_record, sha256_of
from mdnet_dist.storage import LocalSource
from mdnet_dist.tracking import RUN_NAME, end_run, run_id_of
from mdnet_dist.tracking_files import METRICS_NAME, UNSENT_NAME, read_metrics
from tests.fuzz_readers import Reader, readers
from tests.saved import untrained_run
from tests.test_explain import explanation
from tests.test_shards import command
from tests.tiny import tiny_config, tiny_sample, tiny_set
from tune.ledger import Ledger
from tune.records import TrialRecord

ESCAPE = "\x1b]0;owned\x07\x1b[2J"

# -------------------------------------------------------------------------------------------------- nothing is executed


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.made,)


def payloads(made: Path) -> Iterator[bytes]:
    """Files that would make a folder if a careless reader had them."""
    for protocol in (0, 2, 4):
        yield pickle.dumps(Payload(made), protocol)
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"a": Payload(made)}, buffer, _use_new_zipfile_serialization=zipped)
        yield buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(made)], dtype=object), allow_pickle=True)
    yield buffer.getvalue()
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "object:os.mkdir"):
        yield f"name: !!python/{tag} ['{made}']\n".encode()
    yield f"data: {{shards: 'pipe:mkdir {made}'}}\nname: $(mkdir {made})\n".encode()
    yield f'__import__("os").mkdir({str(made)!r})'.encode()


@pytest.fixture(scope="module")
def every_reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Reader]]:
    folder, before = tmp_path_factory.mktemp("readers"), Path.cwd()
    os.chdir(folder)
    try:
        yield readers(folder)
    finally:
        os.chdir(before)


def test_no_reader_runs_anything(every_reader: list[Reader], tmp_path: Path) -> None:
    """Every file that is read, replaced by every payload."""
    made = tmp_path / "made"
    refused = 0
    for reader in every_reader:
        for kind in dict.fromkeys(kind for _, _, kind in reader.seeds):
            for payload in payloads(made):
                try:
                    reader.read(payload, kind)
                except InputError as error:
                    refused += 1
                    assert str(error).isprintable()
                assert not made.exists(), (reader.name, kind, payload[:60])
    assert refused > 300
    for payload in (pickle.dumps(Payload(made), protocol) for protocol in (0, 2, 4)):
        pickle.loads(payload)
        assert made.exists(), "the payload is harmless, so the test says nothing"
        made.rmdir()


@pytest.mark.parametrize(
    "address",
    [
        "pipe:mkdir {}",
        "pipe:mkdir {} ::",
        "::pipe:mkdir {}",
        "pipe://mkdir {}",
        "pipe:mkdir {}; exit 0 {{000000..000009}}.tar",
        "exec://mkdir {}",
        "shell::mkdir {}",
        "file:///{}",
        "local://{}",
        "memory://{}",
        "simplecache::file://{}",
        "zip://*::file://{}",
        "$(mkdir {})",
        "`mkdir {}`",
    ],
)
def test_no_program_and_no_other_protocol_is_a_shard_set(address: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(InputError) as refused:
        open_data(tiny_config(tmp_path, tmp_path, {"data.shards": address.format(made)}))
    assert str(refused.value).isprintable()
    assert not made.exists()


# -------------------------------------------------------------------------------------------- no path leaves its folder


def write_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(path)
    return path


def as_manifest(folder: Path, image: str) -> Source:
    line = {"image": image, "patient": "p", "split": "train", "reports": [{"a": "b"}]}
    (folder / "manifest.jsonl").write_text(json.dumps(line))
    return read_manifest(folder)


def as_mask(folder: Path, mask: str) -> Source:
    line = {"image": "Images/good.png", "mask": mask, "patient": "p", "split": "train", "reports": [{"a": "b"}]}
    (folder / "manifest.jsonl").write_text(json.dumps(line))
    return read_manifest(folder)


def as_bcidr(folder: Path, image: str) -> Source:
    """Its images are Images/NAME.png."""
    name = os.path.relpath(image, "Images") if not image.startswith("/") else f"../../../../../../../..{image}"
    caption = "a. b. c. d. e. f"
    annotation = {name.removesuffix(".png"): {"caption": [caption], "label": 0}}
    (folder / "train_annotation.json").write_text(json.dumps(annotation))
    return read_bcidr(folder)


def as_r2gen(folder: Path, image: str) -> Source:
    item = {"id": "CXR1_1", "image_path": [image], "report": "fine"}
    (folder / "annotation.json").write_text(json.dumps({"train": [item]}))
    return read_r2gen(folder)


def as_cifar(folder: Path, image: str) -> Source:
    """Its own importer writes it; that it is read is all that is asked here."""
    (folder / "labels.csv").write_text(f"split,file,label,class\ntrain,{image},0,a\n")
    read_cifar(folder)
    return as_manifest(folder, image)


@pytest.mark.parametrize("write", [as_manifest, as_mask, as_bcidr, as_r2gen, as_cifar])
@pytest.mark.parametrize("way", ["absolute", "climbing", "file link", "folder link", "loop", "pipe", "folder", "none"])
def test_what_is_imported_lies_inside_its_folder(
    write: Callable[[Path, str], Source], way: str, tmp_path: Path
) -> None:
    secret = write_picture(tmp_path / "elsewhere" / "secret.png")
    source = tmp_path / "source"
    write_picture(source / "Images" / "good.png")
    bad = source / "Images" / "bad.png"
    image = "Images/bad.png"
    if way == "absolute":
        image = str(secret)
    elif way == "climbing":
        image = "../elsewhere/secret.png"
    elif way == "file link":
        bad.symlink_to(secret)
    elif way == "folder link":
        (source / "Images" / "linked").symlink_to(secret.parent)
        image = "Images/linked/secret.png"
    elif way == "loop":
        bad.symlink_to("bad.png")
    elif way == "pipe":
        os.mkfifo(bad)
    elif way == "folder":
        bad.mkdir()
    with pytest.raises(InputError, match=r"stay inside|through a link|no such file|cannot be read"):
        import_source(write(source, image), tmp_path / "out", ImportOptions())
    assert not (tmp_path / "out").exists()
    import_source(write(source, "Images/good.png"), tmp_path / "out", ImportOptions(val_share=0.0))


def in_time(work: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What a function returns or raises; a pipe that is opened would wait for ever."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "it waits"
    return result[0]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("file", ["shard", MANIFEST_NAME])
def test_a_shard_set_has_plain_files_of_its_own(kind: str, file: str, tmp_path: Path) -> None:
    manifest = tiny_set(tmp_path / "set")
    path = tmp_path / "set" / (manifest.shards[0].file if file == "shard" else file)
    moved = path.rename(tmp_path / path.name)
    if kind == "link":
        path.symlink_to(moved)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()

    def read() -> object:
        return list(read_shard(LocalSource(tmp_path / "set"), load_manifest(tmp_path / "set").shards[0]))

    if (kind, file) == ("link", MANIFEST_NAME):
        assert len(in_time(read)) == manifest.shards[0].samples, "it is the user who names the manifest's folder"
        return
    assert isinstance(in_time(read), InputError)


@pytest.mark.parametrize(
    "name", ["../set/x.tar", "/etc/passwd", "..", ".", "", "a/b.tar", "a\0.tar", "x" * 300, "\ud800"]
)
def test_names_of_shards_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    tiny_set(tmp_path / "set")
    path = tmp_path / "set" / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["shards"][0]["file"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as refused:
        open_data(tiny_config(tmp_path / "set", tmp_path))
    assert str(refused.value).isprintable() and str(path.parent) in str(refused.value)


def test_a_trial_s_record_names_no_other_folder(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trials")
    ledger.write(TrialRecord(number=1, name="001", point={}))
    assert [trial.name for trial in ledger.read()] == ["001"]
    path = tmp_path / "trials" / "001.json"
    for name in ("../../elsewhere", "/etc", "002", "", "x" * 5000):
        path.write_text(json.dumps({"number": 1, "name": name, "point": {}}))
        with pytest.raises(InputError, match=r"001\.json: is called '.*' inside; give it back the name of its file"):
            ledger.read()
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"001\.json: cannot be read \(Is a directory\)"):
        ledger.read()


def test_explaining_a_folder_follows_no_link_and_waits_for_no_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_set(tmp_path / "set")
    network, card, _ = open_model(untrained_run(tiny_config(tmp_path / "set", tmp_path / "runs"))[0])
    secret = write_picture(tmp_path / "elsewhere" / "secret.png")
    write_picture(tmp_path / "images" / "good.png")
    (tmp_path / "images" / "link.png").symlink_to(secret)
    os.mkfifo(tmp_path / "images" / "pipe.png")
    shown = in_time(lambda: list(explain_sources(network, card, [tmp_path / "images"], open_image)))
    assert [one.key for one in shown] == ["good.png"]
    told = capsys.readouterr().err
    assert "link.png: a link that leaves the folder" in told and "pipe.png: not a file" in told


# ---------------------------------------------------------------------------------------------- a stranger's run folder


POINT = {"step": 1, "time": 2.0, "metrics": {"a": 1.0}}


def test_lines_of_a_run_folder_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    bad = ["[" * 100_000, '{"a":' * 100_000, "7", "null", "[]", '"x"', '{"kind": 3}', '{"kind": ["tags"]}', "\x00", "{"]
    bad += ['{"step": 1e999, "time": 1, "metrics": {}}', '{"step": 1, "time": 1, "metrics": {"a": 1' + "0" * 400 + "}}"]
    bad += ['{"kind": "tags", "values": 3}', '{"kind": "metrics", "values": {}}', '{"kind": "close", "values": {}}']
    lines = "\n".join([*bad, json.dumps(POINT)])
    (tmp_path / METRICS_NAME).write_text(lines)
    assert read_metrics(tmp_path / METRICS_NAME) == [POINT]
    (tmp_path / UNSENT_NAME).write_text("\n".join([*bad, json.dumps({"kind": "tags", "values": {"a": "b"}})]))
    store = {"uri": "http://127.0.0.1:9", "experiment_id": "1", "run_id": "x"}
    (tmp_path / RUN_NAME).write_text(json.dumps(store))
    end_run(tmp_path, "FINISHED", {})
    kept = [json.loads(line) for line in (tmp_path / UNSENT_NAME).read_text().splitlines()]
    assert [one["kind"] for one in kept] == ["metrics", "tags", "tags", "status"], "no store has answered"
    for content in ("[" * 100_000, "7", '{"uri": "x"}'):
        (tmp_path / RUN_NAME).write_text(content)
        with pytest.raises(InputError, match=r"mlflow_run\.json: damaged"):
            run_id_of(tmp_path)


def test_a_run_folder_sends_no_file_of_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("secret")
    run = tmp_path / "run"
    run.mkdir()
    (run / "link").symlink_to(tmp_path / "secret")
    (run / "own").write_text("own")
    places = [
        "own",
        "link",
        "../secret",
        str(tmp_path / "secret"),
        str(run / "own"),
        "a\0b",
        "x" * 5000,
        f"{ESCAPE}/../..",
    ]
    lines = [json.dumps({"kind": "artifact", "path": place, "folder": ""}) for place in places]
    (run / UNSENT_NAME).write_text("\n".join(lines))
    (run / RUN_NAME).write_text(json.dumps({"uri": "http://127.0.0.1:9", "experiment_id": "1", "run_id": "x"}))
    end_run(run, "FINISHED", {})
    kept = [json.loads(line) for line in (run / UNSENT_NAME).read_text().splitlines()]
    assert [one["path"] for one in kept if one["kind"] == "artifact"] == ["own", str(run / "own")]
    told = capsys.readouterr().err
    assert told.count("lies outside") == 6 and "\x1b" not in told


# ---------------------------------------------------------------------------------------------------------------- bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *others: bytes, depth: int = 8, colours: int = 2, body: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=name, **options)
    return buffer.getvalue()


def claims(name: str, width: int, height: int) -> bytes:
    """A small file whose header claims another size."""
    small = Image.new("RGB", (8, 8), "red")
    if name == "PNG":
        return png(width, height, body=zlib.compress(bytes(100)))
    if name == "JPEG":
        raw = bytearray(saved(small, name))
        at = raw.index(b"\xff\xc0") + 5
        raw[at : at + 4] = struct.pack(">HH", height, width)
    elif name == "TIFF":
        raw = bytearray(saved(small, name))
        for tag, value in ((256, width), (257, height)):
            at = raw.index(struct.pack("<HH", tag, 3)) if struct.pack("<HH", tag, 3) in raw else -1
            at = at if at >= 0 else raw.index(struct.pack("<HH", tag, 4))
            raw[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    else:
        other = Image.new("RGB", (8, 8), "blue")
        raw = bytearray(saved(small, name, save_all=True, append_images=[other]))  # frames on a canvas
        at = raw.index(b"VP8X") + 12
        raw[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(raw)


LARGEST_SIDE = {"PNG": 1 << 31, "JPEG": 65_535, "TIFF": 1 << 31, "WEBP": 1 << 24}
"""What the format can say, in pixels."""
BOMBS = [
    (name, size)
    for name, largest in LARGEST_SIDE.items()
    for size in ((8193, 8192), (65_000, 65_000), (1, 67_108_865))
    if max(size) <= largest
]


@pytest.mark.parametrize(("name", "size"), BOMBS)
def test_image_bombs_are_refused_by_their_header(name: str, size: tuple[int, int]) -> None:
    raw = claims(name, *size)
    assert len(raw) < 2000
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tracemalloc.start()
        for read in (decode_image, decode_mask):
            with pytest.raises(
                InputError, match=r"^x: (.* pixels, more than the 67,108,864|the image does not decode \(Image)"
            ):
                read(raw, "x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20 and not told


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 27), 9)), id="zTXt"),
        pytest.param(chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(1 << 27), 9)), id="iTXt"),
        pytest.param(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1 << 27), 9)), id="iCCP"),
        pytest.param(
            b"".join(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20), 9)) for _ in range(100)), id="many"
        ),
    ],
)
def test_what_a_png_says_beside_its_pixels_is_not_unpacked_without_end(bomb: bytes) -> None:
    raw = png(1, 1, bomb, body=zlib.compress(bytes(4)))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"x: the image does not decode \(.*(too large|memory used)"):
        decode_image(raw, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_a_deep_picture_takes_little_more_than_itself() -> None:
    """130 kB of a file became 2.8 GB when all pixels were doubles at once."""
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(1 + 2 * 8192)) for _ in range(8192)) + rows.flush()
    raw = png(8192, 8192, depth=16, colours=0, body=body)
    assert len(raw) < 200_000
    tracemalloc.start()
    assert decode_image(raw, "x").size == (8192, 8192)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * MAX_PIXELS, "numpy's part: the 16-bit values, the 8-bit ones, a block of doubles"


@settings(max_examples=200, deadline=None)
@given(
    some.arrays(
        st.sampled_from([np.float32, np.float64, np.uint16, np.int32]),
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
    )
)
def test_scaling_in_blocks_is_scaling_at_once(values: np.ndarray) -> None:
    wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdnet_dist.images._BLOCK_PIXELS", 8)
        if not finite.size:
            with pytest.raises(ValueError, match="no pixel is a finite number"):
                scale_to_8_bit(values)
            return
        low, high = finite.min(), finite.max()
        wide = np.nan_to_num(wide, nan=low, posinf=high, neginf=low)
        expected = (wide / 2 - low / 2) / (high / 2 - low / 2) * 255 if high > low else np.zeros_like(wide)
        assert np.array_equal(scale_to_8_bit(values), np.rint(expected).astype(np.uint8))


def test_a_jpeg_that_goes_over_its_pixels_without_end_is_refused() -> None:
    raw = saved(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    decode_image(raw, "x")
    last, end = raw.rindex(b"\xff\xda"), raw.rindex(b"\xff\xd9")
    many = raw[:end] + raw[last:end] * 400 + raw[end:]
    with pytest.raises(InputError, match=r"^x: 410 scans of 4096 x 4096 pixels, which would take very long$"):
        decode_image(many, "x")
    small = saved(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    last, end = small.rindex(b"\xff\xda"), small.rindex(b"\xff\xd9")
    decode_image(small[:end] + small[last:end] * 400 + small[end:], "x")  # no time at all


def test_damaged_files_do_not_warn_from_any_thread() -> None:
    """Warnings of a library's own take several lines, and are not about anything that the user called."""
    exif = Image.Exif()
    exif[0x010E] = "someone"
    raw = saved(Image.new("RGB", (9, 9)), "TIFF", exif=exif)
    cut = raw.replace(struct.pack("<HH", 0x010E, 2), struct.pack("<HH", 0x010E, 12))
    animated = png(1, 1, chunk(b"acTL", b"\0" * 8), body=zlib.compress(bytes(4)))
    before = list(warnings.filters)
    told: list[str] = []

    def decode() -> None:
        for file in [cut, animated, raw] * 30:
            try:
                decode_image(file, "x")
            except InputError as error:
                told.append(str(error))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=decode) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not caught
    assert list(warnings.filters) == before
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = Image.open(io.BytesIO(animated))
        image.load()
    assert caught, "Pillow itself says nothing, so the test says nothing"


def tar_header(kind: bytes, size: int, pax_headers: dict[str, str] | None = None, key: str = "s000") -> bytes:
    member = tarfile.TarInfo(f"{key}.json")
    member.type, member.size, member.pax_headers = kind, size, pax_headers or {}
    return member.tobuf(tarfile.PAX_FORMAT if member.pax_headers else tarfile.GNU_FORMAT)


def many_holes() -> bytes:
    """A sparse member of GNU's with a list of holes that goes on for 10 MB."""
    raw = bytearray(tar_header(tarfile.GNUTYPE_SPARSE, 512))
    raw[257:265] = tarfile.GNU_MAGIC
    raw[345:512] = bytes(167)
    raw[482] = 1  # the list goes on behind the header
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    return bytes(raw) + (b"%011o\0" % 1 * 42 + b"\1" + bytes(7)) * 20_000


PAX_HOLES = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"}
LARGE = "a header larger than 1 MiB"
HEADERS: dict[str, tuple[list[tuple[bytes, int]], str]] = {
    # what a tar is made of, each with so many zero bytes behind it, which take no room on the disk
    "pax": ([(tar_header(tarfile.XHDTYPE, 1 << 28), 1 << 28)], LARGE),
    "pax of Solaris": ([(tar_header(tarfile.SOLARIS_XHDTYPE, 1 << 28), 1 << 28)], LARGE),
    "pax for all": ([(tar_header(tarfile.XGLTYPE, 1 << 28), 1 << 28)], LARGE),
    "long name": ([(tar_header(tarfile.GNUTYPE_LONGNAME, 1 << 28), 1 << 28)], LARGE),
    "long link": ([(tar_header(tarfile.GNUTYPE_LONGLINK, 1 << 28), 1 << 28)], LARGE),
    "many for one member": ([(tar_header(tarfile.XHDTYPE, 1 << 19), 1 << 19)] * 200, LARGE),
    "many for all": (
        [
            one
            for number in range(40)
            for one in (
                (tar_header(tarfile.XGLTYPE, 1 << 19) + b"524288 k%03d=" % number + b"x" * ((1 << 19) - 12), 0),
                (tar_header(tarfile.REGTYPE, 1, key=f"s{number:03d}"), 512),
            )
        ],
        LARGE,
    ),
    "below nothing": ([(tar_header(tarfile.XHDTYPE, -(1 << 20)), 1 << 28)], LARGE),
    "holes": ([(many_holes(), 1 << 20)], "a sparse member with many holes"),
    "holes of pax": (
        [(tar_header(tarfile.REGTYPE, 1 << 20, pax_headers=PAX_HOLES) + b"9999999\n" + b"1\n" * (1 << 21), 0)],
        "a sparse member with many holes",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_a_tar_do_not_fill_the_memory(name: str, tmp_path: Path) -> None:
    """A file of a gigabyte without any content took more than two to refuse."""
    pieces, message = HEADERS[name]
    path = tmp_path / "train-000000.tar"
    with open(path, "wb") as file:
        for content, zeros in pieces:
            file.write(content)
            file.truncate(file.tell() + zeros)
            file.seek(zeros, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    shard = ShardInfo(file=path.name, part="train", samples=50, bytes=path.stat().st_size, sha256="0" * 64)
    reads: list[Callable[[], Any]] = [
        lambda: list(scan_shard(LocalSource(tmp_path), shard)),
        lambda: list(verify.read_shard(path)),
    ]
    for read in reads:
        tracemalloc.start()
        with pytest.raises(InputError, match=rf"^{path}.*\({message}\)"):
            read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 << 20


def test_a_tar_that_does_not_fit_into_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tiny_set(tmp_path).shards[0]

    def none_left(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(tarfile.TarFile, "extractfile", none_left)
    monkeypatch.setattr(reading, "read_plain_header", lambda _: None)  # so that `tarfile` reads all
    with pytest.raises(InputError, match=rf"^{tmp_path / shard.file}: damaged after sample 0, .*\(MemoryError\)"):
        list(read_shard(LocalSource(tmp_path), shard))
    with pytest.raises(InputError, match=rf"^{tmp_path / shard.file}: .*not a readable tar"):
        list(verify.read_shard(tmp_path / shard.file))


LONG = "x" * 300


def with_other_keys(folder: Path, renamed: Callable[[str], str]) -> None:
    """Write a set's shards as others' tools would: keys with folders or of any length, pax headers before members."""
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    for shard in raw["shards"]:
        path = folder / shard["file"]
        with tarfile.open(path) as old:
            members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as new:
            for member, content in members:
                stem, _, extension = member.name.partition(".")
                member.name, member.pax_headers = f"{renamed(stem)}.{extension}", {"comment": "c" * 2000}
                new.addfile(member, io.BytesIO(content))
        shard.update(bytes=path.stat().st_size, sha256=sha256_of(path))
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))


@pytest.mark.parametrize("before", ["dir/", "/dir/", f"{LONG}_", "a:b*?<"])
def test_any_key_gets_a_picture_and_a_page(before: str, tmp_path: Path) -> None:
    """They end a run of days: keys are names of files in it."""
    tiny_set(tmp_path / "set", test=3)
    with_other_keys(tmp_path / "set", lambda key: f"{before}{key}" if key != "test_002" else f"{before}TEST_001")
    run, _ = untrained_run(tiny_config(tmp_path / "set", tmp_path / "runs"))
    network, card, _ = open_model(run)
    data, parts = open_part(saved_config(run, card), card, "test")
    batches = data.evaluation_batches(saved_config(run, card), parts, False)
    evaluation = evaluate(network, card, batches, device=torch.device("cpu"), pictures=3)
    assert [one.key for one in evaluation.predictions] == sorted(
        [f"{before}{key}" for key in ("test_000", "test_001", "TEST_001")]
    )
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draw_evaluation(evaluation, data, pictures)
    names = [path.name for path in pictures.glob("report_*.png")]
    assert len({name.lower() for name in names}) == 3
    assert all(re.fullmatch(r"report_[A-Za-z0-9_-]{1,90}\.png", name) for name in names)
    assert not [path for path in tmp_path.rglob("report_*") if path.parent != pictures]
    explain(card, explain_sources(network, card, [tmp_path / "set"], open_image), tmp_path / "pages", "t")
    assert len(list((tmp_path / "pages").glob("*.html"))) == 4


def test_compressed_weights_are_refused(tmp_path: Path) -> None:
    """A zip's member may unpack to a thousand times its size; torch.save compresses nothing."""
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    content = {info.filename: zipfile.ZipFile(path).read(info) for info in zipfile.ZipFile(path).infolist()}
    config = ModelConfig(image=GoogLeNetImageModel(pretrained=str(path)))
    with pytest.raises(InputError, match="has no 'conv1"):
        pretrained_weights(config)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in content.items():
            out.writestr(name, data)
    with pytest.raises(InputError, match=r"w\.pth: is compressed, and may be of any size inside"):
        pretrained_weights(config)


# ----------------------------------------------------------------------------------------------------------------- text


EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title><script>alert(1)</script>",
    "</style><svg onload=alert(1)>",
    "--><script>alert(1)</script>",
    "]]><x/>",
    "javascript:alert(1)",
    "&lt;b&gt; &#60;b&#62;",
    "`${alert(1)}` {{7*7}} <%= 7*7 %>",
    "\u2028</script\u2029>",
    ESCAPE,
]


class Shape(HTMLParser):
    """Tags with the names of their attributes, and what would run."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.addresses += [
            str(value) for name, value in attrs if name in ("src", "href", "action", "formaction", "data")
        ]
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.scripts.append(data)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(EVIL) | st.text(max_size=20), min_size=1, max_size=3).map("".join))
def test_no_text_changes_the_shape_of_a_page(text: str) -> None:
    """Whatever keys, classes, topics, words, sentences, titles and file names say: tags, attributes, scripts stay."""
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return  # no file holds half a character: see below
    plain, other = explanation(text="plain"), explanation(text=text)
    pairs = [
        (page(plain, "use", "p.png"), page(other, f"use{text}", f"{text}.png")),
        (
            index([Entry.of(plain, "a.html")], "t", "u"),
            index([Entry.of(other, f"{text}.html")], f"t{text}", f"u{text}"),
        ),
    ]
    for expected, html in pairs:
        shape, found = Shape(expected), Shape(html)
        assert found.tags == shape.tags
        # The image is in the style; no text is in either.
        assert found.scripts == shape.scripts
        assert all(
            one.startswith(("data:image/", "data:,")) or one.endswith((".html", ".png")) for one in found.addresses
        )


def test_pages_of_a_hostile_shard_set_hold_nothing_of_it_but_text(tmp_path: Path) -> None:
    """Labels, topics, sentences and patients of a set are payloads: its pages have the tags that pages have."""
    labels, topics = EVIL[:3], [EVIL[3], EVIL[1], "conclusion"]
    samples = []
    for number in range(16):
        sample = tiny_sample(np.random.default_rng(number), f"s{number:03d}", ["train", "test"][number % 2])
        reports = [{topic: f"{EVIL[number % len(EVIL)]} word{number}" for topic in topics}]
        record = SampleRecord(patient=f"{EVIL[0]}{number}", label=labels[number % 3], reports=reports)
        samples.append(replace(sample, record=record))
    write_shards(samples, tmp_path / "set", name=EVIL[0], topics=topics, classes=labels)
    run, _ = untrained_run(tiny_config(tmp_path / "set", tmp_path / "runs"))
    network, card, _ = open_model(run)
    out = tmp_path / "pages"
    explain(card, explain_sources(network, card, [tmp_path / "set"], open_image), out, EVIL[0])
    plain = [page(explanation(), "u", "p.png"), index([Entry.of(explanation(), "a.html")], "t", "u")]
    known = {(tag, name) for html in plain for tag, names in Shape(html).tags for name in ("", *names)}
    pages = sorted(out.glob("*.html"))
    assert len(pages) == 9
    for path in pages:
        html = path.read_text(encoding="utf-8")
        found = Shape(html)
        assert [tag for tag, _ in found.tags].count("script") == 1
        assert {(tag, name) for tag, names in found.tags for name in ("", *names)} <= known
        assert all(one.startswith("data:") or (out / one).is_file() for one in found.addresses), found.addresses


def test_half_a_character_is_refused_where_it_is_read(tmp_path: Path) -> None:
    """Written out again, in predictions or pages, it would end the run after its last epoch."""
    record = {"patient": "p", "label": None, "reports": [{"a": "\ud800"}]}
    assert parse_record(json.dumps({**record, "reports": [{"a": "\u00e9 \U0001f52c"}]}).encode(), "x").reports
    with pytest.raises(InputError, match=r"x: not a sample record .*surrogates not allowed"):
        parse_record(json.dumps(record).encode(), "x")
    tiny_set(tmp_path)
    path = tmp_path / MANIFEST_NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "name": "\udfff"}))
    with pytest.raises(InputError, match=r"manifest\.json: not valid JSON .*surrogates not allowed"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", [ESCAPE, "a\udcffb", "a\u202eb"])
def test_keys_are_plain_text(name: str, tmp_path: Path) -> None:
    manifest = tiny_set(tmp_path)
    shard = manifest.shards[0]
    key = next(read_shard(LocalSource(tmp_path), shard)).key
    with tarfile.open(tmp_path / shard.file) as old:
        members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    with tarfile.open(tmp_path / shard.file, "w") as new:
        for member, content in members:
            member.name = member.name.replace(key, name)
            new.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match="its key is not plain text") as refused:
        list(read_shard(LocalSource(tmp_path), shard))
    assert str(refused.value).isprintable()


@settings(max_examples=300, deadline=None)
@given(st.text() | st.sampled_from(EVIL))
def test_no_text_of_a_file_is_obeyed_by_a_terminal(text: str) -> None:
    assert str(InputError(text)).isprintable()
    assert all(line.isprintable() for line in printable(text).split("\n"))
    for letter in ("a", "\u00e9", "\u6838", " "):
        assert printable(f"{letter}\n{letter}") == f"{letter}\n{letter}"


def test_a_message_keeps_both_ends_of_a_long_name() -> None:
    line = one_line("begin " + "x" * 100_000 + " end")
    assert len(line) <= LONGEST_LINE and line.startswith("begin x") and line.endswith("x end") and " ... " in line
    assert one_line("x" * LONGEST_LINE) == "x" * LONGEST_LINE


def test_what_is_said_of_a_shard_set_is_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"label {ESCAPE}")
    console.say(console.table([ESCAPE], {ESCAPE: {ESCAPE: 0.5}}))
    rng = np.random.default_rng(0)
    samples = [tiny_sample(rng, f"s{number:03d}", "train") for number in range(3)]
    record = SampleRecord(patient="p", label=ESCAPE, reports=[{ESCAPE: "a"}])
    samples = [replace(sample, record=record) for sample in samples]
    write_shards(samples, tmp_path / "set", name=ESCAPE, topics=[ESCAPE], classes=[ESCAPE, f"{ESCAPE}2"])
    assert "\x1b" not in capsys.readouterr().out
    for arguments in (["verify", tmp_path / "set"], ["verify", tmp_path / "set", "--all"]):
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
        assert "owned" in done.stdout and "\x1b" not in done.stdout + done.stderr
    (tmp_path / "set" / f"x{ESCAPE.replace('/', '')}").write_text("")
    done = command("verify", tmp_path / "set", "--all")
    assert done.returncode == 2 and "owned" in done.stderr and "\x1b" not in done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------------- servers


def test_the_ui_listens_to_this_machine_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from launch import mlflow_ui

    commands: list[list[str]] = []

    def start(command: list[str], **options: Any) -> None:
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow_ui.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        mlflow_ui.serve("sqlite:///x", None, 5000, tmp_path)
    assert commands[0][commands[0].index("--host") + 1] == "127.0.0.1"


@pytest.mark.slow
def test_ray_s_dashboard_listens_to_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from tune import ray_tune

    given_to: dict[str, Any] = {}

    def init(**options: Any) -> None:
        given_to.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError), ray_tune.cluster():
        pass
    assert given_to["address"] == "local" and given_to["dashboard_host"] == "127.0.0.1"
