"""Trains in processes that are killed at random moments and started again: `python -m tests.kills CONFIG RUN --help`.

The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from pathlib import Path

from mdnet_dist.checkpoint import checkpoints
from mdnet_dist.mlflow_store import quieten
from tests.forks import kill, start, steps_logged, wait_for_steps


def kill_many_times(
    config: str, run: Path, kills: int, ranks: int, rng: random.Random, stop_at: int | None
) -> dict[str, object]:
    """Kill and resume, then let the run end.

    Args:
        stop_at: end it with SIGTERM once so many lines are logged; else it runs to its end.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    output = run.with_suffix(".log")
    arguments = [config, f"name={run.name}"]
    newest, left_over = [], 0
    for number in range(kills + 1):
        processes = start(ranks, [*arguments, *(["--resume"] if run.is_dir() else [])], output)
        if number == kills:
            if stop_at is not None:
                wait_for_steps(run, stop_at, processes, output)
                os.kill(processes[-1], signal.SIGTERM)  # one rank; the others hear of it
            codes = {os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes}
            assert codes == {0 if stop_at is None else 143}, (codes, output.read_text()[-3000:])
            break
        trains = rng.random() < 0.75
        if trains:
            wait_for_steps(run, steps_logged(run) + rng.randint(1, 8), processes, output)
            time.sleep(rng.uniform(0, 0.05))
        else:  # in the start, most often
            time.sleep(rng.uniform(0, 3))
        alone = rng.choice(processes)
        if trains and rng.random() < 0.3:  # the others then end by themselves
            os.kill(alone, signal.SIGKILL)
            codes = {process: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes}
            assert set(codes.values()) <= {3, -signal.SIGKILL}, (codes, output.read_text()[-3000:])
        else:
            kill(processes)
        found = checkpoints(run)
        newest.append(int(found[-1].name.removeprefix("step-")) if found else 0)
        left_over += any(path.name.startswith(".") for path in (run / "checkpoints").glob(".*"))
    return {"kills": kills, "newest_checkpoints": newest, "while_saving": left_over}


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("run", type=Path, help="folder of the run, runs_folder/NAME")
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stop-at", type=int, metavar="LINES")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quieten()
    rng = random.Random(arguments.seed)
    told = kill_many_times(arguments.config, arguments.run, arguments.kills, arguments.ranks, rng, arguments.stop_at)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
