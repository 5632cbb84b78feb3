"""L against a plain loop over images, reports, topics, words and positions; and what it keeps in memory."""

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
from mdnet_dist.model import language_model as module
from mdnet_dist.model.language_model import LanguageModel, View, _AttentionScores
from mdnet_dist.vocabulary import PAD, START
from tests.networks import one_thread, ragged_tokens, relative_difference  # noqa: F401 (one_thread is a fixture)

B, R, K, T, H, W, C, V = 4, 3, 2, 5, 2, 3, 7, 12
CONFIG = LanguageModelConfig(embedding=6, hidden=5, attention=4, dropout=0.0)


def model_of(sharpen: bool = True, config: LanguageModelConfig = CONFIG) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config, C, K, V, sharpen)


def random_map(seed: int = 1) -> tuple[Tensor, Tensor]:
    """The map (B, C, H, W) and a sharpening map (B, H*W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, C, H, W, generator=generator), torch.randn(B, H * W, generator=generator)


def texts(seed: int = 2) -> tuple[Tensor, Tensor]:
    """Ragged reports; the third image has none at all, the last says every sentence."""
    tokens, lengths = ragged_tokens(seed, B, R, K, T, V)
    full, full_lengths = ragged_tokens(seed + 1, 1, R, K, T, V)
    while not full_lengths.all():
        seed += 1
        full, full_lengths = ragged_tokens(seed + 1, 1, R, K, T, V)
    tokens[2], lengths[2] = PAD, 0
    tokens[3], lengths[3] = full[0], full_lengths[0]
    return tokens, lengths


# ------------------------------------------------------------------------------------------------------ a plain loop


def lstm_step(weights: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997, with forget gates); gates in PyTorch's order."""
    gates = weights["lstm.weight_ih_l0"] @ x + weights["lstm.bias_ih_l0"]
    gates = gates + weights["lstm.weight_hh_l0"] @ h + weights["lstm.bias_hh_l0"]
    enter, forget, candidate, leave = gates.split(len(h))
    c = forget.sigmoid() * c + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * c.tanh(), c


def tell(
    weights: dict[str, Tensor], positions: Tensor, sharpening_map: Tensor | None, topic: int, words: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """One sentence: logits (V) and attention (P) of each word. Args: positions: (P, C)."""
    h = c = weights["lstm.weight_hh_l0"].new_zeros(CONFIG.hidden)
    v = sum(positions) / len(positions)
    start = weights["start_projection.weight"] @ v + weights["start_projection.bias"]
    h, c = lstm_step(weights, start + weights["topic_embedding.weight"][topic], h, c)
    all_logits, all_attention = [], []
    for previous in [START, *words[:-1]]:
        scores = []
        for p, position in enumerate(positions):
            inner = weights["key.weight"] @ position + weights["key.bias"] + weights["query.weight"] @ h
            if sharpening_map is not None:
                inner = inner + weights["sharpening"] * sharpening_map[p]
            scores.append((weights["score"] * inner.tanh()).sum())
        exponentials = [score.exp() for score in scores]
        attention = [exponential / sum(exponentials) for exponential in exponentials]
        context = sum(a * position for a, position in zip(attention, positions))
        h, c = lstm_step(weights, weights["word_embedding.weight"][previous], h, c)
        seen = (
            weights["from_hidden.weight"] @ h + weights["from_hidden.bias"] + weights["from_context.weight"] @ context
        )
        all_logits.append(weights["output.weight"] @ seen.tanh() + weights["output.bias"])
        all_attention.append(torch.stack(attention))
    return all_logits, all_attention


def tell_all(
    weights: dict[str, Tensor], features: Tensor, sharpening_map: Tensor | None, tokens: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each word (B, R, K, T) and the attention (B, R, K, T, P), zero where there is no word."""
    losses = features.new_zeros(tokens.shape)
    attention = features.new_zeros(*tokens.shape, features[0, 0].numel())
    for b in range(len(features)):
        positions = features[b].flatten(1).T
        for r in range(tokens.shape[1]):
            for k in range(tokens.shape[2]):
                words = tokens[b, r, k, : int(lengths[b, r, k])].tolist()
                if not words:
                    continue
                logits, looked = tell(
                    weights, positions, None if sharpening_map is None else sharpening_map[b], k, words
                )
                for t, word in enumerate(words):
                    losses[b, r, k, t] = logits[t].exp().sum().log() - logits[t][word]
                    attention[b, r, k, t] = looked[t]
    return losses, attention


def double_weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("sharpen", [True, False])
@pytest.mark.parametrize("seed", [2, 20])
def test_it_equals_a_plain_loop_in_values_attention_and_gradients(sharpen: bool, seed: int) -> None:
    model, (features, sharpening_map), (tokens, lengths) = model_of(sharpen), random_map(seed), texts(seed)
    features.requires_grad_()
    told = model(features, sharpening_map if sharpen else None, tokens, lengths)
    losses = model.word_losses(told)
    losses.sum().backward()

    weights, features_too = double_weights(model), features.detach().double().requires_grad_()
    expected, attention = tell_all(weights, features_too, sharpening_map.double() if sharpen else None, tokens, lengths)
    expected.sum().backward()

    torch.testing.assert_close(told.attention(tokens).double(), attention.detach(), rtol=1e-5, atol=1e-6)
    laid_out = torch.zeros(tokens.shape, dtype=torch.double)
    real = told.targets != PAD
    laid_out.flatten(1).scatter_add_(1, told.places, losses.detach().double() * real)
    torch.testing.assert_close(laid_out, expected.detach(), rtol=1e-5, atol=1e-6)
    assert losses.sum().item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert relative_difference(features.grad, features_too.grad) < 1e-5
    for name, weight in model.named_parameters():
        assert weight.grad.any(), name
        assert relative_difference(weight.grad, weights[name].grad) < 1e-5, name


def test_attention_is_returned_for_every_word_sums_to_one_and_is_zero_elsewhere() -> None:
    (features, sharpening_map), (tokens, lengths) = random_map(), texts()
    told = model_of()(features, sharpening_map, tokens, lengths)
    attention = told.attention(tokens)
    assert attention.shape == (B, R, K, T, H * W)
    real = torch.arange(T) < lengths[..., None]
    assert real.any(-1).any(-1).any(-1).tolist() == [True, True, False, True]
    torch.testing.assert_close(attention.sum(-1), real.float())
    assert not attention[~real].any()
    torch.testing.assert_close(told.weights.sum(-1), torch.ones_like(told.targets, dtype=torch.float))


def test_a_sentence_does_not_depend_on_its_company() -> None:
    """Neither on the batch's other images, nor on other reports, nor on how much padding there is."""
    model, (features, sharpening_map), (tokens, lengths) = model_of(), random_map(), texts()
    together = model.word_losses(model(features, sharpening_map, tokens, lengths))
    alone = 0.0
    for b in range(B):
        for r in range(R):
            short = max(1, int(lengths[b, r].max()))
            told = model(
                features[b : b + 1], sharpening_map[b : b + 1], tokens[b : b + 1, r : r + 1, :, :short],
                lengths[b : b + 1, r : r + 1],
            )  # fmt: skip
            alone += model.word_losses(told).sum().item()
    assert together.sum().item() == pytest.approx(alone, rel=1e-5)


def test_without_any_report_the_loss_is_zero_and_every_weight_gets_a_zero_gradient() -> None:
    model, (features, sharpening_map) = model_of(), random_map()
    features.requires_grad_()
    tokens, lengths = torch.full((B, R, K, T), PAD), torch.zeros(B, R, K, dtype=torch.long)
    told = model(features, sharpening_map, tokens, lengths)
    loss = model.word_losses(told).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert not told.attention(tokens).any()
    for name, weight in [*model.named_parameters(), ("features", features)]:
        assert weight.grad is not None and not weight.grad.any(), name


def test_dropout_is_for_training_only() -> None:
    model, (features, sharpening_map), (tokens, lengths) = (
        model_of(config=CONFIG.model_copy(update={"dropout": 0.5})),
        random_map(),
        texts(),
    )
    noisy = [model(features, sharpening_map, tokens, lengths).logits for _ in range(2)]
    assert not torch.equal(*noisy)
    model.eval()
    assert torch.equal(*(model(features, sharpening_map, tokens, lengths).logits for _ in range(2)))


def test_under_autocast_the_attention_stays_in_single_precision() -> None:
    model, (features, sharpening_map), (tokens, lengths) = model_of(), random_map(), texts()
    exact = model.word_losses(model(features, sharpening_map, tokens, lengths))
    with torch.autocast("cpu", torch.bfloat16):
        told = model(features, sharpening_map, tokens, lengths)
        losses = model.word_losses(told)
    assert told.weights.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(told.weights.sum(-1), torch.ones_like(told.weights.sum(-1)))
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)
    losses.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


# ------------------------------------------------------------------------------------------- the attention's function


@pytest.mark.parametrize("slice_numbers", [1 << 22, 1, 60])
def test_attention_scores_equal_the_plain_formula_and_pass_gradcheck(
    slice_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices of all words, of one word, and of two words with one left over."""
    monkeypatch.setattr(_AttentionScores, "SLICE_NUMBERS", slice_numbers)
    torch.manual_seed(3)
    keys, queries, weight = (
        torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in [(2, 5, 3), (2, 7, 3), (3,)]
    )
    plain = ((keys[:, None] + queries[:, :, None]).tanh() * weight).sum(-1)
    torch.testing.assert_close(_AttentionScores.apply(keys, queries, weight), plain)
    assert torch.autograd.gradcheck(_AttentionScores.apply, (keys, queries, weight))


# ------------------------------------------------------------------------------------------------------------ memory


class Memory(TorchDispatchMode):
    """Follows the bytes of all tensors made while it is on, backward pass included, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak_bytes, self._known = 0, 0, weakref.WeakKeyDictionary()

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
        weights = ((copied.keys + query[:, None]).tanh() @ model.score).softmax(1)
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
    model = LanguageModel(config, MANY["C"], MANY["K"], MANY["V"], True)
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
    slices = module._AttentionScores.SLICE_NUMBERS
    assert B * MANY["K"] * 5 * MANY["T"] * P * A > 5 * slices
    rest = 3 * B * P * (C + A) + sum(kept_numbers(large_step(loss_without_copies, 5)))
    assert peak_numbers(large_step(loss_without_copies, 5)) < slices + rest
