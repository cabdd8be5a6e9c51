"""Attention over cached tokens in plain XLA, for any device: decode rows by heads or absorbed, and shared parts.

Shape letters as in docs/architecture.md; G rows that are processed together. Loops take trip counts from the data:
a row costs what its own context costs, or that of the longest in its group.
docs/log/2026-11-30-performance.md has the forms that were tried on a CPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from apt_jax.attention.pool import Pool
from apt_jax.models.collectives import all_reduce
from apt_jax.pallas_kernels.reference import NEVER, Partial

CHUNK_TOKENS = 128  # cached tokens of one row that a loop step reads
_GROUP_ROWS = 8
_GROUP_TOKENS = 64  # of each row of a group: keys and values of one step stay in a core's cache


def kv_decode(q: jax.Array, pool: Pool, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array) -> Partial:
    """As `apt_jax.pallas_kernels.reference.kv_decode_attention`, a group of rows and a few tokens at a time. Pure."""
    R = len(q)
    G = min(_GROUP_ROWS, R)
    groups = -(-R // G)
    pad = [(0, groups * G - R)]
    q = jnp.pad(q.astype(jnp.float32), [*pad, (0, 0), (0, 0)])
    key_blocks, value_blocks = (jnp.pad(table, [*pad, (0, 0)]) for table in (key_blocks, value_blocks))
    length = jnp.pad(length, pad)

    def one_group(group: jax.Array, found: Partial) -> Partial:
        def own(array: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, group * G, G)

        part = _attend_by_head(own(q), pool, own(key_blocks), own(value_blocks), own(length))
        return Partial(
            *(jax.lax.dynamic_update_slice_in_dim(a, b, group * G, 0) for a, b in zip(found, part, strict=True))
        )

    empty = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], NEVER, jnp.float32))
    found = jax.lax.fori_loop(0, groups, one_group, empty)
    return Partial(found.out[:R], found.lse[:R])


def _attend_by_head(
    q: jax.Array, pool: Pool, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array
) -> Partial:
    """`kv_decode` of one group of rows."""
    G, N, H = q.shape
    pages = max(min(_GROUP_TOKENS, CHUNK_TOKENS) // pool.block_size, 1)  # tables are whole chunks
    tokens = pages * pool.block_size

    def body(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        valid = (step * tokens + jnp.arange(tokens) < length[:, None])[..., None]

        def read(blocks: jax.Array) -> jax.Array:
            own = jax.lax.dynamic_slice_in_dim(blocks, step * pages, pages, 1)
            return pool.read(own, jnp.float32).reshape(G, tokens, N, H)

        scores = (q[:, None] * read(key_blocks)).sum(-1)
        scores = jnp.where(valid, scores, NEVER).swapaxes(1, 2)
        values = jnp.where(valid[..., None], read(value_blocks), 0)
        return online_softmax(
            carry, scores, lambda p: (p.swapaxes(1, 2)[..., None] * values).sum(1), valid.swapaxes(1, 2)
        )

    steps = -(-length.max() // tokens)
    return finish_softmax(jax.lax.fori_loop(0, steps, body, start_softmax((G, N), (G, N, H))))


def hidden_decode(q_wide: jax.Array, pool: Pool, blocks: jax.Array, length: jax.Array) -> Partial:
    """As `apt_jax.pallas_kernels.reference.hidden_decode_attention`, row by row. Pure."""
    R, N, D = q_wide.shape

    def one_row(r: jax.Array, found: Partial) -> Partial:
        row = attend_wide(q_wide[r], pool, blocks[r], length[r])
        return Partial(found.out.at[r].set(row.out), found.lse.at[r].set(row.lse))

    empty = Partial(jnp.zeros((R, N, D), jnp.float32), jnp.full((R, N), NEVER, jnp.float32))
    return jax.lax.fori_loop(0, R, one_row, empty)


def attend_wide(q_wide: jax.Array, pool: Pool, blocks: jax.Array, length: jax.Array) -> Partial:
    """Queries `[Q, D]` over the first `length` hidden vectors of pages `blocks [W]`; float32 `[Q, D]` and `[Q]`."""
    Q, D = q_wide.shape

    def body(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        valid = chunk_positions(chunk) < length
        x = read_chunk(pool, blocks, chunk, valid)
        scores = jnp.where(valid, all_reduce(jnp.einsum("QD,CD->QC", q_wide, x)), NEVER)
        return online_softmax(carry, scores, lambda p: jnp.einsum("QC,CD->QD", p, x), valid)

    return finish_softmax(jax.lax.fori_loop(0, num_chunks(length), body, start_softmax((Q,), (Q, D))))


def attend_by_head(
    q: jax.Array, length: jax.Array, keys_values: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
) -> Partial:
    """Queries `[T, N, H]` over the first `length` cached tokens of one row.

    Args:
        keys_values: both `[C, N, H]` of a chunk, 0 where not `valid [C]`, from the chunk's number and `valid`.
    """

    def body(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        valid = chunk_positions(chunk) < length
        keys, values = keys_values(chunk, valid)
        scores = jnp.einsum("TNH,CNH->TNC", q, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(valid, scores, NEVER)
        return online_softmax(carry, scores, lambda p: jnp.einsum("TNC,CNH->TNH", p, values.astype(jnp.float32)), valid)

    return finish_softmax(jax.lax.fori_loop(0, num_chunks(length), body, start_softmax(q.shape[:2], q.shape)))


def num_chunks(length: jax.Array) -> jax.Array:
    """Chunks that `length` cached tokens take."""
    return -(-length // CHUNK_TOKENS)


def chunk_positions(chunk: jax.Array) -> jax.Array:
    """Positions `[C]` of a row's cached tokens in one chunk."""
    return chunk * CHUNK_TOKENS + jnp.arange(CHUNK_TOKENS)


def read_chunk(
    pool: Pool, blocks: jax.Array, chunk: jax.Array, valid: jax.Array, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Vectors `[C, D]` of one chunk of a row's pages; those that are not `valid [C]` are 0, whatever the pool holds."""
    pages = CHUNK_TOKENS // pool.block_size
    own = jax.lax.dynamic_slice(blocks, (chunk * pages,), (pages,))
    return jnp.where(valid[:, None], pool.read(own, dtype).reshape(CHUNK_TOKENS, -1), 0)


def read_keys_values(
    q: jax.Array, pool: Pool, key_blocks: jax.Array, value_blocks: jax.Array, chunk: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cached keys and values `[C, N, H]` of one chunk for queries `[T, N, H]`, in their dtype."""
    shape = (CHUNK_TOKENS, *q.shape[1:])
    x, y = (read_chunk(pool, blocks, chunk, valid, dtype=q.dtype) for blocks in (key_blocks, value_blocks))
    return x.reshape(shape), y.reshape(shape)


def start_softmax(shape: tuple[int, ...], out_shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """State of a running softmax before its first step: greatest score, sum of weights, weighted sum of values."""
    return jnp.full(shape, NEVER, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(out_shape, jnp.float32)


def online_softmax(carry, scores, weighted_values, valid):  # type: ignore[no-untyped-def]
    """One step of the running softmax: new maximum, rescale, add."""
    top, total, out = carry
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.where(valid, jnp.exp(scores - new_top[..., None]), 0.0)
    keep = jnp.exp(top - new_top)
    return new_top, total * keep + weights.sum(-1), out * keep[..., None] + weighted_values(weights)


def finish_softmax(carry: tuple[jax.Array, ...]) -> Partial:
    """The result of a running softmax after its last step."""
    top, total, out = carry
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    return Partial(out / safe[..., None], jnp.where(empty, NEVER, top + jnp.log(safe)))
