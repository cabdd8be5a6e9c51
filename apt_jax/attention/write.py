"""Writing a step's tokens to the cache pool, in place when it is donated."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from operator import or_

import jax
import jax.numpy as jnp

from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Kept, Pool
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import Vector
from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.dispatch import Kernels


def token_writer(
    tokens: Tokens, rows: Rows, block_size: int, *, kinds: KindMix, kernels: Kernels | None = None
) -> Callable[[Pool, jax.Array, Mapping[Vector, Kept]], Pool]:
    """How this step writes the vectors that each row's kind keeps into their blocks.

    Args:
        kinds: cache kinds that can occur.
        kernels: without a `cache_writer`, or None: XLA's scatter; likewise `scale_writer` for an int8 pool.

    Returns:
        `write(pool, base, kept)`: the pool with what is kept of every token, in the layer whose first block is `base`.
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

    kernel, scale_kernel = (None, None) if kernels is None else (kernels.cache_writer, kernels.scale_writer)
    places = blocks(0), blocks(1), offset
    write_vectors = (kernel or reference.cache_writer)(*places)
    write_scales = partial((scale_kernel or reference.scale_writer), *places, block_size=block_size)

    def write(pool: Pool, base: jax.Array, kept: Mapping[Vector, Kept]) -> Pool:
        def vectors(number: int) -> Kept | None:
            """What goes to `blocks(number)`; None if no kind keeps so many vectors."""
            found: Kept | None = None
            for kind in kinds:
                if number < kind.blocks_per_page:
                    own, mine = kept[kind.spec.vectors[number]], is_kind[kind][:, None]
                    found = own if found is None else jax.tree.map(partial(jnp.where, mine), own, found)
            return found

        first, second = vectors(0), vectors(1)
        assert first is not None, "every kind keeps something"
        numbers = write_vectors(pool.numbers, base, first.numbers, None if second is None else second.numbers)
        pool = replace(pool, numbers=numbers)
        if pool.scales is None or first.scales is None:
            return pool
        scales = write_scales()(pool.scales, base, first.scales, None if second is None else second.scales)
        return replace(pool, scales=scales)

    return write
