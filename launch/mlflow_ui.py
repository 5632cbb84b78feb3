"""Browse the runs in the MLflow UI, on the store that training wrote.

    python launch/mlflow_ui.py [--port 5000] [--uri sqlite:////absolute/path/mlflow.db]

It listens on 127.0.0.1 only; from another machine use `ssh -L 5000:127.0.0.1:5000 HOST`. Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import FrameType

from mdnet_dist.errors import InputError, without_password
from mdnet_dist.mlflow_store import database_path, default_tracking_uri
from mdnet_dist.program import run_program

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 5000, 100
START_SECONDS, STOP_SECONDS = 90.0, 10.0


def main() -> None:
    """Start the UI, say where it is, wait for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Browse the runs in the MLflow UI.")
    parser.add_argument("--port", type=int, help=f"default: {FIRST_PORT}, or the next free one")
    parser.add_argument("--uri", help="default: MLFLOW_TRACKING_URI, else runs/mlflow.db of this checkout")
    arguments = parser.parse_args()

    uri = arguments.uri or default_tracking_uri()
    if uri.startswith(("http:", "https:")):
        print(f"The runs are on an MLflow server already: {without_password(uri)}")
        return
    database = database_path(uri)
    if database and not database.is_file():
        raise InputError(
            f"{database}: no such file, so there are no runs yet; "
            "`make train` or `deepspeed launch/train.py launch/configs/demo.yaml` writes it"
        )
    port = choose_port(arguments.port)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory() as folder:
        try:
            serve(uri, database, port, Path(folder))
        except KeyboardInterrupt:
            print()  # after the ^C that the terminal shows


def choose_port(wanted: int | None) -> int:
    """The wanted port, or the first free one from 5000 on.

    Raises:
        InputError: the wanted port is taken or no port; or all are taken.
    """
    for port in [wanted] if wanted is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
                return int(probe.getsockname()[1])
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
    if wanted is not None:
        raise InputError(f"--port {wanted}: {reason}; leave it out to take the next free one")
    raise InputError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are all taken; name another with --port")


def serve(uri: str, database: Path | None, port: int, folder: Path) -> None:
    """Run MLflow's server until it ends or KeyboardInterrupt; it and its children are gone afterwards.

    Args:
        uri: of the store.
        database: its file, where it is sqlite.
        port: to listen on.
        folder: an empty one, for the server's log and as its current folder.

    Raises:
        InputError: the server ended by itself; with its last error.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri]
    if database:
        artifacts = (database.parent / "mlartifacts").as_uri()
        command += ["--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    # Jobs are for language-model applications, and would leave processes of their own.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **quiet},
            start_new_session=True,  # a group of its own, so that all of it can be stopped
        )
    try:
        wait_until_it_answers(server, port)
        if server.poll() is None:
            print(f"MLflow UI: http://{HOST}:{port} (Ctrl-C stops it)", flush=True)
        server.wait()
    finally:
        stop(server)
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|Error:", line)] or lines or ["no word why"]
    raise InputError(f"MLflow's server on {without_password(uri)} ended with code {server.returncode}: {errors[-1]}")


def wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server answers or has ended.

    Raises:
        InputError: it does neither.
    """
    deadline = time.monotonic() + START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never ask a proxy for this machine
    while server.poll() is None:
        try:
            with direct.open(f"http://{HOST}:{port}/health", timeout=5):
                return
        except OSError:  # urllib's errors are among these
            if time.monotonic() > deadline:
                raise InputError(f"MLflow's server did not answer within {START_SECONDS:.0f} s") from None
            time.sleep(0.2)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server's whole group: ask, wait, then kill."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + STOP_SECONDS
        while _group_lives(server) and time.monotonic() < deadline:
            time.sleep(0.05)
    server.wait()


def _group_lives(server: subprocess.Popen[bytes]) -> bool:
    server.poll()  # takes the leader's exit code, without which its group goes on existing
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_program(main)
