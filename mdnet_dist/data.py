"""From shards to batches.

Reading is a chain of small generators: the planned order of sample numbers -> encoded samples, each shard read from
front to back (`mdnet_dist.reading`) -> decoded and augmented examples -> micro-batches. What to read when is decided in
`mdnet_dist.plan`; nothing here is random but the augmentation and the choice of reports, which follow from (seed,
epoch, sample) alone.

Shapes: B images, R reports, K topics, T tokens, S px the side of an image.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mdnet_dist.augment import augment, draw
from mdnet_dist.config import AugmentConfig, DataConfig
from mdnet_dist.errors import InputError, LoaderLost
from mdnet_dist.images import decode_image, decode_mask, fit_picture
from mdnet_dist.model.mdnet import NO_LABEL
from mdnet_dist.plan import epoch_order, evaluation_batches, micro_batches, reading_horizon, steps_per_epoch
from mdnet_dist.reading import Damaged, RawSample, Skipping, read_in_order
from mdnet_dist.sentences import as_one_sentence
from mdnet_dist.shards import PartStatistics, Report, SampleRecord, ShardManifest
from mdnet_dist.signals import ignore_in_worker
from mdnet_dist.storage import open_source
from mdnet_dist.vocabulary import PAD, Vocabulary, tokenize


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch. Tensors are on the CPU until `to` moves them."""

    keys: list[str]
    records: list[SampleRecord]
    images: Tensor  # (B, 3, S, S) uint8, channels last in memory
    labels: Tensor  # (B) class numbers, NO_LABEL where there is none
    tokens: Tensor  # (B, R, K, T) words, END behind the last, PAD after it
    lengths: Tensor  # (B, R, K) real tokens, END included; stays on the CPU
    masks: list[bytes | None]  # PNG files, as stored
    damaged: list[str] = field(default_factory=list)  # what is wrong with each image that was left out

    def to(self, device: torch.device) -> Batch:
        """Start copying to a device; `lengths` stays where it is needed."""
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "labels", "tokens")}
        return replace(self, **move)

    def __reduce__(self) -> tuple[Any, ...]:
        """How a loader process hands a batch over: all in one piece of shared memory.

        For each such piece the receiver asks the sender, and for a message that a pipe does not hold at once it waits
        for the sender, who is busy with the next batch: a few milliseconds each.
        """
        others = {name: getattr(self, name) for name in ("keys", "records", "masks", "damaged")}
        numbers = {name: getattr(self, name).numpy() for name in ("labels", "tokens", "lengths")}
        pixels = self.images.permute(0, 2, 3, 1).flatten()
        rest = torch.frombuffer(bytearray(pickle.dumps((others, numbers), protocol=5)), dtype=torch.uint8)
        return _received, (torch.cat([pixels, rest]), self.images.shape)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that copies to a GPU need not wait."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in ("images", "labels", "tokens")})


def _received(together: Tensor, shape: torch.Size) -> Batch:
    """What `Batch.__reduce__` put together; it comes from a process of this one's, like every item of a DataLoader."""
    B, _, S, _ = shape
    others, numbers = pickle.loads(together[shape.numel() :].numpy().tobytes())  # noqa: S301
    fields: dict[str, Any] = {**others, **{name: torch.from_numpy(values) for name, values in numbers.items()}}
    return Batch(images=together[: shape.numel()].view(B, S, S, 3).permute(0, 3, 1, 2), **fields)


# ------------------------------------------------------------------------------------------------ decoded examples


MOST_KNOWN_SENTENCES = 1 << 14
"""Whose numbers an `Encoder` keeps: of a million words or less."""


class Encoder:
    """Turns encoded samples into arrays, as a run's configuration and vocabulary say."""

    def __init__(
        self, config: DataConfig, topics: Sequence[str], classes: Sequence[str], vocabulary: Vocabulary
    ) -> None:
        """Args: topics: of people's reports, in the order in which the network says them."""
        self.config = config
        self.topics = list(topics)
        self.class_numbers = {name: number for number, name in enumerate(classes)}
        self.vocabulary = vocabulary
        self._known: dict[str, list[int]] = {}

    def picture(self, raw: bytes, where: str) -> Image.Image:
        """Decode and fit to the square that the network sees, RGB."""
        return fit_picture(decode_image(raw, where), self.config.image_size, self.config.fit)

    def image(self, raw: bytes, where: str) -> np.ndarray:
        """The same as an array (S, S, 3) uint8."""
        return np.asarray(self.picture(raw, where))

    def sentence(self, text: str) -> list[int]:
        """Numbers of a sentence's tokens, END behind them; cut to the configured length. The list is not to change."""
        numbers = self._known.get(text)
        if numbers is None:
            numbers = self.vocabulary.encode(tokenize(text))[: self.config.max_tokens]
            if len(self._known) == MOST_KNOWN_SENTENCES:
                self._known.clear()
            self._known[text] = numbers
        return numbers

    def sentences(self, report: Report) -> list[list[int]]:
        """Each sentence that the network says of a report, by topic or all in one; empty where the report has none."""
        if self.config.sentences == "report" and self.topics:
            said = as_one_sentence(report, self.topics)
            return [self.sentence(said) if said else []]
        return [self.sentence(report[topic]) if topic in report else [] for topic in self.topics]

    def label(self, record: SampleRecord, where: str) -> int:
        """The class number of a sample.

        Raises:
            InputError: a class that the manifest does not name.
        """
        if record.label is None:
            return NO_LABEL
        if record.label not in self.class_numbers:
            raise InputError(f"{where}: label '{record.label}' is not a class of the manifest")
        return self.class_numbers[record.label]

    def collate(
        self,
        samples: Sequence[RawSample],
        images: np.ndarray,
        reports: Sequence[list[Report]],
        damaged: Sequence[str] = (),
    ) -> Batch:
        """Put examples together, or none.

        Args:
            images: (B, S, S, 3) uint8.
            reports: of each image, the chosen {topic: sentence}.
        """
        encoded = [[self.sentences(report) for report in chosen] for chosen in reports]
        nothing = self.sentences({})
        B, R, K = len(samples), max([1, *map(len, encoded)]), len(nothing)
        padded = [[*chosen, *[nothing] * (R - len(chosen))] for chosen in encoded]
        lengths = np.array([[list(map(len, report)) for report in chosen] for chosen in padded], dtype=np.int64)
        lengths = lengths.reshape(B, R, K)
        tokens = np.full((B, R, K, max(1, lengths.max(initial=0))), PAD, dtype=np.int64)
        said = chain.from_iterable(chain.from_iterable(chain.from_iterable(padded)))
        tokens[np.arange(tokens.shape[-1]) < lengths[..., None]] = list(said)
        return Batch(
            keys=[sample.key for sample in samples],
            records=[sample.record for sample in samples],
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            labels=torch.tensor([self.label(sample.record, sample.where) for sample in samples], dtype=torch.long),
            tokens=torch.from_numpy(tokens),
            lengths=torch.from_numpy(lengths),
            masks=[sample.mask for sample in samples],
            damaged=list(damaged),
        )

    def room(self, samples: int) -> np.ndarray:
        """Memory for the images of a batch: (samples, S, S, 3) uint8, of no value yet."""
        return np.empty((samples, self.config.image_size, self.config.image_size, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------- damage


def skipping_of(config: DataConfig, left_out: Mapping[str, str] | None = None) -> Skipping | None:
    """What `data.damaged` says: nothing is left out, or `Skipping`. Args: left_out: as for `Skipping`."""
    return Skipping(left_out) if config.damaged == "skip" else None


def decoded(
    encoder: Encoder, sample: RawSample | Damaged, skipping: Skipping | None, *, with_mask: bool
) -> tuple[RawSample, Image.Image] | Damaged:
    """A sample and its picture, a square in RGB, or what is wrong with it.

    Raises:
        InputError: without `skipping`, instead of `Damaged`.
    """
    if isinstance(sample, Damaged):
        return sample
    try:
        image = encoder.picture(sample.image, sample.where)
        encoder.label(sample.record, sample.where)
        if with_mask and sample.mask is not None:
            decode_mask(sample.mask, sample.where)
    except InputError as error:
        if skipping is None:
            raise
        return Damaged(number=sample.number, message=str(error))
    return sample, image


_NO_SAMPLE = SampleRecord(patient="", label=None, reports=[])


def _blank(damaged: Damaged) -> RawSample:
    """What takes the place of a damaged sample in training: without key, label, reports and mask it adds to no loss."""
    return RawSample(number=damaged.number, key="", image=b"", record=_NO_SAMPLE, mask=None, where="")


# --------------------------------------------------------------------------------------------------------- batches


BYTES_A_PIXEL = 4
"""That Pillow takes for RGB."""


class TrainingStream(IterableDataset):
    """This rank's micro-batches from step `first_step` to the end of training, epoch after epoch.

    Worker w of W yields the micro-batches w, w + W, ...; the DataLoader asks its workers in turn, so the order is the
    same for any W.
    """

    def __init__(
        self,
        encoder: Encoder,
        augmentation: AugmentConfig,
        manifest: ShardManifest,
        parts: Sequence[str],
        *,
        global_batch: int,
        micro_batch: int,
        seed: int,
        first_step: int,
        steps: int,
        ranks: int,
        rank: int,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        """Args: first_step, steps: of the whole training; its epochs follow from them; left_out: as for `Skipping`."""
        super().__init__()
        self.encoder, self.augmentation = encoder, augmentation
        self.source, self.shards = open_source(encoder.config), manifest.shards_of(parts)
        self.skipping = skipping_of(encoder.config, left_out)
        # The mean colour: normalised it is 0, as what convolutions see beyond the border, so that of all pictures it
        # shifts the statistics of a batch least. They see it: batch normalisation is all that a blank has a part in.
        mean, _ = image_statistics([manifest.parts[part] for part in parts])
        size = encoder.config.image_size
        self.blank = np.tile(np.rint(np.array(mean) * 255).astype(np.uint8), (size, size, 1))
        self.global_batch, self.seed = global_batch, seed
        self.pieces = micro_batches(global_batch, micro_batch, ranks, rank)
        self.first_step, self.steps, self.ranks = first_step, steps, ranks
        self.samples = sum(shard.samples for shard in self.shards)
        self.steps_per_epoch = steps_per_epoch(self.samples, global_batch)
        self._kept: dict[int, Image.Image] = {}  # squares by sample number; each loader process has its own
        self._most_kept = (encoder.config.decoded_cache_mib << 20) // (BYTES_A_PIXEL * encoder.config.image_size**2)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        horizon = reading_horizon(self.global_batch, self.encoder.config.shuffle_window, self.ranks * workers)
        step, micro_batch_number = self.first_step, 0
        while step < self.steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            order = epoch_order(
                [shard.samples for shard in self.shards],
                seed=self.seed,
                epoch=epoch,
                global_batch=self.global_batch,
                window=self.encoder.config.shuffle_window,
            )[position : position + self.steps - step]
            mine = []
            for numbers in order:
                for piece in self.pieces:
                    if micro_batch_number % workers == worker:
                        mine.append(numbers[piece])
                    micro_batch_number += 1
            yield from self._batches(mine, epoch, horizon)
            step += len(order)

    def _batches(self, batches: list[np.ndarray], epoch: int, horizon: int) -> Iterator[Batch]:
        if not batches:
            return
        samples = read_in_order(self.source, self.shards, np.concatenate(batches), horizon, self.skipping)
        for numbers in batches:
            yield self._batch([next(samples) for _ in numbers], epoch)

    def _batch(self, read: list[RawSample | Damaged], epoch: int) -> Batch:
        # One kind of work for all images, then the next (`mdnet_dist.augment` says why).
        decoding = [self._decoded(one) for one in read]
        images = self.encoder.room(len(read))
        samples, damaged, pictures, draws, rooms = [], [], [], [], []
        reports: list[list[Report]] = []
        for found, room in zip(decoding, images):
            if isinstance(found, Damaged):
                damaged.append(found.message)
                samples.append(_blank(found))
                reports.append([])
                room[:] = self.blank
                continue
            sample, picture = found
            rng = np.random.default_rng([self.seed, epoch, sample.number])
            samples.append(sample)
            pictures.append(picture)
            draws.append(draw(self.augmentation, rng))
            rooms.append(room)
            chosen = rng.permutation(len(sample.record.reports))[: self.encoder.config.reports_per_image]
            reports.append([sample.record.reports[i] for i in chosen])
        augment(pictures, draws, self.augmentation, rooms)
        return self.encoder.collate(samples, images, reports, damaged)

    def _decoded(self, sample: RawSample | Damaged) -> tuple[RawSample, Image.Image] | Damaged:
        """As `decoded`, which is asked only once where there is room to keep what it says.

        Nothing that is kept makes room for another sample: where each comes once in an epoch, it would go before it is
        needed again.
        """
        if not isinstance(sample, Damaged) and (square := self._kept.get(sample.number)):
            return sample, square
        found = decoded(self.encoder, sample, self.skipping, with_mask=False)
        if not isinstance(found, Damaged) and len(self._kept) < self._most_kept:
            self._kept[found[0].number] = found[1].copy()  # of the pixels alone, not of what the file said beside them
        return found


class EvaluationStream(IterableDataset):
    """This rank's share of some parts, each sample once, without augmentation and with all reports.

    Which samples form a batch does not depend on the number of ranks, so that neither does any number computed of them.
    With `data.damaged: skip` a batch lacks its damaged samples and says so in `Batch.damaged`: it may have no image.
    """

    def __init__(
        self,
        encoder: Encoder,
        manifest: ShardManifest,
        parts: Sequence[str],
        *,
        batch: int,
        ranks: int,
        rank: int,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        """Args: left_out: as for `Skipping`."""
        super().__init__()
        self.encoder = encoder
        self.source, self.shards = open_source(encoder.config), manifest.shards_of(parts)
        self.skipping = skipping_of(encoder.config, left_out)
        samples = sum(shard.samples for shard in self.shards)
        self.batches = [np.array(numbers) for numbers in evaluation_batches(samples, batch, ranks, rank)]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        batches = self.batches[worker::workers]
        if not batches:
            return
        read = read_in_order(self.source, self.shards, np.concatenate(batches), 0, self.skipping)
        for numbers in batches:
            found = [decoded(self.encoder, next(read), self.skipping, with_mask=True) for _ in numbers]
            whole = [one for one in found if not isinstance(one, Damaged)]
            samples, images = [sample for sample, _ in whole], self.encoder.room(len(whole))
            for room, (_, image) in zip(images, whole):
                room[:] = np.asarray(image)
            damaged = [one.message for one in found if isinstance(one, Damaged)]
            yield self.encoder.collate(samples, images, [sample.record.reports for sample in samples], damaged)


HEARING_SECONDS = 1.0


class Loader:
    """Reads a stream of batches ahead of time in processes of its own, and raises their errors here as they were."""

    def __init__(self, stream: TrainingStream | EvaluationStream, workers: int, pin_memory: bool = False) -> None:
        self._loader = DataLoader(
            _ErrorsAsItems(stream),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=ignore_in_worker if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        items = iter(self._loader)
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except (OSError, EOFError) as error:
                if "in DataLoader worker process" in str(error):  # raised there, and handed on
                    raise
                # What a worker had to give was fetched from it when it was killed. torch raises an error of its own
                # when it hears of that: better here than in the midst of what follows.
                time.sleep(HEARING_SECONDS)
                raise LoaderLost("a loader process has ended") from error
            if isinstance(item, InputError):
                del items  # else the error's traceback keeps the loader processes
                raise item
            yield item


class _ErrorsAsItems(IterableDataset):
    """A DataLoader re-raises a worker's error with its traceback as the message; as an item it arrives unchanged."""

    def __init__(self, stream: TrainingStream | EvaluationStream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | InputError]:
        try:
            yield from self.stream
        except InputError as error:
            yield error


def parts_of(manifest: ShardManifest, fold: int | None) -> tuple[list[str], list[str], list[str]]:
    """The parts to train on, validate on and test on.

    Raises:
        InputError: folds asked of a set without, or not given for a set with them; nothing to train on.
    """
    folds = manifest.folds
    if fold is not None:
        if not folds:
            raise InputError(f"data.fold {fold}: the shard set has no folds but {', '.join(manifest.parts)}; set null")
        if fold >= folds or folds < 3:
            raise InputError(f"data.fold {fold}: the shard set has {folds} folds; give 0 to {folds - 1}, of 3 or more")
        validation, test = f"fold{(fold + 1) % folds}", f"fold{fold}"
        return [part for part in manifest.parts if part not in (validation, test)], [validation], [test]
    if folds:
        raise InputError(f"data.fold: the shard set is dealt into {folds} folds; say which one is for testing")
    if "train" not in manifest.parts:
        raise InputError(f"data.shards: the set has no part 'train', only {', '.join(manifest.parts)}")
    return (
        ["train"],
        [part for part in ("val",) if part in manifest.parts],
        [part for part in ("test",) if part in manifest.parts],
    )


def image_statistics(statistics: Sequence[PartStatistics]) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel over several parts, each image counted once."""
    weights = np.array([part.samples for part in statistics], dtype=float)
    weights /= weights.sum()
    means = np.array([part.image_mean for part in statistics])
    squares = np.array([part.image_std for part in statistics]) ** 2 + means**2
    mean = weights @ means
    # An image set of one colour still normalises to something finite.
    std = np.sqrt(np.maximum(weights @ squares - mean**2, 1e-4))
    return [round(float(value), 6) for value in mean], [round(float(value), 6) for value in std]
