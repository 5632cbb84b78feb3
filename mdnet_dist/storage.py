"""Where a shard set lies: a folder, or an address that is read through a cache (`mdnet_dist.remote`).

Readers ask a source for a manifest and for shards, and need not know which of the two it is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from mdnet_dist.errors import InputError, without_password
from mdnet_dist.shards import ShardInfo, ShardManifest, load_manifest, sha256_of

if TYPE_CHECKING:
    from mdnet_dist.config import DataConfig


class ShardSource(Protocol):
    """A shard set that can be read."""

    def manifest(self) -> ShardManifest:
        """Read and check the set's manifest.

        Raises:
            InputError: there is none, it cannot be reached, or it is not a manifest (`parse_manifest`).
        """

    def open(self, shard: ShardInfo) -> BinaryIO:
        """The shard's bytes from the first on; the caller closes it.

        Raises:
            InputError: it is not there or cannot be read.
        """

    def name_of(self, shard: ShardInfo) -> str:
        """The shard's place, for messages; no password is in it."""

    def check(self, shard: ShardInfo) -> None:
        """Compare the shard with the manifest: there, of the right size and checksum.

        What is downloaded is compared whenever it is, so that a remote source has nothing to do here.

        Raises:
            InputError: it differs.
        """


class LocalSource:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self) -> ShardManifest:
        """As `ShardSource.manifest`."""
        return load_manifest(self.folder)

    def open(self, shard: ShardInfo) -> BinaryIO:
        """As `ShardSource.open`; what is no plain file is refused, and so is a link out of the folder."""
        with _readable(self._path(shard)) as path:
            return open(path, "rb")

    def name_of(self, shard: ShardInfo) -> str:
        """As `ShardSource.name_of`."""
        return str(self._path(shard))

    def check(self, shard: ShardInfo) -> None:
        """As `ShardSource.check`."""
        with _readable(self._path(shard)) as path:
            size = path.stat().st_size
            if size != shard.bytes:
                raise InputError(f"{path}: {size} bytes, but the manifest says {shard.bytes}; copy it again")
            if sha256_of(path) != shard.sha256:
                raise InputError(f"{path}: its checksum differs from the manifest's; copy it again")

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / shard.file


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """Check that a shard is a plain file inside its folder, and say so where reading it fails.

    Raises:
        InputError: it is not, or it cannot be read.
    """
    try:
        if not path.is_file():  # to open a pipe or a device would wait for ever
            there = "is not a plain file" if os.path.lexists(path) else "is not there"
            raise InputError(f"{path}: the manifest lists this shard, but it {there}")
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
            raise InputError(f"{path}: a link that leaves the folder; put the shard itself there")
        yield path
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: the manifest lists this shard, but it cannot be read: {reason}") from error


def is_address(shards: str) -> bool:
    """Whether `data.shards` is an address and not a folder."""
    return "://" in shards or "::" in shards


def place_of_set(config: DataConfig) -> str:
    """`data.shards` for messages: without a password."""
    return without_password(config.shards)


def absolute(shards: str) -> str:
    """`data.shards` as it reads from any working directory: a folder's absolute path; an address stays as it is."""
    return shards if is_address(shards) else str(Path(shards).absolute())


def last_name(shards: str) -> str:
    """The last name in a folder's path or an address, by which people call the set."""
    if not is_address(shards):
        return Path(shards).resolve().name
    return without_password(shards).partition("?")[0].rstrip("/").rpartition("/")[2]


def open_source(config: DataConfig) -> ShardSource:
    """The source that `data.shards` names; of an address the same one throughout the process, which knows its cache.

    Raises:
        InputError: an address of a kind that is not read.
    """
    return _remote(config) if is_address(config.shards) else LocalSource(Path(config.shards))


@functools.lru_cache
def _remote(config: DataConfig) -> ShardSource:
    from mdnet_dist.remote import RemoteSource

    return RemoteSource(config)
