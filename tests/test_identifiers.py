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

from data_shards.__main__ import build_parser
from data_shards.import_bcidr import read_bcidr
from data_shards.import_r2gen import read_r2gen
from data_shards.importing import PSEUDONYMISED, ImportOptions, import_source, pseudonym
from mdnet_dist.errors import InputError
from mdnet_dist.shards import ShardManifest, load_manifest
from tests.conftest import shared_data
from tests.test_importers import files_with_identifiers, line, make_source, picture, run_import
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


SECRETS = ["jane", "roe", "4711", "smith", "é", "e\u0301"]


def assert_tells_nothing(message: str, folder: Path) -> None:
    said = message.replace(str(folder), "").lower()
    assert not any(secret in said for secret in SECRETS), message


def import_lines(folder: Path, lines: list[dict[str, object]], **options: object) -> tuple[ShardManifest, list[str]]:
    """Import pseudonymised lines whose images, and masks, are made where they say."""
    manifest = make_source(folder / "source", lines)
    for number, fields in enumerate(lines):
        path = manifest.parent / str(fields["image"])
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return run_import(manifest, folder / "out", salt=b"s" * 16, **options)


def saying(text: str) -> list[dict[str, str]]:
    return [{"conclusion": "Low grade.", "crowding": text}]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        # {image or patient of line 1}, sentence in line 4, which is on another patient and image
        ({"patient": "Roe, Jane"}, "as in Roe, Jane before"),
        ({"patient": "Roe, Jane"}, "Jane Roe has crowded nuclei"),
        ({"patient": "Roe, Jane"}, "Mrs Roe has crowded nuclei"),
        ({"patient": "Roe, Jane"}, "Jane's nuclei are crowded"),
        ({"patient": "Roe, Jane"}, "see janeroe"),
        ({"patient": "ROE^JANE"}, "Jane Roe has crowded nuclei"),
        ({"patient": "ROE^JANE"}, "as for Roe"),
        ({"patient": "ROE^JANE"}, "seen with Roe  Jane"),
        ({"patient": "Jane Roe"}, "jane    roe"),
        ({"patient": "Smith^Al^B"}, "Al Smith"),
        ({"patient": "René Roe"}, "Rene\u0301 has crowded nuclei"),
        ({"patient": "Rene\u0301 Roe"}, "René has crowded nuclei"),
        ({"patient": "RENÉ"}, "as in rené"),
        ({"patient": "MRN-4711"}, "MRN-4711"),
        ({"patient": "MRN-4711"}, "mrn 4711"),
        ({"patient": "MRN-4711"}, "MRN4711"),
        ({"patient": "MRN-4711"}, "MRN4711a"),
        ({"patient": "MRN-4711"}, "MRN4711_2"),
        ({"patient": "MRN-4711"}, "number 4711"),
        ({"patient": "MRN-4711"}, "number 0004711."),
        ({"patient": "004711"}, "number 4711"),
        ({"patient": 4711}, "number 004711"),
        ({"image": "images/Jane_Roe.png"}, "as in Jane_Roe.png"),
        ({"image": "images/Jane_Roe.png"}, "Jane has crowded nuclei"),
        ({"image": "images/JaneRoe1.png"}, "Jane has crowded nuclei"),
        ({"image": "images/case-0047-11.png"}, "case 47 11"),
        ({"image": "Jane_Roe/1.png"}, "Jane has crowded nuclei"),
        ({"image": "Jane_Roe/1.png"}, "Roe and JANE ROE"),
        ({"image": "wards/MRN4711/left/1.png"}, "as mrn-4711"),
        ({"image": "ward/Smith/1.png"}, "Mr Smith has crowded nuclei"),
    ],
)
def test_names_are_found_in_any_report_and_not_told(names: dict[str, object], text: str, tmp_path: Path) -> None:
    lines = [line(number) for number in range(9)]
    lines[1].update(names)
    lines[4]["reports"] = saying(text)
    with pytest.raises(InputError) as caught:
        import_lines(tmp_path, lines)
    message = str(caught.value)
    assert message.startswith("manifest.jsonl line 5: a report, topic or label holds ")
    assert_tells_nothing(message, tmp_path)
    assert not (tmp_path / "out").exists()


def test_names_are_found_in_topics_labels_classes_and_the_name(tmp_path: Path) -> None:
    def lines() -> list[dict[str, object]]:
        found = [line(number) for number in range(9)]
        found[1]["patient"] = "Roe, Jane"
        return found

    cases: list[tuple[dict[str, object], dict[str, object], str]] = [
        ({"reports": [{"Jane Roe": "nuclei are crowded"}]}, {}, "manifest.jsonl line 5: "),
        ({"label": "roe, jane"}, {}, "manifest.jsonl line 5: "),
        ({}, {"name": "Jane's set"}, "--name: "),
        ({}, {"name": "roe jane"}, "--name: "),
        ({}, {"classes": ["low", "high", "Jane Roe"]}, "--classes: "),
        ({}, {"topics": ["crowding", "conclusion", "ROE JANE"]}, "--topics: "),
    ]
    for number, (changed, options, place) in enumerate(cases):
        given = lines()
        given[4].update(changed)
        with pytest.raises(InputError) as caught:
            import_lines(tmp_path / str(number), given, **options)
        assert str(caught.value).startswith(place), (str(caught.value), place)
        assert_tells_nothing(str(caught.value), tmp_path)


def test_ordinary_sets_are_imported(tmp_path: Path) -> None:
    """Words of the set in paths, short names, numbers that count, and what is like a name but longer."""
    words = ["normal", "Low Grade"]
    lines = []
    for number in range(12):
        label = words[number % 2]
        lines.append(
            line(
                number,
                image=f"bladder/{label.replace(' ', '_')}/tissue_{number:04d}.png",
                patient=f"patient {number:03d}",
                label=label,
                reports=[
                    {
                        "tissue": f"{number} images of normal bladder tissue of a patient, train of thought",
                        "conclusion": f"{label} tissue, Janet, 47110, roentgen, low grade; seen in 2020",
                    }
                ],
            )
        )
    lines[1]["patient"] = "Low, Mild"  # these words are said of others as well
    lines[3]["patient"] = "MRN-4711"
    lines[5]["patient"] = "Roe, Jan"
    for number in (1, 2, 3, 6):
        lines[number]["reports"].append({"tissue": "Mild atypia. Low grade"})
    lines[7]["image"] = "bladder/sarcoma/tissue_7.png"
    lines[7]["label"] = "sarcoma"
    manifest, _ = import_lines(tmp_path / "a", lines, classes=["normal", "Low Grade", "sarcoma"])
    assert manifest.name == PSEUDONYMISED and manifest.classes == ["normal", "Low Grade", "sarcoma"]
    with pytest.raises(InputError, match="give it with --topics or --classes"):
        import_lines(tmp_path / "b", lines)


@pytest.mark.parametrize("name", ["nuclei_he", "chest_notes", "lung_he"])
@pytest.mark.slow
def test_real_sets_are_imported_with_pseudonyms(name: str, tmp_path: Path) -> None:
    manifest = shared_data(name) / "manifest.jsonl"
    made, _ = run_import(manifest, tmp_path / "out", salt=b"s" * 16, max_side_px=32)
    assert sum(part.samples for part in made.parts.values()) == len(manifest.read_text().splitlines())


def test_messages_hold_no_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever is wrong with a source: with a salt neither its lines' content nor its folder is told."""
    (tmp_path / "salt").write_text(SALT)
    bad = "images/Jane Roe.png"
    cases: list[dict[str, object]] = [
        {"image": "../Jane Roe.png"},
        {"image": "Jane Roe/none.png"},
        {"image": "Jane\nRoe\0.png"},
        {"image": "Jane Roe" * 100},
        {"image": bad},
        {"image": "images/1.png", "patient": "Jane Roe"},
        {"mask": bad},
        {"mask": "images/Jane Roe small.png"},
        {"mask": "masks/Jane Roe.png"},
        {"label": 3, "image": bad},
        {"label": "Jane Roe " * 9000},
        {"split": "Jane Roe"},
        {"split": ["Jane Roe"]},
        {"patient": ["Jane Roe"], "image": bad},
        {"reports": [{"Jane Roe": 3}]},
        {"reports": [{"Jane Roe": "  "}]},
        {"reports": "Jane Roe", "image": bad},
        {"reports": [{}], "image": bad},
        {"patient": "Jane Roe", "split": "train"},
    ]
    for number, changed in enumerate(cases):
        lines = [line(count) for count in range(9)]
        lines[3].update(patient="Jane Roe", split="test")
        lines[4].update(changed)
        manifest = make_source(tmp_path / str(number) / "Jane Roe", lines)
        (manifest.parent / bad).write_bytes(b"no image")
        picture(1, (3, 3)).save(manifest.parent / "images" / "Jane Roe small.png")
        arguments = ["import", str(manifest), "--out", str(tmp_path / "out"), "--pseudonymise", str(tmp_path / "salt")]
        parsed = build_parser().parse_args(arguments)
        with pytest.raises(InputError) as caught:
            parsed.run(parsed)
        message = str(caught.value)
        assert "manifest.jsonl line 5: " in message, (changed, message)
        assert_tells_nothing(message, tmp_path)
        parsed.pseudonymise = None
        if changed != cases[-1]:  # without a salt most say what they are about
            with pytest.raises(InputError):
                parsed.run(parsed)
    said = capfd.readouterr()
    assert_tells_nothing(said.out + said.err, tmp_path)


def test_ignored_fields_are_counted(tmp_path: Path) -> None:
    lines = [line(number, **{"Jane Roe": 1, "licence": "CC0"}) for number in range(9)]
    _, notes = import_lines(tmp_path, lines)
    assert notes[0] == "ignored fields: 2"


def test_names_of_other_formats_are_not_told(tmp_path: Path) -> None:
    caption = "mild. crowded. lost. rare. small. low grade"
    wrong: list[dict[str, object]] = [
        {"caption": "Jane Roe"},
        {"caption": [caption], "label": 9},
        {"caption": ["Jane. Roe"], "label": 1},
        {"caption": [caption], "label": 1},
    ]
    for number, content in enumerate(wrong):
        folder = tmp_path / f"{number} Jane Roe"
        folder.mkdir()
        (folder / "train_annotation.json").write_text(json.dumps({"Jane Roe_1": content}))
        with pytest.raises(InputError) as caught:
            import_source(read_bcidr(folder, nameless=True), tmp_path / "out", ImportOptions(salt=b"s" * 16))
        assert str(caught.value).startswith("train_annotation.json: item 1: ")
        assert_tells_nothing(str(caught.value), tmp_path)
    items: list[dict[str, object]] = [
        {"id": "Jane Roe"},
        {"id": "Jane Roe", "image_path": ["Jane Roe/1.png"], "report": 3},
        {"id": "Jane Roe", "split": "Jane Roe"},
        {"id": "Jane Roe", "image_path": ["Jane Roe/1.png"], "report": "Low grade."},
    ]
    for item in items:
        (tmp_path / "annotation.json").write_text(json.dumps({"train": [item]}))
        with pytest.raises(InputError) as caught:
            import_source(read_r2gen(tmp_path, nameless=True), tmp_path / "out", ImportOptions(salt=b"s" * 16))
        assert str(caught.value).startswith("annotation.json: train item 1: ")
        assert_tells_nothing(str(caught.value), tmp_path)


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
