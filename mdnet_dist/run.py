"""One training run from configuration to scores: trainer, tracker and pictures put together.

`launch/train.py` calls `run_training`, a trial of a search `run_trial`: the same without what is done only once, at the
end. There is no second way to train.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdnet_dist.config import GoogLeNetImageModel, RunConfig
from mdnet_dist.config_file import flatten
from mdnet_dist.console import say, table
from mdnet_dist.cost import as_flops, cost_of
from mdnet_dist.distributed import is_first, on_first, world_size
from mdnet_dist.errors import InputError, Preempted
from mdnet_dist.evaluation import Evaluation, Prediction, reliability_of
from mdnet_dist.explain_run import explain_best_and_worst
from mdnet_dist.export import load_model
from mdnet_dist.figures import draw_confusion_matrix, draw_reliability, draw_report, draw_training_curves
from mdnet_dist.metrics.localization import UNIFORM
from mdnet_dist.metrics.meteor import meteor_unavailable_reason
from mdnet_dist.metrics.reports import confusion_matrices, count_wordings, oracle_reports, people_score, score_reports
from mdnet_dist.predict import prepare_mask
from mdnet_dist.run_data import RunData
from mdnet_dist.run_folder import CONFIG, EXPLAINED, METRICS, PICTURES, PREDICTIONS, SERVED, file_name_of
from mdnet_dist.served_model import write_served_model
from mdnet_dist.tracking import Tracker, open_tracker, run_tags
from mdnet_dist.tracking_files import METRICS_NAME
from mdnet_dist.trainer import OnValidation, Result, Trainer

TABLE_ROWS = (
    "images", "dca", "label_accuracy", "macro_f1", "bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider",
    "loss_m", "loss_l", "ece", "recall_at_1", "recall_at_5", "recall_at_10", "energy/class_map", "energy/sentences",
    "pointing/class_map", "pointing/sentences",
)  # fmt: skip


def run_training(
    config: RunConfig,
    *,
    resume: bool = False,
    parent_run_id: str | None = None,
    on_validation: OnValidation | None = None,
    folder: Path | None = None,
) -> Result:
    """Train, score, export and log one run. Collective: every rank of the job calls it.

    Args:
        resume: continue from the run's last checkpoint.
        parent_run_id: MLflow run under which this one is shown.
        on_validation: told of each evaluation of the validation part; may end training.
        folder: of the run, already made; by default the newest of its name with `resume`, else a new one.

    Raises:
        InputError: something the user gave is wrong.
        TrainingFailed: the loss stayed non-finite.
        Preempted: a signal asked to stop; a checkpoint is written.
    """
    with _tracked_trainer(config, resume, parent_run_id, with_test=True, folder=folder) as (trainer, tracker):
        with trainer.watched():
            trainer.train(tracker, on_validation)
            result = trainer.finish(tracker)
        if is_first():
            _log_results(trainer, result, tracker)
    return result


def run_trial(
    config: RunConfig,
    *,
    resume: bool = False,
    parent_run_id: str | None = None,
    on_validation: OnValidation | None = None,
) -> None:
    """Train and log one run of many that are compared by their validation scores. Collective, as `run_training`.

    Test data is not read, and nothing is exported or drawn; `run_training` with `resume` does all that afterwards.

    Args, Raises: as `run_training`.
    """
    with _tracked_trainer(config, resume, parent_run_id, with_test=False) as (trainer, tracker), trainer.watched():
        trainer.train(tracker, on_validation)


@contextmanager
def _tracked_trainer(
    config: RunConfig, resume: bool, parent_run_id: str | None, *, with_test: bool, folder: Path | None = None
) -> Iterator[tuple[Trainer, Tracker | None]]:
    """A trainer, and on the first rank its tracker, which learns how it ended."""
    trainer = Trainer(config, resume=resume, with_test=with_test, folder=folder)
    tracker = _start_tracking(trainer, resume, parent_run_id)
    status: str = "FAILED"
    try:
        say(_opening(trainer))
        yield trainer, tracker
        status = "FINISHED"
    except (Preempted, KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if tracker:
            tracker.close(status)  # type: ignore[arg-type]
    trainer.close()


def _start_tracking(trainer: Trainer, resume: bool, parent_run_id: str | None) -> Tracker | None:
    """Open the tracker on the first rank; a store that refuses leaves no folder behind."""
    opened: list[Tracker] = []
    config = trainer.config

    def start() -> None:
        trainer.prepare_folder()
        opened.append(
            open_tracker(
                config.tracking,
                trainer.folder,
                trainer.folder.name,
                flatten(config),
                run_tags(world_size(), trainer.device.type),
                resume=resume,
                resume_step=trainer.step if resume else None,
                parent_run_id=parent_run_id,
            )
        )
        opened[0].log_artifact(trainer.folder / CONFIG)

    try:
        on_first(start)
    except InputError:
        if is_first() and not resume:
            shutil.rmtree(trainer.folder, ignore_errors=True)
        raise
    return opened[0] if opened else None


def _opening(trainer: Trainer) -> str:
    data, config = trainer.data, trainer.config
    cost = cost_of(data.card.build, config.data.image_size)
    lines = [
        f"run       {trainer.folder}",
        f"data      {data.manifest.name}: {data.samples} images to train on, {len(data.card.topics)} topics, "
        f"{len(data.card.classes)} classes, {len(data.card.words)} words",
        f"network   {cost.weights:,} weights, {as_flops(cost.flops)} an image, {_image_model(config)}",
        f"training  {trainer.steps} steps of {config.train.global_batch} images on {world_size()} "
        f"{trainer.device.type.upper()} rank{'s' if world_size() > 1 else ''}, ZeRO {config.train.zero_stage}, "
        f"{'bf16' if trainer.engine.bf16 else 'fp32'}",
    ]
    if left_over := data.samples % config.train.global_batch:
        lines.append(f"          {left_over} of the images sit out each epoch, others the next")
    if data.cuts_sentences():
        lines.append(f"          sentences longer than data.max_tokens {config.data.max_tokens} are cut")
    if not data.validation:
        lines.append("          no validation part: the last weights count as the best")
    return "\n".join(lines)


def _image_model(config: RunConfig) -> str:
    image = config.model.image
    if not isinstance(image, GoogLeNetImageModel):
        return f"concat_depth {image.concat_depth}"
    return f"GoogLeNet of width {image.width:g}, from {image.pretrained or 'scratch'}"


def _log_results(trainer: Trainer, result: Result, tracker: Tracker | None) -> None:
    """Pictures and files of a finished run, into its folder and into MLflow."""
    folder, card = result.folder, trainer.data.card
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    draw_training_curves(folder / METRICS_NAME, pictures / "training.png")
    written = [folder / METRICS, folder / PREDICTIONS, pictures]
    if result.test:
        draw_evaluation(result.test, trainer.data, pictures)
        if _explain(trainer, result.test):
            written.append(folder / EXPLAINED)
    write_served_model(folder, folder / SERVED)
    if tracker:
        for path in written:
            tracker.log_artifact(path)  # a folder with its name
        for path in (folder / SERVED).iterdir():
            tracker.log_artifact(path, "model")  # runs:/RUN_ID/model
        if not card.classes:
            tracker.log_tags({"classes": "none"})


def _explain(trainer: Trainer, test: Evaluation) -> list[str]:
    """Pages on the best and the worst few images of the test part, by the exported model: other ranks have gone.

    They read the shards once more: what fails now is told, for the run itself is finished, scored and exported.
    """
    config, folder = trainer.config, trainer.folder
    network, card = load_model(folder, trainer.device)
    try:
        return explain_best_and_worst(
            network,
            card,
            test.predictions,
            config.data,
            trainer.data.test,
            folder / EXPLAINED,
            f"Best and worst of {folder.name}, test",
            count=config.evaluate.pictures,
            device=trainer.device,
            beam_width=config.evaluate.beam_width,
        )
    except InputError as error:
        say(f"no pages on single images: {error}; `launch/explain.py` makes them later")
        return []


def draw_evaluation(evaluation: Evaluation, data: RunData, folder: Path) -> None:
    """Confusion matrices, and the kept reports with their attention."""
    images = [prediction.scored() for prediction in evaluation.predictions]
    if any(image.label for image in images):
        for name, counts in confusion_matrices(images, data.card.conclusions, data.card.classes).items():
            if counts[:, :-1].any():
                draw_confusion_matrix(counts, data.card.classes, folder / f"confusion_{name}.png")
    if found := reliability_of(evaluation.predictions):
        draw_reliability(found, folder / "reliability.png")
    taken: set[str] = set()
    for shown in evaluation.explained:
        draw_report(
            shown.image,
            shown.answer.words,
            shown.answer.attention,
            shown.prediction.probabilities,
            shown.answer.class_maps.get(str(shown.prediction.predicted_label)),
            shown.prediction.label,
            shown.prediction.references,
            prepare_mask(data.card, shown.mask, shown.prediction.key),
            path=folder / f"report_{file_name_of(shown.prediction.key, taken)}.png",
        )


def score_table(result: Result) -> str:
    """The test scores beside those of people, and of an oracle where the true grades are known. First rank only."""
    if result.test is None:
        return "the shard set has no test part: nothing to score"
    predictions, data, nltk_data = result.test.predictions, result.data, result.nltk_data
    columns: dict[str, dict[str, float] | None] = {
        "this run": result.test.metrics,
        "people": yardstick_people(predictions, data, nltk_data),
        "oracle": yardstick_oracle(predictions, data, nltk_data),
        "chance": chance_scores(result.test.metrics),
    }
    scores = table(TABLE_ROWS, columns)
    if data.card.topics and (reason := meteor_unavailable_reason()):
        scores += f"\n{reason}"
    return scores


def chance_scores(metrics: dict[str, float]) -> dict[str, float]:
    """What a random order of the images, and a map that looks nowhere, score: {metric: value} where it is known."""
    chance = {}
    for name in metrics:
        kind, _, of = name.partition("/")
        known = f"{kind}_chance" if kind.startswith("recall_at") and not of else f"{kind}/{UNIFORM}"
        if known in metrics and known != name:
            chance[name] = metrics[known]
    return chance


def yardstick_people(predictions: list[Prediction], data: RunData, nltk_data: Path) -> dict[str, float] | None:
    """What people score: each image's first report against its others."""
    card = data.card
    images = [prediction.told() for prediction in predictions]
    return people_score(images, card.topics_read, card.conclusions, card.classes, nltk_data)


def yardstick_oracle(predictions: list[Prediction], data: RunData, nltk_data: Path) -> dict[str, float] | None:
    """What one scores who knows all true grades and says each in its most frequent wording of training."""
    grades = {prediction.key: prediction.grades for prediction in predictions if prediction.grades}
    if not grades:
        return None
    card = data.card
    wordings = count_wordings((record.grades, record.reports) for record in data.training_records())
    if not wordings:  # a set to evaluate on, without a part to train on
        return None
    told = oracle_reports([prediction.told() for prediction in predictions], grades, wordings)
    return score_reports(told, card.topics_read, card.conclusions, card.classes, nltk_data)
