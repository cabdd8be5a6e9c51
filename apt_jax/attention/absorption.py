"""Attention to cached hidden vectors without keys and values: the projections are absorbed into query and output.

Shape letters as in `paged.py`. Source: docs/hybrid_cache.md; the same step in multi-head latent attention, arXiv
2405.04434.
"""

import jax
import jax.numpy as jnp

from apt_jax.models.collectives import all_gather
from apt_jax.models.linear import KeyValueProjections, scatter_heads


def absorb_query(projections: KeyValueProjections, q: jax.Array) -> jax.Array:
    """q' = q Wk^T, `[T, N, H] -> [T, N, D]` in float32. Source: docs/hybrid_cache.md.

    Split over devices, N are a device's heads in q and all heads in q', of which it has its slice of D.
    """
    kernel = projections.key.by_head()
    q = all_gather(q, axis=1)
    T, N, _ = q.shape
    P, D, _ = kernel.shape
    parts = q.reshape(T, P, -1).swapaxes(0, 1)
    wide = jnp.einsum("PTH,PDH->PTD", parts, kernel, preferred_element_type=jnp.float32)
    if P > N:
        wide = wide.reshape(N, P // N, T, D).sum(1)
    return wide.swapaxes(0, 1)


def key_bias_score(projections: KeyValueProjections, q: jax.Array) -> jax.Array:
    """q . bk `[T, N]`: constant over positions, but counts when parts of a context are merged."""
    if projections.key_bias is None:
        return jnp.zeros(q.shape[:2], jnp.float32)
    return jnp.einsum("TNH,NH->TN", q, projections.key_bias, preferred_element_type=jnp.float32)


def absorbed_values(projections: KeyValueProjections, context: jax.Array) -> jax.Array:
    """`context Wv + bv`, `[T, N, D] -> [T, N, H]` in float32: the weights sum to 1, so bv counts once.

    Split over devices, a slice of D of all heads goes in, and the device's own heads come out.
    """
    kernel = projections.value.by_head().astype(context.dtype)
    T, N, _ = context.shape
    of_parts = context.swapaxes(0, 1)
    if len(kernel) > N:
        of_parts = jnp.repeat(of_parts, len(kernel) // N, axis=0)
    by_part = jnp.einsum("PTD,PDH->PTH", of_parts, kernel, preferred_element_type=jnp.float32)
    out = scatter_heads(by_part.swapaxes(0, 1).reshape(T, N, -1))
    bias = projections.value_bias
    return out if bias is None else out + bias.astype(jnp.float32)
