"""What both readers of shards allow in a tar (`mdnet_dist.reading`, `data_shards.verify`). Standard library only."""

from __future__ import annotations

import tarfile
from typing import Any

MAX_MEMBER_BYTES = 1 << 28
"""A member that claims more is refused before it is read."""
MAX_HEADER_BYTES = 1 << 20
"""Of what a tar may say of one member beside its plain header, and of all members together."""

READING_FAILS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, MemoryError)
"""What Python's tar reader raises at a damaged tar, or one that means harm."""

_OF_ALL = (tarfile.XGLTYPE,)
_OF_ONE = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


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
