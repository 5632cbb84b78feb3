"""Which patient goes where. Pure functions of counts; an image never leaves its patient.

Dealing is a small optimisation: bins (folds, or training and validation) should hold their share of the images and
their share of each label. The cost of a deal is, over bins b of share s_b and over quantities q (all images, and the
images of each label) with n_bq of N_q images in the bin,

    sum_b sum_q  (n_bq / N_q)^2 / s_b

which is smallest where every n_bq / N_q is s_b. Patients are placed largest first, each where the cost grows least;
then single patients move as long as a move lowers the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mdnet_dist.errors import InputError

MAX_SWEEPS = 20  # over all patients, in search of moves; a handful is enough in practice


def deal_into_folds(patients: Mapping[str, Mapping[str, int]], folds: int) -> dict[str, int]:
    """Deal patients into folds of nearly equal size and mix of labels. The same input gives the same folds.

    Args:
        patients: {patient: {label: images}}; images without a label count under a label of their own, such as "".
        folds: how many.

    Returns:
        {patient: fold}, folds numbered from 0; none is empty.

    Raises:
        InputError: fewer than two folds, or fewer patients than folds.
    """
    if folds < 2:
        raise InputError(f"folds: {folds}, but cross-validation needs at least 2")
    if len(patients) < folds:
        raise InputError(f"folds: {folds}, but there are only {len(patients)} patients, and a patient is never divided")
    return _deal(patients, [1 / folds] * folds)


def split_off_validation(patients: Mapping[str, Mapping[str, int]], share: float) -> set[str]:
    """Choose training patients that become the validation part: about `share` of the images, of each label too.

    Args:
        patients: {training patient: {label: images}}.
        share: of the images, 0 < share < 1.

    Returns:
        The patients to move: at least one, and never all.

    Raises:
        InputError: a share outside 0..1, or fewer than two patients.
    """
    if not 0 < share < 1:
        raise InputError(f"validation share: {share}, but it must lie between 0 and 1")
    if len(patients) < 2:
        raise InputError("validation share: it takes at least two training patients to set one aside")
    dealt = _deal(patients, [1 - share, share])
    chosen = {patient for patient, place in dealt.items() if place == 1}
    by_size = sorted(patients, key=lambda patient: (sum(patients[patient].values()), patient))
    if not chosen:
        return {by_size[0]}
    if len(chosen) == len(patients):
        return chosen - {by_size[0]}
    return chosen


def dealing_cost(counts: np.ndarray, shares: np.ndarray) -> float:
    """The cost that dealing lowers. counts: (bins, quantities) images; shares: (bins,), summing to 1."""
    fractions = counts / np.maximum(counts.sum(axis=0), 1)
    return float((fractions**2 / shares[:, None]).sum())


def _deal(patients: Mapping[str, Mapping[str, int]], shares: Sequence[float]) -> dict[str, int]:
    labels = sorted({label for images in patients.values() for label in images})
    column = {label: number for number, label in enumerate(labels, start=1)}
    order = sorted(patients, key=lambda patient: (-sum(patients[patient].values()), patient))
    # (patients, 1 + labels): all images, then those of each label
    own = np.zeros((len(order), 1 + len(labels)))
    for row, patient in enumerate(order):
        own[row, 0] = sum(patients[patient].values())
        for label, images in patients[patient].items():
            own[row, column[label]] = images
    own /= np.maximum(own.sum(axis=0), 1)

    inverse_share = 1 / np.asarray(shares)
    held = np.zeros((len(shares), own.shape[1]))
    place = np.empty(len(order), dtype=np.int64)

    def growth(row: int) -> np.ndarray:
        """How much the cost grows in each bin if it takes this patient."""
        grown: np.ndarray = (2 * held @ own[row] + own[row] @ own[row]) * inverse_share
        return grown

    for row in range(len(order)):
        # Rounding keeps ties ties, whatever the order in which this machine adds.
        place[row] = np.argmin(np.round(growth(row), 12))
        held[place[row]] += own[row]
    for _ in range(MAX_SWEEPS):
        moved = False
        for row in range(len(order)):
            held[place[row]] -= own[row]
            costs = growth(row)
            best = int(np.argmin(np.round(costs, 12)))
            if costs[best] < costs[place[row]] - 1e-9:
                place[row], moved = best, True
            held[place[row]] += own[row]
        if not moved:
            break
    return {patient: int(place[row]) for row, patient in enumerate(order)}
