"""Score a saved network: `deepspeed launch/evaluate.py RUN [--part test] [--shards DIR] [--checkpoint best]`.

Any exported model or checkpoint on any shards, on any number of ranks, with the same numbers whatever that number is.
Also runs as plain `python launch/evaluate.py` on one device.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mdnet_dist.errors import InputError
from mdnet_dist.program import run_program


def main() -> None:
    """Parse the command line, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME, or of an exported model")
    parser.add_argument("--part", default="test", help="train, val, test (default), or a part of the shard set")
    parser.add_argument("--shards", help="shard set to score on; default: the one that the run was trained on")
    parser.add_argument("--checkpoint", help="best, last, step-00000120 or a path; default: the exported model")
    parser.add_argument("--beam", type=int, help="beam width; default: evaluate.beam_width of the run")
    parser.add_argument("--out", type=Path, help="folder to write to; default: RUN, or RUN/evaluations/NAME")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it
    arguments = parser.parse_args()
    if arguments.beam is not None and arguments.beam < 1:
        raise InputError(f"--beam {arguments.beam}: must be at least 1")

    from mdnet_dist.distributed import is_first, leave
    from mdnet_dist.evaluate_run import Request, evaluate_run
    from mdnet_dist.run import score_table

    request = Request(
        run=arguments.run,
        part=arguments.part,
        shards=arguments.shards,
        checkpoint=arguments.checkpoint,
        beam_width=arguments.beam,
        out=arguments.out,
    )
    result = evaluate_run(request)
    if is_first():
        print(f"\n{request.part} scores (fractions; cider goes to 10)\n{score_table(result)}\n")
        print(f"written to  {result.folder}")
    leave()


if __name__ == "__main__":
    run_program(main)
