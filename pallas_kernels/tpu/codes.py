"""Reading an int8 pool on a TPU: codes as numbers, and a chunk's scales beside the scores that they belong to.

A block has a float32 scale for each of its tokens and heads, `[N, S]` as one row of lanes (apt_jax/attention/pool.py).
Scores are `[heads, C]`, so a head's S lanes of each page have to come side by side, in the head's register row. With
S = 32 a row of 128 lanes holds four heads' scales, and 128 tokens' scores need those of four pages. Heads and pages
that have the same distance to go are first put into one register, which is then rotated.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from apt_jax.pallas_kernels.tpu.paging import LANES, Ref


def lanes(heads: int, block_size: int) -> int:
    """Lanes of a block's row that hold the scales of so many heads, from the first on; whole registers."""
    return -(-heads * block_size // LANES) * LANES


def widened(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Numbers of a pool in `dtype`; codes by way of float32, which every chip converts them to."""
    return x.astype(jnp.float32).astype(dtype) if x.dtype == jnp.int8 else x


def scales_of(
    buffer: Ref, index: jax.Array, num_valid: jax.Array, first: int, heads: int, block_size: int
) -> jax.Array:
    """Scales of a chunk's tokens, float32 `[heads, C]`; 0 from token `num_valid` on, whatever the buffer holds.

    Args:
        buffer: VMEM float32 `[2, C/S, 1, lanes]`.
        first: first head; its scales start at a multiple of 128 lanes.
        heads: at most 8.
    """
    pages, S = buffer.shape[1], block_size
    shape = heads, LANES
    head, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))

    def rows(page: int, places: list[int]) -> jax.Array:
        """Of a page the 128 lanes that start at each of `places`, in as many equal groups of heads."""
        found = jnp.broadcast_to(buffer[index, page, :, places[0] : places[0] + LANES], shape)
        for i, at in enumerate(places[1:], 1):
            found = jnp.where(head >= i * heads_of_row, buffer[index, page, :, at : at + LANES], found)
        return found

    groups = []
    heads_of_row = max(LANES // S, 1)
    for at in range(0, pages * S, LANES):  # 128 tokens
        page, inside = divmod(at, S)
        if S >= LANES:
            groups.append(rows(page, [(first + h) * S + inside for h in range(heads)]))
            continue
        places = [h * S for h in range(first, first + heads, heads_of_row)]
        of_pages = [rows(page + i, places) for i in range(min(heads_of_row, pages - page))]
        found = jnp.zeros(shape, jnp.float32)
        for distance in range(heads_of_row):
            here = jnp.zeros(shape, jnp.float32)
            for h in range(min(heads_of_row, heads)):
                if (i := (h + distance) % heads_of_row) < len(of_pages):
                    here = jnp.where(head % heads_of_row == h, of_pages[i], here) if heads > 1 else of_pages[i]
            there = pltpu.roll(here, distance * S, 1) if distance else here
            found = jnp.where(lane // S == (head + distance) % heads_of_row, there, found)
        groups.append(found)
    scales = jnp.concatenate(groups, axis=1)[:, : pages * S]
    position = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    return jnp.where(position < num_valid, scales, 0)
