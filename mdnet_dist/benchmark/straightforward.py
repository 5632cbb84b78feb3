"""A training step as one would first write it: the yardstick of the step suite.

fp32; images in PyTorch's usual layout (NCHW); the features of an image copied for each of its R reports and K topics;
a loop over the words, with attention at every step and over the padding too; and Eq. 12 by two backward passes. It is
written in good faith: W_c C_p is computed once a sentence and not at every word, and batches come from memory. Weights
are those of an `MDNet`, and so are the results (tests/test_benchmark_step.py): only how they are computed differs.

Shapes: B images, N = B R K sentences, T tokens, P map positions, C channels, A attention, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdnet_dist.benchmark.plain import torch_optimizers
from mdnet_dist.config import OptimizerConfig
from mdnet_dist.data import Batch
from mdnet_dist.model.language_model import LanguageModel
from mdnet_dist.model.mdnet import NO_LABEL, MDNet
from mdnet_dist.schedules import learning_rate_factor
from mdnet_dist.vocabulary import PAD, START


class Straightforward:
    """An `MDNet` trained in the straightforward way."""

    def __init__(
        self, network: MDNet, config: OptimizerConfig, *, beta: float = 0.5, eta: float = 1.0, clip_norm: float = 0.0
    ) -> None:
        self.network, self.beta, self.eta, self.clip_norm = network, beta, eta, clip_norm
        self._groups = [getattr(config, name) for name in network.parts()]
        self.optimizers = torch_optimizers(network, config)

    def schedule(self, fraction: float) -> None:
        """Set the rates for the step at this fraction of training."""
        for group, optimizer in zip(self._groups, self.optimizers):
            optimizer.param_groups[0]["lr"] = group.lr * learning_rate_factor(group.schedule, fraction)

    def step(self, images: Tensor, batch: Batch) -> None:
        """One update of the weights from images (B, 3, H, W) in NCHW, normalised, and their labels and reports."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.backward(images, batch)
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()

    def backward(self, images: Tensor, batch: Batch) -> None:
        """The gradients of that step: of theta_D by Eq. 12, of theta_M and theta_L by their own losses."""
        network = self.network
        features = network.image_model(images)
        logits, sharpening_map = network.class_maps(features, network.sharpen)
        loss_m = F.cross_entropy(logits, batch.labels, ignore_index=NO_LABEL, reduction="sum")
        loss_m = loss_m / max(1, int((batch.labels != NO_LABEL).sum()))
        loss_m.backward(retain_graph=network.language_model is not None)
        of_images = list(network.image_model.parameters())
        from_m = [weight.grad for weight in of_images]
        for weight in of_images:
            weight.grad = None
        if network.language_model is not None:
            loss_l = language_loss(network.language_model, features, sharpening_map, batch.tokens)
            (loss_l / max(1, int(batch.lengths.sum()))).backward()
        for weight, of_m in zip(of_images, from_m):
            of_l = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            weight.grad = (1 - self.beta) * (of_m if of_m is not None else 0) + self.beta * self.eta * of_l


def language_loss(model: LanguageModel, features: Tensor, sharpening_map: Tensor | None, tokens: Tensor) -> Tensor:
    """Summed negative log-likelihood of all real tokens (B, R, K, T), given the map (B, C, h, w)."""
    B, R, K, T = tokens.shape
    copied = features.flatten(2).transpose(1, 2).repeat_interleave(R * K, 0)  # (N, P, C)
    words = tokens.reshape(B * R * K, T)
    topics = torch.arange(K, device=tokens.device).repeat(B * R)
    keys = model.key(copied)  # (N, P, A)
    prior = None if sharpening_map is None else model.sharpness * sharpening_map.repeat_interleave(R * K, 0)
    cell = _cell_of(model.lstm)
    hidden, memory = cell(model.start_projection(copied.mean(1)) + model.topic_embedding(topics))
    said = torch.full_like(words[:, 0], START)
    loss = features.new_zeros(())
    for t in range(T):
        scores = torch.tanh(keys + model.query(hidden)[:, None]) @ model.score  # (N, P)
        if prior is not None:
            scores = torch.tanh(scores - scores.mean(1, keepdim=True)) + prior
        context = (scores.softmax(1)[..., None] * copied).sum(1)
        hidden, memory = cell(model.dropout(model.word_embedding(said)), (hidden, memory))
        logits = model.word_logits(hidden, context)
        loss = loss + F.cross_entropy(logits, words[:, t], ignore_index=PAD, reduction="sum")
        said = words[:, t]
    return loss


def _cell_of(lstm: nn.LSTM) -> nn.LSTMCell:
    """The same weights as a cell that is called once a word."""
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size, device="meta")
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(lstm, f"{name}_l0"))
    return cell
