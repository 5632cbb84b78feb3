"""All ranks train on one set, whose fingerprint tells it from others; what is no fault of a set is not left out."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mdnet_dist import run
from mdnet_dist.engine import start_processes
from mdnet_dist.errors import InputError
from mdnet_dist.evaluation import evaluate
from mdnet_dist.reading import Skipping, read_in_order, sound_samples
from mdnet_dist.run_data import open_data, open_part
from mdnet_dist.run_folder import EXPLAINED, SERVED
from mdnet_dist.saved import open_model
from mdnet_dist.shard_cache import CacheError
from mdnet_dist.shards import ShardManifest, fingerprint, load_manifest
from mdnet_dist.storage import open_source
from mdnet_dist.tracking_files import METRICS_NAME
from tests.ranks import run_ranks
from tests.saved import untrained_run
from tests.test_remote import Handler, Server, answers, good
from tests.tiny import tiny_config, tiny_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    tiny_set(path)
    return path


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# ---------------------------------------------------------------------------------------------------------- fingerprint


def shuffled(manifest: ShardManifest) -> ShardManifest:
    return replace(manifest, shards=[*manifest.shards[1:], manifest.shards[0]])


def with_part(manifest: ShardManifest, part: str, **changed: Any) -> ShardManifest:
    return replace(manifest, parts={**manifest.parts, part: replace(manifest.parts[part], **changed)})


def with_shard(manifest: ShardManifest, number: int, **changed: Any) -> ShardManifest:
    shards = list(manifest.shards)
    shards[number] = replace(shards[number], **changed)
    return replace(manifest, shards=shards)


@pytest.mark.parametrize(
    "change",
    [
        shuffled,
        lambda m: replace(m, topics=m.topics[::-1]),
        lambda m: replace(m, classes=m.classes[::-1]),
        lambda m: with_part(m, "train", words={**m.parts["train"].words, "more": 1}),
        lambda m: with_part(m, "train", words={**m.parts["train"].words, "large": 1}),
        lambda m: with_part(m, "train", image_mean=[0.1, 0.2, 0.3]),
        lambda m: with_shard(m, 0, sha256="0" * 64),
        lambda m: with_shard(m, 0, samples=m.shards[0].samples - 1),
        lambda m: replace(m, shards=m.shards[1:]),
    ],
)
def test_another_set_has_another_fingerprint(folder: Path, change: Callable[[ShardManifest], ShardManifest]) -> None:
    manifest = load_manifest(folder)
    assert change(manifest) != manifest
    assert fingerprint(change(manifest), ["train"]) != fingerprint(manifest, ["train"])


def test_what_training_does_not_read_is_not_in_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    manifest = load_manifest(folder)
    expected = fingerprint(manifest, ["train"])
    assert len(expected) == 64
    val = next(number for number, shard in enumerate(manifest.shards) if shard.part == "val")
    for same in (
        replace(manifest, name="another"),
        with_shard(manifest, 0, file="renamed.tar"),
        with_shard(manifest, val, sha256="0" * 64),
        with_part(manifest, "val", words={}),
    ):
        assert same != manifest and fingerprint(same, ["train"]) == expected
    assert fingerprint(manifest, ["train", "val"]) != expected
    assert fingerprint(tiny_set(tmp_path / "again"), ["train"]) == expected, "the same set, written again"
    assert fingerprint(tiny_set(tmp_path / "other", seed=1), ["train"]) != expected
    with pytest.raises(InputError, match="part 'trian' is not in this shard set"):
        fingerprint(manifest, ["trian"])


def test_a_run_knows_its_set(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, tmp_path)
    data = open_data(config)
    assert data.fingerprint == fingerprint(load_manifest(folder), ["train"])
    assert open_part(config, data.card, "test")[0].fingerprint == data.fingerprint


# ---------------------------------------------------------------------------------------------------------------- ranks


def remote_config(address: str, folder: Path, **overrides: Any) -> Any:
    values = {"shards": address, "cache": str(folder / "cache"), "remote_patience_seconds": 0.0, **overrides}
    return tiny_config(Path("unused"), folder / "runs", {f"data.{key}": value for key, value in values.items()})


def opened_on_rank(address: str, folder: str) -> list[tuple[str, str]]:
    """What a rank reads, twice, or what it says: fingerprint, message."""
    start_processes()
    config = remote_config(address, Path(folder))
    found: list[tuple[str, str]] = []
    card: Any = None
    for part in (None, "test"):
        try:
            data = open_data(config) if part is None else open_part(config, card, part)[0]
            card = card or data.card
            found.append((data.fingerprint, data.manifest.name))
        except InputError as error:
            found.append(("", str(error)))
    return found


@pytest.mark.slow
def test_ranks_read_one_manifest_while_a_set_is_replaced(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked a second time would get another set."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    raw = json.loads((server.folder / "manifest.json").read_text())

    def named(name: str) -> Callable[[Handler, bytes], None]:
        content = json.dumps({**raw, "name": name, "topics": [*raw["topics"], name]}).encode()
        return lambda handler, _: good(handler, content)

    server.behaviours["manifest.json"] = [named(name) for name in ("first", "second", "third", "fourth")]
    one, other = run_ranks(opened_on_rank, 2, server.address, str(tmp_path))
    assert one == other
    assert [name for _, name in one] == ["first", "second"]
    assert server.requests["manifest.json"] == 2, "one for each of the two times"


@pytest.mark.slow
def test_a_manifest_that_cannot_be_read_is_every_rank_s_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request fails, those behind it would not."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server.behaviours["manifest.json"] = [answers(403), good, answers(500)]
    address, refused = server.address, "the server answers 403 Forbidden"

    one, other = run_ranks(opened_then_refused, 2, address, str(tmp_path))
    assert one == other
    assert one[0] == f"{address}/manifest.json: {refused}"
    assert one[1].startswith(f"{address}/manifest.json: the server answers 500")
    assert server.requests["manifest.json"] == 3


def opened_then_refused(address: str, folder: str) -> list[str]:
    """The messages of two refusals, with a good reading between them."""
    start_processes()
    config = remote_config(address, Path(folder))
    said = []
    try:
        open_data(config)
    except InputError as error:
        said.append(str(error))
    card = open_data(config).card
    try:
        open_part(config, card, "test")
    except InputError as error:
        said.append(str(error))
    return said


# ------------------------------------------------------------------------------------------------- one's own disk


@pytest.mark.parametrize("damaged", ["strict", "skip"])
@pytest.mark.parametrize(
    ("cache", "gib", "message"),
    [("file/cache", 1.0, "cannot keep a shard of"), ("cache", 1e-6, "data.cache_gib allows 1,073 bytes, but a shard")],
)
def test_a_cache_that_cannot_be_used_is_no_damage(
    server: Server, tmp_path: Path, damaged: str, cache: str, gib: float, message: str
) -> None:
    (tmp_path / "file").touch()
    config = remote_config(
        server.address, tmp_path, cache=str(tmp_path / cache), cache_gib=gib, damaged=damaged, most_damaged=1.0
    )
    data = open_data(config)
    source, shards = open_source(config.data), data.manifest.shards_of(["train"])
    skipping = Skipping() if damaged == "skip" else None
    reads: list[Callable[[], Any]] = [
        lambda: list(sound_samples(source, shards, skipping)),
        lambda: list(read_in_order(source, shards, np.arange(3), 0, skipping)),
        lambda: list(data.training_batches(config, 0, 3, False)),
        lambda: list(data.evaluation_batches(config, ["test"], False)),
    ]
    for read in reads:
        with pytest.raises(CacheError, match=message) as caught:
            read()
        assert str(caught.value).startswith(f"{tmp_path / cache}: ")
    assert not [name for name in server.requests if name.endswith(".tar")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_loader_process_says_so_too(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    config = remote_config(server.address, tmp_path, cache=cache, damaged="skip", most_damaged=1.0, workers=1)
    with pytest.raises(CacheError, match="cannot keep a shard of"):
        list(open_data(config).training_batches(config, 0, 3, False))


# ------------------------------------------------------------------------------------------------- the end of training


@pytest.mark.parametrize("gone", [False, True])
def test_a_finished_run_needs_no_server_any_more(
    gone: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pages on single images read the shards once more; what is gone by then ends no run of days before its model."""
    shards = shutil.copytree(folder, tmp_path / "set")
    config = tiny_config(shards, tmp_path / "runs", {"evaluate.pictures": 2})
    path, card = untrained_run(config)
    data = open_data(config)
    network, _, _ = open_model(path)
    test = evaluate(network, card, data.evaluation_batches(config, ["test"], False), device=torch.device("cpu"))
    (path / METRICS_NAME).touch()
    for name in ("draw_training_curves", "draw_evaluation"):
        monkeypatch.setattr(run, name, lambda *_: None)
    trainer: Any = SimpleNamespace(config=config, folder=path, data=data, device=torch.device("cpu"))
    if gone:
        for shard in shards.glob("test-*.tar"):
            shard.unlink()
    result = run.Result(folder=path, metrics={}, test=test, data=data, nltk_data=tmp_path)
    logged: list[str] = []
    tracker: Any = SimpleNamespace(log_artifact=lambda path, *_: logged.append(path.name), log_tags=lambda _: None)
    run._log_results(trainer, result, tracker)
    said = capsys.readouterr().out
    assert (path / SERVED / "MLmodel").is_file() and "MLmodel" in logged
    assert (path / EXPLAINED / "index.html").is_file() != gone
    assert ("explained" in logged) != gone
    assert ("no page" in said and "but it is not there; `launch/explain.py`" in said) == gone
