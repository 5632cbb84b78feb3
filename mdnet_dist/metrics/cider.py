"""CIDEr-D: agreement with several references, rare n-grams weighing more (Vedantam et al., CVPR 2015, arXiv 1411.5726).

A set's own references say which n-grams are rare. The same text therefore scores differently in another set, and a set
of one image, where every n-gram is in every image, scores 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mdnet_dist.metrics.bleu import NGram, Tokens, ngram_counts


@dataclass(frozen=True)
class _Vector:
    """A text as the TF-IDF weights of its n-grams."""

    weights: dict[NGram, float]
    norms: list[float]  # Euclidean, one for each n
    length: int  # words


def cider_d(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], max_n: int = 4, sigma_words: float = 6.0
) -> float:
    """Mean CIDEr-D over the images, 0 to 10.

    Args:
        hypotheses: one text an image.
        references: one or more texts an image; also the set that n-gram frequencies are counted in.
        max_n: length of the longest n-gram; all lengths weigh alike.
        sigma_words: a hypothesis this much longer or shorter than a reference keeps exp(-1/2) of the score.

    Raises:
        ValueError: no image, not the same number of images in both, or an image without a reference.
    """
    reference_counts = [[ngram_counts(text, max_n) for text in texts] for texts in references]
    images_with: Counter[NGram] = Counter()
    for texts in reference_counts:
        images_with.update(set().union(*texts))
    if not reference_counts or not all(reference_counts):
        raise ValueError("CIDEr-D needs an image, and a reference for each")
    log_images = math.log(len(reference_counts))
    # An n-gram that no reference has counts as seen once, as in coco-caption.
    rarity = {ngram: log_images - math.log(count) for ngram, count in images_with.items()}

    scores = []
    for hypothesis, texts in zip(hypotheses, reference_counts, strict=True):
        candidate = _vector(ngram_counts(hypothesis, max_n), rarity, log_images, max_n)
        similarities = [_similarity(candidate, _vector(text, rarity, log_images, max_n), sigma_words) for text in texts]
        scores.append(10 * math.fsum(similarities) / len(texts))
    return math.fsum(scores) / len(scores)  # fsum rounds once: the order of the images does not matter


def _vector(counts: Counter[NGram], rarity: Mapping[NGram, float], unseen: float, max_n: int) -> _Vector:
    # Eq. 1 of the paper without dividing counts by the text's length, as the authors' program does. In the cosine that
    # cancels; in the clipping it does not.
    weights = {ngram: count * rarity.get(ngram, unseen) for ngram, count in counts.items()}
    squares = [0.0] * max_n
    for ngram, weight in weights.items():
        squares[len(ngram) - 1] += weight**2
    words = sum(count for ngram, count in counts.items() if len(ngram) == 1)
    return _Vector(weights, [math.sqrt(square) for square in squares], words)


def _similarity(hypothesis: _Vector, reference: _Vector, sigma_words: float) -> float:
    """CIDEr-D of one reference, averaged over n: the clipped cosine times a Gaussian of the lengths (section 5)."""
    products = [0.0] * len(hypothesis.norms)
    for ngram, weight in hypothesis.weights.items():
        reference_weight = reference.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, reference_weight) * reference_weight
    cosines = [
        product / (hypothesis_norm * reference_norm) if product else 0.0
        for product, hypothesis_norm, reference_norm in zip(products, hypothesis.norms, reference.norms)
    ]
    difference_words = hypothesis.length - reference.length
    return math.exp(-(difference_words**2) / (2 * sigma_words**2)) * sum(cosines) / len(cosines)
