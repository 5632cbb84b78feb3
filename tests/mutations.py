"""Hostile versions of good files: bytes, JSON, YAML and the containers that need a right length or checksum to be read.

Each function takes a `random.Random` and gives bytes; the same generator state gives the same bytes.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from random import Random
from typing import Any

LARGE = 20_000  # characters or items of what is "long": enough to hurt, quick to write

TEXTS = [
    "",
    " ",
    "\0",
    "\x1b]0;owned\x07\x1b[2J",
    "\ud800",
    "\u202e\u2028",
    "a\nb\r\n",
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "C:\\x",
    "file:///etc/passwd",
    "pipe:touch executed",
    "=1+1",
    "<script>x</script>",
    "$(touch executed)",
    "${HOME}",
    "%s%n{0}{x.__class__}",
    "nan",
    "1e3",
    "full",
    "__class__",
    "x" * LARGE,
    "a/" * 3000,
    "e\u0301" * 200,
]
NUMBERS = ["0", "-1", "1", "2", "0.5", "-0.0", "1e-400", "1e400", "1e308", "NaN", "Infinity", "-Infinity"]
NUMBERS += [str(2**power + change) for power in (15, 16, 31, 32, 53, 63, 64) for change in (-1, 0)]
NUMBERS += [str(10**400), "9" * 5000, "1" + "0" * 30 + ".5"]
OTHERS = ["null", "true", "false", "{}", "[]", "[[]]", '{"": ""}', "[null]", "[0, 0, 0]", '["a", "a"]']
OTHERS += ["[" * 3000 + "]" * 3000, "[" * LARGE, '{"a":' * 3000 + "1" + "}" * 3000, "[" + "0," * LARGE + "0]", "'", "}"]
YAML_SCALARS = [
    "!!python/object/apply:os.system ['touch executed']",
    "!!python/name:os.system",
    "!!binary gA==",
    "!!set {a, b}",
    "!!timestamp 2001-01-01",
    "&a [*a]",
    "*a",
    "<<: {a: 1}",
    "1:30:00",
    "0x7f",
    "0o777",
    "2026-13-45",
    ".inf",
    ".nan",
    "~",
    "|\n  text",
    "? [a]\n: b",
    "%YAML 9.9",
    "---",
    "...",
    "\t",
    "{a: b: c}",
    "@x",
    "`",
]


class Raw(str):
    """A piece of JSON that is written as it is."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object that may have a key twice."""


# ---------------------------------------------------------------------------------------------------------------- bytes


def mutate_bytes(rng: Random, content: bytes, other: bytes = b"") -> bytes:
    """Up to four changes: a bit, a byte, a number, an insertion, deletion, cut or repetition, another file's piece."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 2, 4, 16, 512, 4096)), max(1, len(data) - at))
        kind = rng.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
            largest = 256 ** struct.calcsize(form) - 1
            number = struct.pack(form, rng.choice((0, 1, largest, largest >> 1, (largest >> 1) + 1, largest - 7)))
            data[at : at + len(number)] = number
        elif kind == 3:
            data[at:at] = rng.randbytes(length)
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 7:
            source = other or content
            start = rng.randrange(len(source) + 1)
            data[at : at + length] = source[start : start + length]
        else:
            data[at : at + length] = bytes(length)
    return bytes(data)


# ----------------------------------------------------------------------------------------------------------------- text


def mutate_json(rng: Random, content: bytes) -> bytes:
    """Up to three values of a JSON text replaced, deleted, repeated, nested, moved or renamed; sometimes its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, content)
    tree = json.loads(content, object_pairs_hook=Pairs)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _changed(rng, tree)
    return _written(tree, rng.random() < 0.5).encode("utf-8", "surrogatepass")


def mutate_lines(rng: Random, content: bytes) -> bytes:
    """JSON lines: one or two lines as `mutate_json` makes them, or lines lost, repeated, swapped, joined."""
    lines = content.splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(10)
        if kind == 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at] = rng.choice(
                (b"", b"\xff", b"{", b"[]", b"null", b"0", lines[at] * 2, b"\xef\xbb\xbf" + lines[at])
            )
        else:
            try:
                lines[at] = mutate_json(rng, lines[at])
            except (ValueError, RecursionError):  # a line that was made invalid before
                lines[at] = mutate_bytes(rng, lines[at])
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\r")).join(lines)


def mutate_yaml(rng: Random, content: bytes) -> bytes:
    """Lines of a YAML file changed, lost, repeated, indented; values replaced by what YAML makes something odd of."""
    if rng.random() < 0.1:
        return mutate_bytes(rng, content)
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at] = rng.choice(("  ", " ", "\t", "- ", "? ")) + lines[at]
        elif kind == 3:
            lines[at] = lines[at].lstrip()
        else:
            key = lines[at].partition("#")[0].partition(":")[0]
            value = rng.choice(YAML_SCALARS) if rng.random() < 0.4 else _written(_hostile(rng), rng.random() < 0.5)
            lines[at] = f"{key}: {value}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _hostile(rng: Random) -> Any:
    kind = rng.randrange(3)
    return rng.choice(TEXTS) if kind == 0 else Raw(rng.choice(NUMBERS if kind == 1 else OTHERS))


def _changed(rng: Random, tree: Any) -> Any:
    """A copy with one change somewhere in it."""
    if not isinstance(tree, list) or not tree or rng.random() < 0.15:
        return _replaced(rng, tree)
    at = rng.randrange(len(tree))
    kind = rng.randrange(12)
    if isinstance(tree, Pairs):
        key, value = tree[at]
        if kind == 0:
            return Pairs(tree[:at] + tree[at + 1 :])
        if kind == 1:
            return Pairs([*tree, (key, _hostile(rng))])
        if kind == 2:
            return Pairs([*tree[:at], (rng.choice([*TEXTS, key + "x", key[:-1]]), value), *tree[at + 1 :]])
        if kind == 3:
            return Pairs([*tree, (rng.choice(TEXTS), _hostile(rng))])
        return Pairs([*tree[:at], (key, _changed(rng, value)), *tree[at + 1 :]])
    if kind == 0:
        return tree[:at] + tree[at + 1 :]
    if kind == 1:
        return tree[: at + 1] + tree[at:]
    if kind == 2:
        return [*tree, _hostile(rng)]
    return [*tree[:at], _changed(rng, tree[at]), *tree[at + 1 :]]


def _replaced(rng: Random, value: Any) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return [value]
    if kind == 1:
        return Pairs([("a", value)])
    if kind == 2 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(TEXTS) + value[at:]
    if kind == 3:
        return str(value) if not isinstance(value, list) else Pairs((str(i), one) for i, one in enumerate(value))
    return _hostile(rng)


def _written(value: Any, ascii_only: bool) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        items = (f"{json.dumps(key, ensure_ascii=ascii_only)}: {_written(one, ascii_only)}" for key, one in value)
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_written(one, ascii_only) for one in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


# ----------------------------------------------------------------------------------------------------------- containers


def mutate_tar(rng: Random, content: bytes) -> bytes:
    """A tar's bytes; or a field of a header, its checksum made right again; or a member lost, repeated, moved."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(rng, content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        starts = [member.offset for member in tar.getmembers()]
    ends = [*starts[1:], starts[-1] + 512 + -(-int(content[starts[-1] + 124 :][:11], 8) // 512) * 512]
    pieces = [content[start:end] for start, end in zip(starts, ends)]
    at = rng.randrange(len(pieces))
    if kind == 1:
        other = rng.randrange(len(pieces))
        pieces = rng.choice((pieces[:at] + pieces[at + 1 :], [*pieces, pieces[at]], [pieces[other], *pieces]))
        return b"".join(pieces) + content[ends[-1] :]
    header = bytearray(pieces[at][:512])
    fields = {
        (0, 100): None,
        (124, 12): None,
        (156, 1): b"0123456789gxLKSVMNDA\0\x80",
        (157, 100): None,
        (257, 8): None,
    }
    (start, length), kinds = rng.choice(list(fields.items()))
    if kinds:
        value = bytes([rng.choice(kinds)])
    elif start == 124:
        sizes = (b"77777777777\0", b"00000000000\0", b"\x80" + b"\0" * 7 + b"\xff" * 4, b"\xff" * 12, b"-0000000001\0")
        value = rng.choice(sizes)
    else:
        names = (
            b"../../escaped.jpg",
            b"/tmp/x.json",
            b"\0",
            b"\xff\xfe.jpg",
            b"a" * 100,
            b"x.mask.png",
            b".json",
            b"\x1b[2J.jpg",
        )
        value = rng.choice(names)
    header[start : start + length] = value.ljust(length, b"\0")[:length]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    pieces[at] = bytes(header) + pieces[at][512:]
    return b"".join(pieces) + content[ends[-1] :]


def mutate_png(rng: Random, content: bytes) -> bytes:
    """A PNG's bytes; or a chunk changed, lost, repeated or added, with its checksum made right again."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    chunks, at = [], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    place = rng.randrange(len(chunks))
    kind, data = chunks[place]
    choice = rng.randrange(5)
    if choice == 0:
        del chunks[place]
    elif choice == 1:
        chunks.insert(rng.randrange(1, len(chunks)), (kind, data))
    elif choice == 2:
        bomb = zlib.compress(bytes(1 << 22), 9)
        added = rng.choice(
            [
                (b"zTXt", b"k\0\0" + bomb),
                (b"iTXt", b"k\0\1\0\0\0" + bomb),
                (b"iCCP", b"p\0\0" + bomb),
                (b"tEXt", b"k\0" + bytes(1 << 20)),
                (b"eXIf", b"MM\0*" + rng.randbytes(64)),
                (b"tRNS", rng.randbytes(rng.choice((1, 2, 6, 256)))),
                (b"PLTE", rng.randbytes(rng.choice((1, 3, 768)))),
                (b"acTL", rng.randbytes(8)),
                (b"fcTL", rng.randbytes(26)),
                (b"IDAT", b""),
            ]
        )
        chunks.insert(rng.randrange(1, len(chunks)), added)
    elif kind == b"IHDR" and choice == 3:
        width, height = (rng.choice((0, 1, 31, 4000, 8192, 65_535, 2**31 - 1, 2**32 - 1)) for _ in range(2))
        depth, colours, interlace = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 5)), rng.randrange(3)
        chunks[place] = (kind, struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlace))
    else:
        chunks[place] = (kind, mutate_bytes(rng, data))
    body = b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )
    return content[:8] + body


def mutate_safetensors(rng: Random, content: bytes) -> bytes:
    """A safetensors file's bytes; or its header as JSON, its length made right again."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, content)
    length = int.from_bytes(content[:8], "little")
    header = mutate_json(rng, content[8 : 8 + length].rstrip())
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def mutate_zip(rng: Random, content: bytes) -> bytes:
    """A zip's bytes; or those of one of its members, or its name, in a zip that is otherwise right."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, content)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        names = old.namelist()
        changed = rng.choice([name for name in names if name.endswith(".pkl")] + names)
        for name in names:
            data = old.read(name)
            if name == changed:
                name, data = (name, mutate_bytes(rng, data)) if rng.random() < 0.8 else (name + "x", data)
            new.writestr(name, data)
    return out.getvalue()
