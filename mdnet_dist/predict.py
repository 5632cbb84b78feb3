"""From images to reports: the inference that evaluation, prediction and explanation share.

    network, card, _ = open_model(Path("runs/demo"))       # mdnet_dist/saved.py
    answers = answers_of(network, card, images)          # images: (B, 3, S, S) uint8, from `as_batch`

Shapes: B images, K topics, T tokens, P = h*w map positions, N classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdnet_dist.decoding import decode
from mdnet_dist.errors import InputError
from mdnet_dist.export import ModelCard
from mdnet_dist.images import decode_mask, fit_mask_to_square, fit_to_square
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.sentences import conclusion_start
from mdnet_dist.shards import CONCLUSION, Report

READERS = 4  # threads that decode image files ahead
Source = TypeVar("Source")
Decoder = Callable[[Path], Image.Image]
"""An image file to RGB pixels; raises InputError where it cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the network makes of B images."""

    features: Tensor  # (B, C, h, w)
    sharpening_map: Tensor | None  # (B, P)
    logits: Tensor  # (B, N), fp32, on the CPU
    probabilities: Tensor  # (B, N), calibrated by the card's temperature, on the CPU
    words: list[dict[str, list[str]]]  # of each image, by topic
    attention: Tensor  # (B, K, T, P): where it looked for each word


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the network makes of one image, in numpy and plain Python."""

    predicted_label: str | None
    probabilities: dict[str, float]  # by class
    words: dict[str, list[str]]  # by topic
    attention: dict[str, np.ndarray]  # by topic: (words, h, w), each map sums to 1
    class_maps: dict[str, np.ndarray]  # by class: (h, w), in logits
    attends: bool = True  # False: the network has no attention, and its maps are the same everywhere

    @property
    def report(self) -> Report:
        """{topic: sentence}."""
        return {topic: " ".join(words) for topic, words in self.words.items()}

    def as_line(self) -> dict[str, Any]:
        """What `launch/predict.py` writes of an image besides its name."""
        return {
            "predicted_label": self.predicted_label,
            "probabilities": {name: round(value, 6) for name, value in self.probabilities.items()},
            "report": self.report,
        }


# -------------------------------------------------------------------------------------------------------- the network


@torch.no_grad()
def answers_of(network: MDNet, card: ModelCard, images: Tensor, beam_width: int = 1) -> Answers:
    """See and describe a batch.

    Args:
        network: in evaluation mode.
        images: (B, 3, S, S) uint8, on the network's device.
    """
    seen = network.see(card.normalise(images))
    logits = seen.logits.float()
    model = network.language_model
    words: list[dict[str, list[str]]] = [{} for _ in images]
    attention = torch.zeros(len(images), 0, 0, seen.features[0, 0].numel())
    if model is not None:
        said = decode(model, model.look(seen.features, seen.sharpening_map), int(card.data["max_tokens"]), beam_width)
        vocabulary, attention = card.vocabulary, said.attention
        sentences = [[vocabulary.decode(tokens) for tokens in image] for image in said.tokens.tolist()]
        if card.joined and CONCLUSION in card.topics[1:]:
            sentences, attention = _read_off_conclusions(card, [said for (said,) in sentences], attention)
        words = [dict(zip(card.topics, image)) for image in sentences]
    return Answers(
        features=seen.features,
        sharpening_map=seen.sharpening_map,
        logits=logits.cpu(),
        probabilities=(logits / card.temperature).softmax(1).cpu(),
        words=words,
        attention=attention,
    )


def _read_off_conclusions(
    card: ModelCard, reports: list[list[str]], attention: Tensor
) -> tuple[list[list[list[str]]], Tensor]:
    """Split reports of one sentence into what comes before the conclusion, and the conclusion.

    Args:
        reports: the words of each image's.
        attention: (B, 1, T, P).

    Returns:
        the words of both parts of each report, and their attention, (B, 2, T, P).
    """
    conclusions = {sentence for sentences in card.conclusions.values() for sentence in sentences}
    parts = []
    split = attention.new_zeros(len(reports), 2, *attention.shape[2:])
    for i, words in enumerate(reports):
        start = conclusion_start(words, conclusions)
        parts.append([words[:start], words[start:]])
        split[i, 0, :start] = attention[i, 0, :start]
        split[i, 1, : len(words) - start] = attention[i, 0, start : len(words)]
    return parts, split


@torch.no_grad()
def split_answers(network: MDNet, card: ModelCard, answers: Answers, images: range) -> list[Answer]:
    """Some images' answers, with all their maps. Args: images: their places in the batch."""
    if not len(images):
        return []
    h, w = answers.features.shape[2:]
    attends = network.language_model is None or network.language_model.attends
    chosen = answers.features[images.start : images.stop]
    maps = network.class_maps.maps(chosen).unflatten(2, (h, w)).float().cpu().numpy()
    split = []
    for number, i in enumerate(images):
        split.append(
            Answer(
                predicted_label=predicted_class(card, answers.probabilities[i]),
                probabilities=dict(zip(card.classes, answers.probabilities[i].tolist())),
                words=answers.words[i],
                attention={
                    topic: answers.attention[i, k, : len(words)].view(-1, h, w).float().cpu().numpy()
                    for k, (topic, words) in enumerate(answers.words[i].items())
                },
                class_maps=dict(zip(card.classes, maps[number])),
                attends=attends,
            )
        )
    return split


def predicted_class(card: ModelCard, probabilities: Tensor) -> str | None:
    """The most probable class of one image (N); None where the network knows no classes."""
    return card.classes[int(probabilities.argmax())] if card.classes else None


# -------------------------------------------------------------------------------------------------------- image files


def prepare_image(card: ModelCard, image: Image.Image) -> np.ndarray:
    """Fit an RGB image to the square that the network sees, as in training: (S, S, 3) uint8."""
    return fit_to_square(image, int(card.data["image_size"]), str(card.data["fit"]))


def prepare_mask(card: ModelCard, mask_file: bytes | None, where: str) -> np.ndarray | None:
    """Move an annotation as `prepare_image` moves its image: (S, S) bool; None where there is none.

    Args:
        where: whose it is, for messages.

    Raises:
        InputError: it does not decode.
    """
    if mask_file is None:
        return None
    return fit_mask_to_square(decode_mask(mask_file, where), int(card.data["image_size"]), str(card.data["fit"]))


def as_batch(images: Sequence[np.ndarray], device: torch.device | str) -> Tensor:
    """Squares (S, S, 3) -> (B, 3, S, S) uint8 on the device."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)


def answer_files(
    network: MDNet,
    card: ModelCard,
    sources: Sequence[Source],
    decoder: Callable[[Source], Image.Image],
    *,
    device: torch.device | str = "cpu",
    batch: int = 16,
    beam_width: int = 1,
) -> Iterator[tuple[Source, np.ndarray, Answer] | tuple[Source, None, InputError]]:
    """The network's answer to each image file, in order: (source, square as it was seen, answer).

    A file that cannot be read gives (source, None, what is wrong with it) and stops nothing. Files are read while the
    network works on those before them; at most two batches are held in memory.

    Args:
        sources: paths, or whatever else the decoder takes.
    """

    def read(source: Source) -> np.ndarray | InputError:
        try:
            return prepare_image(card, decoder(source))
        except InputError as error:
            return error

    groups = [sources[start : start + batch] for start in range(0, len(sources), batch)]
    with ThreadPoolExecutor(READERS) as pool:
        ahead = [pool.submit(read, source) for source in (groups[0] if groups else [])]
        for number, group in enumerate(groups):
            squares = [future.result() for future in ahead]
            ahead = [pool.submit(read, source) for source in (groups[number + 1] if number + 1 < len(groups) else [])]
            good = [square for square in squares if isinstance(square, np.ndarray)]
            answers = iter(_answer_squares(network, card, good, device, beam_width))
            for source, square in zip(group, squares):
                if isinstance(square, InputError):
                    yield source, None, square
                else:
                    yield source, square, next(answers)


def _answer_squares(
    network: MDNet, card: ModelCard, squares: Sequence[np.ndarray], device: torch.device | str, beam_width: int
) -> list[Answer]:
    if not squares:
        return []
    answers = answers_of(network, card, as_batch(squares, device), beam_width)
    return split_answers(network, card, answers, range(len(squares)))
