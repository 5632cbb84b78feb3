"""A search from its file to its results: `runs/NAME/`, one MLflow run with a nested one for each trial.

search.yaml             the search, every default and override written out
trials/NAME/, .json, .log    each trial (`tune.ledger`)
confirm/                the same of the runs that confirm the best configuration
best.yaml               a training configuration that launch/train.py takes as it is
trials.csv, summary.md, pictures/    what it came to (`tune.report`)
.ray/                   Ray's own files, which nothing reads again
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mdnet_dist.config import RunConfig
from mdnet_dist.config_file import as_yaml, flatten, load_config, read_yaml
from mdnet_dist.cost import Cost, cost_of
from mdnet_dist.errors import InputError, Preempted, TrainingFailed
from mdnet_dist.mlflow_store import prepare_store, tracking_uri
from mdnet_dist.plan import steps_per_epoch
from mdnet_dist.run_data import open_data
from mdnet_dist.run_folder import alone_in, existing_run_folder, new_run_folder
from mdnet_dist.shards import write_atomically
from mdnet_dist.tracking import RUN_NAME, open_parent, run_tags
from tune.ledger import Ledger
from tune.phases import ConfirmPhase, Phase, PopulationPhase, TrialsPhase, Workshop
from tune.progress import Display
from tune.proposals import proposals_of
from tune.ray_tune import Resources, asha, cluster, replay, run_tasks, side_by_side, signals_noted
from tune.records import ENDED
from tune.report import Outcome, publish
from tune.search_config import AshaScheduler, GridSearcher, PbtScheduler, Search

SEARCH, BASE, TRIALS, CONFIRM, RAY = "search.yaml", "base.yaml", "trials", "confirm", ".ray"
MAY_CHANGE = ("trials.count", "trials.at_once", "trials.restarts", "trials.max_failed_share", "confirm.")
"""What a search that goes on may have another value of."""
FEWEST_SEEDS = 1
"""A population's schedule was lived through by several weights; does it hold up where one trains with it alone?"""


def run_search(search: Search, display: Display, *, resume: bool = False) -> Outcome:
    """Search, confirm, and write down what was found.

    Args:
        resume: go on with the newest search of this name: trials that have ended are not run again.

    Raises:
        InputError: something the user gave is wrong.
        TrainingFailed: too many trials failed, or none has a score.
        Preempted: SIGTERM, SIGUSR1 or SIGHUP asked to stop; `resume` goes on.
        KeyboardInterrupt: SIGINT did.
    """
    with signals_noted() as received:
        return _run_search(search, display, resume, received)


def _run_search(search: Search, display: Display, resume: bool, received: list[int]) -> Outcome:
    data = open_data(search.short_base, with_test=_confirming_seeds(search) > 0)
    if not data.validation:
        raise InputError(
            f"{search.short_base.data.shards}: has no validation part, by which trials are compared; make one"
        )
    folder = (existing_run_folder if resume else new_run_folder)(search.config).absolute()
    with alone_in(folder / ".lock", "a search"):
        _keep_search(search, folder, resume)
        uri = tracking_uri(search.base.tracking)
        prepare_store(uri)
        tags = run_tags(search.config.trials.workers, "gpu" if search.config.trials.gpus_per_worker else "cpu")
        tracker = open_parent(
            search.base.tracking, folder, _parameters(search), tags, resume=(folder / RUN_NAME).exists()
        )
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        outcome = Outcome(search=search, folder=folder, tracker=tracker)
        display.say(f"search    {folder}" + (f"  (log of Ray: {folder / 'ray.log'})"))
        try:
            with (
                open(folder / "ray.log", "a", encoding="utf-8") as log,
                redirect_stdout(log),  # Ray prints what a person cannot use; the display has its own stream
                cluster() as has,
            ):
                resources = Resources(
                    workers=search.config.trials.workers,
                    cpus_per_worker=search.config.trials.cpus_per_worker,
                    gpus_per_worker=search.config.trials.gpus_per_worker,
                )
                workshop = Workshop(
                    search=search,
                    folder=folder,
                    tracker=tracker,
                    display=display,
                    at_once=side_by_side(has, resources, search.config.trials.at_once),
                    steps_per_epoch=lambda config: steps_per_epoch(data.samples, config.train.global_batch),
                    cost=functools.partial(_cost, data.card),
                    changed=lambda: publish(outcome, pictures=False),
                    started=time.monotonic(),
                )

                def run(phase: Phase, scheduler: Any = None) -> None:
                    phase.show()
                    try:
                        run_tasks(
                            phase,
                            folder / RAY,
                            at_once=workshop.at_once,
                            restarts=search.config.trials.restarts,
                            received=received,
                            environment=_environment(search, uri),
                            scheduler=scheduler,
                        )
                    finally:
                        phase.close()
                        phase.show()
                    _heed(received)

                _search(workshop, outcome, run)
                publish(outcome)
                _confirm(workshop, outcome, run)
            status = "FINISHED"
        except (Preempted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            display.close()
            publish(outcome)
            tracker.close(status)
    return outcome


def _search(workshop: Workshop, outcome: Outcome, run: Callable[..., None]) -> None:
    search, config = workshop.search, workshop.search.config
    ledger = Ledger(workshop.folder / TRIALS)
    planned = _planned(search)
    scheduler: Any = None
    phase: Phase
    if isinstance(config.scheduler, PbtScheduler):
        phase = PopulationPhase(workshop, ledger, planned, search.population_settings(), config.scheduler.every_epochs)
        outcome.total_steps = phase.total_steps
    else:
        phase = TrialsPhase(workshop, ledger, planned, proposals_of(search))
    if isinstance(config.scheduler, AshaScheduler):
        scheduler = asha(
            config.metric,
            config.mode,
            epochs=search.short_base.train.epochs,
            grace_epochs=config.scheduler.grace_epochs,
            reduction=config.scheduler.reduction,
        )
        if scheduler is not None:
            replay(scheduler, [trial for trial in phase.trials if trial.status in ENDED], config.metric)
    outcome.trials = phase.trials
    run(phase, scheduler)
    if phase.wants_to_stop():
        failed = [trial for trial in phase.trials if trial.status == "failed"]
        raise TrainingFailed(
            f"{len(failed)} of {phase.planned} trials failed, more than trials.max_failed_share "
            f"{config.trials.max_failed_share:g} allows; the last of them: {failed[-1].reason}; its log is "
            f"{ledger.log(failed[-1])}"
        )
    if outcome.best_config() is None:
        raise TrainingFailed(f"no trial reported {config.metric}; known: {', '.join(_reported(phase)) or 'nothing'}")


def _planned(search: Search) -> int:
    """How many trials, or members, there are in all."""
    count, searcher = search.config.trials.count, search.config.searcher
    if isinstance(searcher, GridSearcher):
        size = search.space.grid_size(searcher.points)
        return min(count or size, size)
    assert count is not None  # checked with the file
    return count


def _reported(phase: Phase) -> list[str]:
    return sorted({name for trial in phase.trials for report in trial.reports for name in report.metrics})


def _confirm(workshop: Workshop, outcome: Outcome, run: Callable[..., None]) -> None:
    """Train the best configuration and the base again, whole, with seeds of their own, and score the test part."""
    search, best = workshop.search, outcome.best_config()
    seeds = _confirming_seeds(search)
    if not seeds or best is None:
        return
    configs: dict[str, RunConfig] = {}
    for number in range(seeds):
        for name, config in (("best", best), ("base", search.base)):
            seed = config.train.seed + number
            train = config.train.model_copy(update={"seed": seed})
            configs[f"{name}-seed-{seed}"] = config.model_copy(update={"train": train})
    phase = ConfirmPhase(workshop, Ledger(workshop.folder / CONFIRM), configs)
    outcome.confirmations = phase.trials
    run(phase)


def _confirming_seeds(search: Search) -> int:
    """With how many seeds the best configuration and the base are trained again."""
    fewest = FEWEST_SEEDS if isinstance(search.config.scheduler, PbtScheduler) else 0
    return max(search.config.confirm.seeds, fewest)


def _heed(received: list[int]) -> None:
    """End where a signal has asked to."""
    if received and received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    if received:
        raise Preempted(f"stopped by {signal.Signals(received[0]).name}; the same command with --resume goes on")


def _cost(card: Any, config: RunConfig) -> Cost:
    values = config.model_dump(mode="json")
    return cost_of(replace(card, model=values["model"]).build, config.data.image_size)


def _environment(search: Search, uri: str) -> dict[str, str]:
    """What workers need of this program's environment; Ray hands on none of it on a cluster."""
    nltk_data = str((Path(search.base.runs_folder) / "nltk_data").absolute())
    return {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "NLTK_DATA": os.environ.get("NLTK_DATA", nltk_data),
    }


def _parameters(search: Search) -> dict[str, Any]:
    return {name: value for name, value in flatten(search.config).items() if not name.startswith("space.")} | {
        f"space.{key}": value for key, value in search.config.space.items()
    }


def _keep_search(search: Search, folder: Path, resume: bool) -> None:
    """Write search.yaml and base.yaml; where a search goes on, it must be the one that was begun.

    Raises:
        InputError: it is another one, or its base has been changed.
    """
    path, base = folder / SEARCH, folder / BASE
    if resume:
        if not path.is_file():
            raise InputError(f"{path}: no such file, so this is no search's folder; start without --resume")
        # The first points of a population, and those of a part of a grid, are spread over as many as there are.
        spread = isinstance(search.config.scheduler, PbtScheduler) or isinstance(search.config.searcher, GridSearcher)
        may_change = tuple(key for key in MAY_CHANGE if not (spread and key == "trials.count"))
        old, new = _leaves(read_yaml(path)), _leaves(search.config.model_dump(mode="json"))
        _refuse_changes(path, old, new, may_change)
        if base.is_file():
            _refuse_changes(base, flatten(load_config(base)), flatten(search.base), ())
    write_atomically(path, f"# base, with its overrides: {search.config.base}\n{search.as_yaml()}")
    write_atomically(base, as_yaml(search.base))


def _refuse_changes(path: Path, old: dict[str, Any], new: dict[str, Any], may_change: tuple[str, ...]) -> None:
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key) and not key.startswith(may_change):
            raise InputError(
                f"{path}: {key} was {old.get(key)} and is now {new.get(key)}; its trials would not be comparable; "
                "start another search, under another name"
            )


def _leaves(values: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of a search file; a space is compared key by key."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        below = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        leaves |= below
    return leaves
