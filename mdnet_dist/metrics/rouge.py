"""ROUGE-L: the longest common subsequence of two texts (Lin, ACL workshop 2004, aclanthology.org/W04-1013)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mdnet_dist.metrics.bleu import Tokens


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2) -> float:
    """Mean over the images of ROUGE-L against the best references, a fraction of 1.

    As in coco-caption, precision and recall are each the best over the references, perhaps of two different ones.

    Args:
        hypotheses: one text an image.
        references: one or more texts an image.
        beta: how many times more recall weighs than precision.

    Raises:
        ValueError: no image, not the same number of images in both, or an image without a reference.
    """
    scores = [_rouge_l_of_image(*pair, beta) for pair in zip(hypotheses, references, strict=True)]
    if not scores:
        raise ValueError("ROUGE-L of no image is not defined")
    return math.fsum(scores) / len(scores)  # fsum rounds once: the order of the images does not matter


def _rouge_l_of_image(hypothesis: Tokens, references: Sequence[Tokens], beta: float) -> float:
    # A text without words counts as one empty word, as in coco-caption: it matches nothing but its like.
    hypothesis = hypothesis or ("",)
    common = [(longest_common_subsequence(hypothesis, reference or ("",)), reference) for reference in references]
    precision = max(length / len(hypothesis) for length, _ in common)
    recall = max(length / max(1, len(reference)) for length, reference in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Words of the longest sequence that both texts contain in order, with gaps allowed.

    Works on a row of the usual table at a time, one bit a word of `first`: a 0 bit says that the table grows by one
    there (Hyyrö, AWOCA 2004). Python's integers have no width limit, so one addition does a whole row.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    all_bits = (1 << len(first)) - 1
    row = all_bits
    for word in second:
        matched = row & positions.get(word, 0)
        row = ((row + matched) | (row - matched)) & all_bits
    return len(first) - bin(row).count("1")
