"""Two ranks in training, and something that befalls one of them: `python -m tests.faults CONFIG RUNS_FOLDER`.

Prints a JSON object: for each case the ranks' exit codes, the seconds until the last of them had ended by itself, the
step that was reached before and the newest checkpoint after, and what the ranks said on stderr.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mdnet_dist.checkpoint import checkpoints
from mdnet_dist.mlflow_store import quieten
from tests.forks import start, steps_logged, wait_for_steps

END_SECONDS = 60.0


def loader_of(process: int) -> int:
    """A rank's loader process."""
    return min(child.pid for child in psutil.Process(process).children())


CASES: dict[str, Callable[[list[int]], None]] = {
    "the last rank is killed": lambda ranks: os.kill(ranks[1], signal.SIGKILL),
    "the first rank is killed": lambda ranks: os.kill(ranks[0], signal.SIGKILL),
    "the last rank is stopped": lambda ranks: os.kill(ranks[1], signal.SIGSTOP),
    "the first rank is stopped": lambda ranks: os.kill(ranks[0], signal.SIGSTOP),
    "the last rank's loader is stopped": lambda ranks: os.kill(loader_of(ranks[1]), signal.SIGSTOP),
    "the last rank's loader is killed": lambda ranks: os.kill(loader_of(ranks[1]), signal.SIGKILL),
    "the first rank's loader is killed": lambda ranks: os.kill(loader_of(ranks[0]), signal.SIGKILL),
    "the last rank is told to stop": lambda ranks: os.kill(ranks[1], signal.SIGUSR1),
    "the first rank is told to stop": lambda ranks: os.kill(ranks[0], signal.SIGTERM),
}


def befall(config: str, run: Path, what: Callable[[list[int]], None]) -> dict[str, Any]:
    """Start a job, let something happen to it, and see how it ends."""
    output = run.with_suffix(".log")
    ranks = start(2, [config, f"name={run.name}"], output)
    wait_for_steps(run, 3, ranks, output)
    # A process that was stopped or killed is none that ends by itself.
    loaders = [child for rank in ranks for child in psutil.Process(rank).children()]
    started = time.monotonic()
    before = steps_logged(run)
    what(ranks)
    codes: dict[int, int] = {}
    ended = started
    while len(codes) < 2 and time.monotonic() < started + END_SECONDS:
        for number, rank in enumerate(ranks):
            if number not in codes and (status := os.waitpid(rank, os.WNOHANG))[0]:
                codes[number] = os.waitstatus_to_exitcode(status[1])
                ended = time.monotonic()
        if 3 in codes.values() and time.monotonic() > ended + 8:
            break  # what is left is stopped, and its launcher would kill it now
        time.sleep(0.01)
    for number, rank in enumerate(ranks):
        if number not in codes:
            os.kill(rank, signal.SIGKILL)
            os.waitpid(rank, 0)
    for loader in loaders:
        if loader.is_running():
            loader.send_signal(signal.SIGCONT)
    _, left = psutil.wait_procs(loaders, timeout=15)  # torch's loaders look for their parent every 5 s
    found = checkpoints(run)
    return {
        "codes": [codes.get(number) for number in range(2)],
        "seconds": round(ended - started, 1),
        "step": before,
        "saved": int(found[-1].name.removeprefix("step-")) if found else None,
        "left": len(left),
        "said": re.findall("train.py: .*", output.read_text()),  # behind half a line of the rank that was killed, maybe
        "traceback": output.read_text().partition("Traceback")[2][:3000],
    }


def main() -> None:
    """All cases, one after another."""
    config, runs = sys.argv[1], Path(sys.argv[2])
    runs.mkdir(parents=True, exist_ok=True)
    quieten()
    told = {name: befall(config, runs / name.replace(" ", "-").replace("'", ""), what) for name, what in CASES.items()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
