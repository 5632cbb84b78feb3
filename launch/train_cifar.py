"""Train an image classifier: `deepspeed launch/train_cifar.py launch/configs/cifar10_ecnet.yaml [key=value ...]`.

With `--sweep concat_depth` one run for each of `--depths`, side by side in one table. The image model, the reader, the
engine, the tracker and `--auto-resume` are those of `launch/train.py`; the shards come from `python -m data_shards
import-cifar`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mdnet_dist.auto_resume import add_options, check_options, run_supervised
from mdnet_dist.errors import InputError
from mdnet_dist.program import run_program


def depth(text: str) -> Any:
    """A concat_depth: a number, or full."""
    if text != "full" and not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(
            f"'{text}' must be a number of units, or full; write key=value before --depths"
        )
    return text if text == "full" else int(text)


def main() -> None:
    """Parse the command line, train, print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as launch/configs/cifar10_small.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted key of the file and its new value")
    parser.add_argument("--sweep", choices=("concat_depth",), help="one run for each depth, compared in a table")
    parser.add_argument(
        "--depths", nargs="+", type=depth, metavar="D", help="of the sweep: numbers or full (default: 0 1 full)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the newest run, or sweep, of this name")
    add_options(parser)
    arguments = parser.parse_intermixed_args()
    check_options(arguments)
    if arguments.depths and not arguments.sweep:
        raise InputError("--depths: only with --sweep concat_depth")
    if arguments.sweep and arguments.auto_resume is not None:
        raise InputError("--auto-resume: for one run, not with --sweep; a sweep is continued by hand, with --resume")

    from mdnet_dist.config_file import as_yaml, load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.auto_resume is not None:
        sys.exit(run_supervised(config, arguments, [sys.argv[0], arguments.config, *arguments.overrides]))

    from mdnet_dist.console import say
    from mdnet_dist.distributed import leave

    say(as_yaml(config))
    if arguments.sweep:
        from mdnet_dist.sweep import DEPTHS, FIGURE, TABLE, run_sweep, sweep_table

        folder, rows = run_sweep(config, arguments.depths or DEPTHS, resume=arguments.resume)
        say(f"\n{sweep_table(rows)}\n\nwritten to  {folder / TABLE}, {folder / FIGURE}")
    else:
        from mdnet_dist.cost import as_flops, cost_of
        from mdnet_dist.run import run_training
        from mdnet_dist.sweep import top1_error

        result = run_training(config, resume=arguments.resume, folder=arguments.run_folder)
        cost = cost_of(result.data.card.build, config.data.image_size)
        error = top1_error(result)
        scored = "no test part with labels" if error is None else f"{100 * error:.2f} %"
        say(f"\ntop-1 error  {scored}\nparameters   {cost.weights:,}\nFLOPs        {as_flops(cost.flops)} an image")
        say(f"run folder   {result.folder}")
    leave()


if __name__ == "__main__":
    run_program(main)
