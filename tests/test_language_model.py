"""L against a plain loop over images, reports, topics, words and positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mdnet_dist.config import LanguageModelConfig
from mdnet_dist.model.language_model import LanguageModel, _AttentionScores
from mdnet_dist.vocabulary import PAD, START
from tests.networks import gradient_of, one_thread, ragged_tokens, relative_difference  # noqa: F401 (one_thread is a fixture)

B, R, K, T, H, W, C, V = 4, 3, 2, 5, 2, 3, 7, 12
CONFIG = LanguageModelConfig(embedding=6, hidden=5, attention=4, dropout=0.0)
NEEDED_TO_ATTEND = {"key", "query", "score", "from_context"}
SHARPNESS = 1.5


def model_of(sharpness: float = SHARPNESS, config: LanguageModelConfig = CONFIG) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config, C, K, V, sharpness)


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
        for position in positions:
            inner = weights["key.weight"] @ position + weights["key.bias"] + weights["query.weight"] @ h
            scores.append((weights["score"] * inner.tanh()).sum())
        if sharpening_map is not None:
            mean = sum(scores) / len(scores)
            scores = [(score - mean).tanh() + SHARPNESS * sharpening_map[p] for p, score in enumerate(scores)]
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
    model, (features, sharpening_map), (tokens, lengths) = (
        model_of(SHARPNESS if sharpen else 0.0),
        random_map(seed),
        texts(seed),
    )
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
    assert relative_difference(gradient_of(features), gradient_of(features_too)) < 1e-5
    for name, weight in model.named_parameters():
        assert gradient_of(weight).any(), name
        assert relative_difference(gradient_of(weight), gradient_of(weights[name])) < 1e-5, name


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


# --------------------------------------------------------------------------------------------------- without attention


def test_without_attention_it_equals_a_plain_loop_and_looks_everywhere_alike() -> None:
    """NeuralTalk: the image enters through the LSTM's first input alone, and a word follows from h_t alone."""
    model = model_of(config=CONFIG.model_copy(update={"attention": 0}))
    (features, _), (tokens, lengths) = random_map(), texts()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {name.split(".")[0] for name, _ in model_of().named_parameters()} - NEEDED_TO_ATTEND
    features.requires_grad_()
    told = model(features, None, tokens, lengths)
    losses = model.word_losses(told)
    losses.sum().backward()

    weights, features_too = double_weights(model), features.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.double)
    for b, r, k in (lengths > 0).nonzero().tolist():
        words = tokens[b, r, k, : int(lengths[b, r, k])].tolist()
        h = c = torch.zeros(CONFIG.hidden, dtype=torch.double)
        v = sum(features_too[b].flatten(1).T) / (H * W)
        start = weights["start_projection.weight"] @ v + weights["start_projection.bias"]
        h, c = lstm_step(weights, start + weights["topic_embedding.weight"][k], h, c)
        for previous, word in zip([START, *words[:-1]], words):
            h, c = lstm_step(weights, weights["word_embedding.weight"][previous], h, c)
            inner = (weights["from_hidden.weight"] @ h + weights["from_hidden.bias"]).tanh()
            logits = weights["output.weight"] @ inner + weights["output.bias"]
            total = total + logits.exp().sum().log() - logits[word]
    total.backward()

    assert losses.sum().item() == pytest.approx(total.item(), rel=1e-6)
    assert relative_difference(gradient_of(features), gradient_of(features_too)) < 1e-5
    for name, weight in model.named_parameters():
        assert relative_difference(gradient_of(weight), gradient_of(weights[name])) < 1e-5, name
    real = (torch.arange(T) < lengths[..., None]).float()
    everywhere = real[..., None].expand(*real.shape, H * W) / (H * W)
    torch.testing.assert_close(told.attention(tokens), everywhere)
