"""One torch Optimizer that moves each part of the network by a rule of its own, as SGD for D, Adam for M and L.

One optimizer, because DeepSpeed wraps exactly one. The rules are PyTorch's own fused functions, so that a group is
moved to the last bit as `torch.optim.SGD` or `torch.optim.AdamW` with `fused=True` would move it. Whether a step is
taken is decided on the device, by a number that the fused functions read there: the host need not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from mdnet_dist.config import AdamGroup, OptimizerConfig, SgdGroup
from mdnet_dist.schedules import learning_rate_factor

STATE_KEYS = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
"""State tensors of a weight's own shape, by rule; Adam also counts its steps."""


class PartOptimizer(torch.optim.Optimizer):
    """Groups named image, head and language, each with its rule (sgd or adam), rate, decay and schedule."""

    def __init__(self, parts: Mapping[str, Iterable[nn.Parameter]], config: OptimizerConfig) -> None:
        """Args: parts: {group name: weights}, from `MDNet.parts`."""
        self.configs: dict[str, SgdGroup | AdamGroup] = {name: getattr(config, name) for name in parts}
        self.next_moves: Tensor | bool = True
        """Whether the next `step` may move the weights, (): where not, DeepSpeed's step clears the gradients alone."""
        self.moved: Tensor = torch.tensor(False)
        """Whether the last `step` moved the weights, (): it does not where a gradient is not finite."""
        groups = [
            {"params": list(weights), "name": name, "rule": "sgd" if isinstance(group, SgdGroup) else "adam"}
            for (name, weights), group in zip(parts.items(), self.configs.values())
        ]
        # Rate and decay stay 0 until `schedule` is called: ZeRO 3 takes a step on zero gradients to allocate state, and
        # weight decay would leave its mark on the momentum.
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    def schedule(self, fraction: float) -> None:
        """Set every group's rate and decay for the step at this fraction of training."""
        for group in self.param_groups:
            config = self.configs[group["name"]]
            group["lr"] = config.lr * learning_rate_factor(config.schedule, fraction)
            group["weight_decay"] = config.weight_decay

    def set_updates(self, updates: int) -> None:
        """Tell Adam how many updates it has done, for its bias correction."""
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(updates)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move all weights that have a gradient. `closure` is not supported."""
        self.moved = self._finite() & self.next_moves
        refused = (~self.moved).float()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            states = [self.state_of(weight, group["rule"]) for weight in weights]
            config = self.configs[group["name"]]
            if isinstance(config, SgdGroup):
                _move_by_sgd(weights, states, group, config, refused)
            else:
                _move_by_adam(weights, states, group, config, refused)

    def _finite(self) -> Tensor:
        """Whether all gradients are. Each rank sees the same reduced gradients here; ZeRO 1-3 checks its own shares."""
        gradients = [
            weight.grad for group in self.param_groups for weight in group["params"] if weight.grad is not None
        ]
        return torch.stack(torch._foreach_norm(gradients, torch.inf)).isfinite().all() if gradients else _TRUE

    def state_of(self, weight: Tensor, rule: str) -> dict[str, Tensor]:
        """A weight's state tensors, made of zeros where there are none yet."""
        state = self.state[weight]
        if not state:
            state.update({key: torch.zeros_like(weight) for key in STATE_KEYS[rule]})
            if rule == "adam":
                state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        return state


_TRUE = torch.tensor(True)


def _move_by_sgd(
    weights: list[Tensor], states: list[dict[str, Tensor]], group: dict, config: SgdGroup, refused: Tensor
) -> None:
    sgd(
        weights,
        [weight.grad for weight in weights],  # type: ignore[misc]
        [state["momentum_buffer"] for state in states],
        fused=True,
        found_inf=refused,
        weight_decay=group["weight_decay"],
        momentum=config.momentum,
        lr=group["lr"],
        dampening=0.0,
        nesterov=config.nesterov and config.momentum > 0,
        maximize=False,
    )


def _move_by_adam(
    weights: list[Tensor], states: list[dict[str, Tensor]], group: dict, config: AdamGroup, refused: Tensor
) -> None:
    adamw(
        weights,
        [weight.grad for weight in weights],  # type: ignore[misc]
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=refused,
        amsgrad=False,
        beta1=config.betas[0],
        beta2=config.betas[1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=config.eps,
        maximize=False,
    )
