"""A saved network found again: a run's exported model, or one of its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError

from mdnet_dist.checkpoint import best_checkpoint, checkpoints, load_checkpoint
from mdnet_dist.config import DataConfig, RunConfig
from mdnet_dist.config_check import first_problem
from mdnet_dist.config_file import check_config, load_config
from mdnet_dist.errors import InputError
from mdnet_dist.export import CARD, ModelCard, load_card, load_model
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.run_data import open_data
from mdnet_dist.run_folder import CONFIG


def open_model(
    folder: Path, checkpoint: str | None = None, device: torch.device | str = "cpu"
) -> tuple[MDNet, ModelCard, int | None]:
    """The network of a run, in evaluation mode, its card, and the training step it is from where that is known.

    Args:
        folder: of a run, or with an exported model alone.
        checkpoint: None for the exported model; "best", "last", the name of one of the run's checkpoints, or the path
            of any checkpoint of the same network.

    Raises:
        InputError: no such model or checkpoint, or it does not fit the run's card or data.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run's, runs/NAME")
    if checkpoint is None:
        if not (folder / CARD).exists() and checkpoints(folder):
            raise InputError(
                f"{folder}: this run has exported no model yet; --checkpoint last takes its newest weights"
            )
        return *load_model(folder, device), None
    path = find_checkpoint(folder, checkpoint)
    # A run that is not finished has no card: what it would hold follows from configuration and shards.
    card = load_card(folder) if (folder / CARD).exists() else open_data(load_config(folder / CONFIG)).card
    if path != best_checkpoint(folder):
        card = replace(card, temperature=1.0)  # it was fitted to the best weights
    progress, weights, _ = load_checkpoint(path)
    network = card.build()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: does not fit the network of {folder} ({reason:.200})") from error
    return network.to(device).eval(), card, progress.step


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint folder that `--checkpoint` names.

    Raises:
        InputError: there is none.
    """
    found = checkpoints(folder)
    known = ", ".join(["best", "last", *(path.name for path in found)]) if found else "none, this run has no checkpoint"
    if name in ("best", "last") and found:
        return found[-1] if name == "last" else best_checkpoint(folder) or found[-1]
    for path in found:
        if path.name == name:
            return path
    path = Path(name)
    if path.is_dir() and path.name.startswith("step-"):
        return path
    raise InputError(f"--checkpoint {name}: not a checkpoint; known: {known}")


def saved_config(folder: Path, card: ModelCard, shards: str | None = None) -> RunConfig:
    """The configuration of a run, or a default one around an exported model that lies alone.

    Args:
        folder: of the run.
        shards: folder of the shard set to read instead of the one that the run was trained on.

    Raises:
        InputError: there is no configuration and no shard set is given, or the configuration or the address is wrong.
    """
    path = folder / CONFIG
    if path.exists():
        config = load_config(path)
        if shards is None:
            return config
        try:
            data = DataConfig.model_validate({**config.data.model_dump(), "shards": shards})
        except ValidationError as error:
            raise InputError(first_problem(error)) from None
        return config.model_copy(update={"data": data})
    if shards is None:
        raise InputError(f"{path}: no such file, so it is not known what to evaluate on; give --shards DIR")
    return check_config({"name": "model", "data": {**card.data, "shards": shards}, "model": card.model}, str(folder))
