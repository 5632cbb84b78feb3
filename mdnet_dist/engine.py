"""DeepSpeed around the network: the only file that knows DeepSpeed.

The engine is given losses that are already scaled (`Engine.backward`), never asked for its own schedule, checkpoint or
monitor, and hands out its state under parameter names, whole and in fp32, whatever the ZeRO stage and the number of
ranks. So a checkpoint written under one of them continues under another.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mdnet_dist.config import RunConfig
from mdnet_dist.distributed import (
    computes_in_bf16,
    local_device,
    on_first,
    prepare_environment,
    world_size,
)
from mdnet_dist.errors import SUPERVISED, InputError, RankLost
from mdnet_dist.machine import keep_freed_memory
from mdnet_dist.model.mdnet import Losses, MDNet
from mdnet_dist.optimizer import STATE_KEYS, PartOptimizer
from mdnet_dist.plan import accumulation_steps


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its remarks on finding no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On CPUs DeepSpeed would compile an operator that sums over shared memory: a minute at the first start, and a job
    # that is killed meanwhile leaves a lock for which all later ones wait forever. gloo does the same without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def start_processes() -> torch.device:
    """Join the other ranks of this job (or be its only one) and return this rank's device."""
    prepare_environment()
    device = local_device()
    if device.type == "cpu":
        keep_freed_memory()
    deepspeed = _import_deepspeed()
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
            port = os.environ["MASTER_PORT"]
            if SUPERVISED in os.environ:  # the supervisor chose it, and chooses another
                raise RankLost(f"port {port} was taken by another job meanwhile", speaks=True) from error
            raise InputError(
                f"port {port} is taken, by another job perhaps; choose one: deepspeed --master_port {int(port) + 1} ..."
            ) from error
    return device


def deepspeed_config(config: RunConfig, ranks: int, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's dictionary for a run on so many ranks; `config.deepspeed` is merged over it."""
    train = config.train
    pieces = accumulation_steps(train.global_batch, train.micro_batch, ranks)
    micro_batch = -(-train.global_batch // (ranks * pieces))
    generated: dict[str, Any] = {
        # Nominal: the three must agree. Where the batch does not divide evenly the ranks' shares differ by one image;
        # no arithmetic depends on these numbers, because the losses come scaled.
        "train_batch_size": micro_batch * pieces * ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": train.clip_norm,
        "zero_optimization": {
            "stage": train.zero_stage,
            # ZeRO 3: weights below this size stay on every rank; the rest is fetched when its module runs.
            "stage3_param_persistence_threshold": 10_000,
        },
        "zero_allow_untested_optimizer": True,  # ours moves weights as torch's own rules do
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would wait for the GPU before and after each step.
        "timers": {"throughput": {"enabled": False}},
    }
    if bf16:
        # DeepSpeed's own bf16 mode casts weights but not BatchNorm's buffers; autocast keeps both in fp32.
        generated["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return _merged(generated, config.deepspeed)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


class Engine:
    """A network with its optimiser, spread over the ranks."""

    def __init__(self, network: MDNet, config: RunConfig, device: torch.device) -> None:
        ranks = world_size()
        if device.type == "cuda" and ranks > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.device = device
        self.bf16 = on_first(lambda: computes_in_bf16(config.train.precision, device))
        self._zero_stage = config.train.zero_stage
        self.optimizer = PartOptimizer(
            {name: part.parameters() for name, part in network.parts().items()}, config.optimizer
        )
        deepspeed = _import_deepspeed()
        # Weights stay in their usual layout, which DeepSpeed's broadcast and ZeRO's flat buffers need; images come
        # channels last, and convolutions follow their input.
        self._plain = copy.deepcopy(network).cpu() if self._zero_stage == 3 else None
        network = network.to(device)
        if config.train.compile:
            network.image_model.compile()
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=network,
                optimizer=self.optimizer,
                config=deepspeed_config(config, ranks, bf16=self.bf16),
                dist_init_required=False,
            )
        self._gathered = deepspeed.zero.GatheredParameters
        self._fragments = deepspeed.utils
        self.network: MDNet = self._engine.module
        self._statistics = [buffer for _, buffer in self._persistent_buffers() if buffer.is_floating_point()]
        self._allocate_optimizer_state()

    # ---------------------------------------------------------------------------------------------------- training

    def losses(self, *batch: Any) -> Losses:
        """Forward, in training mode: the summed losses of a micro-batch (`MDNet.forward`)."""
        self._engine.train()
        return self._engine(*batch)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch.

        DeepSpeed averages gradients over ranks; the caller has multiplied by the number of ranks, so that sums divided
        by global counts come out. It is asked not to divide by accumulation steps.
        """
        self._engine.backward(loss, scale_wrt_gas=False)

    def micro_batch_done(self, apply: Tensor | bool = True) -> Tensor:
        """End a micro-batch; after the last of a step move the weights.

        Args:
            apply: (), on the device; False clears the gradients without moving any weight.

        Returns:
            whether the weights were moved, (), on the device (meaningful after the last micro-batch).
        """
        self.optimizer.next_moves = apply
        self._engine.step()
        self.optimizer.next_moves = True
        # ZeRO 1 to 3 has looked at the gradients itself, and waited for the device to do so.
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        return self.optimizer.moved & (not overflow)

    # BatchNorm's running statistics move once a step, by the mean over all micro-batches of the global batch: every
    # micro-batch starts from those of the step before. So they do not depend on how a batch is cut into ranks and
    # accumulation steps, are the same on all ranks at every step, and stay as they were where a step is skipped.

    def running_statistics(self) -> Tensor:
        """BatchNorm's running means and variances, one after another, (N)."""
        return torch.cat([buffer.flatten() for buffer in self._statistics])

    def set_running_statistics(self, values: Tensor) -> None:
        """Set them. Args: values: as `running_statistics` gives them."""
        parts = values.split([buffer.numel() for buffer in self._statistics])
        with torch.no_grad():
            torch._foreach_copy_(self._statistics, [part.view_as(b) for part, b in zip(parts, self._statistics)])

    # -------------------------------------------------------------------------------------------------- evaluation

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[MDNet]:
        """The network in evaluation mode and training's arithmetic, its weights whole on every rank. Collective.

        Ranks may use it as often as each likes. At stage 3 it is a copy for that: DeepSpeed's own fetches weights from
        the other ranks whenever a module runs, and takes them away after it.
        """
        network = self.network
        if self._plain is not None:
            self._plain.load_state_dict(self.weights())
            network = self._plain.to(self.device)
        network.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                yield network
        finally:
            network.train()
            if self._plain is not None:
                self._plain.cpu()

    def _whole_weights(self) -> contextlib.AbstractContextManager[Any]:
        if self._zero_stage < 3:
            return contextlib.nullcontext()
        return self._gathered(list(self.network.parameters()), modifier_rank=None)

    # ------------------------------------------------------------------------------------------------------- state

    def weights(self) -> dict[str, Tensor]:
        """All weights and buffers in fp32 on the CPU, by name, on every rank. Collective."""
        with self._whole_weights():
            state = {name: weight.detach().cpu().clone() for name, weight in self.network.named_parameters()}
        return state | {name: buffer.detach().cpu().clone() for name, buffer in self._persistent_buffers()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's tensors on the CPU, `KEY/NAME` for weight NAME, on every rank. Collective."""
        state = {}
        for name, weight, keys in self._weights_with_state():
            for key in keys:
                if self._zero_stage == 0:
                    value = self.optimizer.state[weight][key]
                else:
                    value = self._fragments.safe_get_full_optimizer_state(weight, key)
                state[f"{key}/{name}"] = value.detach().cpu().clone().view(self._shape(weight))
        return state

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set all weights and buffers. Collective.

        Raises:
            KeyError: a name is missing.
        """
        with torch.no_grad():
            for name, buffer in self._persistent_buffers():
                buffer.copy_(weights[name])
            for name, weight in self.network.named_parameters():
                value = weights[name].to(self.device)
                if self._zero_stage < 3:
                    weight.copy_(value)
                if self._zero_stage > 0:
                    self._set_sharded(weight, value)
                if self._zero_stage == 3:
                    with self._gathered([weight], modifier_rank=0):
                        weight.copy_(value)

    def load_optimizer_state(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Set the optimiser's tensors and its count of updates. Collective.

        Raises:
            KeyError: a tensor is missing, as when the optimiser's kind has changed.
        """
        for name, weight, keys in self._weights_with_state():
            for key in keys:
                value = state[f"{key}/{name}"].to(self.device)
                if self._zero_stage == 0:
                    self.optimizer.state[weight][key].copy_(value)
                else:
                    self._set_sharded(weight, value, key)
        self.optimizer.set_updates(updates)

    def close(self) -> None:
        """Free the engine's hooks and buffers. The group of ranks stays, for the next engine of this process.

        DeepSpeed keeps handles of its groups in module variables (`deepspeed.utils.groups`), which outlive the group if
        torch ends it and make the next engine fail. A group ended and made again on the same port would also be a race:
        a fast rank could join the store of the group that a slow one has yet to leave. Programs end with
        `mdnet_dist.distributed.leave`.
        """
        self._engine.destroy()

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        names = self.network.state_dict().keys()
        return ((name, buffer) for name, buffer in self.network.named_buffers() if name in names)

    def _weights_with_state(self) -> Iterator[tuple[str, nn.Parameter, tuple[str, ...]]]:
        rules = {group["name"]: group["rule"] for group in self.optimizer.param_groups}
        prefixes = {
            name: prefix
            for prefix, module in self.network.named_children()
            for name, part in self.network.parts().items()
            if part is module
        }
        for part, prefix in prefixes.items():
            for name, weight in self.network.get_submodule(prefix).named_parameters():
                yield f"{prefix}.{name}", weight, STATE_KEYS[rules[part]]

    def _shape(self, weight: nn.Parameter) -> torch.Size:
        return weight.ds_shape if self._zero_stage == 3 else weight.shape  # type: ignore[attr-defined]

    def _set_sharded(self, weight: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Set this rank's share of a weight's fp32 copy, or of the optimiser's tensor `key`, under ZeRO 1 to 3."""
        if value.shape != self._shape(weight):
            raise RuntimeError(f"a weight of shape {tuple(self._shape(weight))} cannot hold {tuple(value.shape)}")
        if self._zero_stage < 3:
            if key is None:
                self._fragments.safe_set_full_fp32_param(weight, value)
            else:
                self._fragments.safe_set_full_optimizer_state(weight, value, key)
            return
        # DeepSpeed's own setter fails where a weight does not divide by the number of ranks.
        zero = self._engine.optimizer
        share, _ = zero._get_fp32_opt_state_partition(weight, release_swap_buffers=False, optim_state_key=key)
        start = share.numel() * zero._get_param_partition_rank(weight)
        mine = value.flatten()[start : start + share.numel()]
        share[: mine.numel()].copy_(mine)

    def _allocate_optimizer_state(self) -> None:
        """Make the optimiser's tensors exist before its first step, where ZeRO keeps them.

        ZeRO 1 and 2 look for them once, after they have stepped the first group, and would miss the other groups'.
        """
        zero = self._engine.optimizer
        if self._zero_stage == 3:
            flat_weights = [
                (zero.fp32_partitioned_groups_flat[i], self.optimizer.param_groups[group]["rule"])
                for i, group in enumerate(zero.sub_group_to_group_id.values())
            ]
        else:
            flat_weights = [
                (weight, group["rule"]) for group in self.optimizer.param_groups for weight in group["params"]
            ]
        for weight, rule in flat_weights:
            self.optimizer.state_of(weight, rule)
        if self._zero_stage in (1, 2):
            # DeepSpeed links weights to these tensors once, in the middle of its first step: after the first group has
            # been moved and before the others have any.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
