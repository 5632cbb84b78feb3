"""What this machine gives to a job: a port, its GPUs. Nothing heavy is imported by whoever only asks."""

from __future__ import annotations

import socket
import subprocess
import sys


def free_port() -> int:
    """A port of this machine that no other job has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def count_gpus() -> int:
    """GPUs that this program may use, counted by a process of its own: torch would stay in this one.

    Raises:
        subprocess.CalledProcessError: torch cannot be imported; it has said why.
    """
    program = "from mdnet_dist.distributed import gpus_here; print(gpus_here())"
    counted = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return int(counted.stdout.split()[-1])
