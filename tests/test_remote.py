"""Shards at an address, over a server of our own that fails in every way, and over stand-ins for object stores."""

from __future__ import annotations

import gc
import http.server
import io
import json
import logging
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import unquote

import pytest
from fsspec.implementations.http import HTTPFileSystem
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils.data import DataLoader, Dataset

from mdnet_dist import remote
from mdnet_dist.config import AugmentConfig, DataConfig, TrainConfig
from mdnet_dist.data import Encoder, Loader, TrainingStream
from mdnet_dist.errors import InputError
from mdnet_dist.remote import PACKAGES, RemoteSource
from mdnet_dist.shards import ShardInfo, ShardManifest, sha256_of
from mdnet_dist.storage import LocalSource, open_source
from mdnet_dist.vocabulary import Vocabulary
from tests.tiny import tiny_set

# ---------------------------------------------------------------------------------------------------- the server


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `behaviours[name]` says how the next requests for a file end; after them it is served well."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.behaviours: dict[str, list[Behaviour]] = {}
        self.sent_bytes = 0
        self.password: str | None = None
        self.over = threading.Event()
        self.in_use: set[threading.Thread] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set"

    def handle_error(self, request, client_address) -> None:
        """Readers hang up in the middle; that is what is tested."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/set/")
        self.server.requests[name] += 1
        if self.server.password and self.headers.get("Authorization") != "Basic " + self.server.password:
            self.send_error(401)
            return
        waiting = self.server.behaviours.get(name, [])
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        (waiting.pop(0) if waiting else good)(self, path.read_bytes())

    def start(self, length: int | None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def send(self, block: bytes) -> None:
        self.wfile.write(block)
        self.server.sent_bytes += len(block)

    def log_message(self, *_: object) -> None:
        pass


Behaviour = Callable[[Handler, bytes], None]


def good(handler: Handler, content: bytes) -> None:
    handler.start(len(content))
    handler.send(content)


def answers(code: int) -> Behaviour:
    return lambda handler, content: handler.send_error(code)


def cut_off(handler: Handler, content: bytes) -> None:
    handler.start(len(content))
    handler.send(content[: len(content) // 2])


def shorter(handler: Handler, content: bytes) -> None:
    handler.start(None)  # no length is said, so that the end of the connection is the end of the file
    handler.send(content[:-7])


def longer(handler: Handler, content: bytes) -> None:
    handler.start(len(content) + 7)
    handler.send(content + b"1234567")


def other_bytes(handler: Handler, content: bytes) -> None:
    handler.start(len(content))
    handler.send(content[:-1] + bytes([content[-1] ^ 1]))


def endless(handler: Handler, content: bytes) -> None:
    handler.start(None)
    while not handler.server.over.is_set():
        handler.send(content)


def silent(handler: Handler, content: bytes) -> None:
    handler.start(len(content))
    handler.send(content[:100])
    handler.wfile.flush()
    handler.server.over.wait(60)


def silent_at_once(handler: Handler, content: bytes) -> None:
    handler.server.over.wait(60)


def slow(handler: Handler, content: bytes) -> None:
    """Longer than the time limit in all, with shorter silences."""
    handler.start(len(content))
    step = len(content) // 8 + 1
    for place in range(0, len(content), step):
        handler.send(content[place : place + step])
        handler.wfile.flush()
        time.sleep(0.2)


def packed(handler: Handler, content: bytes) -> None:
    assert handler.headers["Accept-Encoding"] == "identity"
    good(handler, content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    tiny_set(path)
    return path


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_reader_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while [thread for thread in threading.enumerate() if thread.name == "shard-download"]:
        assert time.monotonic() < deadline, "a reader that was given up has not ended"
        time.sleep(0.05)


@pytest.fixture(autouse=True, scope="module")
def nothing_to_complain_of() -> Iterator[None]:
    """asyncio and aiohttp log connections dropped open; of files and sockets Python warns, and pytest fails."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("asyncio", "aiohttp", "fsspec")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    gc.collect()
    for logger in loggers:
        logger.removeHandler(handler)
    assert said == []


def settings(server: Server | str, cache: Path, **changed: object) -> DataConfig:
    address = server if isinstance(server, str) else server.address
    values = {"shards": address, "cache": str(cache), "remote_timeout_seconds": 20.0, "image_size": 32}
    values["remote_patience_seconds"] = 1.0
    return DataConfig.model_validate(values | changed)


@pytest.fixture
def source(server: Server, tmp_path: Path) -> RemoteSource:
    return RemoteSource(settings(server, tmp_path / "cache"))


@pytest.fixture
def hasty(server: Server, tmp_path: Path) -> RemoteSource:
    """One that gives up what is silent for half a second, the third time."""
    return RemoteSource(settings(server, tmp_path / "cache", remote_timeout_seconds=0.5, remote_patience_seconds=0.8))


@pytest.fixture
def shard(folder: Path) -> ShardInfo:
    return LocalSource(folder).manifest().shards[0]


def bytes_of(source: RemoteSource, shard: ShardInfo) -> bytes:
    with source.open(shard) as file:
        return file.read()


# ----------------------------------------------------------------------------------------------------- addresses

READ = ", ".join(f"{name}://" for name in PACKAGES)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("file:///etc", "file:///etc"),
        ("pipe:cat::http://host/set", "pipe:cat::http://host/set"),
        ("pipe://cat", "pipe://cat"),
        ("simplecache::s3://bucket/set", "simplecache::s3://bucket/set"),
        ("https://host/a.zip::memory://x", "https://host/a.zip::memory://x"),
        ("http://[::1]/set::file:///etc", "http://[::1]/set::file:///etc"),
        ("zip://set::https://host/a.zip", "zip://set::https://host/a.zip"),
        ("memory://set", "memory://set"),
        ("ssh://me@host/set", "ssh://host/set"),
        ("reference://set", "reference://set"),
        ("HTTP://host/set", "HTTP://host/set"),
        ("://host", "://host"),
    ],
)
def test_other_addresses_are_refused(address: str, shown: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_source(settings(address, tmp_path / "cache"))
    assert str(caught.value) == (
        f"data.shards: {shown} is neither a folder nor an address that is read; these are: {READ}. No program is run "
        "for data, and addresses are not chained"
    )


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://", "http://"),
        ("s3:///", "s3:///"),
        ("https://host/set?token=secret", "https://host/set"),
        ("https://me@host/set#secret", "https://host/set"),
        ("https://host/a set", "https://host/a"),
    ],
)
def test_addresses_that_take_no_file_name_are_refused(address: str, shown: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        # A configuration refuses most of them itself.
        RemoteSource(settings("http://host", tmp_path / "cache").model_copy(update={"shards": address}))
    assert str(caught.value) == (
        f"data.shards: no file name can be added to {shown}...; give the address of the set's folder, no ? or #"
    )


@given(address=st.text(st.sampled_from("ahtps3:/@[]:?# .x"), max_size=25) | st.text(max_size=20))
def test_any_address_is_checked_or_refused(address: str) -> None:
    try:
        scheme = remote._checked_scheme(address)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert address.startswith(f"{scheme}://")
        assert scheme in PACKAGES


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("gcs", "gcsfs"), ("abfs", "adlfs")])
def test_a_missing_package_is_named(scheme: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(InputError) as caught:
        RemoteSource(settings(f"{scheme}://bucket/set", tmp_path))
    assert str(caught.value) == (
        f"data.shards: {scheme}:// needs a package that is not installed; `pip install -c constraints.txt {package}`"
    )


# ------------------------------------------------------------------------------------------------- good and bad


def test_a_remote_set_is_what_lies_in_its_folder(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is asked for once, whoever reads it again and whenever."""
    local = LocalSource(folder)
    for _ in range(2):
        source = RemoteSource(settings(server.address + "/", tmp_path / "cache"))
        assert source.manifest() == local.manifest()
        for shard in local.manifest().shards * 2:
            source.check(shard)
            assert source.name_of(shard) == f"{server.address}/{shard.file}"
            with local.open(shard) as file:
                assert bytes_of(source, shard) == file.read()
    assert server.requests == {"manifest.json": 2} | {shard.file: 1 for shard in local.manifest().shards}


@pytest.mark.parametrize(
    "behaviour",
    [answers(500), answers(503), answers(429), cut_off, shorter, longer, other_bytes, endless],
)
def test_what_passes_is_tried_again(
    server: Server, source: RemoteSource, shard: ShardInfo, folder: Path, behaviour: Behaviour
) -> None:
    server.behaviours[shard.file] = [behaviour, behaviour]
    assert bytes_of(source, shard) == (folder / shard.file).read_bytes()
    assert server.requests[shard.file] == 3


@pytest.mark.parametrize("behaviour", [silent, silent_at_once])
def test_silence_may_pass(
    server: Server, hasty: RemoteSource, shard: ShardInfo, folder: Path, behaviour: Behaviour
) -> None:
    server.behaviours[shard.file] = [behaviour]
    assert bytes_of(hasty, shard) == (folder / shard.file).read_bytes()
    server.behaviours["manifest.json"] = [behaviour]
    assert hasty.manifest() == LocalSource(folder).manifest()


@pytest.mark.parametrize("behaviour", [answers(500), cut_off])
def test_a_manifest_is_tried_again(server: Server, source: RemoteSource, folder: Path, behaviour: Behaviour) -> None:
    server.behaviours["manifest.json"] = [behaviour, behaviour]
    assert source.manifest() == LocalSource(folder).manifest()


OVER = r"\(attempt (\d+); data\.remote_patience_seconds [\d.]+ is over\)"
STALLED = r"no byte came for 0\.5 s; data\.remote_timeout_seconds allows longer " + OVER


@pytest.mark.parametrize(
    ("behaviour", "reason", "requests"),
    [
        (answers(403), "the server answers 403 Forbidden", 1),
        (answers(404), "no such file there; a set has its manifest.json and every shard that it lists", 1),
        (shorter, "{less} bytes, but the manifest says {size}; copy it again (attempt 3 of 3)", 3),
        (longer, "more than the {size} bytes that the manifest says; copy it again (attempt 3 of 3)", 3),
        (endless, "more than the {size} bytes that the manifest says; copy it again (attempt 3 of 3)", 3),
        (other_bytes, "its checksum differs from the manifest's; copy it again (attempt 3 of 3)", 3),
    ],
)
def test_what_stays_wrong_is_said(
    server: Server,
    source: RemoteSource,
    shard: ShardInfo,
    tmp_path: Path,
    behaviour: Behaviour,
    reason: str,
    requests: int,
) -> None:
    server.behaviours[shard.file] = [behaviour] * 3
    with pytest.raises(InputError) as caught:
        source.open(shard)
    expected = reason.format(size=shard.bytes, less=shard.bytes - 7)
    assert str(caught.value) == f"{server.address}/{shard.file}: {expected}"
    assert server.requests[shard.file] == requests
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [(answers(500), "the server answers 500 Internal Server Error"), (cut_off, ".*Not enough data.*")],
)
def test_what_does_not_pass_is_given_up_when_the_time_is_over(
    server: Server, source: RemoteSource, shard: ShardInfo, behaviour: Behaviour, reason: str
) -> None:
    """Not after a number of attempts, of which a second holds many here."""
    server.behaviours[shard.file] = [behaviour] * 99
    before = time.monotonic()
    with pytest.raises(InputError) as caught:
        source.open(shard)
    assert 1 <= time.monotonic() - before < 4
    found = re.fullmatch(rf"{server.address}/{shard.file}: {reason} {OVER}", str(caught.value))
    assert found, str(caught.value)
    assert server.requests[shard.file] == int(found[1]) > 4


def test_wrong_bytes_between_failures_count_for_themselves(
    server: Server, source: RemoteSource, shard: ShardInfo
) -> None:
    server.behaviours[shard.file] = [answers(500), other_bytes, cut_off, other_bytes, answers(503), other_bytes]
    with pytest.raises(InputError, match=r"its checksum differs .* \(attempt 3 of 3\)$"):
        source.open(shard)
    assert server.requests[shard.file] == 6


@pytest.mark.parametrize("behaviour", [silent, silent_at_once])
def test_silence_ends(server: Server, hasty: RemoteSource, shard: ShardInfo, behaviour: Behaviour) -> None:
    server.behaviours[shard.file] = [behaviour] * 9
    before = time.monotonic()
    with pytest.raises(InputError) as caught:
        hasty.open(shard)
    assert re.fullmatch(f"{server.address}/{shard.file}: {STALLED}", str(caught.value))
    assert 1.2 < time.monotonic() - before < 5


def test_nobody_listens(
    tmp_path: Path, shard: ShardInfo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        source = RemoteSource(settings(address, tmp_path, remote_patience_seconds=0.1))
        for name, read in (("manifest.json", source.manifest), (shard.file, lambda: source.open(shard))):
            with pytest.raises(InputError, match=rf"^{address}/{name}: Cannot connect to host .* {OVER}$"):
                read()
            # Who waits is told so, once, or a wrong address would look like a hang.
            told = capsys.readouterr().out
            assert re.fullmatch(rf"{address}/{name}: Cannot connect to host .*; trying again for 0\.1 s\n", told)


def test_an_outage_is_outlasted(server: Server, tmp_path: Path, shard: ShardInfo, folder: Path) -> None:
    """Nobody listens for a while, at the address of a server that was there before."""
    source = RemoteSource(settings(server, tmp_path / "cache", remote_patience_seconds=20.0))
    source.manifest()
    server.server_close()
    again: list[Server] = []

    def come_back() -> None:
        time.sleep(1)
        again.append(Server(folder, server.server_address[1]))
        again[0].serve_forever(poll_interval=0.05)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        assert bytes_of(source, shard) == (folder / shard.file).read_bytes()
    finally:
        while not again:
            time.sleep(0.05)
        again[0].shutdown()
        thread.join()
        again[0].server_close()


def test_an_endless_body_is_not_read_on(server: Server, tmp_path: Path, shard: ShardInfo) -> None:
    source = RemoteSource(settings(server, tmp_path))
    server.behaviours[shard.file] = [endless] * 3
    with pytest.raises(InputError, match="more than"):
        source.open(shard)
    time.sleep(0.2)
    sent = server.sent_bytes
    time.sleep(0.3)
    assert server.sent_bytes == sent
    most = (remote.BLOCKS_AHEAD + 2) * remote.BLOCK_BYTES + (1 << 24)  # what waits, and what the system's buffers hold
    assert sent < 3 * (shard.bytes + most)


def test_no_file_and_no_connection_stays_open(server: Server, hasty: RemoteSource, folder: Path) -> None:
    def held() -> int:
        gc.collect()
        time.sleep(0.2)  # the server's side
        return len(list(Path("/proc/self/fd").iterdir()))

    shards = LocalSource(folder).manifest().shards
    hasty.manifest()
    before = held()
    for shard in shards[:5]:
        for behaviour in (answers(404), cut_off, other_bytes, endless):
            server.behaviours[shard.file] = [behaviour] * 99
            with pytest.raises(InputError):
                hasty.open(shard)
            server.behaviours.clear()
        bytes_of(hasty, shard)
    assert held() <= before + 2


def test_a_slow_server_is_waited_for(server: Server, shard: ShardInfo, folder: Path, tmp_path: Path) -> None:
    source = RemoteSource(settings(server, tmp_path, remote_timeout_seconds=1.0))
    server.behaviours[shard.file] = [slow]
    before = time.monotonic()
    assert bytes_of(source, shard) == (folder / shard.file).read_bytes()
    assert time.monotonic() - before > 1.2
    assert server.requests[shard.file] == 1


def test_bytes_are_asked_for_as_they_are(server: Server, source: RemoteSource, shard: ShardInfo, folder: Path) -> None:
    server.behaviours[shard.file] = [packed]
    assert bytes_of(source, shard) == (folder / shard.file).read_bytes()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"format": 99}'])
def test_a_manifest_that_is_none_is_named(server: Server, source: RemoteSource, content: bytes) -> None:
    server.behaviours["manifest.json"] = [lambda handler, _: good(handler, content)]
    with pytest.raises(InputError, match=f"^{server.address}/manifest.json: "):
        source.manifest()
    assert server.requests["manifest.json"] == 1


def test_a_manifest_is_bounded(server: Server, source: RemoteSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_MANIFEST_BYTES", 100_000)
    server.behaviours["manifest.json"] = [endless]
    with pytest.raises(InputError) as caught:
        source.manifest()
    assert str(caught.value) == (
        f"{server.address}/manifest.json: larger than 100,000 bytes; that is no shard manifest"
    )


def test_pauses_grow_and_fill_the_time(
    server: Server, tmp_path: Path, shard: ShardInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes only while one pauses: ten minutes of outage by default."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 1.0)
    pauses: list[float] = []

    def unavailable() -> bytes:
        raise remote._Failed("away", again=True)

    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: 5.0 + sum(pauses), sleep=pauses.append))
    default = DataConfig(shards=server.address, cache=str(tmp_path))
    source = RemoteSource(default)
    with pytest.raises(InputError, match=r"^x: away \(attempt 16; data.remote_patience_seconds 600 is over\)$"):
        source._tried("x", unavailable)
    assert pauses == [1, 2, 4, 8, 16, 32, *[60] * 8, 57]
    assert default.remote_patience_seconds + default.remote_timeout_seconds < TrainConfig().patience_seconds


@pytest.mark.parametrize(
    "name", ["a b.tar", "50%.tar", "what?.tar", "a#b.tar", "pipe:ls.tar", "a::b.tar", "ä.tar", "*.tar"]
)
def test_odd_file_names_are_only_names(
    server: Server, shard: ShardInfo, folder: Path, tmp_path: Path, name: str
) -> None:
    content = (folder / shard.file).read_bytes()
    server.folder = tmp_path / "set"
    server.folder.mkdir()
    asked: list[str] = []

    def note(handler: Handler) -> None:
        asked.append(handler.path)
        good(handler, content)

    source = RemoteSource(settings(server, tmp_path / "cache"))
    original = Handler.do_GET
    Handler.do_GET = note  # type: ignore[method-assign, assignment]
    try:
        assert bytes_of(source, replace(shard, file=name)) == content
    finally:
        Handler.do_GET = original  # type: ignore[method-assign]
    assert [unquote(path) for path in asked] == [f"/set/{name}"]
    assert not set(asked[0]) & set("?# ")


# ------------------------------------------------------------------------------------------------------ passwords


def test_a_password_opens_and_is_never_shown(server: Server, shard: ShardInfo, folder: Path, tmp_path: Path) -> None:
    server.password = b64encode(b"me:s3cr@t").decode()
    address = server.address.replace("http://", "http://me:s3cr%40t@")
    with pytest.raises(ValidationError, match=r"was given with a password.*~/\.netrc") as refused:
        settings(address, tmp_path)
    assert "s3cr" not in str(refused.value.errors(include_input=False))
    # Whoever makes a source by other ways has nothing to fear either.
    checked = settings(server, tmp_path / "cache", remote_timeout_seconds=0.5, remote_patience_seconds=0.1)
    source = RemoteSource(checked.model_copy(update={"shards": address}))
    assert source.manifest() == LocalSource(folder).manifest()
    assert bytes_of(source, shard) == (folder / shard.file).read_bytes()
    server.password = "another"
    messages = [source.name_of(shard)]
    other = LocalSource(folder).manifest().shards[1]
    for behaviour in (None, answers(404), answers(500), other_bytes, silent, cut_off):
        if behaviour:
            server.password = None
            server.behaviours = {name: [behaviour] * 99 for name in (other.file, "manifest.json")}
        for read in (source.manifest, lambda: source.open(other)):
            with pytest.raises(InputError) as caught:
                read()
            messages.append(str(caught.value))
    assert messages[1] == f"{server.address}/manifest.json: the server answers 401 Unauthorized"
    for text in (*messages, *(path.name for path in (tmp_path / "cache").iterdir())):
        assert "s3cr" not in text
        assert "me:" not in text


def test_a_password_may_lie_in_netrc(
    server: Server, shard: ShardInfo, source: RemoteSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.password = b64encode(b"me:secret").decode()
    with pytest.raises(InputError, match="401 Unauthorized"):
        source.open(shard)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert len(bytes_of(source, shard)) == shard.bytes


# -------------------------------------------------------------------------------------------------- object stores


class Store(AbstractFileSystem):
    """A stand-in for s3fs: `files` maps a path to its content or to what reading it does."""

    protocol = "s3"
    files: ClassVar[dict[str, bytes | Callable[[], bytes]]] = {}
    made_with: ClassVar[list[dict[str, object]]] = []

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.made_with.append(options)

    def _open(self, path: str, mode: str = "rb", **options: object) -> io.BytesIO:
        assert mode == "rb"
        assert options["block_size"] == remote.BLOCK_BYTES
        if path not in self.files:
            raise FileNotFoundError(path)
        content = self.files[path]
        return io.BytesIO(content if isinstance(content, bytes) else content())


@pytest.fixture
def store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteSource:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setitem(_registry, "s3", Store)
    monkeypatch.setattr(Store, "files", {f"bucket/set/{path.name}": path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setattr(Store, "made_with", [])
    values = {"remote_timeout_seconds": 0.5, "remote_patience_seconds": 0.8}
    return RemoteSource(settings("s3://bucket/set", tmp_path / "cache", **values))


def test_an_object_store_is_read(store: RemoteSource, folder: Path) -> None:
    assert store.manifest() == LocalSource(folder).manifest()
    for shard in store.manifest().shards:
        assert bytes_of(store, shard) == (folder / shard.file).read_bytes()
    assert Store.made_with[0] == {"config_kwargs": {"connect_timeout": 0.5, "read_timeout": 0.5}}


@pytest.mark.parametrize(
    ("error", "reason", "times"),
    [
        (PermissionError("Access Denied"), "Access Denied", 1),
        (OSError("s3://me:secret@bucket is busy"), f"s3://bucket is busy {OVER}", 2),
        (RuntimeError(), f"RuntimeError {OVER}", 2),
        (TimeoutError("what it says"), STALLED, 2),
    ],
)
def test_errors_of_an_object_store_are_one_line(
    store: RemoteSource, shard: ShardInfo, error: Exception, reason: str, times: int
) -> None:
    calls: list[int] = []

    def fails() -> bytes:
        calls.append(1)
        raise error

    Store.files[f"bucket/set/{shard.file}"] = fails
    with pytest.raises(InputError) as caught:
        store.open(shard)
    assert re.fullmatch(f"s3://bucket/set/{shard.file}: {reason}", str(caught.value))
    assert len(calls) == 1 if times == 1 else len(calls) >= times
    del Store.files[f"bucket/set/{shard.file}"]
    with pytest.raises(InputError, match="no such file there"):
        store.open(shard)


def test_a_store_that_falls_silent_is_given_up(store: RemoteSource, shard: ShardInfo, folder: Path) -> None:
    """Whatever its own limits are: this one has none."""
    over = threading.Event()

    def hangs() -> bytes:
        over.wait(60)
        return b""

    Store.files[f"bucket/set/{shard.file}"] = hangs
    before = time.monotonic()
    with pytest.raises(InputError) as caught:
        store.open(shard)
    assert re.fullmatch(f"s3://bucket/set/{shard.file}: {STALLED}", str(caught.value))
    assert 1.2 < time.monotonic() - before < 4
    Store.files[f"bucket/set/{shard.file}"] = (folder / shard.file).read_bytes()
    assert len(bytes_of(store, shard)) == shard.bytes, "silent readers are in nobody's way"
    over.set()


# ------------------------------------------------------------------------------------------------ many processes


class Shards(Dataset):
    """Each item is a shard's checksum, computed in the loader process."""

    def __init__(self, source: RemoteSource, manifest: ShardManifest, folder: Path) -> None:
        self.source, self.shards, self.folder = source, manifest.shards, folder

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> tuple[str, int]:
        copy = self.folder / f"{number}.{os.getpid()}"
        copy.write_bytes(bytes_of(self.source, self.shards[number]))
        return sha256_of(copy), os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize("cached_bytes", [None, 1.2])
def test_forked_loaders_read_after_their_parent_has(server: Server, folder: Path, tmp_path: Path, cached_bytes) -> None:
    """fsspec's event loop runs in a thread of the parent, which a fork does not copy."""
    largest = max(shard.bytes for shard in LocalSource(folder).manifest().shards)
    cap = {} if cached_bytes is None else {"cache_gib": cached_bytes * largest / 2**30}
    source = RemoteSource(settings(server, tmp_path / "cache", **cap))
    manifest = source.manifest()
    bytes_of(source, manifest.shards[0])
    (tmp_path / "copies").mkdir()
    for _ in range(3):
        loader = DataLoader(
            Shards(source, manifest, tmp_path / "copies"),
            batch_size=None,
            num_workers=2,
            multiprocessing_context=multiprocessing.get_context("fork"),
        )
        found = list(loader)
        assert [checksum for checksum, _ in found] == [shard.sha256 for shard in manifest.shards]
        assert len({process for _, process in found} | {os.getpid()}) == 3
        assert source.manifest() == manifest, "the parent's connections are its own still"
    shards_asked = sum(server.requests.values()) - server.requests["manifest.json"]
    if cached_bytes is None:
        assert shards_asked == len(manifest.shards)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("behaviour", [good, answers(500), cut_off])
def test_a_child_leaves_its_parents_connections_alone(
    server: Server, tmp_path: Path, shard: ShardInfo, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_by: list[int] = []
    close = HTTPFileSystem.close_session

    def note_and_close(loop: object, session: object) -> None:
        closed_by.append(os.getpid())
        close(loop, session)

    monkeypatch.setattr(HTTPFileSystem, "close_session", staticmethod(note_and_close))
    source = RemoteSource(settings(server, tmp_path / "cache", remote_patience_seconds=0))
    gc.collect()
    gc.disable()
    try:
        server.behaviours[shard.file] = [behaviour]
        if behaviour is good:
            bytes_of(source, shard)
        else:
            with pytest.raises(InputError):
                source.open(shard)
        assert [found for found in gc.get_objects() if type(found) is HTTPFileSystem], "what a collection would find"
        child = os.fork()
        if not child:
            gc.collect()
            os._exit(len(closed_by))
        assert os.waitpid(child, 0) == (child, 0)
        gc.collect()
        assert set(closed_by) == {os.getpid()}
    finally:
        gc.enable()


def stream(config: DataConfig) -> TrainingStream:
    manifest = open_source(config).manifest()
    encoder = Encoder(config, manifest.topics, manifest.classes, Vocabulary(manifest.vocabulary))
    return TrainingStream(
        encoder,
        AugmentConfig(),
        manifest,
        ["train"],
        global_batch=8,
        micro_batch=4,
        seed=0,
        first_step=0,
        steps=7,
        ranks=1,
        rank=0,
    )


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training_reads_the_same_from_an_address(server: Server, folder: Path, tmp_path: Path, workers: int) -> None:
    config = settings(server, tmp_path / "cache")
    there = list(Loader(stream(config), workers))
    here = list(Loader(stream(config.model_copy(update={"shards": str(folder)})), 0))
    assert len(there) == len(here) == 14
    for a, b in zip(there, here, strict=True):
        assert a.keys == b.keys
        assert a.records == b.records
        assert a.masks == b.masks
        for name in ("images", "labels", "tokens", "lengths"):
            assert getattr(a, name).equal(getattr(b, name))
    train = [shard.file for shard in LocalSource(folder).manifest().shards_of(["train"])]
    assert server.requests == {"manifest.json": 1} | dict.fromkeys(train, 1)
    list(Loader(stream(config), workers))
    assert server.requests == {"manifest.json": 2} | dict.fromkeys(train, 1), "a second run downloads nothing"


@pytest.mark.slow
def test_a_loader_tells_what_its_server_does(server: Server, tmp_path: Path, folder: Path) -> None:
    config = settings(server, tmp_path / "cache", remote_patience_seconds=0, remote_timeout_seconds=0.5)
    train = LocalSource(folder).manifest().shards_of(["train"])
    for shard in train:
        server.behaviours[shard.file] = [silent] * 9
    with pytest.raises(InputError, match=r"no byte came for 0.5 s"):
        list(Loader(stream(config), 2))
    assert not multiprocessing.active_children()


def test_a_shard_of_a_false_checksum_names_no_file(server: Server, source: RemoteSource, shard: ShardInfo) -> None:
    with pytest.raises(InputError, match="is not a SHA-256"):
        source.open(replace(shard, sha256="../" * 21 + "a"))
    assert not server.requests


def test_the_manifest_is_what_was_written(server: Server, source: RemoteSource, folder: Path) -> None:
    assert asdict(source.manifest()) == json.loads((folder / "manifest.json").read_text())
