"""Kernels as the C++ matmul reads them: packed in tiles of `PACKED_OUTPUTS` outputs, in large pages of memory."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from apt_jax.cpu_kernels.calls import matmul
from apt_jax.cpu_kernels.large_pages import LargePages, aligned
from apt_jax.models.kernels import Kernel

PACKED_OUTPUTS = 32  # of a packed tile; as kPackedWidth in matmul.h
_LANES = 16  # of the widest registers


@dataclass(frozen=True)
class PackedKernel(Kernel):
    """A kernel that is multiplied by `cpu_kernels`."""

    stored: jax.Array  # from `pack`
    shape: tuple[int, ...]

    @property
    def array(self) -> jax.Array:
        """The unpacked array, a copy; no step needs it."""
        outputs = math.prod(self.shape) // self._inputs
        return self._tiles().swapaxes(0, 1).reshape(self._inputs, -1)[:, :outputs].reshape(self.shape)

    def matmul(self, x: jax.Array, axes: int = 1, dtype: DTypeLike | None = None) -> jax.Array:
        """See `Kernel`; the sums are float32."""
        inputs = math.prod(self.shape[:axes])
        rows = matmul(x.reshape(-1, inputs), self.stored, math.prod(self.shape) // inputs)
        return rows.reshape(*x.shape[: x.ndim - axes], *self.shape[axes:]).astype(dtype or x.dtype)

    def columns(self, index: jax.Array) -> jax.Array:
        """See `Kernel`."""
        found = self.stored[index // PACKED_OUTPUTS, :, index % PACKED_OUTPUTS]
        return found.reshape(*index.shape, -1)

    def by_head(self) -> jax.Array:
        """See `Kernel`: the packed tiles, of float32 without a copy; or heads, where they are not whole tiles."""
        return super().by_head() if has_cut_heads(self.shape) else self._tiles()

    def _tiles(self) -> jax.Array:
        if self.stored.ndim == 3:
            return self.stored
        return self.stored.swapaxes(2, 3).reshape(len(self.stored), -1, PACKED_OUTPUTS)

    @property
    def _inputs(self) -> int:
        return self.stored.shape[1] * (self.stored.shape[3] if self.stored.ndim == 4 else 1)


def can_pack(inputs: int, dtype: DTypeLike) -> bool:
    """Whether the C++ matmul takes such kernels: float32, or bfloat16 with an even number of inputs."""
    return dtype == jnp.float32 or (dtype == jnp.bfloat16 and inputs % 2 == 0)


def has_cut_heads(shape: tuple[int, ...]) -> bool:
    """Whether a kernel of heads `[D, N, H]` has some that begin or end inside a packed tile."""
    return len(shape) == 3 and shape[-1] % PACKED_OUTPUTS > 0


def can_absorb(inputs: int, head_dim: int) -> bool:
    """Whether the C++ layers take keys' and values' kernels of such heads: they are read by tiles of inputs."""
    return inputs % PACKED_OUTPUTS == 0 and head_dim % _LANES == 0


def packed_bytes(inputs: int, outputs: int, dtype: DTypeLike) -> int:
    """Bytes that a packed kernel takes of `LargePages`."""
    return aligned(-(-outputs // PACKED_OUTPUTS) * inputs * PACKED_OUTPUTS * np.dtype(dtype).itemsize)


def pack(kernel: np.ndarray, memory: LargePages | None = None) -> np.ndarray:
    """Pack a kernel `[inputs, outputs]` for `calls.matmul`; zeros complete the last tile.

    Args:
        kernel: one that `can_pack`.
        memory: where to store it; from large pages it is read up to a quarter faster. None uses any memory.

    Returns:
        `[tiles, inputs, PACKED_OUTPUTS]`, of bfloat16 `[tiles, inputs / 2, PACKED_OUTPUTS, 2]`.
    """
    inputs, outputs = kernel.shape
    wide = 2 if kernel.dtype == jnp.bfloat16 else 1  # as kInStep in matmul.h
    tiles, whole = -(-outputs // PACKED_OUTPUTS), outputs // PACKED_OUTPUTS
    shape = (tiles, inputs // wide, PACKED_OUTPUTS, wide)
    found = np.empty(shape, kernel.dtype) if memory is None else memory.empty(shape, kernel.dtype)
    steps = kernel.reshape(inputs // wide, wide, outputs)
    in_tiles = steps[:, :, : whole * PACKED_OUTPUTS].reshape(*steps.shape[:2], whole, PACKED_OUTPUTS)
    found[:whole] = in_tiles.transpose(2, 0, 3, 1)
    if whole < tiles:
        found[whole] = 0
        found[whole, :, : outputs - whole * PACKED_OUTPUTS] = steps[:, :, whole * PACKED_OUTPUTS :].swapaxes(1, 2)
    return found if wide > 1 else found[..., 0]
