"""Decode attention over cached hidden vectors on a TPU; what it computes: `reference.hidden_decode_attention`.

Each chunk of vectors X `[C, D]` is read from HBM once and used twice: scores = q_wide X^T, context += weights X. The
accumulator is a block `[N, D]`. A float32 query over a bfloat16 pool keeps its precision: it is split into a high and a
low bfloat16 half, which the matrix unit multiplies as 2N rows with the same X.

Of an int8 pool X are codes, which become numbers of the query's type in registers; a token's scale goes into its scores
and weights.
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
from apt_jax.pallas_kernels.tpu.paging import LANES, Ref, RowOrder, Source

SUBLANES = 8
SLICE = 256  # columns that one product takes; with more, registers are stored to VMEM


def hidden_decode_attention(
    q_wide: jax.Array,
    pool: jax.Array,
    blocks: jax.Array,
    length: jax.Array,
    *,
    scales: jax.Array | None = None,
    out_dtype: DTypeLike = jnp.float32,
    clears: bool = True,
    cores: int = 1,
    interpret: bool | pltpu.InterpretParams = False,
) -> Partial:
    """As the reference. Pure.

    Args:
        scales: of an int8 pool; queries are multiplied in their own dtype then.
        out_dtype: of `out`. At 2 N D numbers per row, query and output weigh as much as the vectors of 2N tokens, so
            bfloat16 for both saves the memory traffic of 2N tokens.
        clears: whether `out` is 0 in rows without tokens; without, it holds anything there, and that of N tokens is
            saved.
        cores: tensor cores of one device; rows are distributed over them.
        interpret: run without a TPU.

    Raises:
        NotImplementedError: a dtype, block size or width that the kernel does not handle.
    """
    R, N, D = q_wide.shape
    S = pool.shape[1]
    groups = tpu_paging.row_groups(R, blocks.shape[1], 1)
    if len(groups) > 1:
        own = functools.partial(
            hidden_decode_attention, scales=scales, out_dtype=out_dtype, clears=clears, cores=cores, interpret=interpret
        )
        parts = [own(q_wide[g], pool, blocks[g], length[g]) for g in groups]
        return Partial(*map(jnp.concatenate, zip(*parts, strict=True)))
    tpu_paging.check_shapes(q_wide, pool, D, interpret, scales is not None)
    arrays = (pool,) if scales is None else (pool, scales)
    multiplied = pool.dtype if scales is None else q_wide.dtype
    chunk = tpu_paging.chunk_tokens(D, S, pool.dtype.itemsize, num_sources=1)
    row_order = tpu_paging.order_rows(length)
    cores = min(cores, R)
    spec = functools.partial(tpu_paging.row_spec, cores=cores)
    lanes = 0 if scales is None else tpu_codes.lanes(1, S)
    scratch = tpu_paging.scratch(1, chunk, S, D, pool.dtype, lanes)
    query_rows = 2 * _aligned(N) if _splits(q_wide.dtype, multiplied) else N
    scratch += [pltpu.VMEM((query_rows, D), multiplied), pltpu.VMEM((N, D), jnp.float32)]
    scratch += [pltpu.VMEM((N, LANES), jnp.float32)] * 2
    blocks_in_out = N * D * (q_wide.dtype.itemsize + jnp.dtype(out_dtype).itemsize)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, cores=cores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=tpu_paging.grid(row_order, cores),
            in_specs=[spec((N, D)), tpu_paging.pool_specs(arrays)],
            out_specs=[spec((N, D)), spec((N, LANES))],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((R, N, D), out_dtype), jax.ShapeDtypeStruct((R, N, LANES), jnp.float32)],
        compiler_params=tpu_paging.compiler_params(scratch, blocks_in_out),
        interpret=interpret,
        name="hidden_decode_attention",
    )(*row_order, blocks.astype(jnp.int32), q_wide, arrays)
    some = length > 0  # rows that were never visited hold anything
    if clears:
        out = jnp.where(some[:, None, None], out, 0)
    return Partial(out, jnp.where(some[:, None], lse[..., 0], NEVER))


def _splits(query: DTypeLike, multiplied: DTypeLike) -> bool:
    """Whether the query has more precision than the dtype in which it is multiplied."""
    return jnp.dtype(query).itemsize > jnp.dtype(multiplied).itemsize


def _aligned(heads: int) -> int:
    """Rows from which on the low halves lie: a whole number of tiles."""
    return -(-heads // SUBLANES) * SUBLANES


def _kernel(
    order: Ref,  # SMEM int32 [R]
    count: Ref,  # SMEM int32 [1]
    length: Ref,  # SMEM int32 [R]
    blocks: Ref,  # SMEM int32 [R, W]
    q: Ref,  # VMEM [N, D]
    pool: tuple[Ref, ...],  # HBM [L*P, S, D] and float32 [L*P, 1, X]
    out: Ref,  # VMEM [N, D]
    lse: Ref,  # VMEM float32 [N, LANES]
    buffers: tuple[Ref, ...],  # VMEM [2, C/S, S, D] and float32 [2, C/S, 1, lanes]
    arrived: Ref,  # DMA semaphores [2]
    next_buffer: Ref,  # SMEM int32 [1]
    query: Ref,  # VMEM [N, D], or the two halves of a float32 query [2N, D]
    sums: Ref,  # VMEM float32 [N, D]
    top: Ref,  # VMEM float32 [N, LANES]
    total: Ref,  # VMEM float32 [N, LANES]
    *,
    cores: int,
) -> None:
    N, D = out.shape
    low, splits = _aligned(N), _splits(q.dtype, query.dtype)
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else lax.Precision.DEFAULT
    buffer, *scales = buffers
    C = buffer.shape[1] * buffer.shape[2]

    slices = [slice(at, min(at + SLICE, D)) for at in range(0, D, SLICE)]

    def serve(walk):  # type: ignore[no-untyped-def]
        sums[...] = jnp.zeros_like(sums)
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)
        query[:N] = q[...].astype(query.dtype)
        if splits:
            query[low : low + N] = (q[...] - query[:N].astype(q.dtype)).astype(query.dtype)

        def body(index, num_valid, carry):  # type: ignore[no-untyped-def]
            scores = jnp.zeros((query.shape[0], C), jnp.float32)
            for columns in slices:
                x = tpu_codes.widened(buffer[index, :, :, columns].reshape(C, -1), query.dtype)
                scores += lax.dot_general(
                    query[:, columns],
                    x,
                    (((1,), (1,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
            if splits:
                scores = scores[:N] + scores[low : low + N]
            of_tokens = tpu_codes.scales_of(scales[0], index, num_valid, 0, 1, buffer.shape[2]) if scales else None
            if of_tokens is not None:
                scores *= of_tokens
            weights, keep, top[...], total[...] = tpu_paging.online_softmax(scores, num_valid, top[...], total[...])
            weights = (weights if of_tokens is None else weights * of_tokens).astype(query.dtype)
            for columns in slices:  # read again: kept in registers, it would only be spilled
                x = tpu_codes.widened(buffer[index, :, :, columns].reshape(C, -1), query.dtype)
                found = jnp.dot(weights, x, precision=precision, preferred_element_type=jnp.float32)
                sums[:, columns] = sums[:, columns] * tpu_paging.over_columns(keep, found.shape[1]) + found
            return carry

        walk(body, 0)
        row_total = jnp.sum(total[...], axis=1, keepdims=True)
        for columns in slices:
            out[:, columns] = (sums[:, columns] / row_total).astype(out.dtype)
        lse[...] = top[...] + jnp.log(row_total)

    sources = [Source(blocks, buffers, arrived)]
    tpu_paging.for_each_row(RowOrder(order, count, length), pool, sources, next_buffer, serve, cores=cores)
