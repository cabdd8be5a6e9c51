"""Which tiles of packed queries meet which rows' cached prefixes, for the TPU's prefix kernels.

Queries of all rows lie packed in slots. A kernel takes them in tiles of fixed size and position; a tile that holds
queries of several rows is an item of work for each of them, and each item writes its own row's results only. Items are
in the order of tiles, so that a tile's output stays in VMEM until all its items are done.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apt_jax.pallas_kernels.reference import Partial

SPARE_BYTES = 16 * 2**20  # of VMEM: scores and weights of a tile, several times in float32


class Work(NamedTuple):
    """Items of work; entries past `num_items` are not looked at."""

    tile: jax.Array  # int32 [I]
    row: jax.Array  # int32 [I]
    num_items: jax.Array  # int32 [1]
    first: jax.Array  # int32 [R]: slot of the row's first query
    stop: jax.Array  # int32 [R]: slot after its last


def find_work(
    length: jax.Array, first_query: jax.Array, num_queries: jax.Array, *, num_slots: int, tile: int
) -> tuple[Work, jax.Array]:
    """Items for rows with cached tokens; and bool `[num_slots]`, whether a slot is in any of them. Pure.

    Args:
        length, first_query, num_queries: int32 `[R]`, as in `reference.kv_prefix_attention`.
        num_slots: query slots; tiles start at multiples of `tile`.
    """
    R, tiles = length.shape[0], -(-num_slots // tile)
    first = first_query.astype(jnp.int32)
    stop = jnp.where(length > 0, first + num_queries, first).astype(jnp.int32)
    start = tile * jnp.arange(tiles, dtype=jnp.int32)[:, None]
    meets = (jnp.maximum(first, start) < jnp.minimum(stop, start + tile)).reshape(-1)
    # rows share no slot, so a tile's rows but the last end in it
    item = jnp.nonzero(meets, size=min(tiles + R, tiles * R), fill_value=0)[0].astype(jnp.int32)
    slot = jnp.arange(num_slots)[:, None]
    work = Work(item // R, item % R, jnp.sum(meets, dtype=jnp.int32)[None], first, stop)
    return work, jnp.any((slot >= first) & (slot < stop), axis=1)


def together(parts: Sequence[Partial]) -> Partial:
    """Results of calls for different rows, which share no slot: each is 0, and `NEVER`, in the others' slots. Pure."""
    outs, sums = zip(*parts, strict=True)
    return Partial(functools.reduce(jnp.add, outs), functools.reduce(jnp.maximum, sums))


def own_queries(work: Work, item: jax.Array, tile: int, shape: tuple[int, int]) -> jax.Array:
    """In a kernel: which queries of an item's tile are its row's, bool of `shape` with queries first."""
    slot = work.tile[item] * tile + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    row = work.row[item]
    return (slot >= work.first[row]) & (slot < work.stop[row])
