"""Killed at any moment and resumed, a run ends as one that was never interrupted: weights, losses, images, MLflow."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdnet_dist import trainer as trainer_module
from mdnet_dist.checkpoint import checkpoints, load_checkpoint
from mdnet_dist.config_file import as_yaml, load_config
from mdnet_dist.distributed import rank, world_size
from mdnet_dist.errors import InputError, Preempted, TrainingFailed
from mdnet_dist.plan import epoch_order
from mdnet_dist.shards import load_manifest
from mdnet_dist.step_log import BAD_STEPS, SAMPLES, StepLog
from mdnet_dist.tracking_files import read_metrics
from mdnet_dist.trainer import Trainer, Validation
from tests.conftest import REPOSITORY
from tests.ranks import run_ranks
from tests.soak import SOAK, write_figures
from tests.tiny import tiny_config, tiny_set

TIMEOUT_SECONDS = 1500.0 if SOAK else 280.0
BATCH, STEPS_PER_EPOCH = 8, 6

# Everything that carries state from one step to the next, and everything that is random, is switched on.
STATEFUL = {
    "train.epochs": 5,
    "train.global_batch": BATCH,
    "train.micro_batch": 4,
    "train.checkpoint_every_steps": 2,
    "train.ledger": True,
    "train.keep_last": 1,
    "blend": {"eta": "balanced", "beta": {"kind": "sigmoid"}, "eta_memory": 0.9},
    "augment": {"mirror": True, "quarter_turns": True, "shift_px": 3, "stain": 0.1, "brightness": 0.1},
    "model.language.dropout": 0.3,
    "data.reports_per_image": 2,
    "data.workers": 1,
    "data.shuffle_window": 20,
    "evaluate.every_epochs": 2,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    tiny_set(folder, train=BATCH * STEPS_PER_EPOCH + 3)
    return folder


def write_config(folder: Path, shards: Path, **more: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(as_yaml(tiny_config(shards, folder / "runs", STATEFUL | more)))
    return path


def train(config: Path, run: Path, kills: int, *options: object) -> dict[str, Any]:
    """Train with so many kills on the way; what `tests.kills` tells of it."""
    command = [sys.executable, "-m", "tests.kills", str(config), str(run), "--kills", str(kills), *map(str, options)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", MLFLOW_DISABLE_TELEMETRY="true")
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [
        (point["step"], point["metrics"]["train/loss_m"], point["metrics"]["train/loss_l"])
        for point in read_metrics(run / "metrics.jsonl")
        if "train/loss_m" in point["metrics"]
    ]


def validations(run: Path) -> list[tuple[int, dict[str, float]]]:
    return [
        (point["step"], {name: value for name, value in point["metrics"].items() if name.startswith("val/")})
        for point in read_metrics(run / "metrics.jsonl")
        if "val/loss_m" in point["metrics"]
    ]


def planned_keys(config: Path) -> list[list[str]]:
    """The images of every step, by the planner and the order of samples in their shards alone."""
    settings = load_config(config)
    manifest = load_manifest(settings.data.shards)
    from mdnet_dist.reading import read_shard
    from mdnet_dist.storage import open_source

    infos = manifest.shards_of(["train"])
    keys = [sample.key for shard in infos for sample in read_shard(open_source(settings.data), shard)]
    order = [
        epoch_order(
            [shard.samples for shard in infos],
            seed=settings.train.seed,
            epoch=epoch,
            global_batch=settings.train.global_batch,
            window=settings.data.shuffle_window,
        )
        for epoch in range(settings.train.epochs)
    ]
    return [[keys[number] for number in batch] for batch in np.concatenate(order)]


def assert_nothing_lost_or_repeated(config: Path, run: Path) -> None:
    """The ledger has every step once, with the images that were planned; MLflow has every point once."""
    expected = planned_keys(config)
    ledger = list(StepLog(run / SAMPLES).read())
    assert [line["step"] for line in ledger] == list(range(1, len(expected) + 1))
    assert [line["keys"] for line in ledger] == expected
    for epoch in range(len(expected) // STEPS_PER_EPOCH):
        seen = [key for batch in expected[epoch * STEPS_PER_EPOCH :][:STEPS_PER_EPOCH] for key in batch]
        assert len(set(seen)) == len(seen) == BATCH * STEPS_PER_EPOCH

    from mlflow import MlflowClient

    client = MlflowClient(load_config(run / "config.yaml").tracking.uri)
    run_id = json.loads((run / "mlflow_run.json").read_text())["run_id"]
    history = client.get_metric_history(run_id, "train/loss_m")
    assert [(point.step, point.value) for point in history] == [(step, loss_m) for step, loss_m, _ in losses(run)]
    assert [point.step for point in history] == list(range(1, len(expected) + 1)), "a gap, or a point twice"
    for name in client.get_run(run_id).data.metrics:
        steps = [point.step for point in client.get_metric_history(run_id, name)]
        assert len(set(steps)) == len(steps), f"{name} has a point twice"
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.search_runs(client.get_run(run_id).info.experiment_id, f"run_name = '{run.name}'")) == 1


def assert_same_to_the_bit(one: Path, other: Path) -> None:
    (progress, weights, state), (other_progress, other_weights, other_state) = (
        load_checkpoint(checkpoints(run)[-1]) for run in (one, other)
    )
    assert progress == other_progress
    for left, right in ((weights, other_weights), (state, other_state)):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert torch.equal(value, right[name]), name
    assert losses(one) == losses(other)
    assert validations(one) == validations(other)
    scores, other_scores = (json.loads((run / "metrics.json").read_text()) for run in (one, other))
    assert scores == other_scores


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 50), (2, 20)] if SOAK else [(1, 4), (2, 2)])
@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_a_killed_run_ends_as_one_that_was_never_killed(ranks: int, kills: int, tmp_path: Path, shards: Path) -> None:
    epochs = max(5, kills)
    config = write_config(tmp_path, shards, **{"train.epochs": epochs, "evaluate.every_epochs": 3})
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    train(config, whole, 0, "--ranks", ranks)
    told = train(config, killed, kills, "--ranks", ranks, "--seed", ranks)
    assert told["kills"] == kills
    assert told["newest_checkpoints"] == sorted(told["newest_checkpoints"]), "a checkpoint was lost"
    assert told["newest_checkpoints"][-1] < epochs * STEPS_PER_EPOCH, "the last kill came too late to test anything"
    assert_same_to_the_bit(whole, killed)
    for run in (whole, killed):
        assert_nothing_lost_or_repeated(config, run)
    steps = epochs * STEPS_PER_EPOCH
    write_figures(f"kills_{ranks}_ranks", {"steps": steps, "last_killed_at": told["newest_checkpoints"][-1], **told})


@pytest.mark.slow
@pytest.mark.parametrize("stages", [[2, 0, 3], *([[0, 0, 0], [1, 3, 0]] if SOAK else [])])
def test_two_ranks_then_one_then_two(stages: list[int], tmp_path: Path, shards: Path) -> None:
    """The same images in the same batches, and losses equal to the rounding of fp32, whatever the ranks and the stage.

    The micro-batches stay what they were: BatchNorm normalises by the statistics of each.
    """
    config = write_config(tmp_path, shards, **{"train.epochs": 3})
    whole, elastic = tmp_path / "runs" / "whole", tmp_path / "runs" / "elastic"
    train(config, whole, 0, "--ranks", 1)
    for number, (ranks, stage) in enumerate(zip((2, 1, 2), stages, strict=True)):
        part = write_config(tmp_path, shards, **{"train.epochs": 3, "train.zero_stage": stage})
        train_part(part, elastic, ranks, stop_at=None if number == 2 else 5 * (number + 1))
    assert_nothing_lost_or_repeated(config, elastic)
    expected, found = np.array(losses(whole)), np.array(losses(elastic))
    assert len(expected) == 3 * STEPS_PER_EPOCH
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    np.testing.assert_allclose(found[:6], expected[:6], rtol=1e-5)
    for (step, scores), (other_step, other_scores) in zip(validations(whole), validations(elastic), strict=True):
        assert step == other_step
        for name in ("val/loss_m", "val/loss_l"):
            assert other_scores[name] == pytest.approx(scores[name], rel=2e-4), name


def train_part(config: Path, run: Path, ranks: int, stop_at: int | None) -> None:
    """Train to the end, or to SIGTERM at about a step; `stop_at` must not be the last."""
    train(config, run, 0, "--ranks", ranks, *(["--stop-at", stop_at] if stop_at else []))


# ------------------------------------------------------------------------------------------- inside one step or epoch


def validate_although_stopped(shards: Path, runs: Path) -> dict[str, Any]:
    """Told to stop while the first epoch is scored; what is validated then, and after a resume."""
    config = tiny_config(shards, runs, {"train.epochs": 2})
    told: list[tuple[int, int]] = []

    def note(validation: Validation) -> bool:
        told.append((validation.epoch, validation.step))
        return True

    trainer = Trainer(config)
    scores = trainer.evaluate

    def told_to_stop_meanwhile(parts: list[str]) -> Any:
        assert trainer._stop is not None
        trainer._stop.received = rank() == world_size() - 1
        return scores(parts)

    trainer.evaluate = told_to_stop_meanwhile  # type: ignore[method-assign, assignment]
    with pytest.raises(Preempted, match=rf"step-{trainer.data.steps_per_epoch:08d} holds step"), trainer.watched():
        trainer.train(on_validation=note)
    trainer.close()
    told_before = list(told)
    resumed = Trainer(config, resume=True)
    due = resumed.epoch_end_due
    with resumed.watched():
        resumed.train(on_validation=note)
    due_after = resumed.epoch_end_due
    resumed.close()
    return {"steps": trainer.data.steps_per_epoch, "before": told_before, "all": told, "due": [due, due_after]}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_epoch_that_was_not_validated_is_validated_after_the_resume(
    ranks: int, tmp_path: Path, shards: Path
) -> None:
    for found in run_ranks(validate_although_stopped, ranks, shards, tmp_path):
        assert found["before"] == []
        assert found["all"] == [(1, found["steps"]), (2, 2 * found["steps"])]
        assert found["due"] == [True, False]


def statistics_after_steps(shards: Path, runs: Path) -> tuple[np.ndarray, list[str]]:
    """BatchNorm's running statistics after three steps, and the names of this rank's images."""
    trainer = Trainer(
        tiny_config(shards, runs / f"{world_size()}", {"train.micro_batch": 4, "model.language.dropout": 0.3})
    )
    batches = iter(trainer.data.training_batches(trainer.config, 0, 3, pin_memory=False))
    keys = [key for _ in range(3) for key in trainer.train_step(batches).keys]
    statistics = trainer.engine.running_statistics().numpy()
    trainer.close()
    return statistics, keys


@pytest.mark.slow
def test_running_statistics_do_not_depend_on_who_computes_the_batch(tmp_path: Path, shards: Path) -> None:
    """Two micro-batches one after the other, or on two ranks; ranks agree without having been asked to."""
    (alone, keys), *_ = run_ranks(statistics_after_steps, 1, shards, tmp_path)
    (first, first_keys), (second, second_keys) = run_ranks(statistics_after_steps, 2, shards, tmp_path)
    assert sorted(keys) == sorted(first_keys + second_keys)
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first, alone, rtol=1e-5, atol=1e-7)
    assert np.abs(alone[: len(alone) // 2]).max() > 1e-3, "nothing has moved"


def train_on_what_is_not_finite(shards: Path, runs: Path) -> dict[str, Any]:
    """Images that are not numbers, on the last rank alone, once and then for ever."""
    config = tiny_config(shards, runs, {"train.epochs": 4, "train.max_bad_steps": 3})
    trainer = Trainer(config)
    images = trainer._images
    bad = {3, *range(5, 100)}
    read: dict[int, list[str]] = {}

    def spoilt(batch: Any) -> torch.Tensor:
        step = trainer.step + 1
        read.setdefault(step, []).extend(batch.keys)
        spoils = step in bad and rank() == world_size() - 1
        return images(batch) * (float("nan") if spoils else 1.0)

    trainer._images = spoilt  # type: ignore[method-assign]
    before: dict[int, np.ndarray] = {}
    launch = trainer._launch

    def launched(batches: Any) -> Any:
        step = launch(batches)
        before[trainer.step] = trainer.engine.running_statistics().numpy()
        return step

    trainer._launch = launched  # type: ignore[method-assign]
    with pytest.raises(TrainingFailed) as failed, trainer.watched():
        trainer.train()
    scored = trainer.evaluate(trainer.data.validation).metrics["loss_l"]
    trainer.close()
    return {"error": str(failed.value), "statistics": before, "loss": scored, "read": read, "folder": trainer.folder}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_batch_that_is_not_finite_leaves_no_trace_and_many_stop_the_run(
    ranks: int, tmp_path: Path, shards: Path
) -> None:
    """The running statistics of BatchNorm stay finite: they once kept the NaN, and every later score was one."""
    by_rank = run_ranks(train_on_what_is_not_finite, ranks, shards, tmp_path)
    for found in by_rank:
        statistics = found["statistics"]
        assert np.array_equal(statistics[2], statistics[3]) and not np.array_equal(statistics[3], statistics[4])
        assert np.array_equal(statistics[4], statistics[7])
        assert all(np.isfinite(values).all() for values in statistics.values())
        assert np.isfinite(found["loss"])
        assert "3 steps in a row" in found["error"] and "bad_steps.jsonl names their images" in found["error"]
    lines = list(StepLog(by_rank[0]["folder"] / BAD_STEPS).read())
    assert [line["step"] for line in lines] == [3, 5, 6, 7]
    for line in lines:
        assert line["keys"] == [key for found in by_rank for key in found["read"][line["step"]]]
        assert line["loss_m"] == "nan"


def save_often(demo: str, shards: Path, runs: Path) -> tuple[list[float], float]:
    """How long training waits for each checkpoint of the demo's network, and how large one is in MB."""
    overrides = [
        f"data.shards={shards}",
        f"runs_folder={runs}",
        "train.global_batch=8",
        "train.micro_batch=8",
        f"tracking.uri=sqlite:///{runs}/x.db",
    ]
    trainer = Trainer(load_config(demo, overrides))
    seconds = []
    for step in range(1, 12):
        trainer.step = step
        started = time.monotonic()
        written = trainer.save(float(step))
        seconds.append(time.monotonic() - started)
    trainer.close()
    return seconds, sum(path.stat().st_size for path in written.iterdir()) / 1e6


def test_training_hardly_waits_for_a_checkpoint(tmp_path: Path, shards: Path) -> None:
    """Gathered, written, synchronised to disk, renamed, the older ones deleted: less than a second at demo size."""
    demo = str(REPOSITORY / "launch" / "configs" / "demo.yaml")
    [(seconds, megabytes)] = run_ranks(save_often, 1, demo, shards, tmp_path / "runs")
    assert megabytes > 3, "both moments of Adam and the momentum of SGD are in it"
    assert np.median(seconds) < 1.0
    write_figures(
        "saving", {"megabytes": megabytes, "seconds": {"median": float(np.median(seconds)), "most": max(seconds)}}
    )


# ---------------------------------------------------------------------------------------------------- lines of steps


def test_lines_of_later_steps_are_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = StepLog(tmp_path / "lines.jsonl")
    log.cut(5)
    assert not log.path.exists()
    for step in (1, 2, 3, 3, 4):
        log.append(step, keys=[f"ä-{step}"])
    with open(log.path, "a") as file:
        file.write('{"step": 5, "ke')  # a kill in the middle of a line
    assert [line["step"] for line in log.read()] == [1, 2, 3, 3, 4]
    assert "line 6: cut off or damaged; it is left out" in capsys.readouterr().out
    for damage in (b"\xff\xfe", b"5", b"{}", b"[1]", b'{"step": "1"}', b"[" * 100_000, b"\0"):
        with open(log.path, "ab") as file:
            file.write(b"\n" + damage + b"\n")
    assert [line["step"] for line in log.read()] == [1, 2, 3, 3, 4]
    log.cut(3)
    assert list(log.read()) == [{"step": step, "keys": [f"ä-{step}"]} for step in (1, 2, 3, 3)]
    log.append(4, keys=[])
    assert [line["step"] for line in log.read()] == [1, 2, 3, 3, 4]


# ---------------------------------------------------------------------------------------------- a position that moved


def resume_with(shards: Path, runs: Path, first: dict[str, Any], then: list[dict[str, Any]]) -> list[str]:
    """Train five steps, save, and resume under each of some changes: what is said of it, empty where it goes on."""
    trainer = Trainer(tiny_config(shards, runs, first))
    batches = iter(trainer.data.training_batches(trainer.config, 0, 5, pin_memory=False))
    for _ in range(5):
        trainer.train_step(batches)
    trainer.save(None)
    trainer.close()
    told = []
    for changes in then:
        try:
            resumed = Trainer(tiny_config(shards, runs, first | changes), resume=True)
        except InputError as error:
            told.append(str(error))
        else:
            told.append("")
            resumed.close()
        gc.collect()  # the lock of one that was refused
    return told


def test_a_run_is_not_resumed_where_its_step_would_mean_other_images(tmp_path: Path) -> None:
    tiny_set(tmp_path / "shards")
    first = {"train.epochs": 3, "train.seed": 4}
    changes: list[dict[str, Any]] = [
        {"train.seed": 5},
        {"train.global_batch": 12},
        {"data.shuffle_window": 7},
        {"train.epochs": 1},
        {"train.epochs": 9, "train.micro_batch": 8, "optimizer.image": {"lr": 0.001}, "data.workers": 1},
    ]
    [told] = run_ranks(resume_with, 1, tmp_path / "shards", tmp_path / "runs", first, changes)
    assert "was trained with train.seed 4, not 5, and images would be missed or repeated; resume with" in told[0]
    assert "was trained with train.global_batch 8, not 12" in told[1]
    assert "was trained with data.shuffle_window 4096, not 7" in told[2]
    assert told[3].startswith("train.epochs 1: training ends at step 3, but ")
    assert "step-00000005 lies beyond" in told[3]
    assert told[4] == "", "what does not move the images may change"
    tiny_set(tmp_path / "others", seed=1)
    (tmp_path / "shards").rename(tmp_path / "first")
    (tmp_path / "others").rename(tmp_path / "shards")
    [told] = run_ranks(resume_only, 1, tmp_path / "shards", tmp_path / "runs", first)
    assert f"was trained on other data than {tmp_path / 'shards'} holds now" in told


def resume_only(shards: Path, runs: Path, overrides: dict[str, Any]) -> str:
    try:
        Trainer(tiny_config(shards, runs, overrides), resume=True).close()
    except InputError as error:
        return str(error)
    return ""


def take_the_folder(shards: Path, runs: Path) -> str:
    """A second job in the folder of one that is still there."""
    trainer = Trainer(tiny_config(shards, runs))
    trainer.save(None)
    setattr(trainer_module, "WAIT_SECONDS", 0.3)  # noqa: B010
    told = resume_only(shards, runs, {})
    trainer.close()
    assert resume_only(shards, runs, {}) == ""
    return told


def test_a_run_has_one_job_at_a_time(tmp_path: Path, shards: Path) -> None:
    [told] = run_ranks(take_the_folder, 1, shards, tmp_path / "runs")
    assert told == f"{tmp_path / 'runs' / 'tiny'}: another job still works there; wait for it, or stop it"


def test_looking_at_steps_one_later_changes_nothing(tmp_path: Path, shards: Path) -> None:
    """As on a GPU: the host tells of a step when the next has been launched. The run is the same to the bit."""
    changes = {
        "train.epochs": 2,
        "train.log_every_steps": 1,
        "blend.eta": "balanced",
        "train.checkpoint_every_steps": 2,
    }
    runs: list[tuple[list[dict[str, float]], dict[str, torch.Tensor], list[int]]] = []
    for ahead in (0, 1):
        trainer = Trainer(tiny_config(shards, tmp_path / str(ahead), changes), with_test=False)
        trainer.steps_ahead = ahead
        tracker = _Told()
        trainer.train(tracker)  # type: ignore[arg-type]
        runs.append((tracker.points, trainer.engine.weights(), [trainer.step, trainer.updates, trainer.bad_steps]))
        trainer.close()
    (points, weights, counts), (late_points, late_weights, late_counts) = runs
    assert points == late_points and len(points) == 2 * STEPS_PER_EPOCH + 2
    assert counts == late_counts
    assert all(torch.equal(value, late_weights[name]) for name, value in weights.items())


class _Told:
    """Stands in for a tracker: what it is told, but for speeds."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        told = {name: value for name, value in metrics.items() if not name.startswith("speed/")}
        self.points.append({"step": step, **told})
