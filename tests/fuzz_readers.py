"""Everything that reads files from elsewhere, each with good files to mutate: what `tests.fuzzing` runs.

A reader is given the bytes of one file, puts them where the program looks for that file, and reads them as the program
does. Files that go with it are good.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from data_shards.import_bcidr import read_bcidr
from data_shards.import_cifar import read_cifar
from data_shards.import_manifest import read_manifest
from data_shards.import_r2gen import read_r2gen
from data_shards.importing import ImportOptions, Source, import_source
from data_shards.plain_pickle import PickledArray, read_plain_pickle
from data_shards.prepare import prepare_pixels
from data_shards.verify import verify_set
from mdnet_dist.checkpoint import checkpoints, load_checkpoint
from mdnet_dist.config import GoogLeNetImageModel, ModelConfig
from mdnet_dist.config_file import as_yaml, load_config
from mdnet_dist.data import EvaluationStream
from mdnet_dist.errors import InputError
from mdnet_dist.export import CARD, WEIGHTS, load_model
from mdnet_dist.images import decode_image, decode_mask, fit_to_square
from mdnet_dist.model.googlenet import GoogLeNet
from mdnet_dist.pretrained import pretrained_weights
from mdnet_dist.reading import read_shard
from mdnet_dist.run_data import open_data
from mdnet_dist.shards import MANIFEST_NAME, ShardInfo, load_manifest, sha256_of
from mdnet_dist.storage import LocalSource
from mdnet_dist.tracking import RUN_NAME, end_run, run_id_of
from mdnet_dist.tracking_files import METRICS_NAME, UNSENT_NAME, read_metrics
from tests.mutations import (
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_png,
    mutate_safetensors,
    mutate_tar,
    mutate_yaml,
    mutate_zip,
)
from tests.saved import untrained_run
from tests.tiny import tiny_config, tiny_set
from tune.ledger import Ledger, reports_of
from tune.search_config import load_search

REPOSITORY = Path(__file__).resolve().parent.parent
FEW = "few.safetensors"
"""Lacks most weights, so that it is refused as it is: all of them would be 23 MB."""
Mutate = Callable[[Random, bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A kind of file and how the program reads it."""

    name: str
    seeds: Sequence[tuple[bytes, Mutate, str]]  # a good file, what changes it, a word that tells `read` which it is
    read: Callable[[bytes, str], object]  # gives a value or raises InputError


def readers(folder: Path) -> list[Reader]:
    """All of them. Args: folder: for good files and for mutated ones; it should be the current folder."""
    for configs in ("launch/configs", "tune"):
        shutil.copytree(REPOSITORY / configs, folder / configs, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    makers = (_manifests, _shards, _imports, _configurations, _models, _records, _pictures, _pickles)
    return [reader for make in makers for reader in make(folder)]


# --------------------------------------------------------------------------------------------------------------- shards


def _manifests(folder: Path) -> list[Reader]:
    sets = folder / "plain", folder / "folds"
    for path, folds in zip(sets, (0, 3)):
        tiny_set(path, train=24, folds=folds)
    seeds = [((path / MANIFEST_NAME).read_bytes(), mutate_json, path.name) for path in sets]
    bases = {path.name: tiny_config(path, folder, {"data.fold": 0} if path.name == "folds" else None) for path in sets}

    def read(content: bytes, kind: str) -> object:
        here = folder / "manifest"
        if not here.exists():
            here.mkdir()
            for path in (*sets[0].glob("*.tar"), *sets[1].glob("*.tar")):
                shutil.copy(path, here)
        (here / MANIFEST_NAME).write_bytes(content)
        load_manifest(here)
        config = bases[kind]
        data = open_data(config.model_copy(update={"data": config.data.model_copy(update={"shards": str(here)})}))
        return data.card, list(data.samples_of(data.train)), list(verify_set(here))

    return [Reader(name="shard manifest", seeds=seeds, read=read)]


def _shards(folder: Path) -> list[Reader]:
    here = folder / "members"
    tiny_set(here, train=8, val=1, test=1, samples_per_shard=8)
    manifest = load_manifest(here)
    shard = manifest.shards_of(["train"])[0]
    tar = (here / shard.file).read_bytes()
    samples = list(read_shard(LocalSource(here), shard))
    encoder = open_data(tiny_config(here, folder)).encoder

    def changed(content: bytes) -> ShardInfo:
        (here / "train-000000.tar").write_bytes(content)
        return shard

    def read_tar(content: bytes, _: str) -> object:
        return list(read_shard(LocalSource(here), changed(content)))

    def read_member(content: bytes, suffix: str) -> object:
        with tarfile.open(here / "changed.tar", "w", format=tarfile.USTAR_FORMAT) as out:
            for sample in samples:
                members = {"json": record_of[sample.key], "png" if sample.image[:1] == b"\x89" else "jpg": sample.image}
                if sample.mask is not None:
                    members["mask.png"] = sample.mask
                if sample is samples[-1]:
                    members[suffix] = content
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{sample.key}.{extension}")
                    member.size = len(data)
                    out.addfile(member, io.BytesIO(data))
        stream = EvaluationStream(
            encoder, replace(manifest, shards=[replace(shard, file="changed.tar")]), ["train"], batch=2, ranks=1, rank=0
        )
        batches = list(stream)
        masks = [decode_mask(mask, "mask") for batch in batches for mask in batch.masks if mask is not None]
        return batches, masks

    last = samples[-1]
    record_of = {sample.key: _record(sample.record) for sample in samples}
    kind = "png" if last.image[:1] == b"\x89" else "jpg"
    mask = next(sample.mask for sample in samples if sample.mask is not None)
    members = [
        (last.image, mutate_png if kind == "png" else mutate_bytes, kind),
        (record_of[last.key], mutate_json, "json"),
        (mask, mutate_png, "mask.png"),
    ]
    return [
        Reader(name="shard", seeds=[(tar, mutate_tar, "")], read=read_tar),
        Reader(name="shard member", seeds=members, read=read_member),
    ]


def _record(record: object) -> bytes:
    return json.dumps(vars(record)).encode()


# -------------------------------------------------------------------------------------------------------------- imports


def _imports(folder: Path) -> list[Reader]:
    here = folder / "source"
    (here / "Images").mkdir(parents=True)
    names = [f"H{number}_0{number}" for number in range(6)]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / "Images" / f"{name}.png")
    lines = [
        {
            "image": f"Images/{name}.png",
            "patient": name[:2],
            "split": ("train", "val", "test")[number % 3],
            "label": "low" if number % 2 else None,
            "mask": f"Images/{name}.png" if number == 1 else None,
            "reports": [{"crowding": "nuclei are crowded", "conclusion": "low grade"}, {"conclusion": "low"}],
        }
        for number, name in enumerate(names)
    ]
    caption = "mild pleomorphism. mild crowding. polarity is kept. mitosis is rare. nucleoli are absent. low grade"
    bcidr = {name: {"caption": [caption] * 2, "label": 1} for name in names}
    item = {"image_path": ["Images/H0_00.png"], "report": "the heart is normal .", "split": "train"}
    r2gen = {
        "train": [{"id": "CXR1_IM-1", **item}, {"id": "CXR2_IM-1", **item, "image_path": ["Images/H1_01.png"]}],
        "test": [{"id": "CXR3", **item, "image_path": ["Images/H2_02.png"], "split": "test", "subject_id": 7}],
    }
    table = "split,file,label,class\n" + "".join(
        f"{'test' if number > 3 else 'train'},Images/{name}.png,{number % 2},{'ab'[number % 2]}\n"
        for number, name in enumerate(names)
    )

    def write(source: Source, kind: str) -> object:
        salt = b"0123456789abcdef" if kind == "salted" else None
        out = folder / f"imported-{os.getpid()}"  # readers run side by side
        return import_source(source, out, ImportOptions(force=True, salt=salt))

    def read_lines(content: bytes, kind: str) -> object:
        (here / "manifest.jsonl").write_bytes(content)
        return write(read_manifest(here), kind)

    def read_b(content: bytes, kind: str) -> object:
        (here / "train_annotation.json").write_bytes(content)
        return write(read_bcidr(here), kind)

    def read_r(content: bytes, kind: str) -> object:
        (here / "annotation.json").write_bytes(content)
        return write(read_r2gen(here, views=kind), kind)

    def read_c(content: bytes, _: str) -> object:
        (here / "labels.csv").write_bytes(content)
        return read_cifar(here, "fine")

    manifest = "\n".join(map(json.dumps, lines)).encode()
    annotation, others = json.dumps(bcidr).encode(), json.dumps(r2gen).encode()
    return [
        Reader(
            name="import manifest",
            seeds=[(manifest, mutate_lines, ""), (manifest, mutate_lines, "salted")],
            read=read_lines,
        ),
        Reader(name="bcidr", seeds=[(annotation, mutate_json, ""), (annotation, mutate_json, "salted")], read=read_b),
        Reader(name="r2gen", seeds=[(others, mutate_json, kind) for kind in ("first", "each")], read=read_r),
        Reader(name="cifar table", seeds=[(table.encode(), mutate_bytes, "")], read=read_c),
    ]


# ------------------------------------------------------------------------------------------------------- configurations


def _configurations(folder: Path) -> list[Reader]:
    runs = sorted((folder / "launch" / "configs").rglob("*.yaml"))
    resolved = as_yaml(load_config(folder / "launch" / "configs" / "demo.yaml")).encode()
    kinds = ["overlay" if path.parent.name == "baselines" else "file" for path in runs]
    seeds = [(path.read_bytes(), mutate_yaml, kind) for path, kind in zip(runs, kinds)]
    seeds += [(resolved, mutate_yaml, "file")] * 5
    overrides = ["train.epochs=3", "blend.beta={kind: linear, start: 0.1}", "model.image.stage_channels=[8, 8, 8, 8]"]
    seeds += [(override.encode(), mutate_yaml, "override") for override in overrides]
    searches = [(path.read_bytes(), mutate_yaml, "") for path in sorted((folder / "tune").glob("*.yaml"))]

    def read(content: bytes, kind: str) -> object:
        if kind == "override":
            return load_config("launch/configs/demo.yaml", [content.decode("utf-8", "surrogateescape")])
        (folder / "mutated.yaml").write_bytes(content)
        if kind == "overlay":
            return load_config("launch/configs/demo.yaml", ["mutated.yaml"])
        return load_config("mutated.yaml", ["data.shards=x"])

    def search(content: bytes, _: str) -> object:
        (folder / "search.yaml").write_bytes(content)
        found = load_search("search.yaml")
        return found.as_yaml()

    return [
        Reader(name="configuration", seeds=seeds, read=read),
        Reader(name="search file", seeds=searches, read=search),
    ]


# -------------------------------------------------------------------------------------------------------------- weights


def _models(folder: Path) -> list[Reader]:
    weights_folder = folder / "pretrained"
    weights_folder.mkdir()
    here, _ = untrained_run(tiny_config(folder / "plain", folder / "runs"))
    good = {name: (here / name).read_bytes() for name in (CARD, WEIGHTS)}
    checkpoint = checkpoints(here)[-1]
    saved = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in GoogLeNet(GoogLeNetImageModel()).state_dict().items()}
    weights = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}  # one number in the file each
    torch.save(weights, weights_folder / "w.pth")
    torch.save(weights, weights_folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"conv1.conv.weight": torch.zeros(64, 3, 7, 7)}, weights_folder / FEW)

    def put(into: Path, files: dict[str, bytes], name: str, content: bytes) -> None:
        for other, original in files.items():
            (into / other).write_bytes(content if other == name else original)

    def model(content: bytes, name: str) -> object:
        put(here, good, name, content)
        return load_model(here)

    def check(content: bytes, name: str) -> object:
        put(checkpoint, saved, name, content)
        if name != "SHA256SUMS":  # whoever changes a file on purpose makes its checksum right
            sums = [f"{sha256_of(checkpoint / one)}  {one}\n" for one in saved if one != "SHA256SUMS"]
            (checkpoint / "SHA256SUMS").write_text("".join(sums))
        return load_checkpoint(checkpoint)

    def pretrained(content: bytes, name: str) -> object:
        path = weights_folder / f"mutated{Path(name).suffix}"
        path.write_bytes(content)
        return pretrained_weights(ModelConfig(image=GoogLeNetImageModel(pretrained=str(path))))

    mutate = {".json": mutate_json, ".safetensors": mutate_safetensors, "": mutate_bytes}
    files = {name: (weights_folder / name).read_bytes() for name in ("w.pth", "old.pth", FEW)}
    by_name = {"w.pth": mutate_zip, "old.pth": mutate_bytes, FEW: mutate_safetensors}
    return [
        Reader(name="model", seeds=[(raw, mutate[Path(name).suffix], name) for name, raw in good.items()], read=model),
        Reader(
            name="checkpoint",
            seeds=[(raw, mutate[Path(name).suffix], name) for name, raw in saved.items()],
            read=check,
        ),
        Reader(
            name="pretrained weights",
            seeds=[(raw, by_name[name], name) for name, raw in files.items()],
            read=pretrained,
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- records


def _records(folder: Path) -> list[Reader]:
    here = folder / "records"
    (here / "t").mkdir(parents=True)
    store = {"uri": "http://127.0.0.1:9", "experiment_id": "1", "run_id": "0" * 32}
    points = [
        {
            "step": step,
            "time": 1.7e9 + step,
            "metrics": {"val/score": 0.5, "progress/epoch": 1.0, "train/loss_m": "nan"},
        }
        for step in range(4)
    ]
    unsent = [
        {"kind": "metrics", "step": 1, "time_ms": 1, "values": {"a": 1.0}, "once": True},
        {"kind": "tags", "values": {"a": "b"}},
        {"kind": "artifact", "path": "config.yaml", "folder": ""},
        {"kind": "status", "status": "FINISHED", "time_ms": 1},
    ]
    record = {
        "number": 1,
        "name": "t",
        "point": {"blend.beta": 0.5, "x": None, "y": "full"},
        "status": "finished",
        "reason": "",
        "segments": [{"number": 0, "parent": None, "point": {"a": 1}, "first_step": 0, "last_step": 9}],
        "config": {"train": {"seed": 0}},
        "weights": 10,
        "flops": 100,
        "run_id": "ab",
        "seconds": 1.5,
    }
    files = {
        METRICS_NAME: "\n".join(map(json.dumps, points)).encode(),
        RUN_NAME: json.dumps(store).encode(),
        UNSENT_NAME: "\n".join(map(json.dumps, unsent)).encode(),
    }

    def tracked(content: bytes, name: str) -> object:
        for other, original in files.items():
            (here / "t" / other).write_bytes(content if other == name else original)
        found = read_metrics(here / "t" / METRICS_NAME), reports_of(here / "t"), run_id_of(here / "t")
        if name == UNSENT_NAME:  # no store answers: all is kept again
            end_run(here / "t", "FINISHED", {})
        return found

    def ledger(content: bytes, _: str) -> object:
        (here / "t.json").write_bytes(content)
        return Ledger(here).read()

    return [
        Reader(
            name="run record",
            seeds=[(raw, mutate_json if name == RUN_NAME else mutate_lines, name) for name, raw in files.items()],
            read=tracked,
        ),
        Reader(name="search ledger", seeds=[(json.dumps(record).encode(), mutate_json, "")], read=ledger),
    ]


# ------------------------------------------------------------------------------------------------------------- pictures


def _pictures(folder: Path) -> list[Reader]:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (33, 29, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (33, 29), dtype=np.uint16))
    seeds: list[tuple[bytes, Mutate, str]] = []
    for suffix, picture, options in (
        ("jpg", image, {}),
        ("jpg", image, {"progressive": True, "exif": _exif()}),
        ("jpg", image.convert("CMYK"), {}),
        ("png", image, {"exif": _exif()}),
        ("png", image.convert("P"), {"transparency": 3}),
        ("png", deep, {}),
        ("tif", image, {"compression": "tiff_lzw", "exif": _exif()}),
        ("tif", deep, {}),
        ("webp", image, {"lossless": True, "exif": _exif()}),
        ("webp", image.convert("RGBA"), {"save_all": True, "append_images": [image.convert("RGBA").rotate(9)]}),
    ):
        buffer = io.BytesIO()
        names = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP"}
        picture.save(buffer, format=names[suffix], **options)
        seeds.append((buffer.getvalue(), mutate_png if suffix == "png" else mutate_bytes, suffix))
    path = folder / "picture"

    def read(content: bytes, _: str) -> object:
        square = fit_to_square(decode_image(content, "image"), 32, "pad")
        try:
            decode_mask(content, "mask")
        except InputError as error:
            assert str(error).startswith("mask")
        return square

    def prepare(content: bytes, suffix: str) -> object:
        named = path.with_suffix(f".{suffix}")
        named.write_bytes(content)
        return prepare_pixels(named, None, "image", 16 if len(content) % 2 else None)

    made = [Reader(name="image", seeds=seeds, read=read), Reader(name="image import", seeds=seeds, read=prepare)]
    try:
        from tests.test_importers import dicom_file

        scans = [rng.integers(0, 4096, (20, 30), dtype=np.uint16), rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)]
        files = [_same_uids(dicom_file(scan)) for scan in scans]
    except ImportError:
        return made
    return [*made, Reader(name="dicom", seeds=[(raw, mutate_bytes, "dcm") for raw in files], read=prepare)]


def _same_uids(raw: bytes) -> bytes:
    """The file with identifiers that are the same each time it is made."""
    import pydicom

    data = pydicom.dcmread(io.BytesIO(raw))
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data, enforce_file_format=True)
    return buffer.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "someone"
    return exif


def _pickles(folder: Path) -> list[Reader]:
    batch = {"data": np.arange(64, dtype=np.uint8).reshape(2, 32), "labels": [1, 2], "filenames": ["a.png", "b.png"]}
    path = folder / "batch"

    def read(content: bytes, _: str) -> object:
        path.write_bytes(content)
        try:
            return [value.values() for value in read_plain_pickle(path).values() if isinstance(value, PickledArray)]
        except ValueError as error:  # `values` documents it; the importer names the file
            return str(error)

    seeds = [(pickle.dumps(batch, protocol), mutate_bytes, "") for protocol in (0, 2, 4, 5)]
    return [Reader(name="pickled arrays", seeds=seeds, read=read)]
