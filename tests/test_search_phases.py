"""What a search trains in which order, whatever dies when: phases, told by a Tune made up here.

The Tune of this file trains nothing: a trial writes the metrics.jsonl and the checkpoints that a run writes, a line
and a step at a time. Its weights are one number that holds all that they were trained with. `Fuse` kills the search and
its trials before any of these writes.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tune.ledger
from mdnet_dist import mlflow_store, tracking, tracking_files
from mdnet_dist.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mdnet_dist.config import TrackingConfig
from mdnet_dist.config_file import as_yaml
from mdnet_dist.cost import Cost
from mdnet_dist.run_folder import alone_in
from tests.saved import progress_at
from tests.tiny import tiny_config
from tune import phases
from tune.ledger import Ledger, reports_of
from tune.phases import ConfirmPhase, Phase, PopulationPhase, TrialsPhase, Workshop
from tune.population import BETA
from tune.progress import Display
from tune.proposals import RandomProposals
from tune.records import ENDED, Point, Report, TrialRecord
from tune.search_config import PbtScheduler, Search, load_search
from tune.trial import Task, lock_of

STEPS = 3  # of an epoch
SEARCH = """\
name: s
base: base.yaml
overrides: [train.epochs=8]
space:
  blend.beta:
    choice:
      - {kind: constant, value: {uniform: [0.05, 0.95]}}
      - {kind: linear, start: {uniform: [0, 1]}, end: {uniform: [0, 1]}}
trials: {count: 4, workers: 2, overrides: [train.epochs=4, evaluate.every_epochs=2]}
scheduler: {kind: none}
"""
PBT = """\
name: p
base: base.yaml
space: {blend.beta.value: {uniform: [0.05, 0.95]}}
trials: {count: 4, overrides: [train.epochs=6, evaluate.every_epochs=1]}
scheduler: {kind: pbt, every_epochs: 2}
"""


class Killed(BaseException):
    """The search, and all that it had started, is dead."""


class Fuse:
    """Kills after so many writes; None: never."""

    def __init__(self) -> None:
        self.left: int | None = None

    def __call__(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1


@pytest.fixture(scope="module")
def fuse() -> Iterator[Fuse]:
    """Reaches into every write of the phases; nothing is synchronised to disk meanwhile."""
    fuse = Fuse()

    def fused(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            fuse()
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune.ledger, "write_atomically", fused(tune.ledger.write_atomically))
        patch.setattr(tune.ledger, "copy_checkpoint", fused(tune.ledger.copy_checkpoint))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield fuse


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Search]:
    """The two searches, read once."""
    folder = tmp_path_factory.mktemp("searches")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("base.yaml").write_text(as_yaml(tiny_config(folder / "set", folder / "runs")))
        found = {}
        for name, text in (("trials", SEARCH), ("population", PBT)):
            Path(f"{name}.yaml").write_text(text)
            found[name] = load_search(f"{name}.yaml")
    return found


@dataclass
class Log:
    """In place of a tracker."""

    run_id: str = "parent"
    metrics: list[tuple[dict[str, float], int]] = field(default_factory=list)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((metrics, step))


def workshop_of(search: Search, folder: Path, tracker: Any = None, changed: Callable[[], None] = bool) -> Workshop:
    return Workshop(
        search=search,
        folder=folder,
        tracker=tracker or Log(),
        display=Display(io.StringIO(), terminal=False),
        at_once=2,
        steps_per_epoch=lambda config: STEPS,
        cost=lambda config: Cost(parameters={"image": 10, "head": 5}, flops=100),
        changed=changed,
        started=time.monotonic(),
    )


# ------------------------------------------------------------------------------------------------------------ fake Tune


class Fails(Exception):
    """A trial's own failure."""


@dataclass
class Tune:
    """Asks a phase and runs what it gives, one validation of a trial after another."""

    fuse: Fuse
    at_once: int = 2
    failing: frozenset[str] = frozenset()  # trials that fail after their first validation of a task
    stopped: frozenset[str] = frozenset()  # trials that the scheduler stops after theirs
    asked: list[Task] = field(default_factory=list)
    phase: Phase | None = None

    def run(self, phase: Phase) -> None:
        """To the end, or until the fuse kills it."""
        self.phase = phase
        running: dict[str, Iterator[Report]] = {}
        while not phase.wants_to_stop():
            while len(running) < self.at_once and isinstance(task := phase.next_task(), Task):
                assert task.name not in running, "asked for while it runs"
                self.asked.append(task)
                phase.started(task.name)
                running[task.name] = train(task, self.fuse)
            if not running:
                assert phase.next_task() == "none", "it waits for nothing"
                break
            for name, reports in list(running.items()):
                outcome = self._step(phase, name, reports)
                if outcome:
                    del running[name]
                    phase.ended(name, *outcome)
            phase.tick()

    def _step(
        self, phase: Phase, name: str, reports: Iterator[Report]
    ) -> tuple[Literal["finished", "stopped", "failed"], str] | None:
        report = next(reports, None)
        if report is None:
            return "finished", ""
        phase.reported(name, report)
        if name in self.failing:
            return "failed", "out of memory"
        return ("stopped", "by the scheduler") if name in self.stopped else None


def score_of(name: str, beta: float, step: int) -> float:
    """Depends on all that the search decides, and is hardly ever the same twice."""
    return (sum(map(ord, name)) * 37 + beta * 1009 + step * 11) % 1


def train(task: Task, fuse: Fuse) -> Iterator[Report]:
    """What a run leaves behind, from its last checkpoint on; what it had reported up to there is repeated."""
    folder = Path(task.config["runs_folder"]) / task.name
    folder.mkdir(parents=True, exist_ok=True)
    found = checkpoints(folder)
    progress, weights = (None, 0.0)
    if found:
        progress, tensors, _ = load_checkpoint(found[-1])
        weights = float(tensors["w"])
    first = progress.step if progress else 0
    path = folder / "metrics.jsonl"
    kept = [entry for entry in tracking_files.read_metrics(path) if entry["step"] <= first]
    path.write_text("".join(map(tracking_files.as_line, kept)))
    repeated = reports_of(folder)
    yield from repeated
    if repeated and task.last_step is not None and repeated[-1].step >= task.last_step:
        return
    every = task.config["evaluate"]["every_epochs"]
    beta = task.config["blend"]["beta"].get("value", 0.5)
    for epoch in range(first // STEPS + 1, task.config["train"]["epochs"] + 1):
        step = epoch * STEPS
        weights = weights / 2 + beta
        if epoch % every:
            continue
        metrics = {"val/score": score_of(task.name, beta, step), "progress/epoch": float(epoch)}
        fuse()
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "time": 1e9 + step, "metrics": metrics}) + "\n")
        fuse()
        done = progress_at(step)
        save_checkpoint(folder, done, {"w": torch.tensor(weights, dtype=torch.float64)}, {})
        yield reports_of(folder)[-1]
        if step == task.last_step:
            return


def killed_often(fuse: Fuse, kills: list[int], new_phase: Callable[[], Phase], **options: Any) -> list[Tune]:
    """Run phases over one folder, each killed after so many writes, the last one to its end; a Tune for each."""
    tunes: list[Tune] = []
    for left in [*kills, None]:
        fuse.left = left
        tunes.append(Tune(fuse, **options))
        try:
            tunes[-1].run(new_phase())
        except Killed:
            continue
        finally:
            fuse.left = None
        break
    return tunes


# --------------------------------------------------------------------------------------------------------------- trials


def timeless(trial: TrialRecord) -> TrialRecord:
    """All that is known of a trial but what the clock said."""
    return replace(trial, reports=[replace(report, seconds=0.0) for report in trial.reports])


def trials_phase(search: Search, folder: Path, **options: Any) -> TrialsPhase:
    return TrialsPhase(
        workshop_of(search, folder, **options), Ledger(folder / "trials"), 4, RandomProposals(search.space, 0)
    )


def test_trials_are_asked_for_in_order_and_know_all_they_need(fuse: Fuse, searches: Any, tmp_path: Path) -> None:
    search, changes = searches["trials"], []
    phase = trials_phase(search, tmp_path, tracker=(log := Log()), changed=lambda: changes.append(1))
    tune_ = Tune(fuse, stopped=frozenset())
    tune_.run(phase)
    proposals = RandomProposals(search.space, 0)
    assert [trial.number for trial in phase.trials] == [1, 2, 3, 4]
    for trial, task in zip(phase.trials, tune_.asked, strict=True):
        point = proposals.ask(trial.number)
        assert (trial.point, trial.name) == (point, f"{trial.number:03d}-{point['blend.beta']}")  # type: ignore[index]
        assert (trial.status, trial.reason, trial.weights, trial.flops) == ("finished", "", 15, 100)
        assert [report.epoch for report in trial.reports] == [2, 4]
        folder = str(tmp_path / "trials")
        config = search.run_config(trial.point, short=True).model_dump(mode="json")
        assert task == Task(
            name=trial.name,
            config=config | {"name": trial.name, "runs_folder": folder},
            log=f"{folder}/{trial.name}.log",
            parent_run_id="parent",
            workers=2,
            cpus_per_worker=1,
            gpus_per_worker=0.0,
            restarts=2,
        )
        assert task.config["train"]["epochs"] == 4
    assert len(changes) == 4
    best = max(trial.score("val/score", "max") for trial in phase.trials)  # type: ignore[type-var]
    metrics, step = log.metrics[-1]
    assert (metrics, step) == (
        {"searching/finished": 4, "searching/stopped": 0, "searching/failed": 0, "searching/best": best},
        4,
    )
    on_disk = Ledger(tmp_path / "trials").read()
    assert [timeless(trial) for trial in on_disk] == [timeless(trial) for trial in phase.trials]


@settings(max_examples=25, deadline=None)
@given(kills=st.lists(st.integers(0, 12), max_size=4), at_once=st.integers(1, 4))
def test_a_killed_search_asks_for_what_it_lacks_and_for_nothing_else(
    kills: list[int],
    at_once: int,
    fuse: Fuse,
    searches: dict[str, Search],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, search = tmp_path_factory.mktemp("killed"), searches["trials"]
    known: list[TrialRecord] = []

    def new_phase() -> TrialsPhase:
        phase = trials_phase(search, folder)
        known[:] = Ledger(folder / "trials").read()
        sessions.append([(trial.name, trial.status, trial.config) for trial in known])
        return phase

    sessions: list[list[tuple[str, str, dict[str, Any]]]] = []
    tunes = killed_often(fuse, kills, new_phase, at_once=at_once)
    for before, tune_ in zip(sessions, tunes, strict=True):
        lacking = [(name, config) for name, status, config in before if status not in ENDED]
        asked = [(task.name, task.config) for task in tune_.asked]
        assert asked[: len(lacking)] == lacking[: len(asked)], "those of the earlier session first, as they were drawn"
        assert len({name for name, _ in asked}) == len(asked)
        assert not {name for name, status, _ in before if status in ENDED} & {name for name, _ in asked}
    assert tunes[-1].phase is not None
    trials = tunes[-1].phase.trials
    assert [(trial.number, trial.point) for trial in trials] == [
        (number, RandomProposals(search.space, 0).ask(number)) for number in (1, 2, 3, 4)
    ]
    assert all(trial.status == "finished" and [r.epoch for r in trial.reports] == [2, 4] for trial in trials)


def test_a_searcher_learns_also_of_what_ended_before_a_break(fuse: Fuse, searches: Any, tmp_path: Path) -> None:
    search = searches["trials"]

    class Notes:
        def __init__(self) -> None:
            self.told: list[tuple[int, Point, float | None]] = []

        def ask(self, number: int) -> Point | None:
            return RandomProposals(search.space, 0).ask(number) if number <= 3 else None

        def tell(self, number: int, point: Point, score: float | None) -> None:
            self.told.append((number, point, score))

    def new_phase(notes: Notes) -> TrialsPhase:
        return TrialsPhase(workshop_of(search, tmp_path), Ledger(tmp_path / "trials"), 9, notes)

    names = [f"{n:03d}-{RandomProposals(search.space, 0).ask(n)['blend.beta']}" for n in (1, 2, 3)]  # type: ignore[index]
    first = Notes()
    phase = new_phase(first)
    Tune(fuse, at_once=1, failing=frozenset(names[:1]), stopped=frozenset(names[1:2])).run(phase)
    assert [trial.status for trial in phase.trials] == ["failed", "stopped", "finished"], "the searcher had no more"
    assert [(number, score) for number, _, score in first.told] == [
        (trial.number, trial.score("val/score", "max")) for trial in phase.trials
    ]
    assert first.told[0][2] is None and first.told[1][2] is not None
    again = Notes()
    assert new_phase(again).next_task() == "none"
    assert again.told == first.told


@pytest.mark.parametrize(("failing", "asked"), [(2, 4), (3, 3), (4, 3)])
def test_more_failures_than_their_share_stop_the_search(
    failing: int, asked: int, fuse: Fuse, searches: Any, tmp_path: Path
) -> None:
    """Half of four may fail."""
    search = searches["trials"]
    names = [f"{n:03d}-{RandomProposals(search.space, 0).ask(n)['blend.beta']}" for n in (1, 2, 3, 4)]  # type: ignore[index]
    phase, tune_ = trials_phase(search, tmp_path), Tune(fuse, at_once=1, failing=frozenset(names[:failing]))
    tune_.run(phase)
    assert (len(tune_.asked), phase.wants_to_stop()) == (asked, failing > 2)
    assert [trial.reason for trial in phase.trials if trial.status == "failed"] == ["out of memory"] * min(failing, 3)
    assert trials_phase(search, tmp_path).wants_to_stop() == (failing > 2), "also after a break"


def test_repeated_reports_are_known_already(searches: Any, tmp_path: Path) -> None:
    phase = trials_phase(searches["trials"], tmp_path)
    task = phase.next_task()
    assert isinstance(task, Task)
    phase.started(task.name)
    reports = [Report(epoch=e, step=3 * e, seconds=1.0, metrics={"val/score": e / 10}) for e in (2, 4)]
    for report in (reports[0], reports[0], reports[1], reports[0], reports[1]):
        phase.reported(task.name, report)
    assert [(report.epoch, report.step, report.metrics) for report in phase.trials[0].reports] == [
        (report.epoch, report.step, report.metrics) for report in reports
    ]


def test_time_adds_up_over_sessions(searches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: clock[0])
    name = ""
    for seconds, ends in ((7.0, False), (5.5, True)):
        phase = trials_phase(searches["trials"], tmp_path)
        task = phase.next_task()
        assert isinstance(task, Task)
        name = name or task.name
        assert task.name == name
        phase.started(name)
        clock[0] += seconds
        if ends:
            phase.reported(name, Report(epoch=2, step=6, seconds=5.5, metrics={"val/score": 0.5}))
            assert phase.trials[0].reports[-1].seconds == 12.5, "Tune knows of the last session alone"
            phase.ended(name, "finished", "")
        phase.close()
    assert [(t.name, t.status, t.seconds) for t in Ledger(tmp_path / "trials").read()] == [(name, "finished", 12.5)]


# ---------------------------------------------------------------------------------------------------------- MLflow runs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = mlflow_store.sqlite_uri(tmp_path_factory.mktemp("store") / "mlflow.db")
    mlflow_store.prepare_store(uri)
    return uri


def test_runs_are_completed_with_why_they_ended(
    store: str, fuse: Fuse, searches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trials whose workers were killed: nothing but the folder knows what the store lacks."""
    search, folder = searches["trials"], tmp_path / "s"
    config = TrackingConfig(uri=store, experiment="phases")
    parent = tracking.open_parent(config, folder, {}, {})
    phase = trials_phase(search, folder, tracker=parent)
    ends: dict[str, Any] = {}
    for ending in ("finished", "stopped", "failed", None):
        task = phase.next_task()
        assert isinstance(task, Task) and task.parent_run_id == parent.run_id
        phase.started(task.name)
        run = folder / "trials" / task.name
        child = tracking.open_tracker(config, run, task.name, {}, {}, parent_run_id=task.parent_run_id)
        child.log_metrics({"val/score": 0.25, "progress/epoch": 2.0}, 6)
        child.close("FINISHED")
        mlflow_store.connect(store).update_run(child.run_id, status="RUNNING")  # as a killed worker leaves it
        with open(run / "metrics.jsonl", "a") as file:
            file.write(
                tracking_files.as_line({"step": 12, "time": 1e9, "metrics": {"val/score": 0.5, "progress/epoch": 4}})
            )
        for report in reports_of(run):
            phase.reported(task.name, report)
        ends[task.name] = ending
        if ending:
            phase.ended(task.name, ending, {"failed": "out of memory", "stopped": "behind"}.get(ending, ""))
            phase.tick()
    phase.close()
    parent.close("KILLED")
    client = mlflow_store.connect(store)
    expected = {
        "finished": ("FINISHED", "finished", "trained to its end", "0.5"),
        "stopped": ("KILLED", "stopped", "behind", "0.5"),
        "failed": ("FAILED", "failed", "out of memory", ""),
        None: ("KILLED", "interrupted", "the search was stopped; --resume goes on", "0.5"),
    }
    for trial in Ledger(folder / "trials").read():
        found = client.get_run(trial.run_id)
        tags = found.data.tags
        status, *texts = expected[ends[trial.name]]
        assert found.info.status == status
        assert [tags[f"search.{name}"] for name in ("status", "reason", "score")] == texts
        assert (tags["search"], tags["search.trial"]) == ("s", str(trial.number))
        assert tags["mlflow.parentRunId"] == parent.run_id
        points = sorted((p.step, p.value) for p in client.get_metric_history(trial.run_id, "val/score"))
        assert points == [(6, 0.25), (12, 0.5)]
    last = client.get_run(parent.run_id).data.metrics
    assert (last["searching/finished"], last["searching/stopped"], last["searching/failed"]) == (1, 1, 1)


def test_a_run_is_completed_once_its_workers_are_gone(
    searches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    completed: list[str] = []
    monkeypatch.setattr(phases, "end_run", lambda folder, status, tags: completed.append(folder.name))
    phase = trials_phase(searches["trials"], tmp_path)
    names = []
    for _ in range(2):
        task = phase.next_task()
        assert isinstance(task, Task)
        phase.started(task.name)
        names.append(task.name)
    with alone_in(lock_of(tmp_path / "trials", names[0]), "a worker"):
        for name in names:
            phase.ended(name, "stopped", "")
        phase.tick()
        phase.tick()
        assert completed == names[1:], "two writers would write points twice"
        later = time.monotonic() + 2 * phases.CLOSE_SECONDS
        with monkeypatch.context() as patch:
            patch.setattr(phases.time, "monotonic", lambda: later)
            phase.close()
        assert completed == names[::-1], "one that hangs is not waited for for ever"
    phase.tick()
    assert len(completed) == 2


# ----------------------------------------------------------------------------------------------------------- population


def population_phase(search: Search, folder: Path, planned: int = 4) -> PopulationPhase:
    scheduler = search.config.scheduler
    assert isinstance(scheduler, PbtScheduler)
    ledger = Ledger(folder / "trials")
    return PopulationPhase(
        workshop_of(search, folder), ledger, planned, search.population_settings(), scheduler.every_epochs
    )


def weights_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{member: (step, weights) of its checkpoints}."""
    found = {}
    for run in sorted(path for path in (folder / "trials").iterdir() if path.is_dir()):
        loaded = [load_checkpoint(path) for path in checkpoints(run)]
        found[run.name] = [(progress.step, float(tensors["w"])) for progress, tensors, _ in loaded]
    return found


@pytest.fixture(scope="module")
def never_killed(fuse: Fuse, searches: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrialRecord], Any]:
    """The population's records and weights where nothing happens to it."""
    folder = tmp_path_factory.mktemp("never_killed")
    phase = population_phase(searches["population"], folder)
    assert phase.total_steps == 6 * STEPS
    Tune(fuse).run(phase)
    return phase.trials, weights_of(folder)


def test_members_train_stretch_by_stretch_from_the_weights_that_they_copied(never_killed: Any) -> None:
    trials, weights = never_killed
    assert [trial.name for trial in trials] == [f"member-{number:02d}" for number in (1, 2, 3, 4)]
    values: dict[str, float] = dict.fromkeys((trial.name for trial in trials), 0.0)
    copied = 0
    for generation in range(3):
        segments = {trial.name: trial.segments[generation] for trial in trials}
        for segment in segments.values():
            first, last = generation * 2 * STEPS, (generation + 1) * 2 * STEPS
            assert (segment.number, segment.first_step, segment.last_step) == (generation, first, last)
            copied += segment.parent is not None
        before = dict(values)
        for name, segment in segments.items():
            values[name] = before[segment.parent or name]
            for _ in range(2):
                values[name] = values[name] / 2 + segment.point[BETA]
    assert copied == 2, "one of four, twice"
    assert {name: found[-1] for name, found in weights.items()} == {name: (18, value) for name, value in values.items()}
    for trial in trials:
        assert (trial.status, trial.point, len(trial.segments)) == ("finished", trial.segments[-1].point, 3)
        assert trial.config["blend"]["beta"] == {"kind": "constant", "value": trial.point[BETA]}
        assert [report.step for report in trial.reports] == [3, 6, 9, 12, 15, 18]


@settings(max_examples=30, deadline=None)
@given(kills=st.lists(st.integers(0, 40), min_size=1, max_size=4), at_once=st.integers(1, 4))
def test_a_killed_population_decides_and_copies_the_same_again(
    kills: list[int],
    at_once: int,
    fuse: Fuse,
    searches: Any,
    never_killed: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("population")
    killed_often(fuse, kills, lambda: population_phase(searches["population"], folder), at_once=at_once)
    assert_the_same(folder, never_killed)


def test_a_population_killed_before_every_third_write_ends_the_same(
    fuse: Fuse, searches: Any, never_killed: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for left in itertools.count(0, 3):
        folder = tmp_path_factory.mktemp("once")
        tunes = killed_often(fuse, [left], lambda at=folder: population_phase(searches["population"], at))
        assert_the_same(folder, never_killed)
        if len(tunes) == 1:
            break
    assert left > 60, "there are that many writes to be killed before"


def assert_the_same(folder: Path, expected: Any) -> None:
    trials, weights = expected
    found = Ledger(folder / "trials").read()
    for trial, whole in zip(found, trials, strict=True):
        assert (trial.name, trial.status, trial.point) == (whole.name, whole.status, whole.point)
        assert trial.segments == whole.segments
        assert timeless(trial).reports == timeless(whole).reports
    assert weights_of(folder) == weights


def test_a_stretch_is_a_task_of_its_own_and_waits_for_the_others(fuse: Fuse, searches: Any, tmp_path: Path) -> None:
    phase = population_phase(searches["population"], tmp_path)
    first, second = phase.next_task(), None
    assert isinstance(first, Task) and (first.name, first.last_step) == ("member-01", 6)
    phase.started(first.name)
    for number in (2, 3, 4):
        task = phase.next_task()
        assert isinstance(task, Task) and task.name == f"member-{number:02d}"
        phase.started(task.name)
        for report in train(task, fuse):
            phase.reported(task.name, report)
        phase.ended(task.name, "finished", "")
        assert phase.trials[number - 1].status == "waiting"
    assert phase.next_task() == "later", "the first one still trains"
    for report in train(first, fuse):
        phase.reported(first.name, report)
    assert phase.next_task() == "later", "its last report is not its end: the checkpoint may still be written"
    phase.ended(first.name, "finished", "")
    second = phase.next_task()
    assert isinstance(second, Task) and (second.name, second.last_step) == ("member-01", 12)


def test_a_failed_member_stays_failed_and_the_rest_go_on(fuse: Fuse, searches: Any, tmp_path: Path) -> None:
    phase = population_phase(searches["population"], tmp_path)
    Tune(fuse, failing=frozenset({"member-02"})).run(phase)
    assert [trial.status for trial in phase.trials] == ["finished", "failed", "finished", "finished"]
    assert [len(trial.segments) for trial in phase.trials] == [3, 1, 3, 3]
    assert all(s.parent != "member-02" for trial in phase.trials for s in trial.segments)
    tune_ = Tune(fuse)
    tune_.run(population_phase(searches["population"], tmp_path))
    assert tune_.asked == [], "nothing is left to do"


def test_a_population_that_fails_wholly_ends(fuse: Fuse, searches: Any, tmp_path: Path) -> None:
    phase = population_phase(searches["population"], tmp_path)
    Tune(fuse, at_once=4, failing=frozenset(f"member-{n:02d}" for n in (1, 2, 3, 4))).run(phase)
    assert phase.wants_to_stop() and phase.next_task() == "none"


def test_weights_are_judged_as_they_are_now(searches: Any, tmp_path: Path) -> None:
    """A member whose last score is not finite is among the worst, whatever it scored before."""
    phase = population_phase(searches["population"], tmp_path)
    last = {1: 0.2, 2: 0.3, 3: 0.4, 4: float("nan")}
    while isinstance(task := phase.next_task(), Task) and task.last_step == 6:
        phase.started(task.name)
        number = phase._trial(task.name).number
        for step, score in ((3, 0.9 if number == 4 else 0.1), (6, last[number])):
            phase.reported(task.name, Report(epoch=step // 3, step=step, seconds=1.0, metrics={"val/score": score}))
        done = progress_at(6)
        save_checkpoint(phase.ledger.run_folder(phase._trial(task.name)), done, {"w": torch.tensor(1.0 * number)}, {})
        phase.ended(task.name, "finished", "")
    assert [trial.segments[1].parent for trial in phase.trials] == [None, None, None, "member-03"]
    assert weights_of(tmp_path)["member-04"] == [(6, 3.0)]


# --------------------------------------------------------------------------------------------------------- confirmation


def test_confirming_runs_are_whole_and_come_in_their_order(fuse: Fuse, searches: Any, tmp_path: Path) -> None:
    search = searches["trials"]
    configs = {}
    for seed in (1, 0):
        for name in ("best", "base"):
            train_ = search.base.train.model_copy(update={"seed": seed})
            configs[f"{name}-seed-{seed}"] = search.base.model_copy(update={"train": train_})

    def new_phase() -> ConfirmPhase:
        return ConfirmPhase(workshop_of(search, tmp_path), Ledger(tmp_path / "confirm"), configs)

    first = Tune(fuse, at_once=1)
    fuse.left = 4 + 1 + 8 + 3
    with pytest.raises(Killed):
        first.run(new_phase())
    fuse.left = None
    tune_ = Tune(fuse, at_once=1)
    phase = new_phase()
    assert [trial.status for trial in phase.trials] == ["running", "waiting", "waiting", "waiting"]
    tune_.run(phase)
    assert [task.name for task in first.asked + tune_.asked[1:]] == list(configs), "the first one was asked for again"
    for task in tune_.asked:
        assert task.whole and task.last_step is None
        assert (task.config["train"]["seed"], task.config["train"]["epochs"]) == (int(task.name[-1]), 8)
    assert phase.planned == 4 and not phase.wants_to_stop()
    assert new_phase().next_task() == "none"
    phase.show()
