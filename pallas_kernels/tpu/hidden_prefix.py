"""Attention of few queries over cached hidden vectors on a TPU; what it computes: `reference.hidden_prefix_attention`.

Absorbed queries are D wide per token and head. All (token, head) pairs lie in one list and are taken in tiles, so that
VMEM holds a tile of them and its sums whatever the number of tokens; each chunk of vectors is read from HBM once per
tile, and used twice. One step is a tile and one row's prefix. An int8 pool is read as in `hidden_decode.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from apt_jax.pallas_kernels.reference import NEVER, Partial
from apt_jax.pallas_kernels.tpu import codes as tpu_codes
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from apt_jax.pallas_kernels.tpu import query_tiles as tpu_query_tiles
from apt_jax.pallas_kernels.tpu.paging import LANES, Ref, Source, Steps
from apt_jax.pallas_kernels.tpu.query_tiles import Work

TILE_BYTES = 11 * 2**19  # of the sums of a tile
MAX_TILE = 512  # queries: pairs of token and head
SLICE = 512  # columns that one product takes


def hidden_prefix_attention(
    q_wide: jax.Array,
    pool: jax.Array,
    blocks: jax.Array,
    length: jax.Array,
    first_query: jax.Array,
    num_queries: jax.Array,
    *,
    scales: jax.Array | None = None,
    out_dtype: DTypeLike = jnp.float32,
    interpret: bool | pltpu.InterpretParams = False,
) -> Partial:
    """As the reference, with queries rounded to the pool's dtype. One core does it all. Pure.

    Args:
        scales: of an int8 pool; queries are multiplied in their own dtype then.
        out_dtype: of `out`.
        interpret: run without a TPU.

    Raises:
        NotImplementedError: a dtype, block size or width that the kernel does not handle.
    """
    T, N, D = q_wide.shape
    S = pool.shape[1]
    rows = blocks, length, first_query, num_queries
    row_groups = tpu_paging.row_groups(len(length), blocks.shape[1], 1)
    if len(row_groups) > 1:
        own = functools.partial(
            hidden_prefix_attention, q_wide, pool, scales=scales, out_dtype=out_dtype, interpret=interpret
        )
        return tpu_query_tiles.together([own(*(of_rows[g] for of_rows in rows)) for g in row_groups])
    tpu_paging.check_shapes(q_wide, pool, D, interpret, scales is not None)
    arrays = (pool,) if scales is None else (pool, scales)
    multiplied = pool.dtype if scales is None else q_wide.dtype
    lanes = 0 if scales is None else tpu_codes.lanes(1, S)
    tile = min(tile_queries(D), T * N)
    chunk = tpu_paging.chunk_tokens(D, S, pool.dtype.itemsize, num_sources=1)
    work, some = tpu_query_tiles.find_work(length, first_query * N, num_queries * N, num_slots=T * N, tile=tile)
    scratch = [*tpu_paging.scratch(1, chunk, S, D, pool.dtype, lanes), pltpu.VMEM((tile, D), jnp.float32)]
    blocks_in_out = tile * (D * (multiplied.itemsize + jnp.dtype(out_dtype).itemsize) + LANES * 4)

    def spec(columns: int) -> pl.BlockSpec:
        def index(_, step, tiles, rows, count, *__):  # type: ignore[no-untyped-def]
            return tiles[jnp.minimum(step, jnp.maximum(count[0], 1) - 1)], 0

        return pl.BlockSpec((tile, columns), index)

    out, lse = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=7,
            grid=(1, jnp.maximum(work.num_items[0], 1)),
            in_specs=[spec(D), tpu_paging.pool_specs(arrays)],
            out_specs=[spec(D), spec(LANES)],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((T * N, D), out_dtype), jax.ShapeDtypeStruct((T * N, LANES), jnp.float32)],
        compiler_params=tpu_paging.compiler_params(scratch, blocks_in_out, tpu_query_tiles.SPARE_BYTES),
        interpret=interpret,
        name="hidden_prefix_attention",
    )(
        *work,
        length.astype(jnp.int32),
        blocks.astype(jnp.int32),
        q_wide.astype(multiplied).reshape(T * N, D),
        arrays,
    )
    out = jnp.where(some[:, None], out, 0).reshape(T, N, D)  # what was never visited holds anything
    return Partial(out, jnp.where(some, lse[:, 0], NEVER).reshape(T, N))


def tile_queries(width: int) -> int:
    """Queries of a tile: a power of two, so that the sums of a tile take at most `TILE_BYTES`."""
    queries = MAX_TILE
    while queries > LANES and queries * width * 4 > TILE_BYTES:
        queries //= 2
    return queries


def _kernel(
    tiles: Ref,  # SMEM int32 [I]
    rows: Ref,  # SMEM int32 [I]
    count: Ref,  # SMEM int32 [1]
    first: Ref,  # SMEM int32 [R]
    stop: Ref,  # SMEM int32 [R]
    length: Ref,  # SMEM int32 [R]
    blocks: Ref,  # SMEM int32 [R, W]
    q: Ref,  # VMEM [tile, D]
    pool: tuple[Ref, ...],  # HBM [L*P, S, D] and float32 [L*P, 1, X]
    out: Ref,  # VMEM [tile, D]
    lse: Ref,  # VMEM float32 [tile, LANES]
    buffers: tuple[Ref, ...],  # VMEM [2, C/S, S, D] and float32 [2, C/S, 1, lanes]
    arrived: Ref,  # DMA semaphores [2]
    next_buffer: Ref,  # SMEM int32 [1]
    sums: Ref,  # VMEM float32 [tile, D]
) -> None:
    tile, D = out.shape
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    buffer, *scales = buffers
    C = buffer.shape[1] * buffer.shape[2]
    slices = [slice(at, min(at + SLICE, D)) for at in range(0, D, SLICE)]
    work, item = Work(tiles, rows, count, first, stop), pl.program_id(1)

    def serve(walk):  # type: ignore[no-untyped-def]
        sums[...] = jnp.zeros_like(sums)

        def body(index, num_valid, carry):  # type: ignore[no-untyped-def]
            scores = jnp.zeros((tile, C), jnp.float32)
            for columns in slices:
                x = tpu_codes.widened(buffer[index, :, :, columns].reshape(C, -1), q.dtype)
                scores += lax.dot_general(
                    q[:, columns], x, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
                )
            of_tokens = tpu_codes.scales_of(scales[0], index, num_valid, 0, 1, buffer.shape[2]) if scales else None
            if of_tokens is not None:
                scores *= of_tokens
            weights, keep, top, total = tpu_paging.online_softmax(scores, num_valid, *carry)
            weights = (weights if of_tokens is None else weights * of_tokens).astype(q.dtype)
            for columns in slices:
                x = tpu_codes.widened(buffer[index, :, :, columns].reshape(C, -1), q.dtype)
                found = jnp.dot(weights, x, precision=precision, preferred_element_type=jnp.float32)
                sums[:, columns] = sums[:, columns] * keep + found
            return top, total

        start = jnp.full((tile, 1), NEVER, jnp.float32), jnp.zeros((tile, 1), jnp.float32)
        top, total = walk(body, start)
        for columns in slices:
            found = sums[:, columns] / total
            mine = tpu_query_tiles.own_queries(work, item, tile, found.shape)
            # selected in float32: a bfloat16 select on an iota mask does not compile
            kept = jnp.where(mine, found, out[:, columns].astype(jnp.float32))
            out[:, columns] = kept.astype(out.dtype)
        mine = tpu_query_tiles.own_queries(work, item, tile, lse.shape)
        lse[...] = jnp.where(mine, jnp.broadcast_to(top + jnp.log(total), lse.shape), lse[...])

    steps = Steps(num_steps=count[0], row=lambda step: rows[step])
    tpu_paging.run_step(steps, length, pool, [Source(blocks, buffers, arrived)], next_buffer, serve)
