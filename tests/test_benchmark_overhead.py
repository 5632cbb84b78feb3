"""What a run costs besides its steps: the arithmetic of the rows by hand, and a real run on a tiny set."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdnet_dist.benchmark.overhead_suite import (
    Lap,
    Memory,
    Stopwatches,
    Watched,
    memory_rows,
    share_rows,
    start_rows,
    watch_run,
)
from mdnet_dist.benchmark.rows import Row
from tests.tiny import tiny_config, tiny_set

MEMORY = Memory(before=100, gradients=20, activations=60, batch=20, peak=300)


def lap(name: str, begun: float, seconds: float) -> Lap:
    return Lap(name=name, begun=begun, ended=begun + seconds)


def watched(laps: list[Lap], seconds: float = 100.0) -> Watched:
    return Watched(laps=laps, memory=MEMORY, seconds=seconds)


def values(rows: list[Row]) -> dict[str, float]:
    return {one.name.strip(): one.value for one in rows}


def test_the_parts_of_a_start_are_all_of_it() -> None:
    laps = [
        lap("DeepSpeed", 2.0, 1.0),
        lap("data", 3.0, 0.5),
        lap("DeepSpeed", 4.0, 0.0),
        lap("engine", 4.0, 1.5),
        lap("trainer", 2.0, 4.0),
        lap("tracking", 6.0, 2.0),
        lap("step", 8.5, 1.5),
        lap("data", 20.0, 1.0),
    ]
    found = values(start_rows(watched(laps), "demo"))
    assert found.pop("time to the end of the first step") == pytest.approx(10.0)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["import of DeepSpeed"] == pytest.approx(0.1)
    assert found["imports (torch, ours)"] == pytest.approx(0.2)
    assert found["MLflow and its store"] == pytest.approx(0.2)
    assert found["the rest"] == pytest.approx(0.15)  # 1 s inside the trainer, 0.5 s before the first step


def test_shares_are_those_of_the_whole_run(tmp_path: Path) -> None:
    overrides = {"train.epochs": 10, "evaluate.every_epochs": 4, "train.checkpoint_every_epochs": 2}
    config = tiny_config(tmp_path, tmp_path, overrides)
    steps = [lap("step", 10.0 + number, 0.9) for number in range(8)]
    laps = [
        *steps,
        lap("evaluate", 18.0, 5.0),
        lap("save", 23.0, 0.5),
        lap("evaluate", 24.0, 2.0),
        lap("evaluate", 26.0, 3.0),
        Lap(name="finish", begun=24.0, ended=30.0),
    ]
    found = values(share_rows(watched(laps, seconds=40.0), config, 20, "tiny"))
    # 200 steps of 1 s; 3 evaluations, the first of 5 s, the others of 2 s as the first one at the end, and 5 s at the
    # end; 5 checkpoints and 3 of a new best score; a start of 10 s; 16 s from `finish` on, 5 of them evaluations.
    whole = 200 + (5 + 2 * 2 + 5) + 8 * 0.5 + 10 + 11
    assert found["evaluations' share of the run"] == pytest.approx(14 / whole)
    assert found["checkpoints' share of the run"] == pytest.approx(4 / whole)
    assert found["the start's"] == pytest.approx(10 / whole)
    assert found["pictures', pages' and the served model's"] == pytest.approx(11 / whole)
    assert found["steps'"] == pytest.approx(200 / whole)


def test_an_evaluation_between_two_steps_is_no_part_of_a_step(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, {"train.epochs": 2})
    begins = [0.0, 1.0, 2.0, 3.0, 4.0, 14.0, 15.0, 16.0]
    laps = [lap("step", begun, 0.9) for begun in begins]
    laps += [lap("evaluate", 5.0, 8.0), lap("save", 13.0, 0.5), lap("evaluate", 18.0, 1.0), lap("finish", 17.5, 2.0)]
    found = share_rows(watched(laps, seconds=20.0), config, 4, "tiny")
    steps = next(one for one in found if one.name.strip() == "steps'")
    whole = 8 * 1.0 + (8 + 1 * 1.0 + 1) + 2 * 0.5 + 0.0 + (20 - 17.5 - 1)
    assert steps.value == pytest.approx(8 / whole)


def test_memory_is_held_against_what_must_be() -> None:
    assert memory_rows(MEMORY, "demo")[0].value == pytest.approx(1.5)


def test_stopwatches_note_every_call_also_one_that_fails() -> None:
    class Thing:
        def work(self, fail: bool) -> str:
            if fail:
                raise ValueError("no")
            return "done"

    watches = Stopwatches(time.monotonic())
    watches.put_on(Thing, "work", "working")
    assert Thing().work(False) == "done"
    with pytest.raises(ValueError, match="no"):
        Thing().work(True)
    assert [one.name for one in watches.laps] == ["working"] * 2
    assert 0 <= watches.laps[0].begun <= watches.laps[0].ended <= watches.laps[1].begun


@pytest.mark.parametrize("program", ["train.py", "train_cifar.py"])
def test_help_imports_nothing_heavy(program: str) -> None:
    command = [sys.executable, "-X", "importtime", f"launch/{program}", "--help"]
    told = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "deepspeed", "mlflow", "numpy", "pydantic", "yaml"}


@pytest.mark.slow
def test_a_real_run_is_watched_from_start_to_end(tmp_path: Path) -> None:
    manifest = tiny_set(tmp_path / "tiny", train=48)
    config = tiny_config(tmp_path / "tiny", tmp_path, {"train.micro_batch": 8, "train.epochs": 24})
    found = watch_run(config, 2)
    assert len(found.seconds_of("step")) == 2 * manifest.parts["train"].samples // 8
    assert len(found.seconds_of("evaluate")) == 4  # two in training, validation and test at the end
    assert len(found.seconds_of("save")) == 2
    assert 0 < found.memory.activations < 2**28
    assert found.memory.peak > found.memory.before > 2**26
    assert all(0 <= one.begun <= one.ended <= found.seconds for one in found.laps)
    rows = values([*start_rows(found, "tiny"), *share_rows(found, config, 6, "tiny")])
    assert 0 < rows["evaluations' share of the run"] < 1


def test_a_program_started_by_a_rank_is_a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """After another suite this process is a rank, and holds the port that it was given."""
    from mdnet_dist.distributed import outside_of_a_job, prepare_environment

    before = outside_of_a_job()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    prepare_environment()
    assert outside_of_a_job() == before
