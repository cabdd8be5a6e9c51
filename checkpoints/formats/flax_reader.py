"""Tensors of one `flax_model*.msgpack` file, located by walking its headers and read in strips.

`flax.serialization.msgpack_restore` needs the whole file in memory, twice; a served model's file may be as
large as memory. So this walks the same format: nested maps whose leaves are extension type 1, each a packed
`(shape, dtype name, bytes)`, and a map marked `__msgpack_chunked_array__` for an array above 1 GiB.

Source: flax `serialization.py` (`_ndarray_to_bytes`, `_chunk`); msgpack's specification for the headers.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np

from apt_jax.checkpoints.errors import CheckpointError, first_line
from apt_jax.checkpoints.formats.stored_tensor import FLOATING, StoredTensor
from apt_jax.checkpoints.mapping import WeightMapping

_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY = 1  # flax's extension code
_ARRAY_HEAD_BYTES = 256  # more than a shape and a dtype name ever take
# First byte -> bytes of the length that follows it.
_MAPS, _EXTENSIONS, _BINARIES = {0xDE: 2, 0xDF: 4}, {0xC7: 1, 0xC8: 2, 0xC9: 4}, {0xC4: 1, 0xC5: 2, 0xC6: 4}
_STRINGS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # first byte -> bytes of data
_SCALARS = {
    **dict.fromkeys((0xC0, 0xC2, 0xC3), 0),  # nil, false, true
    **{0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8},  # numbers
}


@dataclasses.dataclass(frozen=True)
class _Array:
    """Where an array's elements lie: `pieces` are (elements, byte offset in the file), in order."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]


def read_flax(path: Path, mapping: WeightMapping) -> list[StoredTensor]:
    """List the tensors of `path`; reads headers only.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt, or no tree of named arrays.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            tree = _Walk(file, size).value()
            if file.tell() != size:
                raise ValueError(f"{size - file.tell()} bytes follow its end")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (ValueError, TypeError, EOFError, OSError, RecursionError, msgpack.UnpackException) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({first_line(error)}); fetch it again") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds no tree of named arrays")
    found: list[StoredTensor] = []
    for keys, leaf in _leaves(tree, ()):
        stored = "/".join(keys)
        if not isinstance(leaf, _Array):
            raise CheckpointError(f"{path} holds {stored!r}, a {type(leaf).__name__} and no array")
        name = mapping.flax_name(keys)
        if name is not None:
            rows = _Rows(path, stored, leaf)
            found.append(StoredTensor(stored, name, path, leaf.shape, leaf.dtype, True, rows))
    return found


class _Walk:
    """Reads msgpack values from a file, seeking past the arrays' elements."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def value(self) -> Any:
        """The value at the file's position: a dict, a scalar, a string or an `_Array`."""
        first = self._take(1)
        tag = first[0]
        if 0x80 <= tag <= 0x8F:
            return self._map(tag & 0x0F)
        if tag in _MAPS:
            return self._map(self._length(_MAPS[tag]))
        if tag in _EXTENSIONS:
            return self._extension(self._length(_EXTENSIONS[tag]))
        if tag in _FIXED_EXTENSIONS:
            return self._extension(_FIXED_EXTENSIONS[tag])
        if 0xA0 <= tag <= 0xBF:
            return self._take(tag & 0x1F).decode()
        if tag in _STRINGS:
            return self._take(self._length(_STRINGS[tag])).decode()
        if tag in _SCALARS or tag <= 0x7F or tag >= 0xE0:
            return msgpack.unpackb(first + self._take(_SCALARS.get(tag, 0)))
        raise ValueError(f"unexpected byte {tag:#04x} at offset {self.file.tell() - 1}")

    def _take(self, count: int) -> bytes:
        if self.file.tell() + count > self.size:
            raise EOFError(f"it ends at byte {self.size}, in the middle of a value")
        return self.file.read(count)

    def _length(self, width: int) -> int:
        return int.from_bytes(self._take(width), "big")

    def _map(self, entries: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(entries):
            key = self.value()
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} is not a string")
            if key in found:
                raise ValueError(f"key {key!r} occurs twice")
            found[key] = self.value()
        return _joined(found) if _CHUNKED in found else found

    def _extension(self, length: int) -> Any:
        code = int.from_bytes(self._take(1), "big", signed=True)
        start = self.file.tell()
        if start + length > self.size:
            raise EOFError(f"it has {self.size} bytes, and an array ends at byte {start + length}")
        if code != _NDARRAY:
            raise ValueError(f"extension type {code} at offset {start} is no array")
        array = _located(self.file.read(min(length, _ARRAY_HEAD_BYTES)), start, start + length)
        self.file.seek(start + length)
        return array


def _located(head: bytes, start: int, end: int) -> _Array:
    """Parse a packed `(shape, dtype name, bytes)` of which `head` is the beginning."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(head)
    if unpacker.read_array_header() != 3:
        raise ValueError(f"the array at offset {start} is malformed")
    shape, dtype = tuple(unpacker.unpack()), unpacker.unpack()
    position = unpacker.tell()
    width = _BINARIES.get(head[position])
    if width is None or not all(isinstance(n, int) and n >= 0 for n in shape) or not isinstance(dtype, str):
        raise ValueError(f"the array at offset {start} is malformed")
    first = position + 1 + width
    nbytes = int.from_bytes(head[position + 1 : first], "big")
    elements = int(np.prod(shape))
    item_bytes = FLOATING[dtype].itemsize if dtype in FLOATING else nbytes // max(elements, 1)
    if start + first + nbytes != end or nbytes != elements * item_bytes:
        raise ValueError(f"the array at offset {start} has {nbytes} bytes, not those of {shape} {dtype}")
    return _Array(shape, dtype, ((elements, start + first),))


def _joined(parts: dict[str, Any]) -> _Array:
    """One `_Array` of a chunked one: flat chunks in the order of their numbers."""
    shape = tuple(parts["shape"][str(i)] for i in range(len(parts["shape"])))
    chunks = [parts["chunks"][str(i)] for i in range(len(parts["chunks"]))]
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    if sum(elements for elements, _ in pieces) != int(np.prod(shape)) or len({c.dtype for c in chunks}) != 1:
        raise ValueError(f"the chunks of an array of shape {shape} do not make it up")
    return _Array(shape, chunks[0].dtype, pieces)


def _leaves(tree: dict[str, Any], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


class _Rows:
    """Yields strips of one array; see `StoredTensor.rows`."""

    def __init__(self, path: Path, stored_name: str, array: _Array):
        self.path, self.stored_name, self.array = path, stored_name, array

    def __call__(self, step: int) -> Iterator[np.ndarray]:
        total, *rest = self.array.shape
        row_elements = int(np.prod(rest))
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, total, step):
                stop = min(start + step, total)
                flat = self._elements(file, start * row_elements, stop * row_elements)
                yield flat.reshape(stop - start, *rest)

    def _elements(self, file: Any, start: int, stop: int) -> np.ndarray:
        """Elements `start..stop-1` of the flattened array, from the pieces they lie in."""
        dtype = FLOATING[self.array.dtype]
        result = np.empty(stop - start, dtype)
        begin = 0  # first element of the current piece
        for elements, offset in self.array.pieces:
            low, high = max(start, begin), min(stop, begin + elements)
            if low < high:
                file.seek(offset + (low - begin) * dtype.itemsize)
                target = memoryview(result[low - start : high - start].view(np.uint8))
                if file.readinto(target) != len(target):
                    raise CheckpointError(f"{self.path} ends inside {self.stored_name!r}; fetch it again")
            begin += elements
        return result
