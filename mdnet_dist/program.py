"""How a program of this project ends: one line on stderr and an exit code that scripts can rely on.

| code | meaning |
| --- | --- |
| 0 | done |
| 2 | the input or the configuration is wrong (`InputError`); the line names the file, key or sample |
| 3 | training failed (`TrainingFailed`): a loss that is not finite, a lost rank |
| 143 | stopped by SIGTERM or SIGUSR1, with a checkpoint written (`Preempted`) |
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from mdnet_dist.errors import SUPERVISED, InputError, Preempted, RankLost, TrainingFailed, one_line
from mdnet_dist.signals import StopRequest, handled_by, launcher_is_gone


def run_program(main: Callable[[], None]) -> None:
    """Run `main` and leave the process with its exit code; expected errors print one line, no traceback.

    With several ranks only the first prints: what one of them finds wrong is raised on all
    (`mdnet_dist.distributed.raise_together`), and all would say the same line. SIGTERM and SIGUSR1 end the program at
    once, cleaning up behind it, except where it handles them itself (training writes a checkpoint first).
    """
    # torch's warnings of a lost rank are pages of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    launcher_is_gone()  # notes who it is
    try:
        with handled_by(_stop, StopRequest.SIGNALS):
            main()
    except RankLost as error:
        end_without_the_others(error)
    except (InputError, TrainingFailed, Preempted) as error:
        if os.environ.get("RANK", "0") == "0":
            _say(error)
        if (distributed := sys.modules.get("mdnet_dist.distributed")) is not None:
            distributed.leave()  # a process that ends inside a group of ranks may be aborted, and lose its exit code
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if (reason := _lost(error)) is None:
            raise
        end_without_the_others(RankLost(reason))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours; stop Python from saying so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _say(InputError(f"{error.filename or 'a file'}: {error.strerror}; make room there and start again"))
        sys.exit(InputError.exit_code)


def end_without_the_others(error: RankLost) -> NoReturn:
    """End this process at once: leaving the group of ranks in good order would wait for one that is not there."""
    if error.speaks:
        _say(error)
    sys.stdout.flush()
    time.sleep(error.linger_seconds)
    os._exit(error.supervised_exit_code if SUPERVISED in os.environ else error.exit_code)


def _lost(error: RuntimeError) -> str | None:
    """What is lost where an error says that a process is; None where it says something else."""
    if "mdnet_dist.distributed" not in sys.modules:  # then there is none
        return None
    from mdnet_dist.watch import is_killed_loader, is_lost_peer

    if is_killed_loader(error):
        return "a loader process was killed, for want of memory perhaps"
    return "another rank has ended meanwhile, or its machine is lost" if is_lost_peer(error) else None


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """What a signal does while nothing is being trained: there is nothing to save."""
    if os.environ.get("RANK", "0") == "0":
        _say(Preempted("stopped by a signal, while nothing was being trained"))
    sys.exit(Preempted.exit_code)


def _say(error: Exception) -> None:
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {one_line(str(error))}\n")  # at once: other ranks write too
    sys.stderr.flush()
