"""Training as a trial of a search does it: told of each validation, ended by it, in any thread, without test data."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdnet_dist.checkpoint import checkpoint_of_step, checkpoints, read_progress
from mdnet_dist.config import RunConfig
from mdnet_dist.errors import InputError
from mdnet_dist.run import run_training, run_trial
from mdnet_dist.shards import load_manifest
from mdnet_dist.tracking_files import read_metrics
from mdnet_dist.trainer import Trainer, Validation
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_set

EPOCH_STEPS = 2


class Listener:
    """Notes what it is told, and whether the checkpoint of that step was there already."""

    def __init__(self, folder: Path, last_epoch: int = 99) -> None:
        self.folder, self.last_epoch = folder, last_epoch
        self.told: list[Validation] = []
        self.saved: list[bool] = []

    def __call__(self, validation: Validation) -> bool:
        self.told.append(validation)
        self.saved.append(checkpoint_of_step(self.folder, validation.step) is not None)
        return validation.epoch < self.last_epoch

    def heard(self) -> dict[str, Any]:
        """Plain values that go from process to process."""
        found = checkpoints(self.folder)
        return {
            "epochs": [(validation.epoch, validation.step) for validation in self.told],
            "metrics": [validation.metrics for validation in self.told],
            "saved": self.saved,
            "checkpoints": [read_progress(path).step for path in found],
        }


def trained(config: RunConfig, last_epoch: int = 99, *, resume: bool = False) -> dict[str, Any]:
    """Train, listening, without a tracker."""
    trainer = Trainer(config, resume=resume, with_test=False)
    listener = Listener(trainer.folder, last_epoch)
    trainer.train(None, listener)
    heard = listener.heard() | {"step": trainer.step, "test": trainer.data.test}
    trainer.close()
    return heard


def refused(run: Callable[[RunConfig], object], config: RunConfig) -> str:
    try:
        run(config)
    except InputError as error:
        return str(error)
    return ""


def all_of_them(shards: Path, runs: Path) -> dict[str, Any]:
    """Everything in one process, which takes longer to start than to train."""
    outcome: dict[str, Any] = {}

    def config(name: str, **overrides: object) -> RunConfig:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return tiny_config(shards, runs, {"name": name, "train.keep_last": 9, **dotted})

    outcome["each"] = trained(config("each", train__epochs=3))
    # Scored by the number of images, no step is better than another.
    rare = {"train__checkpoint_every_epochs": 5, "evaluate__every_epochs": 2, "evaluate__metric": "images"}
    rarely = config("rarely", train__epochs=5, **rare)
    outcome["stopped"] = trained(rarely, 4)
    outcome["resumed"] = trained(rarely, resume=True)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    thread = threading.Thread(target=lambda: outcome.update(threaded=trained(config("threaded", train__epochs=3))))
    thread.start()
    thread.join()
    outcome["handlers"] = handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]

    manifest = load_manifest(shards)
    damaged = [Path(shards, shard.file) for shard in manifest.shards_of(["test"])]
    for path in damaged:
        path.write_bytes(b"rubbish" * 100)
    outcome["damaged"] = [path.name for path in damaged]
    outcome["refused"] = refused(run_training, config("whole"))
    outcome["no folder"] = not (runs / "whole").exists()
    listener = Listener(runs / "blind")
    run_trial(config("blind"), on_validation=listener)
    outcome["blind"] = listener.heard()
    outcome["blind files"] = sorted(path.name for path in (runs / "blind").iterdir())
    outcome["blind points"] = [
        entry["step"] for entry in read_metrics(runs / "blind" / "metrics.jsonl") if "val/score" in entry["metrics"]
    ]
    return outcome


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trials")
    tiny_set(folder / "shards", train=8 * EPOCH_STEPS, val=3, test=4)
    [found] = run_ranks(all_of_them, 1, folder / "shards", folder / "runs")
    return dict(found)


def test_each_validation_is_told_after_its_checkpoint(outcome: dict[str, Any]) -> None:
    each = outcome["each"]
    assert each["epochs"] == [(epoch, epoch * EPOCH_STEPS) for epoch in (1, 2, 3)]
    assert each["saved"] == [True, True, True]
    assert each["checkpoints"] == [2, 4, 6] and each["test"] == []
    for (epoch, _), metrics in zip(each["epochs"], each["metrics"], strict=True):
        assert metrics["progress/epoch"] == epoch
        assert {"val/score", "val/loss_m", "train/loss_m", "speed/images_per_second", "lr/image"} <= metrics.keys()
        assert not any(name.startswith("test/") for name in metrics)


def test_one_that_is_told_to_stop_leaves_a_checkpoint_where_it_stood(outcome: dict[str, Any]) -> None:
    """Also at a step that is saved for no other reason."""
    stopped = outcome["stopped"]
    assert stopped["epochs"] == [(2, 4), (4, 8)] and stopped["step"] == 8
    assert stopped["saved"] == [True, False], "a better one would be saved anyway: this would test nothing"
    assert stopped["checkpoints"] == [4, 8]


def test_it_goes_on_from_there(outcome: dict[str, Any]) -> None:
    resumed = outcome["resumed"]
    assert (resumed["epochs"], resumed["step"]) == ([(5, 10)], 10), "the end is always validated"
    assert resumed["checkpoints"] == [4, 8, 10]


def test_training_in_another_thread_is_the_same(outcome: dict[str, Any]) -> None:
    def without_speed(heard: dict[str, Any]) -> list[dict[str, float]]:
        return [
            {name: value for name, value in metrics.items() if not name.startswith("speed/")}
            for metrics in heard["metrics"]
        ]

    assert outcome["handlers"], "signals stay with whoever had them"
    assert outcome["threaded"]["epochs"] == outcome["each"]["epochs"]
    assert without_speed(outcome["threaded"]) == without_speed(outcome["each"])


def test_a_trial_does_not_read_test_data_and_a_whole_run_does(outcome: dict[str, Any]) -> None:
    assert any(name in outcome["refused"] for name in outcome["damaged"]) and outcome["no folder"]
    assert outcome["blind"]["epochs"] == [(1, EPOCH_STEPS)] and outcome["blind points"] == [EPOCH_STEPS]
    assert outcome["blind files"] == [".lock", "checkpoints", "config.yaml", "metrics.jsonl", "mlflow_run.json"]
