"""The plan for many GPUs against rings that are walked, formulas worked out by hand, and a shard set's manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mdnet_dist.benchmark.cluster_plan import (
    Links,
    Planned,
    Task,
    Work,
    add_plan_options,
    as_table,
    batch_norms_of,
    exchange_seconds,
    plan,
    print_plan,
    small_seconds,
    step_of,
)
from mdnet_dist.errors import InputError
from mdnet_dist.run_data import open_data
from mdnet_dist.shards import ShardManifest
from tests.tiny import tiny_config, tiny_set

WORK = Work(seconds_an_image=0.01, start_seconds=0.1, weights=1_000_000)
TASK = Task(samples=1000, epochs=10, bytes_an_image=2e4, micro_batch=16)
NO_LATENCY = Links(inside_latency=0.0, between_latency=0.0)


def bytes_around_a_ring(numbers: int, ranks: int) -> int:
    """What the busiest rank sends while a vector is added up around a ring, pass by pass, in numbers."""
    pieces = [numbers // ranks + (piece < numbers % ranks) for piece in range(ranks)]
    sent = [0] * ranks
    for passes in range(2 * (ranks - 1)):
        for rank in range(ranks):
            sent[rank] += pieces[(rank - passes) % ranks]
    return max(sent)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_one_node_exchanges_what_a_ring_does(ranks: int) -> None:
    links = Links(inside_bytes_per_second=1.0, inside_latency=0.0)
    assert exchange_seconds(10_000, 2, ranks, 8, links) == pytest.approx(bytes_around_a_ring(10_000, ranks), abs=ranks)


def test_nodes_exchange_each_gpus_share_between_them() -> None:
    links = Links(
        inside_bytes_per_second=100.0, between_bytes_per_second=10.0, inside_latency=0.5, between_latency=0.25
    )
    # 4 nodes of 8: 7/8 of the bytes inside, then 3/4 of an eighth between, both ways, and two doublings of nodes.
    by_hand = 2 * (800 * 7 / 8 / 100 + 800 / 8 * 3 / 4 / 10) + 0.5 + 2 * 0.25
    assert exchange_seconds(800, 2, 32, 8, links) == pytest.approx(by_hand)


def test_latency_grows_with_the_logarithm_of_the_nodes() -> None:
    links = Links(inside_latency=1.0, between_latency=10.0)
    assert [small_seconds(gpus, 8, links) for gpus in (1, 8, 16, 64, 512)] == [0.0, 1.0, 11.0, 31.0, 61.0]


def test_one_gpu_exchanges_nothing() -> None:
    step = step_of(WORK, 16, 16, 1, 8, Links())
    assert (step.exchange, step.exposed, step.small) == (0.0, 0.0, 0.0)
    assert step.seconds == pytest.approx(0.1 + 16 * 0.01)


def test_accumulation_computes_in_pieces_and_exchanges_once_below_stage_2() -> None:
    step = step_of(WORK, 128, 16, 2, 8, NO_LATENCY)
    assert step.compute == pytest.approx(4 * 0.1 + 64 * 0.01)
    once = step_of(WORK, 32, 16, 2, 8, NO_LATENCY).exchange
    assert step.exchange == pytest.approx(once)
    sharded = Work(seconds_an_image=0.01, weights=1_000_000, zero_stage=2)
    assert step_of(sharded, 128, 16, 2, 8, NO_LATENCY).exchange == pytest.approx(4 * 1.5 * once)


def test_what_hides_behind_the_backward_pass_is_not_waited_for() -> None:
    slow = Links(inside_bytes_per_second=8e7, inside_latency=0.0)  # 4 MB of 8: 0.05 s
    hidden = [
        step_of(Work(seconds_an_image=0.01, weights=1_000_000, hidden=share), 12, 6, 2, 8, slow).exposed
        for share in (0.0, 0.5, 1.0)
    ]
    # 6 images take 0.06 s, 0.04 s of it the backward pass.
    assert hidden == pytest.approx([0.05, 0.03, 0.01])


def test_batch_norms_exchange_twice_each_in_every_piece() -> None:
    links = Links(inside_latency=1e-3)
    plain, normed = (Work(seconds_an_image=0.01, weights=1, batch_norms=norms) for norms in (0, 5))
    more = step_of(normed, 64, 16, 2, 8, links).small - step_of(plain, 64, 16, 2, 8, links).small
    assert more == pytest.approx(2 * 5 * 2 * 1e-3)


def test_plan_says_rates_epochs_and_storage() -> None:
    one, eight = plan(WORK, TASK, sizes=(1, 8), links=NO_LATENCY)
    assert (one.global_batch, eight.global_batch) == (16, 128)
    assert one.efficiency == pytest.approx(1.0)
    assert one.images_per_second == pytest.approx(16 / 0.26)
    assert one.storage_bytes_per_second == pytest.approx(16 / 0.26 * 2e4)
    assert (one.steps_per_epoch, eight.steps_per_epoch) == (62, 7)
    assert one.hours == pytest.approx(62 * 10 * 0.26 / 3600)
    assert eight.efficiency == pytest.approx(0.26 / eight.step.seconds)


def test_a_batch_larger_than_the_set_has_no_duration() -> None:
    largest = plan(WORK, TASK, sizes=(64,))[0]
    assert (largest.steps_per_epoch, largest.hours) == (0, None)
    assert "batch > set" in as_table([largest])


def test_a_fixed_batch_leaves_out_gpus_without_an_image() -> None:
    planned = plan(WORK, TASK, sizes=(1, 8, 64, 512), global_batch=64)
    assert [row.gpus for row in planned] == [1, 8, 64]
    assert {row.global_batch for row in planned} == {64}
    assert efficiencies(planned) == sorted(efficiencies(planned), reverse=True)


def efficiencies(planned: list[Planned]) -> list[float]:
    return [row.efficiency for row in planned]


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardManifest]:
    folder = tmp_path_factory.mktemp("plan") / "tiny"
    return folder, tiny_set(folder)


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    return parser.parse_args(given)


def test_estimates_are_called_estimates(
    shards: tuple[Path, ShardManifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(shards[0], tmp_path)
    print_plan(config, options())
    assert "ESTIMATED" in capsys.readouterr().out
    print_plan(config, options(), measured_seconds=0.5)
    assert "500.0 ms: measured on this machine" in capsys.readouterr().out
    print_plan(config, options("--step-seconds", "0.25"), measured_seconds=0.5)
    assert "250.0 ms: given by --step-seconds" in capsys.readouterr().out


def test_print_takes_weights_and_bytes_from_the_set(
    shards: tuple[Path, ShardManifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = shards
    config = tiny_config(folder, tmp_path)
    print_plan(config, options("--step-seconds", "0.1", "--gpus", "2", "1"))
    out = capsys.readouterr().out
    network = open_data(config).card.build()
    weights = sum(weight.numel() for weight in network.parameters())
    files = [folder / shard.file for shard in manifest.shards if shard.part == "train"]
    assert f"{weights:,} weights" in out
    assert f"each of {batch_norms_of(network)} BatchNorms" in out
    assert f"24 images an epoch of {sum(file.stat().st_size for file in files) / 24 / 1e3:.1f} kB" in out
    # Micro-batches of 4: 10 steps/s of them on one GPU.
    assert any(line.split()[:7] == ["1", "1", "4", "100.0", "0.0%", "0.0%", "40"] for line in out.splitlines())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--peak-share", "2"], "--peak-share 2.0"),
        (["--step-seconds", "nan"], "--step-seconds nan"),
        (["--network-bandwidth", "0"], "--network-bandwidth 0.0"),
        (["--node-latency", "-1"], "--node-latency -1.0"),
        (["--step-seconds", "0.1", "--start-seconds", "0.2"], "--start-seconds 0.2"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    given: list[str], said: str, shards: tuple[Path, ShardManifest], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        print_plan(tiny_config(shards[0], tmp_path), options(*given))
