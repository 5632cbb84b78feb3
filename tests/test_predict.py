"""`launch/predict.py`: a folder of images to reports, whatever the folder holds."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_shards.prepare import open_image
from mdnet_dist.errors import InputError
from mdnet_dist.evaluation import evaluate
from mdnet_dist.export import ModelCard
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.predict import answers_of, as_batch, prepare_image, split_answers
from mdnet_dist.predict_folder import FORMULA_STARTS, check_out, find_images, guarded, predict_folder
from mdnet_dist.reading import read_shard
from mdnet_dist.run_data import open_part
from mdnet_dist.saved import open_model, saved_config
from mdnet_dist.storage import open_source
from tests.saved import untrained_run
from tests.test_train import run
from tests.tiny import CLASSES, TOPICS, tiny_config, tiny_set


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_set(folder / "shards")
    return untrained_run(tiny_config(folder / "shards", folder / "runs"))[0]


@pytest.fixture(scope="module")
def model(saved: Path) -> tuple[MDNet, ModelCard]:
    network, card, _ = open_model(saved)
    return network, card


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven good images of every format and mode, and files of other kinds."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def pixels(*shape: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))

    pixels(40, 50, 3).save(folder / "a.jpg")
    pixels(40, 30, 3).save(folder / "b.PNG")
    pixels(33, 33).save(folder / "c.tiff")
    pixels(40, 50, 4).save(folder / "below" / "d.webp", lossless=True)
    Image.fromarray(rng.integers(0, 65536, (40, 40), dtype=np.uint16)).save(folder / "below" / "e.png")
    pixels(32, 32, 3).save(folder / "=1+1.png")
    pixels(32, 32, 3).save(folder / "nuclei é.jpeg")
    (folder / "notes.txt").write_text("not an image")
    (folder / "LICENSE").write_text("nor this")
    (folder / ".hidden.png").write_bytes(b"nor this")
    return folder


GOOD = ["=1+1.png", "a.jpg", "b.PNG", "below/d.webp", "below/e.png", "c.tiff", "nuclei é.jpeg"]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_image_gets_a_report(images: Path, model: tuple[MDNet, ModelCard], tmp_path: Path) -> None:
    out = tmp_path / "made" / "reports.jsonl"
    assert predict_folder(*model, images, out, open_image, batch=3) == (7, 0)
    lines = lines_of(out)
    assert [line["image"] for line in lines] == GOOD
    for line in lines:
        assert list(line["probabilities"]) == CLASSES
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["predicted_label"] == max(line["probabilities"], key=lambda name: line["probabilities"][name])
        assert list(line["report"]) == TOPICS
    assert [path.name for path in out.parent.iterdir()] == ["reports.jsonl"]
    # The same file again, one image at a time.
    assert predict_folder(*model, images, tmp_path / "one.jsonl", open_image, batch=1) == (7, 0)
    for one, other in zip(lines, lines_of(tmp_path / "one.jsonl")):
        assert one["report"] == other["report"]
        assert list(one["probabilities"].values()) == pytest.approx(list(other["probabilities"].values()), abs=1e-5)
    assert predict_folder(*model, images / "a.jpg", tmp_path / "a.jsonl", open_image) == (1, 0)
    assert lines_of(tmp_path / "a.jsonl")[0]["report"] == lines[1]["report"]


def test_images_are_prepared_as_evaluation_prepares_them(
    saved: Path, model: tuple[MDNet, ModelCard], tmp_path: Path
) -> None:
    """Images of a shard set, unpacked into a folder, get the reports and probabilities that evaluation gives."""
    network, card = model
    config = saved_config(saved, card)
    data, parts = open_part(config, card, "test")
    (tmp_path / "images").mkdir()
    for shard in data.manifest.shards_of(parts):
        for sample in read_shard(open_source(config.data), shard):
            suffix = "jpg" if sample.image.startswith(b"\xff\xd8") else "png"
            (tmp_path / "images" / f"{sample.key}.{suffix}").write_bytes(sample.image)
    expected = evaluate(network, card, data.evaluation_batches(config, parts, False), device=torch.device("cpu"))
    predict_folder(network, card, tmp_path / "images", tmp_path / "out.jsonl", open_image, batch=4)
    found = {Path(line["image"]).stem: line for line in lines_of(tmp_path / "out.jsonl")}
    assert found.keys() == {prediction.key for prediction in expected.predictions}
    for prediction in expected.predictions:
        line = found[prediction.key]
        assert line["report"] == prediction.report
        assert list(line["probabilities"].values()) == pytest.approx(list(prediction.probabilities.values()), abs=2e-6)


def test_attention_and_maps_of_an_answer(model: tuple[MDNet, ModelCard]) -> None:
    network, card = model
    rng = np.random.default_rng(2)
    squares = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3)]
    answers = answers_of(network, card, as_batch(squares, "cpu"), beam_width=2)
    split = split_answers(network, card, answers, range(1, 3))
    assert len(split) == 2
    assert split_answers(network, card, answers, range(0)) == []
    for i, answer in zip((1, 2), split):
        for topic, words in answer.words.items():
            assert len(answer.attention[topic]) == len(words)
            assert np.allclose(answer.attention[topic].sum((1, 2)), 1, atol=1e-5)
        bias = network.class_maps.bias.detach().numpy()
        means = [class_map.mean() for class_map in answer.class_maps.values()]
        assert np.allclose(means + bias, answers.logits[i], atol=1e-4), "the mean of a class map is the class's logit"


def test_the_temperature_is_used(images: Path, model: tuple[MDNet, ModelCard], tmp_path: Path) -> None:
    network, card = model
    predict_folder(network, card, images, tmp_path / "cold.jsonl", open_image)
    predict_folder(network, replace(card, temperature=4.0), images, tmp_path / "warm.jsonl", open_image)
    for cold, warm in zip(lines_of(tmp_path / "cold.jsonl"), lines_of(tmp_path / "warm.jsonl")):
        assert warm["predicted_label"] == cold["predicted_label"]
        assert max(warm["probabilities"].values()) < max(cold["probabilities"].values())


def test_bad_images_are_named_and_left_out(
    images: Path, model: tuple[MDNet, ModelCard], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "a.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 99)
    (images / "empty.png").write_bytes(b"")
    (images / "text.webp").write_text("hello")
    (tmp_path / "outside.png").write_bytes((images / "b.PNG").read_bytes())
    (images / "link.png").symlink_to(tmp_path / "outside.png")
    (images / "inside.png").symlink_to(images / "b.PNG")
    (images / "broken.png").symlink_to(images / "nothing.png")
    os.mkfifo(images / "pipe.png")
    (images / "scan").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 30)
    assert predict_folder(*model, images, tmp_path / "out.jsonl", open_image, batch=2) == (7, 7)
    assert [line["image"] for line in lines_of(tmp_path / "out.jsonl")] == sorted({*GOOD, "inside.png"} - {"a.jpg"})
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(told) == 7
    for name in ("a.jpg", "empty.png", "text.webp", "link.png", "broken.png", "pipe.png", "scan"):
        assert sum(str(images / name) in line for line in told) == 1, name


def test_when_all_fail_nothing_is_written(model: tuple[MDNet, ModelCard], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(InputError, match="no image in it"):
        find_images(folder)
    with pytest.raises(InputError, match="no such folder"):
        find_images(tmp_path / "nowhere")
    (folder / "a.png").write_bytes(b"no")
    (tmp_path / "out.csv").write_text("as it was")
    with pytest.raises(InputError, match="none of its 1 image files can be read"):
        predict_folder(*model, folder, tmp_path / "out.csv", open_image)
    assert (tmp_path / "out.csv").read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.csv"]


def test_dicom_images_are_read(model: tuple[MDNet, ModelCard], tmp_path: Path) -> None:
    """With a suffix and without; as the same picture in a PNG file."""
    pytest.importorskip("pydicom", reason="DICOM is an optional extra")
    from tests.test_importers import dicom_file

    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(3).integers(0, 256, (40, 40)).astype(np.uint8)
    pixels[0, :2] = 0, 255
    for name in ("a.dcm", "b"):
        (folder / name).write_bytes(dicom_file(pixels))
    Image.fromarray(pixels).save(folder / "c.png")
    assert predict_folder(*model, folder, tmp_path / "out.jsonl", open_image) == (3, 0)
    dcm, bare, png = lines_of(tmp_path / "out.jsonl")
    assert [dcm["image"], bare["image"], png["image"]] == ["a.dcm", "b", "c.png"]
    assert dcm["probabilities"] == bare["probabilities"] == png["probabilities"]


def test_csv_for_spreadsheets(images: Path, model: tuple[MDNet, ModelCard], tmp_path: Path) -> None:
    network, card = model
    evil = replace(card, classes=["=cmd|' /C calc'!A0", "a,b", 'quote " and\nline'], topics=["@SUM(1)", *TOPICS[1:]])
    predict_folder(network, evil, images, tmp_path / "out.csv", open_image)
    predict_folder(network, evil, images, tmp_path / "out.jsonl", open_image)
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert header[:2] == ["image", "predicted_label"]
    assert header[2:] == [f"p({name})" for name in evil.classes] + [f"report: {topic}" for topic in evil.topics]
    assert [row[0] for row in rows] == ["'=1+1.png", *GOOD[1:]]
    for row, line in zip(rows, lines_of(tmp_path / "out.jsonl")):
        assert [float(cell) for cell in row[2:5]] == list(line["probabilities"].values())
        assert row[5:] == list(line["report"].values())
        assert row[1] == guarded(line["predicted_label"])
        assert not any(cell.startswith(FORMULA_STARTS) for cell in row)


@given(st.text())
def test_no_cell_is_a_formula(cell: str) -> None:
    assert not guarded(cell).lstrip(" ").startswith(FORMULA_STARTS)
    assert guarded(cell).removeprefix("'") == cell.removeprefix("'") or guarded(cell) == cell
    for start in FORMULA_STARTS:
        assert guarded(f"  {start}{cell}") == f"'  {start}{cell}"


def test_out_must_be_a_file_of_a_known_kind(tmp_path: Path) -> None:
    for name in ("out.txt", "out", "out.json"):
        with pytest.raises(InputError, match=r"must end with \.jsonl or \.csv"):
            check_out(tmp_path / name)
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_out(tmp_path / "x.csv")


def test_an_image_fits_as_the_card_says(model: tuple[MDNet, ModelCard]) -> None:
    _, card = model
    wide = Image.fromarray(np.zeros((20, 60, 3), dtype=np.uint8))
    for fit in ("pad", "crop", "stretch"):
        square = prepare_image(replace(card, data={**card.data, "fit": fit, "image_size": 48}), wide)
        assert square.shape == (48, 48, 3) and square.dtype == np.uint8


@pytest.mark.slow
def test_the_command(saved: Path, images: Path, tmp_path: Path) -> None:
    (images / "bad.png").write_bytes(b"bad")
    out = tmp_path / "reports.csv"
    finished = run(sys.executable, "launch/predict.py", saved, images, "--out", out, "--beam", 2)
    assert finished.returncode == 0, finished.stderr
    assert f"7 reports in {out}; 1 of 8 images skipped" in finished.stdout
    assert finished.stderr.count("skipped: ") == 1
    assert "deepspeed" not in finished.stderr.lower()
    assert len(out.read_text().splitlines()) == 8
    for arguments, named in (
        ((saved, images, "--out", "x.txt"), "--out x.txt"),
        ((saved, tmp_path / "none", "--out", out), "no such folder"),
        ((tmp_path, images, "--out", out), "model.json"),
        ((saved, images, "--out", out, "--batch", "0"), "--batch 0"),
        ((saved, images / "bad.png", "--out", out), "none of its 1 image files"),
    ):
        wrong = run(sys.executable, "launch/predict.py", *arguments)
        assert wrong.returncode == 2, wrong.stderr
        assert named in wrong.stderr.splitlines()[-1]
        assert "Traceback" not in wrong.stderr
