"""Greedy and beam search against plain searches of one sentence at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mdnet_dist import decoding
from mdnet_dist.config import LanguageModelConfig
from mdnet_dist.decoding import Sentences, decode
from mdnet_dist.model.language_model import LanguageModel, View
from mdnet_dist.vocabulary import END, PAD, START, UNKNOWN
from tests.networks import one_thread  # noqa: F401 (a fixture)

B, K, C, P, V = 5, 3, 6, 9, 12
MAX_TOKENS = 8
CONFIG = LanguageModelConfig(embedding=6, hidden=8, attention=5, dropout=0.4)

NextWord = Callable[[list[int]], Tensor]
"""Words said so far -> log-likelihoods of the next one (V)."""


def opinionated_model(seed: int, words: int = V, topics: int = K, end_bias: float = 1.0) -> LanguageModel:
    """A model whose random weights are large enough for sentences to differ. Args: end_bias: favours their end."""
    torch.manual_seed(seed)
    model = LanguageModel(CONFIG, C, topics, words, sharpness=1.5).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
        model.output.bias[END] += end_bias
    return model


def look(model: LanguageModel, seed: int = 0, images: int = B) -> View:
    generator = torch.Generator().manual_seed(seed)
    features = 2 * torch.rand(images, C, 3, 3, generator=generator)
    with torch.no_grad():
        return model.look(features, torch.randn(images, P, generator=generator))


CASES = [(0, 3.0), (4, 3.0), (8, 4.0), (1, 4.0), (5, 1.0)]
"""Seeds and END biases of models whose sentences end at different times, or not at all."""


def case(number: int, images: int = B) -> tuple[LanguageModel, View]:
    seed, end_bias = CASES[number]
    model = opinionated_model(seed, end_bias=end_bias)
    return model, first_images(look(model, seed), images)


def first_images(view: View, images: int) -> View:
    return View(*(part[:images] for part in view))


def one_image(view: View, image: int) -> View:
    return View(*(part[image : image + 1] for part in view))


# --------------------------------------------------------------------------------------------------- plain searches


@torch.no_grad()
def run_sentence(model: LanguageModel, view: View, image: int, topic: int, words: list[int]) -> tuple[Tensor, Tensor]:
    """Log-likelihoods (T, V) and attention (T, P) at each place of a sentence, by cell arithmetic in double."""
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    positions, keys, prior, pooled = (part[image].double() for part in view)

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = weights["lstm.weight_ih_l0"] @ x + weights["lstm.bias_ih_l0"]
        enter, forget, candidate, leave = (gates + weights["lstm.weight_hh_l0"] @ h + weights["lstm.bias_hh_l0"]).chunk(
            4
        )
        c = forget.sigmoid() * c + enter.sigmoid() * candidate.tanh()
        return leave.sigmoid() * c.tanh(), c

    h = c = torch.zeros(CONFIG.hidden, dtype=torch.double)
    start = weights["start_projection.weight"] @ pooled + weights["start_projection.bias"]
    h, c = step(start + weights["topic_embedding.weight"][topic], h, c)
    likelihoods, attention = [], []
    for previous in [START, *words[:-1]]:
        scores = (keys + weights["query.weight"] @ h).tanh() @ weights["score"]
        attention.append(((scores - scores.mean()).tanh() + prior).softmax(0))
        h, c = step(weights["word_embedding.weight"][previous], h, c)
        hidden = weights["from_hidden.weight"] @ h + weights["from_hidden.bias"]
        hidden = (hidden + weights["from_context.weight"] @ (attention[-1] @ positions)).tanh()
        likelihoods.append((weights["output.weight"] @ hidden + weights["output.bias"]).log_softmax(0))
    return torch.stack(likelihoods), torch.stack(attention)


def next_word_of(model: LanguageModel, view: View, image: int, topic: int) -> NextWord:
    return lambda said: run_sentence(model, view, image, topic, [*said, PAD])[0][-1]


def sayable(words: int) -> list[int]:
    return [word for word in range(words) if word not in (PAD, START, UNKNOWN)]


def greedy_search(next_word: NextWord, max_tokens: int) -> list[int]:
    said: list[int] = []
    while len(said) < max_tokens and END not in said:
        likelihoods = next_word(said)
        said.append(max(sayable(len(likelihoods)), key=lambda word: likelihoods[word]))
    return said


def beam_search(next_word: NextWord, max_tokens: int, width: int) -> list[int]:
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(max_tokens):
        candidates = []
        for total, said in beams:
            if END in said:
                candidates.append((total, said))
                continue
            likelihoods = next_word(said)
            candidates += [(total + float(likelihoods[word]), [*said, word]) for word in sayable(len(likelihoods))]
        beams = sorted(candidates, key=lambda candidate: -candidate[0])[:width]
        if all(END in said for _, said in beams):
            break
    return max(beams, key=lambda beam: beam[0] / len(beam[1]))[1]


def exhaustive_search(next_word: NextWord, max_tokens: int, words: int) -> list[int]:
    """The sentence with the largest mean log-likelihood of all there are."""
    best: tuple[float, list[int]] = (-torch.inf, [])
    others = [word for word in sayable(words) if word != END]
    for length in range(1, max_tokens + 1):
        for said in itertools.product(others, repeat=length - 1):
            for last in sayable(words) if length == max_tokens else [END]:
                sentence = [*said, last]
                total = sum(float(next_word(sentence[:t])[word]) for t, word in enumerate(sentence))
                best = max(best, (total / length, sentence))
    return best[1]


def padded(sentence: list[int], max_tokens: int) -> list[int]:
    return sentence + [PAD] * (max_tokens - len(sentence))


def lengths_of(sentences: Sentences) -> Tensor:
    return (sentences.tokens != PAD).sum(2)


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("number", range(len(CASES)))
def test_width_1_equals_a_plain_greedy_loop(number: int) -> None:
    model, view = case(number)
    sentences = decode(model, view, MAX_TOKENS)
    for b, k in itertools.product(range(B), range(K)):
        expected = greedy_search(next_word_of(model, view, b, k), MAX_TOKENS)
        assert sentences.tokens[b, k].tolist() == padded(expected, MAX_TOKENS)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_wider_beams_equal_a_plain_beam_search(number: int, width: int) -> None:
    model, view = case(number, images=3)
    sentences = decode(model, view, MAX_TOKENS, width)
    for b, k in itertools.product(range(3), range(K)):
        expected = beam_search(next_word_of(model, view, b, k), MAX_TOKENS, width)
        assert sentences.tokens[b, k].tolist() == padded(expected, MAX_TOKENS)


def test_the_cases_above_are_worth_something() -> None:
    """Sentences of several lengths, some cut; beams that find another sentence than greedy search does."""
    lengths, differ = set(), 0
    for number in range(len(CASES)):
        model, view = case(number)
        greedy, beams = decode(model, view, MAX_TOKENS), decode(model, view, MAX_TOKENS, 3)
        lengths |= set(lengths_of(beams).flatten().tolist())
        differ += int((greedy.tokens != beams.tokens).any(2).sum())
        cut = (beams.tokens != END).all(2)
        assert (lengths_of(beams)[cut] == MAX_TOKENS).all(), "only a sentence of full length may lack its END"
    assert len(lengths) >= 6 and differ >= 20


@pytest.mark.parametrize(("words", "max_tokens"), [(6, 4), (7, 3)])
def test_beams_that_hold_every_sentence_find_the_best_of_all(words: int, max_tokens: int) -> None:
    """A width far above the size of the vocabulary: most beams have nothing to say at first."""
    for seed in range(4):
        model = opinionated_model(seed, words, topics=2)
        view = look(model, seed, images=2)
        sentences = decode(model, view, max_tokens, 200)
        assert not any(part.isnan().any() for part in sentences)
        for b, k in itertools.product(range(2), range(2)):
            expected = exhaustive_search(next_word_of(model, view, b, k), max_tokens, words)
            assert sentences.tokens[b, k].tolist() == padded(expected, max_tokens)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_where_no_word_can_be_said_the_sentence_is_empty(width: int) -> None:
    model = opinionated_model(0, words=4)
    sentences = decode(model, look(model), MAX_TOKENS, width)
    assert sentences.tokens.tolist() == [[padded([END], MAX_TOKENS)] * K] * B
    assert not any(part.isnan().any() or part.isinf().any() for part in sentences)


@pytest.mark.parametrize("width", [1, 3])
def test_a_batch_says_what_each_image_says_alone(width: int) -> None:
    model, view = case(1)
    together = decode(model, view, MAX_TOKENS, width)
    for b in range(B):
        alone = decode(model, one_image(view, b), MAX_TOKENS, width)
        assert torch.equal(alone.tokens[0], together.tokens[b])
        torch.testing.assert_close(alone.log_likelihoods[0], together.log_likelihoods[b], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone.attention[0], together.attention[b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_likelihoods_and_attention_are_those_of_the_same_words_given(number: int, width: int) -> None:
    model, view = case(number)
    sentences = decode(model, view, MAX_TOKENS, width)
    for b, k in itertools.product(range(B), range(K)):
        words = sentences.tokens[b, k, : lengths_of(sentences)[b, k]].tolist()
        likelihoods, attention = run_sentence(model, view, b, k, words)
        picked = likelihoods[torch.arange(len(words)), words].float()
        torch.testing.assert_close(sentences.log_likelihoods[b, k, : len(words)], picked, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sentences.attention[b, k, : len(words)], attention.float(), rtol=1e-4, atol=1e-6)
        assert not sentences.log_likelihoods[b, k, len(words) :].any()


def test_they_are_also_those_of_the_training_loss() -> None:
    model = opinionated_model(4, end_bias=3.0)
    generator = torch.Generator().manual_seed(2)
    features, sharpening_map = torch.rand(B, C, 3, 3, generator=generator), torch.randn(B, P, generator=generator)
    with torch.no_grad():
        sentences = decode(model, model.look(features, sharpening_map), MAX_TOKENS, 2)
        told = model(features, sharpening_map, sentences.tokens[:, None], lengths_of(sentences)[:, None])
        losses = model.word_losses(told).sum(1)
    torch.testing.assert_close(-sentences.log_likelihoods.sum((1, 2)), losses, rtol=1e-4, atol=1e-4)
    attention = told.attention(sentences.tokens[:, None])[:, 0]
    torch.testing.assert_close(sentences.attention, attention, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [1, 3])
def test_attention_sums_to_one_up_to_the_end_and_is_zero_after_it(width: int) -> None:
    model, view = case(1)
    sentences = decode(model, view, MAX_TOKENS, width)
    assert sentences.attention.shape == (B, K, MAX_TOKENS, P)
    said = sentences.tokens != PAD
    assert not said.all()
    torch.testing.assert_close(sentences.attention.sum(3), said.float())
    assert not sentences.attention[~said].any()
    ends = (sentences.tokens == END).int().argmax(2)
    ended = (sentences.tokens == END).any(2)
    assert (ends + 1)[ended].tolist() == lengths_of(sentences)[ended].tolist(), "nothing is said after END"


@pytest.mark.parametrize("width", [1, 4])
def test_it_never_says_pad_start_or_unknown(width: int) -> None:
    model = opinionated_model(3)
    with torch.no_grad():
        model.output.bias[[PAD, START, UNKNOWN]] += 30.0
        model.output.bias[END] -= 100.0
    sentences = decode(model, look(model), MAX_TOKENS, width)
    assert sentences.tokens.min() > UNKNOWN, "not even as the most probable words, and END is the least probable"
    assert sentences.log_likelihoods.isfinite().all()


@pytest.mark.parametrize("width", [1, 3])
def test_decoding_is_deterministic(width: int) -> None:
    model, view = case(0)
    torch.manual_seed(1)
    first = decode(model, view, MAX_TOKENS, width)
    torch.manual_seed(2)
    second = decode(model, view, MAX_TOKENS, width)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(part.requires_grad for part in first)


def test_max_tokens_cuts_a_greedy_sentence_and_changes_nothing_before() -> None:
    model, view = case(3)
    whole = decode(model, view, 12)
    for max_tokens in (1, 2, 5):
        cut = decode(model, view, max_tokens)
        assert cut.tokens.shape == (B, K, max_tokens)
        assert torch.equal(cut.tokens, whole.tokens[:, :, :max_tokens])
        torch.testing.assert_close(cut.attention, whole.attention[:, :, :max_tokens])


@pytest.mark.parametrize("width", [1, 3, 40])
def test_words_that_are_all_alike_give_a_sentence_all_the_same(width: int) -> None:
    model = opinionated_model(5)
    nn.init.zeros_(model.output.weight)
    nn.init.zeros_(model.output.bias)
    view = look(model)
    sentences = decode(model, view, MAX_TOKENS, width)
    assert torch.equal(sentences.tokens, decode(model, view, MAX_TOKENS, width).tokens)
    said = sentences.tokens != PAD
    assert set(sentences.tokens.unique().tolist()) <= {PAD, *sayable(V)}
    uniform = torch.where(said, -torch.tensor(float(V)).log(), 0.0)
    torch.testing.assert_close(sentences.log_likelihoods, uniform)


class Rows(TorchDispatchMode):
    """How many rows each product with the LSTM's recurrent weights has, and each with those of the output."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.stepped: list[int] = []
        self.spoken: list[int] = []
        self.asked: list[int] = []  # attention
        model.query.register_forward_hook(lambda module, inputs, output: self.asked.append(output[..., 0].numel()))
        model.output.register_forward_hook(lambda module, inputs, output: self.spoken.append(output[..., 0].numel()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.addmm.default and args[2].shape == (CONFIG.hidden, 4 * CONFIG.hidden):
            self.stepped.append(len(made))
        return made


def test_finished_sentences_stop_costing() -> None:
    model, view = case(0)
    with Rows(model) as rows:
        lengths = lengths_of(decode(model, view, 30))
    longest = int(lengths.max())
    assert len(set(lengths.flatten().tolist())) > 2 and longest < 30
    live = [int((lengths > t).sum()) for t in range(longest)]
    assert live[0] == B * K
    assert rows.stepped == rows.spoken == rows.asked == live


def growing_beams(next_word: NextWord, max_tokens: int, width: int) -> list[int]:
    """How many beams of a plain search have not ended before each step, up to where it can be stopped.

    It can where the best of the ended beams will win: it has the largest total, so that it stays, and no other can
    reach its mean even if it grew to full length at no cost.
    """
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    counts = []
    for _ in range(max_tokens):
        growing = [(total, said) for total, said in beams if END not in said]
        ended = [(total / len(said), total) for total, said in beams if END in said]
        best = max(growing, default=(-torch.inf, []))[0]
        if not growing or (ended and max(ended)[1] > best and max(ended)[0] > best / max_tokens):
            break
        counts.append(len(growing))
        candidates = [beam for beam in beams if END in beam[1]]
        for total, said in growing:
            likelihoods = next_word(said)
            candidates += [(total + float(likelihoods[word]), [*said, word]) for word in sayable(len(likelihoods))]
        beams = sorted(candidates, key=lambda candidate: -candidate[0])[:width]
    return counts


@pytest.mark.parametrize("number", [0, 2, 4])
def test_ended_beams_and_decided_searches_stop_costing(number: int) -> None:
    model, view = case(number, images=3)
    with Rows(model) as rows:
        decode(model, view, MAX_TOKENS, 3)
    counts = [growing_beams(next_word_of(model, view, b, k), MAX_TOKENS, 3) for b in range(3) for k in range(K)]
    expected = [sum(step) for step in itertools.zip_longest(*counts, fillvalue=0)]
    assert rows.stepped == rows.spoken == rows.asked == expected
    assert sum(expected) < 0.9 * len(expected) * 3 * K * 3, "no beam ended early"


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_looking_every_few_steps_what_has_ended_changes_nothing(
    number: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where ended beams go on costing until the host looks."""
    model, view = case(number)
    expected = decode(model, view, MAX_TOKENS, width)
    monkeypatch.setattr(decoding, "_steps_between_looks", lambda device: 3)
    sentences = decode(model, view, MAX_TOKENS, width)
    assert torch.equal(sentences.tokens, expected.tokens)
    torch.testing.assert_close(sentences.log_likelihoods, expected.log_likelihoods, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sentences.attention, expected.attention, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("numbers", [1, 3 * P * CONFIG.attention, 1 << 30])
def test_however_many_maps_are_looked_at_together_nothing_changes(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, view = case(0)
    expected = decode(model, view, MAX_TOKENS, 2)
    monkeypatch.setattr(decoding, "NUMBERS_IN_CACHE", numbers)
    sentences = decode(model, view, MAX_TOKENS, 2)
    assert torch.equal(sentences.tokens, expected.tokens)
    torch.testing.assert_close(sentences.attention, expected.attention, rtol=1e-5, atol=1e-6)


def test_images_that_are_done_are_left_out_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is halved three times: all of its images still say what they say alone."""
    model, view = case(3)
    alone = decode(model, view, 12)
    assert lengths_of(alone).amax(1).tolist() == [12, 5, 12, 6, 1]
    images = torch.tensor([4, 1, 4, 4, 3, 4, 1, 1, 4, 4, 0, 1, 4, 4, 3, 4, 1, 3, 4, 1])
    left: list[int] = []
    take = decoding._Maps._take

    def watched_take(self: Any, images: Tensor) -> None:
        left.append(len(images))
        take(self, images)

    monkeypatch.setattr(decoding._Maps, "_take", watched_take)
    together = decode(model, View(*(part[images] for part in view)), 12)
    assert left == [10, 4, 1]
    assert torch.equal(together.tokens, alone.tokens[images])
    torch.testing.assert_close(together.attention, alone.attention[images], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", [4 * B * K, 4 * B * K + 1])
def test_large_vocabularies_have_no_table_of_words(words: int) -> None:
    """Both ways in which words enter the LSTM."""
    model = opinionated_model(2, words, end_bias=4.0)
    view = look(model)
    sentences = decode(model, view, 4)
    for b, k in itertools.product(range(2), range(K)):
        assert sentences.tokens[b, k].tolist() == padded(greedy_search(next_word_of(model, view, b, k), 4), 4)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("without", ["attention", "sharpening"])
def test_models_without_attention_or_sharpening_say_what_training_says(without: str, width: int) -> None:
    torch.manual_seed(3)
    config = CONFIG.model_copy(update={"attention": 0}) if without == "attention" else CONFIG
    model = LanguageModel(config, C, K, V, sharpness=0.0).eval()
    generator = torch.Generator().manual_seed(2)
    features = torch.rand(B, C, 3, 3, generator=generator)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
        sentences = decode(model, model.look(features, None), MAX_TOKENS, width)
        told = model(features, None, sentences.tokens[:, None], lengths_of(sentences)[:, None])
        losses = model.word_losses(told).sum(1)
    torch.testing.assert_close(-sentences.log_likelihoods.sum((1, 2)), losses, rtol=1e-4, atol=1e-4)
    attention = told.attention(sentences.tokens[:, None])[:, 0]
    torch.testing.assert_close(sentences.attention, attention, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [1, 3])
def test_it_decodes_under_autocast(width: int) -> None:
    model = opinionated_model(0)
    generator = torch.Generator().manual_seed(0)
    features, sharpening_map = torch.rand(B, C, 3, 3, generator=generator), torch.randn(B, P, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sentences = decode(model, model.look(features, sharpening_map), MAX_TOKENS, width)
    said = sentences.tokens != PAD
    torch.testing.assert_close(sentences.attention.sum(3), said.float())
    assert sentences.log_likelihoods.isfinite().all() and said.any()
