"""From shards to encoded samples: the only file that knows WebDataset.

A sample is `RawSample`, or `Damaged` where it cannot be read. What is damaged is an error (`read_shard`,
`read_in_order`), unless a `Skipping` says that it is left out: `data.damaged`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import group_by_keys

from mdnet_dist.errors import InputError
from mdnet_dist.images import decode_image, decode_mask
from mdnet_dist.plain_tar import MAX_MEMBER_BYTES, READING_FAILS, PlainTarInfo, read_plain_header
from mdnet_dist.shard_cache import CacheError
from mdnet_dist.shards import SampleRecord, ShardInfo, parse_record
from mdnet_dist.storage import ShardSource

MEMBERS = {"jpg", "png", "json", "mask.png"}
"""The members of a sample that are read; nothing is ever unpickled or executed."""


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """A sample as it lies in its shard."""

    number: int  # through all shards read, in the manifest's order
    key: str
    image: bytes
    record: SampleRecord
    mask: bytes | None
    where: str  # shard, key, and the byte of the shard where the sample begins, for messages


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A sample that cannot be read."""

    number: int  # as `RawSample.number`
    message: str  # what is wrong, beginning with where


# ------------------------------------------------------------------------------------------------------- one shard


def read_shard(source: ShardSource, shard: ShardInfo, first_number: int = 0) -> Iterator[RawSample]:
    """All samples of a shard, front to back.

    Args:
        first_number: of the shard's first sample.

    Raises:
        InputError: a shard that is not there, cut off or damaged, a sample without image or record, too few or too many
            samples. It names the shard, the sample and the byte where the sample begins.
    """
    for sample in scan_shard(source, shard, first_number):
        if isinstance(sample, Damaged):
            raise InputError(sample.message)
        yield sample


def scan_shard(source: ShardSource, shard: ShardInfo, first_number: int = 0) -> Iterator[RawSample | Damaged]:
    """All samples of a shard, front to back; one without an image or a record is `Damaged`, and reading goes on.

    Raises:
        InputError: the shard as a whole is not there, cut off or damaged, or has too few or too many samples.
    """
    place, found, at = source.name_of(shard), 0, _Position()
    with source.open(shard) as file:
        try:
            for found, members in enumerate(group_by_keys(_members(file, place, at)), start=1):
                if found > shard.samples:
                    break
                yield _raw_sample(members, place, first_number + found - 1)
        except READING_FAILS as error:
            # WebDataset adds arguments of its own to an error, which its text would show.
            reason = (isinstance(error, OSError) and error.strerror) or (error.args or [type(error).__name__])[0]
            raise InputError(f"{place}: damaged after sample {found}, {at} ({reason}); copy the shard again") from error
    if found != shard.samples:
        more = " or more" if found > shard.samples else ""
        raise InputError(f"{place}: {found}{more} samples, but the manifest says {shard.samples}; copy the shard again")


@dataclass
class _Position:
    """How far a shard has been read."""

    byte: int = 0
    key: str = ""  # of the last sample that begins before it
    begins: int = 0

    def __str__(self) -> str:
        behind = f", in or behind sample '{self.key:.120}' at byte {self.begins}" if self.key else ""
        return f"at byte {self.byte}{behind}"


def _members(file: BinaryIO, place: str, at: _Position) -> Iterator[dict]:
    """The members of a shard that are read, as `group_by_keys` takes them; `__url__` is where their sample begins.

    As far as headers say nothing out of the ordinary they are read here, in a fifth of the time that `tarfile` takes.
    """
    header = file.read(tarfile.BLOCKSIZE)
    while (plain := read_plain_header(header)) is not None:
        name, size = plain
        blocks = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        stem, _, extension = name.partition(".")
        wanted = extension.lower() in MEMBERS
        if not wanted:
            file.seek(blocks, os.SEEK_CUR)
        elif size > MAX_MEMBER_BYTES or len(content := file.read(blocks)) < blocks:
            break
        next_header = file.read(tarfile.BLOCKSIZE)
        if not next_header:
            break  # cut off behind this member or in it
        if wanted and stem != at.key:
            at.key, at.begins = stem, at.byte
        at.byte += tarfile.BLOCKSIZE + blocks
        if wanted:
            yield {"fname": name, "data": content[:size], "__url__": at.begins}
        header = next_header
    if header != tarfile.NUL * tarfile.BLOCKSIZE:
        yield from _members_of_any_tar(file, place, at)


def _members_of_any_tar(file: BinaryIO, place: str, at: _Position) -> Iterator[dict]:
    """The members of a shard that are read, from `at` on; those before it are gone over once more.

    WebDataset's own tar reader also unpacks compressed files and sparse members, with which a few bytes fill any
    memory; this one refuses both, and headers without end (`PlainTarInfo`). And it takes a header that is damaged or
    cut off for the end of the file.
    """
    begin = at.byte
    file.seek(0)
    tar = tarfile.open(fileobj=file, mode="r|", tarinfo=PlainTarInfo)  # noqa: SIM115 - it owns nothing but `file`
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # else they pile up
        if tar.offset <= begin:
            continue
        at.byte = tar.offset
        stem, _, extension = member.name.partition(".")
        if not member.isreg() or extension.lower() not in MEMBERS:
            continue
        if stem != at.key:
            at.key, at.begins = stem, member.offset
        where = f"{place}, sample '{at.key:.120}' at byte {at.begins}"
        if member.issparse() or not 0 <= member.size <= MAX_MEMBER_BYTES:
            raise InputError(
                f"{where}: member '{member.name:.120}' is sparse or larger than {MAX_MEMBER_BYTES:,} bytes"
            )
        content = tar.extractfile(member)
        assert content is not None  # it is a plain file
        try:
            raw = content.read()
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{where}: member '{member.name:.120}' is cut off ({error}); copy it again") from error
        yield {"fname": member.name, "data": raw, "__url__": at.begins}
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("cut off, or a damaged header")


def _raw_sample(members: dict, place: str, number: int) -> RawSample | Damaged:
    key = members["__key__"]
    where = f"{place}, sample '{key}' at byte {members['__url__']}"
    image = members.get("jpg", members.get("png"))
    try:
        if not key.isprintable():  # it goes into file names, pages and onto terminals
            raise InputError(f"{where}: its key is not plain text")
        if image is None or "json" not in members:
            missing = "an image" if image is None else "its .json"
            raise InputError(f"{where}: {missing} is missing; a sample is KEY.jpg or KEY.png with KEY.json")
        record = parse_record(members["json"], where)
    except InputError as error:
        return Damaged(number=number, message=str(error))
    return RawSample(number=number, key=key, image=image, record=record, mask=members.get("mask.png"), where=where)


# ------------------------------------------------------------------------------------------------- what is damaged


class Skipping:
    """The policy `skip`: which shards are left out whole. One for each stream, as reading finds out more."""

    def __init__(self, left_out: Mapping[str, str] | None = None) -> None:
        """Args: left_out: {shard's file: reason} of those that `check_shards` found to be wrong."""
        self._left_out = dict(left_out or {})
        self._sound: set[str] = set()

    def reason_to_leave_out(self, source: ShardSource, shard: ShardInfo) -> str | None:
        """What is wrong with a shard as a whole, if anything is; found by reading it once before the first use.

        So no sample depends on how far a rank or a loader process has read. What was found to be wrong is looked at
        again the next time: a share or a server that was away may have come back.

        Raises:
            CacheError: the folder for downloaded shards cannot be used, which is no fault of a shard.
        """
        if shard.file in self._left_out:
            return self._left_out[shard.file]
        if shard.file not in self._sound:
            try:
                for _ in scan_shard(source, shard):
                    pass
            except CacheError:
                raise
            except InputError as error:
                return str(error)
            self._sound.add(shard.file)
        return None


def check_shards(
    source: ShardSource, shards: Sequence[ShardInfo], *, ranks: int = 1, rank: int = 0, skip: bool = False
) -> dict[str, str]:
    """Compare this rank's share of the shards with the manifest: each there, of the right size and checksum.

    Returns:
        with `skip` those that differ, {file: what is wrong}; else nothing.

    Raises:
        InputError: without `skip`, naming the first shard that differs, and where in it reading fails.
    """
    left_out: dict[str, str] = {}
    for shard in shards[rank::ranks]:
        try:
            source.check(shard)
        except InputError as error:
            message = f"{error}{_first_failure(source, shard)}"
            if not skip:
                raise InputError(message) from error
            left_out[shard.file] = message
    return left_out


def _first_failure(source: ShardSource, shard: ShardInfo) -> str:
    """Where reading a shard first fails, as the end of a message; nothing where the file cannot be opened at all."""
    try:
        source.open(shard).close()
    except InputError:
        return ""  # the message says that already
    place = source.name_of(shard)
    try:
        for sample in read_shard(source, shard):
            decode_image(sample.image, sample.where)
            if sample.mask is not None:
                decode_mask(sample.mask, sample.where)
    except InputError as error:
        return f" (reading fails first here: {str(error).removeprefix(place).lstrip(':, ')})"
    return " (every sample still decodes, so a byte in some value changed)"


def sound_samples(
    source: ShardSource, shards: Iterable[ShardInfo], skipping: Skipping | None, damaged: list[str] | None = None
) -> Iterator[RawSample]:
    """The samples of some shards in order, those left out that `skipping` leaves out.

    Args:
        damaged: gets a message for each that is left out.

    Raises:
        InputError: without `skipping`, as `read_shard`.
        CacheError: with it, too, as `Skipping.reason_to_leave_out`.
    """
    damaged = [] if damaged is None else damaged
    for shard in shards:
        if skipping is None:
            yield from read_shard(source, shard)
        elif (reason := skipping.reason_to_leave_out(source, shard)) is not None:
            damaged += [reason] * shard.samples
        else:
            for sample in scan_shard(source, shard):
                if isinstance(sample, RawSample):
                    yield sample
                else:
                    damaged.append(sample.message)


# -------------------------------------------------------------------------------------------------- many shards


def read_in_order(
    source: ShardSource,
    shards: Sequence[ShardInfo],
    numbers: np.ndarray,
    horizon: int,
    skipping: Skipping | None = None,
) -> Iterator[RawSample | Damaged]:
    """The samples with these numbers, in this order, while shards are read from front to back.

    Samples that a shard yields before their turn wait, still encoded: `horizon` of them at most. A shard is read once,
    and once more where it holds samples further apart than that (`mdnet_dist.plan.reading_horizon`).

    Args:
        numbers: distinct sample numbers, counted through all shards in order.
        horizon: samples whose turn is more than so many places ahead do not wait.
        skipping: None: what is damaged is an error. Else it takes its place in the order as `Damaged`.

    Raises:
        InputError: without `skipping`, as `read_shard`.
        CacheError: with it, too, as `Skipping.reason_to_leave_out`.
    """
    counts = np.array([shard.samples for shard in shards])
    first = np.cumsum(counts) - counts
    shard_of = np.searchsorted(first, numbers, side="right") - 1
    remaining = np.bincount(shard_of, minlength=len(shards))
    place_of = {number: place for place, number in enumerate(numbers.tolist())}
    waiting: dict[int, RawSample | Damaged] = {}
    streams: dict[int, Iterator[RawSample | Damaged]] = {}
    read_up_to: dict[int, int] = {}
    broken: dict[int, str] = {}  # what is wrong, by shard

    def begin(shard: int) -> Iterator[RawSample | Damaged]:
        info, number = shards[shard], int(first[shard])
        if skipping is None:
            return read_shard(source, info, number)
        if shard not in read_up_to and (reason := skipping.reason_to_leave_out(source, info)) is not None:
            raise InputError(reason)
        return scan_shard(source, info, number)

    for place, (number, shard) in enumerate(zip(numbers.tolist(), shard_of.tolist())):
        try:
            if shard in broken:
                pass
            elif number not in waiting and number < read_up_to.get(shard, number + 1):
                streams[shard] = begin(shard)
            while number not in waiting and shard not in broken:
                sample = next(streams[shard])
                read_up_to[shard] = sample.number + 1
                if place <= place_of.get(sample.number, -1) <= place + horizon:
                    waiting[sample.number] = sample
            remaining[shard] -= 1
            if not remaining[shard] and shard not in broken:
                # Read what is left too: a shard that is cut off must not pass for a whole one.
                for _ in streams.pop(shard):
                    pass
        except InputError as error:
            if skipping is None or isinstance(error, CacheError):
                raise
            broken[shard] = str(error)
        if number in waiting:
            yield waiting.pop(number)
        else:
            yield Damaged(number=number, message=broken[shard])
