"""Ranks: who am I, how many are we, and the few collective operations that training needs.

With one process everything here works without other processes. What sums, gathers, broadcasts or waits is collective:
every rank must call it, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mdnet_dist.machine import free_port

T = TypeVar("T")


def rank() -> int:
    """Number of this process, 0 being the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this rank prints and writes."""
    return rank() == 0


def prepare_environment() -> None:
    """Describe a job of one process in the environment, where no launcher has described a larger one."""
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )


def outside_of_a_job() -> dict[str, str]:
    """The environment without what makes this process a rank: a program started here is a job of its own."""
    of_a_rank = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in of_a_rank}


def local_device() -> torch.device:
    """The device of this rank: its own GPU where there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """What `train.precision` means on a device."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(has_amx and has_amx())


def gpus_here() -> int:
    """GPUs of this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_on_hosts(values: Sequence[int]) -> list[int]:
    """Add up a few numbers over all ranks without their devices, which may be busy with something else meanwhile."""
    if world_size() == 1:
        return list(values)
    global _hosts
    if _hosts is None and dist.get_backend() == "nccl":
        _hosts = dist.new_group(backend="gloo")
    summed = torch.tensor(values, dtype=torch.long)
    dist.all_reduce(summed, group=_hosts)
    return [int(value) for value in summed]


_hosts: Any = None
"""The group of `sum_on_hosts` where GPUs exchange in another one: made at its first call, for as long as that lasts."""


def from_first(value: T | None) -> T:
    """The first rank's value, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0, device=_object_device())
    return box[0]  # type: ignore[return-value]


def on_first(function: Callable[[], T]) -> T:
    """Call a function on the first rank; its value, or the exception it raised, reaches every rank."""
    outcome: tuple[T | None, Exception | None] | None = None
    if is_first():
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
    value, failure = from_first(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(problem: Exception | None) -> None:
    """Raise the first rank's problem on every rank; nothing where no rank has one."""
    for found in gather(problem):
        if found is not None:
            raise found


def new_store() -> Any:
    """A store of names and bytes that all ranks see, held by the first; it may be used from any thread. Collective."""
    host = os.environ["MASTER_ADDR"]
    store = dist.TCPStore  # type: ignore[attr-defined]
    held = store(host, 0, is_master=True, wait_for_workers=False) if is_first() else None
    port = from_first(held.port if held else None)
    return held or store(host, port, is_master=False)


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Leave the group of ranks, where there is one: the last thing a program does, after any number of runs.

    A process that ends inside it makes torch complain, and no engine can be made in this process afterwards.
    """
    global _hosts
    if dist.is_initialized():
        dist.destroy_process_group()
        _hosts = None


def _object_device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
