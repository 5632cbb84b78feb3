"""The model of a run, ready to serve: `python launch/export.py RUN [--checkpoint best --out DIR]`.

Training does this at its end. For a run from before, it adds RUN/mlflow_model, which `mlflow models serve` takes. With
--checkpoint it writes model.safetensors, model.json and mlflow_model of that checkpoint into DIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mdnet_dist.errors import InputError
from mdnet_dist.program import run_program


def main() -> None:
    """Parse the command line, export, say how to serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME, or of an exported model")
    parser.add_argument("--checkpoint", help="best, last, step-00000120 or a path; default: the exported model")
    parser.add_argument("--out", type=Path, help="folder to write to; default: RUN")
    arguments = parser.parse_args()
    out: Path = arguments.out or arguments.run
    if arguments.checkpoint and out.resolve() == arguments.run.resolve():
        raise InputError("--checkpoint needs --out DIR, another folder than RUN: there lies what training exported")

    from mdnet_dist.export import export_model
    from mdnet_dist.run_folder import SERVED
    from mdnet_dist.saved import open_model
    from mdnet_dist.served_model import write_served_model

    network, card, _ = open_model(arguments.run, arguments.checkpoint)
    if out.resolve() != arguments.run.resolve():
        try:
            out.mkdir(parents=True, exist_ok=True)
            export_model(out, card, network.state_dict())
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    write_served_model(out, out / SERVED)
    print(f"mlflow models serve --env-manager local --port 5001 -m {out / SERVED}")
    print(f"intended use: {card.intended_use}")


if __name__ == "__main__":
    run_program(main)
