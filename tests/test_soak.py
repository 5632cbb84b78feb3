"""Many epochs on tiny data: memory, open files, threads and processes stay what they were."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from mdnet_dist.run import run_trial
from mdnet_dist.trainer import Validation
from tests.ranks import run_ranks
from tests.soak import SOAK, write_figures
from tests.tiny import tiny_config, tiny_set

EPOCHS = 200 if SOAK else 12
MOST_GROWTH_MB = 8.0  # between the second and the last quarter: glibc's arenas alone move by some


def train_and_measure(shards: Path, runs: Path) -> dict[str, list[float]]:
    """Train, validate, save and log every epoch; what this process held after each."""
    config = tiny_config(
        shards, runs, {"train.epochs": EPOCHS, "data.workers": 1, "train.ledger": True, "train.log_every_steps": 1}
    )
    process = psutil.Process()
    held: dict[str, list[float]] = {"memory_mb": [], "open_files": [], "threads": [], "children": [], "seconds": []}

    def measure(validation: Validation) -> bool:
        held["memory_mb"].append(process.memory_info().rss / 1e6)
        held["open_files"].append(process.num_fds())
        held["threads"].append(threading.active_count())
        held["children"].append(len(process.children()))
        held["seconds"].append(time.monotonic())
        return True

    run_trial(config, on_validation=measure)
    return held


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nothing_grows_with_the_epochs(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    tiny_set(shards)
    [held] = run_ranks(train_and_measure, 1, shards, tmp_path / "runs", timeout_seconds=1200)
    assert all(len(values) == EPOCHS for values in held.values())
    quarter = EPOCHS // 4
    second, last = (
        {name: np.array(values[start : start + quarter]) for name, values in held.items()}
        for start in (quarter, EPOCHS - quarter)
    )
    growth_mb = float(np.median(last["memory_mb"]) - np.median(second["memory_mb"]))
    assert growth_mb < MOST_GROWTH_MB, held["memory_mb"]
    for name in ("threads", "children"):
        assert last[name].max() <= second[name].max(), (name, held[name])
    # A batch on its way from a loader process is an open file; what leaks is there at every look.
    assert last["open_files"].min() <= second["open_files"].min(), held["open_files"]
    slower = float(np.median(np.diff(last["seconds"])) / np.median(np.diff(second["seconds"])))
    write_figures(
        "epochs",
        {
            "epochs": EPOCHS,
            "memory_mb": {"second quarter": float(np.median(second["memory_mb"])), "growth to the last": growth_mb},
            "open_files": {"second quarter": int(second["open_files"].min()), "last": int(last["open_files"].min())},
            "seconds_an_epoch_last_to_second_quarter": slower,
        },
    )
