"""Cross-validate: `python launch/cross_validate.py CONFIG.yaml [key=value ...] [--baselines neuraltalk2 resnet ...]`.

Trains and tests MDNet, and each baseline with all else equal, on every fold of a shard set (folds by patient), each
fold as a run of its own, and ends with a table and a figure of the scores. Stopped and started again with the same
command, it goes on with what is missing. --at-once 2 trains two folds side by side, on GPUs of their own where there
are any.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mdnet_dist.errors import InputError
from mdnet_dist.program import run_program

BASELINES = Path(__file__).resolve().parent / "configs" / "baselines"


def main() -> None:
    """Parse the command line, train the folds that are missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as launch/configs/demo.yaml; data.shards must be dealt into folds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch/train.py, for all models")
    parser.add_argument(
        "--baselines", nargs="+", default=[], metavar="NAME", help="of launch/configs/baselines/, or YAML files"
    )
    parser.add_argument("--folds", nargs="+", type=int, help="only these; default: all")
    parser.add_argument("--at-once", type=int, default=1, help="folds side by side; default: 1")
    parser.add_argument(
        "--accelerators", type=int, help="for each fold; default: its share of the GPUs, else 1 process"
    )
    parser.add_argument("--out", type=Path, help="folder to write to; default: runs/NAME-cv")
    arguments = parser.parse_intermixed_args()
    for option, value in (("--at-once", arguments.at_once), ("--accelerators", arguments.accelerators)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: must be at least 1")

    from mdnet_dist.cross_validation import plan_models
    from mdnet_dist.cross_validation_run import Request, cross_validate
    from mdnet_dist.distributed import gpus_here
    from mdnet_dist.side_by_side import gpu_numbers

    models = plan_models(arguments.config, arguments.overrides, arguments.baselines, BASELINES)
    gpus = gpus_here()
    gpu_numbers(gpus)  # that the launcher will understand, before anything is written
    accelerators = arguments.accelerators or max(1, gpus // arguments.at_once)
    if gpus and arguments.at_once * accelerators > gpus:
        raise InputError(f"--at-once {arguments.at_once} x --accelerators {accelerators}: this machine has {gpus} GPUs")
    request = Request(
        config=arguments.config,
        overrides=arguments.overrides,
        models=models,
        folds=arguments.folds,
        at_once=arguments.at_once,
        accelerators=accelerators,
        gpus=gpus,
        out=arguments.out,
    )
    print(f"written to  {cross_validate(request)}  (table.md, table.png, results.json; `make ui` shows the runs)")


if __name__ == "__main__":
    run_program(main)
