"""What a search came to, written into its folder and into its MLflow run: best.yaml, table, pictures, summary."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdnet_dist.config import RunConfig
from mdnet_dist.config_file import as_yaml, check_config, flatten
from mdnet_dist.run_folder import METRICS
from mdnet_dist.shards import write_atomically
from mdnet_dist.tracking import Tracker
from tune import figures
from tune.facts import depth_of, describe_eta, describe_schedule
from tune.importance import importances
from tune.population import Stretch, last_winner, lineage, schedule_of
from tune.records import TrialRecord, best_trial
from tune.results import Confirmation, summary, trials_csv
from tune.search_config import PbtScheduler, Search

BEST, TABLE, SUMMARY, PICTURES, LINEAGE = "best.yaml", "trials.csv", "summary.md", "pictures", "lineage.json"


@dataclass(kw_only=True)
class Outcome:
    """What is known of a search; trials and confirmations grow while it runs."""

    search: Search
    folder: Path
    tracker: Tracker
    trials: list[TrialRecord] = field(default_factory=list)
    confirmations: list[TrialRecord] = field(default_factory=list)
    total_steps: int = 0  # of a member of a population

    @property
    def is_population(self) -> bool:
        """Whether trials are members of a population, whose history is the result."""
        return isinstance(self.search.config.scheduler, PbtScheduler)

    def best(self) -> TrialRecord | None:
        """The best trial; of a population the member that ends best."""
        config = self.search.config
        if self.is_population:
            return last_winner(self._members(), config.metric, config.mode)
        return best_trial(self.trials, config.metric, config.mode)

    def lineage(self) -> list[Stretch]:
        """What trained the weights of a population's best member; none of it before it has trained."""
        best = self.best()
        return lineage(self._members(), best.name) if self.is_population and best is not None else []

    def best_config(self) -> RunConfig | None:
        """The whole training configuration that the search recommends; None while no trial has a score."""
        best = self.best()
        if best is None:
            return None
        if not self.is_population:
            return self.search.run_config(best.point, short=False)
        base = self.search.base.model_dump(mode="json")
        return check_config({**base, "blend": {**base["blend"], **self.schedule()}}, "the winner's schedule")

    def schedule(self) -> dict[str, Any]:
        """The blend section that the best member's weights were trained with."""
        return schedule_of(self.lineage(), self.total_steps)

    def confirmed(self) -> list[Confirmation]:
        """The confirming runs that have ended well."""
        config = self.search.config
        found = []
        for trial in self.confirmations:
            folder = Path(trial.config["runs_folder"]) / trial.name
            score = trial.score(config.metric, config.mode)
            if trial.status != "finished" or score is None:
                continue
            metrics = json.loads((folder / METRICS).read_text(encoding="utf-8")) | {config.metric: score}
            name = "best" if trial.name.startswith("best") else "base"
            found.append(
                Confirmation(name=name, seed=trial.config["train"]["seed"], metrics=metrics, folder=folder)  # type: ignore[arg-type]
            )
        return found

    def _members(self) -> dict[str, TrialRecord]:
        return {trial.name: trial for trial in self.trials}


def publish(outcome: Outcome, *, pictures: bool = True) -> None:
    """Write what is known, and send it to the search's MLflow run.

    Args:
        pictures: draw them too; they take seconds.
    """
    search, folder = outcome.search, outcome.folder
    config = search.config
    if not outcome.trials:
        return
    write_atomically(folder / TABLE, trials_csv(outcome.trials, config.metric, config.mode))
    written = [folder / TABLE, folder / "search.yaml"]
    winner, best = outcome.best(), outcome.best_config()
    if winner is not None and best is not None:
        score = winner.values(config.metric)[-1] if outcome.is_population else winner.score(config.metric, config.mode)
        head = (
            f"# deepspeed launch/train.py {_shown(folder / BEST)}\n#\n# The best of the search {config.name}: "
            f"{config.metric} {score:.4g} of trial {winner.name}.\n"
        )
        named = best.model_copy(update={"name": f"{folder.name}-best"})
        write_atomically(folder / BEST, head + as_yaml(named))
        written.append(folder / BEST)
    schedule_text, eta_text = "", ""
    if outcome.is_population and best is not None:
        schedule = outcome.schedule()
        schedule_text = describe_schedule(schedule["beta"])
        eta_text = describe_eta(schedule["eta"]) if "eta" in schedule else ""
        stretches = [vars(stretch) for stretch in outcome.lineage()]
        write_atomically(folder / LINEAGE, json.dumps({"stretches": stretches, "schedule": schedule}, indent=1) + "\n")
        written.append(folder / LINEAGE)
    text = summary(
        outcome.trials,
        config.metric,
        config.mode,
        outcome.confirmed(),
        schedule_text,
        eta_text=eta_text,
        winner=winner if outcome.is_population else None,
    )
    write_atomically(folder / SUMMARY, text)
    outcome.tracker.log_tags({"mlflow.note.content": text})
    if not pictures:
        return
    written.append(folder / SUMMARY)
    if best is not None:
        _draw(outcome, folder / PICTURES)
        written.append(folder / PICTURES)
        outcome.tracker.log_parameters({f"best.{key}": value for key, value in flatten(best).items()})
    for path in written:
        outcome.tracker.log_artifact(path)


def _draw(outcome: Outcome, folder: Path) -> None:
    """Every picture that there is something to draw for; one that lacks its data is left out."""
    folder.mkdir(exist_ok=True)
    config, trials = outcome.search.config, outcome.trials
    of = (trials, config.metric, config.mode)
    if len({depth_of(trial) for trial in trials}) > 1:
        figures.draw_concat_depth(*of, folder / "concat_depth.png")
    if outcome.is_population:
        beta = outcome.schedule()["beta"]
        knots = beta.get("knots", [[0.0, beta.get("value")], [1.0, beta.get("value")]])
        figures.draw_population(
            trials, outcome.lineage(), knots, outcome.total_steps, config.metric, config.mode, folder / "population.png"
        )
    else:
        figures.draw_parameters(*of, folder / "parameters.png")
        figures.draw_beta_schedules(*of, folder / "beta_schedules.png")
        figures.draw_parallel(*of, folder / "parallel_coordinates.png")
        if found := importances(*of):
            figures.draw_importances(found, folder / "importances.png")
    if confirmed := outcome.confirmed():
        figures.draw_confirmations(confirmed, config.metric, config.mode, folder / "confirmations.png")


def _shown(path: Path) -> str:
    """A path as one types it here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
