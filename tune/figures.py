"""Pictures of a search: what was tried, what it scored, what the scores may rest on.

Drawn as those of a run (`mdnet_dist.figures`), from records alone. Colour is the score wherever a line or a mark is a
trial among many: viridis without its brightest end, the darker the better. Every function raises InputError, naming
what is missing, where there is nothing to draw; a search that has just begun has no scores yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdnet_dist.config import PiecewiseBeta
from mdnet_dist.errors import InputError
from mdnet_dist.figures import COLOURS, QUIET, new_figure, plain, short_name, write_figure
from mdnet_dist.schedules import beta_at
from tune.facts import (
    Mode,
    as_number,
    counted,
    depth_of,
    describe_schedule,
    is_choice,
    is_number,
    options_of,
    parameters_of,
    schedule_of,
    seconds_per_step,
)
from tune.importance import LOW_R2, Importances
from tune.population import BETA, ETA, Stretch
from tune.records import Segment, TrialRecord, best_trial, shown
from tune.results import Confirmation, confirmed

LOG_RATIO = 30  # positive numbers that differ by more are drawn on a logarithmic axis
_STATUS = {"finished": ("o", COLOURS[0]), "stopped": ("s", COLOURS[1]), "running": ("^", COLOURS[2])}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LINES: dict[str, Any] = {
    "constant": "-",
    "linear": "--",
    "cosine": ":",
    "sigmoid": "-.",
    "delayed_step": (0, (6, 1, 1, 1, 1, 1)),
    "piecewise": (0, (8, 3)),
}
Scored = list[tuple[TrialRecord, float]]


# --------------------------------------------------------------------------------------------------- scores and points


def draw_parameters(trials: Sequence[TrialRecord], metric: str, mode: Mode, path: Path) -> None:
    """The score against each parameter, a panel each; the mark says how a trial ended, the best is ringed."""
    scored = _scored(trials, metric, mode)
    names = parameters_of([trial for trial, _ in scored])
    if not names:
        raise InputError("nothing to draw: the trials have no parameters")
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = 2.7 * columns + 0.8, 2.4 * rows + 0.7
    figure = new_figure(max(width, 5.6), height, layout="tight")
    best = best_trial([trial for trial, _ in scored], metric, mode)
    handles: dict[str, Any] = {}
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1, sharey=figure.axes[0] if figure.axes else None)
        here = [(trial, score) for trial, score in scored if name in trial.point]
        places = _place_on(axes, name, here)
        for (trial, score), place in zip(here, places):
            marker, colour = _STATUS.get(trial.status, ("D", QUIET))
            (handles[trial.status],) = axes.plot(
                place, score, marker, color=colour, markersize=5, alpha=0.8, markeredgewidth=0, linestyle=""
            )
            if trial is best:
                (handles["best"],) = axes.plot(place, score, "o", mfc="none", mec="black", markersize=10)
        axes.set_xlabel(_short_parameter(name, 34), size=8)
        if number % columns == 0:
            axes.set_ylabel(short_name(metric), size=8)
        axes.margins(y=0.1)
        axes.tick_params(labelsize=7)
        _plain_axes(axes)
    order = [name for name in (*_STATUS, "waiting", "best") if name in handles]
    figure.legend(
        [handles[name] for name in order], order, fontsize=8, frameon=False, ncol=len(order), loc="lower center"
    )
    figure.get_layout_engine().set(rect=(0, 0.35 / height, 1, 1))
    write_figure(figure, path)


def _place_on(axes: Any, name: str, here: Scored) -> list[float]:
    """Set up the x axis of a parameter; where on it each trial stands."""
    trials = [trial for trial, _ in here]
    if is_choice(name, trials):
        options = options_of(name, trials)
        rotated = {"rotation": 20, "ha": "right"} if sum(map(len, options)) > 24 else {}
        axes.set_xticks(range(len(options)), [short_name(option, 16) for option in options], size=7, **rotated)
        axes.set_xlim(-0.6, len(options) - 0.4)
        return [options.index(shown(trial.point[name])) + 0.5 * _aside(trial) for trial in trials]
    values = [as_number(trial.point[name]) for trial in trials]
    if _logarithmic(values):
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.08)
    return values


def draw_parallel(trials: Sequence[TrialRecord], metric: str, mode: Mode, path: Path) -> None:
    """Parallel coordinates: a line a trial over all parameters and the score.

    A line runs through the row `absent`, below the axes, where its trial does not have a parameter.
    """
    scored = _scored(trials, metric, mode)
    known = [trial for trial, _ in scored]
    names = parameters_of(known)
    best = best_trial(known, metric, mode)
    figure = new_figure(max(7.0, (1.15 if len(names) < 14 else 0.95) * (len(names) + 1) + 1.6), 5.4, layout="tight")
    axes = figure.add_subplot()
    axes.set_ylabel("lowest to highest value of each axis", size=8)
    colour = _colour_of(figure, [axes], scored, metric, mode)
    heights = np.full((len(scored), len(names) + 1), _ABSENT)
    for column, name in enumerate(names):
        rows = [row for row, trial in enumerate(known) if name in trial.point]
        heights[rows, column], ticks = _scale_of(name, [known[row] for row in rows])
        _draw_scale(axes, column, ticks)
    scores = [score for _, score in scored]
    heights[:, -1] = [_share(score, min(scores), max(scores)) for score in scores]
    _draw_scale(axes, len(names), _ends(scores, shown))
    for row in sorted(range(len(scored)), key=lambda row: scores[row], reverse=mode == "min"):  # the best on top
        trial, score = scored[row]
        is_best = trial is best
        spread = heights[row] + np.where(heights[row] == _ABSENT, 0.035 * _aside(trial), 0.0)
        axes.plot(
            range(len(names) + 1),
            spread,
            color=colour(score),
            linewidth=2.8 if is_best else 1.0,
            alpha=1.0 if is_best else 0.7,
            marker="o",
            markersize=4 if is_best else 2.5,
            label=f"best: trial {trial.number}, {score:.4g}" if is_best else None,
        )
    axes.axhspan(_ABSENT - 0.05, _ABSENT + 0.05, color="#EEEEEE", zorder=0)
    axes.set_yticks([_ABSENT], ["absent"], size=8)
    headings = [*(_short_parameter(name, 30) for name in names), short_name(metric, 30)]
    axes.set_xticks(range(len(headings)), headings, size=8, rotation=30, ha="right", rotation_mode="anchor")
    axes.set(xlim=(-0.3, len(names) + 0.65), ylim=(_ABSENT - 0.08, 1.08))
    axes.set_xlabel("parameter, and the score", size=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    write_figure(figure, path)


_ABSENT = -0.18  # height of the row of parameters that a trial does not have; axes go from 0 to 1


def _scale_of(name: str, having: Sequence[TrialRecord]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights (0..1) of trials on the axis of a parameter, and its ticks."""
    if is_choice(name, having):
        options = options_of(name, having)
        places = [_share(number, 0, len(options) - 1) for number in range(len(options))]
        half_gap = 0.16 / (len(options) - 1) if len(options) > 1 else 0.0  # lines of one option lie side by side
        drawn = [places[options.index(shown(trial.point[name]))] for trial in having]
        heights = [min(1.0, max(0.0, place + half_gap * _aside(trial, 1.0))) for place, trial in zip(drawn, having)]
        return heights, [(place, short_name(option, 12)) for place, option in zip(places, options)]
    values = [as_number(trial.point[name]) for trial in having]
    if _logarithmic(values):
        logs = [math.log10(value) for value in values]
        return [_share(each, min(logs), max(logs)) for each in logs], _ends(logs, lambda each: f"{10**each:.2g}")
    return [_share(each, min(values), max(values)) for each in values], _ends(values, lambda each: f"{each:.3g}")


def _ends(values: Sequence[float], label: Callable[[float], str]) -> list[tuple[float, str]]:
    low, high = min(values), max(values)
    if low == high:
        return [(0.5, label(low))]
    return [(place, label(low + place * (high - low))) for place in (0.0, 0.5, 1.0)]


def _draw_scale(axes: Any, column: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([column, column], [0, 1], color=QUIET, linewidth=0.8, zorder=1)
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
    for place, label in ticks:
        axes.text(column + 0.07, place, label, size=7, va="center", ha="left", bbox=box, zorder=5)


# -------------------------------------------------------------------------------------------- the questions of a search


def draw_beta_schedules(trials: Sequence[TrialRecord], metric: str, mode: Mode, path: Path) -> None:
    """beta over training of every scored trial: the line's colour is the score, its style the kind of schedule."""
    scored = [(trial, score) for trial, score in _scored(trials, metric, mode) if schedule_of(trial) is not None]
    if not scored:
        raise InputError("nothing to draw: no scored trial's configuration has a blend.beta")
    best = best_trial([trial for trial, _ in scored], metric, mode)
    figure = new_figure(7.6, 4.9, layout="tight")
    axes = figure.add_subplot()
    colour = _colour_of(figure, [axes], scored, metric, mode)
    done = np.linspace(0, 1, 401)
    kinds: dict[str, Any] = {}
    for trial, score in sorted(scored, key=lambda pair: pair[1], reverse=mode == "min"):  # the best on top
        schedule = schedule_of(trial)
        assert schedule is not None
        betas = [beta_at(schedule, float(fraction)) for fraction in done]
        kinds.setdefault(schedule.kind, _handle(color="#444444", linestyle=_LINES[schedule.kind], linewidth=1.3))
        style = {"color": colour(score), "linestyle": _LINES[schedule.kind]}
        if trial is best:
            axes.plot(done, betas, color="white", linewidth=5.5)  # so that it stands out where lines cross
            words = describe_schedule(trial.config["blend"]["beta"])
            label = f"best: trial {trial.number}, {words}, {score:.4g}"
            (winner,) = axes.plot(done, betas, linewidth=3.2, label=short_name(label, 90), **style)
        else:
            axes.plot(done, betas, linewidth=1.3, alpha=0.85, **style)
    axes.set(xlim=(0, 1), ylim=(-0.03, 1.03), xlabel="fraction of training done", ylabel="beta, weight of L on D")
    _plain_axes(axes)
    handles = [winner, *kinds.values()]
    labels = [winner.get_label(), *(kind.replace("_", " ") for kind in kinds)]
    first = figure.legend(handles[:1], labels[:1], fontsize=8, frameon=False, loc="lower left", handlelength=4)
    first.set_bbox_to_anchor((0.05, 0.055), transform=figure.transFigure)
    second = figure.legend(
        handles[1:], labels[1:], fontsize=8, frameon=False, loc="lower left", ncol=len(kinds), handlelength=4
    )
    second.set_bbox_to_anchor((0.05, 0.005), transform=figure.transFigure)
    figure.get_layout_engine().set(rect=(0, 0.11, 1, 1))
    write_figure(figure, path)


def draw_concat_depth(trials: Sequence[TrialRecord], metric: str, mode: Mode, path: Path) -> None:
    """The score by concat_depth, and against what a depth costs: FLOPs of an image, seconds of a step."""
    scored = [(trial, score) for trial, score in _scored(trials, metric, mode) if depth_of(trial) is not None]
    if not scored:
        raise InputError("nothing to draw: no scored trial's configuration has a model.image.concat_depth")
    depths = sorted(
        {str(depth_of(trial)) for trial, _ in scored}, key=lambda depth: (not depth.isdigit(), len(depth), depth)
    )
    costs: list[tuple[str, Callable[[TrialRecord], float | None]]] = [
        ("GFLOP an image, forward", lambda trial: trial.flops / 1e9 or None),
        ("seconds a step", seconds_per_step),
    ]
    costs = [(label, cost) for label, cost in costs if any(cost(trial) is not None for trial, _ in scored)]
    figure = new_figure(3.5 * (1 + len(costs)) + 1.2, 4.0, layout="tight")
    panels = figure.subplots(1, 1 + len(costs), sharey=True, squeeze=False)[0]
    for place, depth in enumerate(depths):
        colour, marker = COLOURS[place % len(COLOURS)], _MARKERS[place % len(_MARKERS)]
        style = {"color": colour, "marker": marker, "linestyle": "", "markersize": 5, "alpha": 0.8}
        here = [(trial, score) for trial, score in scored if depth_of(trial) == depth]
        scores = [score for _, score in here]
        mean, spread = np.mean(scores), np.std(scores, ddof=1) if len(scores) > 1 else 0.0
        panels[0].bar(place, 2 * spread, 0.6, bottom=mean - spread, color=colour, alpha=0.2)
        panels[0].hlines(mean, place - 0.3, place + 0.3, color=colour, linewidth=2)
        aside = [place + 0.4 * _aside(trial) for trial, _ in here]
        panels[0].plot(aside, scores, label=f"{short_name(depth)}, {counted(len(here), 'trial')}", **style)
        for axes, (_, cost) in zip(panels[1:], costs):
            known = [(spent, score) for trial, score in here if (spent := cost(trial)) is not None]
            axes.plot([spent for spent, _ in known], [score for _, score in known], **style)
    panels[0].set_xticks(range(len(depths)), [short_name(depth, 10) for depth in depths])
    panels[0].set(xlabel="concat_depth", ylabel=short_name(metric), xlim=(-0.6, len(depths) - 0.4))
    for axes, (label, _) in zip(panels[1:], costs):
        axes.set_xlabel(label)
        axes.margins(0.1)
    for axes in panels:
        axes.use_sticky_edges = False  # room below a bar too
        axes.tick_params(labelsize=8)
        _plain_axes(axes)
    title = "concat_depth; line: mean, bar: mean ± sample standard deviation"
    figure.legend(title=title, fontsize=8, title_fontsize=8, frameon=False, ncol=len(depths), loc="lower center")
    figure.get_layout_engine().set(rect=(0, 0.13, 1, 1))
    write_figure(figure, path)


def draw_importances(found: Importances, path: Path) -> None:
    """Bars of `tune.importance.importances`, with what the forest's out-of-bag R^2 says of them; grey where nothing."""
    height = 2.4 + 0.32 * len(found.rows)
    figure = new_figure(7.0, height, layout="tight")
    axes = figure.add_subplot()
    axes.barh(
        range(len(found.rows)),
        [row.mean for row in found.rows],
        xerr=[row.deviation for row in found.rows],
        color=QUIET if found.r2 < LOW_R2 else COLOURS[0],
        ecolor="black",
        error_kw={"elinewidth": 1, "capsize": 2.5},
        height=0.6,
        label=f"mean ± deviation of {found.repeats} exchanges",
    )
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.set_yticks(range(len(found.rows)), [_short_parameter(row.parameter) for row in found.rows], size=8)
    axes.set_ylim(len(found.rows) - 0.4, -0.6)
    axes.set_ylabel("parameter", size=9)
    axes.set_xlabel("R² lost when the parameter's values\nare exchanged between trials", size=9)
    axes.set_title(f"Out-of-bag R² {found.r2:.2f} over {found.trials} trials,\n{found.meaning}", size=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="lower center")
    figure.get_layout_engine().set(rect=(0, 0.3 / height, 1, 1))
    write_figure(figure, path)


def draw_confirmations(confirmations: Sequence[Confirmation], metric: str, mode: Mode, path: Path) -> None:
    """Best against base, seed by seed, and the mean ± sample standard deviation of each."""
    values = {name: confirmed(confirmations, name, metric) for name in ("best", "base")}
    seeds = sorted({seed for found in values.values() for seed in found})
    if not seeds:
        raise InputError(f"nothing to draw: no confirmation has {metric}")
    figure = new_figure(max(4.6, 0.55 * len(seeds) + 3.0), 3.8, layout="tight")
    axes = figure.add_subplot()
    for seed in values["best"].keys() & values["base"].keys():
        ends = [values["best"][seed], values["base"][seed]]
        axes.plot([seeds.index(seed)] * 2, ends, color=QUIET, linewidth=1, zorder=1)
    for number, (name, colour, marker) in enumerate((("best", COLOURS[0], "o"), ("base", COLOURS[1], "s"))):
        if not (found := values[name]):
            continue
        places = [seeds.index(seed) for seed in found]
        axes.plot(places, list(found.values()), marker, color=colour, markersize=7, label=name, linestyle="")
        numbers = list(found.values())
        spread = np.std(numbers, ddof=1) if len(numbers) > 1 else 0.0
        style = {"color": colour, "markersize": 7, "capsize": 4, "elinewidth": 1.5}
        axes.errorbar(len(seeds) + 0.15 + 0.3 * number, np.mean(numbers), spread, fmt=marker, **style)
    axes.axvline(len(seeds) - 0.35, color="#DDDDDD", linewidth=0.8)
    labels = [*map(str, seeds), "mean ±\ndeviation"]
    axes.set_xticks([*range(len(seeds)), len(seeds) + 0.3], labels, size=8)
    axes.set(xlim=(-0.6, len(seeds) + 0.9), xlabel="seed", ylabel=f"{short_name(metric)} ({_better(mode)})")
    axes.margins(y=0.12)
    _plain_axes(axes)
    figure.legend(fontsize=8, frameon=False, ncol=2, loc="upper center")
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.93))
    write_figure(figure, path)


# --------------------------------------------------------------------------------------------------------- populations


def draw_population(
    members: Sequence[TrialRecord],
    lineage: Sequence[Stretch],
    knots: Sequence[Sequence[float]],
    total_steps: int,
    metric: str,
    mode: Mode,
    path: Path,
) -> None:
    """beta, and eta where it was searched, of each member of a population against training steps.

    A member's colour is the last score that it reported, as the winner's is what it won with; it is grey without one.

    Args:
        members: with their segments.
        lineage: the stretches that trained the winner's weights (`tune.population.lineage`).
        knots: [fraction of training done, beta], rising: the piecewise-linear schedule made of them.
        total_steps: of training, where the fraction is 1.

    Raises:
        InputError: no member has a segment with a beta, or none has a score.
    """
    scored = [(member, member.values(metric)[-1]) for member, _ in _scored(members, metric, mode)]
    parts = [part for part in (BETA, ETA) if any(_value(s, part) is not None for m in members for s in m.segments)]
    if BETA not in parts:
        raise InputError("nothing to draw: no member of the population has trained with a beta")
    figure = new_figure(8.2, 2.9 * len(parts) + 1.0, layout="tight")
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
    colour = _colour_of(figure, panels, scored, metric, mode)
    scores = {trial.name: score for trial, score in scored}
    segments = {member.name: member.segments for member in members}
    for axes, part in zip(panels, parts):
        for member in members:
            line = QUIET if member.name not in scores else colour(scores[member.name])
            for stretches in _stretches(member, part):
                _draw_steps(axes, stretches, color=line, linewidth=1.3, alpha=0.9)
            for segment in member.segments:
                if segment.parent not in (None, member.name):
                    _draw_copy(axes, segment, segments.get(segment.parent or "", []), part)
        won = [(each.first_step, each.last_step, each.beta if part == BETA else each.eta) for each in lineage]
        thick = [(first, last, value) for first, last, value in won if value is not None]
        _draw_steps(axes, thick, color="white", linewidth=5.0)
        _draw_steps(axes, thick, color=COLOURS[1], linewidth=2.8)
        axes.set_ylabel("beta" if part == BETA else "eta")
        if part == ETA:
            axes.set_yscale("log")
        _plain_axes(axes)
    if knots:
        steps = np.linspace(0, total_steps, 401)
        schedule = PiecewiseBeta(kind="piecewise", knots=[list(knot) for knot in knots])
        betas = [beta_at(schedule, float(step / total_steps)) for step in steps]
        panels[0].plot(steps, betas, color="black", linestyle="--", linewidth=1.4)
    panels[0].set_ylim(-0.03, 1.03)
    panels[-1].set(xlim=(0, total_steps), xlabel="optimiser steps")
    handles = {
        "a member": _handle(color="#31688E", linewidth=1.1),
        "copy of weights": _handle(color=QUIET, linewidth=0.9, marker="v", markersize=4, linestyle=":"),
        "winner's lineage": _handle(color=COLOURS[1], linewidth=2.8),
    } | ({"its schedule, piecewise linear": _handle(color="black", linestyle="--", linewidth=1.4)} if knots else {})
    figure.legend(handles.values(), handles.keys(), fontsize=8, frameon=False, ncol=4, loc="lower center")
    figure.get_layout_engine().set(rect=(0, 0.35 / (2.9 * len(parts) + 1.0), 1, 1))
    write_figure(figure, path)


def _value(segment: Segment, parameter: str) -> float | None:
    value = segment.point.get(parameter)
    return as_number(value) if is_number(value) else None


def _stretches(member: TrialRecord, part: str) -> list[list[tuple[int, int, float]]]:
    """(first step, last step, value) in rows that end where other weights than the member's own took over."""
    rows: list[list[tuple[int, int, float]]] = [[]]
    for segment in sorted(member.segments, key=lambda segment: segment.first_step):
        if segment.parent not in (None, member.name):
            rows.append([])
        if (value := _value(segment, part)) is not None:
            rows[-1].append((segment.first_step, segment.last_step, value))
    return rows


def _draw_steps(axes: Any, stretches: Sequence[tuple[int, int, float]], **style: Any) -> None:
    """Level stretches, joined where one begins at the step at which the one before ended."""
    steps: list[float] = []
    values: list[float] = []
    for first, last, value in stretches:
        if steps and steps[-1] != first:
            steps.append(math.nan)
            values.append(math.nan)
        steps += [first, last]
        values += [value, value]
    axes.plot(steps, values, solid_joinstyle="miter", **style)


def _draw_copy(axes: Any, segment: Segment, parents: Sequence[Segment], part: str) -> None:
    """From what the parent trained with until then to what the copy goes on with."""
    after = _value(segment, part)
    before = [_value(parent, part) for parent in parents if parent.last_step == segment.first_step]
    if after is None or not before or before[-1] is None:
        return
    arrow = {"arrowstyle": "-|>", "color": QUIET, "linewidth": 0.9, "linestyle": ":", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (segment.first_step, after), (segment.first_step, before[-1]), arrowprops=arrow)


# -------------------------------------------------------------------------------------------------------------- shared


def _scored(trials: Sequence[TrialRecord], metric: str, mode: Mode) -> Scored:
    found = [(trial, score) for trial in trials if (score := trial.score(metric, mode)) is not None]
    if not found:
        raise InputError(f"nothing to draw: no trial has reported {metric}")
    return found


def _colour_of(figure: Any, panels: Iterable[Any], scored: Scored, metric: str, mode: Mode) -> Callable[[float], Any]:
    """The colour of a score, explained by a bar beside each panel. The bright end of viridis is faint on white."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = colormaps["viridis"](np.linspace(0.0, 0.9, 256))
    scores = [score for _, score in scored]
    low, high = min(scores), max(scores)
    margin = 0.0 if high > low else max(1e-6, abs(low) * 1e-3)  # a scale needs two ends
    colours = ScalarMappable(
        Normalize(low - margin, high + margin), ListedColormap(shades[::-1] if mode == "max" else shades)
    )
    for axes in panels:
        bar = figure.colorbar(colours, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label(f"{short_name(metric)}\n({_better(mode)}, darker)", size=8)
        bar.ax.tick_params(labelsize=7)
    return lambda score: colours.to_rgba(np.array([score]))[0]


def _better(mode: Mode) -> str:
    return f"{'higher' if mode == 'max' else 'lower'} is better"


def _handle(**style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _short_parameter(name: str, most: int = 40) -> str:
    """Cut at its front: what tells parameters apart stands at the end."""
    return plain(name if len(name) <= most else "…" + name[1 - most :])


def _aside(trial: TrialRecord, width: float = 1.0) -> float:
    """A trial's place across a column, in -width/2..width/2: the same in every panel, neighbours apart."""
    return width * ((trial.number * 0.6180339887) % 1.0 - 0.5)  # the golden ratio spreads successive numbers evenly


def _logarithmic(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > LOG_RATIO


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


def _plain_axes(axes: Any) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
