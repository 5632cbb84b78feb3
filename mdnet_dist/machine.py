"""What this machine gives to a job: a port, its GPUs, memory. Nothing heavy is imported by whoever only asks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import random
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

PORTS = range(20_000, 30_000)
"""Above what Ray gives to its workers, below what Linux, macOS and Windows give to outgoing connections."""


def free_port() -> int:
    """A port of this machine that no other job has, and that none is likely to get before it is used.

    The system's own choice (port 0) is out of the range of outgoing connections, and a busy machine opens many: one of
    them may have the port by the time that the ranks of a job have started.

    Raises:
        OSError: a hundred of them are all taken.
    """
    # Not from the generators that experiments seed: jobs that start at once would then look at the same ports.
    for port in random.SystemRandom().sample(PORTS, k=100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, f"no free port was found from {PORTS[0]} to {PORTS[-1]}")


def count_gpus() -> int:
    """GPUs that this program may use, counted by a process of its own: torch would stay in this one.

    Raises:
        subprocess.CalledProcessError: torch cannot be imported; it has said why.
    """
    program = "from mdnet_dist.distributed import gpus_here; print(gpus_here())"
    counted = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return int(counted.stdout.split()[-1])


def peak_resident_bytes() -> int:
    """The most memory that this process has had at once.

    On Linux not `ru_maxrss`, which begins with what the process that started this one had then.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step, instead of giving it back and asking for it again.

    A training step frees and takes the same tensors of some MB again and again, and each page that comes anew from the
    kernel is first filled with zeros: 5 to 12 % of a step on the CPU (docs/performance.md). Other C libraries have no
    such setting, and stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
