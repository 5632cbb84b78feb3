"""What a search says of itself: its CSV, tables, importances, verdict and summary, on records made up here."""

from __future__ import annotations

import csv
import io
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist.errors import InputError
from tests.conftest import REPOSITORY
from tune.facts import (
    depth_of,
    describe_eta,
    describe_schedule,
    is_choice,
    options_of,
    parameters_of,
    schedule_of,
    seconds_per_step,
)
from tune.importance import FEWEST_TRIALS, Importances, importances
from tune.records import Point, Report, TrialRecord
from tune.results import (
    MOST_IMPORTANCES,
    Confirmation,
    by_choice,
    choice_table,
    confirmation_table,
    summary,
    trials_csv,
    verdict,
)

SCORE = "val/score"


def trial(number: int, point: Point, *scores: float, **changes: Any) -> TrialRecord:
    """A trial that reported these scores, an epoch of 10 steps each."""
    reports = [
        Report(epoch=epoch, step=10 * epoch, seconds=5.0 * epoch, metrics={SCORE: score})
        for epoch, score in enumerate(scores, start=1)
    ]
    return TrialRecord(
        **{"number": number, "name": f"t{number}", "point": point, "status": "finished", "reports": reports} | changes
    )


def depth_trial(number: int, depth: int | str, *scores: float, speed: float = 0.0, **changes: Any) -> TrialRecord:
    config = {"model": {"image": {"concat_depth": depth}}, "train": {"global_batch": 32}}
    found = trial(number, {"model.image.concat_depth": depth}, *scores, config=config, **changes)
    for report in found.reports:
        report.metrics["speed/images_per_second"] = speed
    return found


# ------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize(
    "beta, words",
    [
        ({"kind": "constant", "value": 0.25}, "constant 0.25"),
        ({"kind": "linear", "start": 0.1234, "end": 0.83}, "linear 0.123 -> 0.83"),
        ({"kind": "cosine", "start": 0.0, "end": 1.0}, "cosine 0 -> 1"),
        ({"kind": "sigmoid"}, "sigmoid 0.1 -> 0.9 around 0.5, steepness 12"),
        ({"kind": "delayed_step", "start": 0.2, "end": 0.7, "at": 0.4}, "delayed step 0.2 -> 0.7 at 0.4"),
        ({"kind": "piecewise", "knots": [[0.0, 0.1], [0.5, 0.8]]}, "piecewise 0.1 at 0, 0.8 at 0.5"),
    ],
)
def test_every_schedule_has_its_words(beta, words):
    assert describe_schedule(beta) == words
    assert schedule_of(trial(1, {}, config={"blend": {"beta": beta}})).kind == beta["kind"]


@pytest.mark.parametrize("beta", [{"kind": "wavy"}, {"kind": "linear", "start": 2.0}, {}])
def test_what_is_no_schedule_is_named(beta):
    with pytest.raises(InputError, match=r"blend\.beta \{"):
        describe_schedule(beta)


def test_eta_in_words():
    assert describe_eta("balanced") == "balanced"
    assert describe_eta(1.6398) == "1.64"
    assert describe_eta({"kind": "piecewise", "knots": [[0.0, 1.0], [1.0, 4.0]]}) == "piecewise 1 at 0, 4 at 1"


def test_parameters_of_a_choice_stand_behind_it_option_by_option():
    trials = [
        trial(1, {"blend.beta": "linear", "blend.beta.linear.start": 0.1, "optimizer.image.lr": 0.1}),
        trial(2, {"blend.beta": "cosine", "blend.beta.cosine.start": 0.1, "blend.eta": "balanced"}),
        trial(3, {"blend.beta": "linear", "blend.beta.linear.start": 0.1, "blend.beta.linear.end": 0.2}),
    ]
    assert parameters_of(trials) == [
        "blend.beta",
        "blend.beta.linear.start",
        "blend.beta.linear.end",
        "blend.beta.cosine.start",
        "optimizer.image.lr",
        "blend.eta",
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sets(st.sampled_from(["a", "a.b", "a.b.c", "a.c", "b", "b.a.a", "bb", "c.a"])), max_size=5))
def test_no_parameter_is_lost_or_doubled(names):
    found = parameters_of([trial(1, dict.fromkeys(sorted(each), 1)) for each in names])
    assert sorted(found) == sorted(set().union(*names))


def test_options_are_ordered_and_depth_is_always_a_choice():
    trials = [depth_trial(n, depth) for n, depth in enumerate(["full", 10, 2], start=1)]
    assert options_of("model.image.concat_depth", trials) == ["2", "10", "full"]
    assert is_choice("model.image.concat_depth", trials[1:])
    numbers = [trial(1, {"n": 1, "b": True, "x": None}), trial(2, {"n": 2.5})]
    assert [is_choice(name, numbers) for name in ("n", "b", "x")] == [False, True, True]
    assert [depth_of(each) for each in (*trials, trial(1, {}))] == ["full", "10", "2", None]


def test_seconds_of_a_step_are_the_median_of_what_was_reported():
    found = depth_trial(1, 0, 0.1, 0.2, 0.3)
    for report, speed in zip(found.reports, (16.0, 32.0, 320.0)):
        report.metrics["speed/images_per_second"] = speed
    assert seconds_per_step(found) == 1.0, "32 images a step at 16, 32 and 320 images a second: 2, 1 and 0.1 s"
    found.reports[1].metrics["speed/images_per_second"] = 0.0
    assert seconds_per_step(found) == pytest.approx(1.05), "a speed of nothing is none"
    assert seconds_per_step(trial(1, {}, 0.5)) is None
    found.config.clear()
    assert seconds_per_step(found) is None


# --------------------------------------------------------------------------------------------------------------- CSV


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_the_csv_has_a_line_a_trial_and_a_column_a_parameter():
    trials = [
        depth_trial(1, "full", 0.5, 0.75, 0.25, speed=64.0, weights=12, flops=34, run_id="abc", seconds=15.5),
        trial(2, {"blend.eta": "constant", "blend.eta.constant": 1e-05, "x": None}, status="failed", reason="no, rank"),
    ]
    text = trials_csv(trials, SCORE, "max")
    assert text.splitlines()[0] == (
        "number,name,status,reason,best val/score,last val/score,epochs,seconds,seconds a step,weights,flops,run_id,"
        "model.image.concat_depth,blend.eta,blend.eta.constant,x"
    )
    assert text.splitlines()[1] == "1,t1,finished,,0.75,0.25,3,15.5,0.5,12,34,abc,full,,,"
    assert text.splitlines()[2] == '2,t2,failed,"no, rank",,,0,0.0,,,,,,constant,1e-05,null'
    assert rows_of(trials_csv(trials, SCORE, "min"))[0]["best val/score"] == "0.25"
    assert trials_csv([], SCORE, "max").count("\n") == 1


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_spreadsheet_takes_no_text_for_a_formula(start):
    nasty = f"{start}HYPERLINK(1)"
    [row] = rows_of(trials_csv([trial(1, {nasty: nasty, "n": -0.5}, -0.25, name=nasty, reason=nasty)], SCORE, "max"))
    assert (row["name"], row["reason"], row[f"'{nasty}"]) == (f"'{nasty}",) * 3
    assert (row["n"], row["best val/score"]) == ("-0.5", "-0.25"), "numbers stay numbers"


printable = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.dictionaries(printable, printable | st.integers() | st.floats(allow_nan=False)), max_size=4),
    reason=printable,
)
def test_any_text_and_number_survives_the_csv(values, reason):
    trials = [trial(number, point, 0.5, reason=reason) for number, point in enumerate(values, start=1)]
    lines = list(csv.reader(io.StringIO(trials_csv(trials, SCORE, "max"), newline="")))
    names = parameters_of(trials)
    assert [cell.removeprefix("'") for cell in lines[0][12:]] == [name.removeprefix("'") for name in names]
    for line, point in zip(lines[1:], values, strict=True):
        assert line[3].removeprefix("'") == reason.removeprefix("'")
        for cell, name in zip(line[12:], names, strict=True):
            value = point.get(name, "")
            if isinstance(value, str):
                assert cell in (value, f"'{value}")
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
            else:
                assert float(cell) == float(value)


# ------------------------------------------------------------------------------------------------------- importances


def drawn_trials(count: int, seed: int, noise: float = 0.0, signal: float = 1.0) -> list[TrialRecord]:
    """Scores that depend on the kind alone (linear is best), beside a rate and a parameter that say nothing."""
    generator = random.Random(seed)
    trials = []
    for number in range(1, count + 1):
        kind = generator.choice(["linear", "constant", "cosine"])
        point: Point = {"blend.beta": kind, "rate": generator.random(), f"blend.beta.{kind}.x": generator.random()}
        trials.append(trial(number, point, signal * (kind == "linear") + generator.gauss(0, noise)))
    return trials


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_parameter_that_matters_is_found(mode):
    found = importances(drawn_trials(40, seed=0, noise=0.05), SCORE, mode)
    assert found is not None
    first, *others = found.rows
    assert first.parameter == "blend.beta" and first.mean > 1
    assert all(abs(row.mean) < 0.1 for row in others)
    assert found.r2 > 0.9 and found.trials == 40
    assert {row.parameter for row in others} == {
        "rate",
        *(f"blend.beta.{k}.x" for k in ("linear", "constant", "cosine")),
    }
    assert [row.mean for row in found.rows] == sorted((row.mean for row in found.rows), reverse=True)


def test_a_conditional_parameter_that_matters_is_found_where_it_exists():
    generator = random.Random(3)
    trials = []
    for number in range(1, 61):
        at = generator.random()
        linear = number % 2 == 0
        point: Point = (
            {"kind": "linear", "kind.linear.at": at} if linear else {"kind": "constant", "kind.constant.at": at}
        )
        trials.append(trial(number, point, at if linear else 0.5 + generator.gauss(0, 0.01)))
    found = importances(trials, SCORE, "max")
    assert found is not None and found.r2 > 0.8
    means = {row.parameter: row.mean for row in found.rows}
    assert means["kind.linear.at"] > 0.5 > 0.05 > abs(means["kind.constant.at"])
    assert means["kind"] > 0.5, "a choice goes with what exists only with it"


def test_noise_is_called_noise():
    """Judged on the trials that it was trained with, a forest would give an R^2 of 0.8 here."""
    for seed in range(3):
        found = importances(drawn_trials(30, seed, noise=1.0, signal=0.0), SCORE, "max")
        assert found is not None and found.r2 < 0.2
        assert found.meaning == "too low: the order means nothing"


def test_importances_repeat_and_depend_on_the_seed():
    trials = drawn_trials(20, seed=1, noise=0.3)
    assert (
        importances(trials, SCORE, "max") == importances(trials, SCORE, "max") != importances(trials, SCORE, "max", 1)
    )


def test_too_little_gives_no_importances():
    trials = drawn_trials(FEWEST_TRIALS, seed=0, noise=1.0)
    assert importances(trials, SCORE, "max") is not None
    assert importances(trials[1:], SCORE, "max") is None
    trials[0].status = "failed"
    assert importances(trials, SCORE, "max") is None, "a failed trial has no score"
    same = [trial(number, {"x": float(number)}, 0.5) for number in range(1, 20)]
    assert importances(same, SCORE, "max") is None
    one_point = [trial(number, {"x": 1.0}, float(number)) for number in range(1, 20)]
    assert importances(one_point, SCORE, "max") is None
    assert importances([], SCORE, "max") is None


@pytest.mark.parametrize(
    "r2, words",
    [
        (0.1, "too low: the order means nothing"),
        (0.3, "low: take the order as a hint"),
        (0.7, "the order means something"),
    ],
)
def test_what_an_r2_means(r2, words):
    assert Importances(rows=(), r2=r2, trials=9, repeats=10).meaning == words


# ------------------------------------------------------------------------------------------------------------ tables


def test_scores_by_option_leave_out_what_has_none():
    trials = [
        depth_trial(1, "full", 0.5, 0.6),
        depth_trial(2, 0, 0.9, status="failed"),
        depth_trial(3, 1, 0.7, math.nan),
        depth_trial(4, "full", 0.4, 0.3),
        trial(5, {"other": 1}, 0.99),
    ]
    assert by_choice(trials, "model.image.concat_depth", SCORE, "max") == {"1": [0.7], "full": [0.6, 0.4]}
    assert by_choice(trials, "model.image.concat_depth", SCORE, "min") == {"1": [0.7], "full": [0.5, 0.3]}


def test_golden_table_of_depths():
    trials = [
        depth_trial(1, "full", 0.5, 0.6, speed=32, weights=3_000_000, flops=7_000_000_000),
        depth_trial(2, 0, 0.5, speed=64, weights=1_200_000, flops=2_600_000_000),
        depth_trial(3, 0, 0.3, speed=128, status="stopped", weights=1_200_000, flops=2_600_000_000),
        depth_trial(4, 1, status="failed"),
    ]
    assert choice_table(trials, "model.image.concat_depth", SCORE, "max") == (
        "| model.image.concat_depth | trials | best val/score | mean ± deviation | stopped early |   weights "
        "| FLOPs an image | seconds a step |\n"
        "| ------------------------ | -----: | -------------: | ---------------: | ------------: | --------: "
        "| -------------: | -------------: |\n"
        "| 0                        |      2 |            0.5 |       0.4 ± 0.14 |             1 | 1,200,000 "
        "|      2.6 GFLOP |          0.375 |\n"
        "| 1                        |      1 |                |                  |             0 |           "
        "|                |                |\n"
        "| full                     |      1 |            0.6 |              0.6 |             0 | 3,000,000 "
        "|        7 GFLOP |              1 |"
    )


def test_other_choices_have_no_costs_and_min_takes_the_lowest():
    trials = [trial(1, {"eta|x": "a|b\nc"}, 0.5, 0.6), trial(2, {"eta|x": "a|b\nc"}, 0.7)]
    assert choice_table(trials, "eta|x", SCORE, "min").splitlines() == [
        r"| eta\|x | trials | best val/score | mean ± deviation | stopped early |",
        "| ------ | -----: | -------------: | ---------------: | ------------: |",
        r"| a\|b c |      2 |            0.5 |       0.6 ± 0.14 |             0 |",
    ]


# ------------------------------------------------------------------------------------------------------ confirmation


def confirmations(best: dict[int, float], base: dict[int, float], **more: float) -> list[Confirmation]:
    return [
        Confirmation(name=name, seed=seed, metrics={SCORE: value} | more, folder=Path("runs"))
        for name, values in (("best", best), ("base", base))
        for seed, value in values.items()
    ]


def test_golden_table_of_confirmations():
    given_runs = confirmations({0: 0.5, 1: 0.7}, {0: 0.25}, **{"test/dca": 0.875, "val/loss": 3.0})
    assert confirmation_table(given_runs, [SCORE]).splitlines() == [
        "| trained again | seeds |  val/score |  test/dca |",
        "| ------------- | ----: | ---------: | --------: |",
        "| best          |     2 | 0.6 ± 0.14 | 0.875 ± 0 |",
        "| base          |     1 |       0.25 |     0.875 |",
    ]


def test_the_verdict_by_hand():
    """Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, standard error 0.1 / sqrt 3 = 0.0577; 0.2 is 3.5 of them."""
    given_runs = confirmations({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.5, 2: 0.6})
    expected = (
        "Best is {} than base by more than the noise, though 3 seeds are few to tell the noise from. Over 3 seeds "
        "val/score is 0.7 ± 0.2 for best, 0.5 ± 0.1 for base; paired difference +0.2 ± 0.058 (standard error; noise is "
        "what lies within 2 of them)."
    )
    assert verdict(given_runs, SCORE, "max") == expected.format("better")
    assert verdict(given_runs, SCORE, "min") == expected.format("worse")


def test_a_difference_inside_the_noise_is_none():
    """Differences 0.1, -0.1, 0.3: mean 0.1, deviation 0.2, standard error 0.115; 0.1 is less than two of them."""
    given_runs = confirmations({0: 0.5, 1: 0.4, 2: 0.9}, {0: 0.4, 1: 0.5, 2: 0.6})
    for mode in ("max", "min"):
        told = verdict(given_runs, SCORE, mode)
        assert told.startswith("Inside the noise: best is not shown to differ from base. Over 3 seeds")
        assert "paired difference +0.1 ± 0.12 (" in told
    same = confirmations({0: 0.5, 1: 0.4}, {0: 0.5, 1: 0.4})
    assert verdict(same, SCORE, "max").startswith("Inside the noise")


def test_only_equal_seeds_are_compared():
    given_runs = confirmations({0: 0.5, 1: 0.7, 9: 100.0}, {0: 0.4, 1: 0.6, 8: -100.0})
    assert "Over 2 seeds val/score is 0.6 ± 0.14 for best, 0.5 ± 0.14 for" in verdict(given_runs, SCORE, "max")
    apart = confirmations({1: 0.5}, {2: 0.4})
    assert verdict(apart, SCORE, "max") == (
        "Not decided: best and base have no seed in common (val/score 0.5 for best, 0.4 for base)."
    )


def test_many_seeds_need_no_caution():
    given_runs = confirmations({s: 1.0 + s / 100 for s in range(5)}, dict.fromkeys(range(5), 0.5))
    assert verdict(given_runs, SCORE, "max").startswith("Best is better than base by more than the noise. Over 5 seeds")


def test_one_seed_shows_no_noise():
    told = verdict(confirmations({4: 0.9}, {4: 0.1}), SCORE, "max")
    assert told.startswith("Not known. Over 1 seed val/score is 0.9 for best, 0.1 for base: a difference of +0.8.")
    assert told.endswith("this may well lie inside the noise.")


@pytest.mark.parametrize(
    "best, base, missing", [({}, {0: 0.1}, "best"), ({0: 0.1}, {}, "base"), ({0: math.nan}, {0: 1.0}, "best")]
)
def test_nothing_to_compare_is_said(best, base, missing):
    assert verdict(confirmations(best, base), SCORE, "max") == (
        f"Not confirmed: {missing} was not trained again to a val/score."
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=8))
def test_the_verdict_is_that_of_the_paired_t_statistic(pairs):
    """Integers, so that the arithmetic is exact but for the square root; ties with exactly two errors are left out."""
    differences = [one - other for one, other in pairs]
    count, total = len(pairs), sum(differences)
    spread = count * sum(d * d for d in differences) - total**2  # n^2 (n - 1) SE^2, an integer
    t_squared = total**2 * (count - 1) / spread if spread else math.inf
    if abs(t_squared - 4) < 1e-6:
        return
    best, base = ({seed: float(pair[side]) for seed, pair in enumerate(pairs)} for side in (0, 1))
    told = verdict(confirmations(best, base), SCORE, "max")
    if total == 0 or t_squared < 4:
        assert told.startswith("Inside the noise")
    else:
        assert told.startswith(f"Best is {'better' if total > 0 else 'worse'} than base by more than the noise")


# ----------------------------------------------------------------------------------------------------------- summary


def searched() -> list[TrialRecord]:
    trials = []
    for number, (kind, depth, score) in enumerate(
        [("linear", 1, 0.7), ("constant", 0, 0.5), ("linear", 0, 0.6)], start=1
    ):
        beta = {"kind": kind, "start": 0.1, "end": 0.8} if kind == "linear" else {"kind": kind, "value": 0.5}
        point: Point = {"blend.beta": kind, "model.image.concat_depth": depth, "optimizer.image.lr": 0.012345}
        if kind == "linear":
            point |= {"blend.beta.linear.start": 0.1, "blend.beta.linear.end": 0.8}
        config = {"blend": {"beta": beta, "eta": "balanced"}, "model": {"image": {"concat_depth": depth}}}
        trials.append(trial(number, point, score - 0.1, score, config=config))
    trials[1].status = "stopped"
    trials += [trial(n, {"blend.beta": "linear"}, status="failed", reason="the loss|is not\nfinite") for n in (4, 5)]
    trials += [trial(6, {}, status="waiting")]
    return trials


def test_a_summary_begins_with_the_answer():
    text = summary(searched(), SCORE, "max", confirmations({0: 0.5}, {0: 0.25}))
    assert text.splitlines()[:4] == [
        "**Best: beta linear 0.1 -> 0.8, eta balanced, concat_depth 1, optimizer.image.lr 0.0123** (trial 1 of 6, t1; "
        "val/score 0.7, highest of 3 scored)",
        "",
        "**How sure:** Not known. Over 1 seed val/score is 0.5 for best, 0.25 for base: a difference of +0.25. One "
        "seed does not show the noise, so this may well lie inside the noise.",
        "",
    ]
    assert "| base          |     1 |      0.25 |" in text
    assert "highest over 3 trials and 6 evaluations, all of them noisy, and so optimistic" in text
    assert "6 trials: 2 finished, 1 stopped early, 2 failed, 1 waiting." in text
    assert "- trials 4, 5 failed: the loss|is not finite" in text
    assert "| blend.beta " in text and "| model.image.concat_depth " in text and "| optimizer.image.lr " not in text
    assert "Importances: none, they need 8 trials with different scores." in text


def test_a_summary_in_min_mode_with_a_schedule_of_several_and_without_confirmation():
    trials = searched()
    text = summary(trials, SCORE, "min", schedule_text="0.1, then 0.6")
    assert text.startswith(
        "**Best: beta 0.1, then 0.6, eta balanced, concat_depth 0, optimizer.image.lr 0.0123** (trial 2"
    )
    assert "val/score 0.4, lowest of 3 scored)\n" in text
    assert "**How sure:** Not confirmed with other seeds." in text


def test_the_winner_of_a_population_is_told_with_its_last_score_and_what_it_lived_through():
    trials = searched()
    trials[0].reports.append(Report(epoch=3, step=30, seconds=1.0, metrics={SCORE: 0.25}))
    text = summary(trials, SCORE, "max", (), "0.1, then 0.6", eta_text="1, then 4", winner=trials[2])
    assert text.splitlines()[0] == (
        "**Best: beta 0.1, then 0.6, eta 1, then 4, concat_depth 0, optimizer.image.lr 0.0123** (trial 3 of 6, t3; "
        "val/score 0.6, highest of 3 at the end)"
    )
    assert "highest over 3 trials and 3 evaluations" in text


def test_a_summary_of_nothing_says_so():
    text = summary([trial(1, {}, status="failed")], SCORE, "max")
    assert text.startswith(
        "No trial has reported val/score.\n\n1 trial: 1 failed.\n\n- trial 1 failed: no reason known"
    )
    assert summary([], SCORE, "max").startswith("No trial has reported val/score.\n\n0 trials.\n")


def test_a_summary_shows_the_first_importances_and_counts_the_others():
    generator = random.Random(0)
    names = [f"p{n}" for n in range(MOST_IMPORTANCES + 2)]
    trials = []
    for number in range(1, 31):
        point: Point = {name: generator.random() for name in names}
        trials.append(trial(number, point, float(point["p3"])))
    text = summary(trials, SCORE, "max")
    table = text[text.index("| parameter") :].splitlines()
    assert table[2].startswith("| p3 ")
    assert len([line for line in table if line.startswith("| p")]) == 1 + MOST_IMPORTANCES
    assert text.endswith("\n\n2 parameters with lower importances are left out.\n")


def test_importing_is_cheap():
    code = (
        "import sys; import tune.results, tune.figures\n"
        "print(sorted({'torch', 'matplotlib', 'sklearn', 'mlflow', 'ray'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")
