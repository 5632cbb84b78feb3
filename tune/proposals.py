"""Which points a search tries: at random, on a grid, or where Optuna expects good scores. Nothing here knows of Ray.

    proposals = proposals_of(search)
    point = proposals.ask(1)
    proposals.tell(1, point, 0.43)

Trials are numbered from 1. A search that goes on after a break first tells all trials that have ended, then asks for
the numbers that it lacks; trials that were drawn before the break are told when they end, like all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from tune.parameter import Parameter, at_step, steps_in
from tune.records import Point, Scalar
from tune.search_config import GridSearcher, OptunaSearcher, Search
from tune.space import RandomChooser, Space

if TYPE_CHECKING:
    import optuna


class Proposals(Protocol):
    """Proposes points, and may learn from what came of them."""

    def ask(self, number: int) -> Point | None:
        """The point of that trial; None where there is nothing more to try."""

    def tell(self, number: int, point: Point, score: float | None) -> None:
        """What came of a trial: its score, or None where it failed or has none."""


class RandomProposals:
    """Independent draws: a trial's point depends on the seed and its number alone."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.seed = seed

    def ask(self, number: int) -> Point | None:
        """The point of that trial."""
        return self.space.draw(RandomChooser(np.random.default_rng([self.seed, number])))

    def tell(self, number: int, point: Point, score: float | None) -> None:
        """Draws learn nothing."""


class GridProposals:
    """The grid's points in its order, or so many of them, evenly spread."""

    def __init__(self, space: Space, points: int, count: int | None = None) -> None:
        """Args: points, as for `Space.grid`; count: how many points; None, or more than there are: all."""
        grid = space.grid(points)
        size = len(grid)
        if count is not None and count < size:
            # Both ends of the grid included; the steps between two are as equal as whole numbers can be.
            grid = [grid[index * (size - 1) // max(count - 1, 1)] for index in range(count)]
        self.grid = grid

    def ask(self, number: int) -> Point | None:
        """The point of that trial."""
        return dict(self.grid[number - 1]) if 1 <= number <= len(self.grid) else None

    def tell(self, number: int, point: Point, score: float | None) -> None:
        """A grid learns nothing."""


class OptunaProposals:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", 2011).

    A trial's point depends on the seed, its number, what was told before, in its order, and which trials were asked for
    and not told yet: these count as bad ones, so that trials side by side do not all try the same.
    """

    def __init__(self, space: Space, seed: int, mode: Literal["max", "min"], startup_trials: int) -> None:
        """Args: startup_trials: told trials without which points are drawn at random."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        self.seed = seed
        self.startup_trials = startup_trials
        self.study = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
        self.asked: dict[int, optuna.Trial] = {}

    def ask(self, number: int) -> Point | None:
        """The point of that trial."""
        import optuna

        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=self.startup_trials, constant_liar=True, seed=seed
        )
        trial = self.study.ask()
        self.asked[number] = trial
        return self.space.draw(_OptunaChooser(trial))

    def tell(self, number: int, point: Point, score: float | None) -> None:
        """Learn from a trial, also from one that was asked for before a break."""
        import optuna

        failed = score is None or not math.isfinite(score)
        value = None if failed else score
        state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
        if (trial := self.asked.pop(number, None)) is not None:
            self.study.tell(trial, value, state=state)
            return
        parameters = {name: self.space.parameters()[name] for name in point}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params={name: _as_suggested(parameter, point[name]) for name, parameter in parameters.items()},
                distributions={name: _distribution(parameter) for name, parameter in parameters.items()},
            )
        )


class _OptunaChooser:
    """Lets an Optuna trial choose."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def category(self, name: str, labels: Sequence[Scalar]) -> Scalar:
        return self.trial.suggest_categorical(name, labels)

    def real(self, name: str, low: float, high: float, log: bool, step: float | None) -> float:
        if step is None:
            return self.trial.suggest_float(name, low, high, log=log)
        # Numbers of steps: Optuna shortens a range of reals that its steps do not fill to the last digit.
        return at_step(low, high, step, self.trial.suggest_int(name, 0, steps_in(low, high, step)))

    def integer(self, name: str, low: int, high: int, step: int) -> int:
        return self.trial.suggest_int(name, low, high, step=step)


def _as_suggested(parameter: Parameter, value: Scalar) -> Any:
    """A value as `_OptunaChooser` had it of Optuna."""
    if parameter.kind == "uniform" and parameter.step is not None:
        assert isinstance(value, int | float)
        return steps_in(parameter.low, value, parameter.step)
    return value


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """What `_OptunaChooser` suggests from."""
    import optuna

    low, high = parameter.low, parameter.high
    if parameter.kind == "choice":
        return optuna.distributions.CategoricalDistribution(parameter.labels)
    if parameter.kind == "integers":
        return optuna.distributions.IntDistribution(int(low), int(high), step=int(parameter.step or 1))
    if parameter.kind == "uniform" and parameter.step is not None:
        return optuna.distributions.IntDistribution(0, steps_in(low, high, parameter.step))
    return optuna.distributions.FloatDistribution(low, high, log=parameter.kind == "log_uniform")


def proposals_of(search: Search) -> Proposals:
    """The proposals that a search's file asks for."""
    config, space = search.config, search.space
    if isinstance(config.searcher, GridSearcher):
        return GridProposals(space, config.searcher.points, config.trials.count)
    if isinstance(config.searcher, OptunaSearcher):
        return OptunaProposals(space, config.seed, config.mode, config.searcher.startup_trials)
    return RandomProposals(space, config.seed)
