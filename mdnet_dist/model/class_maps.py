"""M, auxiliary attention sharpening: class activation maps (docs/design.md section 1; Zhou et al., CVPR 2016).

Shapes: B images, C channels, P = h*w map positions, N classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClassMaps(nn.Module):
    """A linear classifier on the average of the map; its weights at each position give the class activation maps.

    A_c(p) = w_c . C_p and s_c = mean_p A_c(p) + b_c: the average makes the map localise by class without any boxes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        bound = channels**-0.5
        self.weight = nn.Parameter(torch.empty(classes, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Tensor, sharpen: bool = True) -> tuple[Tensor, Tensor | None]:
        """The map (B, C, h, w) -> logits (B, N) and, if wanted, the map that sharpens L's attention (B, P)."""
        logits = F.linear(features.mean((2, 3)), self.weight, self.bias)  # the mean commutes with the linear map
        return logits, self._sharpening_map(features) if sharpen else None

    def maps(self, features: Tensor) -> Tensor:
        """The map (B, C, h, w) -> class activation maps (B, N, P), without the bias."""
        return torch.einsum("bcp,nc->bnp", features.flatten(2), self.weight.to(features.dtype))

    @torch.no_grad()
    def _sharpening_map(self, features: Tensor) -> Tensor:
        """How much each position tells the classes apart, standardised per image: (B, C, h, w) -> (B, P).

        That is the deviation of a position's class maps over the classes, which, like the softmax, does not change when
        all logits rise by the same. The predicted class's map alone would say where that class is; a class that means
        the absence of something (normal, few nuclei) is everywhere but there (docs/results.md).

        It is detached, so that L's loss does not train M's classifier, and standardised, so that its scale, which grows
        with M's confidence, does not decide how much it counts.
        """
        evidence = self.maps(features).float()
        spread = (evidence - evidence.mean(1, keepdim=True)).square().mean(1).sqrt()
        centred = spread - spread.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)
