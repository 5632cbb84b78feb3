"""Classification of images without reports: one run, and the sweep over concat_depth, as commands and as functions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_shards.writer import Sample, write_shards
from mdnet_dist.config_file import as_yaml, load_config
from mdnet_dist.errors import InputError
from mdnet_dist.images import encode_png
from mdnet_dist.shards import SampleRecord
from mdnet_dist.sweep import Row, run_sweep, sweep_table
from tests.conftest import REPOSITORY
from tests.test_train import _environment, deepspeed, run
from tests.tiny import tiny_config

CLASSES = ["dark", "light"]
ERROR = {"top1_error", "parameters", "flops", "seconds"}


def picture_set(folder: Path, parts: Mapping[str, int]) -> Path:
    """Dark and light noise, without reports and topics."""
    rng = np.random.default_rng(0)
    samples = []
    for split, count in parts.items():
        for number in range(count):
            label = CLASSES[number % 2]
            noise = rng.integers(0, 160, (32, 32, 3)) + (96 if label == "light" else 0)
            samples.append(
                Sample(
                    key=f"{split}-{number}",
                    split=split,
                    record=SampleRecord(patient=f"{split}-{number}", label=label, reports=[]),
                    image=encode_png(Image.fromarray(noise.astype(np.uint8))),
                    extension="png",
                )
            )
    write_shards(samples, folder, name="pictures", topics=[], classes=CLASSES, samples_per_shard=8)
    return folder


def write_yaml(folder: Path, shards: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    dotted: dict[str, Any] = {
        "model": {"image": {"form": "cifar", "depth": 20, "widening": 1}},
        "blend.beta": {"kind": "constant", "value": 0.0},
        "optimizer": {"kind": "sgd", "image": {"lr": 0.05}, "head": {"lr": 0.05}},
        "train.epochs": 2,
        "evaluate.metric": "label_accuracy",
        **(overrides or {}),
    }
    path = folder / "pictures.yaml"
    path.write_text(as_yaml(tiny_config(shards, folder / "runs", dotted)))
    return path


def mlflow_runs(folder: Path) -> dict[str, Any]:
    """{name: run} of the sweep's store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.absolute() / 'runs' / 'mlflow.db'}")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {run.info.run_name: run for run in found}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_set_without_topics_and_val_trains_scores_and_prints(tmp_path: Path, ranks: int) -> None:
    shards = picture_set(tmp_path / "shards", {"train": 32, "test": 10})
    config = write_yaml(tmp_path, shards, {"train.epochs": 6})
    finished = run(*(deepspeed(ranks) if ranks > 1 else [sys.executable]), "launch/train_cifar.py", config)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    folder = tmp_path / "runs" / "tiny"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"top-1 error  {100 * (1 - metrics['test/label_accuracy']):.2f} %" in finished.stdout
    assert metrics["test/label_accuracy"] > 0.8, "dark from light is learnt"
    assert "no validation part" in finished.stdout and "0 topics" in finished.stdout
    assert (folder / "pictures" / "confusion_label.png").exists()
    if ranks > 1:
        return
    # What is made for reports does without them.
    for program in ("evaluate.py", "explain.py"):
        source = [] if program == "evaluate.py" else [str(shards), "--out", str(tmp_path / "pages")]
        ended = run(sys.executable, f"launch/{program}", folder, *source)
        assert ended.returncode == 0, ended.stderr + ended.stdout
    ended = run(sys.executable, "launch/train.py", config, "name=by_train")
    assert ended.returncode == 0, ended.stderr + ended.stdout


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    shards = picture_set(tmp_path / "shards", {"train": 32, "val": 4, "test": 10})
    config = write_yaml(tmp_path, shards, {"train.epochs": 1})
    command = [*deepspeed(2), "launch/train_cifar.py", config, "name=whole", "--sweep", "concat_depth"]
    whole = run(*command, "--depths", "0", "full")
    assert whole.returncode == 0, whole.stderr + whole.stdout

    one = [sys.executable, "launch/train_cifar.py", config, "--sweep", "concat_depth", "train.epochs=12"]
    folder = tmp_path / "runs" / "tiny"
    started = subprocess.Popen(
        [str(part) for part in one], cwd=REPOSITORY, env=_environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 200
        for line in started.stdout or ():  # in the middle of the second run
            if line.startswith("step 3/") and (folder / "tiny-depth-1").exists():
                break
            assert time.monotonic() < deadline
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=100)
    finally:
        started.kill()
        started.wait()
    assert started.returncode == 143
    state = json.loads((folder / "sweep.json").read_text())
    assert [row["depth"] for row in state["rows"]] == [0] and set(state["spent"]) == {"1"}
    first_line = (folder / "table.md").read_text().splitlines()[4]

    refused = run(*one, "--resume", "train.seed=5")
    assert refused.returncode == 2 and "train.seed 0, not 5" in refused.stderr
    finished = run(*one, "--resume")
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert "concat_depth 0: done before" in finished.stdout
    assert "resuming" in finished.stdout, "the stopped run goes on where it was"
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[4] == first_line
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["0", "1", "full"]
    assert (folder / "table.png").stat().st_size > 5000
    rows = json.loads((folder / "sweep.json").read_text())["rows"]
    for row in rows:
        metrics = json.loads((folder / f"tiny-depth-{row['depth']}" / "metrics.json").read_text())
        assert row["error"] == 1 - metrics["test/label_accuracy"] and row["images"] == 10
        assert f"{100 * row['error']:.2f}" in finished.stdout
        assert (
            load_config(folder / f"tiny-depth-{row['depth']}" / "config.yaml").model.image.concat_depth == row["depth"]
        )

    runs = mlflow_runs(tmp_path)
    for sweep, depths in (("tiny", [0, 1, "full"]), ("whole", [0, "full"])):
        parent = runs[sweep]
        assert parent.info.status == "FINISHED"
        assert set(parent.data.metrics) == {f"depth_{depth}/{name}" for depth in depths for name in ERROR}
        for depth in depths:
            child = runs[f"{sweep}-depth-{depth}"]
            assert child.info.status == "FINISHED"
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id


# ---------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--depths", "1"], ["--depths", "--sweep"]),
        (["--sweep", "concat_depth", "--depths", "one"], ["'one'", "full"]),
        (["--sweep", "depth"], ["concat_depth"]),
        (["train.epochs=many"], ["train.epochs"]),
    ],
)
def test_a_wrong_command_is_named(tmp_path: Path, arguments: list[str], named: list[str]) -> None:
    ended = run(sys.executable, "launch/train_cifar.py", "launch/configs/cifar10_small.yaml", *arguments)
    assert ended.returncode == 2
    assert all(name in ended.stderr for name in named), ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_wrong_sweep_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shards = picture_set(tmp_path / "shards", {"train": 8})
    config = load_config(write_yaml(tmp_path, shards))
    for depths, named in (([0, 0], "each depth once"), ([0, 3], "exceeds the 2 units"), ([], "each depth once")):
        with pytest.raises(InputError, match=named):
            run_sweep(config, depths)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="test part"):
        run_sweep(config)
    assert not (tmp_path / "runs").exists()


def test_the_table_is_markdown_that_lines_up() -> None:
    rows = [
        Row(depth=0, error=0.25, images=4, parameters=408_794, flops=179_000_000, seconds=61.4),
        Row(depth="full", error=0.06125, images=4, parameters=17_402, flops=3_490_000_000, seconds=7.0),
    ]
    assert sweep_table(rows).splitlines() == [
        "| concat_depth | top-1 error % | parameters | FLOPs an image | seconds |",
        "| -----------: | ------------: | ---------: | -------------: | ------: |",
        "|            0 |         25.00 |    408,794 |      179 MFLOP |      61 |",
        "|         full |          6.12 |     17,402 |     3.49 GFLOP |       7 |",
    ]
