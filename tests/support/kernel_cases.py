"""Random paged batches for tests of the kernels: shuffled blocks, and NaN wherever a kernel must not look."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from apt_jax.attention.int8 import encode
from apt_jax.attention.pool import scale_row
from apt_jax.cache import CacheKind
from apt_jax.pallas_kernels.reference import Partial

TOLERANCE = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.bfloat16): 2e-2}


class Case(NamedTuple):
    """Arguments of both decode attentions over one pool."""

    q: jax.Array  # [R, N, H]
    q_wide: jax.Array  # [R, N, D]
    pool: jax.Array  # [P, S, D]
    key_or_hidden_blocks: jax.Array  # int32 [R, W]: keys, or hidden vectors
    value_blocks: jax.Array  # int32 [R, W]
    length: jax.Array  # int32 [R]


def make_case(
    lengths: Sequence[int], *, heads: int, head_dim: int, block_size: int, dtype: DTypeLike = jnp.float32,
    seed: int = 0, table_pages: int | None = None, query_dtype: DTypeLike | None = None,
    num_blocks: int | None = None,
) -> Case:  # fmt: skip
    """A case whose pool is NaN outside the first `lengths[r]` positions of row r's pages.

    Tables point at a block full of NaN past the last page. Scores have a spread of about 1. With `num_blocks` and
    `table_pages` given, shapes do not depend on the lengths.
    """
    rng = np.random.default_rng(seed)
    D = heads * head_dim
    pages = [-(-length // block_size) for length in lengths]
    W = table_pages or max(*pages, 1)
    blocks = rng.permutation(num_blocks or 2 * sum(pages) + 1)
    nowhere, blocks = blocks[-1], list(blocks[:-1])
    pool = np.full((len(blocks) + 1, block_size, D), np.nan, np.float32)
    tables = np.full((2, len(lengths), W), nowhere, np.int32)
    for r, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        for table in tables:
            for page in range(count):
                tokens = min(length - page * block_size, block_size)
                block = blocks.pop()
                pool[block, :tokens] = rng.normal(size=(tokens, D))
                table[r, page] = block
    R = len(lengths)
    q = rng.normal(size=(R, heads, head_dim)) * head_dim**-0.5
    q_wide = rng.normal(size=(R, heads, D)) * D**-0.5
    query_dtype = query_dtype or dtype
    return Case(
        jnp.asarray(q, query_dtype), jnp.asarray(q_wide, query_dtype), jnp.asarray(pool, dtype),
        jnp.asarray(tables[0]), jnp.asarray(tables[1]), jnp.asarray(lengths, jnp.int32),
    )  # fmt: skip


def coded(pool: jax.Array, groups: int, heads: int) -> tuple[jax.Array, jax.Array]:
    """An int8 pool of a pool `[P, S, D]`, and its scales: where the pool is NaN, some codes whose scales are NaN.

    Args:
        groups: of numbers of a token that share a scale: `heads`, or 1 for hidden vectors, whose scale all heads have.
    """
    P, S, D = pool.shape
    is_used = jnp.isfinite(pool.astype(jnp.float32)).all(-1)
    codes, scales = encode(jnp.where(is_used[..., None], pool, 0).reshape(P * S, D), groups)
    scales = jnp.where(is_used.reshape(-1, 1), jnp.broadcast_to(scales, (P * S, heads)), jnp.nan)
    rows = scales.reshape(P, S, heads).swapaxes(1, 2).reshape(P, 1, -1)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, scale_row(S, heads) - S * heads)), constant_values=jnp.nan)
    return jnp.where(is_used[..., None], codes.reshape(P, S, D), 77).astype(jnp.int8), rows


def prefix_arguments(
    way: str, lengths: Sequence[int], counts: Sequence[int], gaps: Sequence[int], *, heads: int, head_dim: int,
    dtype: DTypeLike, block_size: int, slots: int, table_pages: int, seed: int,
) -> tuple[tuple[jax.Array, ...], np.ndarray]:  # fmt: skip
    """Arguments of "kv" or "hidden" prefix attention, and bool `[slots]`, whether a slot is of any row.

    Rows' queries lie one after the other, with `gaps[r]` slots of no row before row r's; NaN in slots of no row. Shapes
    do not depend on the lengths.
    """
    case = make_case(
        lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, seed=seed,
        table_pages=table_pages, num_blocks=2 * len(lengths) * table_pages + 1,
    )  # fmt: skip
    count = np.array(counts)
    first = np.cumsum(np.array(gaps) + count) - count
    assert first[-1] + counts[-1] <= slots
    mine = np.zeros(slots, bool)
    for at, number in zip(first, counts, strict=True):
        mine[at : at + number] = True
    width = head_dim if way == "kv" else heads * head_dim
    drawn = np.random.default_rng(seed).normal(size=(slots, heads, width)) * width**-0.5
    queries = jnp.asarray(np.where(mine[:, None, None], drawn, np.nan), dtype)
    tables = [case.key_or_hidden_blocks, case.value_blocks][: CacheKind.named(way).blocks_per_page]
    rows = (*tables, case.length, jnp.asarray(first, jnp.int32), jnp.asarray(count, jnp.int32))
    return (queries, case.pool, *rows), mine


def assert_close(found: Partial, expected: Partial, dtype: DTypeLike) -> None:
    """Largest difference relative to the largest value of each row and head, as the dtype allows; never NaN."""
    tolerance = TOLERANCE[jnp.dtype(dtype)]
    assert found.out.dtype == found.lse.dtype == jnp.float32
    for ours, theirs in zip(map(np.asarray, found), map(np.asarray, expected), strict=True):
        assert ours.shape == theirs.shape
        axis = -1 if ours.ndim == 3 else None
        scale = np.maximum(np.abs(theirs).max(axis=axis, keepdims=True), 1e-3)
        scale = np.where(np.abs(theirs) >= 1e29, 1e30, scale)
        worst = (np.abs(ours - theirs) / scale).max()
        assert worst <= tolerance, f"{worst=} > {tolerance=}"
