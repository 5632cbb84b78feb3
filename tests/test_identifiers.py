"""Who a patient is stays outside: with --pseudonymise, no identifier reaches anything that is written or printed."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
import zlib
from base64 import b64decode, b64encode
from pathlib import Path

import pytest

from data_shards.importing import PSEUDONYMISED, pseudonym
from mdnet_dist.shards import load_manifest
from tests.test_importers import files_with_identifiers, line, make_source, run_import
from tests.test_shards import command
from tests.test_train import run, write_yaml

SALT = "0123456789abcdef0123"
# Folders, file names, patients, tags (NAME in tests/test_importers.py), and fields that are not imported. None is so
# short that it occurs in pixels or numbers by chance.
IDENTIFIERS = ["Jane", "JANE", "ROE^", "Roe 1", "1961-04-12", "MRN-", "Dr Doe", "St-Elsewhere", SALT]


DATA = re.compile(rb"(?<=;base64,)[A-Za-z0-9+/=]+")


def everything_in(folder: Path) -> list[tuple[str, bytes]]:
    """Names and content of all files, MLflow's store and what is compressed among them."""
    found = []
    for path in sorted(folder.rglob("*")):
        found.append((f"name of {path}", str(path.relative_to(folder)).encode()))
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix == ".html":  # pictures inside a page
            found += [(f"{path} data", b64decode(data)) for data in DATA.findall(content)]
            content = DATA.sub(b"", content)
        found.append((str(path), content))
        if content.startswith(b"PK"):
            with zipfile.ZipFile(path) as parts:
                found += [(f"{path} {name}", parts.read(name)) for name in parts.namelist()]
        at = 0
        while content.startswith(b"\x89PNG") and (at := content.find(b"zTXt", at + 1)) > 0:
            found.append((f"{path} zTXt", zlib.decompressobj().decompress(content[content.index(b"\0", at) + 2 :])))
    return found


def assert_anonymous(places: list[tuple[str, bytes]]) -> None:
    for where, content in places:
        # Text of two bytes a letter, as Windows programs write it.
        for text in (content, content.replace(b"\0", b"")):
            for identifier in IDENTIFIERS:
                assert identifier.encode() not in text, (identifier, where)


def write_source(folder: Path) -> Path:
    """A folder in which nothing but the reports is free of identifiers. Returns its manifest."""
    source = folder / "Jane Roe at St-Elsewhere"
    (source / "ROE^JANE").mkdir(parents=True)
    names = files_with_identifiers(source / "ROE^JANE")
    lines = [
        line(number, image=f"ROE^JANE/{name}", patient="MRN-4711", split="train", note="Jane Roe", physician="Dr Doe")
        for number, name in enumerate(names)
    ]
    parts = ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    lines += [
        line(number, image=f"images/{number}.png", patient=f"MRN-4712-{number}", split=parts[number])
        for number in range(9)
    ]
    for number in range(9):
        lines[-9 + number]["image"] = f"images/Jane Roe {number}.png"
    manifest = make_source(source, lines)
    for number in range(9):
        (source / "images" / f"{number}.png").rename(source / "images" / f"Jane Roe {number}.png")
    return manifest


def test_a_set_of_pseudonyms_is_not_called_after_its_folder(tmp_path: Path) -> None:
    manifest = make_source(tmp_path / "Jane Roe", [line(number) for number in range(9)])
    made, _ = run_import(manifest, tmp_path / "a", salt=b"s" * 16)
    assert made.name == PSEUDONYMISED
    made, _ = run_import(manifest, tmp_path / "b", salt=b"s" * 16, name="study 7")
    assert made.name == "study 7"
    made, _ = run_import(manifest, tmp_path / "c")
    assert made.name == "Jane Roe", "without a salt nothing is hidden"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_identifier_is_written_or_printed_from_import_to_pages(tmp_path: Path) -> None:
    """The real commands: import, verify, show, train with MLflow, evaluate, predict, explain, retrieve."""
    manifest = write_source(tmp_path / "hospital")
    (tmp_path / "salt").write_text(SALT)
    out = tmp_path / "out"
    out.mkdir()
    shards = out / "shards"
    done = [
        command("import", manifest, "--out", shards, "--pseudonymise", tmp_path / "salt"),
        command("verify", shards),
        command("show", shards, "--out", out / "shown.png"),
    ]
    assert all(one.returncode == 0 for one in done), [one.stderr for one in done]
    assert load_manifest(shards).name == PSEUDONYMISED
    # The source is gone, so that nothing later can look into it.
    images = tmp_path / "images"
    images.mkdir()
    kept = ["scan.dcm", "text.png", "exif.webp", "tags.tif", "tail.jpg"]
    for name in kept:
        shutil.copy(manifest.parent / "ROE^JANE" / name, images / name)
    shutil.rmtree(tmp_path / "hospital")
    config = write_yaml(out, shards, train__epochs=1, evaluate__pictures=1, train__global_batch=4, train__micro_batch=2)
    python = sys.executable
    folder = out / "runs" / "tiny"
    for arguments in (
        ("launch/train.py", config),
        ("launch/evaluate.py", folder, "--part", "val"),
        ("launch/predict.py", folder, images, "--out", out / "reports.csv"),
        ("launch/predict.py", folder, images, "--out", out / "reports.jsonl"),
        ("launch/explain.py", folder, shards, images, "--out", out / "pages"),
        ("launch/retrieve.py", folder, "nuclei", "--top", "2", "--out", out / "retrieved"),
    ):
        finished = run(python, *arguments)
        assert finished.returncode == 0, finished.stderr
        done.append(finished)
    said = "".join(one.stdout + one.stderr for one in done[1:])
    said += (done[0].stdout + done[0].stderr).replace(str(tmp_path), "")
    files = everything_in(out)
    names = {Path(where.removeprefix("name of ")).name for where, _ in files}
    assert {"mlflow.db", "predictions.jsonl", "model.json", "index.html", "reports.csv", "metrics.jsonl"} <= names
    assert any("mlartifacts" in where for where, _ in files)
    assert_anonymous([("printed", said.encode()), *files])
    # What is looked for would be found: the keys are there, and so are the pixels' reports.
    key = pseudonym(SALT.encode(), "key", "images/Jane Roe 6.png")
    assert any(key.encode() in content for where, content in files if where.endswith("predictions.jsonl"))
    reported = [json.loads(text)["image"] for text in (out / "reports.jsonl").read_text().splitlines()]
    assert sorted(reported) == sorted(kept)


def test_identifiers_are_found_wherever_they_are(tmp_path: Path) -> None:
    for name, content in {
        "plain": b"xxJane",
        "wide": "Roe 1961".encode("utf-16-le"),
        "page.html": b"<img src='data:image/png;base64," + b64encode(b"MRN-4711") + b"'>",
        "text.png": b"\x89PNG....zTXtk\0\0" + zlib.compress(b"MRN-4711"),
        "MRN-4712": b"",
    }.items():
        place = tmp_path / name.partition(".")[0]
        place.mkdir()
        (place / name).write_bytes(content)
        with pytest.raises(AssertionError):
            assert_anonymous(everything_in(place))
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "a").write_bytes(b"a report")
    assert_anonymous(everything_in(tmp_path / "clean"))
