"""Scores of the diagnosis: as the conclusion sentence says it (DCA), and as the classifier M says it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mdnet_dist.errors import InputError, nearest

OTHER = "other"
"""Heading of the confusion matrix's last column: no class of the list, or none at all."""


def classes_of_conclusions(conclusions: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Which class a training conclusion names: {sentence: class}.

    People disagree, so that a sentence may occur under two classes: it names the one where it is more frequent in
    training, and of two that are equally frequent the alphabetically first.

    Args:
        conclusions: {class: {sentence, its tokens joined by spaces: times}}, of the training parts.
    """
    best: dict[str, tuple[int, str]] = {}
    for name in sorted(conclusions):
        for sentence, times in conclusions[name].items():
            if sentence not in best or times > best[sentence][0]:
                best[sentence] = (times, name)
    return {sentence: name for sentence, (_, name) in best.items()}


def conclusion_class(tokens: Sequence[str], class_of: Mapping[str, str]) -> str | None:
    """The class that a generated conclusion names, None where it is no conclusion of the training parts.

    The match is exact, as in the MDNet paper's diagnostic conclusion accuracy (DCA): a sentence that is nearly right
    counts as wrong.

    Args:
        tokens: of the generated sentence.
        class_of: from `classes_of_conclusions`.
    """
    return class_of.get(" ".join(tokens))


def accuracy(truth: Sequence[str], predicted: Sequence[str | None]) -> float:
    """Fraction of right predictions; None is wrong.

    Raises:
        ValueError: nothing to score, or not the same number of both.
    """
    if not truth:
        raise ValueError("the accuracy of no prediction is not defined")
    return sum(one == other for one, other in zip(truth, predicted, strict=True)) / len(truth)


def confusion_matrix(
    truth: Iterable[str], predicted: Iterable[str | None], classes: Sequence[str]
) -> NDArray[np.int64]:
    """How often each class was taken for each.

    Returns:
        counts, (classes, classes + 1): true class by predicted class; the last column is `OTHER`.

    Raises:
        InputError: a true class that is not in `classes`.
    """
    index = {name: number for number, name in enumerate(classes)}
    matrix = np.zeros((len(index), len(index) + 1), dtype=np.int64)
    for true, guess in zip(truth, predicted, strict=True):
        if true not in index:
            raise InputError(f"label '{true}' is not one of the classes; {nearest(true, index)}")
        matrix[index[true], len(index) if guess is None else index.get(guess, len(index))] += 1
    return matrix


def macro_f1(matrix: NDArray[np.int64]) -> float:
    """Mean F1 over the classes that occur as truth or as prediction; each class weighs alike.

    Args:
        matrix: (classes, classes + 1), from `confusion_matrix`. `OTHER` is a miss of the true class, no class itself.

    Raises:
        ValueError: the matrix is empty.
    """
    classes = matrix[:, :-1]
    hits = np.diagonal(classes)
    true_or_predicted = matrix.sum(axis=1) + classes.sum(axis=0)
    present = true_or_predicted > 0
    if not present.any():
        raise ValueError("the F1 of no prediction is not defined")
    # F1 = 2 hits / (2 hits + misses + false alarms) = 2 hits / (times true + times predicted)
    return float((2 * hits[present] / true_or_predicted[present]).mean())
