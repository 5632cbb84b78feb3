"""How a program of this project ends: one line on stderr and an exit code that scripts can rely on.

| code | meaning |
| --- | --- |
| 0 | done |
| 2 | the input or the configuration is wrong (`InputError`); the line names the file, key or sample |
| 3 | training failed (`TrainingFailed`): a loss that is not finite, a lost rank |
| 143 | stopped by SIGTERM or SIGUSR1, with a checkpoint written (`Preempted`) |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what is wrong, where, and what would be right."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """White space single and control characters spelt out: names in files may hold what a terminal would obey."""
    single = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in single)


class TrainingFailed(Exception):
    """Training cannot go on. The message is one line that says why and what was written."""

    exit_code = 3


class Preempted(Exception):
    """The job was told to stop and has written a checkpoint. The message is one line that names it."""

    exit_code = 143


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest known one, or all of them where none is near."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}"


def run_program(main: Callable[[], None]) -> None:
    """Run `main` and leave the process with its exit code; expected errors print one line, no traceback.

    With several ranks only the first prints: what one of them finds wrong is raised on all
    (`mdnet_dist.distributed.raise_together`), and all would say the same line.
    """
    try:
        main()
    except (InputError, TrainingFailed, Preempted) as error:
        if os.environ.get("RANK", "0") == "0":
            line = " ".join(str(error).split())
            print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr, flush=True)
        if (distributed := sys.modules.get("mdnet_dist.distributed")) is not None:
            distributed.leave()  # a process that ends inside a group of ranks may be aborted, and lose its exit code
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours; stop Python from saying so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
