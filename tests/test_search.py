"""`launch/tune_beta.py` from the command to its results: searches that end well, that fail, and that never start."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mdnet_dist.config_file import load_config
from mdnet_dist.run_folder import METRICS
from tests.searches import METRIC, TIMEOUT_SECONDS, assert_nothing_is_left, mlflow_runs, run, trials_in, write_search
from tune.population import lineage

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A search file over a tiny set."""
    return write_search(tmp_path)


@pytest.mark.slow
def test_two_trials_of_two_workers_each(search: Path, tmp_path: Path) -> None:
    """And none reads test data: there is only rubbish where it should be."""
    next((tmp_path / "shards").glob("test-*.tar")).write_bytes(b"rubbish")
    code, out, err = run(search, "trials.workers=2", "trials.restarts=0", environment={"MARK": str(tmp_path)})
    assert (code, err) == (0, ""), err + out
    trials = trials_in(search)
    assert [trial.status for trial in trials] == ["finished", "finished"]
    assert all([report.epoch for report in trial.reports] == [1, 2] for trial in trials)

    folder = tmp_path / "runs" / "small"
    best = min(trials, key=lambda trial: trial.score(METRIC, "min") or 0)
    config = load_config(folder / "best.yaml")
    assert config.model.image.concat_depth == best.point["model.image.concat_depth"]
    assert config.blend.beta.kind == best.point["blend.beta"]
    assert config.train.epochs == 1, "best.yaml is as long as the base, not as the trials"
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished", "finished"]
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert {"parameters.png", "beta_schedules.png", "parallel_coordinates.png", "concat_depth.png"} <= pictures

    runs = mlflow_runs(search)
    parent = runs.pop("small")
    assert set(runs) == {trial.name for trial in trials}
    assert parent.data.tags["mlflow.note.content"] == (folder / "summary.md").read_text()
    assert best.name in parent.data.tags["mlflow.note.content"]
    for one in runs.values():
        assert one.info.status == "FINISHED"
        assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert one.data.tags["world_size"] == "2"
        assert one.data.tags["search.status"] == "finished"
        assert "test/dca" not in one.data.metrics
    assert f"best   deepspeed launch/train.py {folder / 'best.yaml'}" in out
    assert_nothing_is_left(search)


@pytest.mark.slow
def test_a_failing_trial_is_marked_and_the_search_goes_on(search: Path) -> None:
    """One option makes the loss infinite; with more such trials than the allowed share the search ends with 3."""
    options = (
        "trials.count=4",
        "searcher={kind: grid}",
        "space={optimizer.image.lr: {choice: [0.01, 1.0e+38]}, model.image.concat_depth: {choice: [0, 1]}}",
        "train.max_bad_steps=1",
    )
    code, out, err = run(search, *options)
    assert (code, err) == (0, ""), err + out
    trials = trials_in(search)
    assert [trial.status for trial in trials] == ["finished", "finished", "failed", "failed"]
    assert all("not finite" in trial.reason for trial in trials[2:])
    runs = mlflow_runs(search)
    for trial in trials[2:]:
        assert runs[trial.name].info.status == "FAILED"
        assert runs[trial.name].data.tags["search.reason"] == trial.reason
    assert "failed" in (search.parent / "runs" / "small" / "summary.md").read_text()

    (search.parent / "err.txt").unlink()
    code, out, err = run(search, *options, "trials.max_failed_share=0.4", "--resume")
    assert code == 3
    assert err.startswith("tune_beta.py: 2 of 4 trials failed, more than trials.max_failed_share 0.4 allows"), err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_population_finds_a_schedule_that_trains_alone(search: Path, tmp_path: Path) -> None:
    options = (
        "name=population",
        "trials={count: 3, overrides: [train.epochs=2]}",
        "scheduler={kind: pbt, every_epochs: 1}",
        "space={blend.beta.value: {uniform: [0.05, 0.95]}, blend.eta: {log_uniform: [0.3, 30]}}",
    )
    code, out, err = run(search, *options)
    assert (code, err) == (0, ""), err + out
    members = {trial.name: trial for trial in trials_in(search, "population")}
    assert [len(member.segments) for member in members.values()] == [2, 2, 2]
    copies = [member for member in members.values() if member.segments[1].parent]
    assert len(copies) == 1
    assert f"{copies[0].name} goes on from {copies[0].segments[1].parent}" in out
    assert all([report.epoch for report in member.reports] == [1, 2] for member in members.values())

    folder = tmp_path / "runs" / "population"
    best = load_config(folder / "best.yaml")
    winner = min(members.values(), key=lambda member: member.reports[-1].metrics[METRIC])
    stretches = lineage(members, winner.name)
    assert best.blend.beta.kind in ("constant", "piecewise")
    value = best.blend.beta.value if best.blend.beta.kind == "constant" else best.blend.beta.knots[0][1]
    assert value == pytest.approx(stretches[0].beta)
    confirmed = trials_in(search, "population", "confirm")
    assert [(trial.name, trial.status) for trial in confirmed] == [
        ("best-seed-0", "finished"),
        ("base-seed-0", "finished"),
    ]
    assert (folder / "confirm" / "best-seed-0" / METRICS).exists()
    assert (folder / "pictures" / "population.png").exists()
    assert set(mlflow_runs(search)) == {"population", *members, "best-seed-0", "base-seed-0"}


def test_wrong_files_end_with_one_line_before_anything_starts(search: Path, tmp_path: Path) -> None:
    text = search.read_text()
    wrong = {
        "metric: val/": ("metrc: val/", "search.yaml line 10: metrc: unknown key; did you mean 'metric'?"),
        "kind: linear": ("kind: lineal", "lineal"),
        "[0, 1]}": ("[0, 9]}", "concat_depth 9 exceeds"),
        "{uniform: [0.05, 0.95]}": ("{unifrom: [0.05, 0.95]}", "uniform"),
    }
    for old, (new, message) in wrong.items():
        search.write_text(text.replace(old, new, 1))
        for name in ("out.txt", "err.txt"):
            (tmp_path / name).unlink(missing_ok=True)
        code, out, err = run(search)
        assert (code, out) == (2, "")
        assert message in err and err.startswith(f"tune_beta.py: {search}") and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()
