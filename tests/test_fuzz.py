"""Mutated files against every reader: a value or one line, in time, in little memory (`tests.fuzzing`).

MDNET_SOAK=1 runs the long version, whose figures docs/reliability.md quotes; MDNET_SOAK_OUT says where they go.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from mdnet_dist.errors import InputError
from tests import fuzzing
from tests.conftest import REPOSITORY
from tests.fuzz_readers import Reader
from tests.mutations import (
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_png,
    mutate_safetensors,
    mutate_tar,
    mutate_yaml,
    mutate_zip,
)
from tests.test_hostile import png

SOAK = os.environ.get("MDNET_SOAK") == "1"
SHORT_CASES, LONG_CASES, LONG_SECONDS = 360, 10_000, 600


def fuzz(cases: int, out: Path, seconds: float, *only: str) -> dict[str, dict]:
    command = [sys.executable, "-m", "tests.fuzzing", "--cases", str(cases), "--out", str(out)]
    if only:
        command += ["--only", *only]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return json.loads((out / "fuzz.json").read_text())


def check(summary: dict[str, dict], cases: int) -> None:
    assert len(summary) >= 17
    assert sum(line["cases"] for line in summary.values()) == cases
    for name, line in summary.items():
        assert line["values"] + line["refused"] == line["cases"], name
        assert line["slowest_seconds"] < fuzzing.SECONDS and line["peak_mb"] < fuzzing.MEMORY_MB, name
    # Mutations that are all refused at the first byte, or all harmless, would test nothing.
    assert sum(line["refused"] for line in summary.values()) > cases / 2
    assert sum(line["values"] for line in summary.values()) > cases / 20


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    check(fuzz(SHORT_CASES, tmp_path, 200), SHORT_CASES)


@pytest.mark.slow
@pytest.mark.timeout(LONG_SECONDS + 60)
@pytest.mark.skipif(not SOAK, reason="10,000 cases take minutes: MDNET_SOAK=1 runs them (`make soak`)")
def test_ten_thousand_mutated_files_are_read_or_refused() -> None:
    out = Path(os.environ.get("MDNET_SOAK_OUT", REPOSITORY / "runs" / "soak"))
    summary = fuzz(LONG_CASES, out, LONG_SECONDS)
    check(summary, LONG_CASES)
    for name, line in summary.items():
        assert line["refused"] and line["values"], name


# ---------------------------------------------------------------------------------------- the fuzzer itself can fail


def hang(content: bytes, _: str) -> object:
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # as decoders are called: it must not hold up the watchdog
            return None


def warn(content: bytes, _: str) -> object:
    warnings.warn("odd", UserWarning, stacklevel=1)
    return None


def refuse_loudly(content: bytes, _: str) -> object:
    error = InputError("x")
    error.args = ("two\nlines",)
    raise error


def fill(content: bytes, _: str) -> object:
    try:
        return bytearray(3 << 30)
    except MemoryError as error:
        raise InputError("damaged") from error


def crash(content: bytes, _: str) -> object:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel or a fault in C code ends it


def shout(content: bytes, _: str) -> object:
    os.write(1, b"\x1b[2J")
    return None


WRONG: dict[str, tuple[Callable[[bytes, str], object], str]] = {
    "another exception": (lambda content, _: 1 // 0, "ZeroDivisionError"),
    "no end": (hang, "Hangs: no end"),
    "a warning": (warn, "warns: odd"),
    "two lines": (refuse_loudly, "not one printable line"),
    "a lot of memory": (fill, "ran out of memory"),
    "the end of the process": (crash, "ended with status"),
    "a good file refused": (lambda content, _: fuzzing_refuses(content), "a good file is refused"),
    "terminal codes": (shout, "would be obeyed by a terminal"),
}


def fuzzing_refuses(content: bytes) -> object:
    raise InputError(f"{len(content)} bytes")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, message = WRONG[name]
    monkeypatch.setattr(fuzzing, "HANG_SECONDS", 0.2)
    reader = Reader(name="stub", seeds=[(b"abc", mutate_bytes, "")], read=read)
    monkeypatch.setattr(fuzzing, "readers", lambda folder: [reader])
    (tmp_path / "work").mkdir()
    summary = fuzzing.run_all(2, 0, tmp_path / "work", tmp_path / "failures")["stub"]
    assert message in "".join(failure["why"] for failure in summary["failures"])
    sound = Reader(name="stub", seeds=[(b"abc", mutate_bytes, "")], read=lambda content, _: len(content))
    monkeypatch.setattr(fuzzing, "readers", lambda folder: [sound])
    summary = fuzzing.run_all(2, 0, tmp_path / "work", tmp_path / "failures")["stub"]
    assert summary["failures"] == [] and summary["values"] == 2


def test_what_was_executed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(
        name="stub", seeds=[(b"abc", mutate_bytes, "")], read=lambda content, _: (tmp_path / "executed").write_text("")
    )
    monkeypatch.setattr(fuzzing, "readers", lambda folder: [reader])
    with pytest.raises(AssertionError, match="something was executed"):
        fuzzing.run_all(1, 0, tmp_path, tmp_path / "failures")


# -------------------------------------------------------------------------------------------------------- mutations


def good_tar() -> bytes:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.jpg", "a.json", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes(range(100)) * 7))
    return buffer.getvalue()


def good_zip() -> bytes:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr("a/data.pkl", b"pickle")
    return buffer.getvalue()


SAFETENSORS = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '
MUTATIONS = [
    (mutate_bytes, bytes(range(256))),
    (mutate_json, b'{"a": [1, {"b": "c"}], "d": null}'),
    (mutate_lines, b'{"a": 1}\n{"a": [2]}\n{"b": "c"}'),
    (mutate_yaml, b"a: 1\nb:\n  c: [1, 2]\n  d: x\n"),
    (mutate_tar, good_tar()),
    (mutate_png, png(3, 3, body=b"body")),
    (mutate_safetensors, len(SAFETENSORS).to_bytes(8, "little") + SAFETENSORS + bytes(4)),
    (mutate_zip, good_zip()),
]


@pytest.mark.parametrize(("mutate", "good"), MUTATIONS, ids=lambda one: getattr(one, "__name__", ""))
def test_mutations_follow_from_their_seed_and_differ(mutate: Callable[[Random, bytes], bytes], good: bytes) -> None:
    if mutate is mutate_zip:
        made = [mutate(Random(seed), good) for seed in range(60)]  # a zip holds the time at which it was written
    else:
        made = [mutate(Random(seed), good) for seed in range(200)]
        assert made == [mutate(Random(seed), good) for seed in range(200)]
    assert len(set(made)) > len(made) * 0.4
    assert sum(one == good for one in made) < len(made) * 0.1
