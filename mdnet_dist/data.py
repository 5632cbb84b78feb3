"""From shards to batches: the only file that knows WebDataset.

Reading is a chain of small generators: the planned order of sample numbers -> encoded samples, each shard read from
front to back -> decoded and augmented examples -> micro-batches. What to read when is decided in `mdnet_dist.plan`;
nothing here is random but the augmentation and the choice of reports, which follow from (seed, epoch, sample) alone.

Shapes: B images, R reports, K topics, T tokens, S px the side of an image.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys

from mdnet_dist.augment import augment
from mdnet_dist.config import AugmentConfig, DataConfig
from mdnet_dist.errors import InputError
from mdnet_dist.images import decode_image, fit_to_square
from mdnet_dist.model.mdnet import NO_LABEL
from mdnet_dist.plan import epoch_order, evaluation_batches, micro_batches, reading_horizon, steps_per_epoch
from mdnet_dist.sentences import as_one_sentence
from mdnet_dist.shards import Report, SampleRecord, ShardInfo, ShardManifest, parse_record, sha256_of
from mdnet_dist.signals import ignore_in_worker
from mdnet_dist.vocabulary import PAD, Vocabulary, tokenize

MEMBERS = {"jpg", "png", "json", "mask.png"}
"""The members of a sample that are read; nothing is ever unpickled or executed."""
MAX_MEMBER_BYTES = 1 << 28
"""A member that claims more is refused before it is read."""


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """A sample as it lies in its shard."""

    number: int  # through all shards read, in the manifest's order
    key: str
    image: bytes
    record: SampleRecord
    mask: bytes | None
    where: str  # shard and key, for messages


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

    def to(self, device: torch.device) -> Batch:
        """Start copying to a device; `lengths` stays where it is needed."""
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in ("images", "labels", "tokens")}
        return replace(self, **move)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that copies to a GPU need not wait."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in ("images", "labels", "tokens")})


# ------------------------------------------------------------------------------------------------- encoded samples


def check_shards(folder: Path, shards: Sequence[ShardInfo], *, ranks: int = 1, rank: int = 0) -> None:
    """Compare this rank's share of the shards with the manifest: each there, of the right size and checksum.

    Raises:
        InputError: naming the first shard that differs.
    """
    for shard in shards[rank::ranks]:
        path = folder / shard.file
        if not path.is_file():
            raise InputError(f"{path}: the manifest lists this shard, but it is not there")
        if path.stat().st_size != shard.bytes:
            raise InputError(f"{path}: {path.stat().st_size} bytes, but the manifest says {shard.bytes}; copy it again")
        if sha256_of(path) != shard.sha256:
            raise InputError(f"{path}: its checksum differs from the manifest's; copy it again")


def read_shard(folder: Path, shard: ShardInfo, first_number: int = 0) -> Iterator[RawSample]:
    """All samples of a shard, front to back.

    Args:
        first_number: of the shard's first sample.

    Raises:
        InputError: a tar that is cut off or damaged, a sample without image or record, too few or too many samples.
    """
    path = folder / shard.file
    found = 0
    try:
        for found, members in enumerate(group_by_keys(_members(path)), start=1):
            if found > shard.samples:
                break
            yield _raw_sample(members, str(path), first_number + found - 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error} after sample {found}; copy the shard again") from error
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise InputError(f"{path}: damaged after sample {found} ({reason}); copy the shard again") from error
    if found != shard.samples:
        more = " or more" if found > shard.samples else ""
        raise InputError(f"{path}: {found}{more} samples, but the manifest says {shard.samples}; copy the shard again")


def _members(path: Path) -> Iterator[dict]:
    """The members of a shard that are read, as `group_by_keys` takes them.

    WebDataset's own tar reader also unpacks compressed files and sparse members, with which a few bytes fill any
    memory; this one refuses both. And it takes a header that is damaged or cut off for the end of the file.
    """
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else they pile up
            if not member.isreg() or member.name.partition(".")[2].lower() not in MEMBERS:
                continue
            if member.issparse() or not 0 <= member.size <= MAX_MEMBER_BYTES:
                raise InputError(
                    f"{path}: member '{member.name:.120}' is sparse or larger than {MAX_MEMBER_BYTES:,} bytes"
                )
            content = tar.extractfile(member)
            assert content is not None  # it is a plain file
            yield {"fname": member.name, "data": content.read(), "__url__": str(path)}
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("cut off, or a damaged header")


def _raw_sample(members: dict, path: str, number: int) -> RawSample:
    key = members["__key__"]
    where = f"{path}, sample '{key}'"
    image = members.get("jpg", members.get("png"))
    if image is None or "json" not in members:
        missing = "an image" if image is None else "its .json"
        raise InputError(f"{where}: {missing} is missing; a sample is KEY.jpg or KEY.png with KEY.json")
    record = parse_record(members["json"], where)
    return RawSample(number=number, key=key, image=image, record=record, mask=members.get("mask.png"), where=where)


def read_in_order(folder: Path, shards: Sequence[ShardInfo], numbers: np.ndarray, horizon: int) -> Iterator[RawSample]:
    """The samples with these numbers, in this order, while shards are read from front to back.

    Samples that a shard yields before their turn wait, still encoded: `horizon` of them at most. A shard is read once,
    and once more where it holds samples further apart than that (`mdnet_dist.plan.reading_horizon`).

    Args:
        numbers: distinct sample numbers, counted through all shards in order.
        horizon: samples whose turn is more than so many places ahead do not wait.
    """
    counts = np.array([shard.samples for shard in shards])
    first = np.cumsum(counts) - counts
    shard_of = np.searchsorted(first, numbers, side="right") - 1
    remaining = np.bincount(shard_of, minlength=len(shards))
    place_of = {number: place for place, number in enumerate(numbers.tolist())}
    waiting: dict[int, RawSample] = {}
    streams: dict[int, Iterator[RawSample]] = {}
    read_up_to: dict[int, int] = {}
    for place, (number, shard) in enumerate(zip(numbers.tolist(), shard_of.tolist())):
        if number not in waiting and number < read_up_to.get(shard, number + 1):
            streams[shard] = read_shard(folder, shards[shard], int(first[shard]))
        while number not in waiting:
            sample = next(streams[shard])
            read_up_to[shard] = sample.number + 1
            if place <= place_of.get(sample.number, -1) <= place + horizon:
                waiting[sample.number] = sample
        remaining[shard] -= 1
        if not remaining[shard]:
            # Read what is left too: a shard that is cut off must not pass for a whole one.
            for _ in streams.pop(shard):
                pass
        yield waiting.pop(number)


# ------------------------------------------------------------------------------------------------ decoded examples


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

    def image(self, raw: bytes, where: str) -> np.ndarray:
        """Decode and fit to the square that the network sees: (S, S, 3) uint8."""
        return fit_to_square(decode_image(raw, where), self.config.image_size, self.config.fit)

    def sentence(self, text: str) -> list[int]:
        """Numbers of a sentence's tokens, END behind them; cut to the configured length."""
        return self.vocabulary.encode(tokenize(text))[: self.config.max_tokens]

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

    def collate(self, samples: Sequence[RawSample], images: Sequence[np.ndarray], reports: Sequence[list]) -> Batch:
        """Put examples together. Args: reports: of each image, the chosen {topic: sentence}."""
        encoded = [[self.sentences(report) for report in chosen] for chosen in reports]
        B, R, K = len(samples), max(1, max(map(len, encoded))), len(self.sentences({}))
        T = max([1, *(len(sentence) for chosen in encoded for report in chosen for sentence in report)])
        tokens = np.full((B, R, K, T), PAD, dtype=np.int64)
        lengths = np.zeros((B, R, K), dtype=np.int64)
        for b, chosen in enumerate(encoded):
            for r, report in enumerate(chosen):
                for k, sentence in enumerate(report):
                    tokens[b, r, k, : len(sentence)] = sentence
                    lengths[b, r, k] = len(sentence)
        return Batch(
            keys=[sample.key for sample in samples],
            records=[sample.record for sample in samples],
            images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
            labels=torch.tensor([self.label(sample.record, sample.where) for sample in samples]),
            tokens=torch.from_numpy(tokens),
            lengths=torch.from_numpy(lengths),
            masks=[sample.mask for sample in samples],
        )


# --------------------------------------------------------------------------------------------------------- batches


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
    ) -> None:
        """Args: first_step, steps: of the whole training; its epochs follow from them."""
        super().__init__()
        self.encoder, self.augmentation = encoder, augmentation
        self.folder, self.shards = Path(encoder.config.shards), manifest.shards_of(parts)
        self.global_batch, self.seed = global_batch, seed
        self.pieces = micro_batches(global_batch, micro_batch, ranks, rank)
        self.first_step, self.steps, self.ranks = first_step, steps, ranks
        self.samples = sum(shard.samples for shard in self.shards)
        self.steps_per_epoch = steps_per_epoch(self.samples, global_batch)

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
        samples = read_in_order(self.folder, self.shards, np.concatenate(batches), horizon)
        for numbers in batches:
            yield self._batch([next(samples) for _ in numbers], epoch)

    def _batch(self, samples: list[RawSample], epoch: int) -> Batch:
        images, reports = [], []
        for sample in samples:
            rng = np.random.default_rng([self.seed, epoch, sample.number])
            images.append(augment(self.encoder.image(sample.image, sample.where), self.augmentation, rng))
            chosen = rng.permutation(len(sample.record.reports))[: self.encoder.config.reports_per_image]
            reports.append([sample.record.reports[i] for i in chosen])
        return self.encoder.collate(samples, images, reports)


class EvaluationStream(IterableDataset):
    """This rank's share of some parts, each sample once, without augmentation and with all reports.

    Which samples form a batch does not depend on the number of ranks, so that neither does any number computed of them.
    """

    def __init__(
        self, encoder: Encoder, manifest: ShardManifest, parts: Sequence[str], *, batch: int, ranks: int, rank: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.folder, self.shards = Path(encoder.config.shards), manifest.shards_of(parts)
        samples = sum(shard.samples for shard in self.shards)
        self.batches = [np.array(numbers) for numbers in evaluation_batches(samples, batch, ranks, rank)]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        batches = self.batches[worker::workers]
        if not batches:
            return
        samples = read_in_order(self.folder, self.shards, np.concatenate(batches), horizon=0)
        for numbers in batches:
            chosen = [next(samples) for _ in numbers]
            images = [self.encoder.image(sample.image, sample.where) for sample in chosen]
            yield self.encoder.collate(chosen, images, [sample.record.reports for sample in chosen])


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
        for item in self._loader:
            if isinstance(item, InputError):
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
