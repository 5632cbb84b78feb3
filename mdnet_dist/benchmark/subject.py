"""What is measured: a configuration with its data and batches in memory, on the device that training would use."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mdnet_dist.config import RunConfig
from mdnet_dist.config_file import load_config
from mdnet_dist.data import Batch
from mdnet_dist.distributed import local_device, prepare_environment
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.run_data import RunData, open_data

MICRO_BATCH_ON_CPU = 8
"""Of a configuration that is meant for GPUs: a step of more would take minutes."""


@dataclass(frozen=True)
class Subject:
    """A configuration as one rank of this machine trains it."""

    name: str  # of the configuration, for the table
    config: RunConfig
    short: bool  # fewer repetitions

    @cached_property
    def device(self) -> torch.device:
        """Of one rank here."""
        return local_device()

    @cached_property
    def data(self) -> RunData:
        """Opened at first use."""
        return open_data(self.config)

    @property
    def batch(self) -> int:
        """Images in a step."""
        return self.config.train.global_batch

    @cached_property
    def batches(self) -> list[Batch]:
        """The first few steps' batches as training reads them, in the device's memory."""
        return [batch.to(self.device) for batch in self.encoded_batches]

    @cached_property
    def encoded_batches(self) -> list[Batch]:
        """The same on the CPU."""
        one_process = self.config.model_copy(update={"data": self.config.data.model_copy(update={"workers": 0})})
        return list(itertools.islice(self.data.training_batches(one_process, 0, 4, pin_memory=False), 4))

    def network(self, seed: int = 0) -> MDNet:
        """A new network in training mode."""
        torch.manual_seed(seed)
        return self.data.card.build().to(self.device).train()

    def images_of(self, batch: Batch) -> torch.Tensor:
        """What the network is given, as `Trainer` makes it: normalised, channels last."""
        return self.data.card.normalise(batch.images)

    def changed(self, **sections: Mapping[str, object]) -> Subject:
        """With other values: changed(data={"reports_per_image": 5})."""
        update = {name: getattr(self.config, name).model_copy(update=values) for name, values in sections.items()}
        return replace(self, config=self.config.model_copy(update=update))


def open_subject(path: str, overrides: Sequence[str], *, short: bool) -> Subject:
    """Load a configuration for measuring.

    One step is one micro-batch: on a CPU at most `MICRO_BATCH_ON_CPU` images of 200 px and more, else
    `train.micro_batch`. On a CPU one loader process reads.

    Raises:
        InputError: as `load_config`.
    """
    prepare_environment()
    config = load_config(path, overrides)
    batch = config.train.micro_batch
    if local_device().type == "cpu" and config.data.image_size >= 200:
        batch = min(batch, MICRO_BATCH_ON_CPU)
    subject = Subject(config.name, config, short)
    workers = 1 if local_device().type == "cpu" else config.data.workers  # the cores compute
    return subject.changed(train={"micro_batch": batch, "global_batch": batch}, data={"workers": workers})
