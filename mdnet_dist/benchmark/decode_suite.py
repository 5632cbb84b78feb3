"""Batched decoding against one image, one topic and one word at a time: `decode` and `one_by_one`.

A new network would not know when to end. So the language model first learns the sentences of the batches in memory,
for some seconds: then its sentences are as long as people's, of unlike lengths, and one beam is much better than
another. The image model only has to give maps of an ordinary size.

Both decoders begin with the maps and the image is looked at by neither, but in the rows that say so. What is said is
not timed: that both say the same is tested (`tests/test_benchmark_decode.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mdnet_dist.benchmark.one_by_one import sentences_one_by_one
from mdnet_dist.benchmark.rows import Row
from mdnet_dist.benchmark.subject import Subject
from mdnet_dist.benchmark.timing import Spread, in_turn
from mdnet_dist.decoding import decode
from mdnet_dist.model.language_model import LanguageModel
from mdnet_dist.model.mdnet import MDNet, Seen
from mdnet_dist.vocabulary import END, PAD

IMAGES = 64
TIMES_FASTER = {"cpu": 5.0, "cuda": 10.0}
MOST_PER_LIVE_TOKEN = 1.25
"""By which a token of a batch that shrinks may cost more than one of a batch that does not: smaller matrices are
multiplied less efficiently, and a step has costs of its own. If ended sentences went on costing, it would be the
longest sentence by the mean one, about 1.6 on the synthetic set."""

LESSONS, LESSON_IMAGES, LEARNING_RATE = 60, 4, 4e-3


@dataclass(frozen=True, kw_only=True)
class Maps:
    """What decoding starts from."""

    features: Tensor  # (B, C, h, w)
    sharpening: Tensor | None  # (B, P)

    def of(self, images: slice) -> Maps:
        """Of some of the images."""
        return Maps(
            features=self.features[images], sharpening=None if self.sharpening is None else self.sharpening[images]
        )


def measure(subject: Subject) -> list[Row]:
    """The rows of a configuration; none where it has no language model."""
    network = subject.network()
    if network.language_model is None:
        return []
    maps = practise(network, subject)
    rows = []
    for beam_width, name in ((1, "greedy"), (3, "beam 3")):
        rows += _against_one_by_one(subject, network, maps, beam_width, name)
    return [*rows, _of_live_tokens(subject, network.language_model, maps)]


def practise(network: MDNet, subject: Subject) -> Maps:
    """Teach the language model the batches' sentences, and give the maps of `IMAGES` images, theirs over and over.

    Args:
        network: in training mode, in which a new image model's maps have an ordinary size; afterwards in evaluation
            mode.
    """
    model = _language_model(network)
    seen = [network.see(subject.images_of(batch)) for batch in subject.batches]
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for lesson in range(LESSONS):
        one, batch = seen[lesson % len(seen)], subject.batches[lesson % len(seen)]
        some = slice(0, LESSON_IMAGES)
        lengths = subject.encoded_batches[lesson % len(seen)].lengths[some, :1]
        sharpening = None if one.sharpening_map is None else one.sharpening_map[some]
        told = model(one.features[some], sharpening, batch.tokens[some, :1], lengths)
        loss = model.word_losses(told).sum() / max(1, int(lengths.sum()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    network.eval()
    return _repeated(seen)


def _repeated(seen: Sequence[Seen]) -> Maps:
    features = torch.cat([one.features for one in seen])
    again = torch.arange(IMAGES, device=features.device) % len(features)
    sharpening = [one.sharpening_map for one in seen if one.sharpening_map is not None]
    return Maps(features=features[again], sharpening=torch.cat(sharpening)[again] if sharpening else None)


def _language_model(network: MDNet) -> LanguageModel:
    assert network.language_model is not None
    return network.language_model


@torch.no_grad()
def said_together(model: LanguageModel, maps: Maps, max_tokens: int, beam_width: int) -> list[list[list[int]]]:
    """The words, END included, of each image and topic, by `decode`."""
    tokens = decode(model, model.look(maps.features, maps.sharpening), max_tokens, beam_width).tokens
    return [[[word for word in words if word != PAD] for words in image] for image in tokens.tolist()]


@torch.no_grad()
def said_one_by_one(model: LanguageModel, maps: Maps, max_tokens: int, beam_width: int) -> list[list[list[int]]]:
    """The same by `sentences_one_by_one`."""
    found = []
    for number in range(len(maps.features)):
        image = maps.of(slice(number, number + 1))
        view = model.look(image.features, image.sharpening)
        found.append(sentences_one_by_one(model, view, max_tokens, beam_width))
    return found


def _against_one_by_one(subject: Subject, network: MDNet, maps: Maps, beam_width: int, name: str) -> list[Row]:
    model, max_tokens, device = _language_model(network), subject.config.data.max_tokens, subject.device
    # Some images, evenly spread, are enough of the slow side.
    few = maps.of(slice(0, None, IMAGES // (4 if subject.short else 8)))
    images = subject.images_of(subject.batches[0])

    def look_together() -> None:
        network.see(images)

    def look_one_by_one() -> None:
        for number in range(0, len(images), 2):  # half of them
            network.see(images[number : number + 1])

    times = in_turn(
        {
            "together": lambda: said_together(model, maps, max_tokens, beam_width),
            "one by one": lambda: said_one_by_one(model, few, max_tokens, beam_width),
            "look together": look_together,
            "look one by one": look_one_by_one,
        },
        device,
        warm_up=1,
        rounds=5 if subject.short else 10,
    )
    together = [seconds / IMAGES for seconds in times.seconds["together"]]
    alone = [seconds / len(few.features) for seconds in times.seconds["one by one"]]
    look_at_once = [seconds / len(images) for seconds in times.seconds["look together"]]
    look_alone = [seconds / len(range(0, len(images), 2)) for seconds in times.seconds["look one by one"]]

    def row(what: str, values: Sequence[float], unit: str, note: str = "", target: float | None = None) -> Row:
        spread = Spread.of(values)
        return Row.of(spread, suite="decode", config=subject.name, name=what, unit=unit, note=note, target=target)

    whole = [
        (a + see_alone) / (b + see_together)
        for a, see_alone, b, see_together in zip(alone, look_alone, together, look_at_once)
    ]
    return [
        row(
            f"{name}: batch of {IMAGES} by one at a time",
            [a / b for a, b in zip(alone, together)],
            "x",
            note=f"{subject.config.data.image_size} px maps, {len(subject.data.card.topics)} topics",
            target=TIMES_FASTER[device.type],
        ),
        row(f"{name}: the same with the image model", whole, "x", note=f"images seen {len(images)} at a time by one"),
        row(f"{name}: batch of {IMAGES}", [1 / b for b in together], "images/s"),
    ]


def _of_live_tokens(subject: Subject, model: LanguageModel, maps: Maps) -> Row:
    """Seconds a word of a batch whose sentences end one after another, by those of one in which none ends."""
    max_tokens = subject.config.data.max_tokens
    lengths = [len(words) for image in said_together(model, maps, max_tokens, 1) for words in image]
    endless = copy.deepcopy(model)
    with torch.no_grad():
        endless.output.bias[END] -= 1e4
    # As many steps in both: what differs is that sentences end.
    times = in_turn(
        {
            "ending": lambda: said_together(model, maps, max(lengths), 1),
            "endless": lambda: said_together(endless, maps, max(lengths), 1),
        },
        subject.device,
        warm_up=1,
        rounds=6 if subject.short else 12,
    )
    words, places = sum(lengths), len(lengths) * max(lengths)
    ratios = [places / words * a / b for a, b in zip(times.seconds["ending"], times.seconds["endless"])]
    return Row.of(
        Spread.of(ratios),
        suite="decode",
        config=subject.name,
        name="greedy: seconds a live token, ending by endless",
        unit="x",
        # A GPU has too little to do with one batch for its time to follow the work.
        target=MOST_PER_LIVE_TOKEN if subject.device.type == "cpu" else None,
        better="less",
        note=f"{places / words:.2f} if ended sentences went on costing",
    )
