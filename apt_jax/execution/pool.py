"""The cache pool on the device: its shapes and bytes, and converting hidden blocks to KV in place.

The pool is flat, `[L*P, S, D]`; block b of layer l is row `l*P + b`. Flat, because a pool carried through
`lax.scan` and donated stays in place only when no layer's slice of it is taken (docs/hybrid_cache.md). Where it
is split over devices, D is a device's slice and N are its heads.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from apt_jax.attention.int8 import Coded, decode, encode
from apt_jax.attention.pool import Pool, scale_row
from apt_jax.model_config import ModelConfig
from apt_jax.models.interface import Layer, Model, num_layers
from apt_jax.models.sharding import zeros
from apt_jax.pallas_kernels.dispatch import Kernels


def pool_shape(config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, int, int]:
    """Shape `(L*P, S, D)` of a pool of P = `num_blocks`."""
    return config.num_hidden_layers * num_blocks, block_size, config.hidden_size


def abstract_pool(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    dtype: DTypeLike,
    *,
    is_coded: bool = False,
    keeps_hidden: bool = True,
    num_devices: int = 1,
    sharding: Sharding | None = None,
) -> Pool:
    """Shapes of a pool of P = `num_blocks`.

    Args:
        dtype: that the model computes in.
        is_coded: the pool is int8 nevertheless.
        keeps_hidden: hidden vectors may be in it.
        num_devices: that it is split over, as `sharding` says.
    """
    shape = pool_shape(config, num_blocks, block_size)
    L, D, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads // num_devices

    def array(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if not is_coded:
        return Pool(array(shape, dtype))
    return Pool(
        array(shape, jnp.int8),
        array((shape[0], 1, num_devices * scale_row(block_size, heads)), jnp.float32),
        array((2, L, D), jnp.float32) if keeps_hidden else None,
        array((1, 1, num_devices), jnp.uint32) if keeps_hidden else None,
        heads,
        jnp.dtype(dtype),
    )


class Block(NamedTuple):
    """What a pool holds of one block, in all layers: numbers `[L, S, D]`, and an int8 pool's scales `[L, 1, ...]`."""

    numbers: Any
    scales: Any = None


def abstract_block(pool: Pool, num_blocks: int) -> Block:
    """Shapes of a block of a pool of P = `num_blocks`, which may be shapes too."""

    def of(array: Any) -> Any:
        shape = (array.shape[0] // num_blocks, *array.shape[1:])
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=array.sharding)

    return Block(of(pool.numbers), None if pool.scales is None else of(pool.scales))


def read_blocks(pool: Pool, blocks: jax.Array, num_blocks: int) -> tuple[Block, ...]:
    """A copy of each of `blocks`, int32 `[K]`, of a pool of P = `num_blocks`. Pure."""

    def one(array: jax.Array, block: jax.Array) -> jax.Array:
        by_layer = array.reshape(-1, num_blocks, *array.shape[1:])
        return jax.lax.dynamic_index_in_dim(by_layer, block, 1, keepdims=False)

    return tuple(
        Block(one(pool.numbers, block), None if pool.scales is None else one(pool.scales, block)) for block in blocks
    )


def write_blocks(pool: Pool, blocks: jax.Array, found: Sequence[Block], num_blocks: int) -> Pool:
    """The pool with what was found by `read_blocks` in `blocks`, int32 `[K]`. Pure."""

    def one(array: jax.Array, block: jax.Array, own: jax.Array) -> jax.Array:
        by_layer = array.reshape(-1, num_blocks, *array.shape[1:])
        return jax.lax.dynamic_update_index_in_dim(by_layer, own, block, 1).reshape(array.shape)

    for block, own in zip(blocks, found, strict=True):
        pool = replace(pool, numbers=one(pool.numbers, block, own.numbers))
        if pool.scales is not None:
            pool = replace(pool, scales=one(pool.scales, block, own.scales))
    return pool


def abstract_encoded(block: Block, heads: int) -> Block:
    """Shapes of `encoded` blocks."""
    numbers = block.numbers
    scales = jax.ShapeDtypeStruct((*numbers.shape[:2], heads), jnp.float32, sharding=numbers.sharding)
    return Block(jax.ShapeDtypeStruct(numbers.shape, jnp.int8, sharding=numbers.sharding), scales)


def encoded(block: Block, head_dim: int) -> Block:
    """A block that is not coded as int8 numbers `[L, S, D]` and float32 scales `[L, S, N]`, one of each head. Pure.

    Each number differs from what it was by at most half of its scale, the 127th part of the head's greatest number;
    `decoded` to bfloat16, where it is rounded again, by at most a scale.
    """
    return Block(*encode(block.numbers, block.numbers.shape[-1] // head_dim))


def decoded(block: Block, dtype: DTypeLike) -> Block:
    """What an `encoded` block stands for. Pure."""
    return Block(decode(Coded(block.numbers, block.scales), dtype))


def block_bytes(pool: Pool, num_blocks: int) -> int:
    """Bytes of one block over all layers and devices, in a pool of P = `num_blocks` (shapes suffice)."""
    arrays = [array for array in (pool.numbers, pool.scales) if array is not None]
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays) // num_blocks


def empty_pool(shapes: Pool, channels: np.ndarray | None, sharding: Sharding) -> Pool:
    """A pool of zeros made on the devices.

    Args:
        channels: `[2, L, D]`, where it has such.
    """
    pool = jax.tree.map(lambda leaf: zeros(leaf.shape, leaf.dtype, sharding), replace(shapes, channels=None))
    if shapes.channels is None:
        return pool
    assert channels is not None and channels.shape == shapes.channels.shape, "an int8 pool needs the channels' ranges"
    values = channels.astype(np.float32)
    return replace(pool, channels=jax.make_array_from_callback(values.shape, sharding, values.__getitem__))


def convert_blocks(
    model: Model, pool: Pool, hidden_blocks: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array,
    num_blocks: int, kernels: Kernels | None = None,
) -> Pool:  # fmt: skip
    """Compute KV of hidden blocks: values go to new blocks, and keys too or where the hidden vectors are.

    One matrix product over the cached hidden vectors per layer, no new prefill. Everything is read before anything is
    written. Source: docs/hybrid_cache.md.

    Args:
        hidden_blocks, key_blocks, value_blocks: int32 `[K]` blocks of the pages; padding is `num_blocks`.
        kernels: that read and write an int8 pool.
    """
    graphdef, stacked = nnx.split(model.layers)
    blocks = hidden_blocks, key_blocks, value_blocks

    def one_layer(pool: Pool, xs: tuple[jax.Array, nnx.State]) -> tuple[Pool, None]:
        layer, state = xs
        return convert_layer(nnx.merge(graphdef, state), pool, layer, *blocks, num_blocks, kernels), None

    pool, _ = jax.lax.scan(one_layer, pool, (jnp.arange(num_layers(model.layers), dtype=jnp.int32), stacked))
    return pool


def convert_layer(
    layer: Layer,
    pool: Pool,
    index: jax.Array,
    hidden_blocks: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    num_blocks: int,
    kernels: Kernels | None = None,
) -> Pool:
    """`convert_blocks` in layer number `index` (int32 scalar) only. Pure."""
    nowhere = pool.numbers.shape[0]
    base = index * num_blocks
    is_page = hidden_blocks < num_blocks
    key_rows, value_rows = (jnp.where(is_page, base + blocks, nowhere) for blocks in (key_blocks, value_blocks))
    x = pool.read(jnp.minimum(base + hidden_blocks, nowhere - 1), pool.read_dtype, kernels)
    h = pool.channels_of(index).vectors(x, pool.dtype)
    for rows, vectors in zip((key_rows, value_rows), layer.self_attn.keys_values(h), strict=True):
        pool = pool.replace_blocks(rows, pool.keep(vectors.reshape(-1, *vectors.shape[2:])), kernels)
    return pool
