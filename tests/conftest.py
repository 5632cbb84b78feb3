"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_data(name: str) -> Path:
    """The folder of a real data set that is not part of the project; skips the test where it is absent."""
    root = Path(os.environ.get("MDNET_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / name
    if not folder.is_dir():
        pytest.skip(f"real data set '{name}' is not on this machine; MDNET_SHARED_DATA names its parent folder")
    return folder
