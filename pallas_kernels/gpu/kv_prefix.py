"""Attention of prefill chunks over cached keys and values on NVIDIA Hopper GPUs; `reference.kv_prefix_attention`.

One CUDA block handles one head and a tile of up to 128 queries of one row; tiles start at the row's first query. A
memory warpgroup streams the head's columns of the row's pages through a ring of shared-memory slots (K, V, K, ...); two
compute warpgroups, each with 64 queries in the rows of wgmma, follow with an online softmax. Each key that is read is
used 128 times. Blocks that run at the same time have the same row and other heads, so they read whole pages together.

Results leave in groups of 8 queries, the rows of a tile of the layout without bank conflicts. So each row's queries are
first moved to a multiple of 8, and no group has queries of two rows.

Float32 is multiplied in three bfloat16 parts, as in `gpu_hidden_decode.py`, which take the shared memory of one of the
compute warpgroups. So is what an int8 page is decoded to, by each of them.

Source: running softmax over chunks as in FlashAttention-2 (arXiv 2307.08691). Shape letters as in `reference.py`; C
tokens in a chunk, I tiles.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from apt_jax.pallas_kernels.gpu import pages as gpu_pages
from apt_jax.pallas_kernels.gpu.pages import CHUNK_TOKENS
from apt_jax.pallas_kernels.reference import NEVER, Partial

_QUERIES = 64  # of a warpgroup that computes, the row dimension of one wgmma
_SLOTS = 6  # of the ring: three chunks' keys and values
_RING_BYTES = {1: 96 << 10, 3: 64 << 10}  # at most, by parts of a number
_LEAST_COLUMNS = 16  # the narrowest tile of shared memory, in bfloat16
_LEAST_BYTES = 32  # of its rows
_SPLIT_COLUMNS = 32  # of a tile whose float32 numbers are split at a time, since registers are short
_GROUP = 8  # queries, the rows of a tile of shared memory
_WGMMA = plgpu.Layout.WGMMA


class _Tiles(NamedTuple):
    """Tiles of queries, row after row; those that are left over have no queries."""

    row: jax.Array  # int32 [I]
    start: jax.Array  # int32 [I]: place of the first query, a multiple of 8
    size: jax.Array  # int32 [I]: queries


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
    interpret: object = None,
) -> Partial:
    """As the reference, with queries and weights rounded to the pool's dtype, unless that is int8. Pure.

    Args:
        pool: `[L*P, S, D]`, bfloat16, float16 or float32, or int8 with `scales`.
        interpret: None on a GPU, `plgpu.InterpretGPUParams()` elsewhere.

    Raises:
        NotImplementedError: a block size or head size that the kernel does not handle, for its dtype.
    """
    T, N, H = q.shape
    R, S = length.shape[0], pool.shape[1]
    is_coded = scales is not None
    gpu_pages.check_pool(pool, N * H, q.dtype, is_coded)
    number = q.dtype if is_coded else pool.dtype
    parts, workers, operand = (3, 1, jnp.bfloat16) if number == jnp.float32 else (1, 2, number)
    columns = math.gcd(H, gpu_pages.TILE_COLUMNS if parts == 1 else _SPLIT_COLUMNS)
    if columns < _LEAST_COLUMNS:
        raise NotImplementedError(f"head_dim={H} over a cached prefix is left to XLA: it must be a multiple of 16")
    layout = _tiles(columns, operand)  # of the weights too: wgmma wants both its operands swizzled alike
    ring_layout = _tiles(columns, pool.dtype) if columns * pool.dtype.itemsize >= _LEAST_BYTES else ()
    slots = min(_RING_BYTES[parts] // (CHUNK_TOKENS * H * pool.dtype.itemsize), _SLOTS)
    tile = workers * _QUERIES
    places = -(-T // _GROUP) * _GROUP + _GROUP * R
    num_queries = jnp.where(length > 0, num_queries, 0)
    first_place = _starts(num_queries, _GROUP)
    tiles = _find_tiles(num_queries, first_place, tile=tile, num_tiles=-(-T // tile) + R)
    pages = gpu_pages.copied_pages(key_blocks.shape[1])
    (key_blocks, _), (value_blocks, _) = (gpu_pages.pad_table(b, b.shape[1]) for b in (key_blocks, value_blocks))
    kernel = plgpu.kernel(
        functools.partial(_body, block_size=S, interpreted=interpret is not None),
        out_type=[
            jax.ShapeDtypeStruct((places, N * H), jnp.float32),
            jax.ShapeDtypeStruct((tiles.row.shape[0], N, tile), jnp.float32),
        ],
        grid=(tiles.row.shape[0], N),
        grid_names=("tile", "head"),
        num_threads=workers + 1,
        thread_name="wg",
        scratch_types={
            "q_s": plgpu.SMEM((workers, parts, _QUERIES, H), operand, transforms=layout),
            "key_pages": plgpu.SMEM((pages,), jnp.int32),
            "value_pages": plgpu.SMEM((pages,), jnp.int32),
            "ring": plgpu.SMEM((slots, CHUNK_TOKENS, H), pool.dtype, transforms=ring_layout),
            "parts_s": gpu_pages.parts_scratch(parts, workers, H, layout, operand if is_coded else None),
            "weights_s": plgpu.SMEM((workers, parts, _QUERIES, CHUNK_TOKENS), operand, transforms=layout),
            "out_s": plgpu.SMEM((workers, _QUERIES, H), jnp.float32, transforms=_tiles(math.gcd(H, 32), jnp.float32)),
            "lse_s": plgpu.SMEM((workers, _QUERIES), jnp.float32),
            "q_ready": plgpu.Barrier(num_arrivals=parts, num_barriers=workers),
            "table_ready": plgpu.Barrier(num_arrivals=2),
            "full": plgpu.Barrier(num_arrivals=gpu_pages.copies_per_chunk(S) + is_coded, num_barriers=slots),
            "empty": plgpu.Barrier(num_arrivals=workers, num_barriers=slots),
            "tail_cleared": plgpu.Barrier(num_arrivals=workers),
            **({"scale_ring": plgpu.SMEM((slots, 1, CHUNK_TOKENS), jnp.float32)} if is_coded else {}),
        },
        compiler_params=gpu_pages.compiler(pool.dtype),
        interpret=interpret,
    )
    place = jnp.arange(places + tile)  # a tile may reach beyond the last query
    row = _row_of(place, first_place + num_queries)
    slot = jnp.clip(first_query[row] + place - first_place[row], 0, T - 1)
    queries = q.astype(number).reshape(T, N * H)[slot]
    queries = jnp.stack(gpu_pages.split_float32(queries) if parts > 1 else [queries])
    by_head = jnp.zeros((1, 1, CHUNK_TOKENS)) if scales is None else gpu_pages.scales_by_head(scales, N, S)
    out, lse = kernel(*tiles, length.astype(jnp.int32), queries, pool, by_head, key_blocks, value_blocks)
    row, some = gpu_pages.rows_of_slots(length, first_query, num_queries, T)
    inside = jnp.arange(T) - first_query[row]
    lse = lse[_starts(num_queries, tile)[row] // tile + inside // tile, :, inside % tile]
    # what no tile wrote holds anything
    out = jnp.where(some[:, None, None], out[first_place[row] + inside].reshape(T, N, H), 0)
    return Partial(out, jnp.where(some[:, None], lse, NEVER))


def _tiles(columns: int, dtype: DTypeLike) -> tuple[Any, ...]:
    """The layout of shared memory in tiles of 8 rows and 32, 64 or 128 bytes of columns."""
    row_bytes = columns * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(row_bytes)  # type: ignore[abstract]


def _starts(num_queries: jax.Array, unit: int) -> jax.Array:
    """Where each row's queries start if all of them start at multiples of `unit`, one row after the other."""
    taken = -(-num_queries // unit) * unit
    return jnp.cumsum(taken) - taken


def _row_of(place: jax.Array, stop: jax.Array) -> jax.Array:
    """The row of a place, by where the rows stop; the last row beyond all."""
    return jnp.minimum(jnp.searchsorted(stop, place, side="right"), stop.shape[0] - 1).astype(jnp.int32)


def _find_tiles(num_queries: jax.Array, first_place: jax.Array, *, tile: int, num_tiles: int) -> _Tiles:
    """Tiles of up to `tile` for `num_queries [R]` that lie from `first_place [R]` on. Pure."""
    before = _starts(num_queries, tile)
    at = tile * jnp.arange(num_tiles)
    row = _row_of(at, before + num_queries)
    done = at - before[row]
    count = jnp.clip(num_queries[row] - done, 0, tile)
    return _Tiles(row, (first_place[row] + done).astype(jnp.int32), count.astype(jnp.int32))


def _body(  # type: ignore[no-untyped-def]
    tile_row, tile_start, tile_size, length, q, pool, scales, key_blocks, value_blocks, out, lse, *,
    q_s, key_pages, value_pages, ring, parts_s, weights_s, out_s, lse_s,
    q_ready, table_ready, full, empty, tail_cleared, block_size, interpreted, scale_ring=None,
):  # fmt: skip
    """One CUDA block. q `[F, places + tile, D]` in F parts, out `[places, D]`, lse `[I, N, tile]`, all in GMEM."""
    tile, head, worker = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("wg")
    workers, F, _, H = q_s.shape
    slots, is_coded = ring.shape[0], ring.dtype == jnp.int8
    is_copied = F > 1 or is_coded  # so that a slot is free before its product
    row, start, count = tile_row[tile], tile_start[tile], tile_size[tile]
    columns = pl.ds(head * H, H)
    todo = jnp.where(count > 0, length[row], 0)
    chunks = pl.cdiv(todo, CHUNK_TOKENS)

    @pl.when((todo > 0) & (worker == workers))
    def _memory() -> None:
        own = pl.ds(0, key_pages.shape[0])
        tables = (key_blocks.at[row, own], key_pages), (value_blocks.at[row, own], value_pages)
        own_scales = (scales, scale_ring, pl.ds(head, 1)) if is_coded else None
        gpu_pages.stream_keys_values(
            pool, tables, table_ready, ring, full, empty, todo, block_size, columns, own_scales
        )

    @pl.when((todo > 0) & (worker < workers))
    def _compute() -> None:
        first = start + worker * _QUERIES
        for i in range(F):
            own_q = q.at[i, pl.ds(first, _QUERIES), columns]
            plgpu.copy_gmem_to_smem(own_q, q_s.at[worker, i], q_ready.at[worker])
        plgpu.barrier_wait(q_ready.at[worker])

        pairs = gpu_pages.part_pairs(F)

        def operands(slot: jax.Array, left: jax.Array, mine: jax.Array) -> list[Any]:
            """What wgmma reads of a slot: the slot itself, or parts of its valid rows; then it is free."""
            if not is_copied:
                return [ring.at[slot]]
            if is_coded:
                gpu_pages.store_decoded(ring.at[slot], scale_ring.at[slot], left, parts_s.at[mine, 0], 1)
                plgpu.barrier_arrive(empty.at[slot])
                return [parts_s.at[mine, 0]]

            columns = math.gcd(H, _SPLIT_COLUMNS)
            for at in range(0, H, columns):
                own = pl.ds(at, columns)
                found = plgpu.layout_cast(ring.at[slot, :, own][...], _WGMMA)
                found = jnp.where(gpu_pages.valid_rows(left, found.shape), found, 0.0)
                gpu_pages.store_parts(found, parts_s.at[mine, :, :, own])
            plgpu.barrier_arrive(empty.at[slot])
            return [parts_s.at[mine, i] for i in range(F)]

        def step(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            left = todo - chunk * CHUNK_TOKENS
            # The worker itself, since left > 0; but the compiler does not know. If it did, it would keep the addresses
            # of all parts in registers from before the loop on, which float32 cannot spare.
            mine = worker if F == 1 else worker + jnp.minimum(left - 1, 0)
            slot = lax.rem(2 * chunk, slots)
            plgpu.barrier_wait(full.at[slot])
            keys = operands(slot, left, mine)
            products = ((q_s.at[mine, i], keys[j].T) for i, j in pairs)
            scores = gpu_pages.product((_QUERIES, CHUNK_TOKENS), *products)
            if not is_copied:
                plgpu.barrier_arrive(empty.at[slot])
            token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_WGMMA)
            scores = jnp.where(token < left, scores, NEVER)
            new_top = jnp.maximum(top, gpu_pages.row(scores.max(axis=1)))
            weights = jnp.exp(scores - gpu_pages.over_columns(new_top, scores.shape))
            keep = jnp.exp(top - new_top)
            total = total * keep + gpu_pages.row(weights.sum(axis=1))
            if F == 1:
                weights_s.at[mine, 0][...] = plgpu.layout_cast(weights.astype(weights_s.dtype), _WGMMA)
                plgpu.commit_smem()
            else:
                gpu_pages.store_parts(weights, weights_s.at[mine])
            slot = lax.rem(2 * chunk + 1, slots)
            plgpu.barrier_wait(full.at[slot])
            if not is_copied:
                clear_tail(slot, left)
            values = operands(slot, left, mine)
            kept = acc * gpu_pages.over_columns(keep, acc.shape)
            products = ((weights_s.at[mine, i], values[j]) for i, j in pairs)
            acc = gpu_pages.add_product(kept, *products, interpreted=interpreted)
            if not is_copied:
                plgpu.barrier_arrive(empty.at[slot])
            return new_top, total, acc

        def clear_tail(slot: jax.Array, left: jax.Array) -> None:
            """One of the warpgroups does it for both, in a row's last chunk."""

            @pl.when(left < CHUNK_TOKENS)
            def _() -> None:
                @pl.when(worker == 0)
                def _() -> None:
                    gpu_pages.clear_tail(ring.at[slot], left)

                plgpu.barrier_arrive(tail_cleared)
                plgpu.barrier_wait(tail_cleared)

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
