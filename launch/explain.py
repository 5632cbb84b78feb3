"""Where a network looked: `python launch/explain.py RUN IMAGE_OR_SHARDS... --out DIR`.

Writes a page (needs no network) and a picture for each image, and index.html over them. Takes image files, folders of
images and shard sets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mdnet_dist.errors import InputError
from mdnet_dist.program import run_program
from mdnet_dist.storage import is_address


def main() -> None:
    """Parse the command line, explain, say where the index is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME, or of an exported model")
    parser.add_argument("sources", nargs="+", metavar="IMAGE_OR_SHARDS", help="images, folders, shard sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--part", default="test", help="of shard sets; default: test")
    parser.add_argument("--keys", nargs="+", default=[], help="only these samples of shard sets")
    parser.add_argument("--count", type=int, default=24, help="images of each folder or shard set; default: 24, 0: all")
    parser.add_argument("--checkpoint", help="best, last, step-00000120 or a path; default: the exported model")
    parser.add_argument("--beam", type=int, default=1, help="beam width; default: 1, greedy")
    arguments = parser.parse_args()
    if arguments.beam < 1 or arguments.count < 0:
        raise InputError(f"--beam {arguments.beam} must be at least 1, --count {arguments.count} at least 0")
    for source in arguments.sources:
        if not is_address(source) and not Path(source).exists():
            raise InputError(f"{source}: no such image, folder or shard set")

    from data_shards.prepare import open_image
    from mdnet_dist.distributed import local_device
    from mdnet_dist.explain_run import explain, explain_sources
    from mdnet_dist.saved import open_model, saved_config

    device = local_device()
    network, card, _ = open_model(arguments.run, arguments.checkpoint, device)
    explanations = explain_sources(
        network,
        card,
        arguments.sources,
        open_image,
        data_of=lambda shards: saved_config(arguments.run, card, shards).data,
        part=arguments.part,
        keys=arguments.keys,
        count=arguments.count or None,
        device=device,
        beam_width=arguments.beam,
    )
    written = explain(
        card, explanations, arguments.out, f"What {arguments.run.resolve().name} says, and where it looked"
    )
    print(f"{written} images explained: {arguments.out / 'index.html'}")


if __name__ == "__main__":
    run_program(main)
