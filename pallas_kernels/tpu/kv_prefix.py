"""Attention of prefill chunks over cached keys and values on a TPU; what it computes: `reference.kv_prefix_attention`.

One step is a tile of queries, one row's prefix and one group of heads: only the group's columns of the pages are read,
so that buffers and sums are small for every model. With up to 256 queries in a tile each key is used that often once it
is in VMEM, which is about what a chip's compute and bandwidth balance at.

A head of 64 or 80 columns does not start where a register tile does. Its products take the whole tiles that its columns
touch (a window), with queries laid out so that other heads' keys meet zeros; of the values' product its own columns are
kept. An int8 pool is read as in `kv_decode.py`.

Source: running softmax over chunks as in FlashAttention-2 (arXiv 2307.08691).
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
from apt_jax.pallas_kernels.tpu import query_tiles as tpu_query_tiles
from apt_jax.pallas_kernels.tpu.paging import LANES, Ref, Source, Steps
from apt_jax.pallas_kernels.tpu.query_tiles import Work

TILE = 256  # queries
GROUP_COLUMNS = 1024


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
    cores: int = 1,
    interpret: bool | pltpu.InterpretParams = False,
) -> Partial:
    """As the reference, with queries rounded to the pool's dtype. Pure.

    Args:
        scales: of an int8 pool; queries are multiplied in their own dtype then.
        cores: tensor cores of one device; groups of heads are distributed over them.
        interpret: run without a TPU.

    Raises:
        NotImplementedError: a dtype, block size or width that the kernel does not handle.
    """
    T, N, H = q.shape
    S, D = pool.shape[1:]
    rows = key_blocks, value_blocks, length, first_query, num_queries
    row_groups = tpu_paging.row_groups(len(length), key_blocks.shape[1], 2)
    if len(row_groups) > 1:
        own = functools.partial(kv_prefix_attention, q, pool, scales=scales, cores=cores, interpret=interpret)
        return tpu_query_tiles.together([own(*(of_rows[g] for of_rows in rows)) for g in row_groups])
    G = _heads_of_a_group(N, H)
    columns, tile = G * H, min(TILE, T)
    tpu_paging.check_shapes(q, pool, columns, interpret, scales is not None)
    arrays = (pool,) if scales is None else (pool, scales)
    multiplied = pool.dtype if scales is None else q.dtype
    groups = N // G
    lanes = 0 if scales is None else tpu_codes.lanes(G, S)
    if lanes > G * S and groups > 1:
        raise NotImplementedError(f"{lanes=} of scales are more than those of {G} heads; use --attention-backend xla")
    cores = min(cores, groups)
    width = max(window.stop - window.start for window in _windows(G, H))
    chunk = tpu_paging.chunk_tokens(columns, S, pool.dtype.itemsize, num_sources=2)
    work, some = tpu_query_tiles.find_work(length, first_query, num_queries, num_slots=T, tile=tile)
    scratch = tpu_paging.scratch(2, chunk, S, columns, pool.dtype, lanes)
    scratch += [pltpu.VMEM((tile, columns), jnp.float32), *[pltpu.VMEM((G, tile, LANES), jnp.float32)] * 2]
    blocks_in_out = tile * (G * width * multiplied.itemsize + (columns + LANES) * 4)
    steps = jnp.maximum(work.num_items[0], 1) * -(-groups // cores)

    def spec(block: tuple[int | None, ...], place) -> pl.BlockSpec:  # type: ignore[no-untyped-def]
        def index(core, step, tiles, _, count, *__):  # type: ignore[no-untyped-def]
            group, item = _group_item(jnp.minimum(step, _num_steps(core, count, groups, cores) - 1), core, count, cores)
            return place(group, tiles[item])

        return pl.BlockSpec(block, index)

    out, lse = pl.pallas_call(
        functools.partial(_kernel, head_dim=H, groups=groups, cores=cores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(cores, steps),
            in_specs=[
                spec((G, tile, width), lambda group, tile: (group, tile, 0)),
                tpu_paging.pool_specs(arrays),
            ],
            out_specs=[
                spec((tile, columns), lambda group, tile: (tile, group)),
                spec((None, tile, LANES), lambda group, tile: (group, tile, 0)),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((T, D), jnp.float32), jax.ShapeDtypeStruct((groups, T, LANES), jnp.float32)],
        compiler_params=tpu_paging.compiler_params(scratch, blocks_in_out, tpu_query_tiles.SPARE_BYTES),
        interpret=interpret,
        name="kv_prefix_attention",
    )(
        *work,
        length.astype(jnp.int32),
        key_blocks.astype(jnp.int32),
        value_blocks.astype(jnp.int32),
        _in_windows(q.astype(multiplied), G),
        arrays,
    )
    lse = lse[:, :, :G].transpose(1, 0, 2).reshape(T, N)
    out = jnp.where(some[:, None], out, 0).reshape(T, N, H)  # what was never visited holds anything
    return Partial(out, jnp.where(some[:, None], lse, NEVER))


def _heads_of_a_group(num_heads: int, head_dim: int) -> int:
    """The most heads that divide N with whole register tiles of at most `GROUP_COLUMNS`; all, if there are none."""
    fits = [
        G
        for G in range(1, num_heads + 1)
        if num_heads % G == 0 and G * head_dim % LANES == 0 and G * head_dim <= GROUP_COLUMNS
    ]
    return max(fits, default=num_heads)


def _windows(group: int, head_dim: int) -> list[slice]:
    """For each head of a group the whole register tiles of columns that hold its own."""
    starts = [h * head_dim // LANES * LANES for h in range(group)]
    stops = [min(-(-(h + 1) * head_dim // LANES) * LANES, group * head_dim) for h in range(group)]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]


def _in_windows(q: jax.Array, group: int) -> jax.Array:
    """`[T, N, H] -> [N, T, width]`: each head's query where its columns lie in its window, 0 elsewhere."""
    T, N, H = q.shape
    windows = _windows(group, H)
    width = max(window.stop - window.start for window in windows)
    by_head = q.reshape(T, N // group, group, H)
    placed = [
        jnp.pad(by_head[:, :, h], ((0, 0), (0, 0), (at, width - at - H)))
        for h, at in enumerate(h * H - window.start for h, window in enumerate(windows))
    ]
    return jnp.stack(placed, axis=2).reshape(T, N, width).transpose(1, 0, 2)


def _num_steps(core: jax.Array, count: Ref, groups: int, cores: int) -> jax.Array:
    """Steps of a core; 1 where there is no work, for the index of blocks that nobody reads."""
    return lax.div(groups - core + cores - 1, cores) * jnp.maximum(count[0], 1)


def _group_item(step: jax.Array, core: jax.Array, count: Ref, cores: int) -> tuple[jax.Array, jax.Array]:
    """Group and item of a step: all items of a group, then the core's next group."""
    items = jnp.maximum(count[0], 1)
    return lax.div(step, items) * cores + core, lax.rem(step, items)


def _kernel(
    tiles: Ref,  # SMEM int32 [I]
    rows: Ref,  # SMEM int32 [I]
    count: Ref,  # SMEM int32 [1]
    first: Ref,  # SMEM int32 [R]
    stop: Ref,  # SMEM int32 [R]
    length: Ref,  # SMEM int32 [R]
    key_blocks: Ref,  # SMEM int32 [R, W]
    value_blocks: Ref,  # SMEM int32 [R, W]
    q: Ref,  # VMEM [G, tile, width]
    pool: tuple[Ref, ...],  # HBM [L*P, S, D] and float32 [L*P, 1, X]
    out: Ref,  # VMEM float32 [tile, G*H]
    lse: Ref,  # VMEM float32 [tile, LANES], head h of the group in lane h
    keys: tuple[Ref, ...],  # VMEM [2, C/S, S, G*H] and float32 [2, C/S, 1, lanes]
    keys_arrived: Ref,  # DMA semaphores [2]
    values: tuple[Ref, ...],  # likewise
    values_arrived: Ref,  # DMA semaphores [2]
    next_buffer: Ref,  # SMEM int32 [1]
    sums: Ref,  # VMEM float32 [tile, G*H]
    top: Ref,  # VMEM float32 [G, tile, LANES]
    total: Ref,  # VMEM float32 [G, tile, LANES]
    *,
    head_dim: int,
    groups: int,
    cores: int,
) -> None:
    core, step = pl.program_id(0), pl.program_id(1)
    tile, columns = out.shape
    windows = _windows(columns // head_dim, head_dim)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    C, S = keys[0].shape[1] * keys[0].shape[2], keys[0].shape[2]
    lane = lax.broadcasted_iota(jnp.int32, (tile, LANES), 1)
    work = Work(tiles, rows, count, first, stop)

    def own_columns(h: int, window: slice) -> jax.Array | bool:
        if window == slice(h * head_dim, (h + 1) * head_dim):
            return True
        column = window.start + lax.broadcasted_iota(jnp.int32, (tile, window.stop - window.start), 1)
        return (column >= h * head_dim) & (column < (h + 1) * head_dim)

    def scales(buffers: tuple[Ref, ...], index: jax.Array, num_valid: jax.Array) -> list[jax.Array]:
        """Of every head of the group `[1, C]`; none of a pool that is not int8."""
        if len(buffers) == 1:
            return []
        at_once, found = 8, list[jax.Array]()
        for first in range(0, len(windows), at_once):
            heads = min(at_once, len(windows) - first)
            some = tpu_codes.scales_of(buffers[1], index, num_valid, first, heads, S)
            found += [some[h : h + 1] for h in range(heads)]
        return found

    def serve(walk):  # type: ignore[no-untyped-def]
        sums[...] = jnp.zeros_like(sums)
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)

        def body(index, num_valid, carry):  # type: ignore[no-untyped-def]
            key_scales, value_scales = (scales(buffers, index, num_valid) for buffers in (keys, values))
            for h, window in enumerate(windows):
                size = window.stop - window.start
                x = tpu_codes.widened(keys[0][index, :, :, window].reshape(C, size), q.dtype)
                scores = lax.dot_general(
                    q[h, :, :size], x, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
                )
                if key_scales:
                    scores *= key_scales[h]
                weights, keep, top[h], total[h] = tpu_paging.online_softmax(scores, num_valid, top[h], total[h])
                if value_scales:
                    weights *= value_scales[h]
                y = tpu_codes.widened(values[0][index, :, :, window].reshape(C, size), q.dtype)
                found = jnp.dot(weights.astype(y.dtype), y, precision=precision, preferred_element_type=jnp.float32)
                before = sums[:, window]
                found += before * tpu_paging.over_columns(keep, size)
                mine = own_columns(h, window)
                sums[:, window] = found if mine is True else jnp.where(mine, found, before)
            return carry

        walk(body, 0)
        _, item = _group_item(step, core, count, cores)
        found_lse = jnp.zeros_like(lse)
        for h, window in enumerate(windows):
            row_total = jnp.sum(total[h], axis=1, keepdims=True)
            found_lse = jnp.where(lane == h, top[h] + jnp.log(row_total), found_lse)
            found = sums[:, window] / row_total
            mine = tpu_query_tiles.own_queries(work, item, tile, found.shape) & own_columns(h, window)
            out[:, window] = jnp.where(mine, found, out[:, window])
        mine = tpu_query_tiles.own_queries(work, item, tile, lse.shape)
        lse[...] = jnp.where(mine, found_lse, lse[...])

    def first_column(array: int, step: jax.Array) -> jax.Array:
        width = keys[array].shape[-1]
        at = _group_item(step, core, count, cores)[0] * width
        return pl.multiple_of(at, LANES) if width % LANES == 0 else at

    steps = Steps(
        num_steps=jnp.where(count[0] > 0, _num_steps(core, count, groups, cores), 0),
        row=lambda step: rows[_group_item(step, core, count, cores)[1]],
        first_column=first_column,
    )
    sources = [Source(key_blocks, keys, keys_arrived), Source(value_blocks, values, values_arrived)]
    tpu_paging.run_step(steps, length, pool, sources, next_buffer, serve)
