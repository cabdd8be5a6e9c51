"""Memory in large pages, for arrays that are read from one end to the other again and again."""

import contextlib
import math
import mmap

import numpy as np
from numpy.typing import DTypeLike

_PAGE_BYTES = 2 << 20
_ALIGNMENT = 64  # or JAX copies an array instead of using it where it is


class LargePages:
    """A piece of memory in large pages where the system has them (Linux), from which arrays are cut one by one.

    It is given back when the last of them is gone; what is never written takes no memory.
    """

    def __init__(self, num_bytes: int):
        size = num_bytes + _PAGE_BYTES
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no large ones
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            memory = mmap.mmap(-1, size)
        self._bytes = np.frombuffer(memory, np.uint8)
        self._begin = -self._bytes.ctypes.data % _PAGE_BYTES
        self._end = self._begin + num_bytes

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """An array of any contents. Raises ValueError if there is no room for it."""
        begin, num_bytes = self._begin, math.prod(shape) * np.dtype(dtype).itemsize
        if begin + num_bytes > self._end:
            raise ValueError(f"no room for {num_bytes} bytes, {max(self._end - begin, 0)} are left")
        self._begin = begin + aligned(num_bytes)
        return self._bytes[begin : begin + num_bytes].view(dtype).reshape(shape)


def aligned(num_bytes: int) -> int:
    """Bytes that an array of this size takes of a piece of memory, with padding."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
