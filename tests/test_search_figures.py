"""The pictures of a search show what its records hold, and say what is missing where there is nothing to show."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from PIL import Image

from mdnet_dist.config import LinearBeta
from mdnet_dist.errors import InputError
from mdnet_dist.figures import COLOURS, QUIET
from mdnet_dist.schedules import beta_at
from tune import figures
from tune.importance import Importance, Importances
from tune.population import BETA, ETA, Stretch
from tune.records import Point, Report, Segment, Status, TrialRecord
from tune.results import Confirmation

SCORE = "val/score"
KINDS = ("constant", "linear", "cosine", "sigmoid", "delayed_step", "piecewise")
OF_TRIALS = (
    figures.draw_parameters,
    figures.draw_parallel,
    figures.draw_beta_schedules,
    figures.draw_concat_depth,
)


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


def reports(*scores: float, speed: float = 40.0) -> list[Report]:
    metrics = [{SCORE: score, "speed/images_per_second": speed} for score in scores]
    return [Report(epoch=e, step=10 * e, seconds=1.0, metrics=values) for e, values in enumerate(metrics, start=1)]


def search_of(count: int, seed: int = 0) -> list[TrialRecord]:
    """Trials as a search has them: conditional parameters, options, numbers over decades; every fifth one stopped."""
    generator = random.Random(seed)
    trials = []
    for number, kind in zip(range(1, count + 1), itertools.cycle(KINDS)):
        depth = generator.choice([0, 1, "full"])
        beta: dict[str, Any] = {"kind": kind}
        if kind == "constant":
            beta |= {"value": generator.random()}
        elif kind == "piecewise":
            beta |= {"knots": [[0.0, generator.random()], [1.0, generator.random()]]}
        else:
            beta |= {"start": generator.uniform(0, 0.5), "end": generator.uniform(0.5, 1)}
        point: Point = {"blend.beta": kind, "model.image.concat_depth": depth}
        point |= {f"blend.beta.{kind}.{name}": value for name, value in beta.items() if isinstance(value, float)}
        point |= {"optimizer.image.lr": 10 ** generator.uniform(-4, -1), "train.label_smoothing": generator.random()}
        config = {
            "blend": {"beta": beta, "eta": 1.0},
            "model": {"image": {"concat_depth": depth}},
            "train": {"global_batch": 32},
        }
        status: Status = "stopped" if number % 5 == 0 else "finished"
        score = generator.random()
        trial = TrialRecord(number=number, name=f"t{number}", point=point, status=status, config=config, flops=10**9)
        trial.reports = reports(score, score - 0.1)
        trials.append(trial)
    return trials


def texts_of(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def legend_of(figure: Any) -> list[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def panels_of(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def check_readable(figure: Any, path: Path) -> None:
    """It is a picture of a sane size, has a legend, every axis has a label, no text is cut off or lies over a label."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300 and max(picture.size) < 4000
    assert legend_of(figure)
    for axes in panels_of(figure):
        shared = axes.get_shared_y_axes().get_siblings(axes)
        shared_x = axes.get_shared_x_axes().get_siblings(axes)
        assert any(other.get_ylabel() for other in shared) and any(other.get_xlabel() for other in shared_x)
    renderer = FigureCanvasAgg(figure).get_renderer()
    width, height = figure.bbox.size
    outside = [axes.xaxis.label for axes in figure.axes] + [axes.yaxis.label for axes in figure.axes]
    outside += [axes._left_title for axes in figure.axes]
    outside += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [text.get_window_extent(renderer) for text in outside if text.get_text()]
    for box in boxes:
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("draw", OF_TRIALS)
@pytest.mark.parametrize("count, mode", [(1, "max"), (2, "min"), (16, "max"), (40, "min")])
def test_every_picture_of_trials_can_be_read(tmp_path, drawn, draw, count, mode):
    draw(search_of(count), SCORE, mode, tmp_path / "a.png")
    check_readable(drawn[0], tmp_path / "a.png")
    assert any("val/score" in text for text in texts_of(drawn[0]))


@pytest.mark.parametrize("draw", OF_TRIALS)
def test_nothing_scored_is_an_input_error_that_says_so(tmp_path, draw):
    trials = search_of(3)
    for trial, status in zip(trials, ("waiting", "failed", "running")):
        trial.status = status
        if status != "failed":
            trial.reports = []
    with pytest.raises(InputError, match="nothing to draw: no trial has reported val/score"):
        draw(trials, SCORE, "max", tmp_path / "a.png")
    with pytest.raises(InputError, match="no trial has reported val/score"):
        draw([], SCORE, "max", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "draw, message",
    [
        (figures.draw_parameters, "the trials have no parameters"),
        (figures.draw_beta_schedules, "no scored trial's configuration has a blend.beta"),
        (figures.draw_concat_depth, "no scored trial's configuration has a model.image.concat_depth"),
    ],
)
def test_what_is_missing_is_named(tmp_path, draw: Callable[..., None], message):
    trial = TrialRecord(number=1, name="t", point={}, status="finished", reports=reports(0.5))
    with pytest.raises(InputError, match=f"nothing to draw: {message}"):
        draw([trial], SCORE, "max", tmp_path / "a.png")


@pytest.mark.parametrize("text", ["$\\frac{", "a $5 b$", "x" * 200, "%s {0}"])
def test_any_text_can_be_drawn(tmp_path, drawn, text):
    trials = search_of(3)
    for trial in trials:
        trial.point |= {text: text}
        trial.reports = [Report(epoch=1, step=1, seconds=1.0, metrics={text: trial.number / 7}) for _ in trial.reports]
        trial.config["model"]["image"]["concat_depth"] = text
    for number, draw in enumerate(OF_TRIALS):
        draw(trials, text, "max", tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
        assert max(drawn[number].bbox.size) < 4000
        assert all(len(found) < 120 for found in texts_of(drawn[number]))


def test_parameters_have_a_panel_each_marks_by_status_and_the_best_ringed(tmp_path, drawn):
    points: list[Point] = [{"lr": 1e-4, "x": 0.1, "depth": 0}, {"lr": 1e-1, "x": 0.2, "depth": "full"}, {"lr": 1e-2}]
    trials = [
        TrialRecord(number=n, name=f"t{n}", point=point, status=status, reports=reports(score))
        for n, (point, status, score) in enumerate(
            zip(points, ("finished", "stopped", "running"), (0.5, 0.25, 0.75)), start=1
        )
    ]
    figures.draw_parameters(trials, SCORE, "min", tmp_path / "a.png")
    panels = {axes.get_xlabel(): axes for axes in drawn[0].axes}
    assert {name: axes.get_xscale() for name, axes in panels.items()} == {"lr": "log", "x": "linear", "depth": "linear"}
    marks = [(float(line.get_xdata()[0]), float(line.get_ydata()[0]), line.get_marker()) for line in panels["lr"].lines]
    assert marks == [(1e-4, 0.5, "o"), (1e-1, 0.25, "s"), (1e-1, 0.25, "o"), (1e-2, 0.75, "^")]
    assert panels["lr"].lines[2].get_markerfacecolor() == "none", "the ring of the best, the lowest"
    assert len(panels["x"].lines) == 2 + 1, "the third trial has no x"
    assert [text.get_text() for text in panels["depth"].get_xticklabels()] == ["0", "full"]
    columns = [float(line.get_xdata()[0]) for line in panels["depth"].lines]
    assert [round(place) for place in columns] == [0, 1, 1]
    assert legend_of(drawn[0]) == ["finished", "stopped", "running", "best"]


def test_parallel_lines_run_through_absent_and_from_lowest_to_highest(tmp_path, drawn):
    points: list[Point] = [
        {"kind": "linear", "kind.linear.at": 0.2, "lr": 1e-4},
        {"kind": "constant", "lr": 1e-2},
        {"kind": "linear", "kind.linear.at": 0.4, "lr": 1.0},
    ]
    trials = [
        TrialRecord(number=n, name=f"t{n}", point=point, status="finished", reports=reports(n / 4))
        for n, point in enumerate(points, start=1)
    ]
    figures.draw_parallel(trials, SCORE, "max", tmp_path / "a.png")
    [axes] = panels_of(drawn[0])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["kind", "kind.linear.at", "lr", SCORE]
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines if len(line.get_xdata()) == 4]
    np.testing.assert_allclose(lines[0][1:], [0, 0, 0])
    np.testing.assert_allclose(lines[1][2:], [0.5, 0.5])
    np.testing.assert_allclose(lines[2][1:], [1, 1, 1])
    assert lines[1][1] == pytest.approx(-0.18, abs=0.03), "in the row of what is absent"
    assert lines[0][0] > 0.9 and lines[2][0] > 0.9 and lines[1][0] < 0.1
    assert legend_of(drawn[0]) == ["best: trial 3, 0.75"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["absent"]
    assert {"linear", "constant", "0.0001", "0.01", "1", "0.2", "0.4", "0.25", "0.75"} <= set(texts_of(drawn[0]))


def test_beta_is_drawn_over_training_in_the_style_of_its_kind(tmp_path, drawn):
    trials = search_of(12)
    best = max(trials, key=lambda trial: trial.reports[0].metrics[SCORE])
    best.config["blend"]["beta"] = {"kind": "linear", "start": 0.125, "end": 0.75}
    figures.draw_beta_schedules(trials, SCORE, "max", tmp_path / "a.png")
    [axes] = panels_of(drawn[0])
    score = best.reports[0].metrics[SCORE]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("fraction of training done", "beta, weight of L on D")
    assert len(axes.lines) == 12 + 1, "the best has a white line below it"
    thick = axes.lines[-1]
    assert thick.get_linewidth() == max(
        line.get_linewidth() for line in axes.lines if not isinstance(line.get_color(), str)
    )
    schedule = LinearBeta(kind="linear", start=0.125, end=0.75)
    expected = [beta_at(schedule, fraction) for fraction in thick.get_xdata()]
    np.testing.assert_allclose(thick.get_ydata(), expected)
    assert (thick.get_xdata()[0], thick.get_xdata()[-1]) == (0, 1)
    legend = legend_of(drawn[0])
    assert legend[0] == f"best: trial {best.number}, linear 0.125 -> 0.75, {score:.4g}"
    kinds = {trial.config["blend"]["beta"]["kind"].replace("_", " ") for trial in trials}
    assert set(legend[1:]) == kinds and len(legend[1:]) == len(kinds)
    styles = [str(line._unscaled_dash_pattern) for legend in drawn[0].legends[1:] for line in legend.get_lines()]
    assert len(set(styles)) == len(kinds), "each kind has a style of its own"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_better_the_darker(tmp_path, drawn, mode):
    trials = search_of(6)
    for trial, score in zip(trials, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)):
        trial.reports = reports(score)
    figures.draw_parallel(trials, SCORE, mode, tmp_path / "a.png")
    [axes] = panels_of(drawn[0])
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    brightness = [float(np.sum(to_rgba(line.get_color())[:3])) for line in lines]
    heights = [float(line.get_ydata()[-1]) for line in lines]
    assert heights == sorted(heights, reverse=mode == "min"), "the best is drawn last, on top"
    assert brightness == sorted(brightness, reverse=True)
    bar = next(axes for axes in drawn[0].axes if axes.get_label() == "<colorbar>")
    better = "higher" if mode == "max" else "lower"
    assert bar.get_ylabel() == f"val/score\n({better} is better, darker)"


def test_depths_have_their_mean_deviation_and_costs(tmp_path, drawn):
    trials = search_of(4)
    rows = (("full", 0.5, 3, 16.0), (0, 0.2, 1, 64.0), (0, 0.4, 1, 32.0), (1, 0.6, 2, 32.0))
    for trial, (depth, score, gflop, speed) in zip(trials, rows):
        trial.config["model"]["image"]["concat_depth"] = depth
        trial.flops, trial.reports = gflop * 10**9, reports(score, speed=speed)
    figures.draw_concat_depth(trials, SCORE, "max", tmp_path / "a.png")
    by_depth, by_flops, by_seconds = drawn[0].axes
    assert [text.get_text() for text in by_depth.get_xticklabels()] == ["0", "1", "full"]
    assert legend_of(drawn[0]) == ["0, 2 trials", "1, 1 trial", "full, 1 trial"]
    bar = by_depth.patches[0]
    assert (bar.get_y(), bar.get_height()) == pytest.approx((0.3 - 0.02**0.5, 2 * 0.02**0.5))
    np.testing.assert_allclose(by_depth.lines[0].get_ydata(), [0.2, 0.4])
    assert by_flops.get_xlabel() == "GFLOP an image, forward"
    assert [list(line.get_xdata()) for line in by_flops.lines] == [[1, 1], [2], [3]]
    assert [list(line.get_xdata()) for line in by_seconds.lines] == [[0.5, 1], [1], [2]]
    for trial in trials:
        trial.flops = 0
        trial.config["train"] = {}
    figures.draw_concat_depth(trials, SCORE, "max", tmp_path / "b.png")
    assert len(drawn[1].axes) == 1, "no panel for what nobody knows"


def test_importances_are_bars_under_what_they_mean(tmp_path, drawn):
    rows = tuple(Importance(parameter=name, mean=mean, deviation=0.1) for name, mean in (("b", 0.5), ("a", -0.1)))
    figures.draw_importances(Importances(rows=rows, r2=0.75, trials=20, repeats=10), tmp_path / "a.png")
    check_readable(drawn[0], tmp_path / "a.png")
    [axes] = drawn[0].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["b", "a"]
    assert [bar.get_width() for bar in axes.patches] == [0.5, -0.1]
    assert axes.yaxis.get_inverted(), "the most important on top"
    assert axes.get_title(loc="left") == "Out-of-bag R² 0.75 over 20 trials,\nthe order means something"
    assert {bar.get_facecolor() for bar in axes.patches} == {to_rgba(COLOURS[0])}
    many = tuple(Importance(parameter="p" * 60 + str(n), mean=0.1, deviation=0.0) for n in range(40))
    figures.draw_importances(Importances(rows=many, r2=-0.5, trials=20, repeats=10), tmp_path / "b.png")
    check_readable(drawn[1], tmp_path / "b.png")
    assert {bar.get_facecolor() for bar in drawn[1].axes[0].patches} == {to_rgba(QUIET)}, "noise is grey"


def members(eta: bool = True) -> list[TrialRecord]:
    """Two members over three stretches of 10 steps; at 20 the second goes on with the weights of the first."""

    def segment(number: int, beta: float, parent: str | None = None) -> Segment:
        point: Point = {BETA: beta, ETA: 10 * beta} if eta else {BETA: beta, ETA: "balanced"}
        return Segment(number=number, parent=parent, point=point, first_step=10 * number, last_step=10 * number + 10)

    histories = {"m1": [(0.2, None), (0.2, None), (0.2, None)], "m2": [(0.8, None), (0.8, None), (0.3, "m1")]}
    return [
        TrialRecord(
            number=number,
            name=name,
            point={},
            status="finished",
            reports=reports(0.9, number / 4),
            segments=[segment(n, beta, parent) for n, (beta, parent) in enumerate(history)],
        )
        for number, (name, history) in enumerate(histories.items(), start=1)
    ]


def lineage(eta: bool = True) -> list[Stretch]:
    return [
        Stretch(first_step=10 * n, last_step=10 * n + 10, beta=beta, eta=10 * beta if eta else None)
        for n, beta in enumerate((0.2, 0.2, 0.3))
    ]


KNOTS = [[0.0, 0.2], [0.66, 0.2], [0.67, 0.3]]


def test_a_population_shows_members_copies_the_winner_and_its_schedule(tmp_path, drawn):
    figures.draw_population(members(), lineage(), KNOTS, 30, SCORE, "max", tmp_path / "a.png")
    check_readable(drawn[0], tmp_path / "a.png")
    beta, eta = panels_of(drawn[0])
    assert (beta.get_ylabel(), eta.get_ylabel(), eta.get_xlabel()) == ("beta", "eta", "optimiser steps")
    assert (beta.get_yscale(), eta.get_yscale()) == ("linear", "log")
    lines = [[list(map(float, values)) for values in line.get_data()] for line in beta.lines]
    assert lines[0] == [[0, 10, 10, 20, 20, 30], [0.2] * 6]
    assert lines[1] == [[0, 10, 10, 20], [0.8] * 4]
    assert lines[2] == [[20, 30], [0.3, 0.3]], "what copied weights is a new line"
    assert lines[3] == lines[4] == [[0, 10, 10, 20, 20, 30], [0.2, 0.2, 0.2, 0.2, 0.3, 0.3]]
    dashed = beta.lines[5]
    assert dashed.get_linestyle() == "--"
    np.testing.assert_allclose([np.interp(step, *dashed.get_data()) for step in (0, 10, 30)], [0.2, 0.2, 0.3])
    [copy] = beta.texts
    assert (copy.xyann, copy.xy) == ((20, 0.2), (20, 0.3)), "from the parent's beta to the copy's"
    assert [list(line.get_ydata()) for line in eta.lines][2] == [3, 3]
    assert legend_of(drawn[0]) == [
        "a member",
        "copy of weights",
        "winner's lineage",
        "its schedule, piecewise linear",
    ]
    first, second = (to_rgba(line.get_color()) for line in beta.lines[:2])
    assert sum(first[:3]) > sum(second[:3]), "coloured by the last score, 0.25 and 0.5; the best of both is 0.9"


def test_a_population_without_eta_has_one_panel_and_one_without_beta_none(tmp_path, drawn):
    figures.draw_population(members(eta=False), lineage(eta=False), [], 30, SCORE, "min", tmp_path / "a.png")
    check_readable(drawn[0], tmp_path / "a.png")
    assert len(panels_of(drawn[0])) == 1
    assert legend_of(drawn[0]) == ["a member", "copy of weights", "winner's lineage"]
    failed = members()
    failed[0].status = "failed"
    figures.draw_population(failed, lineage(), KNOTS, 30, SCORE, "max", tmp_path / "b.png")
    assert panels_of(drawn[1])[0].lines[0].get_color() == QUIET
    bare = [TrialRecord(number=1, name="m", point={}, status="running", reports=reports(0.5))]
    with pytest.raises(InputError, match="nothing to draw: no member of the population has trained with a beta"):
        figures.draw_population(bare, [], [], 30, SCORE, "max", tmp_path / "c.png")
    with pytest.raises(InputError, match="no trial has reported val/score"):
        figures.draw_population([], [], [], 30, SCORE, "max", tmp_path / "c.png")


def confirmations(best: dict[int, float], base: dict[int, float]) -> list[Confirmation]:
    return [
        Confirmation(name=name, seed=seed, metrics={SCORE: value}, folder=Path("runs"))
        for name, values in (("best", best), ("base", base))
        for seed, value in values.items()
    ]


def test_confirmations_stand_seed_by_seed_beside_their_mean(tmp_path, drawn):
    given_runs = confirmations({3: 0.5, 7: 0.7}, {7: 0.4, 5: 0.2})
    figures.draw_confirmations(given_runs, SCORE, "max", tmp_path / "a.png")
    check_readable(drawn[0], tmp_path / "a.png")
    [axes] = drawn[0].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["3", "5", "7", "mean ±\ndeviation"]
    assert legend_of(drawn[0]) == ["best", "base"]
    marks = {line.get_label(): line for line in axes.lines}
    assert (list(marks["best"].get_xdata()), list(marks["best"].get_ydata())) == ([0, 2], [0.5, 0.7])
    assert (list(marks["base"].get_xdata()), list(marks["base"].get_ydata())) == ([2, 1], [0.4, 0.2])
    assert list(axes.lines[0].get_ydata()) == [0.7, 0.4], "a line between the two of seed 7"
    assert axes.get_ylabel() == "val/score (higher is better)"
    means = [bars.lines[0].get_ydata()[0] for bars in axes.containers]
    np.testing.assert_allclose(means, [0.6, 0.3])


def test_one_confirmation_can_be_drawn_and_none_is_an_input_error(tmp_path, drawn):
    figures.draw_confirmations(confirmations({0: 0.5}, {}), SCORE, "min", tmp_path / "a.png")
    assert legend_of(drawn[0]) == ["best"]
    for given_runs in ([], confirmations({0: float("nan")}, {})):
        with pytest.raises(InputError, match="nothing to draw: no confirmation has val/score"):
            figures.draw_confirmations(given_runs, SCORE, "max", tmp_path / "b.png")
