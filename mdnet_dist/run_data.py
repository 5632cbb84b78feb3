"""From a configuration to the data of a run: parts, vocabulary, model card, readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mdnet_dist.config import DataConfig, RunConfig
from mdnet_dist.console import say
from mdnet_dist.damage import DamageCount
from mdnet_dist.data import (
    Encoder,
    EvaluationStream,
    Loader,
    TrainingStream,
    decoded,
    image_statistics,
    parts_of,
    skipping_of,
)
from mdnet_dist.distributed import gather, on_first, raise_together, rank, world_size
from mdnet_dist.errors import InputError, nearest
from mdnet_dist.export import ModelCard, make_card
from mdnet_dist.plan import rank_share, steps_per_epoch
from mdnet_dist.reading import Damaged, RawSample, check_shards, sound_samples
from mdnet_dist.retrieval import Queries, collect_queries
from mdnet_dist.sentences import as_one_sentence
from mdnet_dist.shards import PartStatistics, Report, SampleRecord, ShardManifest, fingerprint
from mdnet_dist.storage import ShardSource, open_source, place_of_set
from mdnet_dist.vocabulary import Vocabulary, tokenize


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run and what follows from its training parts."""

    manifest: ShardManifest
    train: list[str]  # names of parts
    validation: list[str]
    test: list[str]
    card: ModelCard
    encoder: Encoder
    samples: int  # in training
    steps_per_epoch: int
    fingerprint: str  # of the training parts: `mdnet_dist.shards.fingerprint`
    left_out: dict[str, str] = field(default_factory=dict)  # by `data.damaged: skip`: {shard's file: what is wrong}

    def training_batches(self, config: RunConfig, first_step: int, steps: int, pin_memory: bool) -> Loader:
        """This rank's micro-batches from a step on."""
        stream = TrainingStream(
            self.encoder,
            config.augment,
            self.manifest,
            self.train,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            seed=config.train.seed,
            first_step=first_step,
            steps=steps,
            ranks=world_size(),
            rank=rank(),
            left_out=self.left_out,
        )
        return Loader(stream, config.data.workers, pin_memory)

    def evaluation_batches(self, config: RunConfig, parts: list[str], pin_memory: bool) -> Loader:
        """This rank's share of some parts, each sample once."""
        stream = EvaluationStream(
            self.encoder,
            self.manifest,
            parts,
            batch=config.evaluate.batch,
            ranks=world_size(),
            rank=rank(),
            left_out=self.left_out,
        )
        return Loader(stream, config.data.workers, pin_memory)

    def queries(self, parts: list[str]) -> Queries | None:
        """The reports by which the images of some parts are looked for; None where there are none. Collective."""

        def references() -> Iterator[tuple[str, list[Report]]]:
            return ((sample.key, sample.record.reports) for sample in self.samples_of(parts))

        return on_first(lambda: collect_queries(references(), self.encoder, self.card.sentences))

    def training_records(self) -> Iterator[SampleRecord]:
        """What is known of every training image, without decoding any."""
        return self.records(self.train)

    def records(self, parts: list[str]) -> Iterator[SampleRecord]:
        """What is known of every image of some parts, without decoding any."""
        return (sample.record for sample in self.samples_of(parts))

    def samples_of(self, parts: list[str], damaged: list[str] | None = None) -> Iterator[RawSample]:
        """The samples of some parts as they lie in their shards, in order.

        Args:
            damaged: with `data.damaged: skip` gets a message for each sample that is left out. Whether its picture
                decodes is looked at only where this is given.
        """
        config, skipping = self.encoder.config, skipping_of(self.encoder.config, self.left_out)
        for sample in sound_samples(open_source(config), self.manifest.shards_of(parts), skipping, damaged):
            if damaged is not None:
                found = decoded(self.encoder, sample, skipping, with_mask=True)
                if isinstance(found, Damaged):
                    damaged.append(found.message)
                    continue
            yield sample

    def cuts_sentences(self) -> bool:
        """Whether some sentence of training is longer than the configured length. Collective."""
        longest, joined = self.encoder.config.max_tokens - 1, self.card.joined
        if not joined:
            return any(self.manifest.parts[part].longest_sentence > longest for part in self.train)
        # The manifest knows no length of whole reports.
        reports = (report for record in self.training_records() for report in record.reports)
        return on_first(lambda: any(len(tokenize(as_one_sentence(report, joined))) > longest for report in reports))


def open_data(config: RunConfig, *, with_test: bool = True) -> RunData:
    """Read the manifest, check this rank's share of the shards, and derive vocabulary and image statistics. Collective.

    Args:
        with_test: without it there is no test part, and its shards are not even opened.

    Raises:
        InputError: whatever is wrong with the shards or contradicts the configuration.
    """
    source = open_source(config.data)
    manifest = on_first(source.manifest)  # each for itself, ranks might read two sets, while one is replaced
    train, validation, test = parts_of(manifest, config.data.fold)
    test = test if with_test else []
    statistics = [manifest.parts[part] for part in train]
    samples = sum(part.samples for part in statistics)
    steps = steps_per_epoch(samples, config.train.global_batch)
    rank_share(config.train.global_batch, world_size(), rank())
    left_out = _check_shards_together(config.data, source, manifest, [train, validation, test])

    words: Counter[str] = Counter()
    for part in statistics:
        words.update(part.words)
    vocabulary = Vocabulary.from_counts(words, config.data.min_word_count)
    if manifest.topics and not words:
        raise InputError(
            f"{place_of_set(config.data)}: the training part has no word in any report; give reports, or no topics"
        )
    mean, std = image_statistics(statistics)
    card = make_card(config, manifest.topics, manifest.classes, vocabulary, _conclusions(statistics), mean, std)
    return RunData(
        manifest=manifest,
        train=train,
        validation=validation,
        test=test,
        card=card,
        encoder=Encoder(config.data, card.topics_read, manifest.classes, vocabulary),
        samples=samples,
        steps_per_epoch=steps,
        fingerprint=fingerprint(manifest, train),
        left_out=left_out,
    )


AS_TRAINED = ("image_size", "fit", "sentences", "max_tokens")
"""Keys of `data` that belong to a network; the others say where and how a shard set is read."""


def open_part(config: RunConfig, card: ModelCard, part: str) -> tuple[RunData, list[str]]:
    """The data of a saved network, and the names of the shard set's parts that `part` means. Collective.

    Args:
        config: `data` says what is read, and from where.
        card: says how: image size, words, classes, whatever the shard set's own are.
        part: train, val or test, which for a set dealt into folds follow from `data.fold`; or a part of the set.

    Raises:
        InputError: no such set or part, shards that differ from their manifest, or a label that the network lacks.
    """
    source = open_source(config.data)
    manifest = on_first(source.manifest)  # each for itself, ranks might read two sets, while one is replaced
    in_folds = manifest.folds and config.data.fold is not None
    if in_folds or "train" in manifest.parts:
        train, validation, test = parts_of(manifest, config.data.fold if in_folds else None)
    else:  # a set to evaluate on needs nothing to train on
        train = []
        validation, test = ([part for part in manifest.parts if part == name] for name in ("val", "test"))
    parts = {"train": train, "val": validation, "test": test}.get(part) or [part]
    manifest.shards_of(parts)  # refuses a part that is not there
    labels = {label for name in parts for label, images in manifest.parts[name].labels.items() if images}
    if unknown := sorted(labels - set(card.classes)):
        raise InputError(
            f"{place_of_set(config.data)}: label '{unknown[0]}' is not a class of the network; "
            f"{nearest(unknown[0], card.classes)}"
        )
    left_out = _check_shards_together(config.data, source, manifest, [parts])
    trained = DataConfig.model_validate({**card.data, "shards": ""})
    data = config.data.model_copy(update={key: getattr(trained, key) for key in AS_TRAINED})
    return RunData(
        manifest=manifest,
        train=train,
        validation=validation,
        test=test,
        card=card,
        encoder=Encoder(data, card.topics_read, card.classes, card.vocabulary),
        samples=sum(manifest.parts[name].samples for name in train),
        steps_per_epoch=0,
        fingerprint=fingerprint(manifest, train),
        left_out=left_out,
    ), parts


def _check_shards_together(
    config: DataConfig, source: ShardSource, manifest: ShardManifest, uses: list[list[str]]
) -> dict[str, str]:
    """Each rank checks its share; what one of them finds wrong is every rank's error, or known to all of them.

    Args:
        uses: the parts that are read together: to train, to validate, to test.

    Returns:
        the shards to leave out, {file: what is wrong}; the first rank says which.

    Raises:
        InputError: a shard differs and `data.damaged` is strict, or more images are left out than may be.
    """
    problem: InputError | None = None
    found: dict[str, str] = {}
    shards = manifest.shards_of([part for parts in uses for part in parts])
    try:
        found = check_shards(source, shards, ranks=world_size(), rank=rank(), skip=config.damaged == "skip")
    except InputError as error:
        problem = error
    raise_together(problem)
    everywhere = {file: message for part in gather(found) for file, message in part.items()}
    left_out = {shard.file: everywhere[shard.file] for shard in shards if shard.file in everywhere}
    for message in left_out.values():
        say(f"left out: {message}")
    for parts in uses:
        count = DamageCount(config.most_damaged, f"images of {', '.join(parts)}")
        count.begin(sum(manifest.parts[part].samples for part in parts))
        for shard in manifest.shards_of(parts):
            if shard.file in left_out:
                count.add(shard.samples, [left_out[shard.file]] * shard.samples)
        count.check()
    return left_out


def _conclusions(statistics: list[PartStatistics]) -> dict[str, dict[str, int]]:
    """{class: {conclusion sentence: times}} over several parts."""
    conclusions: dict[str, Counter[str]] = {}
    for part in statistics:
        for label, sentences in part.conclusions.items():
            conclusions.setdefault(label, Counter()).update(sentences)
    return {label: dict(sorted(sentences.items())) for label, sentences in sorted(conclusions.items())}
