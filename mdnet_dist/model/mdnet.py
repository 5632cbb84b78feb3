"""MDNet whole: D, the blend, M and L, and the sums that a training step needs.

Shapes: B images, R reports, K topics, T tokens, P = h*w map positions, C channels, N classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdnet_dist.config import GoogLeNetImageModel, ModelConfig
from mdnet_dist.model.blend import GradientBlend
from mdnet_dist.model.class_maps import ClassMaps
from mdnet_dist.model.googlenet import GoogLeNet
from mdnet_dist.model.image_model import ImageModel
from mdnet_dist.model.language_model import LanguageModel

NO_LABEL = -1
"""Class number of an image that nobody labelled: it adds nothing to L_M."""


class Losses(NamedTuple):
    """Sums over the images of a micro-batch, not means: the trainer divides by the counts of the whole global batch."""

    m: Tensor  # (): negative log-likelihood of the labels
    l: Tensor  # (): negative log-likelihood of the real tokens  # noqa: E741 (the paper's name)


class Seen(NamedTuple):
    """What D and M make of images."""

    features: Tensor  # (B, C, h, w)
    logits: Tensor  # (B, N)
    sharpening_map: Tensor | None  # (B, P); None where the attention does without


class MDNet(nn.Module):
    """Reads images, says a sentence on each topic, names the class, and shows where it looked."""

    def __init__(self, config: ModelConfig, topics: int, classes: int, words: int) -> None:
        """Args: topics: K, sentences of a report; classes: N, 0 without labels; words: V, the special ones included."""
        super().__init__()
        image = config.image
        self.image_model = GoogLeNet(image) if isinstance(image, GoogLeNetImageModel) else ImageModel(image)
        self.blend = GradientBlend()
        # A set without labels still builds: M then has one class that no image carries, and L_M stays zero.
        self.class_maps = ClassMaps(self.image_model.channels, max(1, classes))
        self.sharpen = config.sharpening == "cam" and topics > 0
        self.language_model = (
            LanguageModel(
                config.language,
                self.image_model.channels,
                topics,
                words,
                config.sharpness if self.sharpen else 0.0,
            )
            if topics
            else None
        )

    def forward(
        self, images: Tensor, labels: Tensor, tokens: Tensor, lengths: Tensor, label_smoothing: float = 0.0
    ) -> Losses:
        """The two losses of one micro-batch, summed.

        Args:
            images: (B, 3, H, W), normalised.
            labels: (B), `NO_LABEL` where there is none.
            tokens: (B, R, K, T), see `LanguageModel.forward`.
            lengths: (B, R, K), on the CPU.
        """
        features_m, features_l = self.blend(self.image_model(images))
        logits, sharpening_map = self.class_maps(features_m, self.sharpen)
        loss_m = F.cross_entropy(
            logits.float(), labels, ignore_index=NO_LABEL, reduction="sum", label_smoothing=label_smoothing
        )
        if self.language_model is None:
            return Losses(loss_m, loss_m.new_zeros(()))
        told = self.language_model(features_l, sharpening_map, tokens, lengths)
        return Losses(loss_m, self.language_model.word_losses(told).sum())

    @torch.no_grad()
    def see(self, images: Tensor) -> Seen:
        """All that is known of images before a word is said, for evaluation: images as for `forward`."""
        features = self.image_model(images)
        return Seen(features, *self.class_maps(features, self.sharpen))

    def parts(self) -> dict[str, nn.Module]:
        """theta_D, theta_M and theta_L under the names that the optimiser's groups carry."""
        parts: dict[str, nn.Module] = {"image": self.image_model, "head": self.class_maps}
        if self.language_model is not None:
            parts["language"] = self.language_model
        return parts
