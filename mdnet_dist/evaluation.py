"""Scoring a network on parts of a shard set: every sample once, over any number of ranks.

Shapes: B images, K topics, T tokens, P map positions, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mdnet_dist.console import say
from mdnet_dist.damage import DamageCount
from mdnet_dist.data import Batch
from mdnet_dist.distributed import gather, is_first, on_first, raise_together
from mdnet_dist.errors import InputError, Preempted
from mdnet_dist.export import ModelCard
from mdnet_dist.metrics.calibration import Reliability, fit_temperature, reliability
from mdnet_dist.metrics.diagnosis import classes_of_conclusions
from mdnet_dist.metrics.localization import (
    CLASS_MAP,
    SENTENCES,
    UNIFORM,
    Localization,
    evidence,
    localize,
    mean_localization,
    mean_of_maps,
    uniform,
)
from mdnet_dist.metrics.reports import ScoredImage, said_class, score_reports
from mdnet_dist.model.mdnet import NO_LABEL, MDNet
from mdnet_dist.predict import Answer, Answers, answers_of, predicted_class, prepare_mask, split_answers
from mdnet_dist.retrieval import Queries, log_likelihoods, recalls
from mdnet_dist.shards import CONCLUSION, Report


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A line of predictions.jsonl (docs/design.md section 3), with what scoring needs besides."""

    key: str
    patient: str
    label: str | None
    predicted_label: str | None
    probabilities: dict[str, float]  # of M, by class, at the card's temperature
    report: Report
    references: list[Report]  # by people, in the topics of `report`
    dca_correct: bool | None  # whether the generated conclusion names the label's class; None without either
    loss_m: float | None  # negative log-likelihood of the label
    loss_l: float  # of all tokens of the references, summed
    tokens: int  # that loss_l is the sum of
    logits: list[float]  # of M, in the order of the classes, before any temperature
    reports: list[Report] = field(default_factory=list)  # by people, in their own topics
    grades: dict[str, str] = field(default_factory=dict)  # true grades, where the set knows them
    localization: dict[str, Localization] = field(default_factory=dict)  # by map, where the image has a mask
    query_likelihoods: tuple[float, ...] = ()  # of each sentence of `Queries`, where images are looked for

    def scored(self) -> ScoredImage:
        """What the report metrics look at."""
        return ScoredImage(
            key=self.key,
            label=self.label,
            predicted_label=self.predicted_label,
            report=self.report,
            references=self.references,
        )

    def told(self) -> ScoredImage:
        """The image with people's reports in their own topics, for what people and the oracle score."""
        return replace(self.scored(), references=self.reports)

    def as_line(self) -> dict[str, Any]:
        """The JSON object of predictions.jsonl."""
        fields = asdict(self)
        for name in ("loss_m", "loss_l", "tokens", "logits", "reports", "grades", "localization", "query_likelihoods"):
            del fields[name]
        return fields


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What a picture of one report shows."""

    prediction: Prediction
    image: np.ndarray  # (S, S, 3) uint8
    mask: bytes | None  # PNG
    answer: Answer  # words, attention, class maps


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one or several parts."""

    metrics: dict[str, float]  # fractions, see `score_reports`; the same on every rank
    predictions: list[Prediction]  # sorted by key; on the first rank, empty on the others
    explained: list[Explained]  # of the first rank's first images
    damaged: list[str] = field(default_factory=list)  # what is wrong with each image that was not scored


def evaluate(
    network: MDNet,
    card: ModelCard,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    beam_width: int = 1,
    nltk_data: Path | None = None,
    pictures: int = 0,
    queries: Queries | None = None,
    most_damaged: float = 0.0,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Decode and score this rank's batches, then put all ranks' together. Collective.

    Args:
        network: in evaluation mode, on `device`.
        batches: from an `EvaluationStream`, references and all.
        nltk_data: where WordNet is, for METEOR.
        pictures: for how many of the first rank's images to keep the attention.
        queries: reports by which images are looked for; None does without `recall_at_...`.
        most_damaged: share of the images that may be damaged and left out (`Batch.damaged`); they are told of, and
            counted in the metric `damaged`.
        told_to_stop: asked before each batch.

    Raises:
        Preempted: some rank was told to stop.
        InputError: damaged data, or too much of it.
    """
    predictions: list[Prediction] = []
    explained: list[Explained] = []
    damaged: list[str] = []
    problem: InputError | Preempted | None = None
    try:
        for batch in batches:
            if told_to_stop():
                raise Preempted("stopped by a signal while scoring; --resume continues")
            damaged += batch.damaged
            if not batch.keys:
                continue
            done, shown = _predict(network, card, batch, device, beam_width, max(0, pictures - len(explained)), queries)
            predictions += done
            explained += shown
    except (InputError, Preempted) as error:
        problem = error
    raise_together(problem)
    gathered = sorted(
        (prediction for part in gather(predictions) for prediction in part), key=lambda prediction: prediction.key
    )
    left_out = [message for part in gather(damaged) for message in part]
    _tell_damaged(left_out, len(gathered) + len(left_out), most_damaged)
    metrics = on_first(lambda: score(gathered, card, nltk_data, queries))
    if left_out:
        metrics["damaged"] = float(len(left_out))
    return Evaluation(
        metrics=metrics, predictions=gathered if is_first() else [], explained=explained, damaged=left_out
    )


def _tell_damaged(messages: list[str], images: int, most_damaged: float) -> None:
    """Say how many images were not scored, and why. Args: messages: one for each of them, of all ranks.

    Raises:
        InputError: too many, or all.
    """
    if not messages:
        return
    count = DamageCount(most_damaged)
    new = count.add(images, messages)
    count.check()
    if len(messages) == images:
        raise InputError(f"all {images} images are damaged, so that none can be scored; first: {messages[0]}")
    say(f"{len(messages)} of {images} images are damaged and were not scored:")
    for message in new:
        say(f"  {message}")


def score(
    predictions: list[Prediction], card: ModelCard, nltk_data: Path | None = None, queries: Queries | None = None
) -> dict[str, float]:
    """All scores of some predictions, whatever their order."""
    metrics = score_reports(
        [prediction.scored() for prediction in predictions], card.topics, card.conclusions, card.classes, nltk_data
    )
    labelled = [prediction.loss_m for prediction in predictions if prediction.loss_m is not None]
    if found := reliability_of(predictions):
        metrics["ece"] = found.error
    if labelled:
        metrics["loss_m"] = math.fsum(labelled) / len(labelled)
    tokens = sum(prediction.tokens for prediction in predictions)
    if tokens:
        metrics["loss_l"] = math.fsum(prediction.loss_l for prediction in predictions) / tokens
    masked = [prediction.localization for prediction in predictions if prediction.localization]
    if masked:
        metrics |= {"masked_images": float(len(masked)), **mean_localization(masked)}
    if queries:
        metrics |= recalls(queries, {one.key: one.query_likelihoods for one in predictions})
    return metrics


def main_score(metrics: dict[str, float], name: str) -> float | None:
    """The number that decides which checkpoint is best (`EvaluateConfig.metric`); None where it was not measured."""
    if name == "dca_bleu4":
        parts = [metrics[part] for part in ("dca", "bleu4") if part in metrics]
        parts = parts or [metrics[part] for part in ("label_accuracy",) if part in metrics]
        return sum(parts) / len(parts) if parts else None
    return metrics.get(name)


def _predict(
    network: MDNet,
    card: ModelCard,
    batch: Batch,
    device: torch.device,
    beam_width: int,
    pictures: int,
    queries: Queries | None,
) -> tuple[list[Prediction], list[Explained]]:
    batch = batch.to(device)
    answers = answers_of(network, card, batch.images, beam_width)
    losses_m = F.cross_entropy(answers.logits, batch.labels.cpu(), ignore_index=NO_LABEL, reduction="none")
    losses_l = _losses_l(network, answers, batch)
    likelihoods = np.zeros((len(batch.keys), 0))
    if queries and network.language_model is not None:
        likelihoods = log_likelihoods(
            network.language_model, answers.features, answers.sharpening_map, queries.sentences
        )
    class_of = classes_of_conclusions(card.conclusions)
    predictions = []
    for i, (key, record) in enumerate(zip(batch.keys, batch.records)):
        labelled = record.label is not None
        prediction = Prediction(
            key=key,
            patient=record.patient,
            label=record.label,
            predicted_label=predicted_class(card, answers.logits[i]),
            probabilities=_by_class(card, answers.probabilities[i].tolist()),
            report={topic: " ".join(words) for topic, words in answers.words[i].items()},
            references=[card.reference(report) for report in record.reports],
            dca_correct=None,
            loss_m=float(losses_m[i]) if labelled else None,
            loss_l=float(losses_l[i]),
            tokens=int(batch.lengths[i].sum()),
            logits=answers.logits[i].tolist() if card.classes else [],
            reports=record.reports,
            grades=record.grades,
            localization=_localization(network, card, answers, i, batch.masks[i], key),
            query_likelihoods=tuple(likelihoods[i].tolist()),
        )
        if labelled and CONCLUSION in card.topics:
            prediction = replace(prediction, dca_correct=said_class(prediction.scored(), class_of) == record.label)
        predictions.append(prediction)
    kept = split_answers(network, card, answers, range(min(pictures, len(predictions))))
    explained = [
        Explained(
            prediction=predictions[i],
            image=batch.images[i].permute(1, 2, 0).cpu().numpy(),
            mask=batch.masks[i],
            answer=answer,
        )
        for i, answer in enumerate(kept)
    ]
    return predictions, explained


@torch.no_grad()
def _losses_l(network: MDNet, answers: Answers, batch: Batch) -> Tensor:
    """The loss of the references summed by image: (B)."""
    model = network.language_model
    if model is None:
        return torch.zeros(len(batch.keys))
    told = model(answers.features, answers.sharpening_map, batch.tokens, batch.lengths)
    return model.word_losses(told).sum(1).double().cpu()


@torch.no_grad()
def _localization(
    network: MDNet, card: ModelCard, answers: Answers, image: int, mask_file: bytes | None, key: str
) -> dict[str, Localization]:
    """How well the maps of one image agree with its mask: {map: scores}; empty where the mask tells nothing.

    A topic's map is the mean over the words of the generated sentence.
    """
    mask = prepare_mask(card, mask_file, f"mask of sample '{key}'")
    if mask is None or mask.all() or not mask.any():
        return {}
    h, w = answers.features.shape[2:]
    sentences = {
        topic: localize(answers.attention[image, k, : len(words)].mean(0).view(h, w).double().cpu().numpy(), mask)
        for k, (topic, words) in enumerate(answers.words[image].items())
        if words
    }
    found = dict(sentences)
    if sentences:
        found[SENTENCES] = mean_of_maps(sentences.values())
    if card.classes:
        maps = network.class_maps.maps(answers.features[image : image + 1])[0]
        predicted = maps[answers.logits[image].argmax()].view(h, w)
        found[CLASS_MAP] = localize(evidence(predicted.double().cpu().numpy()), mask)
    return {**found, UNIFORM: uniform(mask)}


def _by_class(card: ModelCard, probabilities: list[float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in zip(card.classes, probabilities)}


# --------------------------------------------------------------------------------------------------------- calibration


def reliability_of(predictions: list[Prediction]) -> Reliability | None:
    """How far the probabilities of the predicted classes can be believed; None where no image has a label."""
    labelled = [prediction for prediction in predictions if prediction.label is not None and prediction.probabilities]
    if not labelled:
        return None
    return reliability(
        [max(prediction.probabilities.values()) for prediction in labelled],
        [prediction.predicted_label == prediction.label for prediction in labelled],
    )


def temperature_of(predictions: list[Prediction], classes: list[str]) -> float:
    """The temperature that fits the labels of held-out predictions best; 1.0 where none has one."""
    labelled = [prediction for prediction in predictions if prediction.label is not None and prediction.logits]
    return fit_temperature(
        [prediction.logits for prediction in labelled],
        [classes.index(str(prediction.label)) for prediction in labelled],
    )


def recalibrated(evaluation: Evaluation, card: ModelCard) -> Evaluation:
    """The same evaluation with probabilities at the card's temperature. Collective."""

    def again(prediction: Prediction) -> Prediction:
        probabilities = (torch.tensor(prediction.logits) / card.temperature).softmax(0).tolist()
        return replace(prediction, probabilities=_by_class(card, probabilities))

    predictions = [again(prediction) for prediction in evaluation.predictions]
    found = on_first(lambda: reliability_of(predictions))
    explained = [replace(shown, prediction=again(shown.prediction)) for shown in evaluation.explained]
    metrics = evaluation.metrics | ({"ece": found.error} if found else {})
    return replace(evaluation, metrics=metrics, predictions=predictions, explained=explained)
