"""Which rank reads which sample when: properties over many cluster shapes, checked with integers alone."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist.errors import InputError
from mdnet_dist.plan import (
    accumulation_steps,
    epoch_order,
    evaluation_batches,
    micro_batches,
    rank_share,
    steps_per_epoch,
)


def check_epoch(counts: list[int], global_batch: int, window: int, seed: int, epoch: int) -> np.ndarray:
    """All that must hold of the order of an epoch, whoever reads it."""
    samples = sum(counts)
    order = epoch_order(counts, seed=seed, epoch=epoch, global_batch=global_batch, window=window)
    assert order.dtype == np.int64
    assert order.shape == (samples // global_batch, global_batch)
    flat = order.ravel()
    assert flat.min() >= 0 and flat.max() < samples
    assert len(np.unique(flat)) == len(flat) == samples - samples % global_batch
    again = epoch_order(counts, seed=seed, epoch=epoch, global_batch=global_batch, window=window)
    assert np.array_equal(order, again)
    return order


def check_ranks(global_batch: int, micro_batch: int, ranks: int) -> None:
    """All that must hold of the shares of the ranks in a batch."""
    pieces = accumulation_steps(global_batch, micro_batch, ranks)
    places: list[int] = []
    sizes: list[int] = []
    for rank in range(ranks):
        share = rank_share(global_batch, ranks, rank)
        cut = micro_batches(global_batch, micro_batch, ranks, rank)
        assert len(cut) == pieces, "ranks would wait for each other for ever"
        assert (cut[0].start, cut[-1].stop) == (share.start, share.stop)
        places += [place for piece in cut for place in range(global_batch)[piece]]
        sizes += [piece.stop - piece.start for piece in cut]
    assert places == list(range(global_batch)), "each place of the batch on one rank, in order"
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 2
    # With micro_batch 1 and shares of s and s + 1, all ranks make s pieces, and one of them has two images.
    most = micro_batch if global_batch % ranks == 0 or micro_batch > 1 else 2
    assert max(sizes) <= most


SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@settings(max_examples=150, deadline=None)
@given(SHARDS, st.data(), st.integers(1, 300), st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_an_epoch_has_each_sample_once_but_for_the_remainder(
    counts: list[int], data: st.DataObject, window: int, seed: int, epoch: int
) -> None:
    check_epoch(counts, data.draw(st.integers(1, sum(counts))), window, seed, epoch)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.data())
def test_ranks_share_a_batch(global_batch: int, micro_batch: int, data: st.DataObject) -> None:
    check_ranks(global_batch, micro_batch, data.draw(st.integers(1, global_batch)))


def test_ranks_share_every_small_batch() -> None:
    for global_batch in range(1, 25):
        for micro_batch, ranks in itertools.product(range(1, global_batch + 2), range(1, global_batch + 1)):
            check_ranks(global_batch, micro_batch, ranks)


def test_three_thousand_clusters() -> None:
    """Whole epochs, dealt to ranks, micro-batches and loader workers: all that is read is the epoch, once."""
    rng = random.Random(0)
    for _ in range(3000):
        counts = [rng.randrange(60) for _ in range(rng.randint(1, 10))]
        counts[0] += 1
        global_batch = rng.randint(1, min(sum(counts), 64))
        ranks = rng.randint(1, global_batch)
        micro_batch, workers = rng.randint(1, 70), rng.randint(1, 4)
        order = check_epoch(
            counts, global_batch, rng.choice([1, 5, 50, 5000]), rng.randrange(1000), rng.randrange(1000)
        )
        read: list[np.ndarray] = []
        micro_batches_of_rank: set[int] = set()
        for rank in range(ranks):
            pieces = micro_batches(global_batch, micro_batch, ranks, rank)
            dealt = [batch[piece] for batch in order for piece in pieces]
            micro_batches_of_rank.add(len(dealt))
            # Workers in turn, as the DataLoader asks them.
            by_worker = [dealt[worker::workers] for worker in range(workers)]
            in_turn = [by_worker[number % workers][number // workers] for number in range(len(dealt))]
            assert all(np.array_equal(a, b) for a, b in zip(in_turn, dealt))
            read += dealt
        assert len(micro_batches_of_rank) == 1
        assert np.array_equal(np.sort(np.concatenate(read)), np.sort(order.ravel()))


# -------------------------------------------------------------------------------------------------------- the window


def lane_places(order: np.ndarray, lanes: int) -> dict[int, tuple[int, int]]:
    """{sample: (lane, place in it)}."""
    per_lane = order.shape[1] // lanes
    return {
        int(sample): (place // per_lane, step * per_lane + place % per_lane)
        for step, batch in enumerate(order)
        for place, sample in enumerate(batch)
    }


def number_of_lanes(global_batch: int, shards: int) -> int:
    return max(number for number in range(1, shards + 1) if global_batch % number == 0)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 48), st.integers(1, 100), st.integers(0, 999)
)
def test_no_sample_moves_further_than_the_window(counts: list[int], global_batch: int, window: int, seed: int) -> None:
    """Compared with a window of one sample, which leaves each lane in the order of its shards."""
    samples = sum(counts)
    if not global_batch <= samples or window >= samples:
        return
    lanes = number_of_lanes(global_batch, len(counts))
    arguments = {"seed": seed, "epoch": 3, "global_batch": global_batch}
    read = epoch_order(counts, window=1, **arguments)
    shuffled = epoch_order(counts, window=window, **arguments)
    read_places, places = lane_places(read, lanes), lane_places(shuffled, lanes)
    assert read_places.keys() == places.keys()
    lane_window = max(1, window // lanes)
    for sample, (lane, place) in places.items():
        read_lane, read_place = read_places[sample]
        assert lane == read_lane
        assert abs(place - read_place) <= lane_window
    flat, read_flat = np.argsort(shuffled.ravel()), np.argsort(read.ravel())
    assert np.abs(flat - read_flat).max() <= max(window, lanes) + global_batch
    # A reader of one lane holds what it has read and not yet given out: the window at most.
    for number in range(lanes):
        mine = sorted((place, read_places[sample][1]) for sample, (lane, place) in places.items() if lane == number)
        furthest = np.maximum.accumulate([read_place for _, read_place in mine])
        assert (furthest + 1 - np.arange(len(mine))).max() <= lane_window + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 48), st.integers(0, 999))
def test_lanes_read_shards_from_front_to_back(counts: list[int], global_batch: int, seed: int) -> None:
    samples = sum(counts)
    if global_batch > samples or samples < 2:
        return
    lanes = number_of_lanes(global_batch, len(counts))
    order = epoch_order(counts, seed=seed, epoch=0, global_batch=global_batch, window=1)
    lane_orders = order.reshape(len(order), lanes, -1).transpose(1, 0, 2).reshape(lanes, -1)
    first = np.cumsum(counts) - counts
    jumps = 0
    for lane in lane_orders:
        shard_of = np.searchsorted(first, lane, side="right") - 1
        jumps += int((np.diff(lane) != 1).sum())
        for before, after in itertools.pairwise(zip(lane.tolist(), shard_of.tolist())):
            if before[0] + 1 != after[0]:
                assert before[0] == first[before[1]] + counts[before[1]] - 1 or len(lane_orders) == 1
                assert after[0] == first[after[1]]
    # Each shard begins once somewhere, and the cut of the sequence falls inside one.
    assert jumps <= len(counts)


def test_a_set_that_fits_into_the_window_is_permuted_wholly() -> None:
    """Every sample is equally often at every place: 12 samples, 6,000 epochs, each cell within 6 deviations of 500."""
    counts, epochs = [5, 0, 4, 3], 6000
    table = np.zeros((12, 12))
    for epoch in range(epochs):
        order = epoch_order(counts, seed=1, epoch=epoch, global_batch=4, window=12)
        table[order.ravel(), np.arange(12)] += 1
    expected = epochs / 12
    assert np.abs(table - expected).max() < 6 * np.sqrt(expected * 11 / 12)
    chi_square = ((table - expected) ** 2 / expected).sum()  # 121 degrees of freedom: mean 121, deviation 15.6
    assert 60 < chi_square < 200


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_epochs_and_seeds_differ(window: int) -> None:
    def order(seed: int, epoch: int) -> bytes:
        return epoch_order([9] * 8, seed=seed, epoch=epoch, global_batch=8, window=window).tobytes()

    assert len({order(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400


@pytest.mark.parametrize("window", [1, 10, 1000])
def test_all_samples_are_left_out_equally_often(window: int) -> None:
    """50 samples in unequal shards, 2 left over from 3 batches of 16, 3,000 epochs: each about 120 times."""
    counts, epochs = [3, 17, 1, 9, 20], 3000
    left_out: Counter[int] = Counter()
    per_epoch = set()
    for epoch in range(epochs):
        order = epoch_order(counts, seed=2, epoch=epoch, global_batch=16, window=window)
        missing = frozenset(range(50)) - frozenset(order.ravel().tolist())
        assert len(missing) == 2
        left_out.update(missing)
        per_epoch.add(missing)
    share = 2 / 50
    deviation = (epochs * share * (1 - share)) ** 0.5  # 10.7
    assert set(left_out) == set(range(50))
    assert max(abs(times - epochs * share) for times in left_out.values()) < 5 * deviation
    assert len(per_epoch) > 50, "others sit out in the next epoch"


# ---------------------------------------------------------------------------------------------------- shuffle quality


def neighbours_apart(order: np.ndarray) -> np.ndarray:
    """Places between samples that lie side by side in the set."""
    place = np.full(order.max() + 2, np.nan)
    place[order.ravel()] = np.arange(order.size)
    apart = np.abs(np.diff(place))
    return apart[~np.isnan(apart)]


@pytest.mark.parametrize(
    ("shards", "samples", "global_batch", "window", "least", "share_of_permutation"),
    [
        (10, 100, 32, 4096, 300, 0.9),
        (40, 256, 32, 4096, 1100, 0.3),
        (400, 256, 64, 4096, 1300, 0.03),
        (100, 1000, 64, 4096, 1200, 0.03),
        (400, 256, 64, 512, 300, 0.008),
    ],
)
def test_neighbours_in_a_shard_land_apart(
    shards: int, samples: int, global_batch: int, window: int, least: float, share_of_permutation: float
) -> None:
    """Mean places between samples that are neighbours in their shard, and shards in a batch, over an epoch.

    | shards x samples | batch | window | mean places apart | of a permutation | shards in a batch | of a permutation |
    | --- | --- | --- | --- | --- | --- | --- |
    | 10 x 100 | 32 | 4096 | 337 | 331 | 9.5 | 9.6 |
    | 40 x 256 | 32 | 4096 | 1261 | 3413 | 31.7 | 22.1 |
    | 400 x 256 | 64 | 4096 | 1560 | 34133 | 64.0 | 59.5 |
    | 100 x 1000 | 64 | 4096 | 1465 | 33323 | 64.0 | 47.5 |
    | 400 x 256 | 64 | 512 | 391 | 34133 | 64.0 | 59.5 |

    A set that fits into the window is permuted wholly. Of a larger one, neighbours come to lie a third of the window
    apart, and a batch mixes more shards than a permutation would; two neighbours in one batch are rarer, too.
    """
    order = epoch_order([samples] * shards, seed=0, epoch=0, global_batch=global_batch, window=window)
    apart = neighbours_apart(order)
    assert apart.mean() > least
    assert apart.mean() > share_of_permutation * order.size / 3
    in_batch = np.mean([len(np.unique(batch // samples)) for batch in order])
    permuted = shards * (1 - (1 - 1 / shards) ** global_batch)
    assert in_batch > 0.95 * permuted
    together = np.mean(apart < global_batch)
    assert together < 2.5 * global_batch / order.size


# ------------------------------------------------------------------------------------------------ evaluation, refusals


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(1, 70), st.integers(1, 40))
def test_evaluation_covers_each_sample_once(samples: int, batch: int, ranks: int) -> None:
    """Whatever the number of ranks, in the same batches; shares differ by one batch at most."""
    shares = [evaluation_batches(samples, batch, ranks, rank) for rank in range(ranks)]
    assert [sample for share in shares for numbers in share for sample in numbers] == list(range(samples))
    assert [numbers for share in shares for numbers in share] == evaluation_batches(samples, batch, 1, 0)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes), "the first rank, which keeps the pictures, has the first batch"


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_steps(samples: int, global_batch: int) -> None:
    if global_batch > samples:
        with pytest.raises(InputError, match=f"global_batch {global_batch} exceeds the {samples} training samples"):
            steps_per_epoch(samples, global_batch)
    else:
        assert steps_per_epoch(samples, global_batch) * global_batch <= samples


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(InputError, match=r"train\.global_batch 9 exceeds the 8 training samples"):
        epoch_order([4, 4], seed=0, epoch=0, global_batch=9, window=10)
    with pytest.raises(InputError, match=r"train\.global_batch 1 exceeds the 0 training samples"):
        epoch_order([], seed=0, epoch=0, global_batch=1, window=10)


def test_more_ranks_than_images_are_refused_on_every_rank() -> None:
    for rank in range(5):
        with pytest.raises(InputError, match=r"train\.global_batch 4 is less than the 5 ranks"):
            rank_share(4, 5, rank)


def test_a_large_set_is_planned_in_no_time() -> None:
    """A million samples in a thousand shards."""
    order = epoch_order([1000] * 1000, seed=0, epoch=0, global_batch=1024, window=8192)
    assert order.shape == (976, 1024)
    assert len(np.unique(order)) == order.size
