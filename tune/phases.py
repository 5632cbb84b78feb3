"""What a search trains, in which order: trials, a population, and the confirmation of what they found.

A phase is a `tune.ray_tune.Source`: it is asked for tasks and told what becomes of them. It keeps each trial's record
on disk (`tune.ledger`) and completes its MLflow run. Whatever a phase knows it can read again from disk: made anew over
the same folder, it goes on where the last one was killed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mdnet_dist.config import RunConfig
from mdnet_dist.cost import Cost
from mdnet_dist.errors import InputError
from mdnet_dist.run_folder import alone_in
from mdnet_dist.tracking import Tracker, end_run, run_id_of
from tune.ledger import Ledger, trial_name
from tune.population import Settings, first_points, next_segments
from tune.progress import Display, View
from tune.proposals import Proposals
from tune.records import ENDED, Point, Report, Segment, TrialRecord, best_trial
from tune.search_config import Search
from tune.trial import Task, lock_of

CLOSE_SECONDS = 30.0
"""How long a trial's workers may take to go once Tune has stopped it."""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What all phases of a search share."""

    search: Search
    folder: Path  # of the search
    tracker: Tracker  # of its own MLflow run
    display: Display
    at_once: int  # trials side by side
    steps_per_epoch: Callable[[RunConfig], int]
    cost: Callable[[RunConfig], Cost]
    changed: Callable[[], None]  # called when a trial has ended
    started: float  # time.monotonic() at the start of this session


class Phase:
    """Trials of one folder, and what runs of them."""

    title = "searching"
    whole = False  # whether runs score the test part and export, as launch/train.py does

    def __init__(self, workshop: Workshop, ledger: Ledger, planned: int) -> None:
        """Take up what is on disk. Args: planned: trials in all."""
        self.workshop, self.ledger, self.planned = workshop, ledger, planned
        self.trials = ledger.read()
        self._began: dict[str, float] = {}  # {name: time.monotonic()} of what runs
        self._closing: dict[str, tuple[Literal["FINISHED", "FAILED", "KILLED"], float]] = {}

    # ------------------------------------------------------------------------------------------------- asked by Tune

    def next_task(self) -> Task | Literal["later", "none"]:
        """See `tune.ray_tune.Source`."""
        raise NotImplementedError

    def started(self, name: str) -> None:
        """See `tune.ray_tune.Source`."""
        trial = self._trial(name)
        self._began[name] = time.monotonic()
        trial.status = "running"
        self.ledger.write(trial)

    def reported(self, name: str, report: Report) -> None:
        """See `tune.ray_tune.Source`; a trial that goes on repeats what is known."""
        trial = self._trial(name)
        if not trial.reports or report.step > trial.reports[-1].step:
            here = time.monotonic() - self._began.get(name, time.monotonic())  # Tune knows of this stretch alone
            trial.reports.append(replace(report, seconds=round(trial.seconds + here, 3)))

    def ended(self, name: str, status: Literal["finished", "stopped", "failed"], reason: str) -> None:
        """See `tune.ray_tune.Source`."""
        trial = self._trial(name)
        self._spent(trial)
        trial.status, trial.reason = status, reason
        self.ledger.write(trial)
        results: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {"finished": "FINISHED", "failed": "FAILED"}
        self._closing[name] = results.get(status, "KILLED"), time.monotonic() + CLOSE_SECONDS
        self._log_state()
        self.workshop.changed()

    def tick(self) -> None:
        """See `tune.ray_tune.Source`."""
        self._close_runs()
        self.show()

    def wants_to_stop(self) -> bool:
        """Whether too many trials have failed."""
        failed = sum(trial.status == "failed" for trial in self.trials)
        return failed > self.workshop.search.config.trials.max_failed_share * self.planned

    # -------------------------------------------------------------------------------------------------------- between

    def close(self) -> None:
        """Wait until the workers of all trials are gone, and complete their MLflow runs.

        What still runs was stopped from outside, and will go on in another session.
        """
        for name in list(self._began):
            trial = self._trial(name)
            self._spent(trial)
            self.ledger.write(trial)
            self._closing[name] = "KILLED", time.monotonic() + CLOSE_SECONDS
        while self._closing:
            self._close_runs()
            if self._closing:
                time.sleep(0.1)

    def show(self) -> None:
        """Show how far it is."""
        search, workshop = self.workshop.search.config, self.workshop
        view = View(
            name=workshop.folder.name,
            metric=search.metric,
            mode=search.mode,
            trials=self.trials,
            planned=self.planned,
            epochs=self._epochs(),
            elapsed_seconds=time.monotonic() - workshop.started,
            at_once=workshop.at_once,
            phase=self.title,
        )
        workshop.display.show(view)

    def _epochs(self) -> int:
        return self.workshop.search.short_base.train.epochs

    def _trial(self, name: str) -> TrialRecord:
        return next(trial for trial in self.trials if trial.name == name)

    def _runs(self, trial: TrialRecord) -> bool:
        return trial.name in self._began

    def _unfinished(self) -> list[TrialRecord]:
        """Trials that wait to be started, or started again."""
        return [trial for trial in self.trials if trial.status not in ENDED and not self._runs(trial)]

    def _values(self, name: str, config: RunConfig) -> dict[str, Any]:
        """The configuration of a trial's run, nested, in its folder."""
        return config.model_dump(mode="json") | {"name": name, "runs_folder": str(self.ledger.folder)}

    def _spent(self, trial: TrialRecord) -> None:
        trial.seconds = round(trial.seconds + time.monotonic() - self._began.pop(trial.name, time.monotonic()), 1)

    def _add(self, number: int, name: str, point: Point, config: RunConfig) -> TrialRecord:
        """Make a trial's record."""
        values, cost = self._values(name, config), self.workshop.cost(config)
        trial = TrialRecord(
            number=number, name=name, point=point, config=values, weights=cost.weights, flops=cost.flops
        )
        self.ledger.write(trial)
        self.trials.append(trial)
        return trial

    def _task(self, trial: TrialRecord, last_step: int | None = None) -> Task:
        trials = self.workshop.search.config.trials
        return Task(
            name=trial.name,
            config=trial.config,
            log=str(self.ledger.log(trial)),
            parent_run_id=self.workshop.tracker.run_id,
            workers=trials.workers,
            cpus_per_worker=trials.cpus_per_worker,
            gpus_per_worker=trials.gpus_per_worker,
            restarts=trials.restarts,
            last_step=last_step,
            whole=self.whole,
        )

    def _close_runs(self) -> None:
        """Complete the MLflow runs of trials whose workers have gone: two writers would write points twice."""
        for name, (status, deadline) in list(self._closing.items()):
            trial = self._trial(name)
            if not self._is_gone(trial) and time.monotonic() < deadline:
                continue
            del self._closing[name]
            metric, mode = self.workshop.search.config.metric, self.workshop.search.config.mode
            score = trial.score(metric, mode)
            tags = {
                "search": self.workshop.folder.name,
                "search.trial": str(trial.number),
                "search.status": trial.status,
                "search.reason": trial.reason or "trained to its end",
                "search.score": "" if score is None else f"{score:.6g}",
            }
            if trial.status == "running":
                tags["search.status"], tags["search.reason"] = "interrupted", "the search was stopped; --resume goes on"
            end_run(self.ledger.run_folder(trial), status, tags)
            trial.run_id = run_id_of(self.ledger.run_folder(trial)) or ""
            self.ledger.write(trial)

    def _is_gone(self, trial: TrialRecord) -> bool:
        with contextlib.suppress(InputError), alone_in(lock_of(self.ledger.folder, trial.name), "a worker"):
            return True
        return False

    def _log_state(self) -> None:
        """How far the search is, into its own MLflow run."""
        config = self.workshop.search.config
        ended = {status: sum(trial.status == status for trial in self.trials) for status in ENDED}
        best = best_trial(self.trials, config.metric, config.mode)
        metrics = {f"{self.title}/{status}": float(count) for status, count in ended.items()}
        if best is not None:
            metrics[f"{self.title}/best"] = best.score(config.metric, config.mode) or 0.0
        self.workshop.tracker.log_metrics(metrics, sum(ended.values()))


class TrialsPhase(Phase):
    """Independent trials, as the searcher proposes them."""

    def __init__(self, workshop: Workshop, ledger: Ledger, planned: int, proposals: Proposals) -> None:
        super().__init__(workshop, ledger, planned)
        self._proposals = proposals
        for trial in self.trials:
            if trial.status in ENDED:
                self._tell(trial)

    def next_task(self) -> Task | Literal["later", "none"]:
        """Trials of an earlier session first, then new ones."""
        if waiting := self._unfinished():
            return self._task(waiting[0])
        number = len(self.trials) + 1
        point = self._proposals.ask(number) if number <= self.planned else None
        if point is None:
            return "none"
        search = self.workshop.search
        choices = [name for name, parameter in search.space.parameters().items() if parameter.kind == "choice"]
        name = trial_name(number, point, choices)
        return self._task(self._add(number, name, point, search.run_config(point, short=True)))

    def ended(self, name: str, status: Literal["finished", "stopped", "failed"], reason: str) -> None:
        """Let the searcher learn from it."""
        super().ended(name, status, reason)
        self._tell(self._trial(name))

    def _tell(self, trial: TrialRecord) -> None:
        config = self.workshop.search.config
        self._proposals.tell(trial.number, trial.point, trial.score(config.metric, config.mode))


class PopulationPhase(Phase):
    """Population based training: all members train a stretch, then the worst go on from copies of the best.

    Tune's own scheduler for it moves checkpoints that trials hand to Tune, which workers of Ray Train do not; and what
    it decides lives in its memory. Here a stretch is a task, and what follows from a generation's scores is a pure
    function (`tune.population`), so that a search killed between two generations decides the same again.
    """

    title = "population"

    def __init__(self, workshop: Workshop, ledger: Ledger, planned: int, settings: Settings, every_epochs: int) -> None:
        """Make the first generation, where there is none yet."""
        super().__init__(workshop, ledger, planned)
        self._settings = settings
        search = workshop.search
        steps = workshop.steps_per_epoch(search.short_base)
        self.total_steps = search.short_base.train.epochs * steps
        starts = list(range(0, self.total_steps, every_epochs * steps))
        self._bounds = list(zip(starts, [*starts[1:], self.total_steps]))  # of each generation, in steps
        for number, point in enumerate(first_points(settings, planned), start=1):
            if number > len(self.trials):
                self._add(number, f"member-{number:02d}", point, search.run_config(point, short=True))
            if not self.trials[number - 1].segments:  # the search may have been killed in between
                self._begin(self.trials[number - 1], 0, None, point)

    def next_task(self) -> Task | Literal["later", "none"]:
        """A stretch of this generation; the next generation when all have done theirs."""
        while True:
            members = [trial for trial in self.trials if trial.status != "failed"]
            if not members:
                return "none"
            generation = min(len(trial.segments) for trial in members) - 1
            here = [trial for trial in members if len(trial.segments) - 1 == generation]
            open_ones = [trial for trial in here if not self._has_done(trial, generation)]
            waiting = [trial for trial in open_ones if not self._runs(trial)]
            if waiting:
                return self._task(waiting[0], waiting[0].segments[-1].last_step)
            if open_ones or any(map(self._runs, members)):
                return "later"
            if generation == len(self._bounds) - 1:
                return "none"
            self._next_generation(members, generation)

    def ended(self, name: str, status: Literal["finished", "stopped", "failed"], reason: str) -> None:
        """A member whose stretch is done waits for the next one."""
        trial = self._trial(name)
        if status != "finished" or len(trial.segments) == len(self._bounds):
            super().ended(name, status, reason)
            return
        self._spent(trial)
        trial.status = "waiting"
        self.ledger.write(trial)

    def _has_done(self, trial: TrialRecord, generation: int) -> bool:
        """Whether its worker has also come to its end: one that was killed may lack the checkpoint of its last report.

        Started again, it finds that out.
        """
        last_step = trial.segments[generation].last_step
        return trial.status != "running" and any(report.step >= last_step for report in trial.reports)

    def _next_generation(self, members: Sequence[TrialRecord], generation: int) -> None:
        """Decide, copy weights, and only then write down what each member does next.

        Killed in between, the same is decided and copied again: those that are copied from change nothing.
        """
        config = self.workshop.search.config
        old = [trial for trial in members if len(trial.segments) - 1 == generation]
        scores = [trial.reports[-1].metrics.get(config.metric) for trial in members]  # of the weights as they are
        points = [trial.segments[generation].point for trial in members]
        nexts = next_segments(self._settings, generation + 1, scores, points, config.mode)
        step = self._bounds[generation][1]
        for trial, (parent, point) in zip(members, nexts):
            if trial not in old:
                continue  # its record was written before the search was killed
            if parent is not None:
                self.ledger.copy_weights(members[parent], trial, step)
                said = ", ".join(f"{name.removeprefix('blend.')} {value:.3g}" for name, value in point.items())
                self.workshop.display.say(f"{trial.name} goes on from {members[parent].name} with {said}")
        for trial, (parent, point) in zip(members, nexts):
            if trial in old:
                self._begin(trial, generation + 1, members[parent].name if parent is not None else None, point)

    def _begin(self, trial: TrialRecord, generation: int, parent: str | None, point: Point) -> None:
        first, last = self._bounds[generation]
        trial.segments.append(Segment(number=generation, parent=parent, point=point, first_step=first, last_step=last))
        trial.point = point
        trial.config = self._values(trial.name, self.workshop.search.run_config(point, short=True))
        self.ledger.write(trial)


class ConfirmPhase(Phase):
    """The best configuration and the one that the search began from, trained whole with some seeds, and tested."""

    title = "confirming"
    whole = True

    def __init__(self, workshop: Workshop, ledger: Ledger, configs: Mapping[str, RunConfig]) -> None:
        """Args: configs: {name of the run: its configuration}."""
        super().__init__(workshop, ledger, len(configs))
        known = {trial.name for trial in self.trials}
        for number, (name, config) in enumerate(configs.items(), start=1):
            if name not in known:
                self._add(number, name, {}, config)

    def next_task(self) -> Task | Literal["later", "none"]:
        """In the order in which they were given."""
        waiting = self._unfinished()
        return self._task(waiting[0]) if waiting else "none"

    def _epochs(self) -> int:
        return self.workshop.search.base.train.epochs
