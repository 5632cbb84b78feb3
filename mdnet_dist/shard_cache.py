"""Downloaded shards in a folder of bounded size, which all processes of a machine share. Networks are not its business.

    FOLDER/SHA256.tar        a whole shard, under the checksum that the manifest gives it
    FOLDER/SHA256.partial    one on its way; who downloads it holds its lock, which goes with a process that is killed
    FOLDER/.lock             held while files are counted, removed or renamed, and room is reserved

A reader holds an open file, which stays readable when another process removes its name to make room. No process waits
for one that waits for it: it may wait for a lock while it has no room reserved, for room while it holds the lock of one
download, and for nothing but its download once the room is its own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mdnet_dist.errors import InputError
from mdnet_dist.shards import digest_of

_NAME = re.compile(r"[0-9a-f]{64}\.(tar|partial)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIVEN_UP = b"\0given up\0"
"""Begins a note in place of a download that failed; no tar begins like this."""
_LOOK_AGAIN_SECONDS = 0.1


class CacheError(InputError):
    """The folder itself is at fault, and no shard: what leaves out damaged shards must not take it for damage."""


class ShardCache:
    """Hands out shards as open files, and has those downloaded that are not there."""

    def __init__(self, folder: Path, cap_bytes: int, source: str = "") -> None:
        """Args: source: where downloads come from. Processes with the same one share a failure they all waited for."""
        self.folder, self.cap_bytes = folder, cap_bytes
        self._note = _GIVEN_UP + hashlib.sha256(source.encode()).digest()
        self._known_good: dict[str, int] = {}  # {SHA-256: inode of the file that this process has checked}

    def get(self, sha256: str, size_bytes: int, download: Callable[[BinaryIO], None]) -> BinaryIO:
        """A shard, open for reading from its first byte; the caller closes it.

        Args:
            download: writes all of the shard's bytes into the file it is given, from position 0, and compares them with
                the size and the checksum; raises InputError where it cannot. One process calls it, others wait.

        Raises:
            InputError: of `download`; a checksum that is none.
            CacheError: no room for the shard; a folder that cannot be written.
        """
        if not _SHA256.fullmatch(sha256):
            raise InputError(f"'{sha256:.80}' is not a SHA-256 of 64 hexadecimal digits; build the shard set again")
        if size_bytes > self.cap_bytes:
            raise CacheError(
                f"{self.folder}: data.cache_gib allows {self.cap_bytes:,} bytes, but a shard has {size_bytes:,}; allow "
                "several times as much"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                file = self._held(sha256, size_bytes) or self._fetched(sha256, size_bytes, download)
                if file is not None:
                    return file
        except OSError as error:
            raise CacheError(
                f"{self.folder}: cannot keep a shard of {size_bytes:,} bytes: {error.strerror or error}; data.cache "
                "names a folder that can be written, with room for data.cache_gib"
            ) from error

    # ------------------------------------------------------------------------------------------------ what is there

    def _held(self, sha256: str, size_bytes: int) -> BinaryIO | None:
        """The shard, where the folder has it whole; what is there but damaged is removed."""
        path = self.folder / f"{sha256}.tar"
        try:
            file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:
            return None
        try:
            if self._is_good(file, sha256, size_bytes):
                with suppress(OSError):  # of a folder that can only be read nothing is removed either
                    _note_used(file)
                return file
            with self._counting():
                if _is_named(file, path):
                    path.unlink()
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def _is_good(self, file: BinaryIO, sha256: str, size_bytes: int) -> bool:
        """Compare the size, and once in a process the checksum: disks lose bits, and power before all is written."""
        status = os.fstat(file.fileno())
        if status.st_size != size_bytes:
            return False
        if self._known_good.get(sha256) != status.st_ino:
            if digest_of(file) != sha256:
                return False
            file.seek(0)
            self._known_good[sha256] = status.st_ino
        return True

    # --------------------------------------------------------------------------------------------- what is not there

    def _fetched(self, sha256: str, size_bytes: int, download: Callable[[BinaryIO], None]) -> BinaryIO | None:
        """Download the shard, or wait for the process that does; None: look again."""
        path = self.folder / f"{sha256}.partial"
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as partial, _locked(partial.fileno()):
            if not _is_named(partial, path):  # its downloader has finished or given up
                self._raise_if_given_up(partial)
                return None
            try:
                whole = path.with_suffix(".tar")
                if whole.exists():  # finished between our look and our lock
                    return None
                os.ftruncate(partial.fileno(), 0)  # a killed process' room must not be held while waiting for room
                self._reserve(partial, size_bytes)
                download(partial)
                partial.flush()
                file = open(path, "rb")  # noqa: SIM115 (the caller closes it; now, before others can remove it)
                _note_used(file)
                with self._counting():
                    os.replace(path, whole)
                self._known_good[sha256] = os.fstat(file.fileno()).st_ino
                return file
            except InputError as error:
                path.unlink()
                self._note_given_up(partial, error)
                raise
            finally:
                if _is_named(partial, path):
                    path.unlink()

    def _reserve(self, partial: BinaryIO, size_bytes: int) -> None:
        """Give a partial file its whole size, as soon as there is room; others' downloads are waited for."""
        while not self._made_room(partial, size_bytes):
            time.sleep(_LOOK_AGAIN_SECONDS)
        try:
            if size_bytes:
                os.posix_fallocate(partial.fileno(), 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without it finds out while writing
                raise

    def _made_room(self, partial: BinaryIO, size_bytes: int) -> bool:
        with self._counting():
            taken_bytes, whole = 0, []
            for path in self.folder.iterdir():
                if not _NAME.fullmatch(path.name) or _is_named(partial, path) or _removed_if_stale(path):
                    continue
                with suppress(FileNotFoundError):  # a download that was given up
                    status = path.lstat()
                    taken_bytes += status.st_size
                    if path.suffix == ".tar":
                        whole.append((status.st_mtime_ns, status.st_size, path))
            room_bytes = self.cap_bytes - size_bytes
            if taken_bytes - sum(size for _, size, _ in whole) > room_bytes:
                return False
            for _, size, path in sorted(whole):
                if taken_bytes <= room_bytes:
                    break
                path.unlink()
                taken_bytes -= size
            os.ftruncate(partial.fileno(), size_bytes)
            return True

    @contextmanager
    def _counting(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with _locked(descriptor):
                yield
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------------------------------------------ shared failure

    def _note_given_up(self, partial: BinaryIO, error: InputError) -> None:
        """Leave a note for those who wait: each trying in vain for minutes, one by one, would look like a hang."""
        with suppress(OSError):
            partial.flush()
            partial.seek(0)
            partial.truncate()
            partial.write(self._note + str(error).encode())
            partial.flush()

    def _raise_if_given_up(self, partial: BinaryIO) -> None:
        if partial.read(len(self._note)) == self._note:
            raise InputError(partial.read(1 << 16).decode(errors="replace"))


def _note_used(file: BinaryIO) -> None:
    now = time.time_ns()  # finer than the time that the system itself would note
    os.utime(file.fileno(), ns=(now, now))


@contextmanager
def _locked(descriptor: int, or_fail: int = 0) -> Iterator[None]:
    """Alone among all that lock this file. Closing it would not do: a process forked meanwhile has it open too."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | or_fail)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is what the path names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _removed_if_stale(path: Path) -> bool:
    """Remove a partial file whose lock nobody holds: its process was killed."""
    if path.suffix != ".partial":
        return False
    try:
        with open(path, "r+b") as partial, _locked(partial.fileno(), fcntl.LOCK_NB):
            if not _is_named(partial, path):  # finished or given up meanwhile, and perhaps begun anew
                return False
            path.unlink()
            return True
    except (BlockingIOError, FileNotFoundError, PermissionError):  # the last: another user's
        return False
