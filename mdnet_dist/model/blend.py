"""Eq. 12 of MDNet in one backward pass.

    theta_D <- theta_D - lambda * ( (1 - beta) * dL_M/dtheta_D + beta * eta * dL_L/dtheta_D )

Back-propagation is linear: scaling the two gradients where they come back into D by (1 - beta) and by beta * eta, and
then going through D once with their sum, gives exactly that. theta_M and theta_L lie behind this point and receive
their own losses' gradients unscaled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Blend(torch.autograd.Function):
    """Identity forward, twice; in backward the blend of the two gradients, and their squared norms added up."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, beta: Tensor, eta: Tensor, squared_norms: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(beta, eta)
        ctx.squared_norms = squared_norms
        return features.view_as(features), features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad_m: Tensor, grad_l: Tensor) -> tuple[Tensor, None, None, None]:
        beta, eta = ctx.saved_tensors
        ctx.squared_norms[0] += grad_m.float().square().sum()
        ctx.squared_norms[1] += grad_l.float().square().sum()
        blended = grad_m * (1 - beta).to(grad_m.dtype) + grad_l * (beta * eta).to(grad_l.dtype)
        return blended, None, None, None


class GradientBlend(nn.Module):
    """The door through which D's features leave for M and for L, and through which both gradients come back.

    `beta` and `eta` are 0-dim buffers: they change at every step without recompiling a compiled graph.
    """

    beta: Tensor
    eta: Tensor
    squared_norms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.tensor(0.5), persistent=False)
        self.register_buffer("eta", torch.tensor(1.0), persistent=False)
        self.register_buffer("squared_norms", torch.zeros(2), persistent=False)

    def set(self, beta: float, eta: float | Tensor) -> None:
        """Set both for the coming step, and forget the norms of the last one. Args: eta: a number, or ()."""
        self.beta.fill_(beta)
        self.eta.fill_(eta)
        self.squared_norms.zero_()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, C, h, w) -> the same map for M and for L.

        After the backward passes of a step `squared_norms` holds, of this rank's images, the squared norms of dL_M and
        dL_L with respect to the map, before either is scaled.
        """
        return _Blend.apply(features, self.beta, self.eta, self.squared_norms)
