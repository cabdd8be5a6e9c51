"""Memory in large pages, for arrays that are read from one end to the other again and again."""

import contextlib
import math
import mmap

import numpy as np
from numpy.typing import DTypeLike

_PAGE_BYTES = 2 << 20


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of any contents that begins at a large page, of which it is made where the system has them (Linux)."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, num_bytes + _PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    all_bytes = np.frombuffer(memory, np.uint8)
    begin = -all_bytes.ctypes.data % _PAGE_BYTES
    return all_bytes[begin : begin + num_bytes].view(dtype).reshape(shape)
