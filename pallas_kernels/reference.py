"""What the kernels compute, in plain jnp: each kernel has the signature of its reference here.

Shape letters: R rows (requests), T tokens, N heads, H head_dim, D = N*H, L layers, P blocks, S block_size, W pages per
table. Decode attention has one query per row; prefix attention has the queries of all rows' chunks packed into T slots.
The pool is flat, `[L*P, S, D]`; tables hold rows of it (block + layer*P). Pages past a row's length and positions past
it may hold anything, NaN too. Rows of length 0 give `out` 0 and lse `NEVER`; a batch of KV and hidden rows runs both
functions, each with length 0 for the other's rows.

An int8 pool comes with `scales`, float32 `[L*P, 1, X]`: the numbers of head n of token s of a block are multiplied by
`n*S + s` of its row, a hidden vector by the scale of head 0.

Attention here gathers every page of every row, so it is for checks, not for speed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEVER = -1e30  # log-sum-exp of no position at all: exp of it is 0, and it merges without NaN


class Partial(NamedTuple):
    """Attention over a part of the context: normalised output and log-sum-exp of its scores, both float32."""

    out: jax.Array  # [..., width]
    lse: jax.Array  # [...]


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint parts of the context. Pure."""
    top = jnp.maximum(a.lse, b.lse)
    wa, wb = jnp.exp(a.lse - top), jnp.exp(b.lse - top)
    total = wa + wb
    out = (a.out * wa[..., None] + b.out * wb[..., None]) / total[..., None]
    return Partial(out, top + jnp.log(total))


def cache_writer(
    key_block: jax.Array, value_block: jax.Array, offset: jax.Array
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]:
    """How a step's tokens are written into their blocks, in each of its layers; a scatter, in place when donated. Pure.

    Args:
        key_block: int32 `[T]`, each token's block for its key or hidden vector, of the first layer; negative: nowhere.
        value_block: int32 `[T]`, its block for its value, likewise.
        offset: int32 `[T]`, its place in both.

    Returns:
        `write(pool, base, keys, values)`: the pool `[L*P, S, D]` with `keys [T, D]` in blocks `base + key_block`, and
        `values [T, D]`, unless they are None, in `base + value_block`; `base` is the layer's first block.
    """

    def write(pool: jax.Array, base: jax.Array, keys: jax.Array, values: jax.Array | None) -> jax.Array:
        nowhere = pool.shape[0]  # out of range: the update is dropped
        for blocks, vectors in ((key_block, keys), (value_block, values)):
            if vectors is not None:
                block = jnp.where(blocks >= 0, base + blocks, nowhere)
                pool = pool.at[block, offset].set(vectors.astype(pool.dtype), mode="drop")
        return pool

    return write


def scale_writer(
    key_block: jax.Array, value_block: jax.Array, offset: jax.Array, *, block_size: int
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]:
    """How the scales of a step's tokens are written to an int8 pool, beside what `cache_writer` writes. Pure.

    Args:
        key_block, value_block, offset: as of `cache_writer`.
        block_size: S.

    Returns:
        `write(scales, base, keys, values)`: `scales [L*P, 1, X]` with those of keys or hidden vectors,
        float32 `[T, N]`, and of values, unless they are None.
    """

    def write(scales: jax.Array, base: jax.Array, keys: jax.Array, values: jax.Array | None) -> jax.Array:
        for blocks, own in ((key_block, keys), (value_block, values)):
            if own is not None:
                block = jnp.where(blocks >= 0, base + blocks, scales.shape[0])
                place = jnp.arange(own.shape[1]) * block_size + offset[:, None]
                scales = scales.at[block[:, None], 0, place].set(own, mode="drop")
        return scales

    return write


def scale_reader(scales: jax.Array, blocks: jax.Array) -> jax.Array:
    """The scales `[..., 1, X]` of `blocks`, rows of an int8 pool's `[L*P, 1, X]`; a kernel takes int32 `[K]`. Pure."""
    return scales[blocks]


def kv_decode_attention(
    q: jax.Array, pool: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array, *,
    scales: jax.Array | None = None,
) -> Partial:  # fmt: skip
    """One query per row over the row's cached keys and values. Pure.

    Args:
        q: `[R, N, H]`, bfloat16 or float32, already scaled.
        pool: `[L*P, S, D]`, bfloat16 or float32, or int8 with `scales`.
        key_blocks, value_blocks: int32 `[R, W]`.
        length: int32 `[R]`, cached tokens, at most W*S.

    Returns:
        float32 out `[R, N, H]` and lse `[R, N]`.
    """
    R, N, H = q.shape
    keys, valid = _gather(pool, key_blocks, length, scales, N)
    values, _ = _gather(pool, value_blocks, length, scales, N)
    keys, values = keys.reshape(R, -1, N, H), values.reshape(R, -1, N, H)
    scores = jnp.einsum("RNH,RCNH->RNC", q.astype(jnp.float32), keys, precision="highest")
    weights, lse = _softmax(scores, valid)
    return Partial(jnp.einsum("RNC,RCNH->RNH", weights, values, precision="highest"), lse)


def hidden_decode_attention(
    q_wide: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array, *, scales: jax.Array | None = None
) -> Partial:
    """One absorbed query per row and head over the row's cached hidden vectors. Pure. Source: docs/hybrid_cache.md.

    Args:
        q_wide: `[R, N, D]`, bfloat16 or float32: q Wk^T of scaled q. Any width D that the pool has.
        pool: `[L*P, S, D]`, bfloat16 or float32, or int8 with `scales`.
        blocks: int32 `[R, W]`.
        length: int32 `[R]`, cached tokens, at most W*S.

    Returns:
        float32 out `[R, N, D]` (the weighted sum of hidden vectors, Wv not applied) and lse `[R, N]` (without q . bk).
    """
    vectors, valid = _gather(pool, blocks, length, scales)
    scores = jnp.einsum("RND,RCD->RNC", q_wide.astype(jnp.float32), vectors, precision="highest")
    weights, lse = _softmax(scores, valid)
    return Partial(jnp.einsum("RNC,RCD->RND", weights, vectors, precision="highest"), lse)


def kv_prefix_attention(
    q: jax.Array,
    pool: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    length: jax.Array,
    first_query: jax.Array,
    num_queries: jax.Array,
    *,
    scales: jax.Array | None = None,
) -> Partial:
    """Each packed query over all of its own row's cached keys and values. Pure.

    Row r's queries lie in slots `first_query[r] .. first_query[r] + num_queries[r]`; no two rows share a slot, in any
    order, and slots may belong to no row. Tables and pool as for `kv_decode_attention`.

    Args:
        q: `[T, N, H]`, bfloat16 or float32, already scaled.
        length: int32 `[R]`, cached tokens before the chunk; 0 leaves the row's queries out.
        first_query, num_queries: int32 `[R]`.

    Returns:
        float32 out `[T, N, H]` and lse `[T, N]`; 0 and `NEVER` for a query of no row, or of one without cached tokens.
    """
    empty = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], NEVER, jnp.float32))

    def one_row(found: Partial, row: tuple[jax.Array, ...]) -> tuple[Partial, None]:
        key_row, value_row, length, first, count = row
        keys, valid = _gather(pool, key_row[None], length[None], scales, q.shape[1])
        values, _ = _gather(pool, value_row[None], length[None], scales, q.shape[1])
        keys, values = keys.reshape(-1, *q.shape[1:]), values.reshape(-1, *q.shape[1:])
        scores = jnp.einsum("TNH,CNH->TNC", q.astype(jnp.float32), keys, precision="highest")
        weights, lse = _softmax(scores, valid)
        part = Partial(jnp.einsum("TNC,CNH->TNH", weights, values, precision="highest"), lse)
        return _of_queries(found, part, first, count), None

    return jax.lax.scan(one_row, empty, (key_blocks, value_blocks, length, first_query, num_queries))[0]


def hidden_prefix_attention(
    q_wide: jax.Array,
    pool: jax.Array,
    blocks: jax.Array,
    length: jax.Array,
    first_query: jax.Array,
    num_queries: jax.Array,
    *,
    scales: jax.Array | None = None,
) -> Partial:
    """Each packed absorbed query over all of its own row's cached hidden vectors. Pure. Source: docs/hybrid_cache.md.

    Rows and queries as in `kv_prefix_attention`, the rest as in `hidden_decode_attention`.

    Args:
        q_wide: `[T, N, D]`, bfloat16 or float32.
        length, first_query, num_queries: int32 `[R]`.

    Returns:
        float32 out `[T, N, D]` and lse `[T, N]` (without q . bk, which `merge` needs added).
    """
    empty = Partial(jnp.zeros(q_wide.shape, jnp.float32), jnp.full(q_wide.shape[:2], NEVER, jnp.float32))

    def one_row(found: Partial, row: tuple[jax.Array, ...]) -> tuple[Partial, None]:
        table, length, first, count = row
        (vectors,), valid = _gather(pool, table[None], length[None], scales)
        scores = jnp.einsum("TND,CD->TNC", q_wide.astype(jnp.float32), vectors, precision="highest")
        weights, lse = _softmax(scores, valid)
        part = Partial(jnp.einsum("TNC,CD->TND", weights, vectors, precision="highest"), lse)
        return _of_queries(found, part, first, count), None

    return jax.lax.scan(one_row, empty, (blocks, length, first_query, num_queries))[0]


def chunk_attention(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array) -> Partial:
    """Each packed token over the tokens of its own row up to itself. Pure.

    A row's tokens lie in neighbouring slots, in their order. Slots that belong to no request have a row of their own.

    Args:
        q, k, v: `[T, N, H]`, bfloat16 or float32, q already scaled.
        row: int32 `[T]`.

    Returns:
        float32 out `[T, N, H]` and lse `[T, N]`.
    """
    scores = jnp.einsum("TNH,CNH->TNC", q.astype(jnp.float32), k.astype(jnp.float32), precision="highest")
    slot = jnp.arange(q.shape[0])
    weights, lse = _softmax(scores, (row[:, None] == row) & (slot[:, None] >= slot))
    return Partial(jnp.einsum("TNC,CNH->TNH", weights, v.astype(jnp.float32), precision="highest"), lse)


def _of_queries(found: Partial, part: Partial, first: jax.Array, count: jax.Array) -> Partial:
    """`part` for queries `first .. first + count`, `found` for the others."""
    query = jnp.arange(part.lse.shape[0])[:, None]
    mine = (query >= first) & (query < first + count)
    return Partial(jnp.where(mine[..., None], part.out, found.out), jnp.where(mine, part.lse, found.lse))


def _gather(
    pool: jax.Array, blocks: jax.Array, length: jax.Array, scales: jax.Array | None, heads: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Vectors of whole tables in float32, `[R, C, D]` with C = W*S, 0 where not valid; and valid `[R, C]`."""
    R, W = blocks.shape
    S, D = pool.shape[1:]
    valid = jnp.arange(W * S) < length[:, None]
    vectors = pool[blocks].reshape(R, W * S, D)  # an index out of range is clamped, and then not valid
    if scales is not None:
        by_head = scales[blocks][:, :, 0, : heads * S].reshape(R, W, heads, S)
        by_token = by_head.swapaxes(2, 3).reshape(R, W * S, heads, 1)
        vectors = (vectors.reshape(R, W * S, heads, -1) * by_token).reshape(R, W * S, D)
    return jnp.where(valid[..., None], vectors, 0).astype(jnp.float32), valid


def _softmax(scores: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights `[R, N, C]` over the valid positions `[R or 1, C]` and log-sum-exp `[R, N]`; 0 and NEVER without any."""
    scores = jnp.where(valid[:, None], scores, NEVER)
    top = scores.max(-1, keepdims=True)
    weights = jnp.where(valid[:, None], jnp.exp(scores - top), 0)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, top + jnp.log(total), NEVER)
    return weights / total, lse[..., 0]
