"""Pages that explain: what they show, in a real browser, and what they refuse to do."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.prepare import open_image
from mdnet_dist.config import DataConfig
from mdnet_dist.errors import InputError
from mdnet_dist.explain import Entry, Explanation, index, page
from mdnet_dist.explain_run import explain, explain_sources
from mdnet_dist.figures import draw_report
from mdnet_dist.predict import Answer
from mdnet_dist.saved import open_model
from mdnet_dist.shards import load_manifest
from tests.browser import Browser
from tests.saved import untrained_run
from tests.test_train import run
from tests.tiny import CLASSES, TOPICS, tiny_config, tiny_set

EVIL = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">&\"'"
TAB, ENTER, ESCAPE, RIGHT = "\ue004", "\ue007", "\ue00c", "\ue014"


def explanation(key: str = "k1", text: str = "", seed: int = 0) -> Explanation:
    """Two topics and two classes; the word "large" looks at the lower right alone. Args: text: put into all text."""
    rng = np.random.default_rng(seed)
    corner = np.zeros((4, 4), dtype=np.float32)
    corner[3, 3] = 1.0
    even = np.full((4, 4), 1 / 16, dtype=np.float32)
    crowding = rng.dirichlet(np.ones(16), 3).reshape(3, 4, 4).astype(np.float32)
    mask = np.zeros((64, 64), dtype=bool)
    mask[10:40, 20:60] = True
    classes = {f"normal{text}": 0.75, f"high grade{text}": 0.25}
    return Explanation(
        key=key + text,
        image=rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        answer=Answer(
            predicted_label=f"normal{text}",
            probabilities=classes,
            words={f"size{text}": ["nuclei", f"large{text}"], "crowding": ["none", "is", "seen"], "empty": []},
            attention={f"size{text}": np.stack([even, corner]), "crowding": crowding, "empty": np.zeros((0, 4, 4))},
            class_maps={name: rng.normal(size=(4, 4)).astype(np.float32) for name in classes},
        ),
        label=f"high grade{text}",
        references=[{f"size{text}": f"small{text}"}, {"crowding": "much", "other": f"nothing{text}"}],
        mask=mask,
    )


class Tags(HTMLParser):
    """All tags of a page, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# ------------------------------------------------------------------------------------------------------------ as text


@pytest.mark.parametrize("text", ["", EVIL])
def test_a_page_holds_everything_and_asks_for_nothing(text: str) -> None:
    shown = explanation(text=text)
    for html in (
        page(shown, "research only", "k1.png"),
        index([Entry.of(shown, "k1.html")], "Title" + text, "research"),
    ):
        found = Tags(html)
        assert [tag for tag, _ in found.tags].count("script") == 1
        assert not any(name.startswith("on") or name == "style" for _, attrs in found.tags for name in attrs)
        addresses = [value for _, attrs in found.tags for name, value in attrs.items() if name in ("src", "href")]
        assert all(str(a).startswith("data:") or a in ("index.html", "k1.png", "k1.html") for a in addresses), addresses
        assert all(a.startswith("data:") for a in re.findall(r"url\(([^)]*)", html))
        assert "high grade" + text in "".join(found.text) or text
        assert "default-src 'none'" in html
    html = page(shown, "research only")
    found = Tags(html)
    assert [a["data-caption"] for _, a in found.tags if a.get("class") == "word"][1] == (
        f"“large{text}” (size{text}): most at the bottom right, 16.0 times even attention"
    )
    # words, sentences of topics that have words, classes
    assert sum("data-map" in attrs for _, attrs in found.tags) == 5 + 2 + 2
    assert [attrs["value"] for tag, attrs in found.tags if tag == "meter"] == ["0.7500", "0.2500"]
    for sentence in (f"small{text}", "much", f"other: nothing{text}"):
        assert sentence in "".join(found.text)


def test_a_page_without_labels_topics_or_classes() -> None:
    shown = explanation()
    bare = replace(shown, label=None, references=[], mask=None)
    assert "True class: unknown" in page(bare, "use")
    assert (
        "annotation" not in page(bare, "use").replace("annotated", "").partition("<body>")[2].partition("<script>")[0]
    )
    silent = replace(bare, answer=replace(bare.answer, words={}, attention={}))
    assert "writes no reports" in page(silent, "use")
    nothing = replace(silent, answer=replace(silent.answer, predicted_label=None, probabilities={}, class_maps={}))
    assert "knows no classes" in page(nothing, "use")
    assert nothing.confidence is None and nothing.error is None
    assert "data-error" not in index([Entry.of(nothing, "a.html")], "t", "use").partition("<script>")[0]


def entry(key: str, label: str | None, sure: float, error: float | None) -> Entry:
    """An image that was taken for an "a"."""
    return Entry(
        key=key, file="x.html", predicted_label="a", label=label, confidence=sure, error=error, thumbnail="data:,"
    )


def test_the_index_begins_with_the_largest_error() -> None:
    entries = [entry("one", "a", 0.9, 0.1), entry("two", "b", 0.8, 0.8), entry("three", None, 0.5, None)]
    html = index(entries, "t", "use")
    assert re.findall(r'data-name="(\w+)"', html) == ["two", "one", "three"]
    assert "3 images, 1 predicted wrong" in html


@pytest.mark.parametrize("lacks", ["topics", "classes", "both"])
def test_a_picture_without_topics_or_classes(tmp_path: Path, lacks: str) -> None:
    """A set may have no labels, and another no reports: the picture then has no such panels."""
    answer = explanation().answer
    words = {} if lacks != "classes" else answer.words
    class_map = answer.class_maps["normal"] if lacks == "topics" else None
    probabilities = answer.probabilities if lacks == "topics" else {}
    image = explanation().image
    path = tmp_path / "report.png"
    draw_report(image, words, answer.attention, probabilities, class_map, None, [], path=path)
    with Image.open(path) as picture:
        assert picture.height == pytest.approx(120 * (3.75 + 1.72 * len(words)), abs=2)


# -------------------------------------------------------------------------------------------------------- what is read


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_set(folder / "shards")
    return untrained_run(tiny_config(folder / "shards", folder / "runs"))[0]


def test_samples_and_images_are_explained(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, card, _ = open_model(saved)
    shards = saved.parent.parent / "shards"
    read = list(explain_sources(network, card, [shards], open_image, part="val"))
    samples = sorted(read, key=lambda shown: shown.key)
    assert [shown.key for shown in samples] == [f"val_{number:03d}" for number in range(6)]
    assert [shown.mask is not None for shown in samples] == [number % 3 == 0 for number in range(6)]
    assert all(shown.references for shown in samples)
    for shown in samples:
        assert list(shown.answer.words) == TOPICS and list(shown.answer.class_maps) == CLASSES
    some = list(explain_sources(network, card, [shards], open_image, part="val", keys=["val_004", "val_001"]))
    assert [shown.key for shown in some] == [s.key for s in read if s.key in ("val_001", "val_004")], "as they lie"
    assert len(list(explain_sources(network, card, [shards], open_image, count=2))) == 2
    with pytest.raises(InputError, match="no sample 'val_099'"):
        list(explain_sources(network, card, [shards], open_image, part="val", keys=["val_099"]))
    with pytest.raises(InputError, match="part 'nope'"):
        list(explain_sources(network, card, [shards], open_image, part="nope"))

    damaged = tmp_path / "damaged"  # no shard is read behind the last key that was asked for
    shutil.copytree(shards, damaged)
    first, *others = load_manifest(damaged).shards_of(["train"])
    for shard in others:
        (damaged / shard.file).write_bytes(b"")
    key = next(shown.key for shown in explain_sources(network, card, [damaged], open_image, part="train", count=1))
    assert others
    assert [s.key for s in explain_sources(network, card, [damaged], open_image, part="train", keys=[key])] == [key]
    with pytest.raises(InputError, match="damaged after sample 0"):
        list(explain_sources(network, card, [damaged], open_image, part="train"))

    asked: list[str] = []

    def skipping(place: str) -> DataConfig:
        asked.append(place)
        return DataConfig(shards=place, damaged="skip", most_damaged=1.0)

    kept = list(explain_sources(network, card, [damaged], open_image, data_of=skipping, part="train"))
    assert len(kept) == first.samples and asked == [str(damaged)]

    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a b.png", "a_b.png", "A-b.png"):
        Image.fromarray(samples[0].image).save(folder / name)
    (folder / "bad.png").write_bytes(b"bad")
    files = list(explain_sources(network, card, [folder, folder / "a b.png"], open_image))
    assert [shown.key for shown in files] == ["A-b.png", "a b.png", "a_b.png", "a b.png"]
    assert "bad.png" in capsys.readouterr().err
    assert files[0].answer.words == samples[0].answer.words, "the same picture"


def test_files_of_pages(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys become plain names, none of which another has; nothing leaves the folder."""
    _, card, _ = open_model(saved)
    monkeypatch.setattr("mdnet_dist.explain_run.draw_report", lambda *_, path, **__: path.write_bytes(b"png"))
    keys = ["../../etc/passwd", "a b", "a_b", "A_B", "", "index", "<b>"]
    out = tmp_path / "out"
    assert explain(card, [replace(explanation(), key=key) for key in keys], out, "t") == 7
    names = {path.name for path in out.iterdir()}
    stems = ["_etc_passwd", "a_b", "a_b-2", "A_B-3", "image", "index-2", "_b_"]
    assert names == {"index.html", *(f"{stem}.{kind}" for stem in stems for kind in ("html", "png"))}
    links = re.findall(r'<a href="([^"]*)"', (out / "index.html").read_text())
    assert set(links) == {f"{stem}.html" for stem in stems}
    with pytest.raises(InputError, match="none of the images"):
        explain(card, [], out, "t")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        explain(card, [explanation()], tmp_path / "file", "t")


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def written(folder: Path, html: str) -> Path:
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    return path


SHOWN = "const o = document.getElementById('overlay'); return o.hidden ? null : o.src"
MAPS = "return [...document.querySelectorAll('.word')].map((word) => word.dataset.map)"


@pytest.mark.slow
def test_pointing_tapping_and_keys_show_where_the_network_looked(tmp_path: Path, browser: Browser) -> None:
    browser.go(written(tmp_path, page(explanation(), "research only")))
    assert browser.run(SHOWN) is None
    maps = browser.run(MAPS)
    browser.hover(".word:nth-of-type(2)")
    assert browser.run(SHOWN) == maps[1]
    caption = browser.run("return document.getElementById('caption').textContent")
    assert caption == "“large” (size): most at the bottom right, 16.0 times even attention"
    # The map itself, as the browser decodes it: lightest and most opaque in the lower right corner.
    corners = browser.run(
        "const c = document.createElement('canvas'), o = document.getElementById('overlay');"
        "const x = c.getContext('2d', {willReadFrequently: true});"
        "c.width = c.height = 56; x.drawImage(o, 0, 0, 56, 56);"
        "return [[2, 2], [53, 53]].map(([a, b]) => [...x.getImageData(a, b, 1, 1).data])"
    )
    assert corners[0][3] < 80 and corners[1][3] > 190
    assert corners[1][0] > 200 and corners[1][1] > 200, "yellow is viridis' upper end"
    assert browser.run("return document.querySelector('.scale:not([hidden]) .high').textContent") != ""
    browser.hover_nothing()
    assert browser.run(SHOWN) is None

    browser.run("document.querySelectorAll('.word')[0].focus()")
    assert browser.run(SHOWN) == maps[0]
    browser.keys(RIGHT)
    assert browser.run(SHOWN) == maps[1]
    browser.keys(ENTER)
    browser.keys(TAB, TAB, TAB, TAB, TAB, TAB, TAB, TAB, TAB)
    assert browser.run("return document.querySelector('[aria-pressed=true]').textContent") == "large"
    browser.run("document.activeElement.blur()")
    assert browser.run(SHOWN) == maps[1], "kept"
    browser.keys(ESCAPE)
    assert browser.run(SHOWN) is None

    browser.tap(".topic:nth-of-type(2) .word:nth-of-type(3)")
    assert browser.run(SHOWN) == maps[4]
    browser.tap(".class")
    assert browser.run("return document.querySelector('.scale:not([hidden])').dataset.of") == "activation"
    browser.run("document.getElementById('annotated').click()")
    assert browser.run("return document.getElementById('outline').hidden") is True
    assert browser.complaints() == []


@pytest.mark.slow
def test_no_request_leaves_a_page_and_no_text_runs(tmp_path: Path, browser: Browser) -> None:
    shown = explanation(text=EVIL)
    pages = {
        "page.html": page(shown, "use" + EVIL, "p.png"),
        "list.html": index([Entry.of(shown, "page.html")], "Title" + EVIL, "use"),
    }
    for name, html in pages.items():
        path = tmp_path / name
        path.write_text(html, encoding="utf-8")
        browser.requests()
        browser.go(path)
        for word in range(browser.run("return document.querySelectorAll('[data-map], [data-sort]').length")):
            browser.run(f"document.querySelectorAll('[data-map], [data-sort]')[{word}].click()")
        asked = [url for url in browser.requests() if not url.startswith(("data:", "chrome:"))]
        assert asked == [path.resolve().as_uri()]
        assert browser.run("return document.title") != "run"
        assert browser.run("return document.scripts.length") == 1
        assert browser.complaints() == []
    # The policy holds where escaping would fail: the same page with markup put into it by force.
    forced = pages["page.html"].replace("<h1>", "<h1>" + EVIL + '<img src="http://127.0.0.1:9/x.png">')
    browser.go(written(tmp_path, forced))
    assert browser.run("return document.title") != "run"
    assert browser.run("return document.scripts.length") == 2, "it is in the page, and did not run"
    assert len(browser.complaints()) >= 3


@pytest.mark.slow
def test_the_index_sorts(tmp_path: Path, browser: Browser) -> None:
    entries = [entry("k10", "a", 0.9, 0.1), entry("k2", "b", 0.6, 0.7), entry("k1", "b", 0.8, 0.9)]
    entries.append(entry("k3", None, 0.5, None))
    browser.go(written(tmp_path, index(entries, "t", "use")))
    order = "return [...document.querySelectorAll('li')].map((card) => card.dataset.name)"
    assert browser.run(order) == ["k1", "k2", "k10", "k3"]
    for clicked, expected in (
        ("error", ["k10", "k2", "k1", "k3"]),
        ("confidence", ["k3", "k2", "k1", "k10"]),
        ("confidence", ["k10", "k1", "k2", "k3"]),
        ("name", ["k1", "k2", "k3", "k10"]),
    ):
        browser.run(f"document.querySelector('[data-sort={clicked}]').focus()")
        browser.keys(ENTER)
        assert browser.run(order) == expected, clicked
        assert browser.run("return document.querySelector('[aria-pressed=true]').dataset.sort") == clicked


@pytest.mark.slow
def test_a_page_fits_a_phone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Browser(tmp_path_factory.mktemp("phone"), 500, 800) as phone:
        for html in (page(explanation(key="long" * 40), "use"), index([Entry.of(explanation(), "a.html")], "t", "use")):
            phone.go(written(tmp_path, html))
            width, inner = phone.run("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert width <= inner, "nothing to scroll sideways"
        phone.go(written(tmp_path, page(explanation(), "use")))
        phone.run("window.scrollTo(0, 400)")
        top, bottom = phone.run(
            "const b = document.getElementById('stage').getBoundingClientRect(); return [b.top, b.bottom]"
        )
        assert top >= 0 and bottom < 800 * 0.6, "the image stays in sight while one reads"
        viewer = "const v = document.querySelector('.viewer').getBoundingClientRect(); "
        phone.run("window.scrollTo(0, document.body.scrollHeight); document.querySelector('.word').focus()")
        covered, word = phone.run(viewer + "return [v.bottom, document.activeElement.getBoundingClientRect().top]")
        assert covered < 800 * 0.6 and word >= covered, "what has the focus is not under the image"
    with Browser(tmp_path_factory.mktemp("lying"), 840, 500) as lying:
        lying.go(written(tmp_path, page(explanation(), "use")))
        height, inner = lying.run(
            "return [document.getElementById('stage').getBoundingClientRect().height, window.innerHeight]"
        )
        assert height < inner * 0.8, "all of the image is seen at once"


@pytest.mark.slow
def test_the_command(saved: Path, tmp_path: Path) -> None:
    shards, out = saved.parent.parent / "shards", tmp_path / "out"
    Image.new("RGB", (40, 40), "pink").save(tmp_path / "pink.png")
    finished = run(
        sys.executable, "launch/explain.py", saved, shards, tmp_path / "pink.png", "--out", out, "--count", 2
    )
    assert finished.returncode == 0, finished.stderr
    assert f"3 images explained: {out / 'index.html'}" in finished.stdout
    assert {path.suffix for path in out.iterdir()} == {".html", ".png"} and len(list(out.iterdir())) == 7
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 500
    wrong = run(sys.executable, "launch/explain.py", saved, tmp_path / "none.png", "--out", out)
    assert wrong.returncode == 2
    assert "none.png: no such image" in wrong.stderr.splitlines()[-1]
