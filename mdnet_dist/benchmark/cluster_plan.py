"""What more GPUs would give: a step on N GPUs over M nodes, from what one GPU was measured to take.

Pure functions of numbers; `scaling_suite` holds them against two ranks of the machine at hand. A step is

    pieces x (start + images x seconds an image)  +  what of the gradients' exchange is not hidden  +  small exchanges

- Gradients: a rank of n sends 2 (n-1)/n of them around a ring, first inside the node, then each GPU its share between
  the nodes, then inside again. ZeRO 1 and 2 add up whole gradients too, and gather the weights besides: half as much
  again. ZeRO 3 gathers weights and scatters gradients: as much as ZeRO 0. They travel as fp32, also where the
  arithmetic is bf16 (at stages 1 to 3 DeepSpeed then sends those of convolutions and linear maps as bf16: less than
  what is planned with).
- At stages 0 to 2 they are sent when the backward pass is over: nothing is hidden.
- Small exchanges cost latency alone: four a step (counts, losses, the norm of the gradient, one of the engine's), and
  on GPUs two a BatchNorm and micro-batch, in the middle of forward and backward pass (SyncBatchNorm). A tree of nodes
  is as deep as the logarithm of their number (NCCL 2.23 and newer gathers along one too, older ones around a ring).

Left out: evaluations and checkpoints (`overhead_suite` says their share), and ranks that wait for the slowest one.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mdnet_dist.errors import InputError
from mdnet_dist.plan import accumulation_steps

if TYPE_CHECKING:  # torch, which `--help` does without
    from torch import nn

    from mdnet_dist.config import RunConfig

SIZES = (1, 8, 64, 512)
BYTES_A_WEIGHT = 4  # fp32
HALVES = {0: 2, 1: 3, 2: 3, 3: 2}
"""By ZeRO stage: how often all weights' worth of bytes goes once around. An all-reduce is two, a gather one."""
SMALL_EXCHANGES = 4
"""Of a step, besides the gradients."""
BACKWARD_SHARE = 2 / 3
"""Of the arithmetic of a step: behind it an exchange can hide."""
TRAINING_FLOPS = 3
"""A forward and a backward pass by a forward pass."""

# For estimates, where nothing was measured.
PEAK_TFLOPS = {"bf16": 989.0, "auto": 989.0, "fp32": 494.0}
"""Of an H100 or H200, by `train.precision`: dense bf16, and TF32, which torch's convolutions use for fp32."""
PEAK_SHARE = 0.02
"""ResNet-50 reaches 0.07 of an H100's peak; networks with fewer channels and many concatenations reach less."""
START_SECONDS = 0.02
"""Of a micro-batch: two thousand kernels that are started one by one, 10 us each."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """How fast GPUs exchange."""

    inside_bytes_per_second: float = 300e9  # of one GPU to the others of its node, bus bandwidth: NVLink
    between_bytes_per_second: float = 25e9  # of one GPU to other nodes: 200 Gb/s a GPU
    inside_latency: float = 15e-6  # seconds of an exchange of next to nothing within a node
    between_latency: float = 20e-6  # what each doubling of the nodes adds


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a network costs to train, whatever it is trained on."""

    seconds_an_image: float
    start_seconds: float = 0.0  # of a micro-batch, whatever its size
    weights: int  # trainable
    batch_norms: int = 0  # that exchange their statistics: on GPUs
    zero_stage: int = 0
    hidden: float = 0.0  # share of the backward pass behind which the gradients' exchange hides


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained on."""

    samples: int  # images of an epoch
    epochs: int
    bytes_an_image: float  # as it lies in a shard
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one update."""

    compute: float
    exchange: float  # of gradients and weights, hidden or not
    exposed: float  # what of it is not hidden
    small: float  # exchanges of a few bytes

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.exposed + self.small


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Training on so many GPUs."""

    gpus: int
    nodes: int
    global_batch: int
    step: Step
    images_per_second: float
    efficiency: float  # images/s by that of so many GPUs which each train alone
    storage_bytes_per_second: float
    steps_per_epoch: int  # 0: the batch is larger than the set
    hours: float | None  # of all epochs; None where there is no step


def exchange_seconds(nbytes: float, halves: int, gpus: int, gpus_a_node: int, links: Links) -> float:
    """Send so many bytes around all GPUs `halves` times, inside the nodes and between them."""
    nodes, inside = _nodes(gpus, gpus_a_node)
    slow = nbytes / inside * (nodes - 1) / nodes / links.between_bytes_per_second
    fast = nbytes * (inside - 1) / inside / links.inside_bytes_per_second
    return halves * (slow + fast) + small_seconds(gpus, gpus_a_node, links)


def small_seconds(gpus: int, gpus_a_node: int, links: Links) -> float:
    """An exchange of next to nothing between all GPUs; 0 where there is one."""
    if gpus == 1:
        return 0.0
    nodes, _ = _nodes(gpus, gpus_a_node)
    return links.inside_latency + links.between_latency * math.ceil(math.log2(nodes))


def step_of(work: Work, global_batch: int, micro_batch: int, gpus: int, gpus_a_node: int, links: Links) -> Step:
    """One update of a global batch, on the rank that has most of it."""
    pieces = accumulation_steps(global_batch, micro_batch, gpus)
    compute = pieces * work.start_seconds + -(-global_batch // gpus) * work.seconds_an_image
    # From stage 2 on DeepSpeed exchanges gradients with every micro-batch, stage 3 weights too.
    times = pieces if work.zero_stage >= 2 else 1
    exchange = 0.0
    if gpus > 1:
        nbytes = float(work.weights * BYTES_A_WEIGHT)
        exchange = times * exchange_seconds(nbytes, HALVES[work.zero_stage], gpus, gpus_a_node, links)
    hidden = work.hidden * BACKWARD_SHARE * compute
    small = SMALL_EXCHANGES + 2 * work.batch_norms * pieces
    return Step(
        compute=compute,
        exchange=exchange,
        exposed=max(0.0, exchange - hidden),
        small=small * small_seconds(gpus, gpus_a_node, links),
    )


def plan(
    work: Work,
    task: Task,
    *,
    sizes: Sequence[int] = SIZES,
    gpus_a_node: int = 8,
    links: Links | None = None,
    global_batch: int | None = None,
) -> list[Planned]:
    """What each number of GPUs gives.

    Args:
        global_batch: of every size, those left out that have more GPUs than it has images; by default a micro-batch a
            GPU, so that the global batch grows with them.
    """
    links = links or Links()
    alone = task.micro_batch / (work.start_seconds + task.micro_batch * work.seconds_an_image)
    planned = []
    for gpus in sizes:
        batch = global_batch or task.micro_batch * gpus
        if gpus > batch:
            continue
        step = step_of(work, batch, task.micro_batch, gpus, gpus_a_node, links)
        rate = batch / step.seconds
        steps = task.samples // batch
        planned.append(
            Planned(
                gpus=gpus,
                nodes=_nodes(gpus, gpus_a_node)[0],
                global_batch=batch,
                step=step,
                images_per_second=rate,
                efficiency=rate / (gpus * alone),
                storage_bytes_per_second=rate * task.bytes_an_image,
                steps_per_epoch=steps,
                hours=steps * task.epochs * step.seconds / 3600 if steps else None,
            )
        )
    return planned


def as_table(planned: Sequence[Planned]) -> str:
    """The plan as people read it."""
    from mdnet_dist.console import duration

    heading = ["GPUs", "nodes", "batch", "step ms", "exposed", "small", "images/s", "efficiency", "storage MB/s"]
    lines = [[*heading, "steps/epoch", "all epochs"]]
    for row in planned:
        lines.append(
            [
                str(row.gpus),
                str(row.nodes),
                str(row.global_batch),
                f"{row.step.seconds * 1e3:.1f}",
                f"{row.step.exposed / row.step.seconds:.1%}",
                f"{row.step.small / row.step.seconds:.1%}",
                f"{row.images_per_second:.0f}",
                f"{row.efficiency:.2f}",
                f"{row.storage_bytes_per_second / 1e6:.1f}",
                str(row.steps_per_epoch or "none"),
                "batch > set" if row.hours is None else duration(row.hours * 3600),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def _nodes(gpus: int, gpus_a_node: int) -> tuple[int, int]:
    """Nodes, and GPUs of the fullest."""
    nodes = -(-gpus // gpus_a_node)
    return nodes, -(-gpus // nodes)


# --------------------------------------------------------------------------------------------------------- command line


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What `print_plan` wants to know."""
    links = Links()
    group = parser.add_argument_group("plan")
    group.add_argument("--gpus", type=int, nargs="+", default=list(SIZES), metavar="N", help="default: 1 8 64 512")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    group.add_argument("--step-seconds", type=float, metavar="S", help="measured, of a micro-batch on one GPU")
    group.add_argument(
        "--start-seconds",
        type=float,
        metavar="S",
        help=f"what it takes whatever its size; default: 0, and {START_SECONDS} where the rest is estimated",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help=f"of a GPU, to estimate; default: {PEAK_TFLOPS['bf16']:g}, with fp32 {PEAK_TFLOPS['fp32']:g}",
    )
    group.add_argument(
        "--peak-share", type=float, default=PEAK_SHARE, metavar="X", help=f"reached of it; default: {PEAK_SHARE}"
    )
    for name, value, help_text in (
        ("--node-bandwidth", links.inside_bytes_per_second / 1e9, "GB/s a GPU within a node"),
        ("--network-bandwidth", links.between_bytes_per_second / 1e9, "GB/s a GPU between nodes"),
        ("--node-latency", links.inside_latency * 1e6, "microseconds of a small exchange within a node"),
        ("--network-latency", links.between_latency * 1e6, "microseconds that each doubling of the nodes adds"),
    ):
        group.add_argument(name, type=float, default=value, metavar="X", help=f"{help_text}; default: {value:g}")
    group.add_argument(
        "--overlap",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the backward pass that hides exchange; default: 0",
    )


def print_plan(config: RunConfig, arguments: argparse.Namespace, measured_seconds: float | None = None) -> None:
    """Say what more GPUs would give a configuration, and on what assumptions.

    Args:
        arguments: of `add_plan_options`.
        measured_seconds: of a micro-batch on a GPU of this machine, where the caller has measured it.

    Raises:
        InputError: a number that cannot be, or no shard set.
    """
    from mdnet_dist.cost import as_flops

    _check(arguments)
    work, task, flops = _of_config(config)
    seconds = arguments.step_seconds or measured_seconds
    start = arguments.start_seconds or 0.0
    if seconds is None:
        start = START_SECONDS if arguments.start_seconds is None else start
        peak = arguments.peak_tflops or PEAK_TFLOPS[config.train.precision]
        seconds = start + TRAINING_FLOPS * flops * task.micro_batch / (peak * 1e12 * arguments.peak_share)
        source = (
            f"ESTIMATED, no GPU was measured: {start * 1e3:g} ms and {TRAINING_FLOPS} x {as_flops(flops)} an image (D "
            f"and M, not L) at {arguments.peak_share:.0%} of {peak:g} TFLOP/s. --step-seconds takes a measured one"
        )
    else:
        source = "given by --step-seconds" if arguments.step_seconds else "measured on this machine"
    if start >= seconds:
        raise InputError(f"--start-seconds {start}: must be less than a micro-batch's {seconds:.4g} s")
    work = replace(
        work,
        seconds_an_image=(seconds - start) / task.micro_batch,
        start_seconds=start,
        hidden=arguments.overlap,
    )
    links = Links(
        inside_bytes_per_second=arguments.node_bandwidth * 1e9,
        between_bytes_per_second=arguments.network_bandwidth * 1e9,
        inside_latency=arguments.node_latency * 1e-6,
        between_latency=arguments.network_latency * 1e-6,
    )
    print(f"{config.name} on more GPUs\n")
    print(f"  a micro-batch of {task.micro_batch} images takes {seconds * 1e3:.1f} ms: {source}")
    print(
        f"  {work.weights:,} weights: {work.weights * BYTES_A_WEIGHT / 1e6:.1f} MB of fp32 go around "
        f"{HALVES[work.zero_stage]} times (ZeRO {work.zero_stage}), {work.hidden:.0%} of the backward pass hides them"
    )
    print(
        f"  {links.inside_bytes_per_second / 1e9:g} GB/s and {links.inside_latency * 1e6:g} us within a node of "
        f"{arguments.gpus_per_node}, {links.between_bytes_per_second / 1e9:g} GB/s a GPU and "
        f"{links.between_latency * 1e6:g} us a doubling of nodes between them"
    )
    print(
        f"  {SMALL_EXCHANGES} small exchanges a step, and 2 for each of {work.batch_norms} BatchNorms a micro-batch\n"
        f"  {task.samples} images an epoch of {task.bytes_an_image / 1e3:.1f} kB, {task.epochs} epochs; evaluations, "
        "checkpoints and waiting for slow ranks are left out"
    )
    sizes = sorted(set(arguments.gpus))
    print("\nA micro-batch a GPU; the global batch grows, and learning rates would have to follow it:\n")
    print(as_table(plan(work, task, sizes=sizes, gpus_a_node=arguments.gpus_per_node, links=links)))
    batch = config.train.global_batch
    print(f"\nThe configuration's global batch of {batch}, as far as each GPU has an image of it:\n")
    fixed = plan(work, task, sizes=sizes, gpus_a_node=arguments.gpus_per_node, links=links, global_batch=batch)
    print(as_table(fixed))


def batch_norms_of(network: nn.Module) -> int:
    """Layers that exchange statistics on GPUs."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def _of_config(config: RunConfig) -> tuple[Work, Task, int]:
    """What follows from the manifest alone: no shard is opened. Seconds an image are for the caller to set."""
    from mdnet_dist.cost import cost_of
    from mdnet_dist.data import image_statistics, parts_of
    from mdnet_dist.export import make_card
    from mdnet_dist.storage import open_source
    from mdnet_dist.vocabulary import Vocabulary

    manifest = open_source(config.data).manifest()
    train, _, _ = parts_of(manifest, config.data.fold)
    statistics = [manifest.parts[part] for part in train]
    words: Counter[str] = Counter()
    for part in statistics:
        words.update(part.words)
    vocabulary = Vocabulary.from_counts(words, config.data.min_word_count)
    mean, std = image_statistics(statistics)
    card = make_card(config, manifest.topics, manifest.classes, vocabulary, {}, mean, std)
    cost = cost_of(card.build, config.data.image_size)
    shards = manifest.shards_of(train)
    samples = sum(shard.samples for shard in shards)
    work = Work(
        seconds_an_image=0.0,
        weights=cost.weights,
        batch_norms=batch_norms_of(card.build()),
        zero_stage=config.train.zero_stage,
    )
    task = Task(
        samples=samples,
        epochs=config.train.epochs,
        bytes_an_image=sum(shard.bytes for shard in shards) / samples,
        micro_batch=config.train.micro_batch,
    )
    return work, task, cost.flops


def _check(arguments: argparse.Namespace) -> None:
    for name in ("gpus_per_node", "peak_tflops", "peak_share", "node_bandwidth", "network_bandwidth", "step_seconds"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be more than 0")
    for name in ("start_seconds", "node_latency", "network_latency"):
        value = getattr(arguments, name)
        if value is not None and not value >= 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be 0 or more")
    for name in ("overlap", "peak_share"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be from 0 to 1")
    if wrong := [number for number in arguments.gpus if number < 1]:
        raise InputError(f"--gpus {wrong[0]}: must be 1 or more")
