"""Shard sets at an address: the only file that knows fsspec.

What is downloaded is compared with the manifest while it is written (`mdnet_dist.shard_cache` keeps it), each attempt
begins at the file's first byte, and a server that falls silent is given up: a thread reads, this one watches the clock,
so that this holds for any of fsspec's file systems. Each read has connections of its own, because those of a parent
are of no use to the loader processes that are forked from it.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import itertools
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from mdnet_dist.config import DataConfig
from mdnet_dist.console import say
from mdnet_dist.errors import InputError, one_line, without_password
from mdnet_dist.shard_cache import ShardCache
from mdnet_dist.shards import MANIFEST_NAME, ShardInfo, ShardManifest, parse_manifest

PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
"""{beginning of an address: package that fsspec needs for it}. fsspec has others that read local files or run programs;
they are not for shard sets."""
MAX_MANIFEST_BYTES = 1 << 28
BLOCK_BYTES = 1 << 22
"""Read at once. An object store must deliver one within data.remote_timeout_seconds; http is read as it comes."""
BLOCKS_AHEAD = 4
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
WRONG_BYTES_ATTEMPTS = 3

T = TypeVar("T")


class _Failed(Exception):
    """A file could not be read. `again`: another attempt may do better."""

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class _WrongBytes(_Failed):
    """A file was read, but is not what the manifest says. On the way it may have been damaged; twice, hardly."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; copy it again", again=True)


class RemoteSource:
    """A `mdnet_dist.storage.ShardSource` at an address."""

    def __init__(self, config: DataConfig) -> None:
        """Raises: InputError: an address of another kind, or one that needs a package that is not installed."""
        self._address = config.shards.rstrip("/")
        self._scheme = _checked_scheme(config.shards)
        self._shown = without_password(self._address)
        self._timeout_seconds, self._patience_seconds = config.remote_timeout_seconds, config.remote_patience_seconds
        # Who would be refused where another succeeds, by password or patience, must not share the other's failure.
        same = f"{self._address} {self._timeout_seconds} {self._patience_seconds}"
        self._cache = ShardCache(Path(config.cache), int(config.cache_gib * 2**30), same)
        _file_system_class(self._scheme)

    def manifest(self) -> ShardManifest:
        """As `ShardSource.manifest`; read anew each time."""
        where = f"{self._shown}/{MANIFEST_NAME}"
        return parse_manifest(self._tried(where, self._read_manifest), where)

    def open(self, shard: ShardInfo) -> BinaryIO:
        """As `ShardSource.open`; through the cache, from which the shard may be gone at the next call."""

        def download(file: BinaryIO) -> None:
            self._tried(self.name_of(shard), lambda: self._write(shard, file))

        return self._cache.get(shard.sha256, shard.bytes, download)

    def name_of(self, shard: ShardInfo) -> str:
        """As `ShardSource.name_of`."""
        return f"{self._shown}/{shard.file}"

    def check(self, shard: ShardInfo) -> None:
        """As `ShardSource.check`: nothing. Every byte is compared when it is downloaded, and once more when a process
        first takes it from the cache; to do so now would fetch the whole set before the first step."""

    # ---------------------------------------------------------------------------------------------- whole files

    def _tried(self, where: str, read: Callable[[], T]) -> T:
        """Read a file, several times if need be: what may pass for `data.remote_patience_seconds`, and once at least.

        Raises:
            InputError: the last attempt's reason.
        """
        failed_at: float | None = None  # when it first failed in a way that may pass
        wrong = 0
        for attempt in itertools.count(1):
            pause = min(FIRST_PAUSE_SECONDS * 2 ** min(attempt - 1, 6), LONGEST_PAUSE_SECONDS)
            try:
                return read()
            except _WrongBytes as failure:
                wrong += 1
                if wrong == WRONG_BYTES_ATTEMPTS:
                    raise InputError(f"{where}: {failure} (attempt {wrong} of {wrong})") from None
            except _Failed as failure:
                if not failure.again:
                    raise InputError(f"{where}: {failure}") from None
                now, patience = time.monotonic(), self._patience_seconds
                if failed_at is None:
                    failed_at = now
                    if patience > 0:
                        say(one_line(f"{where}: {failure}; trying again for {patience:g} s"))
                left_seconds = failed_at + patience - now
                if left_seconds <= 0:
                    raise InputError(
                        f"{where}: {failure} (attempt {attempt}; data.remote_patience_seconds {patience:g} is over)"
                    ) from None
                pause = min(pause, left_seconds)  # the last attempt is made when the time is over, not a pause before
            time.sleep(pause)
        raise AssertionError("there is always another attempt")

    def _read_manifest(self) -> bytes:
        raw = bytearray()
        with closing(self._blocks(MANIFEST_NAME)) as blocks:
            for block in blocks:
                raw += block
                if len(raw) > MAX_MANIFEST_BYTES:
                    raise _Failed(f"larger than {MAX_MANIFEST_BYTES:,} bytes; that is no shard manifest", again=False)
        return bytes(raw)

    def _write(self, shard: ShardInfo, file: BinaryIO) -> None:
        """Download a shard into a file, from its beginning. Errors of the file itself are not caught here."""
        file.seek(0)
        digest, found_bytes = hashlib.sha256(), 0
        with closing(self._blocks(shard.file)) as blocks:
            for block in blocks:
                found_bytes += len(block)
                if found_bytes > shard.bytes:
                    raise _WrongBytes(f"more than the {shard.bytes} bytes that the manifest says")
                digest.update(block)
                file.write(block)
        if found_bytes < shard.bytes:
            raise _WrongBytes(f"{found_bytes} bytes, but the manifest says {shard.bytes}")
        if digest.hexdigest() != shard.sha256:
            raise _WrongBytes("its checksum differs from the manifest's")

    # --------------------------------------------------------------------------------------------------- blocks

    def _blocks(self, name: str) -> Generator[bytes, None, None]:
        """The bytes of a file of the set, once, as they come; never empty blocks.

        Raises:
            _Failed: it cannot be read, or nothing came for `data.remote_timeout_seconds`.
        """
        make = _file_system_class(self._scheme)  # here, so that the import does not count as silence
        items: queue.Queue[bytes | _Failed] = queue.Queue(BLOCKS_AHEAD)
        unwanted = threading.Event()

        def read() -> None:
            end: bytes | _Failed = b""
            try:
                file_system = make(skip_instance_cache=True, **self._file_system_options())
                with file_system.open(self._place_of(name), "rb", **self._open_options()) as file:
                    while not unwanted.is_set() and (block := file.read(BLOCK_BYTES)):
                        items.put(block)
            except Exception as error:  # whatever a file system raises: aiohttp's, botocore's, the operating system's
                end = self._failure(error)  # text alone: a traceback would hold the connection
            items.put(end)

        reader = threading.Thread(target=read, name="shard-download", daemon=True)
        reader.start()
        try:
            while (item := items.get(timeout=self._timeout_seconds)) and not isinstance(item, _Failed):
                yield item
            reader.join(self._timeout_seconds)
            if isinstance(item, _Failed):
                raise item
        except queue.Empty:
            raise self._stalled() from None
        finally:
            unwanted.set()
            while not items.empty():  # a reader that waits for room puts its block, sees that, and ends
                items.get()

    def _stalled(self) -> _Failed:
        return _Failed(
            f"no byte came for {self._timeout_seconds:g} s; data.remote_timeout_seconds allows longer", again=True
        )

    def _failure(self, error: Exception) -> _Failed:
        """Why a read failed, without passwords, and whether that may pass."""
        if isinstance(error, FileNotFoundError):
            return _Failed("no such file there; a set has its manifest.json and every shard that it lists", again=False)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):  # two classes in Python 3.10
            return self._stalled()
        status = getattr(error, "status", None)
        if isinstance(status, int):
            message = str(getattr(error, "message", ""))
            return _Failed(
                f"the server answers {status} {message:.200}".rstrip(), status in (408, 425, 429) or status >= 500
            )
        reason = without_password(str(error))[:200] or type(error).__name__
        return _Failed(reason, not isinstance(error, (PermissionError, ValueError)))

    def _place_of(self, name: str) -> str:
        return f"{self._address}/{quote(name) if self._scheme in ('http', 'https') else name}"

    def _file_system_options(self) -> dict[str, Any]:
        """What ends a read that nobody waits for any more, where fsspec lets us say it."""
        if self._scheme == "s3":
            seconds = self._timeout_seconds
            return {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
        if self._scheme not in ("http", "https"):
            return {}
        import aiohttp

        seconds = self._timeout_seconds
        timeout = aiohttp.ClientTimeout(total=None, connect=seconds, sock_connect=seconds, sock_read=seconds)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies, and passwords in ~/.netrc

    def _open_options(self) -> dict[str, Any]:
        if self._scheme not in ("http", "https"):
            return {"block_size": BLOCK_BYTES, "cache_type": "none"}
        # A block size of 0 means one request for the whole file; some size, that none is asked for it first.
        return {"block_size": 0, "size": 1, "headers": {"Accept-Encoding": "identity", "Connection": "close"}}


def _checked_scheme(address: str) -> str:
    """The scheme of an address that may be read.

    Raises:
        InputError: another scheme, addresses chained with `::`, or one to which no file name can be added.
    """
    scheme, found, rest = address.partition("://")
    shown = without_password(address)
    without_ipv6 = re.sub(r"\[[0-9A-Fa-f:.]+\]", "", address)
    if not found or scheme not in PACKAGES or "::" in without_ipv6:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise InputError(
            f"data.shards: {shown} is neither a folder nor an address that is read; these are: {known}. No program is "
            "run for data, and addresses are not chained"
        )
    if not rest.strip("/") or re.search(r"[?#\s]", address):
        shown = re.split(r"[?#\s]", shown)[0]
        raise InputError(
            f"data.shards: no file name can be added to {shown}...; give the address of the set's folder, no ? or #"
        )
    return scheme


def _file_system_class(scheme: str) -> Any:
    """fsspec's class for a scheme.

    Raises:
        InputError: its package is not installed.
    """
    import fsspec

    _keep_ours_from_children()
    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise InputError(
            f"data.shards: {scheme}:// needs a package that is not installed; `pip install -c constraints.txt "
            f"{PACKAGES[scheme]}`"
        ) from error


@functools.cache
def _keep_ours_from_children() -> None:
    """Have forked processes never collect what this one leaves for collection.

    fsspec's objects refer to themselves, so that they lie about for a while when we have done with them. Collected in a
    child, they would wait for an event loop whose thread was not forked, and close what the parent has open.
    """
    os.register_at_fork(after_in_child=gc.freeze)
