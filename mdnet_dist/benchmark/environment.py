"""On what a benchmark ran: machine, versions, commit. Part of every result, because ratios too depend on them."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "deepspeed", "numpy", "pillow", "mlflow", "webdataset")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, software and commit, as JSON."""
    described = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        described["gpus"] = torch.cuda.device_count()
    return described


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features = next((line for line in lines if line.startswith("flags")), "").split()
    has = ", ".join(name for name in ("avx2", "avx512f", "amx_bf16") if name in features)
    return f"{names[0] if names else platform.machine()} ({has})"


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
