"""A whole report as one sentence: joined, split again, and scored as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist.metrics.reports import ScoredImage, people_score, score_reports
from mdnet_dist.sentences import (
    REPORT,
    as_one_sentence,
    conclusion_start,
    join_topics,
    joined_topics,
    joining_order,
)
from mdnet_dist.shards import CONCLUSION, Report
from mdnet_dist.vocabulary import tokenize

TOPICS = ["size", "crowding", CONCLUSION]
CONCLUSIONS = {"low": {"low grade": 3, "papillary , low grade": 1}, "high": {"high grade": 2}}


def test_the_conclusion_is_said_last() -> None:
    assert joining_order(["size", CONCLUSION, "crowding"]) == ["size", "crowding", CONCLUSION]
    assert joining_order(TOPICS) == TOPICS
    assert joining_order(["size"]) == ["size"]


@pytest.mark.parametrize(
    ("topics", "expected"),
    [(TOPICS, [REPORT, CONCLUSION]), (["size"], [REPORT]), ([CONCLUSION], [CONCLUSION]), ([], [])],
)
def test_what_becomes_of_the_topics(topics: list[str], expected: list[str]) -> None:
    assert joined_topics(topics) == expected


def test_topics_that_a_report_lacks_are_left_out() -> None:
    report = {CONCLUSION: "low grade", "crowding": "none seen"}
    assert as_one_sentence(report, TOPICS) == "none seen low grade"
    assert join_topics(report, TOPICS) == {REPORT: "none seen", CONCLUSION: "low grade"}
    assert join_topics({CONCLUSION: "low grade"}, TOPICS) == {CONCLUSION: "low grade"}
    assert join_topics({"size": "large"}, TOPICS) == {REPORT: "large"}
    assert as_one_sentence({}, TOPICS) == "" and join_topics({}, TOPICS) == {}


@pytest.mark.parametrize(
    ("said", "start"),
    [
        ("nuclei vary low grade", 2),
        ("nuclei vary papillary low grade", 2),  # the longer of two that fit
        ("low grade", 0),
        ("low grade nuclei vary", 4),  # not at the end
        ("low grade high grade", 2),
        ("", 0),
        ("grade", 1),
    ],
)
def test_the_conclusion_is_the_longest_end_that_is_one(said: str, start: int) -> None:
    assert conclusion_start(said.split(), {"low grade", "papillary low grade", "high grade"}) == start


words = st.lists(st.sampled_from(["nuclei", "large", "small", "mild", "crowded"]), min_size=1, max_size=6).map(" ".join)
reports = st.fixed_dictionaries(
    {"size": words, "crowding": words, CONCLUSION: st.sampled_from(["low grade", "papillary, low grade", "high grade"])}
)


some_topics = reports.flatmap(
    lambda report: st.sets(st.sampled_from(TOPICS)).map(
        lambda left_out: {t: report[t] for t in TOPICS if t not in left_out}
    )
)


def joined_image(image: ScoredImage) -> ScoredImage:
    references = [join_topics(reference, TOPICS) for reference in image.references]
    return replace(image, report=join_topics(image.report, TOPICS), references=references)


@settings(max_examples=60, deadline=None)  # the first call may load WordNet for METEOR
@given(st.lists(st.tuples(reports, reports, st.lists(some_topics, max_size=2)), min_size=1, max_size=3))
def test_captions_score_the_same_joined_or_by_topic(said: list[tuple[Report, Report, list[Report]]]) -> None:
    """All scores of captions and of the diagnosis, number by number; what people say of each other too.

    Somebody describes every topic of an image here, the others what they like.
    """
    by_topic = [
        ScoredImage(key=str(i), label="low", predicted_label="high", report=report, references=[*others, reference])
        for i, (report, reference, others) in enumerate(said)
    ]
    joined = [joined_image(image) for image in by_topic]
    one, other = (
        score_reports(images, topics, CONCLUSIONS, ["low", "high"]) for images, topics in both(by_topic, joined)
    )
    compare_captions(one, other)
    # What people say of each other, where the first one's topics are all described by those to whom it is compared.
    told = [replace(image, references=[*image.references[::-1], image.report]) for image in by_topic]
    people = [
        people_score(images, topics, CONCLUSIONS, ["low", "high"])
        for images, topics in both(told, [joined_image(image) for image in told])
    ]
    assert people[0] is not None and people[1] is not None
    compare_captions(people[0], people[1])


def both(by_topic: list[ScoredImage], joined: list[ScoredImage]) -> list[tuple[list[ScoredImage], list[str]]]:
    return [(by_topic, TOPICS), (joined, joined_topics(TOPICS))]


def compare_captions(one: dict[str, float], other: dict[str, float]) -> None:
    whole = [name for name in one if "/" not in name]
    assert {"bleu4", "rouge_l", "cider", "dca"} <= set(whole)
    assert [one[name] for name in whole] == [other[name] for name in whole]


def test_what_nobody_describes_can_be_left_out_by_topic_only() -> None:
    image = ScoredImage(
        key="0",
        label="low",
        predicted_label=None,
        report={"size": "large", "crowding": "mild", CONCLUSION: "low grade"},
        references=[{"size": "large", CONCLUSION: "low grade"}],
    )
    by_topic, joined = (
        score_reports(images, topics, CONCLUSIONS, ["low", "high"])
        for images, topics in both([image], [joined_image(image)])
    )
    assert by_topic["bleu1"] == pytest.approx(1) and joined["bleu1"] == pytest.approx(3 / 4)
    assert by_topic["dca"] == joined["dca"] == 1


@given(reports)
def test_joined_words_are_split_where_they_were_joined(report: Report) -> None:
    """Where no other conclusion ends with what comes before it."""
    known = {" ".join(tokenize(sentence)) for sentence in ("low grade", "papillary, low grade", "high grade")}
    said = tokenize(as_one_sentence(report, TOPICS))
    start = conclusion_start(said, known)
    expected = join_topics(report, TOPICS)
    assert said[:start] == tokenize(expected[REPORT])
    assert said[start:] == tokenize(expected[CONCLUSION])
