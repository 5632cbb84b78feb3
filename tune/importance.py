"""Which parameters mattered: permutation importance in a random forest that predicts scores from points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tune.facts import Mode, as_number, is_choice, options_of, parameters_of
from tune.records import TrialRecord, shown

FEWEST_TRIALS = 8  # with a score
TREES, REPEATS = 300, 10
LOW_R2 = 0.2  # below it importances mean nothing


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Of one parameter: how much of the out-of-bag R^2 is lost when its values are exchanged between trials."""

    parameter: str
    mean: float
    deviation: float  # over repeats


@dataclass(frozen=True, kw_only=True)
class Importances:
    """Of all parameters that took more than one value, the highest first."""

    rows: tuple[Importance, ...]
    r2: float  # out of bag: 1 predicts scores of unseen trials perfectly, 0 or less no better than their mean
    trials: int
    repeats: int

    @property
    def meaning(self) -> str:
        """What the R^2 says of the importances, in a sentence without a full stop."""
        if self.r2 < LOW_R2:
            return "too low: the order means nothing"
        return "low: take the order as a hint" if self.r2 < 0.5 else "the order means something"


def importances(trials: Sequence[TrialRecord], metric: str, mode: Mode, seed: int = 0) -> Importances | None:
    """Permutation importance (Breiman, "Random forests", 2001) in a forest that predicts a score from a point.

    Predictions are out of bag, by the trees that have not seen a trial: on what it has learnt by heart, a forest finds
    noise important. A choice is one-hot encoded and exchanged together with the parameters that exist only with one of
    its options, so that a point stays possible; these are also exchanged alone, among the trials that have them.

    Returns:
        None where there are fewer than FEWEST_TRIALS scores, or all are equal, or no parameter varies.
    """
    from sklearn.ensemble import RandomForestRegressor

    scored = [(trial, score) for trial in trials if (score := trial.score(metric, mode)) is not None]
    scores = np.array([score for _, score in scored])
    known = [trial for trial, _ in scored]
    names = [name for name in parameters_of(known) if len({t.point[name] for t in known if name in t.point}) > 1]
    if len(scored) < FEWEST_TRIALS or np.ptp(scores) == 0 or not names:
        return None
    table, columns = _encoded(known, names)
    forest = RandomForestRegressor(TREES, random_state=seed).fit(table, scores)
    unseen = np.ones((TREES, len(scored)), dtype=bool)
    for tree, drawn in enumerate(forest.estimators_samples_):
        unseen[tree, drawn] = False

    generator = np.random.default_rng(seed)
    tables = [table]
    for name in names:
        together = [other for other in names if other == name or other.startswith(f"{name}.")]
        moved = np.array([column for other in together for column in columns[other]])
        having = np.array([row for row, trial in enumerate(known) if name in trial.point])
        for _ in range(REPEATS):
            other_table = table.copy()
            other_table[np.ix_(having, moved)] = table[np.ix_(generator.permutation(having), moved)]
            tables.append(other_table)
    # One call a tree for all tables: (TREES, tables, trials).
    stacked = np.concatenate(tables)
    predictions = np.stack([tree.predict(stacked) for tree in forest.estimators_]).reshape(TREES, len(tables), -1)
    judged = unseen.any(axis=0)
    mean = (predictions * unseen[:, None]).sum(axis=0)[:, judged] / unseen.sum(axis=0)[judged]
    truth = scores[judged]
    r2 = 1 - ((mean - truth) ** 2).sum(axis=1) / max(((truth - truth.mean()) ** 2).sum(), 1e-300)
    lost = (r2[0] - r2[1:]).reshape(len(names), REPEATS)
    rows = [
        Importance(parameter=name, mean=float(drops.mean()), deviation=float(drops.std(ddof=1)))
        for name, drops in zip(names, lost)
    ]
    rows.sort(key=lambda row: -row.mean)
    return Importances(rows=tuple(rows), r2=float(r2[0]), trials=len(scored), repeats=REPEATS)


def _encoded(trials: Sequence[TrialRecord], names: Sequence[str]) -> tuple[np.ndarray, dict[str, range]]:
    """(trials, columns), and the columns of each parameter; what is absent lies below all numbers, or is no option."""
    table: list[list[float]] = []
    columns: dict[str, range] = {}
    for name in names:
        first, points = len(table), [trial.point for trial in trials]
        if is_choice(name, trials):
            labels = [shown(point[name]) if name in point else None for point in points]
            table += [[float(label == option) for label in labels] for option in options_of(name, trials)]
        else:
            values = [as_number(point[name]) if name in point else math.nan for point in points]
            low, high = np.nanmin(values), np.nanmax(values)
            table.append(list(np.nan_to_num(values, nan=low - (high - low))))
        columns[name] = range(first, len(table))
    return np.array(table).T, columns
