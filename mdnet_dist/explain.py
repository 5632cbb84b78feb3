"""Pages that show a network's reasons: one for each image, and an index over them.

A page is one file. It asks nothing of any network: pictures are data: URIs, and its Content-Security-Policy allows its
own style and its own script by their hashes and nothing else, so that no text of a report, a file name or a class can
run, load or send anything. All text is escaped besides.

Colours are viridis (attention) and cividis (class activation), which colour-blind readers can order by lightness.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from mdnet_dist.explain_assets import INDEX_SCRIPT, PAGE_SCRIPT, STYLE
from mdnet_dist.images import encode_jpeg
from mdnet_dist.predict import Answer
from mdnet_dist.shards import Report

OVERLAY_PX = 56  # side of an embedded map; the browser enlarges it
THUMBNAIL_PX = 112
LEVELS = 32  # of a map: finer steps than the eye sees, and half the bytes
OUTLINE = (230, 159, 0)  # Okabe and Ito's orange


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that a page shows of one image."""

    key: str
    image: np.ndarray  # (S, S, 3) uint8, as the network saw it
    answer: Answer
    label: str | None  # the true class, where known
    references: Sequence[Report]  # reports by people
    mask: np.ndarray | None = None  # (S, S) bool: annotation

    @property
    def confidence(self) -> float | None:
        """Probability of the predicted class."""
        return max(self.answer.probabilities.values(), default=None)

    @property
    def error(self) -> float | None:
        """What the true class lacks to certainty, 1 - p; None where no class is known to be true."""
        return None if self.label is None else 1.0 - self.answer.probabilities.get(self.label, 0.0)


# -------------------------------------------------------------------------------------------------------------- a page


def page(shown: Explanation, intended_use: str, picture: str | None = None) -> str:
    """The HTML page of one image. Args: picture: name of the PNG file beside it."""
    answer = shown.answer
    grid = next((maps.shape[1] * maps.shape[2] for maps in answer.attention.values()), 1)
    words = {topic: maps * grid for topic, maps in answer.attention.items() if len(maps)}  # 1 where spread evenly
    word_high = _high(list(words.values()))
    sentence_high = _high([maps.mean(axis=0) for maps in words.values()])
    style = STYLE + f".base{{background-image:url({_jpeg_uri(shown.image)})}}"
    body = [
        '<p class="crumbs"><a href="index.html">All images</a>'
        + (f' <a href="{escape(picture)}">This one as a picture</a>' if picture else "")
        + "</p>",
        f"<h1>{escape(shown.key)}</h1>",
        _verdict(shown),
        '<main><section class="viewer" aria-label="Image and map"><div class="stage base" id="stage" role="img" '
        'aria-label="The image as the network saw it"><img id="overlay" alt="" hidden>',
        '<img id="outline" alt="">' if shown.mask is None else _outline(shown.mask),
        "</div>",
        '<p id="caption" aria-live="polite">Point at a word, tap it or move to it with Tab and the arrow keys: '
        "the image then shows where the network looked when it said it. A click or Enter keeps the map, Escape drops "
        "it.</p>",
        _scale("attention", "viridis"),
        _scale("activation", "cividis"),
    ]
    if shown.mask is not None:
        body.append('<label><input type="checkbox" id="annotated" checked> Outline of the annotation</label>')
    body.append('</section><section class="report"><h2>Report</h2>')
    if not answer.attends:
        body.append("<p>This network has no attention: it says every word from the whole image alike.</p>")
    for topic, said in answer.words.items():
        body.append(_topic(shown, topic, said, words.get(topic), word_high, sentence_high))
    if not answer.words:
        body.append("<p>This network writes no reports.</p>")
    body.append(_other_topics(shown))
    body.append(f"{_classes(answer)}</section></main>")
    body.append(f"<footer>Intended use: {escape(intended_use)}.</footer>")
    return _document(f"{shown.key}: {answer.predicted_label or 'report'}", style, "".join(body), PAGE_SCRIPT)


def _verdict(shown: Explanation) -> str:
    if shown.answer.predicted_label is None:
        return "<p>This network knows no classes.</p>"
    text = f"Predicted: <b>{escape(shown.answer.predicted_label)}</b>, probability {shown.confidence:.2f}. "
    if shown.label is None:
        return f"<p>{text}True class: unknown.</p>"
    right = shown.label == shown.answer.predicted_label
    mark = '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'
    return f"<p>{text}True class: <b>{escape(shown.label)}</b>. {mark}</p>"


def _topic(
    shown: Explanation,
    topic: str,
    said: Sequence[str],
    maps: np.ndarray | None,
    word_high: float,
    sentence_high: float,
) -> str:
    """A row: the whole sentence's map, the sentence word by word, what people said."""
    parts = ['<article class="topic">']
    if maps is not None:
        mean = maps.mean(axis=0)
        uri = _map_uri(mean, 0.0, sentence_high, "viridis")
        parts.append(
            f'<button type="button" class="thumb" {_data(uri, "attention", 0, sentence_high)} '
            f'data-caption="{escape(topic)}, whole sentence: {_where(mean)}" aria-pressed="false" '
            f'aria-label="Map of the whole sentence on {escape(topic)}"><span class="base"></span>'
            f'<img src="{uri}" alt=""></button>'
        )
    parts.append(f'<div><h3>{escape(topic)}</h3><p class="sentence">')
    for word, values in zip(said, maps if maps is not None else []):
        data = _data(_map_uri(values, 0, word_high, "viridis"), "attention", 0, word_high)
        caption = f"“{escape(word)}” ({escape(topic)}): {_where(values)}"
        parts.append(
            f'<button type="button" class="word" {data} data-caption="{caption}" aria-pressed="false">{escape(word)}'
            "</button> "
        )
    if not len(said):
        parts.append("(nothing said)")
    parts.append("</p>")
    told = [report[topic] for report in shown.references if report.get(topic)]
    if told:
        lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in told)
        parts.append(f'<p class="people">People said:</p><ul class="people">{lines}</ul>')
    return "".join(parts) + "</div></article>"


def _other_topics(shown: Explanation) -> str:
    """What people said on topics that the network does not speak about."""
    lines = [
        f"<li>{escape(topic)}: {escape(sentence)}</li>"
        for report in shown.references
        for topic, sentence in report.items()
        if topic not in shown.answer.words
    ]
    return f'<h3>Other topics</h3><ul class="people">{"".join(lines)}</ul>' if lines else ""


def _classes(answer: Answer) -> str:
    """The activation maps of all classes, on one scale, the most probable first."""
    if not answer.class_maps:
        return ""
    stacked = np.stack(list(answer.class_maps.values()))
    low, high = float(stacked.min()), float(stacked.max())
    parts = ['<section><h2>Classes</h2><p>Where the image speaks for each class, in logits.</p><div class="classes">']
    for name in sorted(answer.class_maps, key=lambda name: -answer.probabilities[name]):
        values, probability = answer.class_maps[name], answer.probabilities[name]
        uri = _map_uri(values, low, high, "cividis")
        parts.append(
            f'<button type="button" class="class" {_data(uri, "activation", low, high)} aria-pressed="false" '
            f'data-caption="Class {escape(name)}, probability {probability:.2f}: strongest {_place(values)}">'
            f'<span class="thumb"><span class="base"></span><img src="{uri}" alt=""></span>'
            f'<span class="name">{escape(name)}</span><meter min="0" max="1" value="{probability:.4f}"></meter>'
            f"<span>{probability:.2f}</span></button>"
        )
    return "".join(parts) + "</div></section>"


# ------------------------------------------------------------------------------------------------------------ the index


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the index."""

    key: str
    file: str  # of the page
    predicted_label: str | None
    label: str | None
    confidence: float | None
    error: float | None
    thumbnail: str  # data: URI

    @classmethod
    def of(cls, shown: Explanation, file: str) -> Entry:
        """Of an explained image. Args: file: name of its page."""
        return cls(
            key=shown.key,
            file=file,
            predicted_label=shown.answer.predicted_label,
            label=shown.label,
            confidence=shown.confidence,
            error=shown.error,
            thumbnail=_jpeg_uri(shown.image, THUMBNAIL_PX),
        )


def index(entries: Sequence[Entry], title: str, intended_use: str) -> str:
    """The index page: sorted by error, the largest first, where true classes are known, else by confidence."""
    ordered = sorted(entries, key=lambda one: (-(one.error if one.error is not None else -1), one.confidence or 0.0))
    any_error = any(entry.error is not None for entry in entries)
    sorts = [("error", "Error"), ("confidence", "Confidence"), ("name", "Name")][0 if any_error else 1 :]
    buttons = "".join(
        f'<button type="button" data-sort="{kind}" aria-pressed="{"true" if kind == sorts[0][0] else "false"}">{text}'
        "</button>"
        for kind, text in sorts
    )
    cards = "".join(_card(entry) for entry in ordered)
    wrong = sum(entry.label is not None and entry.label != entry.predicted_label for entry in entries)
    count = f"{len(entries)} image{'s' if len(entries) != 1 else ''}" + (
        f", {wrong} predicted wrong" if any_error else ""
    )
    explained = "Error is 1 minus the probability of the true class. " if any_error else ""
    body = (
        f'<h1>{escape(title)}</h1><p>{count}. {explained}</p><p class="sorts" role="group" aria-label="Sort by">Sort '
        f'by {buttons} <span id="order" aria-live="polite"></span></p><ul class="cards" id="cards">{cards}</ul>'
        f"<footer>Intended use: {escape(intended_use)}.</footer>"
    )
    return _document(title, STYLE, body, INDEX_SCRIPT)


def _card(entry: Entry) -> str:
    known = {"error": entry.error, "confidence": entry.confidence}
    numbers = " ".join(f'data-{name}="{value:.6f}"' for name, value in known.items() if value is not None)
    lines = []
    if entry.predicted_label is not None:
        lines.append(f"{escape(entry.predicted_label)}, {entry.confidence:.2f}")
    if entry.label is not None:
        right = entry.label == entry.predicted_label
        mark = '<span class="right">✓</span>' if right else '<span class="wrong">✗</span>'
        lines.append(f"{mark} true: {escape(entry.label)}")
        lines.append(f"error {entry.error:.2f}")
    text = "".join(f"<span>{line}</span>" for line in lines)
    return (
        f'<li data-name="{escape(entry.key)}" {numbers}><a href="{escape(entry.file)}">'
        f'<img src="{entry.thumbnail}" alt=""><b>{escape(entry.key)}</b>{text}</a></li>'
    )


# -------------------------------------------------------------------------------------------------------------- pieces


def _document(title: str, style: str, body: str, script: str) -> str:
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>{body}\n<script>{script}</script></body></html>\n"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _high(maps: Sequence[np.ndarray]) -> float:
    """The upper end of a scale: nearly the highest value there is, and at least twice that of even attention."""
    return max(2.0, float(np.percentile(np.concatenate([m.ravel() for m in maps]), 99.5))) if maps else 2.0


def _data(uri: str, scale: str, low: float, high: float) -> str:
    return f'data-map="{uri}" data-scale="{scale}" data-low="{low:.1f}" data-high="{high:.1f}"'


def _where(values: np.ndarray) -> str:
    """In words, for those who do not see the map: where it is strongest, and how much stronger than even attention."""
    return f"most {_place(values)}, {float(values.max()):.1f} times even attention"


def _place(values: np.ndarray) -> str:
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    thirds = [min(2, int(3 * (place + 0.5) / size)) for place, size in zip((row, column), values.shape)]
    vertical, horizontal = ("top", "middle", "bottom")[thirds[0]], ("left", "centre", "right")[thirds[1]]
    return "in the centre" if thirds == [1, 1] else f"at the {vertical} {horizontal}"


def _map_uri(values: np.ndarray, low: float, high: float, colours: str) -> str:
    """A map (h, w) as a PNG to lay over the image: its colour and its weight grow with it."""
    size = (OVERLAY_PX, OVERLAY_PX)
    large = np.asarray(Image.fromarray(np.asarray(values, dtype=np.float32)).resize(size, Image.Resampling.BICUBIC))
    scaled = np.nan_to_num(np.clip((large - low) / max(high - low, 1e-12), 0.0, 1.0))
    steps = np.rint(scaled * (LEVELS - 1)).astype(np.uint8)
    picture = Image.fromarray(steps)
    picture.putpalette(_palette(colours).tobytes())
    alpha = bytes(round(255 * (0.25 + 0.55 * step / (LEVELS - 1))) for step in range(LEVELS))
    return _png_uri(picture, transparency=alpha)


def _palette(colours: str) -> np.ndarray:
    """(LEVELS, 3) uint8."""
    from matplotlib import colormaps

    return np.rint(255 * np.asarray(colormaps[colours](np.linspace(0, 1, LEVELS)))[:, :3]).astype(np.uint8)


def _scale(name: str, colours: str) -> str:
    bar = _png_uri(Image.fromarray(_palette(colours)[None]))
    text = {"attention": "times even attention", "activation": "logit"}[name]
    return (
        f'<p class="scale" data-of="{name}" hidden><span class="low"></span><img src="{bar}" alt="dark: low; '
        f'light: high"><span class="high"></span> {text}</p>'
    )


def _outline(mask: np.ndarray) -> str:
    """The border of a mask, one pixel wide, as a transparent picture."""
    inside = np.pad(np.asarray(mask, dtype=bool), 1, mode="edge")
    eroded = inside.copy()
    for axis in (0, 1):
        for shift in (-1, 1):
            eroded &= np.roll(inside, shift, axis)
    border = (inside & ~eroded)[1:-1, 1:-1]
    pixels = np.zeros((*border.shape, 4), dtype=np.uint8)
    pixels[border] = (*OUTLINE, 255)
    return f'<img id="outline" src="{_png_uri(Image.fromarray(pixels))}" alt="">'


def _jpeg_uri(image: np.ndarray, side_px: int | None = None) -> str:
    picture = Image.fromarray(image)
    if side_px is not None:
        picture = picture.resize((side_px, side_px), Image.Resampling.LANCZOS)
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(picture, 90)).decode()


def _png_uri(picture: Image.Image, **options: bytes) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
