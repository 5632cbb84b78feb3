"""Jobs of `launch/train.py` as forks of a process that has imported everything: a start takes a second, not ten.

For programs that are run by tests, with one thread: a fork of pytest itself would inherit its threads' locks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path

from launch.train import main as train
from mdnet_dist.machine import free_port
from mdnet_dist.program import run_program
from mdnet_dist.run import run_training as _imported_before_the_forks  # noqa: F401
from mdnet_dist.tracking_files import METRICS_NAME

STEP_SECONDS = 60.0  # longest wait for one


def start(ranks: int, arguments: list[str], output: Path) -> list[int]:
    """Start a job; the process numbers of its ranks."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["train.py", *arguments]
        code = 1
        try:
            run_program(train)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return processes


def kill(processes: list[int]) -> None:
    """SIGKILL to all ranks."""
    for process in processes:
        os.kill(process, signal.SIGKILL)
    for process in processes:
        os.waitpid(process, 0)


def steps_logged(run: Path) -> int:
    """Lines of the run's metrics so far; they only grow while an attempt lasts."""
    path = run / METRICS_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(run: Path, wanted: int, processes: list[int], output: Path) -> None:
    """Wait until so many lines are logged."""
    deadline = time.monotonic() + STEP_SECONDS
    while steps_logged(run) < wanted:
        assert time.monotonic() < deadline, f"no progress in {STEP_SECONDS} s:\n{output.read_text()[-3000:]}"
        assert not os.waitpid(processes[0], os.WNOHANG)[0], f"ended by itself:\n{output.read_text()[-3000:]}"
        time.sleep(0.002)
