"""Attention over the paged hybrid cache: in plain XLA, or by kernels where they are given.

Shape letters: T token slots, R rows, N heads, H head_dim, D = N*H, L layers, P blocks, S block_size, C chunk of
cached tokens that one loop step reads. The pool is flat; block b of layer l is row `l*P + b`. From an int8 pool keys
and values are not read as they were computed, so a chunk's own tokens attend to what later reads will give: results do
not depend on where a prompt is cut.

KV rows attend head by head; hidden rows take queries `q_wide = q Wk^T` of D numbers for each head over the vectors
themselves, and multiply the context by Wv (docs/hybrid_cache.md, `absorption.py`).

Loops over rows and chunks have trip counts from the data, so a request costs what its own context costs.
"""

import math

import jax
import jax.numpy as jnp

from apt_jax.attention.absorption import absorb_query, absorbed_values, key_bias_score
from apt_jax.attention.hidden_slices import hidden_decode_slices
from apt_jax.attention.int8 import Channels
from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Kept, Pool
from apt_jax.attention.prefix import merge_prefix
from apt_jax.attention.write import token_writer
from apt_jax.attention.xla import (
    attend_by_head,
    attend_wide,
    finish_softmax,
    hidden_decode,
    kv_decode,
    online_softmax,
    read_chunk,
    read_keys_values,
    start_softmax,
)
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import Vector
from apt_jax.models.collectives import all_reduce, local_slice
from apt_jax.models.interface import Attend
from apt_jax.models.linear import AttentionProjections, KeyValueProjections
from apt_jax.pallas_kernels.dispatch import Kernels
from apt_jax.pallas_kernels.reference import NEVER, Partial, merge

_TILE = 128  # queries, and keys, of a prefill chunk's own attention at a time
_SMALLEST_TILE = 16


def paged_attention(
    tokens: Tokens,
    rows: Rows,
    kinds: KindMix,
    num_blocks: int,
    block_size: int,
    *,
    decode_only: bool,
    kernels: Kernels | None = None,
) -> Attend[Pool]:
    """The attention of one iteration over the pool: writes the new tokens' vectors, then attends.

    Args:
        tokens, rows: the iteration's arrays, see `apt_jax/batching/arrays.py`.
        kinds: cache kinds that can occur.
        num_blocks, block_size: P and S.
        decode_only: every row has one token, and token r belongs to row r.
        kernels: parts that they lack (all, if None) are done in XLA.

    Returns:
        An `Attend` whose cache is the pool.
    """

    write = token_writer(tokens, rows, block_size, kinds=kinds, kernels=kernels)
    row = jnp.minimum(tokens.row, rows.length.shape[0] - 1)
    keeps_hidden = rows.keep(Vector.HIDDEN)[row]

    def attend(projections: AttentionProjections, h: jax.Array, pool: Pool, layer: jax.Array) -> tuple[jax.Array, Pool]:
        q, kv = projections.query(h), projections.kv
        if kv.splits_inputs:
            h = local_slice(h, axis=1)
        channels, kept = pool.channels_of(layer), dict[Vector, Kept]()
        if kinds.keep(Vector.HIDDEN):
            kept[Vector.HIDDEN] = pool.keep_hidden(h, channels)
            pool = pool.count_outside(h, channels, keeps_hidden & (tokens.row < rows.length.shape[0]))
            if pool.is_coded and not decode_only:
                seen = channels.vectors(pool.as_read(kept[Vector.HIDDEN]), h.dtype)
                h = jnp.where(keeps_hidden[:, None], seen, h)
        if decode_only and not kinds.keep(Vector.KEY):
            k = v = jnp.zeros_like(q)  # a hidden row never uses its own k and v
        elif decode_only and kinds.asks:
            k, v = jax.lax.cond(
                jnp.any(rows.keep(Vector.KEY) & (rows.length > 0)),
                lambda: kv.keys_values(h),
                lambda: (jnp.zeros_like(q), jnp.zeros_like(q)),
            )
        else:
            k, v = kv.keys_values(h)
        if kinds.keep(Vector.KEY):
            kept |= {Vector.KEY: pool.keep(k), Vector.VALUE: pool.keep(v)}
            if pool.is_coded and not decode_only:
                k = _as_read(pool, kept[Vector.KEY], k, keeps_hidden)
                v = _as_read(pool, kept[Vector.VALUE], v, keeps_hidden)
        pool = write(pool, layer * num_blocks, kept)
        shifted = rows.from_block(layer * num_blocks)
        if decode_only:
            context = shifted.start + shifted.length
            return _decode(kv, q, pool, channels, shifted, kinds, context, kernels).astype(q.dtype), pool
        out = _chunks(kv, q, k, v, pool, channels, tokens, shifted, kinds, kernels)
        # rows with a single token (decodes of a mixed iteration) attend like a decode step
        single = rows.length == 1
        context = jnp.where(single, rows.start + 1, 0)
        by_row = _decode(kv, q[rows.last], pool, channels, shifted, kinds, context, kernels)
        out = jnp.where(single[row][:, None, None], by_row[row], out)
        return out.astype(q.dtype), pool

    return attend


def _as_read(pool: Pool, kept: Kept, x: jax.Array, unless: jax.Array) -> jax.Array:
    """Keys or values `x [T, N, H]` as they will be read from the pool, except in tokens `unless [T]`."""
    read = pool.as_read(kept).reshape(x.shape).astype(x.dtype)
    return jnp.where(unless[:, None, None], x, read)


def _decode(
    projections: KeyValueProjections,
    q: jax.Array,
    pool: Pool,
    channels: Channels,
    rows: Rows,
    kinds: KindMix,
    context: jax.Array,
    kernels: Kernels | None = None,
) -> jax.Array:
    """One query per row `[R, N, H]` over the row's first `context [R]` cached tokens; float32 `[R, N, H]`."""
    slices = projections.splits_inputs
    is_hidden = rows.keep(Vector.HIDDEN)
    hidden = (is_hidden & (context > 0))[:, None, None]

    def of_hidden(otherwise: jax.Array) -> jax.Array:
        wide = channels.query(absorb_query(projections, q))
        blocks = rows.table_of(Vector.HIDDEN)
        length = jnp.where(is_hidden, context, 0)
        if slices:  # a kernel cannot sum the devices' scores before its softmax
            found = hidden_decode_slices(wide.astype(q.dtype), pool, blocks, length).out
        elif kernels is not None and kernels.hidden_decode is not None:
            found = kernels.hidden_decode(wide.astype(q.dtype), pool.numbers, blocks, length, **pool.options).out
        else:
            found = hidden_decode(wide, pool, blocks, length).out
        return jnp.where(hidden, absorbed_values(projections, channels.context(found)), otherwise)

    if not kinds.keep(Vector.KEY):
        return of_hidden(jnp.zeros(q.shape, jnp.float32))
    length = jnp.where(is_hidden, 0, context)
    tables = rows.table_of(Vector.KEY), rows.table_of(Vector.VALUE)
    if kernels is None or kernels.kv_decode is None:
        out = kv_decode(q, pool, *tables, length).out
    else:
        out = kernels.kv_decode(q, pool.numbers, *tables, length, **pool.options).out
    if not kinds.keep(Vector.HIDDEN):
        return out
    if not kinds.asks:
        return of_hidden(out)
    return jax.lax.cond(jnp.any(hidden), of_hidden, lambda out: out, out)


def _chunks(
    projections: KeyValueProjections,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: Pool,
    channels: Channels,
    tokens: Tokens,
    rows: Rows,
    kinds: KindMix,
    kernels: Kernels | None = None,
) -> jax.Array:
    """Prefill chunks `[T, N, H]`: causal among the chunk's own tokens, and over the row's cached prefix."""
    T, _, H = q.shape
    chunk = None if kernels is None else kernels.chunk
    own = causal_tiles(q, k, v, tokens) if chunk is None else chunk(q, k, v, tokens.row)
    prefix = jnp.where(rows.length > 1, rows.start, 0)
    # kernels cannot sum the devices' scores before their softmax
    if kernels is not None and kernels.kv_prefix is not None and not projections.splits_inputs:
        return merge_prefix(own, projections, q, pool, channels, rows, prefix, kernels, kinds).out
    # with few queries absorbing (T*N*D per cached token) is cheaper than re-projecting (D*D)
    absorbs = kinds.keep(Vector.HIDDEN) and T <= H
    is_hidden = rows.keep(Vector.HIDDEN)
    key_blocks, value_blocks = rows.table_of(Vector.KEY), rows.table_of(Vector.VALUE)
    hidden_blocks = rows.table_of(Vector.HIDDEN)

    def keys_values(r: jax.Array, chunk: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        def cached() -> tuple[jax.Array, jax.Array]:
            return read_keys_values(q, pool, key_blocks[r], value_blocks[r], chunk, valid)

        def projected() -> tuple[jax.Array, jax.Array]:
            x = read_chunk(pool, hidden_blocks[r], chunk, valid, dtype=pool.read_dtype)
            return projections.keys_values(channels.vectors(x, q.dtype))

        if kinds.keep(Vector.KEY) and kinds.keep(Vector.HIDDEN) and not absorbs:
            return jax.lax.cond(is_hidden[r], projected, cached)
        return cached() if kinds.keep(Vector.KEY) else projected()

    def by_head(r: jax.Array) -> Partial:
        return attend_by_head(q, prefix[r], lambda chunk, valid: keys_values(r, chunk, valid))

    def absorbed(r: jax.Array) -> Partial:
        wide = absorb_query(projections, q)
        over = channels.query(wide)
        part = attend_wide(over.reshape(-1, over.shape[-1]), pool, hidden_blocks[r], prefix[r])
        lse = part.lse.reshape(wide.shape[:2])
        if pool.is_coded:
            lse = lse + all_reduce(channels.constant_score(wide))
        lse = local_slice(lse, axis=1) + key_bias_score(projections, q)
        return Partial(absorbed_values(projections, channels.context(part.out.reshape(wide.shape))), lse)

    def one_row(r: jax.Array, found: Partial) -> Partial:
        def with_prefix() -> Partial:
            if not absorbs:
                part = by_head(r)
            elif kinds.keep(Vector.KEY):
                part = jax.lax.cond(is_hidden[r], absorbed, by_head, r)
            else:
                part = absorbed(r)
            mine = (tokens.row == r)[:, None]
            merged = merge(found, part)
            return Partial(jnp.where(mine[..., None], merged.out, found.out), jnp.where(mine, merged.lse, found.lse))

        return jax.lax.cond(prefix[r] > 0, with_prefix, lambda: found)

    return jax.lax.fori_loop(0, rows.length.shape[0], one_row, own).out


def causal_tiles(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens) -> Partial:
    """Each packed token over the tokens of its own row up to itself; padding gives anything.

    In tiles of queries, each over those tiles of keys that its rows begin in or after: neither what comes later nor
    what belongs to other requests is multiplied.
    """
    T, N, H = q.shape
    tile = math.gcd(T, _TILE)
    if tile < _SMALLEST_TILE:
        tile = T
    index = jnp.arange(T)
    begins = tokens.row != jnp.roll(tokens.row, 1)
    first = jax.lax.cummax(jnp.where(begins, index, 0))  # index of the first token of each token's row
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))

    def one_tile(i: jax.Array) -> Partial:
        def own(x: jax.Array, at: jax.Array, axis: int = 0) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, at * tile, tile, axis)

        queries, row, position = own(q, i, 1), own(tokens.row, i), own(tokens.position, i)

        def body(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            seen = (row[:, None] == own(tokens.row, j)) & (position[:, None] >= own(tokens.position, j))
            scores = jnp.einsum("NQH,NCH->NQC", queries, own(k, j, 1), preferred_element_type=jnp.float32)
            values = own(v, j, 1).astype(jnp.float32)
            return online_softmax(
                carry, jnp.where(seen, scores, NEVER), lambda p: jnp.einsum("NQC,NCH->NQH", p, values), seen
            )

        return finish_softmax(
            jax.lax.fori_loop(first[i * tile] // tile, i + 1, body, start_softmax((N, tile), (N, tile, H)))
        )

    parts = jax.lax.map(one_tile, jnp.arange(T // tile))
    return Partial(parts.out.swapaxes(1, 2).reshape(T, N, H), parts.lse.swapaxes(1, 2).reshape(T, N))
