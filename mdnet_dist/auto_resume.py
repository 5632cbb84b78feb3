"""`--auto-resume N` of the programs that train: a run that goes on by itself when one of its ranks is lost.

The program that a person or DeepSpeed's launcher starts then does not train: it starts the same program once for each
rank, without these options, and watches over them (`mdnet_dist.supervisor`). Neither torch nor DeepSpeed is imported in
it. It makes the folder of the run and names it to the ranks, so that what is started again continues that run, whatever
other runs of its name there are.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from mdnet_dist.errors import InputError
from mdnet_dist.machine import count_gpus
from mdnet_dist.side_by_side import Devices
from mdnet_dist.signals import handled_by, launcher_is_gone
from mdnet_dist.supervisor import supervise

if TYPE_CHECKING:  # pydantic, which `--help` does without
    from mdnet_dist.config import RunConfig

POLL_SECONDS = 0.5
_AGAIN = "--resume"
_FOLDER = "--run-folder"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a program that trains, besides its own and `--resume`."""
    parser.add_argument(
        "--auto-resume",
        type=int,
        metavar="N",
        help="when a rank is lost, start again from the last checkpoint, N times at most; with --resume, continue the "
        "newest run of this name where there is one",
    )
    parser.add_argument("--ranks", type=int, metavar="R", help="with --auto-resume: ranks (default: GPUs, or one)")
    parser.add_argument(
        "--fewer-ranks", action="store_true", help="with --auto-resume: start again without the ranks that died"
    )
    parser.add_argument(_FOLDER, type=Path, help=argparse.SUPPRESS)  # what a supervisor tells its ranks
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that mean nothing.

    Raises:
        InputError: one of them does.
    """
    if options.auto_resume is None:
        for name, given in (("--ranks", options.ranks is not None), ("--fewer-ranks", options.fewer_ranks)):
            if given:
                raise InputError(f"{name}: only with --auto-resume N")
    elif options.auto_resume < 0:
        raise InputError(f"--auto-resume {options.auto_resume}: must be a number of restarts, 0 or more")
    if options.ranks is not None and options.ranks < 1:
        raise InputError(f"--ranks {options.ranks}: must be 1 or more")


def run_supervised(config: RunConfig, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Train with `--auto-resume`.

    Args:
        arguments: of each rank: the script and what it is given, without the options of `add_options`.

    Returns:
        the exit code of this program. Of the launcher's processes the first of this machine is the supervisor; the
        others wait until it has ended and return 0, because the launcher takes the first code that is not 0.

    Raises:
        InputError: the job is on several machines, has other ranks than there can be, or its folder cannot be made.
    """
    launched = _launched_ranks(options)
    launcher_is_gone()  # notes who it is
    if launched and os.environ.get("LOCAL_RANK", "0") != "0":
        wait_for_the_first()
        return 0
    gpus = count_gpus()
    ranks = launched or options.ranks or max(1, gpus)
    if not launched and gpus and ranks > gpus:
        raise InputError(f"--ranks {ranks}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}")
    folder, resumed = _run_folder(config, options.resume)
    command = [sys.executable, "-u", *arguments, _FOLDER, str(folder)]
    code = supervise(
        [*command, _AGAIN] if resumed else command,
        ranks,
        restarts=options.auto_resume,
        again=[] if resumed else [_AGAIN],
        fewer_ranks=options.fewer_ranks,
        environment=lambda places: _environment(places, ranks, gpus),
        told_to_stop=launcher_is_gone,
    )
    if not resumed:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing was written
    return code


def _launched_ranks(options: argparse.Namespace) -> int | None:
    """Ranks of the launcher that started this program; None where none did."""
    if "RANK" not in os.environ:
        return None
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if here != ranks:
        raise InputError(
            f"--auto-resume: {here} of the job's {ranks} ranks are on this machine; on several machines let the "
            "scheduler start the job again, with --resume"
        )
    if options.ranks not in (None, ranks):
        raise InputError(f"--ranks {options.ranks}: the launcher has started {ranks}; leave it out")
    return ranks


def _run_folder(config: RunConfig, resume: bool) -> tuple[Path, bool]:
    """The folder of the run, and whether it was there already. A scheduler that starts the same command again, with
    --resume, has one run: the first time there is none to continue."""
    from mdnet_dist.run_folder import existing_run_folder, new_run_folder

    if resume and (Path(config.runs_folder) / config.name).is_dir():
        return existing_run_folder(config), True
    return new_run_folder(config), False


def _environment(places: Sequence[int], ranks: int, gpus: int) -> dict[str, str]:
    """What all ranks have in their environment: their share of the CPU's cores, or the GPUs that are still in use."""
    shared = Devices(accelerators=len(places), gpus=gpus).environment()
    own = {name: value for name, value in shared.items() if name not in os.environ}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible else [str(number) for number in range(gpus)]
    if gpus and ranks <= len(numbers):
        own["CUDA_VISIBLE_DEVICES"] = ",".join(numbers[place] for place in places)
    return own


def wait_for_the_first() -> None:
    """Wait until the launcher's first process of this machine has ended; signals that ask to stop are passed on to it.

    When the launcher ends, that process notices and ends too.
    """
    first = _first_process()

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if first is not None:
                first.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    with handled_by(pass_on):
        while first is not None and _runs(first):
            time.sleep(POLL_SECONDS)


def _first_process() -> psutil.Process | None:
    """The launcher's process with local rank 0; None where it has ended already."""
    try:
        started = psutil.Process(os.getppid()).children()
    except psutil.NoSuchProcess:
        return None
    return next((one for one in started if _local_rank(one) == "0"), None)


def _local_rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("LOCAL_RANK")
    except psutil.Error:  # it has ended, or is not ours
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
