"""Ports of jobs that start side by side, and the memory of one that a larger process started."""

from __future__ import annotations

import errno
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mdnet_dist import machine
from mdnet_dist.machine import PORTS, free_port, peak_resident_bytes


def test_no_outgoing_connection_gets_the_port_of_a_job_that_starts() -> None:
    assert all(free_port() in PORTS for _ in range(100))
    outgoing = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not outgoing.exists():
        pytest.skip("only Linux says which ports outgoing connections get")
    first = int(outgoing.read_text().split()[0])
    if first < 32_768:
        pytest.skip("this machine gives outgoing connections more ports than Linux does by itself")
    assert first > PORTS[-1]


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        others = [taken.getsockname()[1]] * 99
        monkeypatch.setattr(machine, "PORTS", [*others, free])
        assert {free_port() for _ in range(20)} == {free}
        monkeypatch.setattr(machine, "PORTS", [*others, others[0]])
        with pytest.raises(OSError, match="no free port") as caught:
            free_port()
    assert caught.value.errno == errno.EADDRINUSE


def test_jobs_that_start_at_once_differ_and_experiments_stay_as_they_are() -> None:
    random.seed(0)
    before = random.getstate()
    ports = {free_port() for _ in range(50)}
    assert random.getstate() == before
    assert len(ports) > 40


def test_peak_memory_is_a_process_own() -> None:
    before = peak_resident_bytes()
    held = np.ones(1 << 27, dtype=np.uint8)
    assert peak_resident_bytes() >= before and peak_resident_bytes() > held.nbytes
    program = "from mdnet_dist.machine import peak_resident_bytes; print(peak_resident_bytes())"
    started = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert 1 << 20 < int(started.stdout) < held.nbytes
