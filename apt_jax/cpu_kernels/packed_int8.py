"""Kernels of 8-bit integers as the C++ matmul reads them: packed in tiles, with a float32 scale for each output."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from apt_jax.cpu_kernels.large_pages import LargePages, aligned
from apt_jax.cpu_kernels.packed import PACKED_OUTPUTS
from apt_jax.models.kernels import Kernel

_LARGEST = 127  # code
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
    """

    stored: jax.Array
    scale: jax.Array
    shape: tuple[int, ...]
    dynamic: bool = False

    @property
    def array(self) -> jax.Array:
        """The unpacked array, float32, a copy; no step needs it."""
        found = self._parts().swapaxes(0, 1).reshape(-1, len(self.scale))[: self._inputs, : self._outputs]
        return found.reshape(self.shape)

    def matmul(self, x: jax.Array, axes: int = 1, dtype: DTypeLike | None = None) -> jax.Array:
        """See `Kernel`."""
        rows = x.reshape(-1, self._inputs)
        codes = self._codes().swapaxes(0, 1).reshape(-1, len(self.scale))[: self._inputs, : self._outputs]
        scale = self.scale[: self._outputs]
        if self.dynamic:
            own, own_scale = _quantized(rows)
            found = jnp.matmul(own, codes, preferred_element_type=jnp.int32).astype(jnp.float32) * own_scale
        else:
            found = jnp.matmul(rows.astype(jnp.float32), codes.astype(jnp.float32))
        found = found * scale
        return found.reshape(*x.shape[: x.ndim - axes], *self.shape[axes:]).astype(dtype or x.dtype)

    def columns(self, index: jax.Array) -> jax.Array:
        """See `Kernel`; float32."""
        codes = self.stored[index // PACKED_OUTPUTS, :, index % PACKED_OUTPUTS].reshape(*index.shape, -1)
        return codes[..., : self._inputs].astype(jnp.float32) * self.scale[index][..., None]

    def by_head(self) -> jax.Array:
        """See `Kernel`: the tiles, float32, a copy; heads must be whole tiles."""
        return self._parts()[:, : self._inputs]

    def _parts(self) -> jax.Array:
        return self._codes().astype(jnp.float32) * self.scale.reshape(-1, 1, PACKED_OUTPUTS)

    def _codes(self) -> jax.Array:
        """`[tiles, inputs with padding, PACKED_OUTPUTS]`."""
        return self.stored.swapaxes(2, 3).reshape(len(self.stored), -1, PACKED_OUTPUTS)

    @property
    def _inputs(self) -> int:
        """Inputs without padding: the leading axes of `shape` that make up as many as are stored."""
        inputs = 1
        for size in self.shape:
            if inputs > _WIDE * (self.stored.shape[1] - 1):
                break
            inputs *= size
        return inputs

    @property
    def _outputs(self) -> int:
        return math.prod(self.shape) // self._inputs


def _quantized(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes `[R, inputs]` and scales `[R, 1]`; a row that is not finite gets a scale that is not."""
    rows = rows.astype(jnp.float32)
    scale = jnp.abs(rows).max(1, keepdims=True) / _LARGEST
    usable = (scale > 0) & jnp.isfinite(scale)
    codes = jnp.round(rows / jnp.where(usable, scale, 1))
    return jnp.where(usable, codes, 0).astype(jnp.int8), scale


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
