"""The cache pool as attention reads and writes it, in the model's own number type or as int8 with scales.

Shape letters as in `paged.py`; T tokens of a step. Block b of layer l is row `l*P + b` of every array.

An int8 pool has a float32 scale for each token and head beside its numbers, in one array under the same block ids. A
block may hold a key, a value or a hidden vector and is read alike in each case: a hidden vector's scale stands in the
places of all heads. The scales of a block are one row of `N * S` numbers, head by head, padded to a TPU's 128 lanes:
as `[N, S]` each head's would be. Kernels read those of neighbouring heads together.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from apt_jax.attention.int8 import LARGEST, Channels, Coded, decode, encode
from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.dispatch import Kernels

LANES = 128


def scale_row(block_size: int, heads: int) -> int:
    """Numbers in a block's row of scales."""
    return -(-block_size * heads // LANES) * LANES


class Kept(NamedTuple):
    """Vectors of T tokens as the pool keeps them."""

    numbers: jax.Array  # [T, D]
    scales: jax.Array | None = None  # [T, N]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["numbers", "scales", "channels", "outside"],
    meta_fields=["heads", "computes"],
)
@dataclass(frozen=True)
class Pool:
    """All blocks of all layers. Split over devices, every array is split along its last axis.

    Attributes:
        numbers: `[L*P, S, D]`, of the model's number type, or int8.
        scales: float32 `[L*P, 1, scale_row(S, N)]` of an int8 pool, head by head; None: numbers are not coded.
        channels: float32 `[2, L, D]`, the `Channels` of every layer of an int8 pool with hidden vectors.
        outside: uint32 `[1, 1, 1]`, numbers of hidden vectors written so far that were outside their channel's range
            (centre plus or minus 127 widths), modulo 2^32; None without `channels`.
        heads: N, of this device; of an int8 pool only.
        computes: number type of the model, of an int8 pool only.
    """

    numbers: jax.Array
    scales: jax.Array | None = None
    channels: jax.Array | None = None
    outside: jax.Array | None = None
    heads: int = 1
    computes: np.dtype | None = None

    @property
    def dtype(self) -> np.dtype:
        """Number type that the model computes in."""
        return self.computes or self.numbers.dtype

    @property
    def read_dtype(self) -> np.dtype:
        """Number type in which vectors are to be read before `Channels.vectors`: not rounded twice."""
        return np.dtype(np.float32) if self.is_coded else self.numbers.dtype

    @property
    def block_size(self) -> int:
        """Tokens of a block, S."""
        return self.numbers.shape[1]

    @property
    def options(self) -> dict[str, jax.Array]:
        """What kernels that read it take in addition to its numbers."""
        return {} if self.scales is None else {"scales": self.scales}

    @property
    def is_coded(self) -> bool:
        """Whether it is int8, so that vectors are read otherwise than they were computed."""
        return self.scales is not None

    def channels_of(self, layer: jax.Array) -> Channels:
        """The channels of a layer's hidden vectors, this device's."""
        if self.channels is None:
            return Channels()
        centre, width = jax.lax.dynamic_index_in_dim(self.channels, layer, 1, keepdims=False)
        return Channels(centre, width)

    def read(self, blocks: jax.Array, dtype: DTypeLike, kernels: Kernels | None = None) -> jax.Array:
        """Vectors `[..., S, D]` of `blocks`, rows of the pool; hidden ones relative to their channels.

        Args:
            kernels: read the scales of blocks `[K]`, if they can: a TPU's gather first copies those of the pool.
        """
        numbers = self.numbers[blocks]
        if self.scales is None:
            return numbers.astype(dtype)
        read_scales = (None if kernels is None else kernels.scale_reader) or reference.scale_reader
        scales = read_scales(self.scales, blocks)
        by_head = scales[..., 0, : self.block_size * self.heads]
        by_head = by_head.reshape(*numbers.shape[:-2], self.heads, self.block_size)
        return decode(Coded(numbers, by_head.swapaxes(-1, -2)), dtype)

    def keep(self, x: jax.Array) -> Kept:
        """Keys or values `[T, N, H]` as the pool keeps them."""
        flat = x.reshape(x.shape[0], -1)
        return Kept(*encode(flat, self.heads)) if self.is_coded else Kept(flat)

    def keep_hidden(self, h: jax.Array, channels: Channels) -> Kept:
        """Hidden vectors `[T, D]` as the pool keeps them."""
        if not self.is_coded:
            return Kept(h)
        codes, scales = encode(channels.relative(h), 1)
        return Kept(codes, jnp.broadcast_to(scales, (len(h), self.heads)))

    def as_read(self, kept: Kept) -> jax.Array:
        """Float32 `[T, D]`: what `read` gives of vectors that are kept so."""
        return kept.numbers if kept.scales is None else decode(Coded(kept.numbers, kept.scales))

    def replace_blocks(self, blocks: jax.Array, kept: Kept, kernels: Kernels | None = None) -> "Pool":
        """The pool with rows `blocks [K]` replaced by what is kept of K * S tokens; those out of range go nowhere.

        Args:
            kernels: write to an int8 pool, which a TPU's scatter would copy; XLA does where they lack a writer.
        """
        S, size = self.block_size, len(self.numbers)
        numbers = kept.numbers.astype(self.numbers.dtype)
        if self.scales is None or kept.scales is None:
            by_block = numbers.reshape(-1, *self.numbers.shape[1:])
            return replace(self, numbers=self.numbers.at[blocks].set(by_block, mode="drop"))
        of_tokens = jnp.repeat(jnp.where(blocks < size, blocks, -1), S)
        places = of_tokens, jnp.full_like(of_tokens, -1), jnp.tile(jnp.arange(S, dtype=jnp.int32), len(blocks))
        writers = (None, None) if kernels is None else (kernels.cache_writer, kernels.scale_writer)
        write_numbers = (writers[0] or reference.cache_writer)(*places)
        write_scales = (writers[1] or reference.scale_writer)(*places, block_size=S)
        zero = jnp.int32(0)
        return replace(
            self,
            numbers=write_numbers(self.numbers, zero, numbers, None),
            scales=write_scales(self.scales, zero, kept.scales, None),
        )

    def count_outside(self, h: jax.Array, channels: Channels, counted: jax.Array) -> "Pool":
        """The pool with the numbers of `h [T, D]` outside their channels' ranges added, in tokens `counted [T]`."""
        if self.outside is None:
            return self
        beyond = (jnp.abs(channels.relative(h)) > LARGEST * (1 + 1e-6)) & counted[:, None]
        return replace(self, outside=self.outside + beyond.sum(dtype=jnp.uint32))
