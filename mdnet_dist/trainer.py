"""The training loop: batch, forward, backward, step, log; sometimes evaluate, sometimes save.

Every loop over ranks, accumulation steps and parts of the loss comes down to one rule: both losses are means over the
whole global batch (all ranks, all accumulation steps), so sums are divided by counts that all ranks know before the
first backward pass.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mdnet_dist.checkpoint import (
    Progress,
    best_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from mdnet_dist.config import RunConfig
from mdnet_dist.console import Progress as ProgressBar
from mdnet_dist.console import say
from mdnet_dist.damage import DamageCount
from mdnet_dist.data import Batch
from mdnet_dist.distributed import (
    barrier,
    gather,
    is_first,
    on_first,
    raise_together,
    rank,
    sum_on_hosts,
    sum_over_ranks,
    world_size,
)
from mdnet_dist.engine import Engine, start_processes
from mdnet_dist.errors import InputError, Preempted, TrainingFailed
from mdnet_dist.eta_balance import EtaBalance
from mdnet_dist.evaluation import Evaluation, evaluate, main_score, recalibrated, temperature_of
from mdnet_dist.export import export_model, load_card
from mdnet_dist.model.mdnet import NO_LABEL, MDNet
from mdnet_dist.plan import micro_batches
from mdnet_dist.pretrained import pretrained_weights
from mdnet_dist.run_data import RunData, open_data
from mdnet_dist.run_folder import alone_in, existing_run_folder, new_run_folder, write_config, write_scores
from mdnet_dist.schedules import beta_at, eta_at
from mdnet_dist.signals import StopRequest
from mdnet_dist.step_log import BAD_STEPS, DAMAGED, SAMPLES, StepLog
from mdnet_dist.step_report import Launched, Pace, StepReport, as_text, peak_memory_bytes, to_host
from mdnet_dist.storage import place_of_set
from mdnet_dist.tracking import Tracker
from mdnet_dist.watch import Watch, is_killed_loader, is_lost_peer

WAIT_SECONDS = 60.0
"""How long a job waits for another one to leave its run folder."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run gives to the program that started it."""

    folder: Path
    metrics: dict[str, float]  # prefixed val/ and test/; the same on every rank
    test: Evaluation | None
    data: RunData
    nltk_data: Path  # where WordNet is, for METEOR


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What `on_validation` is told, on every rank the same."""

    epoch: int  # done
    step: int  # optimiser steps done
    metrics: dict[str, float]  # val/..., and what was last logged of training: train/..., lr/..., speed/...


OnValidation = Callable[[Validation], bool]
"""Called on every rank when an evaluation of the validation part has been logged and its checkpoint written; returns
whether training goes on, on every rank the same."""


class Trainer:
    """One run on one set of ranks."""

    def __init__(
        self, config: RunConfig, *, resume: bool = False, with_test: bool = True, folder: Path | None = None
    ) -> None:
        """Check all input, build network and engine, and load the last checkpoint where `resume` asks for it.

        Args:
            with_test: without it the test part is never read (`open_data`).
            folder: of the run, already made, where it is not to be found or made by the run's name.

        Raises:
            InputError: whatever is wrong with configuration, shards or checkpoint; before anything is written.
        """
        self.config = config
        self.device = start_processes()
        self.data: RunData = open_data(config, with_test=with_test)
        self.steps = config.train.epochs * self.data.steps_per_epoch
        pretrained = None if resume else self._pretrained()
        self.folder = folder or on_first(lambda: existing_run_folder(config) if resume else new_run_folder(config))
        self._held = ExitStack()
        on_first(self._lock)
        found = on_first(lambda: newest_checkpoint(self.folder)) if resume else None
        if resume and found is None:
            say(f"{self.folder}: no checkpoint yet; starting at step 0")
            pretrained = self._pretrained()
        self.nltk_data = Path(config.runs_folder) / "nltk_data"
        self.step, self.updates, self.bad_steps = 0, 0, 0
        self.best_score: float | None = None
        self.epoch_end_due = False  # the last step was the last of its epoch, and that has not been validated yet
        self._saved_step: int | None = None
        self._stop: StopRequest | None = None  # inside `watched`
        self._watch: Watch | None = None
        self._last_measured: dict[str, float] = {}  # of training, as it was logged
        self._damage = DamageCount(config.data.most_damaged)
        self._damage.begin(self.data.samples)
        self.eta = EtaBalance(config.blend.eta_memory)
        # A GPU has the next step to compute while its last one is looked at.
        self.steps_ahead = 1 if self.device.type == "cuda" else 0
        # The same weights on every rank, whatever was drawn before.
        torch.manual_seed(config.train.seed)
        self.network: MDNet = self.data.card.build()
        if pretrained:
            self.network.image_model.load_state_dict(pretrained)
        self.engine = Engine(self.network, config, self.device)
        self.network = self.engine.network
        if found is not None:
            self._resume(found)
        on_first(self._cut_logs)

    def _lock(self) -> None:
        """Keep other jobs out of the run's folder: one that is resumed while the last is still saving waits for it."""
        self._held.enter_context(alone_in(self.folder / ".lock", "another job", WAIT_SECONDS))

    def _cut_logs(self) -> None:
        """Forget what was noted of steps that come again."""
        for name in (SAMPLES, BAD_STEPS, DAMAGED):
            StepLog(self.folder / name).cut(self.step)

    def _pretrained(self) -> dict[str, torch.Tensor] | None:
        """Published weights to start from, where the configuration names some. Collective."""
        weights: dict[str, torch.Tensor] | None = None
        problem: InputError | None = None
        try:
            weights = pretrained_weights(self.config.model)
        except InputError as error:
            problem = error
        raise_together(problem)
        return weights

    # -------------------------------------------------------------------------------------------------------- steps

    def train_step(self, batches: Iterator[Batch]) -> StepReport:
        """One update of the weights from the next global batch."""
        return self._report(self._launch(batches))

    def _launch(self, batches: Iterator[Batch]) -> Launched:
        """Tell the device to compute a step. Nothing here waits for it, so that it always has something to do."""
        train, ranks = self.config.train, world_size()
        fraction = (self.step + 0.5) / self.steps
        self.engine.optimizer.schedule(fraction)
        beta, eta = self.beta, self.current_eta
        self.network.blend.set(beta, eta)

        pieces = micro_batches(train.global_batch, train.micro_batch, ranks, rank())
        self._begin(f"reading the data of step {self.step + 1}")
        started = time.monotonic()
        fetched, problem = _fetch(batches, len(pieces))
        waited = time.monotonic() - started
        self._begin(f"computing step {self.step + 1}")

        images = sum(int((batch.labels != NO_LABEL).sum()) for batch in fetched)
        words = sum(int(batch.lengths.sum()) for batch in fetched)
        messages = [message for batch in fetched for message in batch.damaged]
        labelled, tokens, problems, all_damaged = sum_on_hosts([images, words, problem is not None, len(messages)])
        labelled, tokens = max(1, labelled), max(1, tokens)
        if problems:
            raise_together(problem)
        damaged = [message for part in gather(messages) for message in part] if all_damaged else []

        sums = torch.zeros(2, device=self.device)
        before = self.engine.running_statistics()
        change = torch.zeros_like(before)
        for piece, batch in zip(pieces, (batch.to(self.device) for batch in fetched)):
            # For dropout; here, because a DataLoader draws a number too when it starts.
            torch.manual_seed(_dropout_seed(train.seed, self.step, piece.start))
            if piece is not pieces[0]:
                self.engine.set_running_statistics(before)
            losses = self.engine.losses(
                self._images(batch), batch.labels, batch.tokens, batch.lengths, train.label_smoothing
            )
            # DeepSpeed averages over ranks, so that these sums over a micro-batch become means over the global batch.
            self.engine.backward(ranks * (losses.m / labelled + losses.l / tokens))
            sums += torch.stack([losses.m.detach(), losses.l.detach()])
            change += (self.engine.running_statistics() - before) / len(pieces)
            if piece is not pieces[-1]:
                self.engine.micro_batch_done()

        stop = torch.tensor([float(self._stop is not None and self._stop.received)], device=self.device)
        totals = sum_over_ranks(torch.cat([sums, self.network.blend.squared_norms, stop, change]))
        measured, change = totals.split([len(totals) - len(change), len(change)])
        finite = measured[:4].isfinite().all()
        moved = self.engine.micro_batch_done(finite)
        self.engine.set_running_statistics(torch.where(moved, before + change / ranks, before))
        self.eta.update(torch.where(finite, measured[2:4].double().sqrt() / ranks, math.nan))
        self.step += 1
        self.epoch_end_due = self.step % self.data.steps_per_epoch == 0
        taken = torch.as_tensor(eta, dtype=torch.float64, device=self.device)
        measured, computed = to_host(torch.cat([measured.double(), taken[None], moved[None].double()]))
        known = {
            "step": self.step,
            "beta": beta,
            "rates": {group["name"]: group["lr"] for group in self.engine.optimizer.param_groups},
            "waited_seconds": waited,
            "keys": [key for batch in fetched for key in batch.keys],
            "damaged": damaged,
        }
        return Launched(known=known, labelled=labelled, tokens=tokens, measured=measured, computed=computed)

    def _report(self, launched: Launched) -> StepReport:
        """What a step measured, as soon as the device has computed it; to be asked of each step, in their order."""
        report = launched.report()
        self.updates += report.moved
        self.bad_steps = 0 if report.moved else self.bad_steps + 1
        return report

    @property
    def beta(self) -> float:
        """beta of the coming step."""
        return beta_at(self.config.blend.beta, (self.step + 0.5) / self.steps)

    @property
    def current_eta(self) -> float | Tensor:
        """eta of the coming step; () where it follows from what the device has measured."""
        eta = self.config.blend.eta
        return self.eta.eta if isinstance(eta, str) else eta_at(eta, (self.step + 0.5) / self.steps)

    def _images(self, batch: Batch) -> torch.Tensor:
        return self.data.card.normalise(batch.images)

    # --------------------------------------------------------------------------------------------------------- loop

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Heed signals and watch the other ranks, while what is inside trains and scores. Collective.

        Raises:
            RankLost: an exchange failed because another rank has gone.
        """
        self._stop = StopRequest()
        self._watch = Watch(
            self._stop,
            self.config.train.patience_seconds,
            last_resort=f"--resume continues from the newest checkpoint in {self.folder}",
        )
        ending = True
        try:
            yield
            ending = False
        except RuntimeError as error:
            if is_killed_loader(error):
                raise self._watch.rank_ends("a loader process was killed, for want of memory perhaps") from error
            if not is_lost_peer(error):
                raise
            raise self._watch.rank_lost() from error
        finally:
            self._watch.close()
            stopped, handled = self._stop.received, self._stop.handles
            # While a stopped run ends, a second signal must not cut off what the tracker still has to send.
            self._stop.restore(ignore=ending and stopped)
            self._watch = self._stop = None
        if stopped and handled:  # too late for a checkpoint, which is there; not too late to stop
            signal.raise_signal(signal.SIGTERM)

    def _begin(self, what: str) -> None:
        if self._watch:
            self._watch.begin(what)

    def _told_to_stop(self) -> bool:
        """Whether this rank is to stop; asked before each batch that is scored, so that it is a sign of life too."""
        if self._watch:
            self._watch.moved()
        return self._stop is not None and self._stop.received

    def train(self, tracker: Tracker | None = None, on_validation: OnValidation | None = None) -> None:
        """Train to the end, or to where `on_validation` says stop, validating and saving on the way.

        Args:
            tracker: on the first rank.

        Raises:
            Preempted: a signal asked to stop, and a checkpoint has been written.
            TrainingFailed: too many steps in a row were not finite.
        """
        progress = ProgressBar(self.steps, self.step, self.config.train.log_every_steps)
        try:
            # A run that was stopped after the last step of an epoch still has to validate it.
            if self.epoch_end_due and not self._end_of_epoch(tracker, on_validation):
                return
            if self.step < self.steps:
                batches = self.data.training_batches(self.config, self.step, self.steps, self.device.type == "cuda")
                self.train_until(self.steps, iter(batches), progress, tracker, on_validation)
        finally:
            progress.close()

    def train_until(
        self,
        last_step: int,
        batches: Iterator[Batch],
        progress: ProgressBar,
        tracker: Tracker | None = None,
        on_validation: OnValidation | None = None,
    ) -> None:
        """Train up to a step, as `train`."""
        save_every = self.config.train.checkpoint_every_steps
        pace = Pace(self.step)
        launched: list[Launched] = []
        while self.step < last_step:
            if self.step % self.data.steps_per_epoch == 0:
                self._damage.begin(self.data.samples)
            launched.append(self._launch(batches))
            saves = save_every > 0 and self.step % save_every == 0
            # Before something comes between the steps, all of them are looked at.
            ahead = 0 if saves or self.epoch_end_due or self.step == last_step else self.steps_ahead
            stop = False
            while len(launched) > ahead:
                stop |= self._step_done(launched.pop(0), pace, progress, tracker)
            if stop:
                while launched:
                    self._step_done(launched.pop(0), pace, progress, tracker)
                raise self._preempted()
            paused = time.monotonic()
            if self.epoch_end_due and not self._end_of_epoch(tracker, on_validation):
                return
            if saves and self._saved_step != self.step:
                self.save(None)
            pace.since += time.monotonic() - paused

    def _step_done(self, launched: Launched, pace: Pace, progress: ProgressBar, tracker: Tracker | None) -> bool:
        """Log a step and heed what it says; returns whether some rank was told to stop."""
        report = self._report(launched)
        pace.waited += report.waited_seconds
        if report.damaged:
            self._count_damage(report)
        if report.step % self.config.train.log_every_steps == 0 or report.step == self.steps:
            seconds = time.monotonic() - pace.since
            speed = (report.step - pace.logged) * self.config.train.global_batch / seconds
            measured = self._last_measured = self._measured(report, speed, pace.waited / seconds)
            pace.since, pace.waited, pace.logged = time.monotonic(), 0.0, report.step
            if tracker:
                tracker.log_metrics(measured, report.step)
            progress.step_done(report.step, as_text(measured))
        else:
            progress.step_done(report.step, {})
        if self.config.train.ledger:
            self._note(SAMPLES, report)
        if not report.moved:
            self._skipped(report)
        return report.stop

    def _measured(self, report: StepReport, images_per_second: float, wait_share: float) -> dict[str, float]:
        return {
            "train/loss_m": report.loss_m,
            "train/loss_l": report.loss_l,
            "train/beta": report.beta,
            "train/eta": report.eta,
            "train/gradient_norm_m": report.gradient_norm_m,
            "train/gradient_norm_l": report.gradient_norm_l,
            "train/skipped_steps": float(report.step - self.updates),
            "speed/images_per_second": images_per_second,
            "speed/data_wait_share": wait_share,
            "speed/peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
            **{f"lr/{name}": rate for name, rate in report.rates.items()},
            **({"data/damaged": float(self._damage.damaged)} if self.config.data.damaged == "skip" else {}),
        }

    def _count_damage(self, report: StepReport) -> None:
        """Say what is damaged and left out, once each, and stop where it is too much.

        Raises:
            InputError: as `DamageCount.check`.
        """
        new = self._damage.add(self.config.train.global_batch, report.damaged)
        for message in new:
            say(f"step {report.step}: left out: {message}")
        if new:
            on_first(lambda: StepLog(self.folder / DAMAGED).append(report.step, messages=new))
        self._damage.check()

    def _skipped(self, report: StepReport) -> None:
        what = "a gradient" if report.finite else "the loss"
        say(f"step {report.step}: {what} is not finite; all ranks skip it ({self.bad_steps} in a row)")
        self._note(BAD_STEPS, report, loss_m=str(report.loss_m), loss_l=str(report.loss_l))
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise TrainingFailed(
                f"{self.bad_steps} steps in a row had a loss or gradient that is not finite, up to step {report.step}; "
                f"{self.folder / BAD_STEPS} names their images; lower the learning rates, or continue from "
                f"{self.folder}/checkpoints"
            )

    def _note(self, name: str, report: StepReport, **fields: str) -> None:
        """Write the images of the step just done, over all ranks, into a file of the run's folder. Collective."""
        keys = [key for keys in gather(report.keys) for key in keys]
        on_first(lambda: StepLog(self.folder / name).append(report.step, keys=keys, **fields))

    def _preempted(self) -> Preempted:
        """Save, and say so. Collective."""
        return Preempted(f"stopped by a signal; {self.save(None)} holds step {self.step}, --resume continues")

    # -------------------------------------------------------------------------------------------- evaluate and save

    def _end_of_epoch(self, tracker: Tracker | None, on_validation: OnValidation | None) -> bool:
        """Validate and save where it is time to; returns whether training goes on.

        Raises:
            Preempted: a signal asked to stop while it was scored; the resumed run scores it again.
        """
        train, last, epoch = self.config.train, self.step == self.steps, self.step // self.data.steps_per_epoch
        score, validation = None, None
        if self.data.validation and (last or epoch % self.config.evaluate.every_epochs == 0):
            try:
                evaluation = self.evaluate(self.data.validation)
            except Preempted:
                raise self._preempted() from None
            metrics = {f"val/{name}": value for name, value in evaluation.metrics.items()}
            score = main_score(
                {name.removeprefix("val/"): value for name, value in metrics.items()}, self.config.evaluate.metric
            )
            if score is None:
                raise InputError(f"evaluate.metric '{self.config.evaluate.metric}' is not measured; {_known(metrics)}")
            metrics |= {"val/score": score, "progress/epoch": float(epoch)}
            shown = {
                name: metrics[f"val/{name}"]
                for name in ("dca" if "val/dca" in metrics else "label_accuracy", "bleu4", "loss_m", "loss_l")
                if f"val/{name}" in metrics
            }
            say(f"epoch {epoch}/{train.epochs}  validation  " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()))
            if tracker:
                tracker.log_metrics(metrics, self.step)
            validation = Validation(epoch=epoch, step=self.step, metrics={**self._last_measured, **metrics})
        better = score is not None and (self.best_score is None or score > self.best_score)
        if better:
            self.best_score = score
        self.epoch_end_due = False
        saves = last or better or epoch % train.checkpoint_every_epochs == 0
        if saves:
            self.save(score)
        # After the checkpoint: whoever is told of a score may count on it.
        goes_on = on_validation is None or validation is None or on_validation(validation)
        if not goes_on and not saves:
            self.save(score)
        return goes_on

    def evaluate(self, parts: list[str], pictures: int = 0, *, retrieval: bool = False) -> Evaluation:
        """Score the network as it is on some parts, over all ranks. Collective.

        Args:
            pictures: for how many images to keep the attention.
            retrieval: whether to look for the images by their reports too.

        Raises:
            Preempted: a signal asked to stop meanwhile.
        """
        self._begin(f"scoring {', '.join(parts)} after step {self.step}")
        batches = self.data.evaluation_batches(self.config, parts, self.device.type == "cuda")
        with self.engine.evaluating() as network:
            return evaluate(
                network,
                self.data.card,
                batches,
                device=self.device,
                beam_width=self.config.evaluate.beam_width,
                nltk_data=self.nltk_data,
                pictures=pictures,
                queries=self.data.queries(parts) if retrieval else None,
                most_damaged=self.config.data.most_damaged,
                told_to_stop=self._told_to_stop,
            )

    def save(self, score: float | None) -> Path:
        """Write a checkpoint of the current step and delete those no longer wanted. Collective."""
        self._begin(f"saving step {self.step}")
        weights, optimizer_state = self.engine.weights(), self.engine.optimizer_state()
        progress = Progress(
            step=self.step,
            updates=self.updates,
            bad_steps=self.bad_steps,
            eta_norms=self.eta.norms,
            epoch_end_due=self.epoch_end_due,
            sequence=self._sequence(),
            score=score,
            best_score=self.best_score,
        )

        def write() -> Path:
            written = save_checkpoint(self.folder, progress, weights, optimizer_state)
            prune_checkpoints(self.folder, self.config.train.keep_last, self.config.train.keep_best)
            return written

        written = on_first(write)
        self._saved_step = self.step
        return written

    def _resume(self, checkpoint: Path) -> None:
        loaded, problem = None, None
        try:
            loaded = load_checkpoint(checkpoint)
        except InputError as error:
            problem = error
        raise_together(problem)
        assert loaded is not None
        progress, weights, optimizer_state = loaded
        self._check_position(checkpoint, progress)
        try:
            self.engine.load_weights(weights)
            self.engine.load_optimizer_state(optimizer_state, progress.updates)
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{checkpoint}: does not fit the configured network, vocabulary or optimiser ({reason}); "
                "resume with the configuration it was trained with, or start a new run under another name"
            ) from error
        self.step, self.updates, self.bad_steps = progress.step, progress.updates, progress.bad_steps
        self.eta.norms, self.best_score = list(progress.eta_norms), progress.best_score
        self.epoch_end_due, self._saved_step = progress.epoch_end_due, progress.step
        say(f"resuming {self.folder} at step {self.step} of {self.steps}")

    def _check_position(self, checkpoint: Path, progress: Progress) -> None:
        """Refuse to go on where the step would mean other images than it did, or lies beyond the end.

        Raises:
            InputError: naming what has changed.
        """
        for name, value in self._sequence().items():
            if (was := progress.sequence.get(name, value)) != value:
                place = place_of_set(self.config.data)
                how = f"on other data than {place} holds now" if name == "data" else f"with {name} {was}, not {value}"
                raise InputError(
                    f"{checkpoint}: was trained {how}, and images would be missed or repeated; resume with what it was "
                    "trained with, or start a new run under another name"
                )
        if progress.step > self.steps:
            raise InputError(
                f"train.epochs {self.config.train.epochs}: training ends at step {self.steps}, but {checkpoint} lies "
                "beyond; raise it, or start a new run under another name"
            )

    def _sequence(self) -> dict[str, int | str]:
        """What the sequence of training images, and the meaning of the network's outputs, follows from."""
        train = self.config.train
        return {
            "train.seed": train.seed,
            "train.global_batch": train.global_batch,
            "data.shuffle_window": self.config.data.shuffle_window,
            "data": self.data.fingerprint,
        }

    def finish(self, tracker: Tracker | None = None) -> Result:
        """Score the best checkpoint on the validation part and, once, on the test part, and export it. Collective."""
        best = on_first(lambda: best_checkpoint(self.folder, whole=True))
        if best is not None:
            self.engine.load_weights(load_checkpoint(best)[1])
        metrics: dict[str, float] = {}
        evaluations: dict[str, Evaluation] = {}
        for prefix, parts in (("val", self.data.validation), ("test", self.data.test)):
            if parts:
                evaluations[prefix] = self.evaluate(parts, self.config.evaluate.pictures, retrieval=True)
                if prefix == "val":
                    evaluations[prefix] = self._calibrate(evaluations[prefix])
                metrics |= {f"{prefix}/{name}": value for name, value in evaluations[prefix].metrics.items()}
        weights = self.engine.weights()
        scored = evaluations.get("test") or evaluations.get("val")
        if is_first():
            export_model(self.folder, self.data.card, weights)
            write_scores(self.folder, metrics, scored.predictions if scored else [])
            if tracker:
                tracker.log_metrics({f"final/{name}": value for name, value in metrics.items()}, self.step)
        barrier()
        return Result(
            folder=self.folder,
            metrics=metrics,
            test=evaluations.get("test"),
            data=self.data,
            nltk_data=self.nltk_data,
        )

    def _calibrate(self, validation: Evaluation) -> Evaluation:
        """Fit the temperature of the class probabilities, from here on used wherever there are any."""
        card = self.data.card
        temperature = on_first(lambda: temperature_of(validation.predictions, card.classes))
        self.data = replace(self.data, card=replace(card, temperature=temperature))
        return recalibrated(validation, self.data.card)

    def prepare_folder(self) -> None:
        """Write the resolved configuration into the run's folder, and check it is the same network on a resume."""
        if is_first():
            if (self.folder / "model.json").exists() and load_card(self.folder).words != self.data.card.words:
                say(f"{self.folder}/model.json: from other data; it will be replaced at the end")
            write_config(self.folder, self.config)

    def close(self) -> None:
        """Free what the engine holds, and the run's folder; another Trainer may follow in this process."""
        self.engine.close()
        self._held.close()


def _fetch(batches: Iterator[Batch], pieces: int) -> tuple[list[Batch], InputError | None]:
    """This rank's micro-batches of a step, or what is wrong with its data: other ranks must hear of it first."""
    try:
        return [next(batches) for _ in range(pieces)], None
    except InputError as error:
        return [], error


def _dropout_seed(seed: int, step: int, place: int) -> int:
    """A seed for the dropout of one micro-batch: nothing to save, nothing to restore.

    Args:
        place: of its first image in the global batch, whichever rank has it.
    """
    return ((seed * 1_000_003 + step) * 1_000_003 + place) % 2**63


def _known(metrics: Mapping[str, float]) -> str:
    return "known: dca_bleu4, " + ", ".join(sorted(name.removeprefix("val/") for name in metrics))
