"""A run's folder with an untrained network: all that evaluating, predicting and explaining need, in a second."""

from __future__ import annotations

from pathlib import Path

import torch

from mdnet_dist.checkpoint import Progress, save_checkpoint
from mdnet_dist.config import RunConfig
from mdnet_dist.export import ModelCard, export_model
from mdnet_dist.run_data import open_data
from mdnet_dist.run_folder import write_config


def progress_at(step: int, score: float | None = None) -> Progress:
    """Where a run stands after so many steps, nothing being left to do for them."""
    return Progress(
        step=step,
        updates=step,
        bad_steps=0,
        eta_norms=[0.0, 0.0],
        epoch_end_due=False,
        sequence={},
        score=score,
        best_score=score,
    )


def untrained_run(config: RunConfig, seed: int = 0) -> tuple[Path, ModelCard]:
    """Write a run folder as training leaves it, with random weights: export, and checkpoints of steps 3 and 6.

    The checkpoint of step 6 is the better one and holds the exported weights.
    """
    folder = Path(config.runs_folder) / config.name
    folder.mkdir(parents=True)
    card = open_data(config).card
    write_config(folder, config)
    for step, score in ((3, 0.1), (6, 0.9)):
        torch.manual_seed(seed + step)
        weights = card.build().state_dict()
        weights["class_maps.weight"] *= 20  # else all classes are as probable for every image
        save_checkpoint(folder, progress_at(step, score), weights, {})
    export_model(folder, card, weights)
    return folder, card
