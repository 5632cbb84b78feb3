"""`launch/benchmark.py` as a person runs it, over a tiny set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdnet_dist.config_file import as_yaml
from tests.conftest import REPOSITORY
from tests.tiny import tiny_config, tiny_set

COMMAND = [sys.executable, "launch/benchmark.py"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MLFLOW_DISABLE_TELEMETRY": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_set(tmp_path / "shards")
    path = tmp_path / "tiny.yaml"
    path.write_text(as_yaml(tiny_config(tmp_path / "shards", tmp_path / "runs", {"data.workers": 1})))
    return path


@pytest.mark.slow
def test_the_step_is_measured_told_and_written(config: Path, tmp_path: Path) -> None:
    found = run(config, "--suite", "step", "--short", "--out", tmp_path / "out" / "step.json")
    assert (found.returncode, found.stderr) == (0, ""), found.stderr + found.stdout
    written = json.loads((tmp_path / "out" / "step.json").read_text())
    rows = {row["name"].strip(): row for row in written["rows"]}
    assert rows["of plain PyTorch on batches in memory"]["target"] == 0.95
    assert 0 < rows["of plain PyTorch on batches in memory"]["value"] < 3
    assert rows["faster than the straightforward step"]["count"] >= 5
    assert rows["matrix product, fp32"]["value"] > 0
    assert written["environment"]["versions"]["torch"] and written["configs"]["tiny"]["train"]["global_batch"]
    for line in ("of the roofline", "waits for data", "targets met", f"written to {tmp_path / 'out' / 'step.json'}"):
        assert line in found.stdout
    assert list((tmp_path / "runs").glob("*")) == [], "a benchmark leaves no run behind"


@pytest.mark.slow
def test_the_plan_needs_no_gpu_and_says_that_it_guesses(config: Path) -> None:
    found = run("--plan", config, "--gpus", 1, 8)
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    assert "ESTIMATED" in found.stdout and "tiny on more GPUs" in found.stdout


@pytest.mark.slow
def test_what_is_wrong_is_one_line_and_code_2(config: Path, tmp_path: Path) -> None:
    for arguments, told in (
        ([tmp_path / "none.yaml"], "none.yaml"),
        ([config, "data.shards=nowhere", "--suite", "data"], "nowhere"),
        ([config, "train.epoch=3"], "train.epoch"),
    ):
        found = run(*arguments, "--short")
        assert found.returncode == 2 and found.stderr.count("\n") == 1 and told in found.stderr, found.stderr
