"""The arithmetic and the settings that an engine is given, and what of the host's time a step may not cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdnet_dist.distributed import computes_in_bf16
from mdnet_dist.engine import deepspeed_config
from mdnet_dist.trainer import Trainer
from tests.tiny import tiny_config, tiny_set

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("has", [True, False])
def test_auto_follows_what_the_device_multiplies(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation)
    for device in (CPU, GPU):
        assert computes_in_bf16("auto", device) is has
        assert computes_in_bf16("bf16", device) and not computes_in_bf16("fp32", device)


def test_a_torch_that_cannot_say_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert not computes_in_bf16("auto", CPU)


def test_deepspeed_does_not_wait_for_the_gpu_to_take_the_time(tmp_path: Path) -> None:
    tiny_set(tmp_path / "shards", train=8, val=2, test=2)
    config = tiny_config(tmp_path / "shards", tmp_path / "runs")
    made = deepspeed_config(config, 1, bf16=True)
    assert made["timers"] == {"throughput": {"enabled": False}} and made["wall_clock_breakdown"] is False
    assert made["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "torch_autocast" not in deepspeed_config(config, 1, bf16=False)


def test_a_step_reads_nothing_back_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step is launched no tensor is turned into a number of Python's: on a GPU each would be a wait.

    DeepSpeed's clipping included. Batches come from memory: a loader turns numbers of its own. Lengths of sentences,
    whole numbers, are on the CPU.
    """
    tiny_set(tmp_path / "shards", train=12, val=2, test=2)
    config = tiny_config(
        tmp_path / "shards",
        tmp_path / "runs",
        {"train.clip_norm": 1.0, "blend.eta": "balanced", "train.micro_batch": 4},
    )
    trainer = Trainer(config)
    batches = list(trainer.data.training_batches(config, 0, 3, pin_memory=False))
    per_step = len(batches) // 3
    trainer.train_step(iter(batches[:per_step]))
    read: list[str] = []
    whole = trainer._launch

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, name: str = name, original: object = original) -> object:
            if tensor.is_floating_point() or tensor.dtype == torch.bool:
                read.append(f"{name} of {tuple(tensor.shape)}")
            return original(tensor)  # type: ignore[operator]

        monkeypatch.setattr(torch.Tensor, name, noted)
    launched = whole(iter(batches[per_step : 2 * per_step]))
    monkeypatch.undo()
    assert read == []
    assert trainer._report(launched).moved
    trainer.close()


def test_freed_memory_is_kept_and_other_libraries_are_left_alone() -> None:
    """Pages that a step has touched are not asked of the kernel again at the next."""
    program = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from mdnet_dist.machine import keep_freed_memory
if sys.argv[2] == "keep":
    keep_freed_memory()
import torch
torch.set_num_threads(1)
for round in range(6):
    if round == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (3, 11, 7, 40):
        torch.ones(size << 18).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for how in ("keep", "leave"):
        command = [sys.executable, "-c", program, str(Path(__file__).parent.parent), how]
        faults[how] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    if sys.platform == "linux" and faults["leave"] > 1000:  # glibc; others may keep it anyway
        assert faults["keep"] < faults["leave"] / 10, faults


@pytest.mark.slow
def test_a_compiled_image_model_trains_as_one_that_is_not(tmp_path: Path) -> None:
    """`train.compile`: the same losses but for rounding, evaluation included."""
    tiny_set(tmp_path / "shards", train=12, val=4, test=2)
    losses = []
    for compiled in (False, True):
        config = tiny_config(
            tmp_path / "shards", tmp_path / str(compiled), {"train.compile": compiled, "train.epochs": 1}
        )
        trainer = Trainer(config, with_test=False)
        batches = iter(trainer.data.training_batches(config, 0, 2, pin_memory=False))
        reports = [trainer.train_step(batches) for _ in range(2)]
        scored = trainer.evaluate(trainer.data.validation).metrics
        losses.append([value for report in reports for value in (report.loss_m, report.loss_l)] + [scored["loss_l"]])
        trainer.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
