"""The exported model: all that inference needs, in two files and without pickle.

RUN/model.safetensors   fp32 weights and buffers, by name
RUN/model.json          `ModelCard`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mdnet_dist.config import DataConfig, ModelConfig, RunConfig
from mdnet_dist.config_check import first_problem
from mdnet_dist.errors import InputError
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.sentences import REPORT, join_topics, joined_topics, joining_order
from mdnet_dist.shards import Report, write_atomically
from mdnet_dist.vocabulary import SPECIAL_WORDS, Vocabulary

FORMAT_VERSION = 2
WEIGHTS, CARD = "model.safetensors", "model.json"
Means = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=3, max_length=3)]
"""A number for each of red, green and blue."""
Deviations = Annotated[list[Annotated[float, Field(ge=1e-3, le=1)]], Field(min_length=3, max_length=3)]
"""As means. Pixels are divided by them; those of training are at least 0.01 (`mdnet_dist.data.image_statistics`)."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """`model.json`: what the numbers that go in and come out of the network mean."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # for files that are read

    model: dict[str, Any]  # `ModelConfig`
    data: dict[str, Any]  # `DataConfig`: how images are prepared
    topics: list[str]  # of a report as it is written and scored
    classes: list[str]
    words: list[str]  # without the special ones
    conclusions: dict[str, dict[str, int]]  # {class: {conclusion sentence: times in training}}
    image_mean: Means  # of the training part, per channel, pixels scaled to 0..1
    image_std: Deviations
    joined: list[str] = field(default_factory=list)  # where a report is one sentence: people's topics, in its order
    temperature: Annotated[float, Field(gt=0)] = 1.0  # logits of M are divided by it before they become probabilities
    intended_use: str = "research only, not diagnosis"
    format: int = FORMAT_VERSION

    @property
    def vocabulary(self) -> Vocabulary:
        """Words by number, the special ones first."""
        return Vocabulary(self.words)

    @property
    def topics_read(self) -> list[str]:
        """The topics of people's reports that the network learns to say."""
        return self.joined or self.topics

    @property
    def sentences(self) -> list[str]:
        """Names of the K sentences that the network says of an image: its topics, or the one that joins them."""
        return [REPORT] if self.joined else self.topics

    def reference(self, report: Report) -> Report:
        """A report by people in the topics of this card, to be compared with one that the network says."""
        return join_topics(report, self.joined) if self.joined else report

    def build(self) -> MDNet:
        """A network of the right shape, with fresh weights."""
        config = ModelConfig.model_validate(self.model)
        return MDNet(config, len(self.sentences), len(self.classes), len(self.words) + len(SPECIAL_WORDS))

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> float, channels last, zero mean and unit deviation over the training part."""
        B, C, height, width = images.shape
        # By whole rows of pixels: arithmetic over three channels alone is slow.
        mean, std = (
            torch.tensor(values, device=images.device).mul(255).repeat(width)
            for values in (self.image_mean, self.image_std)
        )
        rows = images.permute(0, 2, 3, 1).reshape(B * height, width * C).float()
        return rows.sub_(mean).div_(std).view(B, height, width, C).permute(0, 3, 1, 2)


def make_card(
    config: RunConfig,
    topics: list[str],
    classes: list[str],
    vocabulary: Vocabulary,
    conclusions: dict[str, dict[str, int]],
    image_mean: list[float],
    image_std: list[float],
) -> ModelCard:
    """The card of a run's network. Args: topics: of the shard set."""
    model = config.model.model_dump(mode="json")
    if model["image"].get("pretrained"):  # where the file lay is nobody's business, its name may be
        model["image"]["pretrained"] = Path(model["image"]["pretrained"]).name
    together = config.data.sentences == "report"
    return ModelCard(
        model=model,
        data=config.data.model_dump(mode="json", exclude={"shards", "cache"}),  # where data lay is nobody's business
        topics=joined_topics(topics) if together else topics,
        joined=joining_order(topics) if together else [],
        classes=classes,
        words=list(vocabulary.words[len(SPECIAL_WORDS) :]),
        conclusions=conclusions,
        image_mean=image_mean,
        image_std=image_std,
    )


def export_model(folder: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all."""
    write_atomically(folder / WEIGHTS, save({name: value.contiguous() for name, value in weights.items()}))
    write_atomically(folder / CARD, json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n")


def load_card(folder: Path) -> ModelCard:
    """Read `model.json`.

    Raises:
        InputError: missing, damaged, or of another version.
    """
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
        if isinstance(raw, dict) and raw.get("format") != FORMAT_VERSION:
            raise InputError(f"{path}: format {raw.get('format')}, but this version reads format {FORMAT_VERSION}")
        card = TypeAdapter(ModelCard).validate_json(text)
        DataConfig.model_validate({**card.data, "shards": ""})
        ModelConfig.model_validate(card.model)
        Vocabulary(card.words)  # refuses repeats
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a finished run's folder has one") from error
    except ValidationError as error:
        raise InputError(f"{path}: not a model card ({first_problem(error)}); export it again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a model card ({error}); export it again") from error
    return card


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[MDNet, ModelCard]:
    """The network of a finished run, in evaluation mode.

    Raises:
        InputError: a file is missing or damaged, the weights do not fit the card, or they are not finite.
    """
    card = load_card(folder)
    path = folder / WEIGHTS
    try:
        weights = load(path.read_bytes())
        with torch.device("meta"):  # shapes without memory: a card may claim any size
            card.build().load_state_dict(weights, assign=True)
        network = card.build()
        network.load_state_dict(weights)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a finished run's folder has one") from error
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: does not fit {CARD} ({reason:.200}); export it again") from error
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: '{name}' holds numbers that are not finite; export it again")
    return network.to(device).eval(), card
