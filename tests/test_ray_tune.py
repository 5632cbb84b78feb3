"""What stands between a search and Ray Tune, without a cluster: resources, rungs, verdicts, how a trial ended."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_dist.errors import InputError, RankLost
from mdnet_dist.watch import Place, lost_ranks
from tests.conftest import REPOSITORY
from tune.ray_tune import Resources, _Bridge, _last_line, asha, replay, side_by_side
from tune.records import Report, TrialRecord
from tune.trial import Task, _explain

SCORE = "val/score"


# ------------------------------------------------------------------------------------------------------------ resources


def test_what_a_trial_needs() -> None:
    assert Resources(workers=3, cpus_per_worker=2, gpus_per_worker=0.5).needed() == {"CPU": 6, "GPU": 1.5}
    assert Resources(workers=3, cpus_per_worker=1, gpus_per_worker=0).needed() == {"CPU": 3}


@pytest.mark.parametrize(
    ("has", "workers", "cpus", "gpus", "asked", "at_once"),
    [
        ({"CPU": 8.0}, 1, 1, 0.0, None, 8),
        ({"CPU": 8.0}, 3, 1, 0.0, None, 2),
        ({"CPU": 8.0}, 1, 1, 0.0, 5, 5),
        ({"CPU": 8.0}, 1, 1, 0.0, 20, 8),
        ({"CPU": 8.0, "GPU": 3.0}, 1, 1, 1.0, None, 3),
        ({"CPU": 8.0, "GPU": 1.0}, 1, 1, 0.25, None, 4),
        ({"CPU": 2.0, "GPU": 9.0}, 1, 1, 1.0, None, 2),
        ({"CPU": 99.0, "GPU": 0.3}, 1, 1, 0.1, None, 3),  # 0.3 / 0.1 is a little less than 3
        ({"CPU": 2.0, "memory": 1e9}, 2, 1, 0.0, None, 1),
    ],
)
def test_as_many_trials_as_fit(
    has: dict[str, float], workers: int, cpus: float, gpus: float, asked: int | None, at_once: int
) -> None:
    assert side_by_side(has, Resources(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus), asked) == at_once


@settings(max_examples=200, deadline=None)
@given(
    cpus=st.integers(1, 64),
    gpus=st.integers(0, 8),
    workers=st.integers(1, 9),
    each=st.integers(1, 4),
    gpu=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    asked=st.none() | st.integers(1, 9),
)
def test_never_more_than_there_is_and_never_one_less(
    cpus: int, gpus: int, workers: int, each: int, gpu: float, asked: int | None
) -> None:
    has = {"CPU": float(cpus), "GPU": float(gpus)}
    needed = {"CPU": workers * each, "GPU": workers * gpu}

    def fits(times: int) -> bool:
        return all(times * needed[name] <= has[name] for name in has)

    resources = Resources(workers=workers, cpus_per_worker=each, gpus_per_worker=gpu)
    if not fits(1):
        with pytest.raises(InputError, match=rf"^trials\.workers {workers}: a trial needs"):
            side_by_side(has, resources, asked)
        return
    found = side_by_side(has, resources, asked)
    assert fits(found) and found >= 1
    assert found == asked or (not fits(found + 1) and (asked is None or found < asked))


def test_a_trial_that_does_not_fit_says_what_to_lower() -> None:
    three = Resources(workers=3, cpus_per_worker=1, gpus_per_worker=0)
    with pytest.raises(InputError) as caught:
        side_by_side({"CPU": 2.0}, three, None)
    assert str(caught.value) == (
        "trials.workers 3: a trial needs 3 CPUs, and the cluster has 2; lower trials.workers or trials.cpus_per_worker"
    )
    with pytest.raises(InputError) as caught:
        side_by_side({"CPU": 2.0}, Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0.5), 1)
    assert str(caught.value) == (
        "trials.workers 1: a trial needs 0.5 GPUs, and the cluster has 0; lower trials.workers or "
        "trials.gpus_per_worker"
    )


# ----------------------------------------------------------------------------------------------------- Tune's scheduler


def rungs(scheduler: Any) -> dict[int, dict[str, float]]:
    """{epoch: {trial: what was recorded there}}, of Tune's own bookkeeping."""
    [bracket] = scheduler._brackets
    return {int(epoch): dict(recorded) for epoch, recorded in sorted(bracket._rungs)}


@pytest.mark.parametrize(
    ("epochs", "grace", "reduction", "expected"),
    [(12, 4, 3, [4]), (28, 4, 3, [4, 12]), (9, 1, 2, [1, 2, 4, 8]), (5, 4, 3, [4]), (2, 1, 3, [1])],
)
def test_rungs_are_below_the_last_epoch(epochs: int, grace: int, reduction: int, expected: list[int]) -> None:
    scheduler = asha(SCORE, "max", epochs=epochs, grace_epochs=grace, reduction=reduction)
    assert list(rungs(scheduler)) == expected
    assert max(expected) < epochs


@pytest.mark.parametrize(("epochs", "grace"), [(4, 4), (1, 1), (3, 8)])
def test_trials_that_end_before_the_first_rung_need_no_scheduler(epochs: int, grace: int) -> None:
    assert asha(SCORE, "max", epochs=epochs, grace_epochs=grace, reduction=3) is None


def trial(name: str, *scores: float, every: int = 2) -> TrialRecord:
    """A trial that reported these scores, one every few epochs."""
    reports = [
        Report(epoch=epoch, step=10 * epoch, seconds=1.0, metrics={SCORE: score})
        for epoch, score in zip(range(every, 999, every), scores)
    ]
    return TrialRecord(number=1, name=name, point={}, status="finished", reports=reports)


def told(scheduler: Any, name: str, *scores: float, every: int = 2) -> list[str]:
    """What the scheduler answers a running trial."""
    running = type("Running", (), {"trial_id": name})()
    scheduler.on_trial_add(None, running)
    answers: list[str] = []
    for epoch, score in zip(range(every, 999, every), scores):
        if "STOP" not in answers:
            answers.append(scheduler.on_trial_result(None, running, {"epoch": epoch, SCORE: score}))
    return answers


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_trial_behind_the_others_is_stopped_at_a_rung_and_one_at_its_end_is_not(mode: Literal["max", "min"]) -> None:
    sign = 1 if mode == "max" else -1
    scheduler = asha(SCORE, mode, epochs=8, grace_epochs=4, reduction=2)
    assert told(scheduler, "good", *[sign * 0.9] * 4) == ["CONTINUE"] * 4
    assert told(scheduler, "bad", *[sign * 0.1] * 2) == ["CONTINUE", "STOP"], "not before the rung"
    assert told(scheduler, "late", sign * 0.1, sign * 0.95, sign * 0.0, sign * 0.0) == ["CONTINUE"] * 4


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), max_size=6),
    newcomer=st.lists(st.integers(0, 99), min_size=6, max_size=6),
    mode=st.sampled_from(["max", "min"]),
)
def test_after_a_replay_a_scheduler_decides_as_if_it_had_been_there(
    scores: list[list[int]], newcomer: list[int], mode: Literal["max", "min"]
) -> None:
    """Trials one after another, against the records that they left."""
    there, again = (asha(SCORE, mode, epochs=12, grace_epochs=2, reduction=2) for _ in range(2))
    records = []
    for number, values in enumerate(scores):
        answers = told(there, f"t{number}", *map(float, values))
        records.append(trial(f"t{number}", *map(float, values[: len(answers)])))
    replay(again, records, SCORE)
    first = {epoch: set(recorded) for epoch, recorded in rungs(again).items()}
    expected = {epoch: {t.name for t in records if t.reports[-1].epoch >= epoch} for epoch in first}
    assert first == expected
    assert again._trial_info == {}, "nobody runs"
    assert rungs(again) == rungs(there)
    assert told(again, "new", *map(float, newcomer)) == told(there, "new", *map(float, newcomer))


def test_a_replay_bears_trials_without_reports_or_without_the_metric() -> None:
    scheduler = asha(SCORE, "max", epochs=8, grace_epochs=4, reduction=2)
    failed = trial("failed")
    partly = trial("partly", 0.5, 0.75)
    partly.reports[0].metrics.clear()
    replay(scheduler, [failed, partly], SCORE)
    assert rungs(scheduler) == {4: {"partly": 0.75}}


# ----------------------------------------------------------------------------------------------------------- the bridge


@dataclass
class Heard:
    """A source that has given tasks, and notes what it is told."""

    tasks: list[Any] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    stops: bool = False

    def next_task(self) -> Any:
        return self.tasks.pop(0)

    def started(self, name: str) -> None:
        self.events.append(("started", name))

    def reported(self, name: str, report: Report) -> None:
        self.events.append(("reported", name, report))

    def ended(self, name: str, status: str, reason: str) -> None:
        self.events.append(("ended", name, status, reason))

    def tick(self) -> None:
        raise AssertionError("the bridge does not tick")

    def wants_to_stop(self) -> bool:
        return self.stops


@dataclass
class Answers:
    """In place of the actor."""

    name: str = "verdicts-1"
    given: list[tuple[str, int, bool]] = field(default_factory=list)

    def decide(self, trial: str, step: int, *, goes_on: bool) -> None:
        self.given.append((trial, step, goes_on))


def task(name: str) -> Task:
    return Task(
        name=name, config={}, log="", parent_run_id="", workers=1, cpus_per_worker=1, gpus_per_worker=0, restarts=0
    )


def bridge_of(*tasks: Any) -> tuple[_Bridge, Heard, Answers, list[int]]:
    source, answers, received = Heard(list(tasks)), Answers(), list[int]()
    return _Bridge(source, received, answers), source, answers, received  # type: ignore[arg-type]


def result(epoch: int, **metrics: float) -> dict[str, Any]:
    """What Tune passes on of a report, with what it adds itself."""
    own = {"training_iteration": 1, "time_total_s": 2.5, "pid": 7, "done": False, "config/task": 1, "timestamp": 3}
    return {"epoch": epoch, "step": 10 * epoch, SCORE: 0.5, "train/eta": 1, "lr/head": 0.1, **own, **metrics}


def test_a_task_is_started_and_knows_who_decides() -> None:
    bridge, source, _, _ = bridge_of(task("a"), "later", "none")
    given = bridge.suggest("id-1")
    assert isinstance(given, Task) and (given.name, given.verdicts) == ("a", "verdicts-1")
    assert (bridge.suggest("id-2"), bridge.suggest("id-3")) == ("later", "none")
    assert source.events == [("started", "a")]


@pytest.mark.parametrize("why", ["signal", "source"])
def test_nothing_new_starts_once_all_is_to_stop(why: str) -> None:
    bridge, source, _, received = bridge_of(task("a"))
    assert not bridge.wants_to_stop()
    if why == "signal":
        received.append(15)
    source.stops = why == "source"
    assert bridge.wants_to_stop() and bridge.suggest("id-1") == "none"
    assert source.events == [] and len(source.tasks) == 1


def test_reports_reach_the_source_by_name_with_what_was_measured_alone() -> None:
    bridge, source, answers, _ = bridge_of(task("a"))
    bridge.suggest("id-1")
    bridge.decided("id-1", result(2), goes_on=True)
    bridge.result("id-1", result(2))
    bridge.decided("stranger", result(2), goes_on=True)
    bridge.result("stranger", result(2))
    bridge.decided("id-1", {"outcome": "finished", "reason": ""}, goes_on=True)
    report = Report(epoch=2, step=20, seconds=2.5, metrics={SCORE: 0.5, "train/eta": 1.0, "lr/head": 0.1})
    assert source.events[1:] == [("reported", "a", report)]
    assert answers.given == [("a", 20, True)]


@pytest.mark.parametrize(
    ("last", "error", "ended"),
    [
        ({"outcome": "finished", "reason": ""}, "", ("finished", "")),
        ({"outcome": "failed", "reason": "out of memory"}, "", ("failed", "out of memory")),
        (None, "its machine has gone", ("failed", "its machine has gone")),
        ({"outcome": "failed", "reason": "NaN"}, "its machine has gone", ("failed", "NaN")),
        (None, "", None),  # stopped with the whole search: it will go on
    ],
)
def test_how_a_trial_ended(last: dict[str, Any] | None, error: str, ended: tuple[str, str] | None) -> None:
    bridge, source, _, _ = bridge_of(task("a"))
    bridge.suggest("id-1")
    if last:
        bridge.result("id-1", last)
    bridge.complete("id-1", error)
    bridge.complete("id-1", error)
    assert source.events[1:] == ([("ended", "a", *ended)] if ended else [])


def test_a_trial_that_was_stopped_stays_stopped_also_when_it_repeats_its_reports() -> None:
    """Its worker died before it could end: the new one repeats, and Tune's scheduler decides but once."""
    bridge, source, answers, _ = bridge_of(task("a"), task("b"))
    bridge.suggest("id-1")
    bridge.suggest("id-2")
    for epoch, goes_on in ((2, True), (4, False), (2, True), (4, True)):
        bridge.decided("id-1", result(epoch), goes_on=goes_on)
    assert answers.given == [("a", 20, True), ("a", 40, False), ("a", 20, False), ("a", 40, False)]
    bridge.decided("id-2", result(4), goes_on=True)
    for number in ("id-1", "id-2"):
        bridge.result(number, {"outcome": "finished", "reason": ""})
        bridge.complete(number)
    assert source.events[2:] == [
        ("ended", "a", "stopped", "stopped by the scheduler after epoch 4"),
        ("ended", "b", "finished", ""),
    ]


def test_a_stopped_trial_that_failed_has_failed() -> None:
    bridge, source, _, _ = bridge_of(task("a"))
    bridge.suggest("id-1")
    bridge.decided("id-1", result(4), goes_on=False)
    bridge.result("id-1", {"outcome": "failed", "reason": "disk full"})
    bridge.complete("id-1")
    assert source.events[-1] == ("ended", "a", "failed", "disk full")


def test_tune_s_own_state_holds_nothing_of_the_search() -> None:
    bridge, source, _, _ = bridge_of(task("a"))
    source.events.append((lambda: None,))  # what cannot be pickled
    assert copy.deepcopy({"search": bridge})["search"] is bridge
    assert type(pickle.loads(pickle.dumps(bridge))) is object


# -------------------------------------------------------------------------------------------------------- what happened


def group_error(**failures: BaseException) -> Exception:
    from ray.train import WorkerGroupError

    return WorkerGroupError("text of Ray", {int(rank[1:]): failure for rank, failure in failures.items()})


def gone(text: str = "The actor died because its node has died") -> Exception:
    """A worker's process that ended, as Ray Train tells it."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: long", RayError(text))


PEER = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


def test_a_program_that_failed_says_why_and_is_not_tried_again() -> None:
    assert _explain(group_error(r0=ValueError("a\n  b"))) == ("ValueError: a b", False)
    assert _explain(ValueError("outside")) == ("ValueError: outside", False)
    mistake = InputError("train.lr: too high")
    assert _explain(group_error(r0=mistake)) == ("train.lr: too high", False), "its line says all"
    assert len(_explain(group_error(r0=ValueError("x" * 5000)))[0]) <= len("ValueError: ") + 300


@pytest.mark.parametrize("order", [("r0", "r1", "r2"), ("r2", "r1", "r0"), ("r1", "r2", "r0")])
def test_of_several_ranks_the_one_that_knows_is_heard(order: tuple[str, str, str]) -> None:
    """One failed; another lost its connection to it; a third was ended by Ray."""
    failures = dict(zip(order, (InputError("shard damaged"), PEER, gone())))
    assert _explain(group_error(**dict(sorted(failures.items())))) == ("shard damaged", False)


def test_a_worker_that_died_is_started_again() -> None:
    from ray.exceptions import ActorDiedError

    assert _explain(group_error(r0=gone())) == ("a worker died: The actor died because its node has died", True)
    reason, died = _explain(group_error(r0=PEER, r1=gone("killed")))
    assert (reason, died) == ("a worker died: killed", True), "that its peer lost it is no failure of the program"
    reason, died = _explain(group_error(r0=PEER))
    assert died and reason.startswith("a worker died: [gloo") and "closed by peer" in reason
    assert _explain(ActorDiedError())[1]
    assert _explain(group_error(r0=ActorDiedError()))[1]
    # What the watch makes of it (`mdnet_dist.watch`), after a journey between processes.
    here = Place(beat=1, begun=1, what="computing step 1")
    for places in ({0: here, 1: None}, {0: here, 1: None, 2: None}, {0: here, 1: here}):
        lost = pickle.loads(pickle.dumps(RankLost(lost_ranks(places), speaks=False)))
        assert not lost.speaks
        assert _explain(group_error(r0=lost, r1=gone("killed"))) == ("a worker died: killed", True)
        assert _explain(group_error(r0=lost))[1]


def test_memory_that_ran_out_will_run_out_again() -> None:
    import torch
    from ray.exceptions import OutOfMemoryError

    for failure in (
        MemoryError("32 GiB"),
        torch.cuda.OutOfMemoryError("32 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 32 GiB"),
        gone_for_memory(OutOfMemoryError("32 GiB")),
    ):
        reason, died = _explain(group_error(r0=failure))
        assert reason.startswith("out of memory: ") and reason.endswith("32 GiB") and not died
    assert not _explain(group_error(r0=RuntimeError("DefaultCPUAllocator: no")))[0].startswith("out of memory")


def gone_for_memory(error: Exception) -> Exception:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError("A worker health check failed.", error)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Traceback\n  File x\nValueError: no space left\n\n", "ValueError: no space left"),
        ("  one  ", "one"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
        ("y" * 999, "y" * 300),
    ],
)
def test_of_a_traceback_the_last_line_says_what_happened(text: str, line: str) -> None:
    assert _last_line(ValueError(text)) == line


def test_a_second_signal_ends_the_program_at_once() -> None:
    """The first is noted and the program goes on; the second leaves it no time for anything."""
    program = """
        import time
        from tune.ray_tune import signals_noted
        with signals_noted() as received:
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
                if received:
                    print("noted", received[0], flush=True)
                    break
            time.sleep(100)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == f"noted {int(signal.SIGTERM)}\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 143
