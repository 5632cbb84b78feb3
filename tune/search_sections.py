"""The file of a search: every field, its meaning, its unit and its default (`tune.search_config` reads it)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from mdnet_dist.config import Count, FileName, Fraction, NotNegative, Positive, PositiveFloat, Section, chosen_by


class TrialsConfig(Section):
    """The training runs of a search."""

    count: Positive | None = None
    """How many trials, or members of the population. Null: the whole grid; other searchers want a number."""
    overrides: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Laid over the configuration of trials only, as on the command line, to make them short; best.yaml has none of
    them."""
    workers: Positive = 1
    """DeepSpeed workers, that is ranks, of a trial."""
    cpus_per_worker: Positive = 1
    """CPU cores set aside for each worker."""
    gpus_per_worker: NotNegative = 0.0
    """GPUs set aside for each worker; 0: it trains on the CPU."""
    at_once: Positive | None = None
    """Trials side by side; null: as many as the resources carry."""
    restarts: Count = 2
    """Times that a trial whose workers died is continued from its last checkpoint."""
    max_failed_share: Fraction = 0.5
    """Share of the trials that may fail before the search stops."""


class RandomSearcher(Section):
    """Independent draws."""

    kind: Literal["random"] = "random"
    """Chooses this section."""


class OptunaSearcher(Section):
    """Optuna's tree-structured Parzen estimator: draws where earlier trials scored well (`pip install '.[optuna]'`)."""

    kind: Literal["optuna"]
    """Chooses this section."""
    startup_trials: Positive = 8
    """Trials that are drawn at random before the estimator takes over."""


class GridSearcher(Section):
    """All combinations."""

    kind: Literal["grid"]
    """Chooses this section."""
    points: Annotated[int, Field(ge=2, lt=2**31)] = 3
    """How many evenly spaced values, both ends included, stand for a range without a step."""


class AshaScheduler(Section):
    """Asynchronous successive halving: a trial that is behind the others at a rung is stopped."""

    kind: Literal["asha"] = "asha"
    """Chooses this section."""
    grace_epochs: Positive = 4
    """The first rung: no trial is stopped before."""
    reduction: Annotated[int, Field(ge=2, lt=2**31)] = 3
    """One in so many goes on at each rung; each rung is so many times as far as the last."""


class NoScheduler(Section):
    """Every trial trains to its end."""

    kind: Literal["none"]
    """Chooses this section."""


class PbtScheduler(Section):
    """Population based training: members with a bad score go on with weights and values of a good one
    (`tune.population`). The schedules of beta and eta that the best one has trained with are the result."""

    kind: Literal["pbt"]
    """Chooses this section."""
    every_epochs: Positive = 2
    """Length of a stretch of training between two comparisons."""
    copied_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.25
    """Share of the members, counted from the worst, that copy one of as many of the best."""
    resampled_share: Fraction = 0.25
    """Probability that a copied value is drawn anew instead of perturbed."""
    step: PositiveFloat = 0.5
    """Size of a perturbation, up or down: in the log-odds of beta and in log eta."""


class ConfirmConfig(Section):
    """What is trained at the end, whole, so that the result does not rest on the trials' luck."""

    seeds: Count = 1
    """With how many seeds the best configuration, and the base, are trained anew; 0: not at all (pbt: at least one)."""


class SearchConfig(Section):
    """A search for the hyper-parameters of training runs."""

    name: FileName
    """Of the search's folder and of its MLflow run."""
    runs_folder: str = "runs"
    """Where that folder is made."""
    base: str
    """A training configuration, as launch/train.py takes it."""
    overrides: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Laid over it for every run and for best.yaml: `dotted.key=value`, or the name of an overlay."""
    space: dict[str, Any]
    """{dotted key of the training configuration: its distribution}. A distribution is {uniform: [low, high]},
    {log_uniform: [low, high]} or {integers: [low, high]}, ends included, the first and the last with `step: S` where
    values lie S apart; or {choice: [...]} or {choice: {label: option, ...}}, where distributions may stand inside
    options."""
    metric: Annotated[str, Field(pattern=r"^(val|train|speed)/.")] = "val/score"
    """What trials are compared by: any logged metric; val/score is the mean of DCA and BLEU-4."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""
    trials: TrialsConfig = TrialsConfig()
    """The training runs."""
    seed: Count = 0
    """Of what is drawn; each trial trains with its configuration's own train.seed."""
    searcher: Annotated[
        Annotated[RandomSearcher, Tag("random")]
        | Annotated[OptunaSearcher, Tag("optuna")]
        | Annotated[GridSearcher, Tag("grid")],
        chosen_by("kind", "random"),
    ] = RandomSearcher()
    """Which points are tried; `kind` chooses among random, optuna and grid."""
    scheduler: Annotated[
        Annotated[AshaScheduler, Tag("asha")]
        | Annotated[NoScheduler, Tag("none")]
        | Annotated[PbtScheduler, Tag("pbt")],
        chosen_by("kind", "asha"),
    ] = AshaScheduler()
    """What becomes of a trial while it trains; `kind` chooses among asha, none and pbt."""
    confirm: ConfirmConfig = ConfirmConfig()
    """What is trained at the end."""
