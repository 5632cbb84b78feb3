"""Saying reports: greedy and beam search, batched over images and topics, without any randomness.

Shapes: B images, K topics, W beams, T tokens, P map positions, V words, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mdnet_dist.model.language_model import LanguageModel, View
from mdnet_dist.vocabulary import END, PAD, START, UNKNOWN

NEVER_SAID = (PAD, START, UNKNOWN)


class Sentences(NamedTuple):
    """The best sentence of each image and topic."""

    tokens: Tensor  # (B, K, T): END behind the last word, PAD after it
    log_likelihoods: Tensor  # (B, K, T): of each token; 0 after END
    attention: Tensor  # (B, K, T, P): where the model looked for each token; 0 after END


@torch.no_grad()
def decode(language_model: LanguageModel, view: View, max_tokens: int, beam_width: int = 1) -> Sentences:
    """Search for the most probable sentence on every topic.

    The search keeps the `beam_width` most probable beginnings; at the end the sentence with the largest mean
    log-likelihood of its tokens wins (a sum would favour short sentences). Width 1 is greedy decoding. A search stops
    costing anything once all its beams have ended.

    Args:
        view: what L knows of B images, from `MDNet.see`.
        max_tokens: longest sentence, its end token included; a sentence that is longer ends without END.
    """
    W, device = beam_width, view.features.device
    starts = language_model.starts(view)
    B, K, E = starts.shape
    P = view.features.shape[1]
    state = _expand(language_model.lstm(starts.reshape(1, B * K, E).transpose(0, 1))[1], W)

    tokens = torch.full((B * K, W, max_tokens), PAD, dtype=torch.long, device=device)
    likelihoods = torch.zeros(B * K, W, max_tokens, device=device)
    attention = torch.zeros(B * K, W, max_tokens, P, device=device)
    totals = torch.zeros(B * K, W, device=device)
    totals[:, 1:] = -torch.inf  # all beams begin alike: let the first alone branch out
    ended = torch.zeros(B * K, W, dtype=torch.bool, device=device)
    live = torch.arange(B * K, device=device)  # the L searches that go on
    last = torch.full((B * K, W), START, device=device)
    lookers = _Lookers(view, live, K)

    for t in range(max_tokens):
        contexts, weights = lookers.attend(language_model, state[0][0].view(len(live), W, -1))
        output, state = language_model.lstm(language_model.word_embedding(last.reshape(-1, 1)), state)
        logits = language_model.word_logits(output.view(len(live), W, -1), contexts).float()
        log_probabilities = logits.log_softmax(2)  # (L, W, V), as in training: what is never said keeps its share
        log_probabilities[..., list(NEVER_SAID)] = -torch.inf
        # An ended beam goes on in one way only, by PAD at no cost.
        log_probabilities[ended[live]] = -torch.inf
        log_probabilities[..., PAD] = torch.where(ended[live], 0.0, -torch.inf)

        best, choice = (totals[live][..., None] + log_probabilities).flatten(1).topk(W, dim=1)  # of W*V
        beam, word = choice // logits.shape[2], choice % logits.shape[2]
        was_ended = ended[live].gather(1, beam)
        for history in (tokens, likelihoods, attention):
            history[live] = _pick(history[live], beam)
        tokens[live, :, t] = word
        likelihoods[live, :, t] = log_probabilities.flatten(1).gather(1, choice)
        attention[live, :, t] = _pick(weights, beam) * ~was_ended[..., None]
        totals[live] = best
        ended[live] = was_ended | (word == END)
        last = word
        state = tuple(_pick(part.view(len(live), W, -1), beam).flatten(0, 1)[None] for part in state)

        going = (~ended[live]).any(1)
        if not going.any():
            break
        if not going.all():
            state = tuple(part.view(len(live), W, -1)[going].flatten(0, 1)[None] for part in state)
            live, last = live[going], last[going]
            lookers = _Lookers(view, live, K)

    winner = (totals / (tokens != PAD).sum(2).clamp(min=1)).argmax(1)
    rows = torch.arange(B * K, device=device)
    return Sentences(
        tokens[rows, winner].view(B, K, -1),
        likelihoods[rows, winner].view(B, K, -1),
        attention[rows, winner].view(B, K, max_tokens, P),
    )


class _Lookers:
    """The live searches laid out by image, so that all of an image's share its map instead of copying it."""

    def __init__(self, view: View, live: Tensor, topics: int) -> None:
        images, self.image, counts = torch.unique_consecutive(live // topics, return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        self.slot = torch.arange(len(live), device=live.device) - first[self.image]
        self.slots = int(counts.max())
        self.view = view if len(images) == len(view.features) else View(*(part[images] for part in view))

    def attend(self, language_model: LanguageModel, states: Tensor) -> tuple[Tensor, Tensor]:
        """h_{t-1} of the live searches (L, W, H) -> contexts (L, W, C) and attention (L, W, P)."""
        _, W, H = states.shape
        laid_out = states.new_zeros(len(self.view.features), self.slots, W, H)
        laid_out[self.image, self.slot] = states
        contexts, weights = language_model.attend(self.view, laid_out.flatten(1, 2))
        pick = (self.image, self.slot)
        return contexts.unflatten(1, (-1, W))[pick], weights.unflatten(1, (-1, W))[pick]


def _expand(state: tuple[Tensor, ...], W: int) -> tuple[Tensor, ...]:
    """(1, B*K, H) -> (1, B*K*W, H): every beam begins at its search's state."""
    return tuple(part[0].repeat_interleave(W, 0)[None] for part in state)


def _pick(values: Tensor, beam: Tensor) -> Tensor:
    """Reorder (L, W, ...) by the beams (L, W) that go on."""
    index = beam.view(*beam.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)
