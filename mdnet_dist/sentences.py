"""A whole report as one sentence (`data.sentences: report`): joined for the network, split again for scores and people.

The network says the sentences of all topics in one, the conclusion last. What it says is split into two topics:
"conclusion", read off its end, and "report", all before it. People's reports are joined in the same way, so that the
words of a report, and with them all scores of whole captions, stay what they are topic by topic. One thing differs: of
an image on one of whose topics nobody spoke, what the network says on it cannot be told apart in "report" and counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mdnet_dist.shards import CONCLUSION, Report

REPORT = "report"
"""The topic of all that is said before the conclusion."""


def joining_order(topics: Sequence[str]) -> list[str]:
    """The topics in the order in which one sentence says them: as given, the conclusion last."""
    return sorted(topics, key=lambda topic: topic == CONCLUSION)  # stable


def joined_topics(topics: Sequence[str]) -> list[str]:
    """What becomes of the topics of a report that is one sentence."""
    others = [REPORT] if any(topic != CONCLUSION for topic in topics) else []
    return others + [CONCLUSION] * (CONCLUSION in topics)


def as_one_sentence(report: Report, topics: Sequence[str]) -> str:
    """The sentences of a report joined in the order of the topics; empty where it has none of them."""
    return " ".join(report[topic] for topic in topics if topic in report)


def join_topics(report: Report, topics: Sequence[str]) -> Report:
    """A report by people in the topics of `joined_topics`, those without a sentence left out."""
    said = as_one_sentence(report, [topic for topic in topics if topic != CONCLUSION])
    joined = {REPORT: said} if said else {}
    if CONCLUSION in topics and CONCLUSION in report:
        joined[CONCLUSION] = report[CONCLUSION]
    return joined


def conclusion_start(words: Sequence[str], conclusions: Collection[str]) -> int:
    """Where in a generated report the conclusion begins: the longest end of it that is a conclusion of training.

    Args:
        conclusions: sentences, their tokens joined by spaces.

    Returns:
        the place of its first word; the number of words where no end of the report is a conclusion.
    """
    for start in range(len(words)):
        if " ".join(words[start:]) in conclusions:
            return start
    return len(words)
