"""`eta: balanced`: eta from the gradients that a run measures, on the device that measures them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class EtaBalance:
    """`eta: balanced`: the running ratio of the norms of dL_M and dL_L where they enter D.

    With it both losses weigh alike on theta_D at beta = 1/2. Every rank sees the same norms, those of the whole global
    batch, and so computes the same eta. The norms stay on the device that measured them: a GPU need not be waited for.
    """

    LARGEST = 1e4

    def __init__(self, memory: float) -> None:
        """Args: memory: share of the running norms that one step keeps."""
        self.memory = memory
        self._norms = torch.zeros(2, dtype=torch.float64)

    @property
    def norms(self) -> list[float]:
        """The running norms, of dL_M and of dL_L."""
        return [float(norm) for norm in self._norms]

    @norms.setter
    def norms(self, values: Sequence[float]) -> None:
        """Set them, as a checkpoint has them."""
        self._norms = torch.tensor(values, dtype=torch.float64)

    @property
    def eta(self) -> Tensor:
        """The factor for the coming step, (); 1 before anything was measured."""
        norm_m, norm_l = self._norms
        ratio = (norm_m / norm_l).clamp(1 / self.LARGEST, self.LARGEST)
        return torch.where((norm_m == 0) | (norm_l == 0), 1.0, ratio)

    def update(self, norms: Tensor) -> None:
        """Take in the norms (2) that a step measured; what is not finite is not taken in."""
        norms = norms.double()
        kept = self.memory * self._norms.to(norms.device) + (1 - self.memory) * norms
        self._norms = torch.where(norms.isfinite().all(), kept, self._norms.to(norms.device))
