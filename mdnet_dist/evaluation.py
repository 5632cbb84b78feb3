"""Scoring a network on parts of a shard set: every sample once, over any number of ranks.

Shapes: B images, K topics, T tokens, P map positions, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mdnet_dist.data import Batch
from mdnet_dist.decoding import decode
from mdnet_dist.distributed import gather, is_first, on_first, raise_together
from mdnet_dist.errors import InputError
from mdnet_dist.export import ModelCard
from mdnet_dist.metrics.diagnosis import classes_of_conclusions
from mdnet_dist.metrics.reports import ScoredImage, said_class, score_reports
from mdnet_dist.model.mdnet import NO_LABEL, MDNet
from mdnet_dist.shards import CONCLUSION, Report


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A line of predictions.jsonl (docs/design.md section 3), with what scoring needs besides."""

    key: str
    patient: str
    label: str | None
    predicted_label: str | None
    probabilities: dict[str, float]  # of M, by class
    report: Report
    references: list[Report]
    dca_correct: bool | None  # whether the generated conclusion names the label's class; None without either
    loss_m: float | None  # negative log-likelihood of the label
    loss_l: float  # of all tokens of the references, summed
    tokens: int  # that loss_l is the sum of
    grades: dict[str, str] = field(default_factory=dict)  # true grades, where the set knows them

    def scored(self) -> ScoredImage:
        """What the report metrics look at."""
        return ScoredImage(
            key=self.key,
            label=self.label,
            predicted_label=self.predicted_label,
            report=self.report,
            references=self.references,
        )

    def as_line(self) -> dict[str, Any]:
        """The JSON object of predictions.jsonl."""
        fields = asdict(self)
        for name in ("loss_m", "loss_l", "tokens", "grades"):
            del fields[name]
        return fields


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What a picture of one report shows."""

    prediction: Prediction
    image: np.ndarray  # (S, S, 3) uint8
    mask: bytes | None  # PNG
    words: dict[str, list[str]]  # by topic
    attention: dict[str, np.ndarray]  # by topic: (tokens, h, w)
    class_map: np.ndarray  # (h, w) of the predicted class


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one or several parts."""

    metrics: dict[str, float]  # fractions, see `score_reports`; the same on every rank
    predictions: list[Prediction]  # sorted by key; on the first rank, empty on the others
    explained: list[Explained]  # of the first rank's first images


def evaluate(
    network: MDNet,
    card: ModelCard,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    beam_width: int = 1,
    nltk_data: Path | None = None,
    pictures: int = 0,
) -> Evaluation:
    """Decode and score this rank's batches, then put all ranks' together. Collective.

    Args:
        network: in evaluation mode, on `device`.
        batches: from an `EvaluationStream`, references and all.
        nltk_data: where WordNet is, for METEOR.
        pictures: for how many of the first rank's images to keep the attention.
    """
    predictions: list[Prediction] = []
    explained: list[Explained] = []
    problem: InputError | None = None
    try:
        for batch in batches:
            done, shown = _predict(network, card, batch, device, beam_width, max(0, pictures - len(explained)))
            predictions += done
            explained += shown
    except InputError as error:
        problem = error
    raise_together(problem)
    gathered = sorted(
        (prediction for part in gather(predictions) for prediction in part), key=lambda prediction: prediction.key
    )
    metrics = on_first(lambda: score(gathered, card, nltk_data))
    return Evaluation(metrics=metrics, predictions=gathered if is_first() else [], explained=explained)


def score(predictions: list[Prediction], card: ModelCard, nltk_data: Path | None = None) -> dict[str, float]:
    """All scores of some predictions, whatever their order."""
    metrics = score_reports(
        [prediction.scored() for prediction in predictions], card.topics, card.conclusions, card.classes, nltk_data
    )
    labelled = [prediction.loss_m for prediction in predictions if prediction.loss_m is not None]
    if labelled:
        metrics["loss_m"] = math.fsum(labelled) / len(labelled)
    tokens = sum(prediction.tokens for prediction in predictions)
    if tokens:
        metrics["loss_l"] = math.fsum(prediction.loss_l for prediction in predictions) / tokens
    return metrics


def main_score(metrics: dict[str, float], name: str) -> float | None:
    """The number that decides which checkpoint is best (`EvaluateConfig.metric`); None where it was not measured."""
    if name == "dca_bleu4":
        parts = [metrics[part] for part in ("dca", "bleu4") if part in metrics]
        parts = parts or [metrics[part] for part in ("label_accuracy",) if part in metrics]
        return sum(parts) / len(parts) if parts else None
    return metrics.get(name)


def _predict(
    network: MDNet, card: ModelCard, batch: Batch, device: torch.device, beam_width: int, pictures: int
) -> tuple[list[Prediction], list[Explained]]:
    batch = batch.to(device)
    with torch.no_grad():
        seen = network.see(card.normalise(batch.images).contiguous(memory_format=torch.channels_last))
        logits = seen.logits.float()
        probabilities = logits.softmax(1).cpu()
        losses_m = F.cross_entropy(logits, batch.labels, ignore_index=NO_LABEL, reduction="none").cpu()
        reports, losses_l, attention = _describe(network, card, batch, seen.features, seen.sharpening_map, beam_width)
    class_of = classes_of_conclusions(card.conclusions)
    predictions = []
    for i, (key, record) in enumerate(zip(batch.keys, batch.records)):
        predicted = card.classes[int(probabilities[i].argmax())] if card.classes else None
        labelled = record.label is not None
        prediction = Prediction(
            key=key,
            patient=record.patient,
            label=record.label,
            predicted_label=predicted,
            probabilities={name: round(float(p), 6) for name, p in zip(card.classes, probabilities[i])},
            report={topic: " ".join(words) for topic, words in reports[i].items()},
            references=record.reports,
            dca_correct=None,
            loss_m=float(losses_m[i]) if labelled else None,
            loss_l=float(losses_l[i]),
            tokens=int(batch.lengths[i].sum()),
            grades=record.grades,
        )
        if labelled and CONCLUSION in card.topics:
            correct = said_class(prediction.scored(), class_of) == record.label
            prediction = Prediction(**{**vars(prediction), "dca_correct": correct})
        predictions.append(prediction)
    explained = []
    h, w = seen.features.shape[2:]
    maps = network.class_maps.maps(seen.features[:pictures]) if pictures else None
    for i in range(min(pictures, len(predictions))):
        chosen = int(probabilities[i].argmax())
        explained.append(
            Explained(
                prediction=predictions[i],
                image=batch.images[i].permute(1, 2, 0).cpu().numpy(),
                mask=batch.masks[i],
                words=reports[i],
                attention={
                    topic: attention[i, k, : len(words)].view(-1, h, w).float().cpu().numpy()
                    for k, (topic, words) in enumerate(reports[i].items())
                },
                class_map=maps[i, chosen].view(h, w).float().cpu().numpy() if maps is not None else np.zeros((h, w)),
            )
        )
    return predictions, explained


def _describe(
    network: MDNet,
    card: ModelCard,
    batch: Batch,
    features: Tensor,
    sharpening_map: Tensor | None,
    beam_width: int,
) -> tuple[list[dict[str, list[str]]], Tensor, Tensor]:
    """Words said by topic, the loss of the references summed by image (B), attention (B, K, T, P)."""
    model = network.language_model
    if model is None:
        empty = torch.zeros(len(batch.keys))
        return [{} for _ in batch.keys], empty, empty
    told = model(features, sharpening_map, batch.tokens, batch.lengths)
    losses = model.word_losses(told).sum(1).double().cpu()
    said = decode(model, model.look(features, sharpening_map), int(card.data["max_tokens"]), beam_width)
    vocabulary = card.vocabulary
    reports = [
        {topic: vocabulary.decode(sentence) for topic, sentence in zip(card.topics, sentences)}
        for sentences in said.tokens.tolist()
    ]
    return reports, losses, said.attention
