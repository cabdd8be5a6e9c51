"""Attention of prefill chunks over cached keys and values on NVIDIA Hopper GPUs; `reference.kv_prefix_attention`.

One CUDA block handles one head and a tile of up to 128 queries of one row; tiles start at the row's first query. A
memory warpgroup streams the head's columns of the row's pages through a ring of shared-memory slots (K, V, K, ...); two
compute warpgroups, each with 64 queries in the rows of wgmma, follow with an online softmax. Each key that is read is
used 128 times. Blocks that run at the same time have the same row and other heads, so they read whole pages together.

Results leave in groups of 8 queries, the rows of a tile of the layout without bank conflicts. So each row's queries are
first moved to a multiple of 8, and no group has queries of two rows.

Source: running softmax over chunks as in FlashAttention-2 (arXiv 2307.08691). Shape letters as in `reference.py`; C
tokens in a chunk, I tiles.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import gpu_pages
from pallas_kernels.gpu_pages import CHUNK_TOKENS
from pallas_kernels.reference import NEVER, Partial

_WORKERS = 2  # warpgroups that compute
_QUERIES = 64  # of each, the row dimension of one wgmma
TILE = _WORKERS * _QUERIES
_SLOTS = 6  # of the ring: three chunks' keys and values, 96 KiB for heads of 128
_GROUP = 8  # queries, the rows of a tile of shared memory
_WGMMA = plgpu.Layout.WGMMA


class _Tiles(NamedTuple):
    """Tiles of queries, row after row; those that are left over have no queries."""

    row: jax.Array  # int32 [I]
    start: jax.Array  # int32 [I]: place of the first query, a multiple of 8
    size: jax.Array  # int32 [I]: queries, up to TILE


def kv_prefix_attention(
    q: jax.Array,
    pool: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    length: jax.Array,
    first_query: jax.Array,
    num_queries: jax.Array,
    *,
    interpret: object = None,
) -> Partial:
    """As the reference, with queries and weights rounded to the pool's dtype. Pure.

    Args:
        pool: `[L*P, S, D]`, bfloat16 or float16.
        interpret: None on a GPU, `plgpu.InterpretGPUParams()` elsewhere.

    Raises:
        NotImplementedError: a dtype, block size or head size that the kernel does not handle.
    """
    T, N, H = q.shape
    R, S = length.shape[0], pool.shape[1]
    gpu_pages.check_pool(pool, N * H)
    if pool.dtype == jnp.float32:
        raise NotImplementedError(f"{pool.dtype=} over a cached prefix is left to XLA")
    layout = _transforms(H, pool.dtype)  # of the weights too: wgmma wants both its operands swizzled alike
    places = -(-T // _GROUP) * _GROUP + _GROUP * R
    num_queries = jnp.where(length > 0, num_queries, 0)
    first_place = _starts(num_queries, _GROUP)
    tiles = _find_tiles(num_queries, first_place, num_tiles=-(-T // TILE) + R)
    pages = gpu_pages.copied_pages(key_blocks.shape[1])
    (key_blocks, _), (value_blocks, _) = (gpu_pages.pad_table(b, b.shape[1]) for b in (key_blocks, value_blocks))
    kernel = plgpu.kernel(
        functools.partial(_body, block_size=S, interpreted=interpret is not None),
        out_type=[
            jax.ShapeDtypeStruct((places, N * H), jnp.float32),
            jax.ShapeDtypeStruct((tiles.row.shape[0], N, TILE), jnp.float32),
        ],
        grid=(tiles.row.shape[0], N),
        grid_names=("tile", "head"),
        num_threads=_WORKERS + 1,
        thread_name="wg",
        scratch_types={
            "q_s": plgpu.SMEM((_WORKERS, _QUERIES, H), pool.dtype, transforms=layout),
            "key_pages": plgpu.SMEM((pages,), jnp.int32),
            "value_pages": plgpu.SMEM((pages,), jnp.int32),
            "ring": plgpu.SMEM((_SLOTS, CHUNK_TOKENS, H), pool.dtype, transforms=layout),
            "weights_s": plgpu.SMEM((_WORKERS, _QUERIES, CHUNK_TOKENS), pool.dtype, transforms=layout),
            "out_s": plgpu.SMEM((_WORKERS, _QUERIES, H), jnp.float32, transforms=_transforms(H, jnp.float32)),
            "lse_s": plgpu.SMEM((_WORKERS, _QUERIES), jnp.float32),
            "q_ready": plgpu.Barrier(num_barriers=_WORKERS),
            "table_ready": plgpu.Barrier(num_arrivals=2),
            "full": plgpu.Barrier(num_arrivals=gpu_pages.copies_per_chunk(S), num_barriers=_SLOTS),
            "empty": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_SLOTS),
            "tail_cleared": plgpu.Barrier(num_arrivals=_WORKERS),
        },
        compiler_params=gpu_pages.COMPILER,
        interpret=interpret,
    )
    place = jnp.arange(places + TILE)  # a tile may reach beyond the last query
    row = _row_of(place, first_place + num_queries)
    slot = jnp.clip(first_query[row] + place - first_place[row], 0, T - 1)
    queries = q.astype(pool.dtype).reshape(T, N * H)[slot]
    out, lse = kernel(*tiles, length.astype(jnp.int32), queries, pool, key_blocks, value_blocks)
    row, some = gpu_pages.rows_of_slots(length, first_query, num_queries, T)
    inside = jnp.arange(T) - first_query[row]
    lse = lse[_starts(num_queries, TILE)[row] // TILE + inside // TILE, :, inside % TILE]
    # what no tile wrote holds anything
    out = jnp.where(some[:, None, None], out[first_place[row] + inside].reshape(T, N, H), 0)
    return Partial(out, jnp.where(some[:, None], lse, NEVER))


def _transforms(head_dim: int, dtype: DTypeLike) -> tuple[Any, ...]:
    """The layout of a head's columns in shared memory: tiles of 8 rows of the widest swizzle that divides them."""
    for swizzle in (128, 64, 32):
        columns = swizzle // jnp.dtype(dtype).itemsize
        if head_dim % columns == 0:
            return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
    raise NotImplementedError(f"{head_dim=} over a cached prefix is left to XLA: the kernel needs a multiple of 16")


def _starts(num_queries: jax.Array, unit: int) -> jax.Array:
    """Where each row's queries start if all of them start at multiples of `unit`, one row after the other."""
    taken = -(-num_queries // unit) * unit
    return jnp.cumsum(taken) - taken


def _row_of(place: jax.Array, stop: jax.Array) -> jax.Array:
    """The row of a place, by where the rows stop; the last row beyond all."""
    return jnp.minimum(jnp.searchsorted(stop, place, side="right"), stop.shape[0] - 1).astype(jnp.int32)


def _find_tiles(num_queries: jax.Array, first_place: jax.Array, *, num_tiles: int) -> _Tiles:
    """Tiles for `num_queries [R]` that lie from `first_place [R]` on. Pure."""
    before = _starts(num_queries, TILE)
    at = TILE * jnp.arange(num_tiles)
    row = _row_of(at, before + num_queries)
    done = at - before[row]
    count = jnp.clip(num_queries[row] - done, 0, TILE)
    return _Tiles(row, (first_place[row] + done).astype(jnp.int32), count.astype(jnp.int32))


def _body(  # type: ignore[no-untyped-def]
    tile_row, tile_start, tile_size, length, q, pool, key_blocks, value_blocks, out, lse, *,
    q_s, key_pages, value_pages, ring, weights_s, out_s, lse_s, q_ready, table_ready, full, empty, tail_cleared,
    block_size, interpreted,
):  # fmt: skip
    """One CUDA block. q `[places + TILE, D]`, out `[places, D]`, lse `[I, N, TILE]`, all in GMEM."""
    tile, head, worker = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("wg")
    H = q_s.shape[2]
    row, start, count = tile_row[tile], tile_start[tile], tile_size[tile]
    columns = pl.ds(head * H, H)
    todo = jnp.where(count > 0, length[row], 0)
    chunks = pl.cdiv(todo, CHUNK_TOKENS)

    @pl.when((todo > 0) & (worker == _WORKERS))
    def _memory() -> None:
        for blocks, pages in ((key_blocks, key_pages), (value_blocks, value_pages)):
            plgpu.copy_gmem_to_smem(blocks.at[row, pl.ds(0, pages.shape[0])], pages, table_ready)
        plgpu.barrier_wait(table_ready)

        @pl.loop(0, chunks)
        def _(chunk: jax.Array) -> None:
            for turn, pages in ((0, key_pages), (1, value_pages)):
                load = 2 * chunk + turn
                slot = lax.rem(load, _SLOTS)

                @pl.when(load >= _SLOTS)
                def _(slot: jax.Array = slot) -> None:
                    plgpu.barrier_wait(empty.at[slot])

                gpu_pages.load_chunk(pool, pages, ring.at[slot], full.at[slot], chunk, todo, block_size, columns)

        gpu_pages.drain(empty, 2 * chunks)

    @pl.when((todo > 0) & (worker < _WORKERS))
    def _compute() -> None:
        first = start + worker * _QUERIES
        plgpu.copy_gmem_to_smem(q.at[pl.ds(first, _QUERIES), columns], q_s.at[worker], q_ready.at[worker])
        plgpu.barrier_wait(q_ready.at[worker])

        def step(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            left = todo - chunk * CHUNK_TOKENS
            slot = lax.rem(2 * chunk, _SLOTS)
            plgpu.barrier_wait(full.at[slot])
            scores = gpu_pages.product((_QUERIES, CHUNK_TOKENS), (q_s.at[worker], ring.at[slot].T))
            plgpu.barrier_arrive(empty.at[slot])
            token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_WGMMA)
            scores = jnp.where(token < left, scores, NEVER)
            new_top = jnp.maximum(top, gpu_pages.row(scores.max(axis=1)))
            weights = jnp.exp(scores - gpu_pages.over_columns(new_top, scores.shape))
            keep = jnp.exp(top - new_top)
            total = total * keep + gpu_pages.row(weights.sum(axis=1))
            weights_s.at[worker][...] = plgpu.layout_cast(weights.astype(weights_s.dtype), _WGMMA)
            plgpu.commit_smem()
            slot = lax.rem(2 * chunk + 1, _SLOTS)
            plgpu.barrier_wait(full.at[slot])

            @pl.when(left < CHUNK_TOKENS)
            def _() -> None:
                @pl.when(worker == 0)
                def _() -> None:
                    gpu_pages.clear_tail(ring.at[slot], left)

                plgpu.barrier_arrive(tail_cleared)
                plgpu.barrier_wait(tail_cleared)

            kept = acc * gpu_pages.over_columns(keep, acc.shape)
            acc = gpu_pages.add_product(kept, weights_s.at[worker], ring.at[slot], interpreted)
            plgpu.barrier_arrive(empty.at[slot])
            return new_top, total, acc

        nothing = (
            gpu_pages.row(jnp.full((_QUERIES,), NEVER, jnp.float32)),
            gpu_pages.row(jnp.zeros((_QUERIES,), jnp.float32)),
            plgpu.layout_cast(jnp.zeros((_QUERIES, H), jnp.float32), _WGMMA),
        )
        top, total, acc = lax.fori_loop(0, chunks, step, nothing)
        own_out, own_lse = out_s.at[worker], lse_s.at[worker]
        own_out[...] = acc / gpu_pages.over_columns(total, acc.shape)
        own_lse[...] = top + jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_lse, lse.at[tile, head, pl.ds(worker * _QUERIES, _QUERIES)])
        for at in range(0, _QUERIES, _GROUP):

            @pl.when(worker * _QUERIES + at < count)
            def _(at: int = at) -> None:
                place = pl.multiple_of(first + at, _GROUP)
                plgpu.copy_smem_to_gmem(own_out.at[pl.ds(at, _GROUP)], out.at[pl.ds(place, _GROUP), columns])

        plgpu.wait_smem_to_gmem(0)
