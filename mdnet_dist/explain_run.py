"""Which images are explained, and the files that are written: OUT/NAME.html, OUT/NAME.png, OUT/index.html."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from mdnet_dist.config import DataConfig
from mdnet_dist.data import skipping_of
from mdnet_dist.errors import InputError
from mdnet_dist.evaluation import Prediction
from mdnet_dist.explain import Entry, Explanation, index, page
from mdnet_dist.export import ModelCard
from mdnet_dist.figures import draw_report
from mdnet_dist.images import decode_image
from mdnet_dist.model.mdnet import MDNet
from mdnet_dist.predict import Decoder, answer_files, answers_of, as_batch, prepare_image, prepare_mask, split_answers
from mdnet_dist.predict_folder import find_images, inside
from mdnet_dist.reading import RawSample, sound_samples
from mdnet_dist.run_folder import file_name_of, refuse_links
from mdnet_dist.shards import MANIFEST_NAME, write_atomically
from mdnet_dist.storage import is_address, open_source, place_of_set

BATCH = 8


def explain(
    card: ModelCard, explanations: Iterable[Explanation], out: Path, title: str, total: int | None = None
) -> int:
    """Write a page and a picture of each image, and then the index over them; returns how many.

    Raises:
        InputError: nothing to explain, or the folder cannot be written.
    """
    entries: list[Entry] = []
    taken = {"index"}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for shown in tqdm(explanations, total=total, unit="image", disable=None):
            name = file_name_of(shown.key, taken)
            answer = shown.answer
            draw_report(
                shown.image,
                answer.words,
                answer.attention,
                answer.probabilities,
                answer.class_maps[answer.predicted_label] if answer.predicted_label is not None else None,
                shown.label,
                shown.references,
                shown.mask,
                path=out / f"{name}.png",
            )
            write_atomically(out / f"{name}.html", page(shown, card.intended_use, f"{name}.png"))
            entries.append(Entry.of(shown, f"{name}.html"))
        if not entries:
            raise InputError(f"{out}: none of the images can be read; the lines above say why")
        write_atomically(out / "index.html", index(entries, title, card.intended_use))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    return len(entries)


def explain_best_and_worst(
    network: MDNet,
    card: ModelCard,
    predictions: Sequence[Prediction],
    data: DataConfig,
    parts: Sequence[str],
    out: Path,
    title: str,
    *,
    count: int,
    device: torch.device | str = "cpu",
    beam_width: int = 1,
) -> list[str]:
    """Pages on the best and the worst few images of an evaluation.

    Args:
        predictions: on the samples of `parts` of the shard set.
        data: says where that is, and what of it is left out.
        count: of images; with 0 nothing is written.

    Returns:
        their keys, as `best_and_worst` orders them.

    Raises:
        InputError: as `explain`, or `out` is a link: it is named by a run and not by the user.
    """
    keys = best_and_worst(predictions, count)
    if keys:
        refuse_links(out, out.parent)
        samples = _samples(data, parts, keys, None)
        explain(card, explain_samples(network, card, samples, device=device, beam_width=beam_width), out, title)
    return keys


def best_and_worst(predictions: Sequence[Prediction], count: int) -> list[str]:
    """Keys of the images on which the network did best and worst, half of `count` each.

    By the negative log-likelihood of the label, of the references' words where no image has a label.
    """
    labelled = [(prediction.loss_m, prediction.key) for prediction in predictions if prediction.loss_m is not None]
    losses = [(one.loss_l / one.tokens, one.key) for one in predictions if one.tokens]
    ranked = [key for _, key in sorted(labelled or losses)]
    chosen = {*ranked[: count - count // 2], *ranked[len(ranked) - min(len(ranked), count // 2) :]}
    return [key for key in ranked if key in chosen]


def explain_sources(
    network: MDNet,
    card: ModelCard,
    sources: Sequence[Path | str],
    decoder: Decoder,
    *,
    data_of: Callable[[str], DataConfig] = lambda shards: DataConfig(shards=shards),
    part: str = "test",
    keys: Sequence[str] = (),
    count: int | None = None,
    device: torch.device | str = "cpu",
    beam_width: int = 1,
) -> Iterator[Explanation]:
    """Explain image files, folders of images and shard sets, in the order in which they are named.

    An image file that cannot be read is named on stderr and left out.

    Args:
        sources: paths; addresses of shard sets are text.
        data_of: how the shard set at a place is read.
        part: of shard sets.
        keys: only these samples of shard sets.
        count: of each folder or shard set, at most.

    Raises:
        InputError: no such file, part or key; a shard that cannot be read.
    """
    for source in sources:
        if is_address(str(source)) or (Path(source) / MANIFEST_NAME).is_file():
            samples = _samples(data_of(str(source)), [part], keys, count)
            yield from explain_samples(network, card, samples, device=device, beam_width=beam_width)
            continue
        source = Path(source)
        paths = find_images(source)[:count]
        root = source if source.is_dir() else source.parent
        answers = answer_files(
            network, card, paths, inside(root, decoder), device=device, batch=BATCH, beam_width=beam_width
        )
        for path, square, answer in answers:
            if isinstance(answer, InputError):
                tqdm.write(f"skipped: {answer}", file=sys.stderr)
            else:
                name = str(path.relative_to(root)).encode("utf-8", "replace").decode()
                assert square is not None  # it goes with the answer
                yield Explanation(key=name, image=square, answer=answer, label=None, references=[])


def _samples(data: DataConfig, parts: Sequence[str], keys: Sequence[str], count: int | None) -> Iterator[RawSample]:
    source = open_source(data)
    shards = source.manifest().shards_of(parts)
    wanted, found = set(keys), 0
    for sample in sound_samples(source, shards, skipping_of(data)):
        if keys and sample.key not in wanted:
            continue
        if count is not None and found == count:
            return
        wanted.discard(sample.key)
        found += 1
        yield sample
        if keys and not wanted:
            return  # the shards behind it hold nothing that was asked for
    if wanted:
        raise InputError(f"{place_of_set(data)}: part '{', '.join(parts)}' has no sample '{min(wanted)}'")


def explain_samples(
    network: MDNet,
    card: ModelCard,
    samples: Iterable[RawSample],
    *,
    device: torch.device | str = "cpu",
    beam_width: int = 1,
) -> Iterator[Explanation]:
    """Explain samples of a shard set, with their labels, references and masks."""
    remaining = iter(samples)
    while batch := list(islice(remaining, BATCH)):
        squares = [prepare_image(card, decode_image(sample.image, sample.where)) for sample in batch]
        answers = answers_of(network, card, as_batch(squares, device), beam_width)
        for sample, square, answer in zip(batch, squares, split_answers(network, card, answers, range(len(batch)))):
            yield Explanation(
                key=sample.key,
                image=square,
                answer=answer,
                label=sample.record.label,
                references=[card.reference(report) for report in sample.record.reports],
                mask=prepare_mask(card, sample.mask, sample.where),
            )
