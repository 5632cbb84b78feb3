"""Train one network: `deepspeed [--num_accelerators N] launch/train.py CONFIG.yaml [key=value | OVERLAY.yaml ...]`.

An overlay is a YAML file with a part of a configuration, laid over what stands before it.
Also runs as plain `python launch/train.py` on one device.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mdnet_dist.errors import run_program


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
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it
    arguments = parser.parse_intermixed_args()

    from mdnet_dist.config import as_yaml, load_config

    config = load_config(arguments.config, arguments.overrides)

    from mdnet_dist.console import say
    from mdnet_dist.distributed import is_first, leave
    from mdnet_dist.run import run_training, score_table

    say(as_yaml(config))
    result = run_training(config, resume=arguments.resume, parent_run_id=arguments.parent_run)
    if is_first():
        print(f"\ntest scores (fractions; cider goes to 10)\n{score_table(result)}\n")
        print(f"run folder  {result.folder}  (pictures/ shows reports with their attention)")
        print(f"next        make ui    or    python -m data_shards show {Path(config.data.shards)}")
    leave()


if __name__ == "__main__":
    run_program(main)
