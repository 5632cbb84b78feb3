"""The straightforward decoder that batched decoding is held against: one image, one topic, one word at a time.

It is what scripts that go with papers do, written in good faith: what an image's sentences share is computed once
(`LanguageModel.look`), the LSTM is stepped as a cell, the beams of one sentence are rows of one small tensor, ended
beams are left out of the arithmetic, and it stops at the last END. The formulas are those at the head of
`mdnet_dist/model/language_model.py`, in fp32. `mdnet_dist.decoding.decode` gives the same sentences.

Shapes: K topics, W beams that have not ended, P map positions, V words, E embedding, H hidden, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mdnet_dist.model.language_model import LanguageModel, View
from mdnet_dist.vocabulary import END, PAD, START, UNKNOWN

NEVER_SAID = [PAD, START, UNKNOWN]


@torch.no_grad()
def sentences_one_by_one(
    language_model: LanguageModel, view: View, max_tokens: int, beam_width: int = 1
) -> list[list[int]]:
    """One image's sentence on every topic: words and END, if it came.

    Args:
        view: of one image, from `LanguageModel.look`.
        max_tokens: longest sentence, its END included.
        beam_width: 1 takes the most probable word each time.
    """
    starts = language_model.starts(view)[0]  # (K, E)
    found = []
    for start in starts:
        nothing = start.new_zeros(1, language_model.lstm.hidden_size)
        state = _step(language_model, start[None], (nothing, nothing))
        if beam_width == 1:
            found.append(_greedy(language_model, view, state, max_tokens))
        else:
            found.append(_beams(language_model, view, state, max_tokens, beam_width))
    return found


def _greedy(language_model: LanguageModel, view: View, state: tuple[Tensor, Tensor], max_tokens: int) -> list[int]:
    said: list[int] = []
    word = torch.tensor([START], device=state[0].device)
    while len(said) < max_tokens:
        logits, state = _next_word(language_model, view, state, word)
        logits[:, NEVER_SAID] = -torch.inf
        word = logits.argmax(1)
        said.append(int(word))
        if said[-1] == END:
            break
    return said


def _beams(
    language_model: LanguageModel, view: View, state: tuple[Tensor, Tensor], max_tokens: int, width: int
) -> list[int]:
    """The sentence with the largest mean log-likelihood among the `width` that the search ends with."""
    going: list[list[int]] = [[]]  # the beams that have not ended, in the order of the rows of `state`
    ended: list[tuple[float, list[int]]] = []
    totals = state[0].new_zeros(1)
    last = torch.tensor([START], device=state[0].device)
    for _ in range(max_tokens):
        logits, state = _next_word(language_model, view, state, last)
        likelihoods = logits.log_softmax(1)
        likelihoods[:, NEVER_SAID] = -torch.inf
        V = likelihoods.shape[1]
        candidates = (totals[:, None] + likelihoods).flatten()
        # An ended beam keeps its place only while it is among the best.
        candidates = torch.cat([candidates, candidates.new_tensor([total for total, _ in ended])])
        best, choice = candidates.topk(min(width, len(candidates)))
        kept: list[tuple[float, list[int]]] = []
        grown: list[list[int]] = []
        rows: list[int] = []
        scores: list[float] = []
        for total, number in zip(best.tolist(), choice.tolist()):
            row, word = divmod(number, V)
            if total == -torch.inf:
                continue
            if row >= len(going):
                kept.append(ended[number - len(going) * V])
            elif word == END:
                kept.append((total, [*going[row], END]))
            else:
                grown.append([*going[row], word])
                rows.append(row)
                scores.append(total)
        going, ended = grown, kept
        if not going:
            break
        totals = candidates.new_tensor(scores)
        last = torch.tensor([said[-1] for said in going], device=last.device)
        state = state[0][rows], state[1][rows]
    finished = ended + list(zip(totals.tolist() if going else [], going))
    return max(finished, key=lambda beam: beam[0] / len(beam[1]))[1]


def _next_word(
    language_model: LanguageModel, view: View, state: tuple[Tensor, Tensor], last: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Logits of the words that may follow (W, V) and the LSTM's next state. Args: last: the words said last (W)."""
    hidden = state[0]
    state = _step(language_model, language_model.word_embedding(last), state)
    spoken = language_model.from_hidden(state[0])
    if language_model.attends:
        scores = torch.tanh(view.keys[0] + language_model.query(hidden)[:, None]) @ language_model.score  # (W, P)
        if language_model.sharpness:
            scores = torch.tanh(scores - scores.mean(1, keepdim=True)) + view.prior[0]
        context = scores.softmax(1) @ view.features[0]  # (W, C)
        spoken = spoken + language_model.from_context(context)
    return language_model.output(torch.tanh(spoken)), state


def _step(language_model: LanguageModel, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One step of the LSTM (W, E) and (W, H) each -> h and c (W, H), as nn.LSTMCell takes it."""
    of_inputs, of_state, bias, other_bias = language_model.lstm.all_weights[0]
    return torch.lstm_cell(inputs, state, of_inputs, of_state, bias, other_bias)
