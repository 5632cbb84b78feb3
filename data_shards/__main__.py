"""The command line: `python -m data_shards synth|import|import-cifar|verify|show --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mdnet_dist.errors import InputError, one_line, printable, without_password
from mdnet_dist.program import run_program
from mdnet_dist.storage import is_address

if TYPE_CHECKING:
    from data_shards.importing import Source
    from mdnet_dist.shards import ShardManifest

# Each command imports what it needs when it runs, so that --help is fast and one missing extra spoils one command.


def synth(arguments: argparse.Namespace) -> None:
    """Draw the synthetic bladder set."""
    from data_shards.synth import CLASSES, TOPICS, synthesize
    from data_shards.writer import write_shards

    folds = arguments.folds or 0
    samples = synthesize(arguments.images, arguments.patients, arguments.size, arguments.seed, folds=folds > 0)
    manifest = write_shards(
        samples,
        arguments.out,
        name=arguments.name or "synthetic bladder set",
        topics=TOPICS,
        classes=CLASSES,
        samples_per_shard=arguments.samples_per_shard,
        total=arguments.images,
        folds=folds,
        force=arguments.force,
    )
    print_summary(manifest, arguments.out, [])


def import_(arguments: argparse.Namespace) -> None:
    """Import images and reports that somebody brings."""
    from data_shards.importing import ImportOptions, import_source, read_salt

    options = ImportOptions(
        name=arguments.name,
        topics=arguments.topics,
        classes=arguments.classes,
        folds=arguments.folds,
        val_share=arguments.val_share,
        max_side_px=arguments.max_side,
        samples_per_shard=arguments.samples_per_shard,
        salt=None if arguments.pseudonymise is None else read_salt(arguments.pseudonymise),
        force=arguments.force,
    )
    manifest, notes = import_source(read_source(arguments), arguments.out, options)
    print_summary(manifest, arguments.out, notes)


def import_cifar(arguments: argparse.Namespace) -> None:
    """Import CIFAR-10 or CIFAR-100."""
    from data_shards.import_cifar import import_cifar as write

    manifest = write(
        arguments.source,
        arguments.out,
        labels=arguments.labels,
        validation=arguments.val or 0,
        name=arguments.name,
        samples_per_shard=arguments.samples_per_shard,
        force=arguments.force,
    )
    print_summary(manifest, arguments.out, [])


def read_source(arguments: argparse.Namespace) -> Source:
    """Read PATH in the format asked for, or in the one that it looks like.

    Raises:
        InputError: it looks like none, or is not what it should be.
    """
    from data_shards.import_bcidr import read_bcidr
    from data_shards.import_manifest import read_manifest
    from data_shards.import_r2gen import read_r2gen

    path: Path = arguments.path
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    kind = arguments.format or guess_format(path)
    if arguments.views != "first" and kind != "r2gen":
        raise InputError(f"--views {arguments.views}: only the r2gen format has several views; this is {kind}")
    if arguments.patient_regex is not None and kind == "manifest":
        raise InputError("--patient-regex: a manifest names the patient of each image itself")
    nameless = arguments.pseudonymise is not None
    if kind == "bcidr":
        return read_bcidr(path if path.is_dir() else path.parent, arguments.patient_regex, nameless=nameless)
    if kind == "r2gen":
        return read_r2gen(path, arguments.patient_regex, arguments.views, nameless=nameless)
    return read_manifest(path, nameless=nameless)


def guess_format(path: Path) -> str:
    """The format of a file or folder, from file names alone.

    Raises:
        InputError: it looks like none.
    """
    if path.is_file():
        if path.suffix in (".jsonl", ".ndjson"):
            return "manifest"
        if path.name.endswith("_annotation.json"):
            return "bcidr"
        if path.suffix == ".json":
            return "r2gen"
    elif (path / "manifest.jsonl").exists():
        return "manifest"
    elif any((path / f"{split}_annotation.json").exists() for split in ("train", "val", "test")):
        return "bcidr"
    elif (path / "annotation.json").exists():
        return "r2gen"
    raise InputError(
        f"{path}: looks like no known format: manifest (a .jsonl file), bcidr (train_annotation.json), "
        "r2gen (annotation.json); choose with --format"
    )


def verify(arguments: argparse.Namespace) -> None:
    """Check a shard set.

    Raises:
        InputError: the first problem found, or the number of all where all were asked for.
    """
    from data_shards.verify import verify_set
    from mdnet_dist.shards import load_manifest

    problems = 0
    for problem in verify_set(arguments.folder):
        if not arguments.all:
            raise InputError(problem)
        problems += 1
        print(one_line(problem), file=sys.stderr)
    if problems:
        raise InputError(f"{arguments.folder}: {problems} problems, listed above")
    print_table(load_manifest(arguments.folder))
    print(f"{arguments.folder}: everything agrees with the manifest")


def show(arguments: argparse.Namespace) -> None:
    """Draw some samples of a shard set."""
    from data_shards.show import show_set

    out = arguments.out or Path(f"{arguments.folder.resolve().name}-{arguments.part or 'samples'}.png")
    count = show_set(
        arguments.folder, out, part=arguments.part, count=arguments.count, seed=arguments.seed, masks=arguments.masks
    )
    print(f"{count} samples: {out}")


def print_summary(manifest: ShardManifest, out: Path, notes: Sequence[str]) -> None:
    """What was written, what was decided on the way, and what to type next."""
    print_table(manifest)
    training = [part for part in manifest.parts if part == "train" or part.startswith("fold")]
    for note in notes:
        print(one_line(f"note: {note}"))
    if not training:
        print("note: there is no training part, so the vocabulary is empty")
    for name in manifest.classes:
        if not any(manifest.parts[part].labels.get(name) for part in training):
            print(one_line(f"note: no training image has the class '{name}'"))
    print(f"{out}: written; look at it with: python -m data_shards show {out}")


def print_table(manifest: ShardManifest) -> None:
    """A column for each part: samples, patients, shards, size, and the images of each class."""
    parts = manifest.parts
    shards = {part: manifest.shards_of([part]) for part in parts}
    unlabelled = {part: statistics.samples - sum(statistics.labels.values()) for part, statistics in parts.items()}
    rows: list[list[object]] = [
        ["", *parts],
        ["samples", *(statistics.samples for statistics in parts.values())],
        ["patients", *(statistics.patients for statistics in parts.values())],
        ["shards", *(len(shards[part]) for part in parts)],
        ["MB", *(f"{sum(shard.bytes for shard in shards[part]) / 1e6:.1f}" for part in parts)],
        *(
            ["- " + name, *(statistics.labels.get(name, 0) for statistics in parts.values())]
            for name in manifest.classes
        ),
        *([["- no label", *unlabelled.values()]] if any(unlabelled.values()) else []),
    ]
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    topics = f"topics {', '.join(manifest.topics)}" if manifest.topics else "no topics"
    print(one_line(f"{manifest.name}: {topics}; {len(manifest.vocabulary)} words in training"))
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(printable("  ".join([str(row[0]).ljust(widths[0]), *cells])))


def names(text: str) -> list[str]:
    """Names given with commas between them."""
    return [name.strip() for name in text.split(",")]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def local_folder(text: str) -> Path:
    """A folder of this machine: what checks or draws a set does not read addresses."""
    if is_address(text):
        raise InputError(f"{without_password(text)}: an address, but this works on folders only; copy the set here")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m data_shards", description="Build, import, check and show shard sets."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the set's folder; must not exist, or be empty"
    )
    writing.add_argument("--name", help="what the set is, for people")
    writing.add_argument("--samples-per-shard", type=positive, default=256, metavar="N", help="at most (default 256)")
    writing.add_argument("--force", action="store_true", help="replace the shard set at DIR")

    dealing = argparse.ArgumentParser(add_help=False)
    dealing.add_argument(
        "--folds", type=positive, metavar="F", help="deal patients into F folds instead of train, val, test"
    )

    command = commands.add_parser("synth", parents=[writing, dealing], help="draw the synthetic bladder set")
    command.add_argument("--images", type=positive, default=1000, metavar="N", help="how many (default 1000)")
    command.add_argument("--patients", type=positive, default=32, metavar="N", help="how many (default 32)")
    command.add_argument(
        "--size", type=positive, default=224, metavar="PX", help="side of an image in pixels (default 224)"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed draws the same set (default 0)"
    )
    command.set_defaults(run=synth)

    command = commands.add_parser("import", parents=[writing, dealing], help="import images and reports")
    command.add_argument(
        "path", type=Path, metavar="PATH", help="MANIFEST.jsonl, or a folder in BCIDR's or R2Gen's layout"
    )
    command.add_argument(
        "--format", choices=("manifest", "bcidr", "r2gen"), help="where the names of the files do not tell it"
    )
    command.add_argument(
        "--val-share",
        type=float,
        metavar="X",
        help="share of training images set aside for validation where the source has no val part (default 0.15)",
    )
    command.add_argument(
        "--max-side", type=positive, metavar="PX", help="shrink images whose longer side has more pixels"
    )
    command.add_argument(
        "--topics",
        type=names,
        metavar="A,B",
        help="the topics in their order (default: as they first appear, conclusion last)",
    )
    command.add_argument(
        "--classes", type=names, metavar="A,B", help="the classes in their order (default: the labels, sorted)"
    )
    command.add_argument(
        "--pseudonymise", type=Path, metavar="SALT_FILE", help="store salted hashes instead of file names and patients"
    )
    command.add_argument(
        "--views",
        choices=("first", "each"),
        default="first",
        help="r2gen: the first image of an item, or each as a sample of its own",
    )
    command.add_argument(
        "--patient-regex",
        metavar="REGEX",
        help="bcidr, r2gen: its first group, matched at the start of an image's name or id, is the patient",
    )
    command.set_defaults(run=import_)

    command = commands.add_parser("import-cifar", parents=[writing], help="import CIFAR-10 or CIFAR-100")
    command.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="the unpacked python or binary version, or a folder of images with labels.csv",
    )
    command.add_argument(
        "--val", type=positive, metavar="N", help="set N training images aside for validation (default: none)"
    )
    command.add_argument(
        "--labels", choices=("fine", "coarse"), default="fine", help="CIFAR-100: 100 classes (default) or 20"
    )
    command.set_defaults(run=import_cifar)

    command = commands.add_parser("verify", help="check a shard set")
    command.add_argument("folder", type=local_folder, metavar="DIR")
    command.add_argument("--all", action="store_true", help="list every problem, not only the first")
    command.set_defaults(run=verify)

    command = commands.add_parser("show", help="draw some samples of a shard set as a PNG")
    command.add_argument("folder", type=local_folder, metavar="DIR")
    command.add_argument("--out", type=Path, metavar="PNG", help="default: SET-PART.png in this folder")
    command.add_argument("--part", metavar="P", help="train, val, test, fold0... (default: the set's first)")
    command.add_argument("--count", type=positive, default=12, metavar="N", help="default 12")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed shows others")
    command.add_argument("--masks", action="store_true", help="outline the informative region where it is known")
    command.set_defaults(run=show)
    return parser


def main() -> None:
    """Run the command that the command line names."""
    arguments = build_parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    sys.argv[0] = "data_shards"  # the name in error messages; it was __main__.py
    run_program(main)
