"""Importers: from people's files to shard sets, and nothing that should stay outside comes along."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from data_shards.import_bcidr import PATIENT, make_patient_reader, parse_caption, read_bcidr
from data_shards.import_manifest import edits, parse_line, read_manifest
from data_shards.import_r2gen import read_r2gen
from data_shards.importing import ImportOptions, import_source, make_keys, pseudonym
from data_shards.prepare import prepare_pixels, strip_jpeg, strip_png
from data_shards.verify import read_shard, verify_set
from mdnet_dist.errors import InputError
from mdnet_dist.images import decode_image, decode_mask
from mdnet_dist.shards import ShardManifest, load_manifest
from tests.conftest import shared_data
from tests.test_shards import command

NAME = "Jane Roe 1961-04-12"


def picture(number: int, size: tuple[int, int] = (16, 12)) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def line(number: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "image": f"images/{number}.png",
        "patient": f"p{number}",
        "split": "test" if number % 3 == 0 else "train",
        "label": ["low", "high"][number % 2],
        "reports": [{"conclusion": "Low grade.", "crowding": "nuclei are  crowded"}],
    }
    fields.update(changes)
    return {name: value for name, value in fields.items() if value is not ...}


def make_source(folder: Path, lines: list[Any], images: int = 9) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        picture(number).save(folder / "images" / f"{number}.png")
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(b"\n".join(raw if isinstance(raw, bytes) else json.dumps(raw).encode() for raw in lines))
    return manifest


def run_import(manifest: Path, out: Path, **options: Any) -> tuple[ShardManifest, list[str]]:
    made = import_source(read_manifest(manifest), out, ImportOptions(**options))
    assert list(verify_set(out)) == []
    return made


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    return {key: members for shard in load_manifest(folder).shards for key, members in read_shard(folder / shard.file)}


def saved(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_name, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def test_a_manifest_becomes_a_set(tmp_path: Path) -> None:
    lines = [line(number, licence="CC0") for number in range(9)]
    lines[2].update(label=None, mask="masks/2.png", patient=2)
    lines[3]["reports"] = [{"crowding": None, "conclusion": "low"}, {"findings": "$5, 3/4 of it", "conclusion": "low"}]
    manifest = make_source(tmp_path / "source", [b"\xef\xbb\xbf" + json.dumps(lines[0]).encode(), b"  ", *lines[1:]])
    (tmp_path / "source" / "masks").mkdir()
    labels = np.zeros((12, 16), dtype=np.uint16)
    labels[3:5, 2:9] = 700
    Image.fromarray(labels).save(tmp_path / "source" / "masks" / "2.png")
    made, notes = run_import(manifest, tmp_path / "out")
    assert made.name == "source"
    assert made.topics == ["crowding", "findings", "conclusion"]
    assert made.classes == ["high", "low"]
    assert {part: statistics.samples for part, statistics in made.parts.items()} == {"train": 5, "val": 1, "test": 3}
    assert notes[0] == "ignored fields: licence"
    assert "1 training patients (1 images) became one" in notes[1]
    stored = samples_of(tmp_path / "out")
    assert stored.keys() == {str(number) for number in range(9)}
    assert json.loads(stored["2"]["json"]) == {
        "patient": "2",
        "label": None,
        "reports": [{"crowding": "nuclei are crowded", "conclusion": "Low grade."}],
    }
    assert np.array_equal(decode_mask(stored["2"]["mask.png"], "x"), labels > 0)
    for number in range(9):
        assert decode_image(stored[str(number)]["png"], "x").tobytes() == picture(number).tobytes()


WRONG_LINES: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "line 2: not valid JSON"),
    "not an object": ([1], "line 2: must be a JSON object, not list"),
    "not text": (b"\xff\xfe{}", "line 2: not valid JSON"),
    "too deep": (b"[" * 200_000, "line 2: not valid JSON"),
    "too long": (b'{"image": "' + b"x" * (1 << 20) + b'"}', "line 2: longer than"),
    "field twice": (b'{"image": "a", "image": "b"}', "'image' is given twice"),
    "misspelt field": (line(1, lable="low", label=...), "unknown field 'lable'; did you mean 'label'"),
    "misspelt plural": (line(1, masks="masks/1.png"), "unknown field 'masks'; did you mean 'mask'"),
    "misspelt required": (line(1, report=[], reports=...), "unknown field 'report'; did you mean 'reports'"),
    "no image": (line(1, image=...), "line 2: 'image' is missing"),
    "no patient": (line(1, patient=None), "line 2: 'patient' is missing"),
    "image of a wrong type": (line(1, image=["a"]), "line 2: 'image' must be the path of a file"),
    "patient of a wrong type": (
        line(1, patient=True),
        r"line 2 \(images/1.png\): 'patient' must be a string, not bool",
    ),
    "empty patient": (line(1, patient=" "), "'patient' is empty"),
    "label of a wrong type": (line(1, label=2), "'label' must be a string, not int"),
    "empty label": (line(1, label=""), "'label' is empty"),
    "unknown split": (line(1, split="training"), "split \"training\"; did you mean 'train'"),
    "split of a wrong type": (line(1, split=["a"]), "known: train, val, test"),
    "reports of a wrong type": (line(1, reports="fine"), "'reports' must be a list of objects"),
    "reports of strings": (line(1, reports=["fine"]), "'reports' must be a list of objects"),
    "no reports": (line(1, reports=[]), "'reports' is empty"),
    "empty report": (line(1, reports=[{"a": "b"}, {"a": None}]), "report 2 is empty"),
    "empty sentence": (line(1, reports=[{"a": ""}]), "report 1: the sentence on 'a' is empty"),
    "punctuation only": (line(1, reports=[{"a": "..."}]), "report 1: the sentence on 'a' is empty"),
    "sentence of a wrong type": (line(1, reports=[{"a": 3}]), "the sentence on 'a' must be a string, not int"),
    "half a letter": (line(1, label="\ud800"), "'label' is not valid Unicode"),
    "a book": (line(1, reports=[{"a": "word " * 9000}]), "more than the 20,000 of a text"),
    "image missing": (line(1, image="images/none.png"), r"line 2 \(images/none.png\): no such file"),
    "image is a folder": (line(1, image="images"), "no such file"),
    "mask missing": (line(1, mask="masks/none.png"), "no such file: .*masks/none.png"),
    "absolute path": (line(1, image="/etc/hostname"), "path '/etc/hostname' must be relative and stay inside"),
    "climbing path": (line(1, image="images/../../secret.png"), "must be relative and stay inside"),
    "climbing mask": (line(1, mask="../secret.png"), "must be relative and stay inside"),
    "path with a zero": (line(1, image="a\0b"), "must be relative and stay inside"),
    "endless path": (line(1, image="a" * 5000), "cannot be read"),
    "path of half a letter": (line(1, image="\udcff.png"), "cannot be read|no such file"),
    "same image twice": (line(0), r"line 2 .*image 'images/0.png' is there twice, first at .*line 1"),
    "same image by another name": (line(1, image="images/./0.png"), "is there twice"),
    "patient in two splits": (line(1, patient="p0"), r"line 2 .*patient 'p0' is in train, but in test at .*line 1"),
    "no split": (line(1, split=None), "line 2 .*no split, but .*line 1 .* is in test|no split; give every sample"),
}


@pytest.mark.parametrize("case", WRONG_LINES)
def test_a_wrong_line_is_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    wrong, message = WRONG_LINES[case]
    picture(0).save(tmp_path / "secret.png")
    manifest = make_source(tmp_path / "source", [line(0), wrong, line(2)])
    with pytest.raises(InputError, match=message) as caught:
        import_source(read_manifest(manifest), tmp_path / "out", ImportOptions())
    assert str(caught.value).startswith(str(manifest))
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_a_broken_image_or_mask_is_named(tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "source", [line(0), line(1, mask="mask.png"), line(2)])
    (tmp_path / "source" / "images" / "2.png").write_bytes(saved(picture(2), "PNG")[:-30])
    picture(1, (5, 5)).save(tmp_path / "source" / "mask.png")
    with pytest.raises(InputError, match=r"line 3 \(images/2.png\): the image does not decode|line 2 .*5 x 5 pixels"):
        import_source(read_manifest(manifest), tmp_path / "out", ImportOptions())
    (tmp_path / "source" / "images" / "2.png").write_bytes(saved(picture(2), "PNG"))
    with pytest.raises(InputError, match=r"line 2 \(images/1.png\): mask mask.png is 5 x 5 .*16 x 12"):
        import_source(read_manifest(manifest), tmp_path / "out", ImportOptions())
    (tmp_path / "source" / "mask.png").write_text("mask")
    with pytest.raises(InputError, match=r"line 2 \(images/1.png\): mask mask.png: not a"):
        import_source(read_manifest(manifest), tmp_path / "out", ImportOptions())
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("kind", ["file", "folder", "loop", "pipe", "inside"])
def test_links_may_not_lead_out(kind: str, tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "source", [line(0), line(1, image="link/1.png"), line(2)])
    link = tmp_path / "source" / "link"
    if kind == "folder":
        make_source(tmp_path / "other", [])
        link.symlink_to(tmp_path / "other" / "images")
    elif kind == "inside":
        link.symlink_to("images")
    else:
        link.mkdir()
        if kind == "file":
            picture(1).save(tmp_path / "secret.png")
            (link / "1.png").symlink_to(tmp_path / "secret.png")
        elif kind == "loop":
            (link / "1.png").symlink_to("1.png")
        else:
            os.mkfifo(link / "1.png")  # reading it would wait for ever
    if kind == "inside":
        run_import(manifest, tmp_path / "out")
        return
    with pytest.raises(InputError, match=r"line 2 .*(through a link|cannot be read|no such file)"):
        import_source(read_manifest(manifest), tmp_path / "out", ImportOptions())


def test_no_manifest_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest.jsonl: cannot be read \(No such file"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="no samples"):
        read_manifest(tmp_path)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5),
    end=st.integers(1, 400),
)
def test_a_mutated_line_is_an_entry_or_the_documented_error(changes: list[tuple[int, int]], end: int) -> None:
    raw = bytearray(json.dumps(line(1, mask="m.png"))[: max(end, 30)].encode())
    for place, value in changes:
        raw[place % len(raw)] = value
    try:
        parse_line(bytes(raw), "x")
    except InputError as error:
        assert str(error).startswith("x")


def test_edits_counts_slips() -> None:
    for a, b, slips in [("label", "label", 0), ("lable", "label", 1), ("labl", "label", 1), ("mask_path", "mask", 3)]:
        assert edits(a, b) == edits(b, a) == slips
    assert edits("reprots", "report") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Splits, keys, pseudonyms


def test_splits_as_given_asked_for_or_dealt(tmp_path: Path) -> None:
    def parts(name: str, split: Callable[[int], str | None], **options: Any) -> dict[str, int]:
        manifest = make_source(tmp_path / name, [line(number, split=split(number)) for number in range(9)])
        made, _ = run_import(manifest, tmp_path / f"{name}-out", **options)
        return {part: statistics.samples for part, statistics in made.parts.items()}

    def train_test(number: int) -> str:
        return "test" if number > 6 else "train"

    assert parts("a", train_test) == {"train": 6, "val": 1, "test": 2}
    assert parts("b", train_test, val_share=0.4) == {"train": 4, "val": 3, "test": 2}
    assert parts("c", train_test, val_share=0.0) == {"train": 7, "test": 2}
    assert parts("d", train_test, folds=3) == {"fold0": 3, "fold1": 3, "fold2": 3}
    assert sorted(parts("e", lambda number: None).values()) == [1, 2, 2, 2, 2]
    assert parts("f", lambda number: "test") == {"test": 9}
    with pytest.raises(InputError, match=r"--val-share 0.2 and 3 folds"):
        parts("g", train_test, folds=3, val_share=0.2)
    with pytest.raises(InputError, match="has a validation part of its own"):
        parts("h", lambda number: "val" if number else "train", val_share=0.2)
    with pytest.raises(InputError, match="between 0 and 1"):
        parts("i", train_test, val_share=1.5)
    with pytest.raises(InputError, match="only 9 patients"):
        parts("j", train_test, folds=10)


def test_topics_and_classes_may_be_given(tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "source", [line(number) for number in range(9)])
    made, _ = run_import(
        manifest,
        tmp_path / "out",
        topics=["conclusion", "crowding", "mitosis"],
        classes=["low", "high", "none"],
        name="x",
    )
    assert (made.topics, made.classes, made.name) == (
        ["conclusion", "crowding", "mitosis"],
        ["low", "high", "none"],
        "x",
    )
    with pytest.raises(InputError, match=r"line 1 .*topic 'conclusion' is not declared; did you mean 'conclusions'"):
        run_import(manifest, tmp_path / "out2", topics=["conclusions", "crowding"])
    with pytest.raises(InputError, match=r"line 2 .*label 'high' is not a class"):
        run_import(manifest, tmp_path / "out2", classes=["low"])


def test_keys_are_readable_and_unique() -> None:
    assert make_keys(["images/a.png", "images/b.png"]) == ["a", "b"]
    assert make_keys(["x/1.png", "y/1.png"]) == ["x-1", "y-1"]
    assert make_keys(["a.tar.gz.png"]) == ["a-tar-gz"]
    odd = make_keys(["é.png", "ü.png", "a b.png", "a_b.png", "a-b.png", "a.png", "a.jpg", "n" * 99 + ".png"])
    assert len(set(odd)) == 8 and all(0 < len(key) <= 64 and "." not in key for key in odd)
    assert odd[3] == "a_b"


def dicom_file(pixels: np.ndarray, path: Path | None = None, **tags: Any) -> bytes:
    """A DICOM file of (rows, columns[, 3]) or more frames, with a patient's name in it."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.PatientName, data.PatientID = NAME, "MRN-4711"
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = pixels.ndim >= 3 and pixels.shape[-1] == 3
    data.SamplesPerPixel = 3 if colour else 1
    if colour:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data, enforce_file_format=True)
    if path is not None:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def files_with_identifiers(folder: Path) -> list[str]:
    """Files that carry a patient's name in every place that is not a pixel."""
    image = picture(0)
    exif = Image.Exif()
    exif[0x010E] = exif[0x9286] = NAME  # description, user comment
    upright, turned = image.copy(), Image.Exif()
    turned[0x0112], turned[0x010E] = 6, NAME
    text = PngInfo()
    text.add_text("Patient", NAME)
    text.add_itxt("Patient", NAME, zip=True)
    files = {
        "exif.jpg": saved(
            image, "JPEG", exif=exif, comment=NAME.encode(), xmp=NAME.encode(), icc_profile=NAME.encode()
        ),
        "progressive.jpg": saved(image, "JPEG", progressive=True, exif=exif, comment=NAME.encode()),
        "turned.jpg": saved(upright, "JPEG", exif=turned),
        "tail.jpg": saved(image, "JPEG") + NAME.encode(),
        "grey.jpg": saved(image.convert("L"), "JPEG", comment=NAME.encode()),
        "ink.jpg": saved(image.convert("CMYK"), "JPEG", comment=NAME.encode()),
        "text.png": saved(image, "PNG", pnginfo=text, exif=exif, icc_profile=NAME.encode()),
        "tail.png": saved(image, "PNG") + NAME.encode(),
        "alpha.png": saved(image.convert("RGBA"), "PNG", pnginfo=text),
        "tags.tif": saved(image, "TIFF", description=NAME, artist=NAME),
        "exif.webp": saved(image, "WEBP", lossless=True, exif=exif, xmp=NAME.encode()),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    dicom_file(np.asarray(image.convert("L")), folder / "scan.dcm")
    return [*files, "scan.dcm"]


def test_no_identifier_reaches_a_shard(tmp_path: Path) -> None:
    source = tmp_path / "Jane Roe"
    (source / "ROE^JANE").mkdir(parents=True)
    names = files_with_identifiers(source / "ROE^JANE")
    lines = [
        line(number, image=f"ROE^JANE/{name}", patient="MRN-4711", split="train", note=NAME, physician="Dr Doe")
        for number, name in enumerate(names)
    ]
    (tmp_path / "salt").write_text("0123456789abcdef0123")
    manifest = make_source(source, [*lines, line(8, patient="MRN-4712", image="images/8.png")])
    done = command("import", manifest, "--out", tmp_path / "out", "--name", "set", "--pseudonymise", tmp_path / "salt")
    assert done.returncode == 0, done.stderr
    assert list(verify_set(tmp_path / "out")) == []
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    everything += done.stdout.replace(str(tmp_path), "").encode()
    for secret in (
        b"Jane",
        b"ROE",
        b"Roe",
        b"1961",
        b"MRN",
        b"4711",
        b"4712",
        b"Doe",
        b"exif",
        b"Exif",
        b"0123456789a",
    ):
        assert secret not in everything, secret
    stored = samples_of(tmp_path / "out")
    assert len(stored) == len(names) + 1
    assert all(len(key) == 24 and set(key) <= set("0123456789abcdef") for key in stored)
    patients = {json.loads(members["json"])["patient"] for members in stored.values()}
    assert len(patients) == 2, "images of one patient still belong together"
    for name in names:  # and the pixels are those of the files
        key = pseudonym(b"0123456789abcdef0123", "key", f"ROE^JANE/{name}")
        image = decode_image(stored[key].get("jpg") or stored[key]["png"], "x")
        if name != "scan.dcm":
            with Image.open(source / "ROE^JANE" / name) as original:
                expected = ImageOps.exif_transpose(original).convert("RGB")
            assert image.tobytes() == expected.tobytes(), name


def test_pseudonyms_depend_on_the_salt_and_a_salt_is_long() -> None:
    assert pseudonym(b"a" * 16, "patient", "p") != pseudonym(b"b" * 16, "patient", "p")
    assert pseudonym(b"a" * 16, "patient", "p") != pseudonym(b"a" * 16, "key", "p")


def test_reports_with_the_patients_name_are_refused(tmp_path: Path) -> None:
    named = line(1, patient="MRN-4711", reports=[{"conclusion": "low grade (mrn-4711)"}])
    manifest = make_source(tmp_path / "source", [line(0), named])
    with pytest.raises(InputError, match=r"line 2: .* holds the name of a patient") as caught:
        run_import(manifest, tmp_path / "out", salt=b"s" * 16)
    assert "4711" not in str(caught.value)
    (tmp_path / "salt").write_text("short")
    for salt, message in (("salt", "at least 16 bytes"), ("none", "cannot be read")):
        done = command("import", manifest, "--out", tmp_path / "out", "--pseudonymise", tmp_path / salt)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is stored


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 40, "subsampling": 2}, {"restart": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_are_copied_not_compressed_again(options: dict[str, Any], mode: str) -> None:
    image = picture(1, (40, 30)).convert(mode)
    if "restart" in options:
        options = {"restart_marker_blocks": 1}
    plain = saved(image, "JPEG", **options)
    assert strip_jpeg(plain) == plain
    assert (
        strip_jpeg(saved(image, "JPEG", comment=NAME.encode(), exif=Image.Exif().tobytes() or b"x", **options)) == plain
    )
    assert strip_jpeg(plain + b"tail") == plain
    for end in range(len(plain)):
        assert strip_jpeg(plain[:end]) is None


def test_jpeg_headers_keep_only_what_decoding_needs() -> None:
    image = picture(1)
    plain = saved(image, "JPEG")
    head, start = plain[:2], 2 + 2 + int.from_bytes(plain[4:6], "big")
    jfif = plain[6:start]

    def segment(marker: int, payload: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload

    thumbnail = segment(0xE0, jfif[:12] + b"\x01\x01" + b"JRO") + segment(0xE0, b"JFXX\0\x13" + NAME.encode())
    assert strip_jpeg(head + thumbnail + plain[start:]) == plain
    adobe = b"Adobe\0\x64\0\0\0\0\x01"  # its last byte says that the colours are YCbCr
    cut = strip_jpeg(head + segment(0xEE, adobe + NAME.encode()) + plain[start:])
    assert cut == head + segment(0xEE, adobe) + plain[start:]
    assert strip_jpeg(head + b"\xff\xff" + plain[2:]) == plain, "fill bytes before a marker are legal"
    assert strip_jpeg(head + segment(0xF0, NAME.encode()) + plain[2:]) is None, "a segment nobody knows"
    assert strip_jpeg(saved(image.convert("CMYK"), "JPEG")) is None


def test_png_pixels_are_copied() -> None:
    text = PngInfo()
    text.add_text("Patient", NAME)
    for image in (picture(1), picture(1).convert("L")):
        plain = saved(image, "PNG")
        assert strip_png(plain) == plain
        assert strip_png(saved(image, "PNG", pnginfo=text) + b"tail") == plain
        for end in range(len(plain)):
            assert strip_png(plain[:end]) is None
    for mode in ("RGBA", "P", "1", "I;16", "LA"):
        assert strip_png(saved(picture(1).convert("L").convert(mode), "PNG")) is None


def test_large_images_shrink_with_their_masks(tmp_path: Path) -> None:
    smooth = picture(1, (400, 200))
    mask = np.zeros((200, 400), dtype=bool)
    mask[:, 300:] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for name in ("a.png", "a.jpg"):
        smooth.save(tmp_path / name)
        pixels = prepare_pixels(tmp_path / name, tmp_path / "mask.png", "x", max_side_px=100)
        assert pixels.extension == name[-3:]
        shrunk = decode_image(pixels.image, "x")
        assert shrunk.size == (100, 50)
        difference = np.asarray(shrunk).astype(int) - np.asarray(smooth.resize((100, 50), Image.Resampling.BOX))
        assert np.abs(difference).mean() < 3
        assert pixels.mask is not None
        assert np.array_equal(decode_mask(pixels.mask, "x"), mask[::4, ::4])
        same = prepare_pixels(tmp_path / name, None, "x", max_side_px=400)
        assert decode_image(same.image, "x").size == (400, 200)


# ---------------------------------------------------------------------------------------------------------------------
# DICOM


def prepared(raw: bytes, path: Path) -> np.ndarray:
    path.write_bytes(raw)
    pixels = prepare_pixels(path, None, "line 1")
    assert pixels.extension == "png"
    return np.asarray(decode_image(pixels.image, "x", keep_grey=True)).astype(int)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_dicom_windows_agree_with_pydicom(function: str, photometric: str, tmp_path: Path) -> None:
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_windowing

    stored = np.random.default_rng(0).integers(-1000, 2000, (9, 11)).astype(np.int16)
    raw = dicom_file(
        stored,
        PhotometricInterpretation=photometric,
        RescaleSlope=2,
        RescaleIntercept=-100,
        WindowCenter=[400, 50],
        WindowWidth=[1500, 400],
        VOILUTFunction=function,
    )
    data = pydicom.dcmread(io.BytesIO(raw))
    theirs = apply_windowing(apply_modality_lut(data.pixel_array, data), data)
    low, high = -(2**15) * 2 - 100, (2**15 - 1) * 2 - 100  # the range that pydicom maps to
    expected = 255 * (theirs - low) / (high - low)
    if photometric == "MONOCHROME1":
        expected = 255 - expected
    assert np.abs(prepared(raw, tmp_path / "a.dcm") - expected).max() <= 0.51


def test_dicom_without_a_window_uses_its_range_without_padding(tmp_path: Path) -> None:
    stored = np.array([[100, 200, 300, 60000]], dtype=np.uint16)
    assert prepared(dicom_file(stored[:, :3]), tmp_path / "a.dcm").tolist() == [[0, 128, 255]]
    padded = dicom_file(stored, PixelPaddingValue=60000)
    assert prepared(padded, tmp_path / "a.dcm").tolist() == [[0, 128, 255, 0]]
    unusable = dicom_file(stored[:, :3], WindowCenter=200, WindowWidth=0)
    assert prepared(unusable, tmp_path / "a.dcm").tolist() == [[0, 128, 255]]
    narrow = dicom_file(stored[:, :3], WindowCenter=200, WindowWidth=1)
    assert prepared(narrow, tmp_path / "a.dcm").tolist() == [[0, 255, 255]]


def test_dicom_tables(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor = [4, 0, 8]
    table.LUTData = [0, 10, 200, 255]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    raw = dicom_file(np.array([[0, 1, 2, 3]], dtype=np.uint8), VOILUTSequence=[table])
    assert prepared(raw, tmp_path / "a.dcm").tolist() == [[0, 10, 200, 255]]
    colours = {"Red": [0, 65535], "Green": [65535, 0], "Blue": [0, 32896]}
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, values in colours.items():
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = np.array(values, dtype="<u2").tobytes()
    raw = dicom_file(np.array([[0, 1]], dtype=np.uint8), **tags)
    assert prepared(raw, tmp_path / "a.dcm").tolist() == [[[0, 255, 0], [255, 0, 128]]]


def test_dicom_colours(tmp_path: Path) -> None:
    image = picture(3)
    colour = np.asarray(image)
    assert np.array_equal(prepared(dicom_file(colour), tmp_path / "a.dcm"), colour)
    deep = colour.astype(np.uint16) * 257
    assert np.array_equal(prepared(dicom_file(deep), tmp_path / "a.dcm"), colour)
    ybr = dicom_file(np.asarray(image.convert("YCbCr")), PhotometricInterpretation="YBR_FULL")
    assert np.abs(prepared(ybr, tmp_path / "a.dcm") - colour).max() <= 3


def test_dicom_without_its_ending_is_known_by_its_start(tmp_path: Path) -> None:
    stored = np.array([[0, 255]], dtype=np.uint8)
    assert prepared(dicom_file(stored, WindowCenter=128, WindowWidth=256), tmp_path / "IM0001").tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dicom_file(np.zeros((3, 4, 5), np.uint8), NumberOfFrames=3), "3 frames, and one image is one sample"),
        (lambda: dicom_file(np.zeros((4, 5), np.uint8), Rows=20_000, Columns=20_000), "400,000,000 pixels, more than"),
        (lambda: dicom_file(np.zeros((4, 5), np.uint8))[:-10], "does not decode"),
        (lambda: dicom_file(np.zeros((4, 5), np.uint8), Rows=9), "does not decode"),
        (lambda: bytes(128) + b"DICM" + bytes(50), "does not decode"),
        (lambda: b"not DICOM at all", "does not decode"),
        (lambda: bytes(128) + b"DICM1.2.840.10008.1.2.1.99", "a deflated DICOM file is not read"),
    ],
)
def test_wrong_dicom_files(make: Callable[[], bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        prepared(make(), tmp_path / "a.dcm")


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_dicom_files_end_in_the_documented_error(
    changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(DICOM)
    for place, value in changes:
        raw[132 + place % (len(raw) - 132)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.dcm"
    try:
        prepared(bytes(raw), path)
    except InputError as error:
        assert str(error).startswith("line 1: ")


DICOM = dicom_file(np.arange(20, dtype=np.uint16).reshape(4, 5), WindowCenter=10, WindowWidth=20)


def test_without_pydicom_a_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match=r"pip install 'mdnet_dist\[dicom\]'"):
        prepared(DICOM, tmp_path / "a.dcm")


# ---------------------------------------------------------------------------------------------------------------------
# BCIDR


CAPTION = (
    "Mild pleomorphism is seen. Insufficient information. Polarity is lost. Mitosis is rare in 2.5 fields. "
    "Nucleoli are prominent. High grade."
)


def make_bcidr(folder: Path, annotations: dict[str, Any]) -> Path:
    (folder / "Images").mkdir(parents=True)
    for split, content in annotations.items():
        (folder / f"{split}_annotation.json").write_text(json.dumps(content))
        for name in content if isinstance(content, dict) else ():
            picture(len(name)).save(folder / "Images" / f"{name}.png")
    return folder


def test_bcidr(tmp_path: Path) -> None:
    item = {"caption": [CAPTION] * 5, "label": 2}
    normal = {"caption": [CAPTION.replace("High grade", "insufficient information")] * 5, "label": 3}
    train = {f"H{patient}_01_{tile}": item for patient in range(4) for tile in range(3)} | {"116974_009": normal}
    folder = make_bcidr(tmp_path / "bcidr", {"train": train, "test": {"1_00143_sub0_042": normal}})
    done = command("import", folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "no training image has the class 'normal'" in done.stdout
    made = load_manifest(tmp_path / "out")
    assert made.topics == ["pleomorphism", "crowding", "polarity", "mitosis", "nucleoli", "conclusion"]
    assert made.classes == ["normal", "low grade", "high grade", "insufficient information"]
    assert sum(statistics.patients for statistics in made.parts.values()) == 6
    stored = samples_of(tmp_path / "out")
    assert json.loads(stored["H0_01_0"]["json"]) == {
        "patient": "H0",
        "label": "high grade",
        "reports": [
            {
                "pleomorphism": "Mild pleomorphism is seen",
                "polarity": "Polarity is lost",
                "mitosis": "Mitosis is rare in 2.5 fields",
                "nucleoli": "Nucleoli are prominent",
                "conclusion": "High grade",
            }
        ]
        * 5,
    }
    assert json.loads(stored["1_00143_sub0_042"]["json"])["reports"][0]["conclusion"] == "insufficient information"


def test_bcidr_patients() -> None:
    patient_of = make_patient_reader(PATIENT)
    for name, patient in {
        "H4_08_4": "H4",
        "LP11_12_5": "LP11",
        "116974_009": "116974",
        "1_00143_sub0_042": "1_00143",
        "img_001": "img_001",
        "case": "case",
    }.items():
        assert patient_of(name) == patient
    assert make_patient_reader(r"slide-(\d+)")("slide-12-3") == "12"
    assert make_patient_reader(r"[a-z]+")("abc9") == "abc"
    with pytest.raises(InputError, match=r"--patient-regex '.': not a regular expression"):
        make_patient_reader("(")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"A1_1": {"caption": ["One. Two."], "label": 1}}, "'A1_1': caption 1: 2 sentences, but there must be 6"),
        ({"A1_1": {"caption": [CAPTION, ""], "label": 1}}, "caption 2: the caption is empty"),
        ({"A1_1": {"caption": [], "label": 1}}, "'caption' must be a list"),
        ({"A1_1": {"caption": [7], "label": 1}}, "the caption must be a string"),
        ({"A1_1": {"caption": [CAPTION], "label": 4}}, "label 4 is not 0, 1, 2 or 3"),
        ({"A1_1": {"caption": [CAPTION], "label": True}}, "label true is not 0"),
        ({"A1_1": {"caption": [CAPTION]}}, "label null is not 0"),
        ({"A1_1": []}, "must be {"),
        ([], "must be a JSON object, not list"),
        ({}, "no samples"),
    ],
)
def test_wrong_bcidr_files(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_bcidr(make_bcidr(tmp_path / "bcidr", {"train": content}))


def test_bcidr_names_stay_inside(tmp_path: Path) -> None:
    folder = make_bcidr(tmp_path / "bcidr", {})
    (folder / "train_annotation.json").write_text(json.dumps({"../../x": {"caption": [CAPTION], "label": 1}}))
    with pytest.raises(InputError, match=r"'../../x': path 'Images/../../x.png' must be relative"):
        import_source(read_bcidr(folder), tmp_path / "out", ImportOptions())


def test_a_patient_in_two_annotation_files_is_refused_and_folds_cure_it(tmp_path: Path) -> None:
    item = {"caption": [CAPTION], "label": 2}
    folder = make_bcidr(tmp_path / "bcidr", {"train": {"H1_1": item, "H2_1": item}, "test": {"H1_22": item}})
    with pytest.raises(InputError, match=r"'H1_22': patient 'H1' is in test, but in train at .*'H1_1'"):
        import_source(read_bcidr(folder), tmp_path / "out", ImportOptions())
    made, notes = import_source(read_bcidr(folder), tmp_path / "out", ImportOptions(folds=2))
    assert made.folds == 2 and "set aside" in notes[0]


def test_captions_need_not_have_a_space_behind_the_full_stop() -> None:
    assert parse_caption(CAPTION.replace(". ", "."), "x") == parse_caption(CAPTION, "x")


# ---------------------------------------------------------------------------------------------------------------------
# R2Gen


def make_r2gen(folder: Path, content: Any) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "annotation.json").write_text(json.dumps(content))
    return folder


def r2gen_item(identity: str, images: int = 2, **more: Any) -> dict[str, Any]:
    paths = [f"{identity}/{number}.png" for number in range(images)]
    return {"id": identity, "image_path": paths, "report": "The heart is normal . No effusion .", **more}


@pytest.mark.parametrize("views", ["first", "each"])
def test_r2gen(views: str, tmp_path: Path) -> None:
    content = {
        "train": [r2gen_item("CXR1_IM-1", split="train"), r2gen_item("CXR1_IM-2"), r2gen_item("CXR2_IM-1")],
        "val": [r2gen_item("dicom-9", subject_id=10_000_032, study_id=5)],
        "test": [r2gen_item("alone", 1)],
    }
    folder = make_r2gen(tmp_path / "iu", content)
    for items in content.values():
        for item in items:
            for path in item["image_path"]:
                (folder / "images" / path).parent.mkdir(exist_ok=True)
                picture(1).save(folder / "images" / path)
    done = command("import", folder / "annotation.json", "--out", tmp_path / "out", "--views", views)
    assert done.returncode == 0, done.stderr
    made = load_manifest(tmp_path / "out")
    assert (made.topics, made.classes) == (["findings"], [])
    sizes = {part: (statistics.samples, statistics.patients) for part, statistics in made.parts.items()}
    per_item = 2 if views == "each" else 1
    assert sizes == {"train": (3 * per_item, 2), "val": (per_item, 1), "test": (1, 1)}
    stored = samples_of(tmp_path / "out")
    assert json.loads(stored["dicom-9-0"]["json"]) == {
        "patient": "10000032",
        "label": None,
        "reports": [{"findings": "The heart is normal . No effusion ."}],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"training": []}, "part 'training'; did you mean 'train'"),
        ({"train": {}}, "'train' must be a list"),
        ({"train": ["x"]}, "train item 1: must be an object"),
        ({"train": [{"image_path": ["a"], "report": "x"}]}, "'id' must be a string"),
        ({"train": [r2gen_item("a", 0)]}, r"train item 1 \(a\): 'image_path' must be a list of at least one"),
        ({"train": [{**r2gen_item("a"), "report": ""}]}, "'report' is empty"),
        ({"train": [r2gen_item("a", split="test")]}, "is listed in 'train' but says split"),
        ({"train": []}, "no samples"),
        ([], "must be a JSON object"),
    ],
)
def test_wrong_r2gen_files(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_r2gen(make_r2gen(tmp_path / "iu", content))


# ---------------------------------------------------------------------------------------------------------------------
# Commands and real data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], "looks like no known format"),
        (["EMPTY", "--format", "bcidr"], "no samples in train_annotation.json"),
        (["EMPTY", "--format", "manifest"], "manifest.jsonl: cannot be read"),
        (["SOURCE", "--views", "each"], "--views each: only the r2gen format"),
        (["SOURCE", "--patient-regex", "p"], "--patient-regex: a manifest names the patient"),
        (["SOURCE", "--topics", "crowding,conclusoin"], "did you mean 'conclusoin'"),
        (["SOURCE", "--folds", "1"], "folds: 1"),
    ],
)
def test_wrong_import_commands_end_with_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    manifest = make_source(tmp_path / "source", [line(number) for number in range(9)])
    places = {"EMPTY": str(tmp_path / "empty"), "SOURCE": str(manifest)}
    done = command("import", *(places.get(word, word) for word in arguments), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "samples", "patients", "masks", "extension"),
    [("nuclei_he", 107, 107, 107, "png"), ("lung_he", 740, 740, 0, "jpg"), ("chest_notes", 341, 152, 0, "jpg")],
)
def test_real_sets(name: str, samples: int, patients: int, masks: int, extension: str, tmp_path: Path) -> None:
    source = shared_data(name)
    lines = [json.loads(text) for text in (source / "manifest.jsonl").read_text().splitlines()]
    made, _ = run_import(source / "manifest.jsonl", tmp_path / "out")
    assert sum(statistics.samples for statistics in made.parts.values()) == samples == len(lines)
    assert sum(statistics.patients for statistics in made.parts.values()) == patients
    stored = samples_of(tmp_path / "out")
    assert sum("mask.png" in members for members in stored.values()) == masks
    for fields, key in zip(lines, make_keys([fields["image"] for fields in lines]), strict=True):
        image = decode_image(stored[key][extension], key)
        with Image.open(source / fields["image"]) as original:
            flat = original.convert("RGBA").convert("RGB") if original.mode == "RGBA" else original.convert("RGB")
            assert image.tobytes() == flat.tobytes(), "stored pixels are those of the file"
        if "mask" in fields:
            with Image.open(source / fields["mask"]) as drawn:
                assert np.array_equal(decode_mask(stored[key]["mask.png"], key), np.asarray(drawn) > 0)
    folds, _ = run_import(source / "manifest.jsonl", tmp_path / "folds", folds=5)
    assert len({statistics.samples for statistics in folds.parts.values()}) <= 3
