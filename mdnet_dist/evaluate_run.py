"""Scoring a saved network on any shard set, and what is written of it: `launch/evaluate.py`.

OUT/metrics.json         all scores under PART/NAME, beside those of other parts that were scored before
OUT/predictions.jsonl    one line an image
OUT/confusion.json       counts, true class by predicted class, of classifier and conclusion sentence
OUT/calibration.json     the reliability diagram in numbers
OUT/pictures/            confusion matrices, reliability diagram
OUT/explained/           a page on each of the best and the worst few images, and an index (`mdnet_dist.explain`)
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mdnet_dist.console import say
from mdnet_dist.distributed import computes_in_bf16, is_first, on_first, world_size
from mdnet_dist.engine import start_processes
from mdnet_dist.errors import InputError
from mdnet_dist.evaluation import Evaluation, evaluate, reliability_of
from mdnet_dist.explain_run import explain_best_and_worst
from mdnet_dist.metrics.reports import confusion_matrices
from mdnet_dist.run import draw_evaluation
from mdnet_dist.run_data import RunData, open_part
from mdnet_dist.run_folder import EXPLAINED, METRICS, PICTURES, PREDICTIONS, refuse_links, write_scores
from mdnet_dist.saved import open_model, saved_config
from mdnet_dist.shards import write_atomically
from mdnet_dist.storage import last_name
from mdnet_dist.tracking import reopen_tracker
from mdnet_dist.tracking_files import METRICS_NAME, read_metrics
from mdnet_dist.trainer import Result

CONFUSION, CALIBRATION, EVALUATIONS = "confusion.json", "calibration.json", "evaluations"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `launch/evaluate.py` was asked for."""

    run: Path
    part: str = "test"
    shards: str | None = None  # instead of the run's own
    checkpoint: str | None = None  # instead of the exported model
    beam_width: int | None = None  # instead of the configuration's
    out: Path | None = None  # instead of `default_out`

    @property
    def name(self) -> str:
        """Of this evaluation among others of the run: test, val-last, test-nuclei_he-beam3."""
        pieces = [self.part, last_name(self.shards) if self.shards else None]
        pieces += [Path(self.checkpoint).name if self.checkpoint else None]
        pieces += [f"beam{self.beam_width}" if self.beam_width else None]
        return re.sub(r"[^\w.-]", "_", "-".join(piece for piece in pieces if piece))

    @property
    def default_out(self) -> Path:
        """The run's folder where this asks for what training itself reports at its end, else a folder below it."""
        return self.run if self.name == "test" else self.run / EVALUATIONS / self.name


def evaluate_run(request: Request) -> Result:
    """Score a saved network, write and log the scores. Collective: every rank of the job calls it.

    All numbers are the same for any number of ranks: the batches are, and whoever computes one computes all of it.

    Raises:
        InputError: something the user gave is wrong.
    """
    device = start_processes()
    network, card, step = open_model(request.run, request.checkpoint, device)
    config = saved_config(request.run, card, request.shards)
    data, parts = open_part(config, card, request.part)
    out = request.out or request.default_out
    beam_width = request.beam_width or config.evaluate.beam_width
    nltk_data = Path(config.runs_folder) / "nltk_data"
    on_first(lambda: _make(out, request.out or request.run))
    images = sum(data.manifest.parts[part].samples for part in parts)
    weights = "exported model" if step is None else f"checkpoint of step {step}"
    say(
        f"{request.run}, {weights}: {images} images of {data.manifest.name}, {request.part}, "
        f"on {world_size()} {device.type.upper()} rank{'s' if world_size() > 1 else ''}"
    )
    bf16 = computes_in_bf16(config.train.precision, device)  # the arithmetic that training validates with
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        evaluation = evaluate(
            network,
            card,
            data.evaluation_batches(config, parts, device.type == "cuda"),
            device=device,
            beam_width=beam_width,
            nltk_data=nltk_data,
            queries=data.queries(parts),
            most_damaged=config.data.most_damaged,
        )
    metrics = {f"{request.part}/{name}": value for name, value in evaluation.metrics.items()}
    if is_first():
        written = _write(out, request.part, metrics, evaluation, data)
        if explain_best_and_worst(
            network,
            card,
            evaluation.predictions,
            config.data,
            parts,
            out / EXPLAINED,
            f"Best and worst of {request.run.resolve().name}, {request.part}",
            count=config.evaluate.pictures,
            device=device,
            beam_width=beam_width,
        ):
            written.append(out / EXPLAINED)
        _log(request, metrics, step, written)
    return Result(folder=out, metrics=metrics, test=evaluation, data=data, nltk_data=nltk_data)


def _make(out: Path, base: Path) -> None:
    for folder in (out / PICTURES, out / EXPLAINED):
        refuse_links(folder, base)
    try:
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another folder with --out") from error


def _write(out: Path, part: str, metrics: dict[str, float], evaluation: Evaluation, data: RunData) -> list[Path]:
    """All files of an evaluation; returns their paths."""
    before = _other_parts(out / METRICS, part)
    write_scores(out, before | metrics, evaluation.predictions)
    written = [out / METRICS, out / PREDICTIONS]
    scored = [prediction.scored() for prediction in evaluation.predictions]
    if any(image.label for image in scored):
        matrices = confusion_matrices(scored, data.card.conclusions, data.card.classes)
        counts = {name: matrix.tolist() for name, matrix in matrices.items()}
        columns = [*data.card.classes, "no class"]
        written.append(_write_json(out / CONFUSION, {"rows": data.card.classes, "columns": columns, **counts}))
    if found := reliability_of(evaluation.predictions):
        shown = {"temperature": data.card.temperature, "ece": found.error, **asdict(found)}
        written.append(_write_json(out / CALIBRATION, shown))
    draw_evaluation(evaluation, data, out / PICTURES)
    return [*written, out / PICTURES]


def _write_json(path: Path, content: Any) -> Path:
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def _other_parts(path: Path, part: str) -> dict[str, float]:
    """What a metrics.json says of other parts than this one."""
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(value) for name, value in known.items() if not name.startswith(f"{part}/")}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, or choose another folder with --out") from error


def _log(request: Request, metrics: dict[str, float], step: int | None, written: list[Path]) -> None:
    """Into the MLflow entry of the run, under the names that training's own last evaluation has."""
    if not os.access(request.run, os.W_OK):
        say(f"{request.run}: cannot be written, so that MLflow is not told")
        return
    tracker = reopen_tracker(request.run)
    if tracker is None:
        return
    if step is None:  # of the exported model, which training logs at its last step
        step = max((entry["step"] for entry in read_metrics(request.run / METRICS_NAME)), default=0)
    prefix = f"final/{request.name}"
    tracker.log_metrics({f"{prefix}/{name.partition('/')[2]}": value for name, value in metrics.items()}, step)
    for path in written:
        tracker.log_artifact(path, f"{EVALUATIONS}/{request.name}")  # a folder keeps its name there
    tracker.close("FINISHED")
