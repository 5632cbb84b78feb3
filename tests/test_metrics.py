"""Scores against worked examples, against coco-caption (pycocoevalcap), and on real reports."""

from __future__ import annotations

import json
import math
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist.errors import InputError
from mdnet_dist.metrics import (
    ScoredImage,
    accuracy,
    cider_d,
    classes_of_conclusions,
    conclusion_class,
    confusion_matrices,
    confusion_matrix,
    corpus_bleu,
    count_wordings,
    macro_f1,
    oracle_reports,
    people_reports,
    people_score,
    rouge_l,
    said_class,
    score_reports,
)
from mdnet_dist.metrics.rouge import longest_common_subsequence
from mdnet_dist.vocabulary import tokenize
from tests.conftest import shared_data

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs to mend
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def coco_caption(hypotheses, references) -> dict[str, float]:
    """The scores of pycocoevalcap, which takes texts by image and prints unless told not to."""
    result = {image: [" ".join(text)] for image, text in enumerate(hypotheses)}
    truth = {image: [" ".join(text) for text in texts] for image, texts in enumerate(references)}
    scores = {f"bleu{n}": score for n, score in enumerate(Bleu(4).compute_score(truth, result, verbose=0)[0], start=1)}
    scores["rouge_l"] = float(Rouge().compute_score(truth, result)[0])
    scores["cider"] = float(Cider().compute_score(truth, result)[0])
    return scores


def our_scores(hypotheses, references) -> dict[str, float]:
    scores = {f"bleu{n}": score for n, score in enumerate(corpus_bleu(hypotheses, references), start=1)}
    return {**scores, "rouge_l": rouge_l(hypotheses, references), "cider": cider_d(hypotheses, references)}


# Few words, so that texts share n-grams and repeat them.
texts = st.lists(st.sampled_from(["mild", "moderate", "crowding", "of", "nuclei", "is"]), max_size=9)
spoken = texts.filter(bool)
image_texts = st.lists(st.tuples(texts, st.lists(spoken, min_size=1, max_size=4)), min_size=1, max_size=6)


# Worked examples


def test_bleu_clips_counts_as_in_its_paper():
    hypothesis = words("the the the the the the the")
    references = [words("the cat is on the mat", "there is a cat on the mat")]
    # 7 words, of which a reference has at most 2; the closest length is 7, so nothing for brevity.
    assert corpus_bleu(hypothesis, references)[0] == pytest.approx(2 / 7)


def test_bleu_of_a_worked_example():
    hypotheses = words("polarity is lost", "there is a mild degree of crowding")
    references = [words("polarity is completely lost"), words("crowded", "there is a mild degree of crowding")]
    # Matches: 3 + 7 of 3 + 7 words; 1 + 6 of 2 + 6 pairs; 0 + 5 of 1 + 5 triples; 0 + 4 of 0 + 4 quadruples.
    # 10 words against 4 + 7: brevity penalty exp(1 - 11 / 10).
    penalty = math.exp(-0.1)
    expected = [penalty, penalty * (7 / 8) ** (1 / 2), penalty * (7 / 8 * 5 / 6) ** (1 / 3)]
    expected.append(penalty * (7 / 8 * 5 / 6 * 4 / 4) ** (1 / 4))
    assert corpus_bleu(hypotheses, references) == pytest.approx(expected, rel=1e-6)
    assert expected[3] == pytest.approx(0.836137, abs=1e-6)


def test_of_two_equally_close_references_the_shorter_counts_for_brevity():
    # 3 words against 2 and 4: both differ by one. With 2 there is no penalty, so BLEU-1 is 3 / 3.
    assert corpus_bleu(words("a b c"), [words("a b c d", "a b")])[0] == pytest.approx(1)


def test_rouge_l_of_worked_examples():
    # 3 words in common of 3 said and 4 expected: P = 1, R = 3/4; F = (1 + 1.44) P R / (R + 1.44 P) = 1.83 / 2.19.
    assert rouge_l(words("polarity is lost"), [words("polarity is completely lost")]) == pytest.approx(1.83 / 2.19)
    # The best precision and the best recall may come from different references: P = 1 from the first, R = 1 from the
    # second.
    assert rouge_l(words("a b"), [words("a b c d", "b")]) == pytest.approx(1)
    assert rouge_l(words("a b", "c"), [words("a b"), words("d")]) == pytest.approx(0.5)


def test_cider_d_of_a_worked_example():
    hypotheses = words("mild crowding", "severe")
    references = [words("mild crowding"), words("severe crowding")]
    # "crowding" is in both images and weighs log(2/2) = 0; all else weighs log 2.
    # Image 1: cosine 1 for words and for pairs, no triples: (1 + 1 + 0 + 0) / 4.
    # Image 2: cosine 1 for words, 0 for the rest; one word too short: (1 + 0 + 0 + 0) / 4 * exp(-1 / 72).
    expected = 10 * (0.5 + 0.25 * math.exp(-1 / 72)) / 2
    assert cider_d(hypotheses, references) == pytest.approx(expected)
    assert coco_caption(hypotheses, references)["cider"] == pytest.approx(expected)


def test_cider_d_of_one_image_is_0_because_nothing_is_rare():
    assert cider_d(words("mild crowding"), [words("mild crowding")]) == 0


@pytest.mark.parametrize("score", [corpus_bleu, rouge_l, cider_d])
def test_lists_of_different_length_and_images_without_reference_are_refused(score):
    with pytest.raises(ValueError):
        score(words("a", "b"), [words("a")])
    with pytest.raises(ValueError):
        score(words("a"), [[]])


# The independent implementation


@settings(max_examples=300, deadline=None)
@given(image_texts)
def test_scores_equal_coco_caption_on_random_texts(pairs):
    hypotheses, references = zip(*pairs)
    ours, theirs = our_scores(hypotheses, references), coco_caption(hypotheses, references)
    for name, score in theirs.items():
        assert ours[name] == pytest.approx(score, rel=1e-6, abs=1e-12), name


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(texts, min_size=1, max_size=4))
def test_rouge_l_equals_coco_caption_where_texts_are_empty(hypothesis, references):
    theirs = Rouge().compute_score({0: [" ".join(text) for text in references]}, {0: [" ".join(hypothesis)]})[0]
    assert rouge_l([hypothesis], [references]) == pytest.approx(float(theirs))


@settings(max_examples=200, deadline=None)
@given(texts, texts)
def test_common_subsequence_equals_the_textbook_table(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, word in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
    assert longest_common_subsequence(first, second) == table[-1, -1]


# Properties


@settings(max_examples=100, deadline=None)
@given(image_texts, st.randoms(use_true_random=False))
def test_scores_are_bounded_and_do_not_depend_on_the_order(pairs, shuffler):
    scores = our_scores(*zip(*pairs))
    assert all(0 <= score <= (10 if name == "cider" else 1) + 1e-9 for name, score in scores.items())
    shuffled = [(hypothesis, shuffler.sample(references, len(references))) for hypothesis, references in pairs]
    shuffler.shuffle(shuffled)
    assert our_scores(*zip(*shuffled)) == scores  # to the last bit


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(spoken, min_size=1, max_size=3), min_size=1, max_size=6))
def test_repeating_a_reference_is_perfect(references):
    hypotheses = [texts[0] for texts in references]
    scores = our_scores(hypotheses, references)
    assert scores["bleu1"] == pytest.approx(1) and scores["rouge_l"] == 1
    if all(len(hypothesis) >= 4 for hypothesis in hypotheses):
        assert scores["bleu4"] == pytest.approx(1)


# The diagnosis

CONCLUSIONS = {"low": {"low grade": 90, "high grade": 2}, "high": {"high grade": 50, "high grade carcinoma": 7}}
CLASSES = ["low", "high", "none"]


def test_a_conclusion_names_the_class_where_it_is_more_frequent():
    class_of = classes_of_conclusions(CONCLUSIONS)
    assert class_of == {"low grade": "low", "high grade": "high", "high grade carcinoma": "high"}
    assert classes_of_conclusions({"b": {"x": 3}, "a": {"x": 3}}) == {"x": "a"}
    assert conclusion_class(["high", "grade", "carcinoma"], class_of) == "high"
    assert conclusion_class(["high"], class_of) is None
    assert conclusion_class([], class_of) is None


def test_diagnosis_scores_of_a_worked_example():
    truth = ["low", "low", "low", "high"]
    predicted = ["low", "low", "high", None]
    matrix = confusion_matrix(truth, predicted, CLASSES)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert accuracy(truth, predicted) == 0.5
    # F1 of low: 2 * 2 / (3 true + 2 predicted) = 0.8; of high: 0; "none" does not occur and does not count.
    assert macro_f1(matrix) == pytest.approx(0.4)


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(InputError, match=r"label 'hihg' is not one of the classes; did you mean 'high'\?"):
        confusion_matrix(["hihg"], ["low"], CLASSES)


def test_scores_of_no_prediction_are_not_defined():
    with pytest.raises(ValueError):
        accuracy([], [])
    with pytest.raises(ValueError):
        macro_f1(confusion_matrix([], [], CLASSES))


# Whole reports

TOPICS = ["crowding", "conclusion"]


def image(key, report, references, label=None, predicted_label=None):
    return ScoredImage(key=key, label=label, predicted_label=predicted_label, report=report, references=references)


EXAMPLE = [
    image(
        "a",
        {"crowding": "Nuclei are mildly crowded.", "conclusion": "Low grade."},
        [{"crowding": "nuclei are mildly crowded", "conclusion": "low grade"}],
        "low",
        "low",
    ),
    image(
        "b",
        {"crowding": "nuclei are severely crowded", "conclusion": "high grade"},
        [{"crowding": "crowding is severe", "conclusion": "high grade"}, {"conclusion": "high grade carcinoma"}],
        "high",
        "low",
    ),
    # Nobody described crowding here, so what is said of it is not scored.
    image("c", {"crowding": "mild", "conclusion": "grade high"}, [{"conclusion": "high grade"}], "high", "high"),
    image("d", {"crowding": "nuclei are crowded"}, [{"crowding": "nuclei are crowded"}]),
]


def test_scores_of_a_worked_set():
    scores = score_reports(EXAMPLE, TOPICS, CONCLUSIONS, CLASSES)
    captions = words(
        "nuclei are mildly crowded low grade",
        "nuclei are severely crowded high grade",
        "grade high",
        "nuclei are crowded",
    )
    references = [
        words("nuclei are mildly crowded low grade"),
        words("crowding is severe high grade", "high grade carcinoma"),
        words("high grade"),
        words("nuclei are crowded"),
    ]
    expected = our_scores(captions, references)
    assert {name: scores[name] for name in expected} == expected
    assert scores["images"] == 4
    assert scores["dca"] == pytest.approx(2 / 3)  # "grade high" is no training conclusion; "d" has no label
    assert scores["label_accuracy"] == pytest.approx(2 / 3)
    # M said low, low, high for low, high, high: F1 of low 2 / (1 + 2), of high 2 / (2 + 1).
    assert scores["macro_f1"] == pytest.approx(2 / 3)
    # The reports said low, high, nothing: F1 of low 2 / (1 + 1), of high 2 / (2 + 1).
    assert scores["dca_macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["exact/crowding"] == pytest.approx(2 / 3)  # a and d; b said it otherwise
    assert scores["exact/conclusion"] == pytest.approx(2 / 3)  # a and b
    assert "bleu4/crowding" in scores
    assert "bleu4/conclusion" not in scores  # no reference has four words there
    matrices = confusion_matrices(EXAMPLE, CONCLUSIONS, CLASSES)
    assert matrices["label"].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert matrices["conclusion"].tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert said_class(EXAMPLE[0], classes_of_conclusions(CONCLUSIONS)) == "low"


def test_scores_that_have_nothing_to_go_by_are_absent():
    diagnosis = {"dca", "dca_macro_f1", "label_accuracy", "macro_f1"}
    unlabelled = [replace(one, label=None) for one in EXAMPLE]
    assert not diagnosis & set(score_reports(unlabelled, TOPICS, CONCLUSIONS, CLASSES))
    without_classifier = [replace(one, predicted_label=None) for one in EXAMPLE]
    assert diagnosis & set(score_reports(without_classifier, TOPICS, CONCLUSIONS, CLASSES)) == {"dca", "dca_macro_f1"}
    no_conclusion = score_reports(EXAMPLE, ["crowding"], {}, CLASSES)
    assert diagnosis & set(no_conclusion) == {"label_accuracy", "macro_f1"}
    undescribed = [replace(one, references=[{}, {"crowding": "..."}]) for one in EXAMPLE]
    assert set(score_reports(undescribed, TOPICS, CONCLUSIONS, CLASSES)) == {"images", *diagnosis}
    assert score_reports([], TOPICS, CONCLUSIONS, CLASSES) == {"images": 0}


def test_an_image_that_is_scored_twice_is_refused():
    with pytest.raises(ValueError, match="'a' is scored twice"):
        score_reports([*EXAMPLE, EXAMPLE[0]], TOPICS, CONCLUSIONS, CLASSES)


def test_people_are_compared_where_two_described_the_image():
    (compared,) = people_reports(EXAMPLE, TOPICS)
    assert compared.key == "b" and compared.predicted_label is None
    assert compared.report == EXAMPLE[1].references[0] and compared.references == EXAMPLE[1].references[1:]
    scores = people_score(EXAMPLE, TOPICS, CONCLUSIONS, CLASSES)
    # The other reference says nothing of crowding: "high grade" against "high grade carcinoma", P = 1, R = 2/3.
    assert scores is not None and scores["rouge_l"] == pytest.approx(2.44 * 2 / 3 / (2 / 3 + 1.44))
    assert scores["dca"] == 1
    assert people_score(EXAMPLE[2:], TOPICS, CONCLUSIONS, CLASSES) is None


def test_the_oracle_says_the_most_frequent_wording_of_the_true_grade():
    reports = [{"crowding": "Mild crowding."}, {"crowding": "nuclei are mildly crowded"}, {"crowding": "mild crowding"}]
    other = [{"crowding": "b is severe"}, {"crowding": "a is severe"}, {"conclusion": "high grade"}]
    wordings = count_wordings([({"crowding": "mild"}, reports), ({"crowding": "severe", "conclusion": "high"}, other)])
    assert wordings["crowding"]["mild"] == {"mild crowding": 2, "nuclei are mildly crowded": 1}
    grades = {
        "a": {"crowding": "mild", "conclusion": "low"},  # training has no wording of "low"
        "b": {"crowding": "severe", "conclusion": "high"},
        "c": {},
    }
    told = oracle_reports(EXAMPLE, grades, wordings)
    assert [(one.key, one.report) for one in told] == [
        ("a", {"crowding": "mild crowding"}),
        ("b", {"crowding": "a is severe", "conclusion": "high grade"}),
    ]
    assert all(one.predicted_label is None for one in told)
    assert told[0].references == EXAMPLE[0].references


sentence = texts.map(" ".join)
report = st.dictionaries(st.sampled_from(TOPICS), sentence)
images = st.lists(
    st.tuples(report, st.lists(report, max_size=3), st.sampled_from([None, "low", "high"]), st.sampled_from(CLASSES)),
    max_size=5,
).map(lambda rows: [image(str(number), *row) for number, row in enumerate(rows)])


@settings(max_examples=60, deadline=None)
@given(images, st.randoms(use_true_random=False))
def test_any_set_of_images_can_be_scored_in_any_order(some, shuffler):
    scores = score_reports(some, TOPICS, CONCLUSIONS, CLASSES)
    assert all(math.isfinite(score) for score in scores.values())
    shuffled = shuffler.sample(some, len(some))
    assert score_reports(shuffled, TOPICS, CONCLUSIONS, CLASSES) == scores
    assert people_score(shuffled, TOPICS, CONCLUSIONS, CLASSES) == people_score(some, TOPICS, CONCLUSIONS, CLASSES)


# Real reports; the published figures of these sets are in the README.md beside them

BLADDER_TOPICS = ["nuclear_feature", "nuclear_crowding", "polarity", "mitosis", "nucleoli", "conclusion"]


def bladder_images() -> tuple[list[ScoredImage], dict[str, dict[str, str]]]:
    """The real reports, and the true grade of each topic by image. Hyphens are blanks, as in the published figures."""
    records = json.loads((shared_data("bladder_reports_text") / "segmented.json").read_text(encoding="utf-8"))
    found, grades = [], {}
    for record in records:
        references = [{topic: text.replace("-", " ") for topic, text, _ in report} for report in record["reports"]]
        found.append(image(record["image_id"], {}, references, record["conclusion"]))
        grades[record["image_id"]] = {topic: grade for report in record["reports"] for topic, _, grade in report}
    assert len(found) == len(grades) == 1889
    return found, grades


def rounded(scores, *names: str) -> list[float]:
    return [round(scores[name], 3) for name in names]


@pytest.mark.slow
def test_people_and_oracle_score_on_real_bladder_reports_as_published():
    found, grades = bladder_images()
    wordings = count_wordings((grades[one.key], one.references) for one in found)
    conclusions = wordings["conclusion"]
    classes = sorted(conclusions)
    people = people_score(found, BLADDER_TOPICS, conclusions, classes)
    assert people is not None
    assert rounded(people, "bleu4", "rouge_l", "cider") == [0.682, 0.684, 1.739]
    oracle = score_reports(oracle_reports(found, grades, wordings), BLADDER_TOPICS, conclusions, classes)
    assert rounded(oracle, "bleu4", "rouge_l", "cider") == [0.756, 0.727, 2.026]
    assert people["dca"] == oracle["dca"] == 1


def test_scores_equal_coco_caption_on_real_bladder_reports():
    found, _ = bladder_images()
    some = random.Random(0).sample(found, 300)
    captions = [
        [[word for topic in report for word in tokenize(report[topic])] for report in one.references] for one in some
    ]
    hypotheses, references = [texts[0] for texts in captions], [texts[1:] for texts in captions]
    assert our_scores(hypotheses, references) == pytest.approx(coco_caption(hypotheses, references), rel=1e-6)


def test_floors_on_real_nuclei_reports_are_as_published():
    lines = (shared_data("nuclei_he") / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    topics = ["pleomorphism", "crowding", "conclusion"]
    found = [image(one["image"], {}, one["reports"], one["label"]) for one in records if one["split"] == "test"]
    assert len(found) == 22
    conclusions = count_wordings(({"conclusion": one["label"]}, one["reports"]) for one in records)["conclusion"]
    people = people_score(found, topics, conclusions, sorted(conclusions))
    assert people is not None and rounded(people, "bleu4") == [0.546]
    # The report that is most frequent in training and validation, said of every image.
    spoken = [json.dumps(report) for one in records if one["split"] != "test" for report in one["reports"]]
    frequent = json.loads(max(sorted(set(spoken)), key=spoken.count))
    same = score_reports([replace(one, report=frequent) for one in found], topics, conclusions, sorted(conclusions))
    assert rounded(same, "bleu4") == [0.533]
    majority = sum(one.label == frequent["conclusion"] for one in found) / len(found)
    assert same["dca"] == pytest.approx(majority)
