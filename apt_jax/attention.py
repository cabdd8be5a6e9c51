"""Attention over the paged hybrid cache: in plain XLA, and where given by Pallas kernels, but for a chunk's own tokens.

Shape letters: T token slots, R rows, N heads, H head_dim, D = N*H, L layers, P blocks, S block_size, C chunk of
cached tokens that one loop step reads. The pool is flat, `[L*P, S, D]`; block b of layer l is row `l*P + b`.

"Wide heads" (DESIGN 2.1): with queries `q_wide [N, D]`, `scores = q_wide X^T` and `context = softmax(scores) Y`.
KV rows lay q out block-diagonally with X = K, Y = V, and read the diagonal blocks of the context; hidden rows take
q_wide = q Wk^T with X = Y = H, and multiply the context by Wv. On a CPU this form is faster than one small product per
head also for KV (docs/performance.md), because it is one well-shaped matrix product.

Loops over rows and chunks have trip counts from the data, so a request costs what its own context costs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from apt_jax.absorption import absorb_query, absorbed_values, key_bias_score
from apt_jax.batch import Rows, Tokens
from apt_jax.cache_arrays import write_tokens
from apt_jax.opt import Attend, SelfAttention
from apt_jax.prefix_attention import merge_prefix
from pallas_kernels.dispatch import Kernels
from pallas_kernels.reference import NEVER, Partial, merge

CHUNK_TOKENS = 128
_QUERY_TILE = 256


class Kinds(NamedTuple):
    """Which cache kinds a program must handle; fixed when it is traced."""

    kv: bool
    hidden: bool
    certain: bool = False  # each of them does occur, so that nothing asks for it when the program runs

    @property
    def maybe_one(self) -> bool:
        """Whether it pays to ask at run time if a kind occurs."""
        return self.kv and self.hidden and not self.certain


def paged_attention(
    tokens: Tokens, rows: Rows, kinds: Kinds, num_blocks: int, *, decode_only: bool, kernels: Kernels | None = None
) -> Attend[jax.Array]:
    """The attention of one iteration over the pool: writes the new tokens' vectors, then attends.

    Args:
        tokens, rows: the iteration's arrays, see `apt_jax/batch.py`.
        kinds: cache kinds that can occur.
        num_blocks: P.
        decode_only: every row has one token, and token r belongs to row r.
        kernels: for cached tokens; None does it in XLA.

    Returns:
        An `Attend` whose cache is the pool.
    """

    def attend(
        projections: SelfAttention, h: jax.Array, pool: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        q = projections.query(h)
        if decode_only and not kinds.kv:
            k = v = jnp.zeros_like(q)  # a hidden row never uses its own k and v
        elif decode_only and kinds.maybe_one:
            k, v = jax.lax.cond(
                jnp.any(~rows.is_hidden & (rows.length > 0)),
                lambda: (projections.k_proj(h), projections.v_proj(h)),
                lambda: (jnp.zeros_like(q), jnp.zeros_like(q)),
            )
        else:
            k, v = projections.k_proj(h), projections.v_proj(h)
        pool = write_tokens(pool, tokens, rows, kinds.hidden, num_blocks, layer, h=h, k=k, v=v)
        shifted = rows._replace(
            first_blocks=rows.first_blocks + layer * num_blocks, second_blocks=rows.second_blocks + layer * num_blocks
        )
        if decode_only:
            context = shifted.start + shifted.length
            return _decode(projections, q, pool, shifted, kinds, context, kernels).astype(q.dtype), pool
        out = _chunks(projections, q, k, v, pool, tokens, shifted, kinds, kernels)
        # rows with a single token (decodes of a mixed iteration) attend like a decode step
        single = rows.length == 1
        context = jnp.where(single, rows.start + 1, 0)
        by_row = _decode(projections, q[rows.last], pool, shifted, kinds, context, kernels)
        row = jnp.minimum(tokens.row, rows.length.shape[0] - 1)
        out = jnp.where(single[row][:, None, None], by_row[row], out)
        return out.astype(q.dtype), pool

    return attend


def _decode(
    projections: SelfAttention,
    q: jax.Array,
    pool: jax.Array,
    rows: Rows,
    kinds: Kinds,
    context: jax.Array,
    kernels: Kernels | None = None,
) -> jax.Array:
    """One query per row `[R, N, H]` over the row's first `context [R]` cached tokens; float32 `[R, N, H]`."""
    if kernels is None:
        return _decode_wide(projections, q, pool, rows, kinds, context)

    hidden = (rows.is_hidden & (context > 0))[:, None, None]

    def of_hidden(otherwise: jax.Array) -> jax.Array:
        wide = absorb_query(projections, q).astype(pool.dtype)
        length = jnp.where(rows.is_hidden, context, 0)
        found = kernels.hidden_decode(wide, pool, rows.first_blocks, length).out
        return jnp.where(hidden, absorbed_values(projections, found), otherwise)

    if not kinds.kv:
        return of_hidden(jnp.zeros(q.shape, jnp.float32))
    length = jnp.where(rows.is_hidden, 0, context)
    out = kernels.kv_decode(q, pool, rows.first_blocks, rows.second_blocks, length).out
    if not kinds.hidden:
        return out
    if not kinds.maybe_one:
        return of_hidden(out)
    return jax.lax.cond(jnp.any(hidden), of_hidden, lambda out: out, out)


def _decode_wide(
    projections: SelfAttention, q: jax.Array, pool: jax.Array, rows: Rows, kinds: Kinds, context: jax.Array
) -> jax.Array:
    """`_decode` in XLA: KV and hidden rows in one loop of wide heads."""
    R, N, H = q.shape
    diagonal = jnp.eye(N, dtype=jnp.float32)
    hidden = (rows.is_hidden & (context > 0))[:, None, None]

    def where_hidden(absorbed, otherwise):  # type: ignore[no-untyped-def]
        """The absorbed form for hidden rows; its cost is skipped when there is none."""
        if not kinds.kv:
            return absorbed()
        if not kinds.hidden:
            return otherwise
        if not kinds.maybe_one:
            return jnp.where(hidden, absorbed(), otherwise)
        return jax.lax.cond(jnp.any(hidden), lambda: jnp.where(hidden, absorbed(), otherwise), lambda: otherwise)

    wide = jnp.einsum("RNH,NM->RNMH", q.astype(jnp.float32), diagonal).reshape(R, N, N * H)
    wide = where_hidden(lambda: absorb_query(projections, q), wide)
    second = None
    if kinds.kv:
        second = jnp.where(rows.is_hidden[:, None], rows.first_blocks, rows.second_blocks)
    found = _wide_rows(wide, pool, rows.first_blocks, second, context).out
    out = jnp.einsum("RNMH,NM->RNH", found.reshape(R, N, N, H), diagonal)
    return where_hidden(lambda: absorbed_values(projections, found), out)


def _wide_rows(
    wide: jax.Array, pool: jax.Array, x_blocks: jax.Array, y_blocks: jax.Array | None, length: jax.Array
) -> Partial:
    """Wide-head attention, row by row: `wide [R, N, D]` over `length [R]` tokens; out `[R, N, D]`, lse `[R, N]`."""
    R, N, D = wide.shape

    def one_row(r: jax.Array, found: Partial) -> Partial:
        y = None if y_blocks is None else y_blocks[r]
        row = _wide_pages(wide[r], pool, x_blocks[r], y, length[r])
        return Partial(found.out.at[r].set(row.out), found.lse.at[r].set(row.lse))

    empty = Partial(jnp.zeros((R, N, D), jnp.float32), jnp.full((R, N), NEVER, jnp.float32))
    return jax.lax.fori_loop(0, R, one_row, empty)


def _wide_pages(
    wide: jax.Array, pool: jax.Array, x_blocks: jax.Array, y_blocks: jax.Array | None, length: jax.Array
) -> Partial:
    """Queries `wide [Q, D]` over the first `length` tokens of pages `x_blocks [W]`; float32 `[Q, D]` and `[Q]`."""
    Q, D = wide.shape

    def read(chunk: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        valid = chunk * CHUNK_TOKENS + jnp.arange(CHUNK_TOKENS) < length
        x = read_chunk(pool, x_blocks, chunk, valid)
        y = x if y_blocks is None else read_chunk(pool, y_blocks, chunk, valid)
        scores = jnp.einsum("QD,CD->QC", wide, x)
        return jnp.where(valid, scores, NEVER), y, valid

    def body(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scores, y, valid = read(chunk)
        return _online_softmax(carry, scores, lambda p: jnp.einsum("QC,CD->QD", p, y), valid)

    return _finish_softmax(jax.lax.fori_loop(0, -(-length // CHUNK_TOKENS), body, _start_softmax((Q,), (Q, D))))


def _chunks(
    projections: SelfAttention,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    tokens: Tokens,
    rows: Rows,
    kinds: Kinds,
    kernels: Kernels | None = None,
) -> jax.Array:
    """Prefill chunks `[T, N, H]`: causal among the chunk's own tokens, and over the row's cached prefix."""
    T, N, H = q.shape
    own = _causal(q, k, v, tokens)
    prefix = jnp.where(rows.length > 1, rows.start, 0)
    if kernels is not None and kernels.kv_prefix is not None:
        return merge_prefix(own, projections, q, pool, rows, prefix, kernels, kv=kinds.kv, hidden=kinds.hidden).out
    # with few queries absorbing (T*N*D per cached token) is cheaper than re-projecting (D*D)
    absorbs = kinds.hidden and T <= H

    def keys_values(r: jax.Array, chunk: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        def cached() -> tuple[jax.Array, jax.Array]:
            x = read_chunk(pool, rows.first_blocks[r], chunk, valid, dtype=q.dtype)
            y = read_chunk(pool, rows.second_blocks[r], chunk, valid, dtype=q.dtype)
            return x.reshape(-1, N, H), y.reshape(-1, N, H)

        def projected() -> tuple[jax.Array, jax.Array]:
            h = read_chunk(pool, rows.first_blocks[r], chunk, valid, dtype=q.dtype)
            return projections.k_proj(h), projections.v_proj(h)

        if kinds.kv and kinds.hidden and not absorbs:
            return jax.lax.cond(rows.is_hidden[r], projected, cached)
        return cached() if kinds.kv else projected()

    def by_head(r: jax.Array) -> Partial:
        def body(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            valid = chunk * CHUNK_TOKENS + jnp.arange(CHUNK_TOKENS) < prefix[r]
            keys, values = keys_values(r, chunk, valid)
            scores = jnp.einsum("TNH,CNH->TNC", q, keys, preferred_element_type=jnp.float32)
            scores = jnp.where(valid, scores, NEVER)
            return _online_softmax(
                carry, scores, lambda p: jnp.einsum("TNC,CNH->TNH", p, values.astype(jnp.float32)), valid
            )

        steps = -(-prefix[r] // CHUNK_TOKENS)
        return _finish_softmax(jax.lax.fori_loop(0, steps, body, _start_softmax((T, N), (T, N, H))))

    def absorbed(r: jax.Array) -> Partial:
        wide = absorb_query(projections, q).reshape(T * N, -1)
        part = _wide_pages(wide, pool, rows.first_blocks[r], None, prefix[r])
        lse = part.lse.reshape(T, N) + key_bias_score(projections, q)
        return Partial(absorbed_values(projections, part.out.reshape(T, N, -1)), lse)

    def one_row(r: jax.Array, found: Partial) -> Partial:
        def with_prefix() -> Partial:
            if not absorbs:
                part = by_head(r)
            elif kinds.kv:
                part = jax.lax.cond(rows.is_hidden[r], absorbed, by_head, r)
            else:
                part = absorbed(r)
            mine = (tokens.row == r)[:, None]
            merged = merge(found, part)
            return Partial(jnp.where(mine[..., None], merged.out, found.out), jnp.where(mine, merged.lse, found.lse))

        return jax.lax.cond(prefix[r] > 0, with_prefix, lambda: found)

    return jax.lax.fori_loop(0, rows.length.shape[0], one_row, own).out


def _causal(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens) -> Partial:
    """Each packed token over the tokens of its own row up to itself, in tiles of queries."""
    T, N, H = q.shape

    def tile(q: jax.Array, row: jax.Array, position: jax.Array) -> Partial:
        scores = jnp.einsum("QNH,TNH->QNT", q, k, preferred_element_type=jnp.float32)
        seen = (row[:, None] == tokens.row) & (position[:, None] >= tokens.position)
        scores = jnp.where(seen[:, None, :], scores, NEVER)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        out = jnp.einsum("QNT,TNH->QNH", weights, v.astype(jnp.float32)) / total[..., None]
        return Partial(out, top + jnp.log(total))

    if T <= _QUERY_TILE or T % _QUERY_TILE:
        return tile(q, tokens.row, tokens.position)
    tiles = T // _QUERY_TILE
    parts = jax.lax.map(
        lambda args: tile(*args),
        (q.reshape(tiles, -1, N, H), tokens.row.reshape(tiles, -1), tokens.position.reshape(tiles, -1)),
    )
    return Partial(parts.out.reshape(T, N, H), parts.lse.reshape(T, N))


def read_chunk(
    pool: jax.Array, blocks: jax.Array, chunk: jax.Array, valid: jax.Array, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Vectors `[C, D]` of one chunk of a row's pages; those that are not `valid [C]` are 0, whatever the pool holds."""
    block_size, D = pool.shape[1:]
    pages = CHUNK_TOKENS // block_size
    vectors = pool[jax.lax.dynamic_slice(blocks, (chunk * pages,), (pages,))].reshape(CHUNK_TOKENS, D)
    return jnp.where(valid[:, None], vectors, 0).astype(dtype)


def _start_softmax(shape: tuple[int, ...], out_shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    return jnp.full(shape, NEVER, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(out_shape, jnp.float32)


def _online_softmax(carry, scores, weighted_values, valid):  # type: ignore[no-untyped-def]
    """One step of the running softmax: new maximum, rescale, add."""
    top, total, out = carry
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.where(valid, jnp.exp(scores - new_top[..., None]), 0.0)
    keep = jnp.exp(top - new_top)
    return new_top, total * keep + weights.sum(-1), out * keep[..., None] + weighted_values(weights)


def _finish_softmax(carry: tuple[jax.Array, ...]) -> Partial:
    top, total, out = carry
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    return Partial(out / safe[..., None], jnp.where(empty, NEVER, top + jnp.log(safe)))
