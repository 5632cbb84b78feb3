"""What runs in Ray for one trial: a Tune function that starts DeepSpeed workers with Ray Train, and those workers.

    Tune's actor     `run_task`: starts the workers, again if they die, and says how the trial ended
      Train's actors   `_work`: a rank each, `mdnet_dist.run.run_trial` in it, reports to Tune after each validation

Everything that must outlive a process is in the trial's folder: a trial that is started again finds its checkpoint
there, reports once more what it has reported before, so that a scheduler sees the whole curve, and goes on.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mdnet_dist.errors import InputError
from tune.records import Report
from tune.verdicts import environment_of, wait_for_verdict

STRAY_SECONDS = 60.0
"""How long a worker waits for one of an earlier session that still holds the trial's folder."""
_OUTCOME, _REASON = "outcome", "reason"
_LOST_ANOTHER = re.compile(
    r"closed by peer|reset by peer|pair closure|remote process exited|no longer answers?|exchange between ranks failed"
)
"""What gloo and NCCL say on a rank when another one has gone."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One stretch of work on one trial."""

    name: str  # of the trial
    config: dict[str, Any]  # the run's, nested; its folder is runs_folder/name
    log: str  # file that gets what it prints
    parent_run_id: str
    workers: int  # DeepSpeed workers
    cpus_per_worker: float
    gpus_per_worker: float
    restarts: int  # after the death of a worker
    last_step: int | None = None  # stop after the validation at this step; None: at the end of training
    whole: bool = False  # score the test part, export and draw at the end, as launch/train.py does
    verdicts: str = ""  # name of the actor that workers ask (`tune.verdicts`)


def lock_of(trials_folder: Path, name: str) -> Path:
    """The file that the first rank of a trial holds a lock on while it trains."""
    return trials_folder / f".{name}.lock"


def run_task(config: dict[str, Any]) -> None:
    """Tune's function: train, and report how it ended, {"outcome": "finished" | "failed", "reason": text}.

    It raises nothing: to Tune an exception is a reason to start the trial once more, which helps where a machine has
    gone, and not where memory or the loss has.
    """
    from ray import tune

    task = Task(**config["task"])
    reason: str | None = None
    for attempt in range(task.restarts + 1):
        try:
            _free_what_was_held(task)
            _start_workers(task)
            tune.report({_OUTCOME: "finished", _REASON: ""})
            return
        except Exception as error:
            reason, died = _explain(error)
            _note(task, f"attempt {attempt + 1} ended: {reason}")
            if not died:
                break
    tune.report({_OUTCOME: "failed", _REASON: reason})


def _free_what_was_held(task: Task) -> None:
    """Give back the resources of this trial's workers of before, where the machine that looked after them has gone.

    Ray Train leaves that to an actor that asks the dashboard (Ray 2.60), which not every cluster has. They would be
    held until the whole job ends.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    path = _group_of(task)
    if path.exists():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(path.read_text()))))
        path.unlink()


def _group_of(task: Task) -> Path:
    return Path(task.config["runs_folder"]) / f".{task.name}.group"


def _start_workers(task: Task) -> None:
    """Train in a group of workers; returns when they are done.

    Raises:
        Exception: as Ray Train raises it.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    resources = {"CPU": task.cpus_per_worker}
    if task.gpus_per_worker:
        resources["GPU"] = task.gpus_per_worker
    trainer = TorchTrainer(
        _work,
        train_loop_config=asdict(task),
        scaling_config=ScalingConfig(
            num_workers=task.workers, use_gpu=task.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if task.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=task.name, storage_path=task.config["runs_folder"] + "/.ray", callbacks=[TuneReportCallback()]
        ),
    )
    trainer.fit()
    _group_of(task).unlink(missing_ok=True)


def _explain(error: BaseException) -> tuple[str, bool]:
    """Why workers ended, on one line, and whether they died (their process or machine, not their program).

    Among ranks that failed, those whose program failed know the reason; those that lost them only say so. What Ray
    itself raises, of which its own base classes cover a part, is about a process.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {0: error}
    found = [getattr(failure, "health_check_failure", failure) for failure in failures.values()]
    dead = [failure for failure in found if type(failure).__module__.partition(".")[0] == "ray"]
    own = [failure for failure in found if failure not in dead and not _LOST_ANOTHER.search(str(failure))]
    failure = (own or dead or found)[0]
    text = " ".join(str(failure).split())
    if _is_out_of_memory(failure):
        return f"out of memory: {text:.300}", False
    if not own:
        return f"a worker died: {text:.300}", True
    name = "" if type(failure).__module__ == InputError.__module__ else f"{type(failure).__name__}: "
    return f"{name}{text:.300}", False


def _is_out_of_memory(failure: BaseException) -> bool:
    # torch has a type for it on GPUs only; on CPUs it is a RuntimeError of its allocator.
    return (
        isinstance(failure, MemoryError)
        or type(failure).__name__ == "OutOfMemoryError"
        or ("DefaultCPUAllocator" in str(failure) and "memory" in str(failure))
    )


def _note(task: Task, line: str) -> None:
    with open(task.log, "a", encoding="utf-8") as log:
        log.write(f"{line}\n")


# --------------------------------------------------------------------------------------------------------- the workers


def _work(values: dict[str, Any]) -> None:
    """One rank of a trial."""
    task = Task(**values)
    os.environ.update(environment_of(task.verdicts))
    if not task.gpus_per_worker:  # a cluster that was started without our settings leaves all of them visible
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    logging.getLogger("ray").setLevel(logging.ERROR)  # it would tell each report once more
    Path(task.log).parent.mkdir(parents=True, exist_ok=True)
    # The process has no other task, and Ray would send what it prints to the terminal of the search.
    with open(task.log, "a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            _train(task)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            raise


def _train(task: Task) -> None:
    import ray.train
    import ray.util

    from mdnet_dist.checkpoint import newest_checkpoint, read_progress
    from mdnet_dist.config_file import check_config
    from mdnet_dist.distributed import is_first, on_first
    from mdnet_dist.engine import start_processes
    from mdnet_dist.run import run_training, run_trial
    from mdnet_dist.run_folder import alone_in
    from mdnet_dist.trainer import Validation
    from tune.ledger import reports_of

    config = check_config(task.config, task.name)
    folder = Path(config.runs_folder) / config.name
    start_processes()
    if is_first() and (group := ray.util.get_current_placement_group()) is not None:
        _group_of(task).write_text(group.id.hex())

    def goes_on(step: int) -> bool:
        ahead = task.last_step is None or step < task.last_step
        return on_first(lambda: wait_for_verdict(task.verdicts, task.name, step)) and ahead

    def on_validation(validation: Validation) -> bool:
        ray.train.report({"epoch": validation.epoch, "step": validation.step, **validation.metrics})
        return goes_on(validation.step)

    def before() -> tuple[bool, list[Report]]:
        """Whether the trial has begun before, and what it reported up to its last checkpoint."""
        found = newest_checkpoint(folder)
        last = read_progress(found).step if found else 0
        return folder.is_dir(), [report for report in reports_of(folder) if report.step <= last]

    begun, reports = on_first(before)
    for report in reports:
        ray.train.report({"epoch": report.epoch, "step": report.step, **report.metrics})
    if reports and not goes_on(reports[-1].step):
        return
    run = run_training if task.whole else run_trial
    with ExitStack() as held:
        lock = lock_of(Path(config.runs_folder), task.name)
        on_first(lambda: held.enter_context(alone_in(lock, f"a worker of {task.name}", STRAY_SECONDS)))
        run(config, resume=begun, parent_run_id=task.parent_run_id, on_validation=on_validation)
