"""Attention of prefill chunks over their rows' cached prefixes by Pallas kernels, merged with the chunks' own part.

Shape letters as in `paged.py`; T token slots in which the rows' chunks lie one after the other.

Over cached hidden vectors a row is attended to in one of two ways (docs/hybrid_cache.md), by counted cost: with few
queries they are absorbed; with many the row's prefix is projected to keys and values once, into a small pool of its
own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from apt_jax.attention.absorption import absorb_query, absorbed_values, key_bias_score
from apt_jax.attention.int8 import Channels
from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import Rows
from apt_jax.cache import Vector
from apt_jax.models.linear import KeyValueProjections
from apt_jax.pallas_kernels.dispatch import Kernels
from apt_jax.pallas_kernels.reference import Partial, merge

BALANCE_FLOPS_PER_BYTE = 240  # of a TPU v5e; other chips have 160 to 560, an H200 184
ABSORBED_TOKENS = 64  # absorbed at a time: N queries and N outputs of D numbers for each
PROJECTED_TOKENS = (
    512  # cached tokens projected at a time; beyond about BALANCE the products are no longer bound by Wk, Wv
)


def merge_prefix(
    own: Partial,
    projections: KeyValueProjections,
    q: jax.Array,
    pool: Pool,
    channels: Channels,
    rows: Rows,
    prefix: jax.Array,
    kernels: Kernels,
    kinds: KindMix,
) -> Partial:
    """Attention over the chunks' own tokens and over cached ones. Pure.

    Args:
        own: of every token over its own chunk, `[T, N, H]`.
        q: `[T, N, H]`, scaled.
        channels: of the layer's hidden vectors.
        rows: tables hold rows of the pool.
        prefix: int32 `[R]`, cached tokens that row r's chunk attends to; 0 leaves the row out.
        kernels: with prefix attention.
        kinds: cache kinds that can occur.
    """
    assert kernels.kv_prefix is not None
    first = rows.last - rows.length + 1
    is_hidden = rows.keep(Vector.HIDDEN)
    if kinds.keep(Vector.KEY):
        length = jnp.where(is_hidden, 0, prefix)

        def over_kv(own: Partial) -> Partial:
            tables = rows.table_of(Vector.KEY), rows.table_of(Vector.VALUE)
            return merge(own, kernels.kv_prefix(q, pool.numbers, *tables, length, first, rows.length, **pool.options))  # type: ignore[misc]

        own = _if(jnp.any(length > 0), over_kv, own)
    if kinds.keep(Vector.HIDDEN):
        length = jnp.where(is_hidden, prefix, 0)
        absorbs = absorbing_is_cheaper(
            rows.length, length, heads=q.shape[1], head_dim=q.shape[2], reads=kernels.hidden_prefix_reads
        )
        arguments = projections, q, pool, channels, rows
        own = _over_absorbed(own, *arguments, jnp.where(absorbs, length, 0), first, kernels)
        own = _over_projected(own, *arguments, jnp.where(absorbs, 0, length), first, kernels)
    return own


def absorbing_is_cheaper(
    num_queries: jax.Array, length: jax.Array, *, heads: int, head_dim: int, reads: int = 0
) -> jax.Array:
    """Whether `num_queries` over `length` hidden vectors take less time absorbed than with the vectors projected.

    Absorbed: 4 n D^2 FLOPs for queries and outputs, 4 n L N D for attention, 8 n N D bytes of wide queries and outputs,
    written and read, and 2 n L D bytes of vectors for each of `reads`. Projected: 4 L D^2 and 4 n L D FLOPs. Both read
    Wk and Wv. In FLOPs, bytes at the chip's balance B, divided by 4 N D: n (H + L + 2 B + reads L B / 2 N) against L H.

    Args:
        reads: how often each query reads the vectors for itself, `Kernels.hidden_prefix_reads`.
    """
    balance = BALANCE_FLOPS_PER_BYTE
    own_reads = reads * length * balance // (2 * heads)
    return num_queries * (head_dim + length + 2 * balance + own_reads) < length * head_dim


def _if(condition: jax.Array, function: Callable[[Partial], Partial], own: Partial) -> Partial:
    return jax.lax.cond(condition, function, lambda own: own, own)


def _over_absorbed(
    own: Partial, projections: KeyValueProjections, q: jax.Array, pool: Pool, channels: Channels, rows: Rows,
    length: jax.Array, first: jax.Array, kernels: Kernels,
) -> Partial:  # fmt: skip
    """`own` merged with attention over hidden vectors, absorbed `ABSORBED_TOKENS` at a time where there are any."""
    T = q.shape[0]
    blocks = rows.table_of(Vector.HIDDEN)
    size = min(ABSORBED_TOKENS, T)

    def one_tile(i: jax.Array, own: Partial) -> Partial:
        at = jnp.minimum(i * size, T - size)  # the last tile may reach back into the one before
        start, stop = jnp.maximum(first, i * size), jnp.minimum(first + rows.length, (i + 1) * size)

        def work(own: Partial) -> Partial:
            assert kernels.hidden_prefix is not None
            queries = jax.lax.dynamic_slice_in_dim(q, at, size)
            sliced_here = projections.after(i)
            wide = absorb_query(sliced_here, queries)
            over = channels.query(wide).astype(pool.dtype)
            mine = length, start - at, jnp.maximum(stop - start, 0)
            part = kernels.hidden_prefix(over, pool.numbers, blocks, *mine, **pool.options)
            lse = part.lse + channels.constant_score(wide) + key_bias_score(projections, queries)
            part = Partial(absorbed_values(sliced_here, channels.context(part.out)), lse)
            merged = merge(Partial(*(jax.lax.dynamic_slice_in_dim(a, at, size) for a in own)), part)
            return Partial(
                *(jax.lax.dynamic_update_slice_in_dim(a, b, at, 0) for a, b in zip(own, merged, strict=True))
            )

        return _if(jnp.any((length > 0) & (start < stop)), work, own)

    return jax.lax.fori_loop(0, -(-T // size), one_tile, own)


def _over_projected(
    own: Partial, projections: KeyValueProjections, q: jax.Array, pool: Pool, channels: Channels, rows: Rows,
    length: jax.Array, first: jax.Array, kernels: Kernels,
) -> Partial:  # fmt: skip
    """`own` merged with attention over hidden vectors, row by row projected to keys and values."""
    S, D = pool.numbers.shape[1:]
    blocks = rows.table_of(Vector.HIDDEN)
    W = blocks.shape[1]
    step = max(PROJECTED_TOKENS // S, 1)  # pages
    pages = -(-W // step) * step
    slot = jnp.arange(q.shape[0])[:, None]

    def one_row(number: jax.Array, carry: tuple[Partial, jax.Array]) -> tuple[Partial, jax.Array]:
        own, keys_values = carry
        r = order[number]

        def project(piece: jax.Array, keys_values: jax.Array) -> jax.Array:
            page = jnp.minimum(piece * step + jnp.arange(step), W - 1)
            h = channels.vectors(pool.read(blocks[r][page], pool.read_dtype, kernels), pool.dtype)
            both = [a.reshape(h.shape).astype(pool.dtype) for a in projections.after(piece).keys_values(h)]
            return jax.lax.dynamic_update_slice(keys_values, jnp.stack(both), (0, piece * step, 0, 0))

        keys_values = jax.lax.fori_loop(0, -(-length[r] // (step * S)), project, keys_values)
        key_blocks = jnp.arange(pages, dtype=jnp.int32)[None]
        one = (jax.lax.dynamic_slice_in_dim(a, r, 1) for a in (length, first, rows.length))
        assert kernels.kv_prefix is not None
        part = kernels.kv_prefix(q, keys_values.reshape(-1, S, D), key_blocks, key_blocks + pages, *one)
        mine = (slot >= first[r]) & (slot < first[r] + rows.length[r])
        merged = merge(own, part)
        own = Partial(jnp.where(mine[..., None], merged.out, own.out), jnp.where(mine, merged.lse, own.lse))
        return own, keys_values

    def all_rows(own: Partial) -> Partial:
        keys_values = jax.lax.empty((2, pages, S, D), pool.dtype)  # kernels look at what was projected only
        return jax.lax.fori_loop(0, jnp.sum(length > 0), one_row, (own, keys_values))[0]

    order = jnp.argsort(length == 0, stable=True)
    return _if(jnp.any(length > 0), all_rows, own)
