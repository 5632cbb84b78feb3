"""BLEU over a whole set of texts (Papineni et al., ACL 2002, doi:10.3115/1073083.1073135).

Papers on captions and reports give the numbers of the coco-caption program (Chen et al., arXiv 1504.00325). Where the
definition leaves something open, this file does what that program does; the tests compare the two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[str]
NGram = tuple[str, ...]

# coco-caption adds these so that nothing is divided by zero. They show only where a count is 0: a set whose texts are
# all shorter than n words gets a BLEU-n near 0, even if every word is right.
_ADDED_TO_MATCHES = 1e-15
_ADDED_TO_TOTALS = 1e-9


def ngram_counts(tokens: Tokens, max_n: int) -> Counter[NGram]:
    """How often each run of 1 to `max_n` neighbouring words occurs."""
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, max_n + 1) for start in range(len(tokens) - n + 1)
    )


def corpus_bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], max_n: int = 4) -> list[float]:
    """BLEU-1 to BLEU-`max_n` of all hypotheses together, fractions of 1.

    Matches are summed over the set before dividing, so a long text counts for more than a short one, and the result
    does not depend on the order of the texts.

    Args:
        hypotheses: one text an image.
        references: one or more texts an image; an n-gram matches as often as in the reference that has most of it.
        max_n: length of the longest n-gram.

    Raises:
        ValueError: the two do not have the same number of images, or an image has no reference.
    """
    matches = [0] * max_n
    totals = [0] * max_n
    hypothesis_length = 0
    reference_length = 0
    for hypothesis, image_references in zip(hypotheses, references, strict=True):
        most: Counter[NGram] = Counter()
        for reference in image_references:
            most |= ngram_counts(reference, max_n)  # the union of counters keeps the larger count
        for ngram, count in (ngram_counts(hypothesis, max_n) & most).items():
            matches[len(ngram) - 1] += count
        for n in range(1, max_n + 1):
            totals[n - 1] += max(0, len(hypothesis) - n + 1)
        hypothesis_length += len(hypothesis)
        reference_length += closest_length(len(hypothesis), [len(reference) for reference in image_references])

    # Section 2.3 of the paper: texts that are too short in all are punished by exp(1 - r / c).
    length_ratio = (hypothesis_length + _ADDED_TO_MATCHES) / (reference_length + _ADDED_TO_TOTALS)
    brevity_penalty = math.exp(1 - 1 / length_ratio) if length_ratio < 1 else 1.0
    scores = []
    product = 1.0
    for n, (matched, total) in enumerate(zip(matches, totals), start=1):
        product *= (matched + _ADDED_TO_MATCHES) / (total + _ADDED_TO_TOTALS)
        scores.append(brevity_penalty * product ** (1 / n))
    return scores


def closest_length(length: int, reference_lengths: Sequence[int]) -> int:
    """The reference length nearest to `length`; of two that are equally near, the shorter."""
    return min(reference_lengths, key=lambda candidate: (abs(candidate - length), candidate))
