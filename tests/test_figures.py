"""The pictures show what they are given, survive any text, and appear whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mdnet_dist import figures
from mdnet_dist.errors import InputError
from tests.conftest import REPOSITORY

GRID = 7


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are written, to look at their parts; they are written all the same."""
    caught: list[Any] = []
    write = figures.write_figure

    def catch(figure: Any, path: Path) -> None:
        caught.append(figure)
        write(figure, path)

    monkeypatch.setattr(figures, "write_figure", catch)
    return caught


def peaked(row: int, column: int, share: float = 0.9) -> np.ndarray:
    """Attention with `share` of it at one position of the grid."""
    attention = np.full((GRID, GRID), (1 - share) / (GRID * GRID - 1))
    attention[row, column] = share
    return attention


def report_of(words: dict[str, list[str]], path: Path, **changes: Any) -> None:
    generator = np.random.default_rng(0)
    given_values: dict[str, Any] = {
        "image": generator.integers(0, 256, (60, 80, 3), dtype=np.uint8),
        "words": words,
        "attention": {
            topic: generator.dirichlet(np.ones(GRID**2), len(said)).reshape(-1, GRID, GRID)
            for topic, said in words.items()
        },
        "class_probabilities": {"normal": 0.1, "high grade": 0.7, "low grade": 0.2},
        "class_map": generator.normal(size=(GRID, GRID)),
        "label": "high grade",
        "references": [{"mitosis": "No mitoses."}],
    }
    figures.draw_report(**{**given_values, **changes}, path=path)


def texts_of(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_a_report_shows_sentences_words_classes_and_references(tmp_path, drawn):
    sentences = {"mitosis": "mitoses are rare", "nucleoli": "small nucleoli are seen in most of the nuclei"}
    words = {topic: sentence.split() for topic, sentence in sentences.items()}
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[10:30, 20:50] = 255
    report_of(words, tmp_path / "report.png", mask=mask)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 600
    texts = texts_of(drawn[0])
    for wanted in ("mitoses are rare", "reference: No mitoses.", "high grade  0.70  (true label)", "“mitoses”"):
        assert wanted in texts
    assert texts.count("whole sentence") == 2
    images = [axes for axes in drawn[0].axes if axes.images]
    assert len(images) == 2 + (1 + 3) + (1 + figures.WORD_MAPS)
    outlined = [axes for axes in images if axes.collections]
    assert len(outlined) == len(images), "the annotation is on every picture"


def test_the_end_token_is_left_out_and_a_topic_without_words_says_so(tmp_path, drawn):
    attention = {"mitosis": np.stack([peaked(0, 0), peaked(6, 6)]), "nucleoli": np.zeros((1, GRID, GRID))}
    report_of({"mitosis": ["rare"], "nucleoli": []}, tmp_path / "r.png", attention=attention, label=None, references=[])
    texts = texts_of(drawn[0])
    assert "(nothing said)" in texts and "true label unknown" in texts
    pictures = [axes.images[0].get_array() for axes in drawn[0].axes if axes.images]
    assert len(pictures) == 2 + 2
    np.testing.assert_array_equal(pictures[2], pictures[3], "one word's sentence looks where the word does")


@pytest.mark.parametrize(
    "text", ["$\\frac{", "a $5 b$", "<script>alert(1)</script>", "核分裂", "%s {0} \\n", "x" * 300]
)
def test_any_text_can_be_drawn(tmp_path, drawn, text):
    report_of(
        {text: [text, "b"]},
        tmp_path / "r.png",
        class_probabilities={text: 0.6, "other": 0.4},
        label=text,
        references=[{text: text}],
    )
    figures.draw_confusion_matrix(np.ones((1, 2), dtype=int), [text], tmp_path / "c.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_map_is_coloured_where_it_is_high_and_stays_in_place(tmp_path):
    image = np.full((56, 56, 3), 128, dtype=np.uint8)
    for row, column in ((0, 0), (1, 5), (6, 2)):
        picture = figures._overlay(image, peaked(row, column), 0.0, 0.9, "viridis")
        assert picture.shape == (figures.PANEL_PX, figures.PANEL_PX, 3)
        assert picture.min() >= 0 and picture.max() <= 1
        # viridis ends in yellow: much red and green, little blue.
        yellow = picture[..., 0] + picture[..., 1] - picture[..., 2]
        cell = figures.PANEL_PX / GRID
        hottest = np.unravel_index(yellow.argmax(), yellow.shape)
        assert (int(hottest[0] // cell), int(hottest[1] // cell)) == (row, column)


def test_the_words_that_look_elsewhere_are_chosen():
    words = ["the", "mitoses", "are", "rare", "here"]
    even = np.full((GRID, GRID), 1 / GRID**2)
    attention = np.stack([peaked(0, 0), peaked(3, 3), even, peaked(5, 1), even])
    assert figures.telling_words(words, attention, most=2) == [1, 3]
    assert figures.telling_words(words, attention, most=4) == [0, 1, 3, 4], "a function word where others are too few"
    assert figures.telling_words([], np.zeros((0, GRID, GRID))) == []


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 12), most=st.integers(0, 6))
def test_chosen_words_are_distinct_in_reading_order_and_content_words_first(seed, length, most):
    generator = np.random.default_rng(seed)
    words = list(generator.choice(["of", "the", "nuclei", "large", "mild"], length))
    attention = generator.dirichlet(np.full(9, 0.3), length).reshape(length, 3, 3)
    chosen = figures.telling_words(words, attention, most)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(most, length)
    content = {number for number, word in enumerate(words) if word not in ("of", "the")}
    assert len(content & set(chosen)) == min(most, len(content))


def test_a_confusion_matrix_says_counts_shares_and_how_many_are_right(tmp_path, drawn):
    counts = np.array([[40, 8, 2], [0, 0, 0]])
    figures.draw_confusion_matrix(counts, ["normal", "high grade"], tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["40\n80 %", "8\n16 %", "2\n4 %"] + ["0\n0 %"] * 3
    assert axes.get_title() == "40 of 50 right (80.0 %)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["normal", "high grade", "no class"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.16, 0.04], [0, 0, 0]])
    figures.draw_confusion_matrix(
        np.eye(100, 101, dtype=int), [str(number) for number in range(100)], tmp_path / "m.png"
    )
    assert not drawn[1].axes[0].texts, "a hundred classes have colours alone"
    with pytest.raises(ValueError, match="classes, classes"):
        figures.draw_confusion_matrix(np.ones((2, 2)), ["a", "b"], tmp_path / "x.png")


def write_metrics(path: Path, entries: list[tuple[int, dict[str, Any]]]) -> None:
    lines = [json.dumps({"step": step, "time": 1.0, "metrics": values}) for step, values in entries]
    path.write_text("\n".join(lines) + '\n{"step": 9, "tor')


def test_curves_show_each_kind_of_metric_in_its_panel(tmp_path, drawn):
    metrics = {
        "train/loss_m": 1.0,
        "val/loss_l": 2.0,
        "val/bleu4": 0.5,
        "beta": 0.3,
        "eta": 5.0,
        "images_per_second": 9.0,
        "final/test/loss_m": 1.0,
    }
    metrics |= {"gradient_norm_m": 1.0, "gradient_norm_l": 0.01, "train/learning_rate_d": 0.1}
    write_metrics(
        tmp_path / "metrics.jsonl", [(step, metrics) for step in (0, 10, 20)] + [(30, {"train/loss_m": "nan"})]
    )
    figures.draw_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    names = {title: [line.get_label() for line in axes.lines] for title, axes in panels.items()}
    assert names == {
        "Losses": ["train/loss_m", "val/loss_l"],
        "Scores on the validation part": ["val/bleu4"],
        "Blend of the two losses": ["beta"],
        "Balance of the two gradients": ["eta"],
        "Gradient norms": ["gradient_norm_l", "gradient_norm_m"],
        "Learning rates": ["train/learning_rate_d"],
    }
    assert all(
        axes.get_xlabel() == "optimiser steps" and axes.get_ylabel() and axes.get_legend() for axes in panels.values()
    )
    loss = panels["Losses"].lines[0]
    np.testing.assert_array_equal(loss.get_xdata(), [0, 10, 20, 30])
    np.testing.assert_array_equal(loss.get_ydata(), [1, 1, 1, np.nan])
    assert [line.get_color() for line in panels["Losses"].lines] == list(figures.COLOURS[:2])
    assert panels["Gradient norms"].get_yscale() == "log"
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_curves_of_nothing_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: no losses"):
        figures.draw_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    write_metrics(tmp_path / "metrics.jsonl", [(0, {"images_per_second": 3.0})])
    with pytest.raises(InputError, match=r"metrics\.jsonl: no losses"):
        figures.draw_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_drawing_leaves_global_settings_alone_and_no_half_written_picture(tmp_path, monkeypatch):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_metrics(tmp_path / "metrics.jsonl", [(1, {"loss": 3.0})])
    figures.draw_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
    good = (tmp_path / "curves.png").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        figures.draw_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_drawing_needs_no_pyplot(tmp_path):
    """pyplot keeps figures in memory and wants a display; another test may have imported it, so a new process looks."""
    code = (
        "import sys, numpy; from pathlib import Path; from mdnet_dist import figures\n"
        f"figures.draw_confusion_matrix(numpy.ones((1, 2)), ['a'], Path({str(tmp_path / 'c.png')!r}))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (run.stdout, run.stderr) == ("False\n", "")
