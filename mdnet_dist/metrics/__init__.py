"""Scores of generated reports and diagnoses, in the conventions that published numbers use."""

from mdnet_dist.metrics.bleu import corpus_bleu
from mdnet_dist.metrics.cider import cider_d
from mdnet_dist.metrics.diagnosis import (
    OTHER,
    accuracy,
    classes_of_conclusions,
    conclusion_class,
    confusion_matrix,
    macro_f1,
)
from mdnet_dist.metrics.meteor import mean_meteor, meteor_unavailable_reason, use_nltk_data
from mdnet_dist.metrics.reports import (
    ScoredImage,
    Wordings,
    confusion_matrices,
    count_wordings,
    oracle_reports,
    people_reports,
    people_score,
    said_class,
    score_reports,
)
from mdnet_dist.metrics.rouge import rouge_l

__all__ = [
    "OTHER",
    "ScoredImage",
    "Wordings",
    "accuracy",
    "cider_d",
    "classes_of_conclusions",
    "conclusion_class",
    "confusion_matrices",
    "confusion_matrix",
    "corpus_bleu",
    "count_wordings",
    "macro_f1",
    "mean_meteor",
    "meteor_unavailable_reason",
    "oracle_reports",
    "people_reports",
    "people_score",
    "rouge_l",
    "said_class",
    "score_reports",
    "use_nltk_data",
]
