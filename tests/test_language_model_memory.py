"""What L keeps in memory: an image's features are shared by its topics and reports, never copied for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdnet_dist.config import LanguageModelConfig
from mdnet_dist.model.language_model import LanguageModel, View, _AttentionScores
from mdnet_dist.vocabulary import PAD, START
from tests.networks import one_thread  # noqa: F401 (a fixture)


class Memory(TorchDispatchMode):
    """Follows the bytes of all tensors made while it is on, backward pass included, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak_bytes = 0, 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.bytes -= size


def peak_numbers(step: Callable[[], Tensor]) -> float:
    """The most fp32 numbers alive at once during a forward and backward pass."""
    with Memory() as memory:
        step().backward()
    return memory.peak_bytes / 4


def kept_numbers(step: Callable[[], Tensor]) -> list[float]:
    """The fp32 numbers in each piece of memory that is kept for the backward pass, largest first."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return [size / 4 for size in sorted(kept.values(), reverse=True)]


def loss_without_copies(
    model: LanguageModel, features: Tensor, sharpening_map: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    return model.word_losses(model(features, sharpening_map, tokens, lengths)).sum()


def loss_with_copies(
    model: LanguageModel, features: Tensor, sharpening_map: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """The same loss as a straightforward program computes it: the features are copied for every sentence."""
    reports, topics, longest = tokens.shape[1:]
    view = model.look(features, sharpening_map)
    copied = View(*(part.repeat_interleave(reports * topics, 0) for part in view))
    topic = torch.arange(topics).repeat(len(features) * reports)
    state = model.lstm((model.start_projection(copied.pooled) + model.topic_embedding(topic))[:, None])[1]
    words = tokens.flatten(0, 2)
    before = torch.cat([torch.full_like(words[:, :1], START), words[:, :-1]], 1)
    losses = []
    for t in range(longest):
        query = model.query(state[0][0])
        scores = (copied.keys + query[:, None]).tanh() @ model.score
        weights = ((scores - scores.mean(1, keepdim=True)).tanh() + copied.prior).softmax(1)
        contexts = (weights[..., None] * copied.features).sum(1)
        output, state = model.lstm(model.word_embedding(before[:, t : t + 1]), state)
        logits = model.word_logits(output[:, 0], contexts)
        losses.append(F.cross_entropy(logits, words[:, t], ignore_index=PAD, reduction="sum"))
    return torch.stack(losses).sum()


Loss = Callable[[LanguageModel, Tensor, Tensor, Tensor, Tensor], Tensor]
MANY = {"B": 8, "K": 6, "T": 6, "E": 16, "H": 16, "A": 80, "C": 128, "V": 40, "P": 14 * 14}


def large_step(loss: Loss, reports: int) -> Callable[[], Tensor]:
    """A step in which the map is by far the largest thing: 14 x 14 positions, every topic said, R reports."""
    torch.manual_seed(0)
    config = LanguageModelConfig(embedding=MANY["E"], hidden=MANY["H"], attention=MANY["A"], dropout=0.0)
    model = LanguageModel(config, MANY["C"], MANY["K"], MANY["V"], 1.5)
    features = torch.rand(MANY["B"], MANY["C"], 14, 14, requires_grad=True)
    sharpening_map = torch.randn(MANY["B"], MANY["P"])
    shape = (MANY["B"], reports, MANY["K"])
    tokens = torch.randint(START + 1, MANY["V"], (*shape, MANY["T"]))
    return lambda: loss(model, features, sharpening_map, tokens, torch.full(shape, MANY["T"]))


def assert_features_are_shared(loss: Loss) -> None:
    """At K = 6, R = 5 memory may exceed that at R = 1 by what the additional words need, and nothing more."""
    B, K, T, P, A, C = (MANY[name] for name in "BKTPAC")
    one, five = large_step(loss, 1), large_step(loss, 5)
    largest = kept_numbers(five)[0]
    assert largest < B * K * 5 * P * A / 4, "something of the size of copied keys is kept for the backward pass"
    # What a word needs, each counted with its gradient: its rows of embeddings, of the LSTM's gates and states, of
    # query, context and logits, and its scores and weights over the positions. A copy of map and keys for each
    # sentence would come to P (C + A) / T = 6,800 numbers a word.
    a_word = 4 * MANY["E"] + 16 * MANY["H"] + 2 * A + 2 * C + 3 * MANY["V"] + 3 * P  # 1,444
    growth = peak_numbers(five) - peak_numbers(one)
    assert growth < a_word * 4 * B * K * T, "memory grows by more than the words need"


def test_features_are_not_copied_for_topics_and_reports() -> None:
    assert_features_are_shared(loss_without_copies)


def test_a_program_that_copies_features_fails_the_same_assertion() -> None:
    assert large_step(loss_with_copies, 1)().item() == pytest.approx(large_step(loss_without_copies, 1)().item())
    with pytest.raises(AssertionError, match="something of the size of copied keys"):
        assert_features_are_shared(loss_with_copies)


def test_features_copied_once_for_every_sentence_are_noticed_even_if_nothing_of_that_size_is_kept() -> None:
    def loss(model: LanguageModel, features: Tensor, *rest: Tensor) -> Tensor:
        copies = features.repeat_interleave(MANY["K"] * rest[1].shape[1], 0)
        return loss_without_copies(model, features, *rest) + 0 * copies.sum()

    with pytest.raises(AssertionError, match="memory grows by more than the words need"):
        assert_features_are_shared(loss)


def test_no_tensor_of_the_attention_exceeds_its_slice() -> None:
    """The (B, S, P, A) tensor is made in pieces: at no time does more than one of them exist."""
    B, P, A, C = (MANY[name] for name in "BPAC")
    slices = _AttentionScores.SLICE_NUMBERS
    assert B * MANY["K"] * 5 * MANY["T"] * P * A > 5 * slices
    rest = 3 * B * P * (C + A) + sum(kept_numbers(large_step(loss_without_copies, 5)))
    assert peak_numbers(large_step(loss_without_copies, 5)) < slices + rest
