"""Decode attention over hidden vectors of which every device holds a slice of D: scores are summed before the softmax.

A row's scores need all of D, so the devices exchange float32 partial scores, N per cached token, between reading the
slice for the scores and weighting it for the context. One all-reduce serves many rows: rows are sorted by length
and taken in groups whose cached tokens' slices are `GROUP_BYTES` at most, which can stay on the chip in between.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from apt_jax.attention.pool import Pool
from apt_jax.model_config import GROUP_BYTES
from apt_jax.models.collectives import all_reduce
from apt_jax.pallas_kernels.reference import NEVER, Partial

_SHORTEST = 256


def hidden_decode_slices(wide: jax.Array, pool: Pool, blocks: jax.Array, length: jax.Array) -> Partial:
    """One absorbed query per row and head over slices of the row's cached hidden vectors. Pure.

    As `pallas_kernels/reference.py: hidden_decode_attention`, with D a device's slice and scores summed over devices.

    Args:
        wide: `[R, N, D]`: this device's slice of q Wk^T, all heads.
        pool: vectors are multiplied in the number type of `wide`.
        blocks: int32 `[R, W]`.
        length: int32 `[R]`, cached tokens, at most W*S.

    Returns:
        out `[R, N, D]` in the number type of `wide`, the slice of the weighted sum, and float32 lse `[R, N]`; rows of
        length 0 give 0 and `NEVER`. (A float32 out would be multiplied by a float32 copy of Wv.)
    """
    R, N, D = wide.shape
    S = pool.block_size
    classes = _classes(blocks.shape[1] * S, D * pool.numbers.dtype.itemsize, S)
    widths, groups = [width for width, _ in classes], [min(rows, R) for _, rows in classes]
    # the longest rows first; padding of the last group is a row that does not exist
    order = jnp.pad(jnp.argsort(-length).astype(jnp.int32), (0, max(groups)), constant_values=R)
    count = jnp.sum(length > 0)

    def one_group(state: tuple[jax.Array, Partial]) -> tuple[jax.Array, Partial]:
        at, found = state

        def of_width(width: int, size: int):  # type: ignore[no-untyped-def]
            def attend(at: jax.Array, found: Partial) -> tuple[jax.Array, Partial]:
                rows = jax.lax.dynamic_slice(order, (at,), (size,))
                row = jnp.minimum(rows, R - 1)
                part = _attend(wide[row], pool, blocks[row, : width // S], length[row])
                out = found.out.at[rows].set(part.out, mode="drop")
                return at + size, Partial(out, found.lse.at[rows].set(part.lse, mode="drop"))

            return attend

        most = length[order[at]]
        narrowest = sum((most <= width).astype(jnp.int32) for width in widths) - 1
        branches = [of_width(width, size) for width, size in zip(widths, groups, strict=True)]
        return jax.lax.switch(narrowest, branches, at, found)

    empty = Partial(jnp.zeros((R, N, D), wide.dtype), jnp.full((R, N), NEVER, jnp.float32))
    return jax.lax.while_loop(lambda state: state[0] < count, one_group, (jnp.int32(0), empty))[1]


def num_groups(lengths: Sequence[int], longest: int, token_bytes: int) -> int:
    """All-reduces of scores that rows of `lengths` tokens need, in tables of `longest`; a slice is `token_bytes`."""
    waiting, count = sorted(lengths, reverse=True), 0
    while waiting:
        rows = [rows for width, rows in _classes(longest, token_bytes) if waiting[0] <= width][-1]
        waiting, count = waiting[rows:], count + 1
    return count


def _classes(longest: int, token_bytes: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Widths in tokens that rows are padded to, widest first, and how many rows of such a width make a group."""
    widths = [longest]
    while widths[-1] // 2 >= _SHORTEST:
        widths.append(-(-widths[-1] // 2 // multiple) * multiple)
    return [(width, max(GROUP_BYTES // (width * token_bytes), 1)) for width in widths]


def _attend(wide: jax.Array, pool: Pool, blocks: jax.Array, length: jax.Array) -> Partial:
    """All tokens of the rows' `blocks` at once; a row of length 0 gives 0 and `NEVER`."""
    R, D = len(blocks), wide.shape[-1]
    vectors = pool.read(blocks, wide.dtype).reshape(R, -1, D)
    valid = jnp.arange(vectors.shape[1]) < length[:, None]
    scores = jnp.einsum("RND,RCD->RNC", wide, vectors, preferred_element_type=jnp.float32)
    scores = jnp.where(valid[:, None], all_reduce(scores), NEVER)
    top = scores.max(-1, keepdims=True)
    weights = jnp.where(valid[:, None], jnp.exp(scores - top), 0)
    total = weights.sum(-1)
    safe = jnp.where(total > 0, total, 1)
    vectors = jnp.where(valid[..., None], vectors, 0)  # stale blocks may hold anything, and 0 times NaN is NaN
    out = jnp.einsum("RNC,RCD->RND", weights.astype(wide.dtype), vectors, preferred_element_type=jnp.float32)
    return Partial((out / safe[..., None]).astype(wide.dtype), jnp.where(total > 0, top[..., 0] + jnp.log(safe), NEVER))
