"""How the host follows a call that runs several iterations, and keeps it going; see `relay.h`."""

import ctypes
import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.cpu_kernels import library


def hand_over(relay: jax.Array, results: Any, next_input: Any) -> tuple[jax.Array, Any]:
    """Give the host an iteration's results (a tree of arrays).

    Args:
        relay: int32 `[1]`, `Relay.number`.
        next_input: a tree of shapes.

    Returns:
        bool, whether another iteration follows, and what that works on; anything if none does.
    """
    inputs, tree = jax.tree.flatten(next_input)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in inputs]
    call = jax.ffi.ffi_call("apt_hand_over", [jax.ShapeDtypeStruct((), jnp.bool_), *shapes], has_side_effect=True)
    follows, *found = call(relay, *jax.tree.leaves(results))
    return follows, jax.tree.unflatten(tree, found)


class Relay:
    """The host's end; the call ends after the iteration that it is in when this is closed or forgotten.

    Args:
        first_input: what the first iteration works on, a tree of arrays.
        results: an iteration's, a tree of shapes.
        grace_s: how long the call waits for the next input before it ends.
    """

    def __init__(self, first_input: Any, results: Any, grace_s: float = 0.0):
        leaves, self._tree = jax.tree.flatten(results)
        self._leaves = [(leaf.shape, np.dtype(leaf.dtype), math.prod(leaf.shape)) for leaf in leaves]
        self._bytes = sum(dtype.itemsize * count for _, dtype, count in self._leaves)
        self._input_bytes = sum(array.nbytes for array in jax.tree.leaves(first_input))
        self.number: int = _functions().apt_open_relay(self._input_bytes, self._bytes, grace_s)

    def give(self, next_input: Any) -> bool:
        """Have one more iteration, of this input; False if the call has ended.

        The results of all but the last one given must have been waited for.
        """
        content = b"".join(array.tobytes() for array in jax.tree.leaves(next_input))
        assert len(content) == self._input_bytes
        return bool(_functions().apt_give(self.number, content))

    def wait(self, iteration: int, seconds: float) -> Any:
        """Results of an iteration, numbered from 0, as numpy arrays; None if it has not ended within `seconds`."""
        found = _functions().apt_wait(self.number, iteration, seconds)
        if not found:
            return None
        content, at, arrays = ctypes.string_at(found, self._bytes), 0, []
        for shape, dtype, count in self._leaves:
            arrays.append(np.frombuffer(content, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize
        return jax.tree.unflatten(self._tree, arrays)

    def end(self) -> None:
        """Give nothing more; what was given runs, and can be waited for."""
        _functions().apt_end(self.number)

    def close(self) -> None:
        """Give the call up."""
        _functions().apt_close_relay(self.number)

    def __del__(self) -> None:
        self.close()


@cache
def _functions() -> ctypes.CDLL:
    found = ctypes.CDLL(str(library.register()))
    found.apt_open_relay.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_double]
    found.apt_close_relay.argtypes = found.apt_end.argtypes = [ctypes.c_int]
    found.apt_give.argtypes, found.apt_give.restype = [ctypes.c_int, ctypes.c_char_p], ctypes.c_bool
    found.apt_wait.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    found.apt_wait.restype = ctypes.c_void_p
    return found
