"""Reports on a folder of images: `python launch/predict.py RUN FOLDER --out reports.jsonl`.

JPEG, PNG, TIFF, WebP and (with pydicom) DICOM images, prepared as in training. One that cannot be read is named and
left out; the exit code is 0 unless that holds for all. --out reports.csv makes a table for spreadsheets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mdnet_dist.errors import InputError
from mdnet_dist.program import run_program


def main() -> None:
    """Parse the command line, predict, say how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME, or of an exported model")
    parser.add_argument("folder", type=Path, help="images, in this folder or below it; or one image file")
    parser.add_argument("--out", type=Path, required=True, help="file to write, NAME.jsonl or NAME.csv")
    parser.add_argument("--checkpoint", help="best, last, step-00000120 or a path; default: the exported model")
    parser.add_argument("--beam", type=int, default=1, help="beam width; default: 1, greedy")
    parser.add_argument("--batch", type=int, default=16, help="images at a time; default: 16")
    arguments = parser.parse_args()
    for name in ("beam", "batch"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} {getattr(arguments, name)}: must be at least 1")

    from mdnet_dist.predict_folder import check_out, find_images, predict_folder

    check_out(arguments.out)
    find_images(arguments.folder)

    from data_shards.prepare import open_image
    from mdnet_dist.distributed import local_device
    from mdnet_dist.saved import open_model

    device = local_device()
    network, card, _ = open_model(arguments.run, arguments.checkpoint, device)
    told, skipped = predict_folder(
        network,
        card,
        arguments.folder,
        arguments.out,
        open_image,
        device=device,
        batch=arguments.batch,
        beam_width=arguments.beam,
    )
    left_out = f"; {skipped} of {told + skipped} images skipped" if skipped else ""
    print(f"{told} reports in {arguments.out}{left_out}")
    print(f"intended use: {card.intended_use}")


if __name__ == "__main__":
    run_program(main)
