"""Ray Tune around a search: the cluster, the trials that run on it, and who is asked what comes next.

    with cluster(...):
        run_tasks(source, ...)

`Source` decides; nothing here knows what a search is. Tune runs in a thread, so that signals stay this program's own:
Tune would end at the first Ctrl-C in its own way, and SIGTERM would orphan what runs.

A trial that the scheduler stops is not killed. Its workers ask after each report whether to go on (`tune.verdicts`) and
end by themselves, with all they have logged sent. Killed, they would leave their placement group behind, which holds
CPUs until the whole job ends (Ray 2.60 without a dashboard), and a run that nobody has closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from mdnet_dist.errors import InputError, TrainingFailed
from mdnet_dist.signals import STOPPING, handled_by
from tune.records import Report, TrialRecord
from tune.trial import Task, run_task
from tune.verdicts import Verdicts

OBJECT_STORE_BYTES = 128 * 2**20
"""Of a machine of one's own: nothing larger than a report goes through it."""
POLL_SECONDS = 0.2
STOP_SECONDS = 30.0
"""How long Tune may take to stop all trials, and Ray to end: where a machine has gone they may wait for it."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who asks for no GPU sees none
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials' records are ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # how a trial ended is a report without a score
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read again
}


class Source(Protocol):
    """What a search tells Tune, and is told; all from one thread."""

    def next_task(self) -> Task | Literal["later", "none"]:
        """What to start next; later: ask again; none: there is nothing more."""

    def started(self, name: str) -> None:
        """A trial's workers are being started."""

    def reported(self, name: str, report: Report) -> None:
        """A trial has validated."""

    def ended(self, name: str, status: Literal["finished", "stopped", "failed"], reason: str) -> None:
        """Nothing of this task runs any more; stopped: by the scheduler."""

    def tick(self) -> None:
        """Called a few times a second."""

    def wants_to_stop(self) -> bool:
        """Whether to stop all that runs and end."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one trial."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    def needed(self) -> dict[str, float]:
        """{"CPU": ..., "GPU": ...}, those that are not zero."""
        needed = {"CPU": self.workers * self.cpus_per_worker, "GPU": self.workers * self.gpus_per_worker}
        return {name: amount for name, amount in needed.items() if amount}


# ---------------------------------------------------------------------------------------------------------- the cluster


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, float]]:
    """The cluster that RAY_ADDRESS names, as in a job of `ray job submit`, else one of this machine's own.

    One's own ends with this program; nothing is reported to anybody. Ray's ports ask for the token of this user.

    Returns:
        what it has: {"CPU": 2.0, ...}.

    Raises:
        InputError: the cluster does not answer.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = (
        {}
        if address
        else {
            "dashboard_host": "127.0.0.1",  # there is one where ray[default] is installed
            "object_store_memory": OBJECT_STORE_BYTES,
            "num_cpus": os.cpu_count(),
        }
    )
    # What is blocked here stays so in the processes that Ray starts. A signal to the whole process group is for this
    # program alone: where Ray's own processes end first, Ray aborts this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    handlers = {number: handler for number in STOPPING if (handler := signal.getsignal(number)) is not None}
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **own
        )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(
            f"RAY_ADDRESS {address}: no Ray cluster answers there ({' '.join(str(error).split()):.150}); start one "
            "with `ray start --head`, or unset it to search on this machine"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray has put its own in their place
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        yield {name: float(amount) for name, amount in ray.cluster_resources().items()}
    finally:
        _within(STOP_SECONDS, ray.shutdown)


def _within(seconds: float, function: Callable[[], object]) -> None:
    """Call what may never return; go on without it after so many seconds."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)


def side_by_side(has: dict[str, float], resources: Resources, asked: int | None) -> int:
    """How many trials run at once.

    Args:
        has: what the cluster has.
        asked: the largest number that is wanted; None: as many as fit.

    Raises:
        InputError: not even one fits.
    """
    fit = [int(has.get(name, 0.0) / amount + 1e-9) for name, amount in resources.needed().items()]
    for (name, amount), times in zip(resources.needed().items(), fit):
        if not times:
            raise InputError(
                f"trials.workers {resources.workers}: a trial needs {amount:g} {name}s, and the cluster has "
                f"{has.get(name, 0.0):g}; lower trials.workers or trials.{name.lower()}s_per_worker"
            )
    return min([*fit, *([asked] if asked else [])], default=asked or 1)


# -------------------------------------------------------------------------------------------------------- the scheduler


def asha(metric: str, mode: str, *, epochs: int, grace_epochs: int, reduction: float) -> Any:
    """Asynchronous successive halving (Li et al., MLSys 2020), by the epochs that trials have done.

    Returns:
        a scheduler of Tune; None where trials end before the first rung.
    """
    if grace_epochs >= epochs:
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="epoch",
        metric=metric,
        mode=mode,
        max_t=epochs - 1,  # at its last epoch a trial is not behind, it is done
        grace_period=grace_epochs,
        reduction_factor=reduction,
        stop_last_trials=False,
    )


def replay(scheduler: Any, trials: Sequence[TrialRecord], metric: str) -> None:
    """Tell a new scheduler what trials of an earlier session reported, as if it had been there.

    In the order in which they began, which is not quite the one in which their reports came; a scheduler that works
    asynchronously has no more right to one than to the other.
    """
    for trial in trials:
        stand_in = _StandIn(trial.name)
        scheduler.on_trial_add(None, stand_in)
        known = [report for report in trial.reports if metric in report.metrics]
        results = [{"epoch": report.epoch, metric: report.metrics[metric]} for report in known]
        for result in results:
            scheduler.on_trial_result(None, stand_in, result)
        scheduler.on_trial_complete(None, stand_in, results[-1] if results else {})


@dataclass(frozen=True)
class _StandIn:
    """What a scheduler needs of a trial that runs no more."""

    trial_id: str


# ----------------------------------------------------------------------------------------------------------- the trials


def run_tasks(
    source: Source,
    folder: Path,
    *,
    at_once: int,
    restarts: int,
    received: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    scheduler: Any = None,
) -> None:
    """Run what the source gives until it has nothing more, or wants to stop, or a signal asks to.

    Args:
        folder: for Tune's own files, which nothing reads again.
        at_once: trials side by side.
        restarts: of a trial whose machine has gone.
        received: signals that ask to stop, as `signals_noted` gives them.
        environment: variables that workers need; they are written to no file.

    Raises:
        TrainingFailed: Tune itself failed.
    """
    failure: list[BaseException] = []

    def tune_in_thread() -> None:
        try:
            _fit(bridge, folder, at_once, restarts, scheduler)
        except BaseException as error:
            failure.append(error)

    bridge = _Bridge(source, received, Verdicts.start(environment or {}))
    thread = threading.Thread(target=tune_in_thread, name="tune", daemon=True)
    thread.start()
    deadline: float | None = None
    while thread.is_alive() and (deadline is None or time.monotonic() < deadline):
        thread.join(POLL_SECONDS)
        if received and deadline is None:
            deadline = time.monotonic() + STOP_SECONDS
    if failure and not received:
        raise TrainingFailed(f"Ray Tune failed: {_last_line(failure[0])}; --resume goes on") from failure[0]


def _last_line(error: BaseException) -> str:
    """Tune puts whole tracebacks into its messages; what happened stands last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class _Bridge:
    """Between Tune, which knows trials by ids of its own, and the source, which knows them by name."""

    def __init__(self, source: Source, received: Sequence[int], verdicts: Verdicts) -> None:
        self.source = source
        self._received = received
        self._verdicts = verdicts
        self._names: dict[str, str] = {}  # {Tune's id: name} of what runs
        self._outcomes: dict[str, tuple[str, str]] = {}
        self._stopped: dict[str, int] = {}  # {Tune's id: epoch} of what the scheduler has stopped

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles itself, with all that it was given, into a file that nobody reads again; what a search holds
        # (threads, files, a store) has no place there.
        return object, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bridge:
        return self

    def wants_to_stop(self) -> bool:
        return bool(self._received) or self.source.wants_to_stop()

    def suggest(self, trial_id: str) -> Task | Literal["later", "none"]:
        if self.wants_to_stop():
            return "none"
        task = self.source.next_task()
        if isinstance(task, Task):
            self._names[trial_id] = task.name
            self.source.started(task.name)
            return replace(task, verdicts=self._verdicts.name)
        return task

    def decided(self, trial_id: str, result: dict[str, Any], *, goes_on: bool) -> None:
        """What the scheduler says of a report."""
        if trial_id in self._names and "epoch" in result:
            # Asked once more, by a trial that repeats its reports, a scheduler lets go on what it has stopped.
            goes_on = goes_on and trial_id not in self._stopped
            if not goes_on:
                self._stopped.setdefault(trial_id, int(result["epoch"]))
            self._verdicts.decide(self._names[trial_id], int(result["step"]), goes_on=goes_on)

    def result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id not in self._names:
            return
        if "outcome" in result:
            self._outcomes[trial_id] = (str(result["outcome"]), str(result["reason"]))
        elif "epoch" in result and "step" in result:
            metrics = {
                name: float(value)
                for name, value in result.items()
                if name.partition("/")[0] in ("val", "train", "lr", "speed", "progress") and "/" in name
            }
            report = Report(
                epoch=int(result["epoch"]),
                step=int(result["step"]),
                seconds=float(result.get("time_total_s", 0.0)),
                metrics=metrics,
            )
            self.source.reported(self._names[trial_id], report)

    def complete(self, trial_id: str, error: str = "") -> None:
        """Tell the source how a trial ended; one that was stopped with the whole search did not."""
        name = self._names.pop(trial_id, None)
        outcome, reason = self._outcomes.pop(trial_id, ("failed", error) if error else ("", ""))
        if name is None or not outcome:
            return
        if outcome == "finished" and trial_id in self._stopped:
            self.source.ended(name, "stopped", f"stopped by the scheduler after epoch {self._stopped.pop(trial_id)}")
        elif outcome == "finished":
            self.source.ended(name, "finished", "")
        else:
            self.source.ended(name, "failed", reason)


def _fit(bridge: _Bridge, folder: Path, at_once: int, restarts: int, scheduler: Any) -> None:
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    class Suggestions(Searcher):
        """Asks the source; Tune's own copy of its state is empty, because the search keeps its own."""

        def suggest(self, trial_id: str) -> Any:
            task = bridge.suggest(trial_id)
            if isinstance(task, Task):
                return {"task": asdict(task)}
            return Searcher.FINISHED if task == "none" else None

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            pass  # `Events` hears of it with more detail

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

    class Events(tune.Callback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            bridge.source.tick()

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            bridge.result(trial.trial_id, result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            bridge.complete(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            text = " ".join(str(trial.get_error() or "its process ended").split())
            gone = f"its machine or process has gone {restarts + 1} times: {text:.200}"
            bridge.complete(trial.trial_id, error=gone)

    class Gentle(FIFOScheduler):
        """Asks the scheduler, and lets workers end by themselves where it would have them killed."""

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            if scheduler:
                scheduler.on_trial_add(tune_controller, trial)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = scheduler.on_trial_result(tune_controller, trial, result) if scheduler else ""
            bridge.decided(trial.trial_id, result, goes_on=decision != TrialScheduler.STOP)
            return str(TrialScheduler.CONTINUE)

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            if scheduler:
                scheduler.on_trial_complete(tune_controller, trial, result)

    class Stop(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return bridge.wants_to_stop()

    # A trial needs no CPU for itself, its workers have their own; Tune wants it to need something.
    trainable = tune.with_resources(run_task, {"memory": 2**20})
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=Suggestions(),
            scheduler=Gentle(),
            num_samples=-1,
            max_concurrent_trials=at_once,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name=f"session-{time.time_ns()}",
            storage_path=str(folder),
            verbose=0,
            callbacks=[Events()],
            stop=Stop(),
            failure_config=tune.FailureConfig(max_failures=restarts),
        ),
    )
    tuner.fit()


def _name_of(trial: Any) -> str:
    return str(trial.config["task"]["name"])


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGINT, SIGTERM, SIGUSR1 and SIGHUP so far; at a second one this program ends, and Ray with it."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(130 if number == signal.SIGINT else 143)
        received.append(number)

    with handled_by(note):
        yield received
