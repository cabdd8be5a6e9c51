"""Writing a step's tokens to the cache pool `[L*P, S, D]`, in place when it is donated."""

from collections.abc import Callable
from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp

from apt_jax.attention.kinds import KindMix
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import Vector
from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.dispatch import Kernels


def token_writer(
    tokens: Tokens, rows: Rows, block_size: int, *, kinds: KindMix, kernels: Kernels | None = None
) -> Callable[..., jax.Array]:
    """How this step writes the vectors that each row's kind keeps into their blocks.

    Args:
        kinds: cache kinds that can occur.
        kernels: without a `cache_writer`, or None: XLA's scatter.

    Returns:
        `write(pool, base, *, h, k, v)`: the pool `[L*P, S, D]` with attention inputs `h [T, D]`, or `k` and `v`
        `[T, N, H]`, in the layer whose first block is `base`.
    """
    R = rows.length.shape[0]
    row = jnp.minimum(tokens.row, R - 1)
    page, offset = tokens.position // block_size, tokens.position % block_size
    real = tokens.row < R
    is_kind = {kind: rows.of_kind(kind)[row] for kind in kinds}

    def blocks(number: int) -> jax.Array:
        """int32 `[T]`: the block for vector `number` of each token, -1 where its kind keeps fewer."""
        lacks = [is_kind[kind] for kind in kinds if kind.blocks_per_page <= number]
        has = real & ~reduce(or_, lacks) if lacks else real
        return jnp.where(has, rows.tables[number][row, page], -1)

    kernel = None if kernels is None else kernels.cache_writer
    write_vectors = (kernel or reference.cache_writer)(blocks(0), blocks(1), offset)

    def write(pool: jax.Array, base: jax.Array, *, h: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        values = {Vector.HIDDEN: h, Vector.KEY: k, Vector.VALUE: v}

        def vectors(number: int) -> jax.Array | None:
            """`[T, D]` what goes to `blocks(number)`; None if no kind keeps so many vectors."""
            found: jax.Array | None = None
            for kind in kinds:
                if number < kind.blocks_per_page:
                    own = values[kind.spec.vectors[number]].reshape(-1, pool.shape[2])
                    found = own if found is None else jnp.where(is_kind[kind][:, None], own, found)
            return found

        first = vectors(0)
        assert first is not None, "every kind keeps something"
        return write_vectors(pool, base, first, vectors(1))

    return write
