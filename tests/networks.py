"""Tiny networks and ragged batches that several test files share. Everything follows from seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mdnet_dist.config import LanguageModelConfig, MedicalImageModel, ModelConfig
from mdnet_dist.model.language_model import LanguageModel
from mdnet_dist.model.mdnet import NO_LABEL, MDNet
from mdnet_dist.vocabulary import END, PAD, SPECIAL_WORDS

TOPICS, CLASSES, WORDS = 3, 3, 8 + len(SPECIAL_WORDS)

TINY_IMAGE_MODEL = MedicalImageModel(
    stem_channels=4, stage_channels=[8, 12], units_per_stage=[1, 2], stage_strides=[1, 2], concat_depth=1
)
TINY_LANGUAGE_MODEL = LanguageModelConfig(embedding=8, hidden=12, attention=6, dropout=0.0)
IMAGE_SIZE = 32
"""Side in px; the tiny image model's map is then 4 x 4."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are fastest on one thread, and their sums then never depend on the machine's cores.

    A test file that imports this fixture uses it for all its tests.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Inputs(NamedTuple):
    """What `MDNet.forward` takes."""

    images: Tensor  # (B, 3, S, S)
    labels: Tensor  # (B)
    tokens: Tensor  # (B, R, K, T)
    lengths: Tensor  # (B, R, K)


def tiny_network(seed: int = 0, **changes: Any) -> MDNet:
    """A network of about 4,000 weights. Args: changes: of `ModelConfig`."""
    torch.manual_seed(seed)
    fields = {"image": TINY_IMAGE_MODEL, "language": TINY_LANGUAGE_MODEL, **changes}
    return MDNet(ModelConfig(**fields), TOPICS, CLASSES, WORDS)


def ragged_tokens(
    seed: int, images: int, reports: int = 2, topics: int = TOPICS, longest: int = 5, words: int = WORDS
) -> tuple[Tensor, Tensor]:
    """Sentences of 1 to `longest` tokens, END included, of which about a quarter is missing: tokens and lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, reports, topics)
    lengths = torch.randint(1, longest + 1, shape, generator=generator)
    lengths[torch.rand(shape, generator=generator) < 0.25] = 0
    tokens = torch.randint(len(SPECIAL_WORDS), words, (*shape, longest), generator=generator)
    place = torch.arange(longest)
    tokens[place == lengths[..., None] - 1] = END
    tokens[place >= lengths[..., None]] = PAD
    return tokens, lengths


def random_inputs(seed: int, images: int = 4, reports: int = 2) -> Inputs:
    """A batch with sentences and labels missing here and there; the second image has no label."""
    generator = torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(0, CLASSES, (images,), generator=generator)
    labels[1] = NO_LABEL
    pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Inputs(pixels, labels, *ragged_tokens(seed, images, reports))


def freeze_batch_norm(network: nn.Module) -> None:
    """Make every BatchNorm use fixed, non-trivial statistics for good, whatever mode the network is put in.

    With it an image's gradient does not depend on which images share its micro-batch, so that any split of a global
    batch must give the same update.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
            mean.copy_(torch.linspace(-0.1, 0.1, len(mean)))
            variance.copy_(torch.linspace(0.5, 1.5, len(variance)))
            module.eval()
            setattr(module, "train", lambda mode=True, module=module: module)  # noqa: B010 (a method, to mypy)


def language_model_of(network: MDNet) -> LanguageModel:
    """Its language model, which it has where there are topics."""
    assert network.language_model is not None
    return network.language_model


def gradient_of(weight: Tensor) -> Tensor:
    """Its gradient, which it must have."""
    assert weight.grad is not None
    return weight.grad


def relative_difference(ours: Tensor, reference: Tensor) -> float:
    """The norm of the difference over the reference's norm (over 1e-30 where that is zero)."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))
