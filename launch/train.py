"""Train one network: `deepspeed [--num_accelerators N] launch/train.py CONFIG.yaml [key=value | OVERLAY.yaml ...]`.

An overlay is a YAML file with a part of a configuration, laid over what stands before it.
Also runs as plain `python launch/train.py` on one device, and with `--auto-resume N` on all devices of this machine:

    python launch/train.py CONFIG.yaml --auto-resume 3 [--ranks R] [--fewer-ranks]
    deepspeed --num_accelerators R launch/train.py CONFIG.yaml --auto-resume 3 [--fewer-ranks]

Then a rank that is killed, hangs or breaks down does not end the run: all ranks are started again from the last
checkpoint, three times at most, with --fewer-ranks without those that died. What would only happen again is not tried
again: wrong input (code 2), a loss that is not finite (3). Nor is a run that was told to stop (143), by a signal to any
of its processes; with --resume besides, the same command then continues it, and starts it where there is no such run.
"""

from __future__ import annotations

import argparse
import sys

from mdnet_dist.auto_resume import add_options, check_options, run_supervised
from mdnet_dist.program import run_program


def main() -> None:
    """Parse the command line, train, print the test scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as launch/configs/demo.yaml; docs/configuration.md lists every key")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted key of the file and its new value; or an overlay, as launch/configs/baselines/resnet.yaml",
    )
    parser.add_argument("--parent-run", metavar="ID", help="MLflow run of the same experiment that this one is part of")
    parser.add_argument("--resume", action="store_true", help="continue the newest run of this name")
    add_options(parser)
    arguments = parser.parse_intermixed_args()
    check_options(arguments)

    from mdnet_dist.config_file import as_yaml, load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.auto_resume is not None:
        parent = ["--parent-run", arguments.parent_run] if arguments.parent_run else []
        sys.exit(run_supervised(config, arguments, [sys.argv[0], arguments.config, *arguments.overrides, *parent]))

    from mdnet_dist.console import say
    from mdnet_dist.distributed import is_first, leave
    from mdnet_dist.run import run_training, score_table
    from mdnet_dist.storage import is_address

    say(as_yaml(config))
    result = run_training(
        config, resume=arguments.resume, parent_run_id=arguments.parent_run, folder=arguments.run_folder
    )
    if is_first():
        print(f"\ntest scores (fractions; cider goes to 10)\n{score_table(result)}\n")
        print(f"run folder  {result.folder}  (pictures/ shows reports with their attention)")
        look = "" if is_address(config.data.shards) else f"    or    python -m data_shards show {config.data.shards}"
        print(f"next        make ui{look}")
    leave()


if __name__ == "__main__":
    run_program(main)
