"""Images found by a sentence: how probable the network makes it for each image, and how well that finds the right ones.

A sentence's log-likelihood given an image is the sum over its tokens, teacher-forced (`LanguageModel.forward`). For an
image all sentences are scored in one pass over its map; distinct sentences are scored once, as reports repeat them.

Shapes: B images, K sentences of a report, Q sentences that are asked for, T tokens, P map positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdnet_dist.data import Encoder
from mdnet_dist.errors import InputError, nearest
from mdnet_dist.export import ModelCard
from mdnet_dist.images import decode_image
from mdnet_dist.model.language_model import LanguageModel, Told
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.predict import Answers, answers_of, as_batch, prepare_image, prepare_mask
from mdnet_dist.reading import RawSample
from mdnet_dist.shards import Report
from mdnet_dist.vocabulary import END, PAD, SPECIAL_WORDS, Vocabulary, tokenize

RANKS = (1, 5, 10)
"""k of recall@k."""
MAX_QUERIES = 1000
"""Reports that are asked for: of larger parts those whose keys have the smallest SHA-256."""
MAX_WORDINGS = 64
"""Sentences of one topic that a query stands for, at most."""
BATCH = 32
"""Images that are looked at at once."""
CHUNK = 8
"""Sentences of each topic that are scored at once; bounds memory."""

Sentence = tuple[int, tuple[int, ...]]
"""Which of the network's K sentences it is, and its tokens, END included."""


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What is asked for when the images of a part are looked for by their own reports."""

    sentences: list[Sentence]  # distinct, sorted
    reports: dict[str, list[int]]  # by key of the image: which sentences its first report consists of
    images: list[set[str]]  # of each sentence: the keys of all images whose references have it
    topics: list[str]  # names of the K sentences


def collect_queries(
    references: Iterable[tuple[str, Sequence[Report]]], encoder: Encoder, topics: Sequence[str]
) -> Queries | None:
    """The queries of a part: the first report of each image.

    Args:
        references: of each image its key and its reports.
        topics: names of the K sentences.

    Returns:
        None where no image has a report.
    """
    said: dict[str, list[list[Sentence]]] = {}
    for key, reports in references:
        encoded = [
            [(k, tuple(sentence)) for k, sentence in enumerate(encoder.sentences(report)) if sentence]
            for report in reports
        ]
        if encoded and encoded[0]:
            said[key] = encoded
    asked = sorted(sorted(said, key=lambda key: hashlib.sha256(key.encode()).digest())[:MAX_QUERIES])
    sentences = sorted({sentence for key in asked for sentence in said[key][0]})
    if not sentences:
        return None
    number = {sentence: place for place, sentence in enumerate(sentences)}
    images: list[set[str]] = [set() for _ in sentences]
    for key, encoded in said.items():
        for sentence in {sentence for report in encoded for sentence in report} & number.keys():
            images[number[sentence]].add(key)
    reports_of = {key: [number[sentence] for sentence in said[key][0]] for key in asked}
    return Queries(sentences=sentences, reports=reports_of, images=images, topics=list(topics))


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, features: Tensor, sharpening_map: Tensor | None, sentences: Sequence[Sentence]
) -> NDArray[np.float64]:
    """The log-likelihood of each sentence given each image: (B, Q).

    Args:
        features: (B, C, h, w).
        sharpening_map: (B, P), or None.
    """
    K = model.topic_embedding.num_embeddings
    of_topic = [[place for place, (k, _) in enumerate(sentences) if k == topic] for topic in range(K)]
    result = np.zeros((len(features), len(sentences)))
    for start in range(0, max(map(len, of_topic)), CHUNK):
        # Laid out as reports: the r-th report says the r-th sentence of every topic.
        places = [of[start : start + CHUNK] for of in of_topic]
        R = max(map(len, places))
        T = max(len(sentences[place][1]) for of in places for place in of)
        tokens = torch.full((R, K, T), PAD, dtype=torch.long)
        for k, of in enumerate(places):
            for r, place in enumerate(of):
                tokens[r, k, : len(sentences[place][1])] = torch.tensor(sentences[place][1])
        told = _tell(model, features, sharpening_map, tokens.expand(len(features), R, K, T))
        losses = model.word_losses(told).double()
        sums = losses.new_zeros(len(features), R * K).scatter_add_(1, told.places // T, losses)
        scores = -sums.view(-1, R, K).cpu().numpy()
        for k, of in enumerate(places):
            result[:, of] = scores[:, : len(of), k]
    return result


@torch.no_grad()
def _tell(model: LanguageModel, features: Tensor, sharpening_map: Tensor | None, tokens: Tensor) -> Told:
    """Given reports, teacher-forced. Args: tokens: (B, R, K, T), on the CPU, PAD behind the last token."""
    return model(features, sharpening_map, tokens.to(features.device), (tokens != PAD).sum(3))


# -------------------------------------------------------------------------------------------------- by one sentence


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image and how well a sentence fits it."""

    key: str
    image: NDArray[np.uint8]  # (S, S, 3), as the network saw it
    mask: NDArray[np.bool_] | None  # (S, S)
    label: str | None
    reference: str | None  # what the first report says on the topic
    said: str  # what the network says on it
    probability: float  # that the network says one of the sentences that the query stands for
    attention: NDArray[np.float64]  # (h, w): where it looked for the most probable of them, mean over its tokens


def query_tokens(query: str, vocabulary: Vocabulary) -> tuple[list[int], list[str]]:
    """The tokens of a sentence or a part of one, without END, and those of its words that the network does not know.

    Raises:
        InputError: no word, or none that the network knows.
    """
    words = tokenize(query)
    vocabulary_words = set(vocabulary.words)
    known = [word for word in words if word in vocabulary_words]
    unknown = [word for word in words if word not in vocabulary_words]
    if not known:
        hints = "; ".join(f"'{word}': {nearest(word, vocabulary.words[len(SPECIAL_WORDS) :])}" for word in unknown[:3])
        raise InputError(f"query '{query:.100}': the network knows no word of it ({hints or 'it has none'})")
    return vocabulary.encode(known)[:-1], unknown


def wordings_of(query: Sequence[int], reports: Iterable[Report], encoder: Encoder) -> list[Sentence]:
    """The sentences that a query stands for.

    A part of a sentence ("marked pleomorphism") has no probability of its own: what comes before it decides. So it
    stands for all sentences of people's reports that contain it; where none does, for those that contain its words in
    any order; and where none does that either, for itself as a sentence on any topic.

    Args:
        query: tokens, without END.

    Returns:
        of each of the network's K sentences the `MAX_WORDINGS` that people use most.
    """
    counts: dict[Sentence, int] = {}
    for report in reports:
        for k, tokens in enumerate(encoder.sentences(report)):
            if tokens:
                counts[k, tuple(tokens)] = counts.get((k, tuple(tokens)), 0) + 1
    wanted = tuple(query)

    def contains(tokens: tuple[int, ...]) -> bool:
        return any(tokens[at : at + len(wanted)] == wanted for at in range(len(tokens) - len(wanted) + 1))

    found = [one for one in counts if contains(one[1])] or [one for one in counts if set(wanted) <= set(one[1])]
    K = len(encoder.sentences({}))
    if not found:
        return [(k, (*wanted, END)) for k in range(K)]
    ranked = sorted(found, key=lambda one: (-counts[one], one))
    return sorted(one for k in range(K) for one in [one for one in ranked if one[0] == k][:MAX_WORDINGS])


def find_images(
    network: MDNet,
    card: ModelCard,
    read: Callable[[], Iterator[RawSample]],
    wordings: Sequence[Sentence],
    topic: str | None,
    top: int,
    device: torch.device | str = "cpu",
) -> tuple[str, list[Found]]:
    """The images for which the network most probably says one of some sentences on a topic, the best first.

    Args:
        read: begins to read the samples that are looked through; called twice.
        wordings: from `wordings_of`.
        topic: its name; None: of those that the wordings belong to the one that makes them most probable, in the mean
            of log-probabilities over the images.
        top: how many.

    Returns:
        the topic, and the images.

    Raises:
        InputError: no such topic, none of the wordings on it, no sample, or one that cannot be read.
    """
    model, names = network.language_model, card.sentences
    if model is None:
        raise InputError("the network says nothing: it was trained on a set without reports")
    if topic is not None and topic not in names:
        raise InputError(f"--topic {topic}: the network has no such topic; {nearest(topic, names)}")
    there = sorted({k for k, _ in wordings})
    if topic is not None and names.index(topic) not in there:
        raise InputError(f"--topic {topic}: nobody says that on it; on {', '.join(names[k] for k in there)} people do")
    keys: list[str] = []
    rows: list[NDArray[np.float64]] = []
    for batch in _batches(read()):
        _, answers = _answers(network, card, batch, device)
        keys += [sample.key for sample in batch]
        rows.append(log_likelihoods(model, answers.features, answers.sharpening_map, wordings))
    if not keys:
        raise InputError("no image to look through; name another part with --part")
    scores = np.concatenate(rows)  # (N, Q)
    of_topic = {k: [q for q, (of, _) in enumerate(wordings) if of == k] for k in there}
    together = {k: np.logaddexp.reduce(scores[:, of], axis=1) for k, of in of_topic.items()}
    number = names.index(topic) if topic is not None else max(there, key=lambda k: float(together[k].mean()))
    order = sorted(range(len(keys)), key=lambda n: (-together[number][n], keys[n]))[:top]
    best = {keys[n]: wordings[of_topic[number][int(scores[n, of_topic[number]].argmax())]] for n in order}
    probabilities = {keys[n]: float(np.exp(together[number][n])) for n in order}
    found: dict[str, Found] = {}
    for batch in _batches(sample for sample in read() if sample.key in best):
        squares, answers = _answers(network, card, batch, device)
        said = [best[sample.key][1] for sample in batch]
        tokens = torch.full((len(batch), 1, len(names), max(map(len, said))), PAD)
        for i, sentence in enumerate(said):
            tokens[i, 0, number, : len(sentence)] = torch.tensor(sentence)
        attention = _tell(model, answers.features, answers.sharpening_map, tokens).attention(tokens.to(device))
        for i, sample in enumerate(batch):
            references = [card.reference(report) for report in sample.record.reports]
            seen = attention[i, 0, number, : len(said[i])].mean(0).view(answers.features.shape[2:])
            found[sample.key] = Found(
                key=sample.key,
                image=squares[i],
                mask=prepare_mask(card, sample.mask, sample.where),
                label=sample.record.label,
                reference=next((report[names[number]] for report in references if names[number] in report), None),
                said=" ".join(answers.words[i].get(names[number], [])),
                probability=probabilities[sample.key],
                attention=seen.double().cpu().numpy(),
            )
    return names[number], [found[keys[n]] for n in order]


def _batches(samples: Iterator[RawSample]) -> Iterator[list[RawSample]]:
    while batch := list(islice(samples, BATCH)):
        yield batch


def _answers(
    network: MDNet, card: ModelCard, batch: Sequence[RawSample], device: torch.device | str
) -> tuple[list[NDArray[np.uint8]], Answers]:
    squares = [prepare_image(card, decode_image(sample.image, sample.where)) for sample in batch]
    return squares, answers_of(network, card, as_batch(squares, device))


# ------------------------------------------------------------------------------------------------------------ recall@k


def recalls(queries: Queries, likelihoods: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How often an image is found by its report, and images by a sentence that is true of them.

    Args:
        likelihoods: of each image of the part, by key: the log-likelihood of each sentence.

    Returns:
        - `recall_at_K`: the share of reports whose own image is among the K images that make them most probable;
        - `recall_at_10/TOPIC`: for each distinct sentence of the topic, the share of images with that very sentence
          among their references that the first 10 hold, of as many as 10 can hold; the mean over sentences;
        - `recall_at_K_chance`, `recall_at_10_chance/TOPIC`: what a random order scores.
        Images that are tied share their places: what is counted is the mean over all their orders.
    """
    keys = sorted(likelihoods)
    place = {key: number for number, key in enumerate(keys)}
    scores = np.array([likelihoods[key] for key in keys])  # (N, Q)
    N = len(keys)
    found: dict[str, float] = {}
    asked = [(key, numbers) for key, numbers in sorted(queries.reports.items()) if key in place]
    if not asked:  # damaged, all of them
        return found
    of_reports = [np.array([math.fsum(row) for row in scores[:, numbers]]) for _, numbers in asked]
    for k in RANKS:
        own = [recall(values, [place[key]], k) for values, (key, _) in zip(of_reports, asked)]
        found |= {f"recall_at_{k}": math.fsum(own) / len(own), f"recall_at_{k}_chance": min(1.0, k / N)}
    most = RANKS[-1]
    for number, topic in enumerate(queries.topics):
        of_topic = [q for q, (k, _) in enumerate(queries.sentences) if k == number]
        relevant = {q: sorted(place[key] for key in queries.images[q] if key in place) for q in of_topic}
        values = [recall(scores[:, q], relevant[q], most) for q in of_topic if relevant[q]]
        chance = [min(most, N) * len(of) / N / min(most, len(of)) for of in relevant.values() if of]
        if values:
            found[f"recall_at_{most}/{topic}"] = math.fsum(values) / len(values)
            found[f"recall_at_{most}_chance/{topic}"] = math.fsum(chance) / len(chance)
    return found


def recall(scores: NDArray[np.float64], relevant: Sequence[int], k: int) -> float:
    """The share of the relevant images that the k best hold, of as many as k can hold: in 0..1.

    Of images that are tied for the last places each is counted with the probability that a random order gives it one.

    Args:
        scores: (N), of each image.
        relevant: places of the images that are looked for, at least one.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)  # of a network that is not finite: last, all alike
    k = min(k, len(scores))
    last = np.partition(scores, len(scores) - k)[len(scores) - k]  # the k-th best
    better, tied = scores > last, scores == last
    share = (k - better.sum()) / tied.sum()
    of_relevant = np.asarray(relevant)
    hits = better[of_relevant].sum() + share * tied[of_relevant].sum()
    return float(hits / min(k, len(of_relevant)))
