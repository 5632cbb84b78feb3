"""Which rank reads which sample when: pure functions of integers, without files, processes or random state.

The sequence of global batches depends on the seed, the epoch, the global batch size and the shuffle window alone: not
on ranks, loader workers, accumulation or interruptions. A rank's share of a batch is a contiguous piece of it.

To stay sequential within shards and yet mix them, an epoch is cut into lanes. The shards, in random order, form one
long sequence; each lane is a piece of it, read from front to back and shuffled within a window; a global batch takes
equally many samples from each lane. Ranks hold neighbouring lanes, so that on a large set each reads its own shards.
A set that fits into the window has one lane and is permuted wholly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mdnet_dist.errors import InputError


def steps_per_epoch(samples: int, global_batch: int) -> int:
    """Updates in an epoch; the `samples % global_batch` left over sit this epoch out, others the next.

    Raises:
        InputError: fewer samples than one batch needs.
    """
    if samples < global_batch:
        raise InputError(f"train.global_batch {global_batch} exceeds the {samples} training samples; set it lower")
    return samples // global_batch


def epoch_order(
    samples_per_shard: Sequence[int], *, seed: int, epoch: int, global_batch: int, window: int
) -> np.ndarray:
    """The global batches of one epoch.

    Args:
        samples_per_shard: in the manifest's order. Samples are numbered through all shards in that order.
        window: samples, over all lanes, that may be held in memory; no sample moves further than that and a batch.

    Returns:
        sample numbers (steps, global_batch), int64; each sample at most once.

    Raises:
        InputError: fewer samples than one batch needs.
    """
    counts = np.asarray(samples_per_shard, dtype=np.int64)
    samples = int(counts.sum())
    steps = steps_per_epoch(samples, global_batch)
    rng = np.random.default_rng([seed, epoch])

    first = np.cumsum(counts) - counts
    shuffled = rng.permutation(len(counts))
    sequence = np.concatenate([np.arange(first[shard], first[shard] + counts[shard]) for shard in shuffled])
    # The cut falls anywhere, so that no sample is more likely than another to be among those left over.
    sequence = np.roll(sequence, int(rng.integers(samples)))[: steps * global_batch]

    lanes = 1 if samples <= window else _largest_divisor(global_batch, at_most=len(counts))
    lane_window = max(1, window // lanes)
    lane_order = np.stack([_shuffle(lane, lane_window, rng) for lane in sequence.reshape(lanes, -1)])
    # (lanes, steps, samples of a lane in a batch) -> (steps, global_batch), lanes side by side within a batch
    return lane_order.reshape(lanes, steps, -1).transpose(1, 0, 2).reshape(steps, global_batch)


def _shuffle(sequence: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """A random order in which no element comes more than `window` places early or late."""
    if len(sequence) <= window:
        return rng.permutation(sequence)
    return sequence[np.argsort(np.arange(len(sequence)) + rng.uniform(0, window, len(sequence)), kind="stable")]


def _largest_divisor(number: int, at_most: int) -> int:
    return max(divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)


def reading_horizon(global_batch: int, window: int, readers: int) -> int:
    """How many places ahead of its turn, in its own order of samples, a reader may meet a sample and should keep it.

    A lane's sample comes at most `window` / lanes places early or late, so that all readers together meet samples of
    their lanes 2 * `window` places ahead at most; the batches that they are in the midst of come on top. What comes
    even later lies in another lane's piece of the same shard, or where the epoch's sequence was cut.

    Args:
        readers: ranks x loader workers, among which the order is dealt.
    """
    return -(-2 * window // readers) + 4 * global_batch


def rank_share(global_batch: int, ranks: int, rank: int) -> slice:
    """The places of a global batch that a rank computes; shares differ by one image at most.

    Raises:
        InputError: more ranks than images in a batch.
    """
    if ranks > global_batch:
        raise InputError(f"train.global_batch {global_batch} is less than the {ranks} ranks; use fewer or raise it")
    return slice(rank * global_batch // ranks, (rank + 1) * global_batch // ranks)


def accumulation_steps(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Micro-batches a rank computes for one update: the same number on every rank, none of them empty."""
    smallest, largest = global_batch // ranks, -(-global_batch // ranks)
    return min(smallest, -(-largest // micro_batch))


def micro_batches(global_batch: int, micro_batch: int, ranks: int, rank: int) -> list[slice]:
    """A rank's share of a global batch, cut into micro-batches whose sizes differ by one image at most."""
    share = rank_share(global_batch, ranks, rank)
    pieces = accumulation_steps(global_batch, micro_batch, ranks)
    size = share.stop - share.start
    return [
        slice(share.start + piece * size // pieces, share.start + (piece + 1) * size // pieces)
        for piece in range(pieces)
    ]


def evaluation_batches(samples: int, batch: int, ranks: int, rank: int) -> list[range]:
    """The batches that a rank scores: every sample once over all ranks, in the manifest's order.

    The batches are cut before they are dealt, and dealt whole: sums of floating-point numbers depend on what else is in
    a batch, so that its composition must not follow from the number of ranks. The first rank always has the first one.
    """
    batches = -(-samples // batch)
    mine = range(-(-rank * batches // ranks), -(-(rank + 1) * batches // ranks))
    return [range(number * batch, min((number + 1) * batch, samples)) for number in mine]
