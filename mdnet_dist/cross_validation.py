"""Cross-validation: which folds of which models there are, what is done, and the table at the end.

RUNS/NAME-cv/config.yaml          the configuration that all models share
RUNS/NAME-cv/MODEL/config.yaml    a model's: that, with its overlay laid over it
RUNS/NAME-cv/MODEL/foldK/         a run (`mdnet_dist.run_folder`), tested on fold K
RUNS/NAME-cv/MODEL/foldK.log      what it printed
RUNS/NAME-cv/table.md, table.png, results.json

Nothing here starts a process: `launch/cross_validate.py` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdnet_dist.config import RunConfig
from mdnet_dist.config_file import as_yaml, flatten, load_config
from mdnet_dist.data import parts_of
from mdnet_dist.errors import InputError
from mdnet_dist.export import load_card
from mdnet_dist.plan import steps_per_epoch
from mdnet_dist.run_folder import CONFIG, METRICS
from mdnet_dist.shards import ShardManifest, write_atomically
from mdnet_dist.storage import place_of_set

FIRST_MODEL = "mdnet"
TABLE, FIGURE, RESULTS = "table.md", "table.png", "results.json"
SCORES = (
    ("bleu1", "BLEU-1", 100),
    ("bleu2", "BLEU-2", 100),
    ("bleu3", "BLEU-3", 100),
    ("bleu4", "BLEU-4", 100),
    ("meteor", "METEOR (NLTK)", 100),
    ("rouge_l", "ROUGE-L", 100),
    ("cider", "CIDEr-D", 1),
    ("dca", "DCA", 100),
    ("label_accuracy", "label accuracy", 100),
)
"""Metric, heading, factor: percentages but CIDEr, as papers print them."""
MAPS = (
    ("energy/sentences", "energy inside, sentences", 100),
    ("energy/class_map", "energy inside, class map", 100),
    ("energy/uniform", "energy inside, even map", 100),
    ("pointing/sentences", "pointing game, sentences", 100),
    ("entropy/sentences", "entropy, sentences", 100),
)
"""The same for the maps of sets with annotations."""
NOT_RANKED = ("energy inside, even map", "entropy, sentences")
"""What is not the better for being higher."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row of the table."""

    name: str
    overlay: str | None  # YAML file laid over the shared configuration
    config: RunConfig  # without a fold


@dataclass(frozen=True, kw_only=True)
class FoldRun:
    """One fold of one model."""

    model: Model
    fold: int
    folder: Path  # of its run

    @property
    def name(self) -> str:
        """As people read it."""
        return f"{self.model.name} fold {self.fold}"

    @property
    def config(self) -> RunConfig:
        """What it is trained with."""
        config = self.model.config
        data = config.data.model_copy(update={"fold": self.fold})
        place = {"runs_folder": str(self.folder.parent), "name": self.folder.name}
        return config.model_copy(update={"data": data, **place})

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder.with_suffix(".log")


def plan_models(config: str, overrides: Sequence[str], baselines: Sequence[str], baselines_folder: Path) -> list[Model]:
    """MDNet itself, and each baseline: the same configuration with an overlay.

    Args:
        config, overrides: as `load_config` takes them.
        baselines: names of files in `baselines_folder`, or paths.

    Raises:
        InputError: no such baseline, one named twice, or whatever is wrong with the configuration.
    """
    models = [Model(name=FIRST_MODEL, overlay=None, config=load_config(config, overrides))]
    for baseline in baselines:
        path = Path(baseline)
        if path.suffix not in (".yaml", ".yml"):
            path = baselines_folder / f"{baseline}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in baselines_folder.glob("*.yaml"))) or "none"
            raise InputError(f"--baselines {baseline}: no such file {path}; known: {known}, or give the path of a YAML")
        if any(model.name == path.stem for model in models):
            raise InputError(f"--baselines {baseline}: '{path.stem}' is there already; give each once")
        models.append(Model(name=path.stem, overlay=str(path), config=load_config(config, [*overrides, str(path)])))
    return models


def plan_folds(
    models: Sequence[Model], manifest: ShardManifest, folds: Sequence[int] | None, folder: Path
) -> list[FoldRun]:
    """All runs, fold by fold, so that models can be compared early.

    Raises:
        InputError: a set without folds, or a fold that it does not have.
    """
    if not manifest.folds:
        raise InputError(
            f"{place_of_set(models[0].config.data)}: dealt into {', '.join(manifest.parts)}, not into folds; "
            "write it again with `python -m data_shards synth|import ... --folds 5`"
        )
    chosen = list(range(manifest.folds)) if folds is None else list(dict.fromkeys(folds))
    for fold in chosen:
        parts_of(manifest, fold)
    return [
        FoldRun(model=model, fold=fold, folder=folder / model.name / f"fold{fold}")
        for fold in chosen
        for model in models
    ]


def scores_of(folder: Path) -> dict[str, float] | None:
    """The test scores of a run that has ended, without their prefix; None where it has not.

    Raises:
        InputError: its metrics.json is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        scores = {name.removeprefix("test/"): float(v) for name, v in metrics.items() if name.startswith("test/")}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete {folder} to train this fold again") from error
    return scores or None


def prepare_folder(folder: Path, models: Sequence[Model], runs: Sequence[FoldRun] = ()) -> None:
    """Write the configurations, or compare them with those of the folder that is gone on with.

    Raises:
        InputError: the folder holds another cross-validation, or cannot be written.
    """
    for model in models:
        path = folder / model.name / CONFIG
        if path.exists():
            _check_same(path, model.config)
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path.parent}: {error.strerror}; runs_folder must be a folder to write in") from error
        write_atomically(path, as_yaml(model.config))
    for run in runs:
        if (run.folder / CONFIG).exists():
            _check_same(run.folder / CONFIG, run.config)
    write_atomically(folder / CONFIG, as_yaml(models[0].config))


def _check_same(path: Path, config: RunConfig) -> None:
    before, now = flatten(load_config(path)), flatten(config)
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise InputError(
                f"{path}: {key} was {before.get(key)} there and is {now.get(key)} now; go on with the same "
                "configuration, or give another name=..."
            )


def arguments_of(run: FoldRun, config: str, overrides: Sequence[str], parent_run_id: str | None) -> list[str]:
    """What `deepspeed` is given to train this fold, or to go on with it."""
    overlay = [run.model.overlay] if run.model.overlay else []
    program = os.path.relpath(Path(__file__).resolve().parent.parent / "launch" / "train.py")
    arguments = [program, config, *overrides, *overlay, f"data.fold={run.fold}"]
    arguments += [f"runs_folder={run.folder.parent}", f"name={run.folder.name}"]
    arguments += ["--parent-run", parent_run_id] if parent_run_id else []
    return [*arguments, *(["--resume"] if run.folder.exists() else [])]


def images_seen(config: RunConfig, manifest: ShardManifest, fold: int) -> int:
    """Images that training takes in, each as often as it comes."""
    samples = sum(manifest.parts[part].samples for part in parts_of(manifest, fold)[0])
    return config.train.epochs * steps_per_epoch(samples, config.train.global_batch) * config.train.global_batch


def parameters_of(folder: Path) -> int:
    """Trainable weights of a run's network."""
    return sum(weight.numel() for weight in load_card(folder).build().parameters())


# -------------------------------------------------------------------------------------------------------- the table


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); of one value the latter is not a number."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def results_of(runs: Iterable[FoldRun], manifest: ShardManifest) -> dict[str, Any]:
    """{model: {"parameters", "images_seen" (mean over folds), "folds": {K: test scores}}}, of runs that have ended.

    Models in the order in which `runs` first names them, whichever has ended first.
    """
    runs = list(runs)
    results: dict[str, Any] = {}
    for model in dict.fromkeys(run.model.name for run in runs):
        results |= _results_of_one([run for run in runs if run.model.name == model], manifest)
    return results


def _results_of_one(runs: Sequence[FoldRun], manifest: ShardManifest) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for run in runs:
        if (scores := scores_of(run.folder)) is None:
            continue
        row = results.setdefault(run.model.name, {"parameters": parameters_of(run.folder), "folds": {}})
        row["folds"][str(run.fold)] = scores
        row.setdefault("images", []).append(images_seen(run.model.config, manifest, run.fold))
    for row in results.values():
        row["images_seen"] = round(float(np.mean(row.pop("images"))))
    return results


def values_of(results: Mapping[str, Any], metric: str, factor: float = 1) -> dict[str, list[float]]:
    """{model: the metric of each fold that has it, times `factor`}."""
    found = {
        model: [scores[metric] * factor for scores in row["folds"].values() if metric in scores]
        for model, row in results.items()
    }
    return {model: values for model, values in found.items() if values}


def as_markdown(results: Mapping[str, Any], metrics: Sequence[tuple[str, str, float]]) -> str:
    """Rows models, columns metrics, each `mean ± std`; the best mean in bold. What no model has is left out."""
    columns = [(heading, values_of(results, name, factor)) for name, heading, factor in metrics]
    columns = [(heading, values) for heading, values in columns if values]
    lines = ["| model | folds | weights | images seen | " + " | ".join(heading for heading, _ in columns) + " |"]
    lines += ["| --- |" + " ---: |" * (3 + len(columns))]
    for model, row in results.items():
        cells = [f"{len(row['folds'])}", f"{row['parameters']:,}", f"{row['images_seen']:,}"]
        for heading, values in columns:
            if model not in values:
                cells.append("")
                continue
            mean, std = mean_and_std(values[model])
            best = max(mean_and_std(others)[0] for others in values.values())
            mark = "**" if mean == best and len(values) > 1 and heading not in NOT_RANKED else ""
            cells.append(f"{mark}{mean:.2f}{mark} ± {std:.2f}" if std == std else f"{mark}{mean:.2f}{mark}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table_text(results: Mapping[str, Any], title: str) -> str:
    """The whole of table.md."""
    text = f"# {title}\n\n{as_markdown(results, SCORES)}\n"
    text += "Test folds, mean ± sample standard deviation over folds; percentages but CIDEr-D. The best mean is bold.\n"
    if any(values_of(results, name) for name, _, _ in MAPS):
        text += f"\nWhere the network looked, against the annotations:\n\n{as_markdown(results, MAPS)}"
    return text


def summary_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """{"MODEL/dca_mean", "MODEL/dca_std", ...} as fractions, for MLflow."""
    summary = {}
    for name, _, _ in (*SCORES, *MAPS):
        for model, values in values_of(results, name).items():
            mean, std = mean_and_std(values)
            summary[f"{model}/{name}_mean"] = mean
            if std == std:
                summary[f"{model}/{name}_std"] = std
    return summary
