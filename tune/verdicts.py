"""What a trial's workers ask the search: their environment, and after each report whether to go on.

An actor of Ray holds the answers in memory. The environment may hold a password (of the MLflow store), and what Ray and
Tune are given as a trial's configuration they write to disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any


class Verdicts:
    """The side of the search."""

    def __init__(self, name: str, actor: Any) -> None:
        """Use `start`."""
        self.name = name
        self._actor = actor

    @classmethod
    def start(cls, environment: Mapping[str, str]) -> Verdicts:
        """Start the actor, here; it ends with this program. Args: environment: variables that workers need."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        name = f"verdicts-{time.time_ns()}"
        # Anywhere else it would take the whole search with it when that machine goes.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
        return cls(name, ray.remote(_Answers).options(**options).remote(dict(environment)))

    def decide(self, trial: str, step: int, *, goes_on: bool) -> None:
        """Answer the report that a trial made after `step` optimiser steps."""
        self._actor.decide.remote(trial, step, goes_on)


NAMESPACE = "mdnet_dist"


def wait_for_verdict(name: str, trial: str, step: int) -> bool:
    """Whether a trial goes on after the report of a step; waits for the answer.

    Args:
        name: of the actor (`Verdicts.name`).
    """
    import ray

    return bool(ray.get(ray.get_actor(name, namespace=NAMESPACE).wait.remote(trial, step)))


def environment_of(name: str) -> dict[str, str]:
    """The variables that workers need. Args: name: of the actor."""
    import ray

    return dict(ray.get(ray.get_actor(name, namespace=NAMESPACE).variables.remote()))


class _Answers:
    """The actor: the last answer to each trial."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._answers: dict[str, tuple[int, bool]] = {}
        self._changed = asyncio.Condition()

    async def variables(self) -> dict[str, str]:
        return self._environment

    async def decide(self, trial: str, step: int, goes_on: bool) -> None:
        async with self._changed:
            self._answers[trial] = step, goes_on
            self._changed.notify_all()

    async def wait(self, trial: str, step: int) -> bool:
        async with self._changed:
            await self._changed.wait_for(lambda: trial in self._answers and self._answers[trial][0] >= step)
            return self._answers[trial][1]
