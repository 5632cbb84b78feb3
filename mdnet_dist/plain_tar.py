"""What both readers of shards allow in a tar (`mdnet_dist.reading`, `data_shards.verify`). Standard library only."""

from __future__ import annotations

import re
import tarfile
import zlib
from typing import Any

MAX_MEMBER_BYTES = 1 << 28
"""A member that claims more is refused before it is read."""
MAX_HEADER_BYTES = 1 << 20
"""Of what a tar may say of one member beside its plain header, and of all members together."""

READING_FAILS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, MemoryError)
"""What Python's tar reader raises at a damaged tar, or one that means harm."""

_PLAIN_HEADER = re.compile(
    rb"""(?P<name>[!-~]+) \0+  (?<=\A[\s\S]{100})  # printable ASCII in the first 100 bytes
    (?:[0-7]{7}\0){3}  # mode, user, group
    (?P<size>[0-7]{11}) \0  [0-7]{11} \0  # the second is when it was changed
    (?P<checksum>[0-7]{6}) \0\x20
    0 \0{100}  # a file, no link
    ustar (?:\x0000|\x20\x20\0)  [\s\S]{64}  # magic, names of user and group
    (?:[0-7]{7}\0|\0{8}){2}  \0{167}  # no device, no name in two parts""",
    re.VERBOSE,
)

_OF_ALL = (tarfile.XGLTYPE,)
_OF_ONE = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def read_plain_header(header: bytes) -> tuple[str, int] | None:
    """Name and size of a member whose header says nothing but those of a plain file, much faster than `tarfile` does.

    Returns:
        None for any other header, and for one that is damaged or cut off: those are left to `tarfile`.
    """
    found = _PLAIN_HEADER.fullmatch(header)
    if found is None:
        return None
    checksum = 8 * ord(" ") - sum(header[148:156])  # of the header with spaces in its place
    for half in (header[:256], header[256:]):
        checksum += (zlib.adler32(half) & 0xFFFF) - 1  # of 256 bytes that is their sum
    return (found["name"].decode("ascii"), int(found["size"], 8)) if checksum == int(found["checksum"], 8) else None


class PlainTarInfo(tarfile.TarInfo):
    """A member for `tarfile.open(..., tarinfo=...)` whose headers fit into memory.

    Python's own reads extension headers (long names, pax) whole, of whatever size they claim, and a list of holes to
    its end, before any program sees the member.
    """

    def _proc_member(self, tar: Any) -> tarfile.TarInfo:
        """Called by `tarfile` for every header, of extensions too; those of one member come in a row before it.

        Raises:
            tarfile.ReadError: headers larger than `MAX_HEADER_BYTES`, or a list of holes longer than a plain header's.
        """
        if self.type in (*_OF_ALL, *_OF_ONE):
            for_all = self.type in _OF_ALL
            said = getattr(tar, "said_of_all" if for_all else "said_of_one", 0) + max(self.size, 0)
            if self.size < 0 or said > MAX_HEADER_BYTES:
                raise tarfile.ReadError("a header larger than 1 MiB")
            setattr(tar, "said_of_all" if for_all else "said_of_one", said)
        else:
            tar.said_of_one = 0
            if self.type == tarfile.GNUTYPE_SPARSE and self._sparse_structs[1]:  # type: ignore[attr-defined]
                raise tarfile.ReadError("a sparse member with many holes")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_gnusparse_10(self, *_: Any) -> None:
        """The list of holes in front of the content: its length is said there alone.

        Raises:
            tarfile.ReadError: always.
        """
        raise tarfile.ReadError("a sparse member with many holes")
