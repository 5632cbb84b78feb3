"""All scores of a set of images at once, and two yardsticks on the same scale: people, and an oracle.

What is compared are captions: the sentences of a report, tokenised (`mdnet_dist.vocabulary.tokenize`) and joined in
the order of the topics. A network that must speak on every topic cannot be scored on one that nobody described, so a
topic that is missing from all references of an image is left out of its hypothesis too. A reference without any word
on the topics is no reference, and an image without references counts for the diagnosis only.

No score depends on the order of the images, to the last bit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdnet_dist.metrics.bleu import Tokens, corpus_bleu
from mdnet_dist.metrics.cider import cider_d
from mdnet_dist.metrics.diagnosis import (
    accuracy,
    classes_of_conclusions,
    conclusion_class,
    confusion_matrix,
    macro_f1,
)
from mdnet_dist.metrics.meteor import mean_meteor, use_nltk_data
from mdnet_dist.metrics.rouge import rouge_l
from mdnet_dist.shards import CONCLUSION, Report
from mdnet_dist.vocabulary import tokenize

Wordings = dict[str, dict[str, dict[str, int]]]
"""{topic: {true grade: {sentence, its tokens joined by spaces: times}}}, of the training parts."""


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """One evaluated image."""

    key: str
    label: str | None  # the true class of the conclusion; None where nobody gave one
    predicted_label: str | None  # by the classifier M; None where there is no classifier
    report: Report  # generated
    references: list[Report]  # by people


def score_reports(
    images: Iterable[ScoredImage],
    topics: Sequence[str],
    conclusions: Mapping[str, Mapping[str, int]],
    classes: Sequence[str],
    nltk_data: Path | None = None,
) -> dict[str, float]:
    """Score generated reports and predicted labels.

    Args:
        images: in any order, each once.
        topics: in the order in which a report says them; others are ignored.
        conclusions: {class: {sentence, its tokens joined by spaces: times}}, of the training parts.
        classes: of the conclusion.
        nltk_data: folder where NLTK finds WordNet; None: where it looks by itself.

    Returns:
        - `images`: how many there are;
        - `bleu1` to `bleu4`, `rouge_l`, `cider`, `meteor`: of the captions; without `meteor` where
          `mdnet_dist.metrics.meteor_unavailable_reason` says why, without all of them where no image has references;
        - `bleu4/TOPIC`, `exact/TOPIC`: of the sentences of one topic, over the images in which a reference has it:
          BLEU-4 (only if a reference has four words there) and the fraction that is word for word some reference;
        - `label_accuracy`, `macro_f1`: of M, over the images with a label (only if M predicted any);
        - `dca`, `dca_macro_f1`: of the generated conclusions, over the images with a label (only if there is a topic
          "conclusion").
        All are fractions of 1 but `images` and `cider`, which goes to 10.

    Raises:
        InputError: a label that is not in `classes`.
        ValueError: an image occurs twice.
    """
    ordered = sorted(images, key=lambda image: image.key)
    for one, following in pairwise(ordered):
        if one.key == following.key:
            raise ValueError(f"image '{one.key}' is scored twice")
    return {
        "images": float(len(ordered)),
        **_caption_scores(ordered, topics, nltk_data),
        **_topic_scores(ordered, topics),
        **_diagnosis_scores(ordered, topics, conclusions, classes),
    }


def confusion_matrices(
    images: Iterable[ScoredImage], conclusions: Mapping[str, Mapping[str, int]], classes: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """Confusion matrices of the images with a label, each (classes, classes + 1): true class by predicted class.

    Returns:
        `label`: as M predicted; `conclusion`: as the generated sentence says. The last column holds what is no class.

    Raises:
        InputError: a label that is not in `classes`.
    """
    class_of = classes_of_conclusions(conclusions)
    labelled = [image for image in images if image.label is not None]
    truth = [str(image.label) for image in labelled]
    return {
        "label": confusion_matrix(truth, [image.predicted_label for image in labelled], classes),
        "conclusion": confusion_matrix(truth, [said_class(image, class_of) for image in labelled], classes),
    }


def said_class(image: ScoredImage, class_of: Mapping[str, str]) -> str | None:
    """The class that the generated conclusion names (`conclusion_class`); None where it names none or is missing."""
    return conclusion_class(tokenize(image.report.get(CONCLUSION, "")), class_of)


def people_reports(images: Iterable[ScoredImage], topics: Sequence[str]) -> list[ScoredImage]:
    """Each image as if its first reference were generated and the others its references; M predicts nothing.

    Images with fewer than two references are left out: nobody can be compared.
    """
    compared = []
    for image in images:
        described = [reference for reference in image.references if caption(reference, topics)]
        if len(described) > 1:
            compared.append(replace(image, report=described[0], references=described[1:], predicted_label=None))
    return compared


def people_score(
    images: Iterable[ScoredImage],
    topics: Sequence[str],
    conclusions: Mapping[str, Mapping[str, int]],
    classes: Sequence[str],
    nltk_data: Path | None = None,
) -> dict[str, float] | None:
    """What people score against each other: `score_reports` of `people_reports`; None where no image has two."""
    compared = people_reports(images, topics)
    return score_reports(compared, topics, conclusions, classes, nltk_data) if compared else None


def count_wordings(samples: Iterable[tuple[Mapping[str, str], Sequence[Report]]]) -> Wordings:
    """How often each sentence describes each true grade.

    Args:
        samples: ({topic: true grade}, reports) of each training image.
    """
    wordings: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for grades, reports in samples:
        for topic, grade in grades.items():
            sentences = [" ".join(tokenize(report[topic])) for report in reports if topic in report]
            wordings[topic][grade].update(sentence for sentence in sentences if sentence)
    return {topic: {grade: dict(counts) for grade, counts in by_grade.items()} for topic, by_grade in wordings.items()}


def oracle_reports(
    images: Iterable[ScoredImage], grades: Mapping[str, Mapping[str, str]], wordings: Wordings
) -> list[ScoredImage]:
    """Each image as one would describe it who knows every true grade and its most frequent wording in training.

    Of wordings that are equally frequent the alphabetically first is said; a grade that training never describes is
    passed over. Images without known grades are left out. M predicts nothing.

    Args:
        images: those to describe.
        grades: {key of the image: {topic: true grade}}.
        wordings: from `count_wordings`.
    """
    told = []
    for image in images:
        if known := grades.get(image.key):
            counts = {topic: wordings.get(topic, {}).get(grade) for topic, grade in known.items()}
            report = {topic: _most_frequent(sentences) for topic, sentences in counts.items() if sentences}
            told.append(replace(image, report=report, predicted_label=None))
    return told


def caption(report: Report, topics: Iterable[str]) -> list[str]:
    """The words of a report in the order of the topics; topics that it lacks are passed over."""
    return [word for topic in topics if topic in report for word in tokenize(report[topic])]


def _most_frequent(counts: Mapping[str, int]) -> str:
    return min(counts, key=lambda sentence: (-counts[sentence], sentence))


def _pairs(images: Iterable[ScoredImage], topics: Sequence[str]) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Hypotheses and references of the images that somebody described, by the rules at the head of this file."""
    hypotheses: list[Tokens] = []
    references: list[list[Tokens]] = []
    for image in images:
        described = [topic for topic in topics if any(caption(reference, [topic]) for reference in image.references)]
        if described:
            captions = [caption(reference, described) for reference in image.references]
            hypotheses.append(caption(image.report, described))
            references.append([words for words in captions if words])
    return hypotheses, references


def _caption_scores(images: Sequence[ScoredImage], topics: Sequence[str], nltk_data: Path | None) -> dict[str, float]:
    hypotheses, references = _pairs(images, topics)
    if not hypotheses:
        return {}
    scores = {f"bleu{n}": score for n, score in enumerate(corpus_bleu(hypotheses, references), start=1)}
    scores["rouge_l"] = rouge_l(hypotheses, references)
    scores["cider"] = cider_d(hypotheses, references)
    if nltk_data is not None:
        use_nltk_data(nltk_data)
    meteor_score = mean_meteor(hypotheses, references)
    if meteor_score is not None:
        scores["meteor"] = meteor_score
    return scores


def _topic_scores(images: Sequence[ScoredImage], topics: Sequence[str]) -> dict[str, float]:
    scores = {}
    for topic in topics:
        hypotheses, references = _pairs(images, [topic])
        if not hypotheses:
            continue
        if any(len(words) >= 4 for texts in references for words in texts):
            scores[f"bleu4/{topic}"] = corpus_bleu(hypotheses, references)[3]
        exact = sum(words in texts for words, texts in zip(hypotheses, references))
        scores[f"exact/{topic}"] = exact / len(hypotheses)
    return scores


def _diagnosis_scores(
    images: Sequence[ScoredImage],
    topics: Sequence[str],
    conclusions: Mapping[str, Mapping[str, int]],
    classes: Sequence[str],
) -> dict[str, float]:
    labelled = [image for image in images if image.label is not None]
    if not labelled:
        return {}
    truth = [str(image.label) for image in labelled]
    matrices = confusion_matrices(labelled, conclusions, classes)
    scores = {}
    predicted = [image.predicted_label for image in labelled]
    if any(label is not None for label in predicted):
        scores["label_accuracy"] = accuracy(truth, predicted)
        scores["macro_f1"] = macro_f1(matrices["label"])
    if CONCLUSION in topics:
        class_of = classes_of_conclusions(conclusions)
        scores["dca"] = accuracy(truth, [said_class(image, class_of) for image in labelled])
        scores["dca_macro_f1"] = macro_f1(matrices["conclusion"])
    return scores
