"""Reads a pickle of plain values and numpy arrays without running any of it.

A pickle is a program that may call whatever Python can import. This reader knows the few names that numpy's arrays
need, and puts classes of this file in their place, which only remember what they are given: neither numpy nor
anything else is called while the file is read. Python's fast reader, in C, is not used, because a few bytes can make it
fill the memory (the index of a memo entry, the length of a bytearray); the one in Python is enough for lists of labels.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mdnet_dist.errors import InputError

MAX_BYTES = 1 << 28
"""Largest file that is read; CIFAR's largest batch has 155 MB."""

_DECODED_AT_ONCE = 64  # characters: names; the pixels of an image array wait until they are asked for


class PickledArray:
    """What a pickle says of an array."""

    def __init__(self, *_: Any) -> None:
        self.shape: Any = None
        self.dtype: Any = None
        self.fortran: Any = False
        self.raw: Any = None

    def __setstate__(self, state: Any) -> None:
        """Remember version, shape, type, order and bytes, as `ndarray.__reduce__` gives them."""
        _, self.shape, self.dtype, self.fortran, self.raw = state

    def values(self) -> np.ndarray:
        """The array.

        Raises:
            ValueError: not an array of integers, or its bytes do not fill its shape.
        """
        raw = self.raw.decoded() if isinstance(self.raw, _Latin1) else self.raw
        if not isinstance(self.dtype, _Dtype) or not isinstance(raw, bytes):
            raise ValueError("not an array of plain numbers")
        if not isinstance(self.shape, tuple) or not all(
            type(side) is int and 0 <= side <= MAX_BYTES for side in self.shape
        ):
            raise ValueError("not an array with a shape")
        dtype = self.dtype.numpy()
        if len(self.shape) > 4 or math.prod(self.shape) * dtype.itemsize != len(raw):
            raise ValueError(f"an array of {' x '.join(map(str, self.shape[:4]))} numbers in {len(raw):,} bytes")
        return np.frombuffer(raw, dtype).reshape(self.shape, order="F" if self.fortran else "C")


class _Dtype:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code.decode("ascii") if isinstance(code, bytes) else code, "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else order

    def numpy(self) -> np.dtype:
        if self.code not in ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8") or self.order not in ("<", ">", "|", "="):
            raise ValueError("not an array of integers")
        return np.dtype(f"{self.order}{self.code}")


class _Latin1:
    """Stands for `_codecs.encode`, by which Python 3 writes bytes for Python 2."""

    text: str

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if encoding not in ("latin1", b"latin1", "latin-1") or not isinstance(text, str):
            raise ValueError("bytes in another encoding than Latin-1")
        self = super().__new__(cls)
        self.text = text
        # A text may be named many times: were each a copy, a small file could fill the memory.
        return self.decoded() if len(text) <= _DECODED_AT_ONCE else self

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state for bytes")

    def decoded(self) -> bytes:
        return self.text.encode("latin-1")


class _Reconstruct:
    """Stands for `_reconstruct`, which makes an empty array that its state then fills."""

    def __new__(cls, *_: Any) -> Any:
        return PickledArray()

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state for a function")


class _FromBuffer:
    """Stands for `_frombuffer`, which protocol 5 calls."""

    def __new__(cls, raw: Any, dtype: Any, shape: Any, order: Any) -> Any:
        array = PickledArray()
        array.raw, array.dtype, array.shape, array.fortran = raw, dtype, shape, order in ("F", b"F")
        return array

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state for a function")


class _Scalar:
    """Stands for `scalar`: a numpy integer becomes a Python one."""

    def __new__(cls, dtype: Any, raw: Any) -> Any:
        array = PickledArray()
        array.raw, array.dtype, array.shape = raw, dtype, ()
        return int(array.values())

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state for a function")


_KNOWN: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Latin1,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 2 renamed it
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _Reconstruct
    _KNOWN[f"{_core}.multiarray", "scalar"] = _Scalar
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _FromBuffer

# All that plain values and arrays need: no instances, extension codes, persistent ids, sets or out-of-band buffers.
_OPCODES = (
    pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.POP + pickle.POP_MARK
    + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.INT + pickle.LONG
    + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1 + pickle.LONG4 + pickle.FLOAT + pickle.BINFLOAT
    + pickle.STRING + pickle.BINSTRING + pickle.SHORT_BINSTRING + pickle.UNICODE + pickle.BINUNICODE
    + pickle.SHORT_BINUNICODE + pickle.BINUNICODE8 + pickle.BINBYTES + pickle.SHORT_BINBYTES + pickle.BINBYTES8
    + pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
    + pickle.EMPTY_LIST + pickle.LIST + pickle.APPEND + pickle.APPENDS + pickle.EMPTY_DICT
    + pickle.PUT + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE + pickle.GET + pickle.BINGET + pickle.LONG_BINGET
    + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.REDUCE + pickle.BUILD
)  # fmt: skip


class _PlainUnpickler(pickle._Unpickler):
    """Python's reader with fewer opcodes, and with its own classes for the names in a file."""

    dispatch: ClassVar[dict[int, Any]] = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}

    stack: list[Any]  # these four are Python's
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._path = path

    def find_class(self, module_name: str, global_name: str) -> type:
        """The stand-in for a name.

        Raises:
            InputError: it has none.
        """
        known = _KNOWN.get((str(module_name), str(global_name)))
        if known is None:
            wanted = f"{module_name}.{global_name}"
            raise InputError(
                f"{self._path}: not a plain batch: it wants {wanted:.80}, and only numpy's arrays of integers are read"
            )
        return known

    def _set_item(self) -> None:
        value = self.stack.pop()
        self._set(self.stack.pop(), value)

    def _set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        # Tuples of tuples of the same tuples take for ever to hash.
        if type(key) not in (str, bytes) or type(self.stack[-1]) is not dict:
            raise ValueError("a key that is not a string")
        self.stack[-1][key] = value

    def _bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(min(length, MAX_BYTES)))  # bytes will do, and are not made before they are there

    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray8


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle file, its keys as strings, its arrays as `PickledArray`.

    Raises:
        InputError: it cannot be read, is larger than such files are, is damaged or not a dictionary, or wants anything
            but plain values and arrays.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES:,} bytes; CIFAR's batches are smaller")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        found = _PlainUnpickler(content, path).load()
        if type(found) is not dict:
            raise ValueError(f"it holds a {type(found).__name__}, not a dictionary")
        return {key.decode("utf-8") if isinstance(key, bytes) else key: value for key, value in found.items()}
    except InputError:
        raise
    except Exception as error:  # a damaged file makes Python's reader fail in any way; nothing else runs here
        raise InputError(f"{path}: not a pickled batch, or damaged ({type(error).__name__}: {error!s:.80})") from error
