"""The key-value header of a GGUF file, read through a memory map: about 60 ms for a vocabulary of 49k, where the gguf package takes seconds.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import array
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance.errors import ModelError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UNPACK = {kind: struct.Struct("<" + code) for kind, code in _SCALARS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MAX_DEPTH = 4  # of arrays in arrays; the format names no limit, real files use one level


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Every key-value pair of the header: scalars, str, and lists of them. Tensors are not touched.

    Text that is not UTF-8 keeps its bytes as lone surrogates ("surrogateescape"). Raises ModelError for a file that is no GGUF, is cut short or
    has a version this reader does not know.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != _MAGIC:
                raise ModelError(f"{path} is not a GGUF file: it starts with {data[:4]!r}, not {_MAGIC!r}")
            return _Reader(data, path).pairs()
    except (OSError, ValueError, struct.error, IndexError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"{path}: the GGUF header cannot be read ({error}); the file may be cut short") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 4

    def pairs(self) -> dict[str, Any]:
        version = self._number(_U32)
        if version not in (2, 3):
            raise ModelError(f"{self._path}: GGUF version {version} is not supported (2 and 3 are; 3 in big-endian order is not)")
        self._number(_U64)  # tensor count
        count = self._number(_U64)
        pairs: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            pairs[key] = self._value(self._number(_U32), 0)
        return pairs

    def _number(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self._data, self._at)
        self._at += kind.size
        return value

    def _string(self) -> str:
        length = self._number(_U64)
        start = self._at
        self._at = end = start + length
        if end > len(self._data):
            raise ValueError(f"a string of {length} bytes at {start} ends behind the file")
        return str(self._data[start:end], "utf-8", "surrogateescape")

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth)
        if kind not in _UNPACK:
            raise ValueError(f"unknown value type {kind}")
        return self._number(_UNPACK[kind])

    def _array(self, depth: int) -> list[Any]:
        if depth >= _MAX_DEPTH:
            raise ValueError("arrays are nested too deeply")
        kind = self._number(_U32)
        count = self._number(_U64)
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return [self._array(depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown array type {kind}")
        size = count * _UNPACK[kind].size
        raw = self._data[self._at : self._at + size]
        if len(raw) != size:
            raise ValueError(f"an array of {count} values ends behind the file")
        self._at += size
        if kind == 7:
            return [bool(byte) for byte in raw]
        values = array.array(_SCALARS[kind])
        values.frombytes(raw)
        return values.tolist()

    def _strings(self, count: int) -> list[str]:
        """The hot loop (a vocabulary and its merges): locals only, one slice and one decode a string."""
        data, at, size = self._data, self._at, len(self._data)
        unpack: Callable[..., tuple[int]] = _U64.unpack_from
        strings: list[str] = []
        for _ in range(count):
            (length,) = unpack(data, at)
            at += 8
            end = at + length
            if end > size:
                raise ValueError(f"a string of {length} bytes at {at} ends behind the file")
            strings.append(str(data[at:end], "utf-8", "surrogateescape"))
            at = end
        self._at = at
        return strings
