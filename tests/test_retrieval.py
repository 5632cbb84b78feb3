"""Images found by a sentence: log-likelihoods against a plain loop, recall@k known by hand, the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mdnet_dist.data import Encoder, EvaluationStream
from mdnet_dist.errors import InputError
from mdnet_dist.evaluation import evaluate, score
from mdnet_dist.predict import answers_of
from mdnet_dist.retrieval import (
    Queries,
    collect_queries,
    find_images,
    log_likelihoods,
    query_tokens,
    recall,
    recalls,
    wordings_of,
)
from mdnet_dist.run_data import open_part
from mdnet_dist.saved import open_model, saved_config
from mdnet_dist.vocabulary import END, tokenize
from tests.saved import untrained_run
from tests.test_train import run
from tests.tiny import tiny_config, tiny_set


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_set(folder / "shards", test=11)
    return untrained_run(tiny_config(folder / "shards", folder / "runs"))[0]


def opened(folder: Path):
    network, card, _ = open_model(folder)
    config = saved_config(folder, card)
    return network, card, config, *open_part(config, card, "test")


# ---------------------------------------------------------------------------------------------------- log-likelihoods


def test_log_likelihoods_are_those_of_one_sentence_of_one_image_at_a_time(saved: Path) -> None:
    """The plain way: the words so far, the softmax of the next, its logarithm added up."""
    network, card, _, data, parts = opened(saved)
    queries = data.queries(parts)
    assert queries is not None
    assert len(queries.sentences) > 10
    [batch, *_] = EvaluationStream(data.encoder, data.manifest, parts, batch=4, ranks=1, rank=0)
    answers = answers_of(network, card, batch.images)
    model = network.language_model
    assert model is not None
    found = log_likelihoods(model, answers.features, answers.sharpening_map, queries.sentences)
    for i in (0, 3):
        sharpening_map = None if answers.sharpening_map is None else answers.sharpening_map[i : i + 1]
        view = model.look(answers.features[i : i + 1], sharpening_map)
        for q, (k, words) in enumerate(queries.sentences):
            total, state = 0.0, model.lstm(model.starts(view)[:, k : k + 1])[1]
            previous = 1  # START
            for word in words:
                context, _ = model.attend(view, state[0][0][:, None])
                output, state = model.lstm(model.word_embedding(torch.tensor([[previous]])), state)
                logits = model.word_logits(output, context)[0, 0]
                total += float(logits.detach().double().log_softmax(0)[word])
                previous = word
            assert found[i, q] == pytest.approx(total, abs=1e-4)


def test_queries_are_first_reports_and_relevant_is_whoever_says_the_same(saved: Path) -> None:
    _, card, _, data, parts = opened(saved)
    references = [(sample.key, sample.record.reports) for sample in data.samples_of(parts)]
    queries = collect_queries(references, data.encoder, card.topics)
    assert queries is not None
    assert len(set(queries.sentences)) == len(queries.sentences)
    for key, reports in references:
        first = [
            (k, tuple(card.vocabulary.encode(tokenize(reports[0][topic]))[:6]))
            for k, topic in enumerate(card.topics)
            if topic in reports[0]
        ]
        assert [queries.sentences[q] for q in queries.reports[key]] == first
    for q, (k, words) in enumerate(queries.sentences):
        says = {
            key
            for key, reports in references
            if any(tuple(data.encoder.sentences(report)[k]) == words for report in reports)
        }
        assert queries.images[q] == says
    assert collect_queries([("a", []), ("b", [{}])], data.encoder, card.topics) is None


def test_every_rank_count_gives_the_same_recall(saved: Path) -> None:
    network, card, _, data, parts = opened(saved)
    queries = data.queries(parts)
    found = []
    for ranks in (1, 3):
        predictions = []
        for rank in range(ranks):
            stream = EvaluationStream(data.encoder, data.manifest, parts, batch=4, ranks=ranks, rank=rank)
            # Each rank scores what it saw; alone they must not look for images that others have.
            predictions += evaluate(network, card, stream, device=torch.device("cpu"), queries=queries).predictions
        found.append(score(predictions, card, None, queries))
    assert found[0] == found[1]
    assert {"recall_at_1", "recall_at_10", "recall_at_10/crowding", "recall_at_5_chance"} <= set(found[0])


# ----------------------------------------------------------------------------------------------------------- recall@k


def test_recall_of_hand_made_scores() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.7])
    assert [recall(scores, [1], k) for k in (1, 2, 3)] == [1, 1, 1]
    assert [recall(scores, [2], k) for k in (1, 2, 3, 9)] == [0, 0, 1, 1]
    assert recall(scores, [1, 2], 2) == 0.5  # places 1 and 2 hold one of the two
    assert recall(scores, [0, 1, 2], 2) == 0.5  # two places cannot hold three: one of two
    assert recall(np.array([np.nan, 0.9, np.nan, 0.7]), [0], 3) == 0.5  # what is no number comes last
    tied = np.array([0.5, 0.5, 0.5, 0.9])
    assert recall(tied, [0], 2) == pytest.approx(1 / 3)  # one place is left for three that are alike
    assert recall(tied, [0, 1], 2) == pytest.approx(1 / 3)


def test_recalls_of_a_part_of_three_images() -> None:
    """Two topics; image a says sentences 0 and 2, b says 1 and 2, c says 1 and 3."""
    queries = Queries(
        sentences=[(0, (5, 2)), (0, (6, 2)), (1, (5, 2)), (1, (6, 2))],
        reports={"a": [0, 2], "b": [1, 2], "c": [1, 3]},
        images=[{"a"}, {"b", "c"}, {"a", "b"}, {"c"}],
        topics=["one", "two"],
    )
    likelihoods = {"a": (-1.0, -2.0, -1.0, -3.0), "b": (-2.0, -1.0, -1.5, -3.0), "c": (-3.0, -1.5, -4.0, -4.0)}
    found = recalls(queries, likelihoods)
    # a's report: a -2, b -3.5, c -7: found. b's: a -3, b -2.5, c -5.5: found. c's: a -5, b -4, c -5.5: last.
    assert found["recall_at_1"] == pytest.approx(2 / 3)
    assert found["recall_at_5"] == found["recall_at_10/one"] == 1
    assert found["recall_at_1_chance"] == pytest.approx(1 / 3)
    assert found["recall_at_10_chance/two"] == 1


scores_of_images = arrays(np.float64, st.integers(1, 12), elements=st.integers(0, 4).map(float))


@given(scores_of_images, st.data())
def test_recall_does_not_depend_on_the_order_and_grows_to_1(scores: np.ndarray, data: st.DataObject) -> None:
    N = len(scores)
    relevant = data.draw(st.lists(st.integers(0, N - 1), min_size=1, unique=True))
    order = np.array(data.draw(st.permutations(range(N))))
    place_of = {int(image): place for place, image in enumerate(order)}
    hits = []
    for k in range(1, N + 1):
        value = recall(scores, relevant, k)
        assert 0 <= value <= 1
        assert recall(scores[order], [place_of[one] for one in relevant], k) == pytest.approx(value)
        hits.append(value * min(k, len(relevant)))
    assert hits == sorted(hits) or np.allclose(hits, sorted(hits))
    assert recall(scores, relevant, N) == pytest.approx(1)
    # A random order finds each image with probability k / N, in the mean over which one is looked for.
    assert np.mean([recall(scores, [one], 1) for one in range(N)]) == pytest.approx(1 / N)


# ------------------------------------------------------------------------------------------------------- by a sentence


def test_a_part_of_a_sentence_stands_for_the_sentences_that_contain_it(saved: Path) -> None:
    _, card, _, data, _ = opened(saved)
    encoder: Encoder = data.encoder
    reports = [
        {"crowding": "few large nuclei"},
        {"crowding": "large nuclei"},
        {"crowding": "nuclei large"},
        {"pleomorphism": "large nuclei"},
        {"crowding": "large nuclei"},
    ]
    k = {topic: number for number, topic in enumerate(card.topics)}
    encoded = {text: tuple(encoder.sentence(text)) for report in reports for text in report.values()}
    query, unknown = query_tokens("Large nuclei, zebra", card.vocabulary)
    assert unknown == ["zebra"]
    assert query == list(encoded["large nuclei"][:-1])
    assert wordings_of(query, reports, encoder) == sorted(
        [
            (k["crowding"], encoded["few large nuclei"]),
            (k["crowding"], encoded["large nuclei"]),
            (k["pleomorphism"], encoded["large nuclei"]),
        ]
    )
    swapped = query_tokens("nuclei few", card.vocabulary)[0]
    assert wordings_of(swapped, reports, encoder) == [(k["crowding"], encoded["few large nuclei"])]
    never = query_tokens("marked severe", card.vocabulary)[0]
    assert wordings_of(never, reports, encoder) == [(number, (*never, END)) for number in range(len(card.topics))]
    with pytest.raises(
        InputError, match=r"query 'nucli zebra': the network knows no word of it \('nucli': did you mean"
    ):
        query_tokens("nucli zebra", card.vocabulary)


def test_images_come_in_the_order_of_their_probability(saved: Path) -> None:
    network, card, _, data, parts = opened(saved)
    k = card.topics.index("crowding")
    wordings = [(k, tuple(data.encoder.sentence(text))) for text in ("few large nuclei", "marked")]
    topic, found = find_images(network, card, lambda: data.samples_of(parts), wordings, None, 99)
    assert topic == "crowding"
    assert len(found) == 11
    assert [one.probability for one in found] == sorted((one.probability for one in found), reverse=True)
    model = network.language_model
    assert model is not None
    for batch in EvaluationStream(data.encoder, data.manifest, parts, batch=1, ranks=1, rank=0):
        answers = answers_of(network, card, batch.images)
        rows = log_likelihoods(model, answers.features, answers.sharpening_map, wordings)
        [one] = [one for one in found if one.key == batch.keys[0]]
        assert one.probability == pytest.approx(float(np.exp(rows[0]).sum()), rel=1e-4)
        assert one.attention.sum() == pytest.approx(1, abs=1e-5)
        assert one.label == batch.records[0].label
    with pytest.raises(InputError, match="--topic crowdin: the network has no such topic; did you mean 'crowding'"):
        find_images(network, card, lambda: data.samples_of(parts), wordings, "crowdin", 9)
    with pytest.raises(InputError, match="--topic conclusion: nobody says that on it; on crowding people do"):
        find_images(network, card, lambda: data.samples_of(parts), wordings, "conclusion", 9)
    silent = replace(card, topics=[], words=[]).build()
    with pytest.raises(InputError, match="says nothing"):
        find_images(silent, card, lambda: data.samples_of(parts), wordings, None, 9)


@pytest.mark.slow
def test_the_command(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "launch/retrieve.py", saved]
    finished = run(*command, "large nuclei", "--top", "5", "--out", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    content = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert [one["rank"] for one in content["found"]] == [1, 2, 3, 4, 5]
    assert content["topic"] in finished.stdout
    assert all(one["key"] in finished.stdout for one in content["found"])
    assert (tmp_path / "out" / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    for arguments, named in (
        (["zebra"], "query 'zebra': the network knows no word of it"),
        (["nuclei", "--top", "0"], "--top 0: must be at least 1"),
        (["nuclei", "--part", "nothing"], "nothing"),
    ):
        failed = run(*command, *arguments)
        assert failed.returncode == 2
        assert named in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
