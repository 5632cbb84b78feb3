"""Ways to damage a shard set on disk, and what reading it must then give."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from mdnet_dist.shards import MANIFEST_NAME, sha256_of

Members = list[tuple[tarfile.TarInfo, bytes]]


def members_of(path: Path) -> Members:
    """All members of a tar, in order."""
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def write_members(path: Path, members: Members) -> None:
    """Write a tar anew."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def keys_of(path: Path) -> list[str]:
    """The keys of a shard's samples, in order."""
    return list(dict.fromkeys(member.name.partition(".")[0] for member, _ in members_of(path)))


def start_of(path: Path, key: str) -> int:
    """The byte of a shard where a sample's first member begins."""
    with tarfile.open(path) as tar:
        return next(member.offset for member in tar if member.name.partition(".")[0] == key)


def change(path: Path, extension: str, content: bytes | None, which: int = 2) -> str:
    """Replace (or drop, for None) a member of the sample number `which`; its key."""
    key = keys_of(path)[which]
    changed = []
    for member, old in members_of(path):
        stem, _, kind = member.name.partition(".")
        if stem == key and kind in extension.split("|"):
            if content is not None:
                changed.append((member, content))
        else:
            changed.append((member, old))
    write_members(path, changed)
    return key


def agree(folder: Path) -> None:
    """Make the manifest's sizes and checksums those of the files, as a program that builds damaged shards would."""
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    for shard in raw["shards"]:
        path = folder / shard["file"]
        shard.update(bytes=path.stat().st_size, sha256=sha256_of(path))
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))


def flip(path: Path, offset: int, bit: int = 1) -> None:
    """Change bits of one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= bit
    path.write_bytes(content)


def member_at(path: Path, which: int, kinds: str) -> tarfile.TarInfo:
    """A member of the sample number `which`."""
    key = keys_of(path)[which]
    with tarfile.open(path) as tar:
        return next(m for m in tar if m.name.partition(".")[0] == key and m.name.partition(".")[2] in kinds.split("|"))


IMAGE = "jpg|png"
SAMPLE_DAMAGE: dict[str, Callable[[Path, int], str]] = {
    "no image": lambda path, which: change(path, IMAGE, None, which),
    "no record": lambda path, which: change(path, "json", None, which),
    "image does not decode": lambda path, which: change(path, IMAGE, b"\xff\xd8\xff" + b"x" * 50, which),
    "image of no kind": lambda path, which: change(path, IMAGE, b"hello", which),
    "not JSON": lambda path, which: change(path, "json", b"{", which),
    "no record's fields": lambda path, which: change(path, "json", b'{"a": 1}', which),
    "unknown label": lambda path, which: change(
        path, "json", b'{"patient": "p", "label": "high", "reports": [{"crowding": "few"}]}', which
    ),
}
"""Damage to one sample that leaves the others whole: does it, and gives the sample's key."""


def cut_between(path: Path, which: int) -> None:
    """End the file where a sample begins."""
    path.write_bytes(path.read_bytes()[: start_of(path, keys_of(path)[which])])


def cut_inside(path: Path, which: int) -> None:
    """End the file inside a sample's image."""
    path.write_bytes(path.read_bytes()[: member_at(path, which, IMAGE).offset_data + 20])


def half_sample(path: Path, which: int) -> None:
    """End the file between the members of a sample."""
    path.write_bytes(path.read_bytes()[: member_at(path, which, "json").offset])


def flip_header(path: Path, which: int) -> None:
    """Change a byte of a header, whose own checksum then is wrong."""
    flip(path, member_at(path, which, "json").offset + 3)


def add_sample(path: Path, which: int) -> None:
    """A sample more than the manifest says."""
    members = members_of(path)
    extra = [(m, raw) for m, raw in members if m.name.startswith(keys_of(path)[which])]
    for member, _ in extra:
        member.name = f"more.{member.name.partition('.')[2]}"
    write_members(path, [*members_of(path), *extra])


def drop_sample(path: Path, which: int) -> None:
    """A sample less than the manifest says."""
    key = keys_of(path)[which]
    write_members(path, [(m, raw) for m, raw in members_of(path) if m.name.partition(".")[0] != key])


SHARD_DAMAGE: dict[str, Callable[[Path, int], None]] = {
    "cut between samples": cut_between,
    "cut inside a sample": cut_inside,
    "half a sample": half_sample,
    "byte of a header": flip_header,
    "a sample more": add_sample,
    "a sample less": drop_sample,
    "no tar": lambda path, which: path.write_bytes(b"PK\3\4" + path.name.encode() + bytes(2000)) and None,
    "empty": lambda path, which: path.write_bytes(b"") and None,
}
"""Damage for which a whole shard is left out, whatever its checksum."""


def flip_picture(path: Path, which: int) -> None:
    """Change the size that a PNG says it has: of its chunks Pillow checks the first one's checksum."""
    flip(path, member_at(path, which, "png").offset_data + 20)


def flip_value(path: Path, which: int) -> None:
    """Change a letter of a patient's name."""
    flip(path, path.read_bytes().index(b'"train-', member_at(path, which, "json").offset_data) + 2)


CONTENT_DAMAGE: dict[str, Callable[[Path, int], None]] = {
    "byte of a picture": flip_picture,
    "byte of a value": flip_value,
}
"""Damage that leaves the file as long as it was and each header whole."""
