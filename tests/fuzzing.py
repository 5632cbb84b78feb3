"""Runs mutated files through every reader: `python -m tests.fuzzing --cases 10000 --out runs/soak`.

A case is right where it ends in a value or in InputError with one printable line. Any other exception, a warning, more
than `SECONDS` or than `MEMORY_MB` above what the process held before is a failure. Each reader runs in a process of its
own, so that a crash in C code is that reader's failure. A case follows from the seed, the reader's name and its number
alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from mdnet_dist.errors import InputError
from mdnet_dist.shards import write_atomically
from tests.fuzz_readers import FEW, Reader, readers

SECONDS = 5.0  # of processor time a case may take
HANG_SECONDS = 30.0  # and of any time, because other programs may keep the processors busy
READER_SECONDS = 900  # of processor time all cases of a reader may take
MEMORY_MB = 700  # a case may allocate: an image of MAX_PIXELS decoded, and its copies
KEPT = 10  # failures of a reader


class Hangs(BaseException):
    """Raised by the watchdog; no Exception, because decoders are wrapped in `except Exception`."""


def run_case(reader: Reader, seed: int, number: int) -> dict[str, Any]:
    """One case: {"outcome": "value" or "refused", "seconds"}; where it fails also "failure", "content" and "kind"."""
    rng = Random(f"{seed} {reader.name} {number}")
    good = [content for content, _, _ in reader.seeds]
    content, mutate, kind = reader.seeds[number % len(reader.seeds)]
    changed = mutate(rng, content)
    if rng.random() < 0.05:
        changed = rng.choice(
            [b"", b"\n", rng.randbytes(64), rng.choice(good), changed[: rng.randrange(len(changed) + 1)]]
        )
    result = read_once(reader, changed, kind)
    return result if "failure" not in result else result | {"content": changed, "kind": kind}


def read_once(reader: Reader, content: bytes, kind: str) -> dict[str, Any]:
    """One file read under watch: {"outcome": "value" or "refused", "seconds"}, and "failure" where it fails."""
    failure, outcome = None, "value"
    started = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            reader.read(content, kind)
        except InputError as error:
            outcome, failure = "refused", _wrong_with(error)
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"[:500] + "".join(traceback.format_tb(error.__traceback__)[-3:])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.process_time() - started
    ours = [one for one in caught if not issubclass(one.category, DeprecationWarning)]
    failure = failure or (f"warns: {ours[0].message} ({ours[0].filename}:{ours[0].lineno})" if ours else None)
    failure = failure or (f"took {seconds:.1f} s" if seconds > SECONDS else None)
    result = {"outcome": outcome, "seconds": seconds}
    return result if failure is None else result | {"failure": failure}


def _wrong_with(error: InputError) -> str | None:
    line = str(error)
    if not line.isprintable() or not line:
        return f"a message that is not one printable line: {line!r:.300}"
    if len(line) > 2100:
        return f"a message of {len(line)} characters: {line:.300}"
    if "claims more weights than memory holds" in line:
        return None  # asked for by torch's old format before anything is there, and never touched
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return f"ran out of memory: {line:.300}"
        cause = cause.__cause__ or cause.__context__
    return None


def run_reader(reader: Reader, seed: int, numbers: Sequence[int], folder: Path, out: Path) -> dict[str, Any]:
    """All cases of a reader in this process, with little memory: the reader's line of the summary.

    Args:
        folder: to work in; what it prints goes into a file there.
        out: folder for the files that made it fail.
    """
    said = os.open(folder / f"{reader.name}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    signal.signal(signal.SIGALRM, _hang)
    before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, ((_status("VmData") + MEMORY_MB) << 20,) * 2)
    # Ends what hangs in C code, where the watchdog's signal waits.
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + READER_SECONDS),) * 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    found: dict[str, Any] = {"cases": len(numbers), "values": 0, "refused": 0, "failures": []}
    slowest = (0.0, 0)
    for content, _, kind in reader.seeds:
        result = read_once(reader, content, kind)
        if "failure" in result or (result["outcome"] == "refused" and kind != FEW):
            found["failures"].append({"kind": kind, "why": f"a good file is refused: {result}"})
    for number in numbers:
        result = run_case(reader, seed, number)
        slowest = max(slowest, (result["seconds"], number))
        if "failure" not in result:
            found["values" if result["outcome"] == "value" else "refused"] += 1
        elif len(found["failures"]) < KEPT:
            out.mkdir(parents=True, exist_ok=True)
            name = f"{reader.name.replace(' ', '-')}-{seed}-{number}"
            (out / name).write_bytes(result["content"])
            found["failures"].append({"case": number, "kind": result["kind"], "why": result["failure"], "file": name})
    said = (folder / f"{reader.name}.said").read_text(encoding="utf-8", errors="replace")
    if not all(line.isprintable() for line in re.split("[\\n\\r\\t]", said)):
        found["failures"].append({"why": f"what it prints would be obeyed by a terminal: {said!r:.2000}"})
    seconds, number = slowest
    found |= {"slowest_seconds": round(seconds, 3), "slowest_case": number}
    return found | {"peak_mb": max(0, _status("VmHWM") - before)}


def run_all(
    cases: int, seed: int, folder: Path, out: Path, only: Sequence[str] = (), side_by_side: int = 2
) -> dict[str, dict[str, Any]]:
    """Cases spread over all readers: {reader: its line of the summary}.

    Args:
        folder: an empty one, in which all is read and written.
        out: folder for files that made a reader fail.
        only: names of readers; all where empty.
        side_by_side: processes at a time.
    """
    with _standing_in(folder):
        made = [reader for reader in readers(folder) if not only or reader.name in only]
        shares = {reader.name: range(len(range(place, cases, len(made)))) for place, reader in enumerate(made)}
        summary: dict[str, dict[str, Any]] = {}
        running: dict[int, tuple[Reader, Path]] = {}
        waiting = list(made)
        while waiting or running:
            while waiting and len(running) < side_by_side:
                reader = waiting.pop(0)
                line = folder / f"{reader.name}.line"
                running[_forked(reader, seed, shares[reader.name], out, line)] = (reader, line)
            pid, status = os.wait()
            reader, line = running.pop(pid)
            if status:
                said = (folder / f"{reader.name}.said").read_text(errors="replace")
                why = f"the process ended with status {status}: {said[-1500:]}"
                summary[reader.name] = {"cases": len(shares[reader.name]), "failures": [{"why": why}]}
            else:
                summary[reader.name] = json.loads(line.read_text(encoding="utf-8"))
        if traces := [str(path) for path in folder.rglob("executed*")]:
            raise AssertionError(f"something was executed: {traces}")
    return {reader.name: summary[reader.name] for reader in made}


def _forked(reader: Reader, seed: int, numbers: range, out: Path, line: Path) -> int:
    """Begin a reader's cases in another process, which writes its line of the summary. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        write_atomically(line, json.dumps(run_reader(reader, seed, numbers, line.parent, out)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise Hangs(f"no end after {HANG_SECONDS} s")


def _status(name: str) -> int:
    """MB that /proc says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def _standing_in(folder: Path) -> Iterator[None]:
    old = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(old)


def main() -> None:
    """Run, write fuzz.json, print a line a reader; exit code 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for fuzz.json and files that made a reader fail"
    )
    parser.add_argument("--only", nargs="*", default=[], help="readers; default: all")
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    torch.set_num_threads(1)  # threads do not survive the fork
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        summary = run_all(arguments.cases, arguments.seed, Path(folder), out / "failures", arguments.only)
    write_atomically(out / "fuzz.json", json.dumps(summary, indent=1) + "\n")
    for name, line in summary.items():
        print(f"{name:<20} " + "  ".join(f"{key} {value}" for key, value in line.items() if key != "failures"))
        for failure in line["failures"]:
            print(f"  FAILED {failure}")
    sys.exit(int(any(line["failures"] for line in summary.values())))


if __name__ == "__main__":
    main()
