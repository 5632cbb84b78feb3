"""Measure how fast this is here: `python launch/benchmark.py [--suite SUITE] [CONFIG.yaml ...] [--short]`.

Every figure is a ratio of two things that ran in turn in the same minutes, or says what it is; docs/performance.md says
what each means and what was found where. Without CONFIG: launch/configs/demo.yaml, and bcidr.yaml on the same images.

    step      a whole training step against a straightforward program, plain PyTorch, and what the machine can do
    data      images out of the shard reader against bare decoding of their files
    decode    greedy and beam search against one image at a time
    scaling   one rank and two: efficiency, communication, the plan's foresight
    overhead  start, evaluation's and checkpoints' share of a run, memory
    quality   seconds to a diagnosis that is right in 85 % (minutes; not part of `all`)

`--plan` says what 1, 8, 64 and 512 GPUs would give the last configuration, and measures nothing but one step, on a GPU.
Shards that a configuration names are not made: `python -m data_shards synth` does that.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from mdnet_dist.program import run_program

if TYPE_CHECKING:
    from mdnet_dist.benchmark.rows import Row
    from mdnet_dist.benchmark.subject import Subject

SUITES = ("step", "data", "decode", "scaling", "overhead", "quality")
DEFAULT_CONFIGS = ("launch/configs/demo.yaml", "launch/configs/bcidr.yaml")
DEFAULT_SHARDS = "runs/data/bladder"
OF_ONE_CONFIG = ("scaling", "overhead", "quality")
"""Suites that start programs and take long: for the first configuration alone."""


def main() -> None:
    """Parse the command line, measure, print the table, write the JSON."""
    from mdnet_dist.benchmark.cluster_plan import add_plan_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG.yaml|key=value", help="configurations; changes to all")
    parser.add_argument("--suite", choices=["all", *SUITES], default="all")
    parser.add_argument("--short", action="store_true", help="fewer repetitions: all suites in five minutes")
    parser.add_argument("--out", type=Path, help="JSON file (default: runs/benchmark/DATE-TIME.json)")
    parser.add_argument("--plan", action="store_true", help="what a training on many GPUs would take")
    add_plan_options(parser)
    arguments = parser.parse_intermixed_args()

    from mdnet_dist.benchmark.environment import environment
    from mdnet_dist.benchmark.rows import table
    from mdnet_dist.benchmark.subject import open_subject
    from mdnet_dist.console import say
    from mdnet_dist.distributed import leave
    from mdnet_dist.shards import write_atomically

    paths = [text for text in arguments.configs if "=" not in text]
    changes = [text for text in arguments.configs if "=" in text]
    own: dict[str, list[str]] = {path: [] for path in paths}
    if not paths:
        own = {path: [f"data.shards={DEFAULT_SHARDS}", "data.fold=null"] for path in DEFAULT_CONFIGS}
    if arguments.plan:
        _plan(own, changes, arguments)
        leave()
        return

    subjects = [open_subject(path, [*start, *changes], short=arguments.short) for path, start in own.items()]
    suites = SUITES[:-1] if arguments.suite == "all" else (arguments.suite,)
    rows: list[Row] = []
    where = environment(subjects[0].device)
    say(", ".join(f"{name} {value}" for name, value in where.items() if not isinstance(value, dict)))
    begun = time.monotonic()
    for suite in suites:
        measure = _measure_of(suite)
        for subject in subjects[:1] if suite in OF_ONE_CONFIG else subjects:
            say(f"\n[{time.monotonic() - begun:.0f} s] {suite}, {subject.name} ...")
            found = measure(subject)
            rows += found
            say(table(found))
    missed = [row for row in rows if row.met is False]
    held = sum(row.met is not None for row in rows)
    say(f"\n{held - len(missed)} of {held} targets met, in {time.monotonic() - begun:.0f} s")
    out = arguments.out or Path(f"runs/benchmark/{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "when": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        "command": sys.argv,
        "environment": where,
        "configs": {subject.name: subject.config.model_dump(mode="json") for subject in subjects},
        "rows": [row.as_json() for row in rows],
    }
    write_atomically(out, json.dumps(content, indent=1) + "\n")
    say(f"written to {out}")
    leave()


def _measure_of(suite: str) -> Callable[[Subject], list[Row]]:
    """A suite's function; imported when it is its turn."""
    module = importlib.import_module(f"mdnet_dist.benchmark.{suite}_suite")
    measure: Callable[[Subject], list[Row]] = module.measure
    return measure


def _plan(configs: dict[str, list[str]], changes: list[str], arguments: argparse.Namespace) -> None:
    """Print the plan of the last configuration, for which a step is measured where there is a GPU."""
    from mdnet_dist.benchmark.cluster_plan import print_plan
    from mdnet_dist.benchmark.step_suite import seconds_of_a_step
    from mdnet_dist.benchmark.subject import open_subject
    from mdnet_dist.config_file import load_config
    from mdnet_dist.distributed import local_device

    path, start = list(configs.items())[-1]
    measured = None
    if local_device().type == "cuda" and arguments.step_seconds is None:
        measured = seconds_of_a_step(open_subject(path, [*start, *changes], short=True))
    print_plan(load_config(path, [*start, *changes]), arguments, measured)


if __name__ == "__main__":
    run_program(main)
