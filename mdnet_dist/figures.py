"""Pictures of a run: a report with its attention, a confusion matrix, training curves.

matplotlib is imported when the first figure is drawn, without pyplot, so that nothing here needs a display or changes
another figure's settings. Colours are safe for colour-blind readers: viridis, cividis and the palette of Okabe and Ito.
Each picture appears whole or not at all; the path's suffix (.png, .svg, .pdf) chooses the format.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mdnet_dist.errors import InputError
from mdnet_dist.metrics.calibration import Reliability
from mdnet_dist.shards import write_atomically
from mdnet_dist.tracking_files import read_metrics

# Okabe and Ito's palette without black and yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
OUTLINE, QUIET = "#E69F00", "#999999"

WORD_MAPS = 4  # per topic in a report's picture
PANEL_PX = 224  # side of a map in it
_FUNCTION_WORDS = frozenset(
    {
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "for",
        "from",
        "has",
        "have",
        "in",
        "is",
        "it",
        "its",
        "no",
        "not",
    }
    | {"of", "on", "or", "the", "these", "this", "to", "with"}
)

# Panels of the training curves: title, y axis, which metrics.
_PANELS = (
    ("Losses", "loss (nats)", r"^(?!final/)(.*[/_])?loss"),
    # Those that go from 0 to 1 and speak of the whole report: cider goes to 10, bleu4/TOPIC is for tables.
    ("Scores on the validation part", "score", r"^val/(bleu[14]|meteor|rouge_l|dca|label_accuracy|macro_f1|score)$"),
    ("Blend of the two losses", "beta", r"(^|/)beta$"),
    ("Balance of the two gradients", "eta", r"(^|/)eta$"),
    ("Gradient norms", "norm", r"grad"),
    ("Learning rates", "rate", r"(^|[/_])(lr|learning_rate|rate)([/_]|$)"),
)


# ------------------------------------------------------------------------------------------------------------ a report


def draw_report(
    image: np.ndarray,
    words: Mapping[str, Sequence[str]],
    attention: Mapping[str, np.ndarray],
    class_probabilities: Mapping[str, float],
    class_map: np.ndarray | None,
    label: str | None,
    references: Sequence[Mapping[str, str]],
    mask: np.ndarray | None = None,
    *,
    path: Path,
) -> None:
    """What the network says of an image, and where it looked when it said so.

    Above: the image, the class activation map of the predicted class, the class probabilities. Below, a row a topic:
    its sentence (and the first reference), the mean of its words' attention, and the content words whose attention
    differs most from that mean. Attention is 1 where it is spread evenly over the positions. The means share one scale
    and the words another, so that sharper attention looks sharper.

    Args:
        image: (h, w, 3), uint8.
        words: {topic: the T words said}; without any topic the lower half is left out.
        attention: {topic: (T or more, grid, grid)}, one map a word, each summing to 1; maps past the words are ignored.
        class_probabilities: {class: probability}.
        class_map: (grid, grid), of the predicted (most probable) class, in logits; None without classes.
        label: the true class, where known.
        references: reports by people, {topic: sentence}.
        mask: (h, w), not 0 inside; its outline is drawn.
        path: of the picture.
    """
    height = 3.75 + 1.72 * len(words)
    figure = new_figure(11, height)
    above = figure.add_gridspec(1, 1, left=0.02, right=0.97, top=1 - 0.3 / height, bottom=1 - 2.7 / height)[0]
    head = above.subgridspec(1, 3, width_ratios=[1.25, 1.25, 1.5], wspace=0.12)

    axes = _bare(figure.add_subplot(head[0]), "Image" + (", annotation outlined" if mask is not None else ""))
    axes.imshow(image)
    _outline(axes, mask, image.shape)

    if class_map is not None:
        predicted = max(class_probabilities, key=lambda name: class_probabilities[name])
        axes = _bare(figure.add_subplot(head[1]), f"Class activation: {short_name(predicted, 28)}")
        low, high = float(class_map.min()), float(class_map.max())
        axes.imshow(_overlay(image, class_map, low, high, "cividis"), extent=(0, image.shape[1], image.shape[0], 0))
        _outline(axes, mask, image.shape)
        _colour_bar(figure, axes, low, high, "cividis", "logit")
        _draw_probabilities(figure.add_subplot(head[2]), class_probabilities, predicted, label)
    if not words:
        write_figure(figure, path)
        return

    below = figure.add_gridspec(1, 1, left=0.02, right=0.99, top=1 - 3.35 / height, bottom=0.55 / height)[0]
    rows = below.subgridspec(len(words), WORD_MAPS + 2, width_ratios=[2.1] + [1] * (WORD_MAPS + 1), wspace=0.06)
    maps = {topic: np.asarray(attention[topic])[: len(said)] for topic, said in words.items() if len(said)}
    maps = {topic: values * values[0].size for topic, values in maps.items()}
    chosen = {topic: telling_words(words[topic], maps[topic]) for topic in maps}
    # Two scales, because a mean over words is flatter than its parts.
    sentence_high = _high([maps[topic].mean(axis=0) for topic in maps])
    word_high = _high([maps[topic][number] for topic in maps for number in chosen[topic]])
    for row, (topic, said) in enumerate(words.items()):
        reference = next((report[topic] for report in references if topic in report), None)
        _draw_sentence(figure.add_subplot(rows[row, 0]), topic, said, reference)
        panels: list[tuple[str, np.ndarray, float]] = []
        if topic in maps:
            panels += [("whole sentence", maps[topic].mean(axis=0), sentence_high)]
            panels += [
                (f"“{short_name(said[number], 18)}”", maps[topic][number], word_high) for number in chosen[topic]
            ]
        for column, (title, values, most) in enumerate(panels, start=1):
            axes = _bare(
                figure.add_subplot(rows[row, column]), title, size=8.5, weight="bold" if column == 1 else "normal"
            )
            axes.imshow(_overlay(image, values, 0.0, most, "viridis"), extent=(0, image.shape[1], image.shape[0], 0))
            _outline(axes, mask, image.shape, width=0.6)
    for left, right, most, what in (
        (1, 1, sentence_high, "mean attention"),
        (2, WORD_MAPS + 1, word_high, "attention"),
    ):
        first, last = (rows[len(words) - 1, column].get_position(figure) for column in (left, right))
        bar = figure.add_axes((first.x0, first.y0 - 0.115 / height, last.x1 - first.x0, 0.08 / height))
        _scale(figure, bar, 0.0, most, "viridis", f"{what} (1 = even)", horizontal=True)
    write_figure(figure, path)


def telling_words(words: Sequence[str], attention: np.ndarray, most: int = WORD_MAPS) -> list[int]:
    """Numbers, in reading order, of the words whose attention differs most from the sentence's mean attention.

    The difference is the Kullback-Leibler divergence of a word's map from the mean. Function words ("of", "with") come
    in only where there are too few others.

    Args:
        words: the T words.
        attention: (T, grid, grid), not negative.
        most: how many at most.
    """
    if not len(words):
        return []
    maps = np.maximum(np.asarray(attention, dtype=np.float64).reshape(len(words), -1), 1e-12)
    maps /= maps.sum(axis=1, keepdims=True)
    divergence = (maps * np.log(maps / maps.mean(axis=0))).sum(axis=1)
    ranked = sorted(range(len(words)), key=lambda number: (words[number] in _FUNCTION_WORDS, -divergence[number]))
    return sorted(ranked[:most])


def _draw_sentence(axes: Any, topic: str, words: Sequence[str], reference: str | None) -> None:
    axes.axis("off")
    said = textwrap.wrap(" ".join(words) or "(nothing said)", 38)[:5]
    axes.text(0.0, 0.97, short_name(topic, 28), weight="bold", size=10, va="top", transform=axes.transAxes)
    axes.text(0.0, 0.82, plain("\n".join(said)), size=9, va="top", transform=axes.transAxes, linespacing=1.25)
    if reference is not None:
        lines = textwrap.wrap(f"reference: {reference}", 47)
        text = "\n".join(lines[:3]) + (" ..." if len(lines) > 3 else "")
        options = {"size": 7.5, "va": "top", "color": "#555555", "transform": axes.transAxes, "linespacing": 1.2}
        axes.text(0.0, 0.80 - 0.115 * len(said) - 0.04, plain(text), **options)


def _high(maps: Sequence[np.ndarray]) -> float:
    """The upper end of a scale: nearly the highest value there is, and at least twice that of even attention."""
    return max(2.0, float(np.percentile(maps, 99.5))) if maps else 2.0


def _draw_probabilities(axes: Any, probabilities: Mapping[str, float], predicted: str, label: str | None) -> None:
    names = sorted(probabilities, key=lambda name: -probabilities[name])[:8]
    colours = [COLOURS[0] if name == predicted else QUIET for name in names]
    axes.barh(range(len(names)), [probabilities[name] for name in names], color=colours, height=0.55)
    for row, name in enumerate(names):
        text = f"{short_name(name)}  {probabilities[name]:.2f}" + ("  (true label)" if name == label else "")
        weight = "bold" if name == predicted else "normal"
        axes.text(0.0, row - 0.36, text, size=9, va="bottom", weight=weight)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.8), yticks=[])
    axes.set_xlabel("probability", size=8, labelpad=1)
    axes.tick_params(labelsize=7)
    axes.set_title("Diagnosis" + ("" if label is not None else " (true label unknown)"), size=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _overlay(image: np.ndarray, values: np.ndarray, low: float, high: float, colours: str) -> np.ndarray:
    """(PANEL_PX, PANEL_PX, 3) floats: the image in grey under the smoothly enlarged map, whose weight grows with it."""
    from matplotlib import colormaps
    from PIL import Image

    size = (PANEL_PX, PANEL_PX)
    grey = np.asarray(Image.fromarray(image).convert("L").resize(size, Image.Resampling.BILINEAR)) / 255.0
    large = np.asarray(Image.fromarray(np.asarray(values, dtype=np.float32)).resize(size, Image.Resampling.BICUBIC))
    scaled = np.clip((large - low) / max(high - low, 1e-12), 0.0, 1.0)
    weight = (0.2 + 0.5 * scaled)[..., None]
    return (1 - weight) * grey[..., None] + weight * np.asarray(colormaps[colours](scaled))[..., :3]


def _outline(axes: Any, mask: np.ndarray | None, shape: tuple[int, ...], width: float = 1.0) -> None:
    if mask is None or not mask.any() or mask.all():
        return  # no border inside the picture
    axes.contour(np.asarray(mask) != 0, levels=[0.5], colors=[OUTLINE], linewidths=width)
    axes.set(xlim=(0, shape[1]), ylim=(shape[0], 0))


def _colour_bar(figure: Any, axes: Any, low: float, high: float, colours: str, label: str) -> None:
    _scale(figure, axes.inset_axes((1.02, 0.0, 0.03, 1.0)), low, high, colours, label)


def _scale(
    figure: Any, bar: Any, low: float, high: float, colours: str, label: str, *, horizontal: bool = False
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    orientation = "horizontal" if horizontal else "vertical"
    scale = figure.colorbar(ScalarMappable(Normalize(low, high), colours), cax=bar, orientation=orientation)
    scale.set_label(label, size=8)
    bar.tick_params(labelsize=7)


# -------------------------------------------------------------------------------------------------- scores and curves


def draw_confusion_matrix(counts: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Which class is taken for which: counts, and shares of each true class as colour.

    Args:
        counts: (classes, classes + 1), rows true, columns predicted; the last column counts answers that name no class.
        classes: in the order of the rows.
        path: of the picture.
    """
    if counts.shape != (len(classes), len(classes) + 1):
        raise ValueError(f"counts {counts.shape} do not fit {len(classes)} classes; want (classes, classes + 1)")
    columns = [*classes, "no class"]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.6 + min(0.75 * len(classes), 10.0)
    figure = new_figure(side + 1.6, side, layout="tight")
    axes = figure.add_subplot()
    picture = axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    many = len(classes) > 15  # then numbers would not fit the cells
    for row, column in np.ndindex(*counts.shape) if not many else ():
        text = f"{counts[row, column]:g}\n{100 * share[row, column]:.0f} %"
        axes.text(
            column, row, text, ha="center", va="center", size=8, color="black" if share[row, column] > 0.5 else "white"
        )
    size = 9 if not many else max(3, 9 * 15 / len(classes))
    axes.set_xticks(
        range(len(columns)), map(short_name, columns), rotation=35 if not many else 90, ha="right", size=size
    )
    axes.set_yticks(range(len(classes)), map(short_name, classes), size=size)
    axes.set(xlabel="predicted", ylabel="true")
    right, total = int(np.trace(counts[:, : len(classes)])), int(counts.sum())
    axes.set_title(f"{right} of {total} right ({100 * right / max(total, 1):.1f} %)", size=11)
    figure.colorbar(picture, ax=axes, label="share of the true class", fraction=0.046, pad=0.03)
    write_figure(figure, path)


def draw_reliability(found: Reliability, path: Path) -> None:
    """A reliability diagram: how often the network is right when it says how sure it is.

    Args:
        found: accuracy and mean confidence by bin, numbers of images on the bars.
        path: of the picture.
    """
    figure = new_figure(5.2, 4.6, layout="tight")
    axes = figure.add_subplot()
    widths = [upper - lower for lower, upper in zip(found.lower, found.upper)]
    axes.bar(found.lower, found.accuracy, widths, align="edge", color=COLOURS[5], edgecolor="white", label="accuracy")
    axes.plot([0, 1], [0, 1], color=QUIET, linestyle="--", linewidth=1, label="perfect calibration")
    axes.plot(
        found.confidence,
        found.accuracy,
        color=COLOURS[1],
        marker="o",
        markersize=4,
        linestyle="",
        label="mean of a bin",
    )
    for lower, width, images in zip(found.lower, widths, found.images):
        axes.text(lower + width / 2, 0.01, str(images), ha="center", va="bottom", size=7)
    axes.set(xlim=(0, 1), ylim=(0, 1.04), xlabel="probability of the predicted class", ylabel="share that is right")
    axes.set_title(f"{sum(found.images)} images, expected calibration error {found.error:.3f}", size=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncol=3, loc="upper center", bbox_to_anchor=(0.45, -0.13))
    write_figure(figure, path)


def draw_contact_sheet(
    images: Sequence[np.ndarray],
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    captions: Sequence[Sequence[str]],
    title: str,
    path: Path,
) -> None:
    """Images found by a sentence, each beside where the network looked for it; annotations are outlined.

    Args:
        images: (S, S, 3) uint8, the best first.
        maps: (h, w) attention, summing to 1.
        masks: (S, S) or None.
        captions: lines to print below each image.
        path: of the picture.
    """
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = 3.5 * columns + 0.3, 2.75 * rows + 2.0
    figure = new_figure(width, height)
    figure.suptitle(short_name(title, 110), size=12, x=0.02, y=1 - 0.12 / height, ha="left", va="top")
    grid = figure.add_gridspec(
        rows, columns, left=0.02, right=0.98, top=1 - 0.75 / height, bottom=1.7 / height, hspace=0.75, wspace=0.08
    )
    maps = [values * values.size for values in maps]
    high = _high(maps)
    for number, (image, values, mask, lines) in enumerate(zip(images, maps, masks, captions)):
        pair = grid[number // columns, number % columns].subgridspec(1, 2, wspace=0.03)
        axes = _bare(figure.add_subplot(pair[0]), "")
        axes.imshow(image)
        _outline(axes, mask, image.shape)
        axes.set_title(f"{number + 1}", size=10, weight="bold", loc="left", pad=3)
        text = "\n".join(part for line in lines for part in textwrap.wrap(line, 46)[:2])
        axes.text(0.0, -0.05, plain(text), size=7.5, va="top", transform=axes.transAxes, linespacing=1.25)
        axes = _bare(figure.add_subplot(pair[1]), "")
        axes.imshow(_overlay(image, values, 0.0, high, "viridis"), extent=(0, image.shape[1], image.shape[0], 0))
        _outline(axes, mask, image.shape, width=0.6)
    bar = figure.add_axes((0.02, 0.42 / height, 0.3, 0.1 / height))
    _scale(figure, bar, 0.0, high, "viridis", "attention to the sentence (1 = even)", horizontal=True)
    if any(mask is not None for mask in masks):
        figure.text(0.36, 0.45 / height, "orange outline: annotation", size=8, color="#555555")
    write_figure(figure, path)


def draw_folds(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Scores of several models over folds: each fold as a mark, their mean as a line, mean ± deviation as a bar.

    Args:
        panels: {metric's heading: {model: a value for each fold}}.
        path: of the picture.
    """
    models = list(dict.fromkeys(model for values in panels.values() for model in values))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(2.2, 0.75 * len(models) + 1.4) * columns + 1.0, 2.7 * rows + 0.9, layout="tight")
    for number, (heading, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.use_sticky_edges = False  # room below a bar too
        for place, model in enumerate(models):
            folds = np.asarray(values.get(model, []), dtype=np.float64)
            if not folds.size:
                continue
            colour, marker = COLOURS[place % len(COLOURS)], _MARKERS[place % len(_MARKERS)]
            mean, spread = folds.mean(), folds.std(ddof=1) if folds.size > 1 else 0.0
            axes.bar(place, 2 * spread, 0.6, bottom=mean - spread, color=colour, alpha=0.25)
            axes.hlines(mean, place - 0.3, place + 0.3, color=colour, linewidth=2)
            aside = np.linspace(-0.18, 0.18, folds.size) if folds.size > 1 else np.zeros(1)
            axes.plot(place + aside, folds, marker, color=colour, markersize=4.5, label=short_name(model))
        axes.set_title(heading, size=10, loc="left")
        axes.set_xticks(
            range(len(models)), [short_name(model, 18) for model in models], size=8, rotation=20, ha="right"
        )
        axes.set(xlim=(-0.6, len(models) - 0.4), ylabel="score, test fold" if (number - 1) % columns == 0 else "")
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 1:
            handles, labels = axes.get_legend_handles_labels()
    title = "mark: a fold; line: mean; bar: mean ± sample standard deviation"
    figure.legend(
        handles, labels, title=title, fontsize=8, title_fontsize=8, frameon=False, ncol=len(models), loc="lower center"
    )
    figure.get_layout_engine().set(rect=(0, 0.9 / (2.7 * rows + 0.9), 1, 1))
    write_figure(figure, path)


def draw_sweep(
    names: Sequence[str],
    errors: Sequence[float],
    parameters: Sequence[int],
    flops: Sequence[int],
    path: Path,
    *,
    title: str,
) -> None:
    """Top-1 error against what a network costs: its parameters, and the FLOPs of one image.

    Args:
        names: concat_depth of each network.
        errors: fractions.
        path: of the picture.
    """
    figure = new_figure(9.6, 4.4, layout="tight")
    panels = figure.subplots(1, 2, sharey=True)
    costs = (
        ("parameters, millions", [n / 1e6 for n in parameters]),
        ("GFLOP an image, forward", [n / 1e9 for n in flops]),
    )
    for axes, (label, values) in zip(panels, costs):
        for number, (name, value, error) in enumerate(zip(names, values, errors)):
            colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
            axes.plot(value, 100 * error, marker, color=colour, markersize=9, label=short_name(name))
            axes.annotate(short_name(name), (value, 100 * error), xytext=(8, 6), textcoords="offset points", size=9)
        axes.set_xlabel(label)
        axes.margins(0.18)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1 error, %")
    panels[1].legend(title="concat_depth", fontsize=8, frameon=False)
    figure.suptitle(short_name(title, 80), size=11)
    write_figure(figure, path)


def draw_training_curves(metrics_jsonl: Path, path: Path) -> None:
    """Losses, scores, beta, eta, gradient norms and learning rates against the step: a panel each where there are any.

    Args:
        metrics_jsonl: a run's `metrics.jsonl`.
        path: of the picture.

    Raises:
        InputError: the file is missing or holds no such metric.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in read_metrics(metrics_jsonl):
        for name, value in entry["metrics"].items():
            curves.setdefault(name, []).append((entry["step"], value))
    panels = [(title, axis, _matching(curves, pattern)) for title, axis, pattern in _PANELS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        raise InputError(f"{metrics_jsonl}: no losses, scores or schedules to draw; train for a step first")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(6.2 * columns, 2.9 * rows, layout="tight")
    last_step = max(1, *(step for _, _, names in panels for name in names for step, _ in curves[name]))
    for number, (title, axis, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw_curves(axes, {name: curves[name] for name in names}, title, axis)
        axes.set_xlim(-0.02 * last_step, 1.02 * last_step)  # the same, so that panels can be compared
    write_figure(figure, path)


def _matching(names: Mapping[str, Any], pattern: str) -> list[str]:
    return sorted(name for name in names if re.search(pattern, name))


def _draw_curves(axes: Any, curves: Mapping[str, list[tuple[int, float]]], title: str, axis: str) -> None:
    for number, (name, points) in enumerate(curves.items()):
        steps, values = np.array(sorted(points, key=lambda point: point[0]), dtype=np.float64).T
        axes.plot(
            steps,
            values,  # matplotlib leaves gaps where a value is not finite
            label=short_name(name),
            color=COLOURS[number % len(COLOURS)],
            linestyle=("-", "--", ":", "-.")[number // len(COLOURS) % 4],
            linewidth=1.4,
            marker="o" if len(steps) < 25 else "",
            markersize=3,
        )
    if axis == "norm" and all(value > 0 for points in curves.values() for _, value in points if math.isfinite(value)):
        axes.set_yscale("log")  # dL_L/dtheta_D is often a tenth of dL_M/dtheta_D
    axes.set(xlabel="optimiser steps", ylabel=axis)
    axes.set_title(title, size=10, loc="left")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.3)


# -------------------------------------------------------------------------------------------------------------- shared


def new_figure(width_inches: float, height_inches: float, layout: Literal["tight"] | None = None) -> Any:
    """An empty matplotlib Figure on white, outside pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), dpi=120, facecolor="white", layout=layout)


def _bare(axes: Any, title: str, size: float = 10, weight: str = "normal") -> Any:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, size=size, weight=weight, pad=3)
    return axes


def plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def short_name(text: str, most: int = 40) -> str:
    """`plain` text that cannot push everything else out of the picture."""
    return plain(text if len(text) <= most else text[: most - 1] + "…")


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure whole or not at all, in the format that the path's suffix names (without one: PNG)."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib's font lacks some scripts; a box in the picture says so, and the text stands in the other outputs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png")
    write_atomically(path, buffer.getvalue())
