"""How long the long tests are: short in `make test`, long in `make soak` (MDNET_SOAK=1), which also keeps figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdnet_dist.shards import write_atomically
from tests.conftest import REPOSITORY

SOAK = os.environ.get("MDNET_SOAK") == "1"


def write_figures(name: str, figures: Mapping[str, Any]) -> None:
    """Keep what a long test measured in runs/soak/NAME.json, for docs/reliability.md; a short one keeps nothing."""
    if SOAK:
        folder = Path(os.environ.get("MDNET_SOAK_OUT", REPOSITORY / "runs" / "soak"))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.json", json.dumps(dict(figures), indent=1) + "\n")


def main() -> None:
    """Print what was kept."""
    folder = Path(os.environ.get("MDNET_SOAK_OUT", REPOSITORY / "runs" / "soak"))
    for path in sorted(folder.glob("*.json")):
        print(f"{path.stem}: {json.dumps(json.loads(path.read_text()))}")


if __name__ == "__main__":
    main()
