"""What a search came to, as text: a CSV file, tables, the confirmation of the winner, a summary.

Pure functions of `tune.records`. A trial's score is its best evaluation (`TrialRecord.score`); failed trials have none.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tune.facts import (
    Mode,
    counted,
    depth_of,
    describe_eta,
    describe_schedule,
    inside,
    is_choice,
    options_of,
    parameters_of,
    seconds_per_step,
)
from tune.importance import FEWEST_TRIALS, Importances, importances
from tune.records import Point, Scalar, TrialRecord, best_trial, describe, shown

ALSO_CONFIRMED = ("val/dca", "val/bleu4", "test/dca", "test/bleu4")
MOST_IMPORTANCES = 8  # in a summary
NOISE = 2.0  # standard errors within which a difference says nothing


# ---------------------------------------------------------------------------------------------------------------- CSV


def trials_csv(trials: Sequence[TrialRecord], metric: str, mode: Mode) -> str:
    """A line a trial, a column for each parameter of any of them; what is not known is empty.

    Numbers stay numbers; text that a spreadsheet would take for a formula gets an apostrophe.
    """
    from mdnet_dist.predict_folder import guarded  # imports torch

    names = parameters_of(trials)
    head = ["number", "name", "status", "reason", f"best {metric}", f"last {metric}", "epochs", "seconds"]
    rows: list[list[Scalar]] = [[*head, "seconds a step", "weights", "flops", "run_id", *names]]
    for trial in trials:
        last = trial.values(metric)[-1:]
        rows.append(
            [
                *(trial.number, trial.name, trial.status, trial.reason),
                *(trial.score(metric, mode), last[0] if last else None),
                *(trial.reports[-1].epoch if trial.reports else 0, trial.seconds, seconds_per_step(trial)),
                *(trial.weights or None, trial.flops or None, trial.run_id),
                # null is a value, a parameter that the trial does not have is none
                *("" if name not in trial.point else _or_null(trial.point[name]) for name in names),
            ]
        )
    text = io.StringIO()
    writer = csv.writer(text)
    for row in rows:
        writer.writerow([guarded(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue()


def _or_null(value: Scalar) -> Scalar:
    return "null" if value is None else value


# ------------------------------------------------------------------------------------------------------------- tables


def by_choice(trials: Sequence[TrialRecord], parameter: str, metric: str, mode: Mode) -> dict[str, list[float]]:
    """{option: scores of the trials that drew it}, for options with a score."""
    found: dict[str, list[float]] = {}
    for option in options_of(parameter, trials):
        drawn = [trial.score(metric, mode) for trial in _with(option, parameter, trials)]
        if scores := [score for score in drawn if score is not None]:
            found[option] = scores
    return found


def choice_table(trials: Sequence[TrialRecord], parameter: str, metric: str, mode: Mode) -> str:
    """The options of a parameter as Markdown; for concat_depth also what each costs (medians over its trials)."""
    from mdnet_dist.cost import as_flops  # imports torch

    costs = parameter.endswith("concat_depth")
    scores = by_choice(trials, parameter, metric, mode)
    head = [parameter, "trials", f"best {metric}", "mean ± deviation", "stopped early"]
    cells = [head + (["weights", "FLOPs an image", "seconds a step"] if costs else [])]
    for option in options_of(parameter, trials):
        drawn = _with(option, parameter, trials)
        found = scores.get(option, [])
        best = (max(found) if mode == "max" else min(found)) if found else None
        row = [option, str(len(drawn)), _number(best), mean_and_deviation(found)]
        row.append(str(sum(trial.status == "stopped" for trial in drawn)))
        if costs:
            weights = [trial.weights for trial in drawn if trial.weights]
            flops = [trial.flops for trial in drawn if trial.flops]
            seconds = [time for trial in drawn if (time := seconds_per_step(trial)) is not None]
            row.append(f"{statistics.median(weights):,.0f}" if weights else "")
            row.append(as_flops(statistics.median(flops)) if flops else "")
            row.append(_number(statistics.median(seconds)) if seconds else "")
        cells.append(row)
    return _markdown(cells)


def mean_and_deviation(values: Sequence[float]) -> str:
    """`mean ± sample standard deviation` (n - 1); of one value the value, of none nothing."""
    if len(values) < 2:
        return _number(values[0]) if values else ""
    return f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"


def _with(option: str, parameter: str, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [trial for trial in trials if parameter in trial.point and shown(trial.point[parameter]) == option]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them headings, lined up for a terminal: the first column left, numbers right."""
    rows = [[_plain_line(cell).replace("|", r"\|") for cell in row] for row in cells]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width if not place else "-" * (width - 1) + ":" for place, width in enumerate(widths)])
    return "\n".join(
        f"| {row[0].ljust(widths[0])} | {' | '.join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))} |"
        for row in rows
    )


def _plain_line(text: str, most: int = 200) -> str:
    """One printable line, cut where it is long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else line[: most - 4] + " ..."


# ------------------------------------------------------------------------------------------------------- confirmation


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The best point, or the configuration that the search began from, trained again with a seed of its own."""

    name: Literal["best", "base"]
    seed: int
    metrics: Mapping[str, float]  # val/..., and test/... where there is a test part
    folder: Path  # of its run


def confirmation_table(confirmations: Sequence[Confirmation], metrics: Sequence[str]) -> str:
    """Rows best and base, columns `metrics` and ALSO_CONFIRMED as far as measured: mean ± deviation over seeds."""
    names = [name for name in ("best", "base") if any(each.name == name for each in confirmations)]
    columns = [
        metric
        for metric in dict.fromkeys((*metrics, *ALSO_CONFIRMED))
        if any(confirmed(confirmations, name, metric) for name in names)
    ]
    cells = [["trained again", "seeds", *columns]]
    for name in names:
        values = [list(confirmed(confirmations, name, metric).values()) for metric in columns]
        seeds = len({each.seed for each in confirmations if each.name == name})
        cells.append([name, str(seeds), *map(mean_and_deviation, values)])
    return _markdown(cells)


def verdict(confirmations: Sequence[Confirmation], metric: str, mode: Mode) -> str:
    """Whether best is better than base: the paired difference over equal seeds against its standard error."""
    best, base = (confirmed(confirmations, name, metric) for name in ("best", "base"))
    if not best or not base:
        return f"Not confirmed: {'best' if not best else 'base'} was not trained again to a {metric}."
    seeds = sorted(best.keys() & base.keys())
    if not seeds:
        return f"Not decided: best and base have no seed in common ({metric} {_both(best, base)})."
    best, base = ({seed: values[seed] for seed in seeds} for values in (best, base))
    differences = [best[seed] - base[seed] for seed in seeds]
    mean, sign = statistics.fmean(differences), 1 if mode == "max" else -1
    direction = "better" if sign * mean > 0 else "worse"
    if len(seeds) == 1:
        return (
            f"Not known. Over 1 seed {metric} is {_both(best, base)}: a difference of {mean:+.3g}. One seed does not "
            "show the noise, so this may well lie inside the noise."
        )
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    told = f"Over {len(seeds)} seeds {metric} is {_both(best, base)}; paired difference {mean:+.3g} ± {error:.2g} "
    told += f"(standard error; noise is what lies within {NOISE:g} of them)."
    if mean == 0 or abs(mean) < NOISE * error:
        return f"Inside the noise: best is not shown to differ from base. {told}"
    few = f", though {len(seeds)} seeds are few to tell the noise from" if len(seeds) < 5 else ""
    return f"Best is {direction} than base by more than the noise{few}. {told}"


def confirmed(confirmations: Sequence[Confirmation], name: str, metric: str) -> dict[int, float]:
    """{seed: the metric} of those of a name that have it, finite."""
    found = {each.seed: each.metrics[metric] for each in confirmations if each.name == name and metric in each.metrics}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def _both(best: Mapping[int, float], base: Mapping[int, float]) -> str:
    return f"{mean_and_deviation([*best.values()])} for best, {mean_and_deviation([*base.values()])} for base"


# ------------------------------------------------------------------------------------------------------------ summary


def summary(
    trials: Sequence[TrialRecord],
    metric: str,
    mode: Mode,
    confirmations: Sequence[Confirmation] = (),
    schedule_text: str = "",
    *,
    eta_text: str = "",
    winner: TrialRecord | None = None,
) -> str:
    """The whole search as Markdown: first which schedule and depth, and how sure that is; then what it rests on.

    MLflow's page shows the first few lines of it, and the rest when asked: they hold the answer.

    Args:
        schedule_text, eta_text: the best trial's beta and eta in words, where its configuration does not have them (a
            member of a population has lived through several).
        winner: the member of a population that ends best; without it the trial with the best evaluation wins.

    Raises:
        InputError: the best trial's configuration holds a blend.beta that is no schedule.
    """
    scored = [trial for trial in trials if trial.score(metric, mode) is not None]
    best = winner or best_trial(list(trials), metric, mode)
    parts = []
    if best is None:
        parts.append(f"No trial has reported {metric}.")
    else:
        which = "highest" if mode == "max" else "lowest"
        score = best.values(metric)[-1] if winner else best.score(metric, mode)
        parts.append(
            f"**Best: {_point_in_words(best, schedule_text, eta_text)}** (trial {best.number} of {len(trials)}, "
            f"{_plain_line(best.name)}; {metric} {_number(score)}, {which} of {len(scored)} "
            f"{'at the end' if winner else 'scored'})"
        )
        sure = verdict(confirmations, metric, mode) if confirmations else "Not confirmed with other seeds."
        parts.append(f"**How sure:** {sure}")
        if confirmations:
            parts.append(confirmation_table(confirmations, [metric]))
        evaluations = len(scored) if winner else sum(len(trial.values(metric)) for trial in scored)
        parts.append(
            f"The best score of the search is the {which} over {counted(len(scored), 'trial')} and "
            f"{counted(evaluations, 'evaluation')}, all of them noisy, and so optimistic; scores of training again "
            "with other seeds are not."
        )
    parts.append(_outcomes(trials))
    choices = [name for name in parameters_of(trials) if is_choice(name, trials)]
    parts += [choice_table(trials, parameter, metric, mode) for parameter in choices]
    if choices:
        parts.append("Mean ± sample standard deviation over trials; those stopped early count with what they reached.")
    parts.append(_importances_text(importances(trials, metric, mode)))
    return "\n\n".join(parts) + "\n"


def _point_in_words(trial: TrialRecord, schedule_text: str, eta_text: str) -> str:
    """beta, eta, concat_depth, the rest of the point."""
    beta, eta = inside(trial.config, "blend", "beta"), inside(trial.config, "blend", "eta")
    told = {
        "blend.beta": schedule_text or (describe_schedule(beta) if beta is not None else ""),
        "blend.eta": eta_text or ("" if eta is None else describe_eta(eta)),
        "model.image.concat_depth": depth_of(trial) or "",
    }
    parts = [f"{key.rsplit('.', 1)[-1]} {_plain_line(text, 1000)}" for key, text in told.items() if text]
    covered = tuple(key for key, text in told.items() if text)
    rest: Point = {
        key: value
        for key, value in trial.point.items()
        if not any(key == start or key.startswith(f"{start}.") for start in covered)
    }
    return ", ".join([*parts, *([_plain_line(describe(rest), 1000)] if rest else [])])


def _outcomes(trials: Sequence[TrialRecord]) -> str:
    counts: Counter[str] = Counter(trial.status for trial in trials)
    words = {"stopped": "stopped early"}
    order = ("finished", "stopped", "failed", "running", "waiting")
    told = ", ".join(f"{counts[status]} {words.get(status, status)}" for status in order if counts[status])
    line = counted(len(trials), "trial") + (f": {told}" if told else "")
    failures: dict[str, list[int]] = {}
    for trial in trials:
        if trial.status == "failed":
            failures.setdefault(_plain_line(trial.reason) or "no reason known", []).append(trial.number)
    lines = [
        f"- trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} failed: {reason}"
        for reason, numbers in failures.items()
    ]
    return "\n".join([f"{line}.", *([""] if lines else []), *lines])


def _importances_text(found: Importances | None) -> str:
    if found is None:
        return f"Importances: none, they need {FEWEST_TRIALS} trials with different scores."
    rows = [[row.parameter, f"{row.mean:.3f} ± {row.deviation:.3f}"] for row in found.rows[:MOST_IMPORTANCES]]
    left_out = len(found.rows) - len(rows)
    return (
        f"Importances: what a random forest loses of its out-of-bag R² when a parameter's values are exchanged between "
        f"trials. R² over {found.trials} trials: {found.r2:.2f}, {found.meaning}.\n\n"
        + _markdown([["parameter", "importance"], *rows])
        + (f"\n\n{left_out} parameters with lower importances are left out." if left_out else "")
    )
