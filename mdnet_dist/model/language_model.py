"""L, the language model: one LSTM that says each topic's sentence while it looks at the map (docs/design.md section 1).

    start     E_topic + W_v v                                    one input to the LSTM, giving h_0
    attention e_t(p) = w . tanh(W_c C_p + W_h h_{t-1}),          a_t = softmax_p(e_t),    z_t = sum_p a_t(p) C_p
    sharpened a_t = softmax_p( tanh(e_t(p) - mean_p e_t) + gamma A(p) )
    word      p(w_t) = softmax( W_o dropout(tanh(W_1 h_t + W_2 z_t)) ),      h_t = LSTM(E w_{t-1}, h_{t-1})

The class evidence A(p) (`class_maps.py`) has a factor gamma that is not learned, and what is learned can change no
position's weight by more than e against it. Left free, the language loss turns the evidence around: where it has
weights of its own, these become negative, and else w and W_c outweigh it (docs/results.md).

What the attention sees of the past is h_{t-1} alone, and z_t does not enter the LSTM. So in training, where the words
are given, the LSTM runs over whole sentences first and the attention is then computed for all of them at once: nothing
but the LSTM is a loop over words.

Without attention (`attention: 0`) there are no z_t and none of W_c, W_h, u, w, W_2: the image enters through the start
alone, as in NeuralTalk (Karpathy and Fei-Fei, CVPR 2015), and all attention weights are 1/P.

Missing sentences are left out, and but for the LSTM, which runs over the rectangle of sentences, only real words cost
anything: those of an image are drawn together, whichever sentence they belong to, before the attention.

Shapes: B images, R reports, K topics, T tokens, P map positions, C channels, H hidden, A attention, V words,
S the most real words that an image of the batch has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdnet_dist.config import LanguageModelConfig
from mdnet_dist.vocabulary import PAD, START


class View(NamedTuple):
    """What L knows of an image, computed once and shared by its topics, reports and words."""

    features: Tensor  # (B, P, C)
    keys: Tensor  # (B, P, A): W_c C_p
    prior: Tensor  # (B, P): gamma A(p), 0 without sharpening
    pooled: Tensor  # (B, C): v


class Told(NamedTuple):
    """What L says of given sentences, one row for each real word of an image, in the order of its sentences."""

    logits: Tensor  # (B, S, V)
    weights: Tensor  # (B, S, P): attention, each row sums to 1
    targets: Tensor  # (B, S): the words themselves, PAD where the image has fewer than S
    places: Tensor  # (B, S): which of the image's R*K*T token places the word stands in

    def attention(self, tokens: Tensor) -> Tensor:
        """The attention weights as (B, R, K, T, P), zero where there is no word. Args: tokens: (B, R, K, T)."""
        laid_out = self.weights.new_zeros(tokens.shape[0], tokens[0].numel(), self.weights.shape[-1])
        real = (self.targets != PAD)[..., None]
        laid_out.scatter_add_(1, self.places[..., None].expand_as(self.weights), self.weights * real)
        return laid_out.view(*tokens.shape, -1)


class _AttentionScores(torch.autograd.Function):
    """w . tanh(keys + query) without keeping the (B, S, P, A) tensor: the backward pass computes it again.

    Both passes go over the queries in slices, so that the largest tensor alive is (B, slice, P, A).
    """

    SLICE_NUMBERS = 1 << 19  # stays in a core's cache
    GPU_FACTOR = 128  # on a GPU slices are so many times larger, to keep it busy

    @staticmethod
    def forward(ctx: Any, keys: Tensor, queries: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(keys, queries, weight)
        return torch.cat([hidden @ weight for _, hidden in _slices(keys, queries)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # d tanh = 1 - tanh^2: sums over w dscore need no tensor of the large size, those over w dscore tanh^2 take the
        # sums first and the factor w at the end.
        keys, queries, weight = ctx.saved_tensors
        squares_of_keys, grad_weight = torch.zeros_like(keys), torch.zeros_like(weight)
        squares_of_queries = []
        for part, hidden in _slices(keys, queries):
            grad_part = grad[:, part]  # (B, s, P)
            grad_weight += grad_part.flatten() @ hidden.flatten(0, 2)
            hidden.square_()
            squares_of_queries.append((grad_part[:, :, None] @ hidden).squeeze(2))
            if hidden.shape[1] <= _FEW:  # a sum over a short dimension is slow on the CPU
                for one in range(hidden.shape[1]):
                    squares_of_keys.addcmul_(hidden[:, one], grad_part[:, one, :, None])
            else:
                squares_of_keys += hidden.mul_(grad_part[..., None]).sum(1)
        grad_keys = (grad.sum(1)[..., None] - squares_of_keys) * weight
        grad_queries = (grad.sum(2)[..., None] - torch.cat(squares_of_queries, 1)) * weight
        return grad_keys, grad_queries, grad_weight


_FEW = 8


def _slices(keys: Tensor, queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """tanh(keys + query) for some queries after others, (B, s, P, A) in the same memory, and which ones they are."""
    numbers = _AttentionScores.SLICE_NUMBERS * (_AttentionScores.GPU_FACTOR if keys.is_cuda else 1)
    B, P, A = keys.shape
    S = queries.shape[1]
    most = min(S, max(1, numbers // max(1, keys.numel())))
    memory = keys.new_empty(B * most * P * A)
    for start in range(0, S, most):
        part = slice(start, min(S, start + most))
        hidden = memory[: B * (part.stop - start) * P * A].view(B, -1, P, A)
        yield part, torch.add(keys[:, None], queries[:, part, None], out=hidden).tanh_()


class LanguageModel(nn.Module):
    """theta_L: embeddings, LSTM, attention, output."""

    def __init__(self, config: LanguageModelConfig, channels: int, topics: int, words: int, sharpness: float) -> None:
        """Args: channels: C of the map; topics: K; words: V, the special ones included; sharpness: gamma."""
        super().__init__()
        self.topic_embedding = nn.Embedding(topics, config.embedding)
        self.word_embedding = nn.Embedding(words, config.embedding, padding_idx=PAD)
        self.start_projection = nn.Linear(channels, config.embedding)  # W_v
        self.lstm = nn.LSTM(config.embedding, config.hidden, batch_first=True)
        self.attends = config.attention > 0
        if self.attends:
            self.key = nn.Linear(channels, config.attention)  # W_c
            self.query = nn.Linear(config.hidden, config.attention, bias=False)  # W_h
            self.score = nn.Parameter(torch.empty(config.attention).uniform_(-0.1, 0.1))  # w
        self.from_hidden = nn.Linear(config.hidden, config.embedding)  # W_1
        if self.attends:
            self.from_context = nn.Linear(channels, config.embedding, bias=False)  # W_2
        self.output = nn.Linear(config.embedding, words)  # W_o
        self.dropout = nn.Dropout(config.dropout)
        self.sharpness = sharpness  # gamma

    def look(self, features: Tensor, sharpening_map: Tensor | None) -> View:
        """Compute what all sentences of an image share.

        Args:
            features: the map (B, C, h, w).
            sharpening_map: A(p), (B, P); None for attention without it.
        """
        positions = features.flatten(2).transpose(1, 2)
        prior = positions.new_zeros(positions.shape[:2], dtype=torch.float32)
        if sharpening_map is not None:
            prior = self.sharpness * sharpening_map.float()
        keys = self.key(positions) if self.attends else positions[..., :0]
        return View(positions, keys, prior, features.mean((2, 3)))

    def starts(self, view: View) -> Tensor:
        """The LSTM's first input for every image and topic: (B, K, E)."""
        topics = torch.arange(self.topic_embedding.num_embeddings, device=view.pooled.device)
        return self.start_projection(view.pooled)[:, None] + self.topic_embedding(topics)

    def attend(self, view: View, states: Tensor) -> tuple[Tensor, Tensor]:
        """Where an image's sentences look, and what they see there.

        Args:
            states: h_{t-1} of S words of each image, (B, S, H).

        Returns:
            contexts z (B, S, C) and attention weights a (B, S, P), each row of which sums to 1. Without attention no
            context, (B, S, 0), and 1/P everywhere.
        """
        if not self.attends:
            positions = view.features.shape[1]
            return states[..., :0], states.new_full((*states.shape[:2], positions), 1 / positions, dtype=torch.float)
        queries = self.query(states)
        with torch.autocast(states.device.type, enabled=False):  # tanh and softmax in fp32
            scores = _AttentionScores.apply(view.keys.float(), queries.float(), self.score.float())
            weights = self.weights(view, scores)
        return weights.to(view.features.dtype) @ view.features, weights

    def weights(self, view: View, scores: Tensor) -> Tensor:
        """e_t (B, S, P) -> a_t (B, S, P): sharpened where that is asked for."""
        if self.sharpness:
            scores = torch.tanh(scores - scores.mean(-1, keepdim=True)) + view.prior[:, None]
        return scores.softmax(-1)

    def word_logits(self, states: Tensor, contexts: Tensor) -> Tensor:
        """h_t (..., H) and z_t (..., C) -> logits of the words (..., V), in the weights' precision.

        Wordings that are nearly as likely differ by less than bf16 can tell at the size of logits.
        """
        with torch.autocast(states.device.type, enabled=False):
            hidden = self.from_hidden(states.to(self.output.weight.dtype))
            if self.attends:
                hidden = hidden + self.from_context(contexts.to(self.output.weight.dtype))
            return self.output(self.dropout(torch.tanh(hidden)))

    def forward(self, features: Tensor, sharpening_map: Tensor | None, tokens: Tensor, lengths: Tensor) -> Told:
        """Teacher-forced prediction of given sentences.

        Args:
            features, sharpening_map: as for `look`.
            tokens: (B, R, K, T) words with END behind the last and PAD after it; a missing sentence is all PAD.
            lengths: (B, R, K) real tokens of each sentence, END included; on the CPU, so that the device never waits.
        """
        B, R, K, T = tokens.shape
        view = self.look(features, sharpening_map)
        lengths = lengths.reshape(B, R * K)
        if not int(lengths.sum()):  # every weight must get a gradient on every rank: say one PAD, which counts nothing
            lengths = F.pad(lengths[:, 1:], (1, 0), value=1)
        told = lengths.flatten().nonzero().squeeze(1)  # the sentences that exist
        states = self._states(view, tokens, told)  # (sentences, 1 + T, H)

        row = torch.zeros(B * R * K, dtype=torch.long)
        row[told] = torch.arange(len(told))
        real = torch.arange(T) < lengths[..., None]  # (B, R*K, T)
        S = int(real.sum((1, 2)).max())
        places = (~real.flatten(1)).to(torch.uint8).argsort(stable=True, dim=1)[:, :S]  # real words first, in order
        before = row.view(B, R * K)[:, :, None] * (1 + T) + torch.arange(T)  # where h_{t-1} is in `states`
        before = before.flatten(1).gather(1, places).to(tokens.device, non_blocking=True)
        places = places.to(tokens.device, non_blocking=True)

        states = states.flatten(0, 1)  # index_select: the backward pass of plain indexing sorts
        shape = *before.shape, states.shape[-1]
        contexts, weights = self.attend(view, states.index_select(0, before.flatten()).view(shape))
        targets = tokens.flatten(1).gather(1, places)
        spoken = states.index_select(0, before.flatten() + 1).view(shape)
        return Told(self.word_logits(spoken, contexts), weights, targets, places)

    def _states(self, view: View, tokens: Tensor, told: Tensor) -> Tensor:
        """h_0 .. h_T of the sentences numbered `told` in B*R*K: (sentences, 1 + T, H)."""
        _, R, K, _ = tokens.shape
        told = told.to(tokens.device, non_blocking=True)
        words = tokens.flatten(0, 2)[told]
        words = torch.cat([torch.full_like(words[:, :1], START), words[:, :-1]], 1)
        starts = self.starts(view)[told // (R * K), told % K]
        inputs = torch.cat([starts[:, None], self.dropout(self.word_embedding(words))], 1)
        # What follows a sentence's end changes nothing before it, and one call over the rectangle is faster than steps
        # of a shrinking batch (docs/performance.md).
        return self.lstm(inputs)[0]

    def word_losses(self, told: Told) -> Tensor:
        """Negative log-likelihood of each word, 0 where there is none: (B, S) in fp32."""
        losses = F.cross_entropy(
            told.logits.flatten(0, 1).float(), told.targets.flatten(), ignore_index=PAD, reduction="none"
        )
        return losses.view_as(told.targets)
