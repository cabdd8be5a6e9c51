"""Kernels of 8-bit integers as the C++ matmul reads them: packed in tiles, with a float32 scale for each output."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from apt_jax.cpu_kernels.calls import matmul_int8
from apt_jax.cpu_kernels.large_pages import LargePages, aligned
from apt_jax.cpu_kernels.packed import PACKED_OUTPUTS, has_cut_heads
from apt_jax.models.kernels import Kernel

_WIDE = 4  # adjacent inputs; as kInStep of int8 in matmul.h


@dataclass(frozen=True)
class PackedInt8Kernel(Kernel):
    """An int8 kernel that is multiplied by `cpu_kernels`: `array = codes * scale`.

    Attributes:
        stored: codes from `pack_int8`.
        scale: float32 `[tiles * PACKED_OUTPUTS]`, of each output; zeros complete it.
        shape: see `Kernel`.
        dynamic: rows are quantised to int8 too, each with its own scale (greatest magnitude / 127), and products are
            sums of int32. Otherwise rows stay as they are, codes are widened, and sums are float32.
        dtype: number type of `array`, `columns` and `by_head`.
    """

    stored: jax.Array
    scale: jax.Array
    shape: tuple[int, ...]
    dynamic: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def array(self) -> jax.Array:
        """The unpacked array, a copy; no step needs it."""
        found = self._parts().swapaxes(0, 1).reshape(-1, len(self.scale))[: self._inputs, : self._outputs]
        return found.reshape(self.shape).astype(self.dtype)

    def matmul(self, x: jax.Array, axes: int = 1, dtype: DTypeLike | None = None) -> jax.Array:
        """See `Kernel`."""
        rows = matmul_int8(x.reshape(-1, self._inputs), self.stored, self.scale, self._outputs, dynamic=self.dynamic)
        return rows.reshape(*x.shape[: x.ndim - axes], *self.shape[axes:]).astype(dtype or x.dtype)

    def columns(self, index: jax.Array) -> jax.Array:
        """See `Kernel`."""
        codes = self.stored[index // PACKED_OUTPUTS, :, index % PACKED_OUTPUTS].reshape(*index.shape, -1)
        return (codes[..., : self._inputs].astype(jnp.float32) * self.scale[index][..., None]).astype(self.dtype)

    def by_head(self) -> jax.Array:
        """See `Kernel`: the tiles or, if heads are not whole ones, the heads; a copy."""
        if has_cut_heads(self.shape):
            return super().by_head()
        return self._parts()[:, : self._inputs].astype(self.dtype)

    def _parts(self) -> jax.Array:
        return self._codes().astype(jnp.float32) * self.scale.reshape(-1, 1, PACKED_OUTPUTS)

    def _codes(self) -> jax.Array:
        """`[tiles, inputs with padding, PACKED_OUTPUTS]`."""
        return self.stored.swapaxes(2, 3).reshape(len(self.stored), -1, PACKED_OUTPUTS)

    @property
    def _inputs(self) -> int:
        """Inputs without padding: the leading axes of `shape` that make up what is stored."""
        tiles, steps = self.stored.shape[:2]
        splits = ((math.prod(self.shape[:i]), math.prod(self.shape[i:])) for i in range(1, len(self.shape)))
        return next(
            inputs
            for inputs, outputs in splits
            if -(-inputs // _WIDE) == steps and -(-outputs // PACKED_OUTPUTS) == tiles
        )

    @property
    def _outputs(self) -> int:
        return math.prod(self.shape) // self._inputs


def packed_int8_bytes(inputs: int, outputs: int) -> int:
    """Bytes that a packed int8 kernel takes of `LargePages`."""
    return aligned(-(-outputs // PACKED_OUTPUTS) * -(-inputs // _WIDE) * PACKED_OUTPUTS * _WIDE)


def pack_int8(values: np.ndarray, memory: LargePages | None = None) -> np.ndarray:
    """Pack int8 `values [inputs, outputs]` for the C++ matmul; zeros complete the last inputs and the last tile.

    Args:
        values: codes in -127..127.
        memory: where to store it, see `packed.pack`.

    Returns:
        int8 `[tiles, ceil(inputs / 4), PACKED_OUTPUTS, 4]`: four adjacent inputs of an output are together.
    """
    inputs, outputs = values.shape
    tiles, steps, whole = -(-outputs // PACKED_OUTPUTS), -(-inputs // _WIDE), outputs // PACKED_OUTPUTS
    shape = (tiles, steps, PACKED_OUTPUTS, _WIDE)
    found = np.empty(shape, np.int8) if memory is None else memory.empty(shape, np.int8)
    if inputs % _WIDE:
        values = np.concatenate([values, np.zeros((steps * _WIDE - inputs, outputs), np.int8)])
    in_steps = values.reshape(steps, _WIDE, outputs)
    in_tiles = in_steps[:, :, : whole * PACKED_OUTPUTS].reshape(steps, _WIDE, whole, PACKED_OUTPUTS)
    found[:whole] = in_tiles.transpose(2, 0, 3, 1)
    if whole < tiles:
        found[whole] = 0
        found[whole, :, : outputs - whole * PACKED_OUTPUTS] = in_steps[:, :, whole * PACKED_OUTPUTS :].swapaxes(1, 2)
    return found
