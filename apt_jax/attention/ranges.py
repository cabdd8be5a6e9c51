"""The ranges of a model's hidden vectors over a text, which an int8 cache goes by."""

import jax
import jax.numpy as jnp

from apt_jax.attention.paged import causal_tiles
from apt_jax.batching.arrays import Tokens
from apt_jax.models.collectives import local_slice
from apt_jax.models.interface import Attend
from apt_jax.models.linear import AttentionProjections


def no_ranges(num_layers: int, width: int) -> jax.Array:
    """Float32 `[2, L, D]`: least and greatest of no vector at all."""
    return jnp.broadcast_to(jnp.float32([jnp.inf, -jnp.inf])[:, None, None], (2, num_layers, width))


def measuring_attention(ids: jax.Array, length: jax.Array) -> Attend[jax.Array]:
    """Causal attention of one sequence that notes the range of every channel.

    Args:
        ids: int32 `[T]`, of which the first `length` count.

    Returns:
        An `Attend` whose cache is `no_ranges`, filled in layer by layer. The first token is left out: OPT's may be many
        times larger than the others, and has a scale of its own in the cache anyway.
    """
    position = jnp.arange(len(ids), dtype=jnp.int32)
    tokens = Tokens(ids, jnp.zeros(len(ids), bool), (position >= length).astype(jnp.int32), position)
    counted = ((position > 0) & (position < length))[:, None]

    def attend(
        projections: AttentionProjections, h: jax.Array, ranges: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        kv, vectors = projections.kv, h.astype(jnp.float32)
        least = jnp.where(counted, vectors, jnp.inf).min(0)
        greatest = jnp.where(counted, vectors, -jnp.inf).max(0)
        keys, values = kv.keys_values(local_slice(h, axis=1) if kv.splits_inputs else h)
        context = causal_tiles(projections.query(h), keys, values, tokens).out
        return context.astype(h.dtype), ranges.at[:, layer].set(jnp.stack([least, greatest]))

    return attend
