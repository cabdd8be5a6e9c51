"""Decode attention over cached keys and values on a TPU; what it computes: `reference.kv_decode_attention`.

Heads are taken in groups of 8, one row of a register tile each. A group's queries are laid out block-diagonally,
`[8, 8H]`, and meet the 8H columns of the keys that are theirs: one matrix product of aligned columns for any H, where
the form of one product per head would cut 64 or 80 columns out of a tile, and the form over all heads would make N/8
times as many products. The values' product gives `[8, 8H]` too, of which the diagonal is the group's output; the other
entries are kept (they share the registers) and dropped at the end.

Of an int8 pool the codes become numbers of the query's type in registers; scales go into scores and weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apt_jax.pallas_kernels.reference import NEVER, Partial
from apt_jax.pallas_kernels.tpu import codes as tpu_codes
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from apt_jax.pallas_kernels.tpu.paging import LANES, Ref, RowOrder, Source

GROUP = 8  # heads


def kv_decode_attention(
    q: jax.Array,
    pool: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    length: jax.Array,
    *,
    scales: jax.Array | None = None,
    cores: int = 1,
    interpret: bool | pltpu.InterpretParams = False,
) -> Partial:
    """As the reference, with queries rounded to the pool's dtype. Pure.

    Args:
        scales: of an int8 pool; queries are multiplied in their own dtype then.
        cores: tensor cores of one device; rows are distributed over them.
        interpret: run without a TPU.

    Raises:
        NotImplementedError: a dtype, block size or width that the kernel does not handle.
    """
    R, N, H = q.shape
    S, D = pool.shape[1:]
    groups = tpu_paging.row_groups(R, key_blocks.shape[1], 2)
    if len(groups) > 1:
        own = functools.partial(kv_decode_attention, scales=scales, cores=cores, interpret=interpret)
        parts = [own(q[g], pool, key_blocks[g], value_blocks[g], length[g]) for g in groups]
        return Partial(*map(jnp.concatenate, zip(*parts, strict=True)))
    tpu_paging.check_shapes(q, pool, GROUP * H, interpret, scales is not None)
    arrays = (pool,) if scales is None else (pool, scales)
    multiplied = pool.dtype if scales is None else q.dtype
    lanes = 0 if scales is None else tpu_codes.lanes(N, S)
    chunk = tpu_paging.chunk_tokens(D, S, pool.dtype.itemsize, num_sources=2)
    row_order = tpu_paging.order_rows(length)
    cores = min(cores, R)
    spec = functools.partial(tpu_paging.row_spec, cores=cores)
    scratch = [*tpu_paging.scratch(2, chunk, S, D, pool.dtype, lanes), pltpu.VMEM((GROUP, D), jnp.float32)]
    scratch += [pltpu.VMEM((N, LANES), jnp.float32)] * 2
    blocks_in_out = N * GROUP * H * multiplied.itemsize + D * 4
    out, lse = pl.pallas_call(
        functools.partial(_kernel, cores=cores, head_dim=H),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=tpu_paging.grid(row_order, cores),
            in_specs=[spec((N, GROUP * H)), tpu_paging.pool_specs(arrays)],
            out_specs=[spec((1, D)), spec((N, LANES))],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((R, 1, D), jnp.float32), jax.ShapeDtypeStruct((R, N, LANES), jnp.float32)],
        compiler_params=tpu_paging.compiler_params(scratch, blocks_in_out),
        interpret=interpret,
        name="kv_decode_attention",
    )(
        *row_order,
        key_blocks.astype(jnp.int32),
        value_blocks.astype(jnp.int32),
        _by_group(q.astype(multiplied)),
        arrays,
    )
    some = length > 0  # rows that were never visited hold anything
    out = jnp.where(some[:, None, None], out.reshape(R, N, H), 0)
    return Partial(out, jnp.where(some[:, None], lse[..., 0], NEVER))


def _by_group(q: jax.Array) -> jax.Array:
    """`[R, N, H] -> [R, N, 8H]`: head n's query in columns (n % 8) H .. (n % 8 + 1) H, 0 elsewhere."""
    R, N, H = q.shape
    place = jnp.arange(N)[:, None] % GROUP == jnp.arange(GROUP)
    return jnp.where(place[:, :, None], q[:, :, None], 0).reshape(R, N, GROUP * H)


def _kernel(
    order: Ref,  # SMEM int32 [R]
    count: Ref,  # SMEM int32 [1]
    length: Ref,  # SMEM int32 [R]
    key_blocks: Ref,  # SMEM int32 [R, W]
    value_blocks: Ref,  # SMEM int32 [R, W]
    q: Ref,  # VMEM [N, 8H]
    pool: tuple[Ref, ...],  # HBM [L*P, S, D] and float32 [L*P, 1, X]
    out: Ref,  # VMEM float32 [1, D]
    lse: Ref,  # VMEM float32 [N, LANES]
    keys: tuple[Ref, ...],  # VMEM [2, C/S, S, D] and float32 [2, C/S, 1, X]
    keys_arrived: Ref,  # DMA semaphores [2]
    values: tuple[Ref, ...],  # likewise
    values_arrived: Ref,  # DMA semaphores [2]
    next_buffer: Ref,  # SMEM int32 [1]
    sums: Ref,  # VMEM float32 [8, D]
    top: Ref,  # VMEM float32 [N, LANES]
    total: Ref,  # VMEM float32 [N, LANES]
    *,
    cores: int,
    head_dim: int,
) -> None:
    N = q.shape[0]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    C, S = keys[0].shape[1] * keys[0].shape[2], keys[0].shape[2]
    groups = [slice(n, min(n + GROUP, N)) for n in range(0, N, GROUP)]

    def columns(heads: slice) -> slice:
        return slice(heads.start * head_dim, heads.stop * head_dim)

    def scaled(x, buffers, heads, index, num_valid):  # type: ignore[no-untyped-def]
        """Scores or weights `[heads, C]` times the scales of a chunk's keys or values."""
        if len(buffers) == 1:
            return x
        return x * tpu_codes.scales_of(buffers[1], index, num_valid, heads.start, heads.stop - heads.start, S)

    def serve(walk):  # type: ignore[no-untyped-def]
        sums[...] = jnp.zeros_like(sums)
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)

        def body(index, num_valid, carry):  # type: ignore[no-untyped-def]
            scores = []
            for heads in groups:
                mine = columns(heads)
                width = mine.stop - mine.start
                x = tpu_codes.widened(keys[0][index, :, :, mine].reshape(C, width), q.dtype)
                found = lax.dot_general(
                    q[heads, :width], x, (((1,), (1,)), ((), ())),
                    precision=precision, preferred_element_type=jnp.float32,
                )  # fmt: skip
                scores.append(scaled(found, keys, heads, index, num_valid))
            weights, keep, top[...], total[...] = tpu_paging.online_softmax(
                jnp.concatenate(scores), num_valid, top[...], total[...]
            )
            for heads in groups:
                mine, size = columns(heads), heads.stop - heads.start
                y = tpu_codes.widened(values[0][index, :, :, mine].reshape(C, -1), q.dtype)
                own = scaled(weights[heads], values, heads, index, num_valid).astype(q.dtype)
                found = jnp.dot(own, y, precision=precision, preferred_element_type=jnp.float32)
                sums[:size, mine] = sums[:size, mine] * tpu_paging.over_columns(keep[heads], found.shape[1]) + found
            return carry

        walk(body, 0)
        row_total = jnp.sum(total[...], axis=1, keepdims=True)
        for heads in groups:
            mine, size = columns(heads), heads.stop - heads.start
            shape = size, mine.stop - mine.start
            column = lax.broadcasted_iota(jnp.int32, shape, 1)
            own = lax.div(column, head_dim) == lax.broadcasted_iota(jnp.int32, shape, 0)
            found = jnp.where(own, sums[:size, mine] / row_total[heads], 0)
            out[:, mine] = jnp.sum(found, axis=0, keepdims=True)
        lse[...] = top[...] + jnp.log(row_total)

    sources = [Source(key_blocks, keys, keys_arrived), Source(value_blocks, values, values_arrived)]
    tpu_paging.for_each_row(RowOrder(order, count, length), pool, sources, next_buffer, serve, cores=cores)
