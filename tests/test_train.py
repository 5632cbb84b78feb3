"""The real commands, end to end: what they write, what they print, how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mdnet_dist.checkpoint import checkpoints, load_checkpoint
from mdnet_dist.config_file import as_yaml, load_config
from mdnet_dist.distributed import outside_of_a_job
from mdnet_dist.export import load_model
from mdnet_dist.machine import free_port
from mdnet_dist.tracking_files import read_metrics
from tests.conftest import REPOSITORY, shared_data
from tests.tiny import CLASSES, TOPICS, tiny_config, tiny_set

TIMEOUT_SECONDS = 280.0


def deepspeed(ranks: int) -> list[str]:
    """The launcher for so many ranks, on a port that no other job has."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [sys.executable, launcher, "-q", "--master_port", str(free_port()), "--num_accelerators", str(ranks)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    tiny_set(folder)
    return folder


def write_yaml(folder: Path, shards: Path, **overrides: object) -> Path:
    """A configuration file for a tiny run under `folder`. Args: overrides: dotted keys, with __ for the dot."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    path = folder / "tiny.yaml"
    path.write_text(as_yaml(tiny_config(shards, folder / "runs", dotted)))
    return path


def run(*command: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root and wait for it."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env=_environment() | (environment or {}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def _environment() -> dict[str, str]:
    # One thread a process: two ranks on two cores, and the same sums whatever machine this is.
    # A rank's port, where another test has made this process one, is not for the programs that it starts.
    return dict(outside_of_a_job(), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", MLFLOW_DISABLE_TELEMETRY="true")


def the_one_line(finished: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The line that a program printed when it ended with this code; it must be the only one of the program's own."""
    assert finished.returncode == code, finished.stderr + finished.stdout
    own = [line for line in finished.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(own) == 1, finished.stderr
    assert "Traceback" not in finished.stderr + finished.stdout
    return own[0]


# ------------------------------------------------------------------------------------------------------- good input


@pytest.mark.slow
def test_two_ranks_train_score_export_and_log(tmp_path: Path, shards: Path) -> None:
    config = write_yaml(tmp_path, shards, train__epochs=2, evaluate__pictures=1, train__micro_batch=2)
    finished = run(*deepspeed(2), "launch/train.py", config, "name=two")
    assert finished.returncode == 0, finished.stderr + finished.stdout
    folder = tmp_path / "runs" / "two"
    assert "Traceback" not in finished.stderr
    assert "6 steps of 8 images on 2 CPU ranks" in finished.stdout
    assert str(folder) in finished.stdout
    assert "make ui" in finished.stdout
    assert finished.stdout.count("test scores") == 1, "one rank prints"

    assert load_config(folder / "config.yaml").name == "two"
    metrics = json.loads((folder / "metrics.json").read_text())
    for part, images in (("val", 6), ("test", 7)):
        assert metrics[f"{part}/images"] == images
        for name in ("bleu1", "bleu4", "rouge_l", "cider", "dca", "label_accuracy", "loss_m", "loss_l"):
            assert f"{part}/{name}" in metrics
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in predictions}) == 7
    for line in predictions:
        assert set(line) >= {"key", "patient", "label", "predicted_label", "report", "references", "dca_correct"}
        assert set(line["report"]) == set(TOPICS)
        assert set(line["probabilities"]) == set(CLASSES)
    points = read_metrics(folder / "metrics.jsonl")
    steps = [point["step"] for point in points if "train/loss_m" in point["metrics"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    network, card = load_model(folder)
    assert card.topics == TOPICS
    assert not network.training
    assert [path.name for path in checkpoints(folder)][-1] == "step-00000006"
    assert list((folder / "pictures").glob("report_*.png"))

    from mlflow import MlflowClient

    client = MlflowClient(load_config(folder / "config.yaml").tracking.uri)
    run_id = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    logged = client.get_run(run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.params["train.global_batch"] == "8"
    assert {"world_size", "mdnet_dist", "torch"} <= {name.rpartition(".")[2] for name in logged.data.tags}
    assert [point.step for point in client.get_metric_history(run_id, "train/loss_l")] == [1, 2, 3, 4, 5, 6]
    assert {"config.yaml", "metrics.json", "predictions.jsonl", "pictures", "explained", "model"} == {
        artifact.path for artifact in client.list_artifacts(run_id)
    }
    assert (folder / "explained" / "index.html").exists()
    assert sorted(artifact.path for artifact in client.list_artifacts(run_id, "model/artifacts")) == [
        "model/artifacts/model.json",
        "model/artifacts/model.safetensors",
    ]


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_continues_to_the_same_weights(tmp_path: Path, shards: Path) -> None:
    config = write_yaml(tmp_path, shards, train__epochs=12, evaluate__every_epochs=12, blend__eta="balanced")
    whole = run(sys.executable, "launch/train.py", config, "name=whole")
    assert whole.returncode == 0, whole.stderr

    process = subprocess.Popen(
        [sys.executable, "launch/train.py", str(config), "name=cut"],
        cwd=REPOSITORY,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 143, errors
    stopped_at = load_checkpoint(checkpoints(tmp_path / "runs" / "cut")[-1])[0].step
    assert 4 <= stopped_at < 36
    assert f"step {stopped_at}" in errors

    resumed = run(sys.executable, "launch/train.py", config, "name=cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"at step {stopped_at} of 36" in resumed.stdout
    (_, weights, state), (_, other_weights, other_state) = (
        load_checkpoint(checkpoints(tmp_path / "runs" / name)[-1]) for name in ("whole", "cut")
    )
    for one, other in ((weights, other_weights), (state, other_state)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    curves = [
        [
            (point["step"], point["metrics"]["train/loss_m"], point["metrics"]["train/loss_l"])
            for point in read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
            if "train/loss_m" in point["metrics"]
        ]
        for name in ("whole", "cut")
    ]
    assert curves[0] == curves[1]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_every_zero_stage_trains_saves_loads_and_scores(
    tmp_path: Path, shards: Path, stage: int, precision: str
) -> None:
    """Sizes that do not divide by two ranks are in it, and the best weights are loaded at the end.

    The ranks have unequal numbers of batches to score, and draw what they score.
    """
    config = write_yaml(
        tmp_path,
        shards,
        train__zero_stage=stage,
        train__precision=precision,
        evaluate__pictures=2,
        evaluate__batch=2,
    )
    finished = run(*deepspeed(2), "launch/train.py", config)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    metrics = json.loads((tmp_path / "runs" / "tiny" / "metrics.json").read_text())
    points = read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    validated = [point["metrics"]["val/loss_l"] for point in points if "val/loss_l" in point["metrics"]]
    assert metrics["val/loss_l"] == pytest.approx(validated[-1], rel=2e-2 if precision == "bf16" else 1e-5)
    load_model(tmp_path / "runs" / "tiny")
    assert len(list((tmp_path / "runs" / "tiny" / "explained").glob("*.html"))) == 3, "two images and an index"


@pytest.mark.slow
def test_a_new_run_of_the_same_name_gets_a_number(tmp_path: Path, shards: Path) -> None:
    config = write_yaml(tmp_path, shards)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    finished = run(sys.executable, "launch/train.py", config)
    assert finished.returncode == 0, finished.stderr
    assert str(tmp_path / "runs" / "tiny-2") in finished.stdout
    assert not list((tmp_path / "runs" / "tiny").iterdir())


@pytest.mark.slow
def test_real_images_train_on_two_ranks(tmp_path: Path) -> None:
    manifest = shared_data("nuclei_he") / "manifest.jsonl"
    shards = tmp_path / "nuclei"
    imported = run(sys.executable, "-m", "data_shards", "import", manifest, "--out", shards)
    assert imported.returncode == 0, imported.stderr
    verified = run(sys.executable, "-m", "data_shards", "verify", shards)
    assert verified.returncode == 0, verified.stderr
    config = write_yaml(
        tmp_path, shards, train__epochs=3, data__image_size=64, data__max_tokens=16, data__reports_per_image=2
    )
    finished = run(*deepspeed(2), "launch/train.py", config)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    losses = [
        point["metrics"]["train/loss_l"]
        for point in read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")
        if "train/loss_l" in point["metrics"]
    ]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "runs" / "tiny" / "metrics.json").read_text())["test/images"] == 22


# ------------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing.yaml"], ["nothing.yaml", "demo.yaml"]),
        (["launch/configs/demo.yaml", "train.epoch=3"], ["train.epoch", "epochs"]),
        (["launch/configs/demo.yaml", "train.epochs=many"], ["train.epochs", "many"]),
        (["launch/configs/demo.yaml", "train.micro_batch=64"], ["micro_batch 64", "global_batch 32"]),
        (["launch/configs/demo.yaml", "deepspeed={train_batch_size: 7}"], ["train_batch_size", "train.global_batch"]),
    ],
)
def test_a_wrong_configuration_ends_with_one_line(arguments: list[str], named: list[str]) -> None:
    started = time.monotonic()
    line = the_one_line(run(sys.executable, "launch/train.py", *arguments))
    assert all(name in line for name in named), line
    assert time.monotonic() - started < 20, "a wrong configuration is found before anything heavy is imported"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides", "damage", "named"),
    [
        (1, ["data.shards=nowhere"], None, ["nowhere", "manifest.json"]),
        (1, ["data.fold=1"], None, ["data.fold 1", "no folds"]),
        (1, ["train.global_batch=64"], None, ["global_batch 64", "24 training samples"]),
        (2, ["train.global_batch=1", "train.micro_batch=1"], None, ["global_batch 1", "2 ranks"]),
        (2, [], "checksum", ["train-000001.tar", "checksum"]),
        (1, [], "missing", ["train-000000.tar", "not there"]),
        (1, ["tracking.uri=mlruns"], None, ["mlruns", "sqlite"]),
        (1, ["--resume"], None, ["no such run"]),
    ],
)
def test_wrong_data_ends_with_one_line_and_leaves_nothing(
    tmp_path: Path, ranks: int, overrides: list[str], damage: str | None, named: list[str]
) -> None:
    shards = tmp_path / "shards"
    tiny_set(shards)
    if damage == "checksum":
        path = shards / "train-000001.tar"
        content = bytearray(path.read_bytes())
        content[3000] ^= 0xFF
        path.write_bytes(content)
    elif damage == "missing":
        (shards / "train-000000.tar").unlink()
    config = write_yaml(tmp_path, shards)
    launcher = [sys.executable] if ranks == 1 else deepspeed(ranks)
    line = the_one_line(run(*launcher, "launch/train.py", config, *overrides))
    assert all(name in line for name in named), line
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.slow
def test_a_damaged_image_stops_all_ranks_and_is_named(tmp_path: Path) -> None:
    """The checksum is right and the image is not: found in a loader process of one rank, in the middle of training."""
    from dataclasses import replace

    from mdnet_dist.shards import sha256_of

    shards = tmp_path / "shards"
    manifest = tiny_set(shards)
    # Rebuild one shard with the same headers and other bytes in one image: what a bad copy before packing leaves.
    path = shards / "train-000002.tar"
    content = path.read_bytes()
    place = content.index(b"\xff\xd8\xff")
    path.write_bytes(content[: place + 20] + b"\0" * 200 + content[place + 220 :])
    listed = [replace(shard, sha256=sha256_of(path)) if shard.file == path.name else shard for shard in manifest.shards]
    replace(manifest, shards=listed).write(shards)
    config = write_yaml(tmp_path, shards, data__workers=1)
    line = the_one_line(run(*deepspeed(2), "launch/train.py", config))
    assert "train-000002.tar" in line
    assert "sample 'train_" in line
    assert "does not decode" in line


def test_shipped_configurations_name_themselves() -> None:
    """Every shipped file opens with the command that uses it."""
    for path in (REPOSITORY / "launch" / "configs").glob("*.yaml"):
        first = path.read_text().splitlines()[0]
        program = "train_cifar.py" if path.stem.startswith("cifar") else "train.py"
        assert first.startswith(f"# deepspeed launch/{program} launch/configs/{path.name}"), path
        assert yaml.safe_load(path.read_text())["name"] == path.stem
