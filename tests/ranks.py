"""Runs a function on several ranks: gloo, one process each, on this machine, never longer than a time limit."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from mdnet_dist.machine import free_port

TIMEOUT_SECONDS = 240.0
"""Generous: on a machine that never ran DeepSpeed its first start compiles an operator for about a minute."""


def run_ranks(
    function: Callable[..., Any], ranks: int, *arguments: Any, timeout_seconds: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Call `function(*arguments)` on every rank of a job.

    Args:
        function: importable by name; it joins the group itself, as programs do (`start_processes`).

    Returns:
        what it returned, by rank; plain values and numpy arrays.

    Raises:
        AssertionError: a rank failed or the time is over; the message holds the rank's traceback.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes: list[Any] = []
    pipes: list[Connection] = []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_run_rank, args=(sender, rank, ranks, port, function, arguments)))
        processes[-1].start()
        sender.close()
        pipes.append(receiver)
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    try:
        while len(results) < ranks:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = set(wait(waiting, timeout=max(0.0, deadline - time.monotonic())))
            assert ready, f"no answer from rank {[rank for rank in range(ranks) if rank not in results]} in time"
            for rank, pipe in enumerate(pipes):
                if pipe not in ready:
                    continue
                try:
                    result, failure = pipe.recv()
                except EOFError:
                    failure = "it died without a word"
                assert failure is None, f"rank {rank}: {failure}"
                results[rank] = result
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode == 0, "a rank answered but did not end well"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()
    return [results[rank] for rank in range(ranks)]


def _run_rank(
    sender: Connection, rank: int, ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from mdnet_dist.signals import die_with_parent

    die_with_parent()  # not daemons, which may have no loader processes
    torch.set_num_threads(1)
    try:
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
