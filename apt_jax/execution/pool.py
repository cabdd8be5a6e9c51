"""The cache pool on the device: its shape and bytes, and converting hidden blocks to KV in place.

The pool is one flat array `[L*P, S, D]`; block b of layer l is row `l*P + b`. Flat, because a pool carried through
`lax.scan` and donated stays in place only when no layer's slice of it is taken (docs/hybrid_cache.md). Where it
is split over devices, D is a device's slice and N are its heads.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from apt_jax.model_config import ModelConfig
from apt_jax.models.interface import Layer, Model, num_layers


def pool_shape(config: ModelConfig, num_blocks: int, block_size: int) -> tuple[int, int, int]:
    """Shape `(L*P, S, D)` of a pool of P = `num_blocks`."""
    return config.num_hidden_layers * num_blocks, block_size, config.hidden_size


def block_bytes(config: ModelConfig, block_size: int, dtype: DTypeLike) -> int:
    """Bytes of one block over all layers."""
    return config.num_hidden_layers * block_size * config.hidden_size * jnp.dtype(dtype).itemsize


def convert_blocks(
    model: Model, pool: jax.Array, hidden_blocks: jax.Array, value_blocks: jax.Array, num_blocks: int
) -> jax.Array:
    """Convert hidden blocks to KV in place: keys replace the hidden vectors in their blocks, values go to new blocks.

    One matrix product over the cached hidden vectors per layer, no new prefill. Source: docs/hybrid_cache.md.

    Args:
        hidden_blocks, value_blocks: int32 `[K]` blocks of the pages to convert; padding is `num_blocks`.
    """
    graphdef, stacked = nnx.split(model.layers)

    def one_layer(pool: jax.Array, xs: tuple[jax.Array, nnx.State]) -> tuple[jax.Array, None]:
        layer, state = xs
        return convert_layer(nnx.merge(graphdef, state), pool, layer, hidden_blocks, value_blocks, num_blocks), None

    pool, _ = jax.lax.scan(one_layer, pool, (jnp.arange(num_layers(model.layers), dtype=jnp.int32), stacked))
    return pool


def convert_layer(
    layer: Layer,
    pool: jax.Array,
    index: jax.Array,
    hidden_blocks: jax.Array,
    value_blocks: jax.Array,
    num_blocks: int,
) -> jax.Array:
    """`convert_blocks` in layer number `index` (int32 scalar) only. Pure."""
    nowhere = pool.shape[0]
    base = index * num_blocks
    key_rows = jnp.where(hidden_blocks < num_blocks, base + hidden_blocks, nowhere)
    value_rows = jnp.where(hidden_blocks < num_blocks, base + value_blocks, nowhere)
    h = pool[jnp.minimum(key_rows, nowhere - 1)]
    k, v = (x.reshape(h.shape) for x in layer.self_attn.keys_values(h))
    pool = pool.at[key_rows].set(k.astype(pool.dtype), mode="drop")
    return pool.at[value_rows].set(v.astype(pool.dtype), mode="drop")
