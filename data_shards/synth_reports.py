"""What pathologists write about a synthetic field: topics, grades, the rule of the conclusion, wordings, readers.

The sentences are the project's own. Their number, lengths and frequencies are set so that readers agree with each
other as far as they do on real reports of bladder tumours: 112 words in all, a median of 35 words a report, corpus
BLEU-4 of one reader against the other four 0.68, of the most frequent wording of every true grade 0.76.
"""

from __future__ import annotations

import numpy as np

from mdnet_dist.shards import CONCLUSION, Report

GRADES: dict[str, tuple[str, ...]] = {
    "pleomorphism": ("normal", "mild", "moderate", "severe"),
    "crowding": ("normal", "mild", "moderate", "severe"),
    "polarity": ("not lost", "partially lost", "completely lost"),
    "mitosis": ("rare", "infrequent", "frequent"),
    "nucleoli": ("inconspicuous", "prominent"),
}
"""{topic: grades from the least to the most atypical}, in the order in which a report says them."""
TOPICS = (*GRADES, CONCLUSION)
CLASSES = NORMAL, LOW_GRADE, HIGH_GRADE, INSUFFICIENT = (
    "normal",
    "low grade",
    "high grade",
    "insufficient information",
)

READERS = 5
DISAGREEMENT = 0.03
"""How often a reader sees one topic of one image a grade higher or lower than it is."""
MOST_POINTS_NORMAL, LEAST_POINTS_HIGH = 1, 6


def points(grades: dict[str, str]) -> int:
    """Atypia of a field, 0 to 11: each topic's steps above its lowest grade, added up."""
    return sum(steps.index(grades[topic]) for topic, steps in GRADES.items())


def conclusion(grades: dict[str, str]) -> str:
    """The class that follows from the five grades: normal up to 1 point, high grade from 6, low grade between.

    Without grades, nothing can be concluded: insufficient information.
    """
    if not grades:
        return INSUFFICIENT
    total = points(grades)
    if total <= MOST_POINTS_NORMAL:
        return NORMAL
    return HIGH_GRADE if total >= LEAST_POINTS_HIGH else LOW_GRADE


# {topic: {grade: {sentence: how often, out of 100}}}
WORDINGS: dict[str, dict[str, dict[str, int]]] = {
    "pleomorphism": {
        "normal": {
            "the nuclei are uniform in size and shape": 33,
            "nuclear size and shape are uniform": 26,
            "the nuclei show no pleomorphism": 22,
            "no nuclear pleomorphism is seen": 19,
        },
        "mild": {
            "the nuclei vary slightly in size and shape": 33,
            "nuclear size and shape vary slightly as in mild pleomorphism": 26,
            "the nuclei show mild pleomorphism": 22,
            "mild nuclear pleomorphism is seen": 19,
        },
        "moderate": {
            "the nuclei vary clearly in size and shape": 33,
            "nuclear size and shape vary clearly as in moderate pleomorphism": 26,
            "the nuclei show moderate pleomorphism": 22,
            "moderate nuclear pleomorphism is seen": 19,
        },
        "severe": {
            "the nuclei vary widely in size and shape": 33,
            "nuclear size and shape vary widely as in severe pleomorphism": 26,
            "the nuclei show severe pleomorphism": 22,
            "severe nuclear pleomorphism is seen": 19,
        },
    },
    "crowding": {
        "normal": {
            "the nuclei are evenly spaced without crowding": 33,
            "no crowding of the nuclei is found": 26,
            "the distance between the nuclei is normal": 22,
            "the cells lie apart without crowding": 19,
        },
        "mild": {
            "the nuclei are mildly crowded": 33,
            "mild crowding of the nuclei is found": 26,
            "the distance between the nuclei is mildly reduced": 22,
            "the cells lie close together with mild crowding": 19,
        },
        "moderate": {
            "the nuclei are moderately crowded": 33,
            "moderate crowding of the nuclei is found": 26,
            "the distance between the nuclei is moderately reduced": 22,
            "the cells lie close together with moderate crowding": 19,
        },
        "severe": {
            "the nuclei are severely crowded and overlap": 33,
            "severe crowding of the nuclei is found": 26,
            "the distance between the nuclei is severely reduced": 22,
            "the cells lie close together with severe crowding": 19,
        },
    },
    "polarity": {
        "not lost": {
            "polarity is preserved": 33,
            "the cells stand upright in orderly rows": 26,
            "the cells keep their polarity under intact umbrella cells": 22,
            "polarity towards the surface is preserved in all layers": 19,
        },
        "partially lost": {
            "polarity is partly lost": 33,
            "the cells stand upright in some areas only": 26,
            "the cells lose their polarity in part of the urothelium": 22,
            "polarity towards the surface is lost in some areas": 19,
        },
        "completely lost": {
            "polarity is wholly lost": 33,
            "the cells lie in complete disorder": 26,
            "the cells lose their polarity throughout the urothelium": 22,
            "polarity towards the surface is lost in all layers": 19,
        },
    },
    "mitosis": {
        "rare": {
            "mitotic figures are rare": 33,
            "almost no mitotic figures are found": 26,
            "mitotic figures are rare and close to the basement membrane": 22,
            "mitotic activity is very low": 19,
        },
        "infrequent": {
            "mitotic figures are infrequent": 33,
            "few mitotic figures are found": 26,
            "mitotic figures are infrequent and stay in the lower half": 22,
            "mitotic activity is low": 19,
        },
        "frequent": {
            "mitotic figures are frequent": 33,
            "many mitotic figures are found": 26,
            "mitotic figures are frequent and reach the upper layers": 22,
            "mitotic activity is high": 19,
        },
    },
    "nucleoli": {
        "inconspicuous": {
            "nucleoli are inconspicuous": 33,
            "the nucleoli are hardly visible": 26,
            "no prominent nucleoli are found": 22,
            "the chromatin is even and hides the nucleoli": 19,
        },
        "prominent": {
            "nucleoli are prominent": 33,
            "the nucleoli are large and easily visible": 26,
            "prominent nucleoli are found in most nuclei": 22,
            "the chromatin is pale and shows large nucleoli": 19,
        },
    },
    CONCLUSION: {
        NORMAL: {"normal urothelium": 80, "normal urothelium without carcinoma": 20},
        LOW_GRADE: {"low grade urothelial carcinoma": 80, "findings favour low grade urothelial carcinoma": 20},
        HIGH_GRADE: {"high grade urothelial carcinoma": 80, "findings favour high grade urothelial carcinoma": 20},
        INSUFFICIENT: {"insufficient information": 80, "insufficient information for diagnosis": 20},
    },
}


def write_reports(grades: dict[str, str], rng: np.random.Generator) -> list[Report]:
    """What `READERS` readers write: each draws the wording of each topic by itself.

    Args:
        grades: {topic: true grade}, with the conclusion; only the conclusion where nothing can be judged.
        rng: source of all randomness.
    """
    return [
        {topic: _sentence(topic, _seen(topic, grades[topic], rng), rng) for topic in TOPICS if topic in grades}
        for _ in range(READERS)
    ]


def _seen(topic: str, grade: str, rng: np.random.Generator) -> str:
    """The grade as one reader sees it; readers agree on the conclusion."""
    if topic == CONCLUSION or rng.random() >= DISAGREEMENT:
        return grade
    steps = GRADES[topic]
    here = steps.index(grade)
    return str(rng.choice([steps[near] for near in (here - 1, here + 1) if 0 <= near < len(steps)]))


def _sentence(topic: str, grade: str, rng: np.random.Generator) -> str:
    """One wording of the grade."""
    wordings = WORDINGS[topic][grade]
    shares = np.array(list(wordings.values()), np.float64)
    return str(rng.choice(list(wordings), p=shares / shares.sum()))
