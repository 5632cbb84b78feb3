"""What a search leaves: best.yaml, table, summary, pictures; and that only the same search goes on in a folder."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdnet_dist.config_file import as_yaml, load_config
from mdnet_dist.errors import InputError
from mdnet_dist.schedules import beta_at
from tests.tiny import tiny_config
from tune.parameter import RandomChooser
from tune.population import BETA
from tune.records import Report, Segment, TrialRecord
from tune.report import BEST, LINEAGE, PICTURES, SUMMARY, TABLE, Outcome, publish
from tune.search import SEARCH as SEARCH_NAME
from tune.search import _keep_search, _planned
from tune.search_config import Search, load_search

SCORE = "val/score"
SEARCH = """\
name: s
base: base.yaml
overrides: [train.epochs=8]
space:
  blend.beta:
    choice:
      - {kind: constant, value: {uniform: [0.05, 0.95]}}
      - {kind: linear, start: {uniform: [0, 1]}, end: {uniform: [0, 1]}}
  model.image.concat_depth: {choice: [0, 1, full]}
trials: {count: 4, overrides: [train.epochs=4, evaluate.every_epochs=2]}
scheduler: {kind: none}
"""
PBT = """\
name: p
base: base.yaml
space: {blend.beta.value: {uniform: [0.05, 0.95]}}
trials: {count: 3, overrides: [train.epochs=4]}
scheduler: {kind: pbt}
"""
GRID = """\
name: g
base: base.yaml
space: {model.image.concat_depth: {choice: [0, 1, full]}}
trials: {count: 2}
searcher: {kind: grid}
scheduler: {kind: none}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a training configuration and the search's own folder."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(as_yaml(tiny_config(tmp_path / "set", tmp_path / "runs")))
    (tmp_path / "found").mkdir()
    return tmp_path / "found"


def search_of(text: str = SEARCH, *overrides: str) -> Search:
    Path("a.yaml").write_text(text)
    return load_search("a.yaml", overrides)


@dataclass
class Sent:
    """In place of a tracker: what the search's MLflow run is sent."""

    tags: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)

    def log_tags(self, tags: dict[str, str]) -> None:
        self.tags |= tags

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        self.parameters |= parameters

    def log_artifact(self, path: Path) -> None:
        assert path.exists()
        self.artifacts.append(path.name)


def reports(*scores: float) -> list[Report]:
    metrics = [{SCORE: score, "speed/images_per_second": 40.0} for score in scores]
    return [Report(epoch=e, step=5 * e, seconds=1.0 * e, metrics=values) for e, values in enumerate(metrics, start=1)]


def trials_of(search: Search, *scores: tuple[float, ...]) -> list[TrialRecord]:
    """Trials as the search draws them, that have reported these scores; without any they failed."""
    found = []
    for number, values in enumerate(scores, start=1):
        point = search.space.draw(RandomChooser(np.random.default_rng(number)))
        config = search.run_config(point, short=True).model_dump(mode="json")
        trial = TrialRecord(number=number, name=f"{number:03d}", point=point, config=config, reports=reports(*values))
        trial.status, trial.reason = ("finished", "") if values else ("failed", "out of memory")
        found.append(trial)
    return found


def outcome_of(search: Search, folder: Path, trials: list[TrialRecord], **options: Any) -> Outcome:
    (folder / "search.yaml").write_text(search.as_yaml())
    return Outcome(search=search, folder=folder, tracker=Sent(), trials=trials, **options)  # type: ignore[arg-type]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------------------- trials


def test_before_the_first_trial_there_is_nothing_to_write(folder: Path) -> None:
    outcome = outcome_of(search_of(), folder, [])
    publish(outcome)
    assert (names_in(folder), outcome.tracker) == ({"search.yaml"}, Sent())
    assert (outcome.best(), outcome.best_config(), outcome.lineage()) == (None, None, [])


def test_a_search_without_a_score_has_a_table_and_says_so(folder: Path) -> None:
    search = search_of()
    outcome = outcome_of(search, folder, trials_of(search, (), ()))
    publish(outcome)
    assert names_in(folder) == {"search.yaml", TABLE, SUMMARY}
    text = (folder / SUMMARY).read_text()
    assert f"No trial has reported {SCORE}." in text and "trials 1, 2 failed: out of memory" in text
    rows = csv.DictReader((folder / TABLE).read_text().splitlines())
    assert [row["status"] for row in rows] == ["failed", "failed"]
    sent = outcome.tracker
    assert isinstance(sent, Sent)
    assert sent.artifacts == [TABLE, "search.yaml", SUMMARY] and sent.tags == {"mlflow.note.content": text}
    assert sent.parameters == {}


@pytest.mark.parametrize("scores", [[(0.25, 0.5)], [(0.25, 0.125), (), (0.75, 0.5), (0.5, 0.625)]])
def test_the_best_point_becomes_a_whole_configuration(scores: list[tuple[float, ...]], folder: Path) -> None:
    search = search_of()
    outcome = outcome_of(search, folder, trials_of(search, *scores))
    publish(outcome)
    winner = outcome.best()
    assert winner is outcome.trials[2 if len(scores) > 1 else 0]
    best = load_config(folder / BEST)
    assert best == search.run_config(winner.point, short=False).model_copy(update={"name": "found-best"})
    assert (best.train.epochs, best.evaluate.every_epochs) == (8, 1), "none of the overrides that make trials short"
    assert best.blend.beta.kind == winner.point["blend.beta"]
    assert Path(best.data.shards).is_absolute()
    head = (folder / BEST).read_text().splitlines()[:3]
    score = "0.75" if len(scores) > 1 else "0.5"
    assert head == [
        "# deepspeed launch/train.py found/best.yaml",
        "#",
        f"# The best of the search s: val/score {score} of trial {winner.name}.",
    ]
    assert f"(trial {winner.number} of {len(scores)}, {winner.name}; " in (folder / SUMMARY).read_text()
    assert len((folder / TABLE).read_text().splitlines()) == 1 + len(scores)
    pictures = {"parameters.png", "beta_schedules.png", "parallel_coordinates.png"}
    pictures |= {"concat_depth.png"} if len(scores) > 1 else set()  # one depth is nothing to compare
    assert names_in(folder / PICTURES) == pictures
    sent = outcome.tracker
    assert isinstance(sent, Sent)
    assert sent.artifacts == [TABLE, "search.yaml", BEST, SUMMARY, PICTURES]
    assert sent.parameters["best.train.epochs"] == 8 and "best.name" in sent.parameters


def test_while_trials_run_pictures_wait(folder: Path) -> None:
    search = search_of()
    outcome = outcome_of(search, folder, trials_of(search, (0.5,)))
    publish(outcome, pictures=False)
    assert names_in(folder) == {"search.yaml", TABLE, SUMMARY, BEST}
    assert isinstance(outcome.tracker, Sent) and outcome.tracker.artifacts == []
    outcome.trials[0].reports[:] = reports(0.5, 0.625)
    publish(outcome, pictures=False)
    assert "val/score 0.625" in (folder / BEST).read_text()


def test_the_lowest_is_the_best_where_less_is_better(folder: Path) -> None:
    search = search_of(SEARCH + "mode: min\n")
    outcome = outcome_of(search, folder, trials_of(search, (0.5, 0.25), (0.375,)))
    publish(outcome, pictures=False)
    assert "val/score 0.25 of trial 001" in (folder / BEST).read_text()


def test_a_search_without_depths_has_no_picture_of_them(folder: Path) -> None:
    search = search_of(SEARCH.replace("  model.image.concat_depth: {choice: [0, 1, full]}\n", ""))
    outcome = outcome_of(search, folder, trials_of(search, (0.5,), (0.25,)))
    publish(outcome)
    assert "parameters.png" in names_in(folder / PICTURES) and "importances.png" not in names_in(folder / PICTURES)


def test_the_command_in_best_yaml_works_where_the_search_was_started(
    folder: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    search = search_of()
    outcome = outcome_of(search, folder, trials_of(search, (0.5,)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    publish(outcome, pictures=False)
    assert (folder / BEST).read_text().startswith(f"# deepspeed launch/train.py {folder / BEST}\n")


# --------------------------------------------------------------------------------------------------------- confirmation


def confirmation(search: Search, folder: Path, name: str, seed: int, score: float) -> TrialRecord:
    config = search.base.model_dump(mode="json") | {"runs_folder": str(folder / "confirm")}
    config["train"] = {**config["train"], "seed": seed}
    run = folder / "confirm" / f"{name}-seed-{seed}"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps({"test/bleu4": score / 2, SCORE: -1.0}))
    return TrialRecord(
        number=1, name=run.name, point={}, config=config, status="finished", reports=reports(score - 0.25, score)
    )


def test_runs_that_confirm_are_compared(folder: Path) -> None:
    search = search_of()
    outcome = outcome_of(search, folder, trials_of(search, (0.5,)))
    outcome.confirmations = [
        confirmation(search, folder, name, seed, score + seed / 100)
        for seed in (0, 1)
        for name, score in (("best", 0.75), ("base", 0.5))
    ]
    running = confirmation(search, folder, "best", 2, 0.9)
    running.status = "running"
    silent = confirmation(search, folder, "base", 3, 0.9)
    silent.reports.clear()
    outcome.confirmations += [running, silent]
    found = outcome.confirmed()
    assert [(each.name, each.seed, each.metrics[SCORE], each.metrics["test/bleu4"]) for each in found] == [
        ("best", 0, 0.75, 0.375), ("base", 0, 0.5, 0.25), ("best", 1, 0.76, 0.38), ("base", 1, 0.51, 0.255),
    ]  # fmt: skip
    assert found[0].folder == folder / "confirm" / "best-seed-0"
    publish(outcome)
    assert "Over 2 seeds val/score is" in (folder / SUMMARY).read_text()
    assert "confirmations.png" in names_in(folder / PICTURES)


# ----------------------------------------------------------------------------------------------------------- population


def member(search: Search, number: int, betas: list[tuple[str | None, float]], *scores: float) -> TrialRecord:
    """A member of stretches of 10 steps: (parent, beta) each."""
    segments = [
        Segment(number=n, parent=parent, point={BETA: beta}, first_step=10 * n, last_step=10 * n + 10)
        for n, (parent, beta) in enumerate(betas)
    ]
    point = segments[-1].point
    config = search.run_config(point, short=True).model_dump(mode="json")
    trial = TrialRecord(number=number, name=f"member-{number:02d}", point=point, config=config, segments=segments)
    return replace(trial, status="finished", reports=reports(*scores))


def test_a_population_recommends_the_schedule_that_its_winner_has_lived_through(folder: Path) -> None:
    """The one that ends best; another was better before."""
    search = search_of(PBT)
    trials = [
        member(search, 1, [(None, 0.125), (None, 0.125)], 0.3, 0.9, 0.4, 0.1),
        member(search, 2, [(None, 0.25), ("member-03", 0.75)], 0.1, 0.1, 0.8, 0.5),
        member(search, 3, [(None, 0.5), (None, 0.5)], 0.2, 0.2, 0.3, 0.4),
    ]
    outcome = outcome_of(search, folder, trials, total_steps=20)
    publish(outcome)
    assert outcome.best() is trials[1]
    best = load_config(folder / BEST)
    assert best.train.epochs == search.base.train.epochs == 1
    assert best.blend.beta.kind == "piecewise"
    assert [beta_at(best.blend.beta, (step + 0.5) / 20) for step in range(20)] == [0.5] * 10 + [0.75] * 10
    assert best.blend.eta == search.base.blend.eta
    assert "val/score 0.5 of trial member-02" in (folder / BEST).read_text(), "the score at its end"
    lineage = json.loads((folder / LINEAGE).read_text())
    assert [(each["first_step"], each["beta"]) for each in lineage["stretches"]] == [(0, 0.5), (10, 0.75)]
    assert lineage["schedule"]["beta"]["kind"] == "piecewise"
    assert "population.png" in names_in(folder / PICTURES) and "parameters.png" not in names_in(folder / PICTURES)
    assert "piecewise 0.5 at 0, 0.5 at" in (folder / SUMMARY).read_text()
    assert "(trial 2 of 3, member-02; val/score 0.5, highest of 3 at the end)" in (folder / SUMMARY).read_text()


def test_a_winner_that_never_copied_recommends_a_constant(folder: Path) -> None:
    search = search_of(PBT)
    trials = [member(search, n, [(None, n / 8), (None, n / 8)], 0.1, n / 10) for n in (1, 2)]
    publish(outcome_of(search, folder, trials, total_steps=20))
    assert load_config(folder / BEST).blend.beta.model_dump() == {"kind": "constant", "value": 0.25}
    assert (folder / PICTURES / "population.png").exists()


def test_a_population_without_a_score_recommends_nothing(folder: Path) -> None:
    search = search_of(PBT)
    outcome = outcome_of(search, folder, [member(search, 1, [(None, 0.5)])], total_steps=20)
    publish(outcome)
    assert names_in(folder) == {"search.yaml", TABLE, SUMMARY}


# ------------------------------------------------------------------------------------------------------ the same search


@pytest.mark.parametrize(
    "override",
    ["trials.count=9", "trials.at_once=2", "trials.restarts=5", "trials.max_failed_share=0.9", "confirm.seeds=3"],
)
def test_a_search_that_goes_on_may_be_longer_or_more_careful(override: str, folder: Path) -> None:
    _keep_search(search_of(), folder, resume=False)
    changed = search_of(SEARCH, override)
    _keep_search(changed, folder, resume=True)
    assert (folder / SEARCH_NAME).read_text() == f"# base, with its overrides: base.yaml\n{changed.as_yaml()}"
    _keep_search(changed, folder, resume=True)


@pytest.mark.parametrize(
    ("override", "key", "was", "now"),
    [
        ("train.epochs=9", "overrides", "['train.epochs=8']", "['train.epochs=8', 'train.epochs=9']"),
        ("seed=1", "seed", "0", "1"),
        ("mode=min", "mode", "max", "min"),
        ("metric=val/dca", "metric", "val/score", "val/dca"),
        ("trials.workers=2", "trials.workers", "1", "2"),
        ("trials.gpus_per_worker=1", "trials.gpus_per_worker", "0.0", "1.0"),
        ("trials.overrides=[train.epochs=2]", "trials.overrides", "['train.epochs=4', 'evaluate.every_epochs=2']",
         "['train.epochs=2']"),
        ("scheduler={kind: asha}", "scheduler.grace_epochs", "None", "4"),
        ("searcher={kind: optuna}", "searcher.kind", "random", "optuna"),
        ("space.blend.eta={uniform: [1, 2]}", "space.blend.eta", "None", "{'uniform': [1, 2]}"),
        ("space.model.image.concat_depth={choice: [0, 1]}", "space.model.image.concat_depth",
         "{'choice': [0, 1, 'full']}", "{'choice': [0, 1]}"),
    ],
)  # fmt: skip
def test_another_search_does_not_go_on_there(override: str, key: str, was: str, now: str, folder: Path) -> None:
    _keep_search(search_of(), folder, resume=False)
    before = (folder / SEARCH_NAME).read_text()
    with pytest.raises(InputError) as caught:
        _keep_search(search_of(SEARCH, override), folder, resume=True)
    assert str(caught.value) == (
        f"{folder / SEARCH_NAME}: {key} was {was} and is now {now}; its trials would not be comparable; start another "
        "search, under another name"
    )
    assert (folder / SEARCH_NAME).read_text() == before


@pytest.mark.parametrize("text", [PBT, GRID])
def test_points_that_are_spread_over_as_many_as_there_are_cannot_become_more(text: str, folder: Path) -> None:
    _keep_search(search_of(text), folder, resume=False)
    _keep_search(search_of(text, "trials.at_once=1"), folder, resume=True)
    with pytest.raises(InputError, match=r"trials\.count was \d and is now"):
        _keep_search(search_of(text, f"trials.count={2 if text is PBT else 3}"), folder, resume=True)


def test_a_base_that_was_edited_meanwhile_is_refused(folder: Path) -> None:
    """The overrides of the search file are the same, and what they are laid over is not."""
    _keep_search(search_of(), folder, resume=False)
    base = Path("base.yaml")
    base.write_text(base.read_text().replace("seed: 0", "seed: 7"))
    with pytest.raises(InputError, match=r"base\.yaml: train\.seed was 0 and is now 7; its trials would not be"):
        _keep_search(search_of(), folder, resume=True)


def test_a_folder_of_something_else_is_no_search_to_go_on_with(folder: Path) -> None:
    with pytest.raises(InputError, match=r"search\.yaml: no such file, so this is no search's folder; start without"):
        _keep_search(search_of(), folder, resume=True)
    assert names_in(folder) == set()


def test_how_many_trials_there_are() -> None:
    assert _planned(search_of()) == 4
    assert _planned(search_of(GRID)) == 2
    assert _planned(search_of(GRID, "trials.count=null")) == 3
