"""Decode attention over cached hidden vectors on NVIDIA Hopper GPUs, in Pallas Mosaic GPU: two passes.

An absorbed query is D wide, and so is its result: for OPT-13B 400 KB and 800 KB a request, more than one SM holds. So

1. `_weights`: a CUDA block takes one row and up to 4 chunks of 64 tokens, streams hidden vectors and queries in steps
   of 128 columns, and leaves, per chunk, its softmax weights `exp(s - top)` with their maximum and sum;
2. XLA turns maxima and sums (one number per chunk and head) into the factor that normalises each chunk;
3. `_context`: a CUDA block takes one row and 256 columns, streams hidden vectors and weights by chunk, and accumulates
   `context^T [columns, N] = H^T P`, with every chunk's factor applied in float32.

Tensor cores multiply float32 only in shorter formats. A float32 pool is therefore split, tile by tile in shared memory,
into three bfloat16 parts that add up to it, and so are queries and weights; six of the nine products of parts are above
float32's own error.

Of an int8 pool the codes are decoded tile by tile too, into one part of 16 bits that has all of theirs. A token's scale
goes into its scores, and into its weights after their sum is taken.

The hidden vectors are read twice, so from HBM as many bytes as K and V, unless the second pass finds them in L2: it
visits the rows in reverse order, those that the first pass read last first.

Shape letters as in `reference.py`; C tokens in a chunk, X chunks of a table, M heads padded to a multiple of 8, F parts
of a number (1 or 3).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apt_jax.pallas_kernels.gpu import pages as gpu_pages
from apt_jax.pallas_kernels.gpu.pages import CHUNK_TOKENS, PADDED_HEADS, TILE_COLUMNS, TILES, TILES_8, TILES_32
from apt_jax.pallas_kernels.reference import NEVER, Partial

_WGMMA = plgpu.Layout.WGMMA
_SMEM_BYTES = 222 << 10  # of 227 KiB that a block may have
_BLOCKS_WANTED = 2 * 132  # an H200 has 132 SMs


def hidden_decode_attention(
    q_wide: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array, *, scales: jax.Array | None = None,
    interpret: object = None,
) -> Partial:  # fmt: skip
    """One absorbed query per row and head over hidden vectors; as `reference.hidden_decode_attention`. Pure.

    Args:
        q_wide: `[R, N, D]`, already scaled; cast to the pool's dtype, unless that is int8.
        pool: `[L*P, S, D]`, bfloat16, float16 or float32, or int8 with `scales`.
        blocks: int32 `[R, W]`.
        length: int32 `[R]`.
        interpret: None on a GPU, `plgpu.InterpretGPUParams()` elsewhere.

    Returns:
        float32 out `[R, N, D]` and lse `[R, N]`.

    Raises:
        NotImplementedError: a dtype, block size or width that the kernel does not handle.
    """
    N, D = q_wide.shape[1:]
    gpu_pages.check_pool(pool, D, q_wide.dtype, scales is not None)
    if D % TILE_COLUMNS:
        raise NotImplementedError(f"{D=} is no multiple of {TILE_COLUMNS}; use --attention-backend xla")
    operand = pool.dtype if scales is None else q_wide.dtype
    of_tokens = (
        jnp.zeros((1, 1, CHUNK_TOKENS)) if scales is None else gpu_pages.scales_by_head(scales, 1, pool.shape[1])
    )
    q_wide = jnp.pad(q_wide.astype(operand), ((0, 0), (0, -N % PADDED_HEADS), (0, 0)))
    parts = gpu_pages.split_float32(q_wide) if pool.dtype == jnp.float32 else [q_wide]
    q_wide = jnp.stack(parts, 1)
    weights, top, total = _weights(q_wide, pool, of_tokens, blocks, length, interpret)
    used = (jnp.arange(top.shape[1]) * CHUNK_TOKENS < length[:, None])[..., None]
    top = jnp.where(used, top, NEVER)
    highest = top.max(1, keepdims=True)
    shares = jnp.where(used, jnp.exp(top - highest), 0)
    sums = jnp.where(used, total * shares, 0).sum(1)
    some = sums > 0
    sums = jnp.where(some, sums, 1)
    out = _context(weights, shares / sums[:, None], pool, blocks, length, interpret)
    return Partial(out[:, :N], jnp.where(some, highest[:, 0] + jnp.log(sums), NEVER)[:, :N])


def _weights(
    q_wide: jax.Array, pool: jax.Array, scales: jax.Array, blocks: jax.Array, length: jax.Array, interpret: object
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First pass, `q_wide [R, F, M, D]`: weights `[R, F, M, X*C]` relative to each chunk's maximum, maxima and sums
    `[R, X, M]`.
    """
    R, F, M, D = q_wide.shape
    S, is_coded = pool.shape[1], pool.dtype == jnp.int8
    capacity = blocks.shape[1] * S
    most = 4 if F == 1 else 2
    workers = max(w for w in (1, 2, most) if w == 1 or R * capacity >= _BLOCKS_WANTED * w * CHUNK_TOKENS)
    tile = gpu_pages.split_tokens(blocks.shape[1], S, workers * CHUNK_TOKENS)
    tile = min(tile, most * CHUNK_TOKENS)  # less than a block, where that is longer
    workers = tile // CHUNK_TOKENS
    pages = max(tile // S, 1)
    table, _ = gpu_pages.pad_table(blocks, pages)
    tiles = -(-capacity // tile)
    chunks = tiles * workers
    # wide steps, for fewer and larger copies
    columns = 2 * TILE_COLUMNS if D % (2 * TILE_COLUMNS) == 0 and F == 1 else TILE_COLUMNS
    slot_bytes = columns * (tile * pool.dtype.itemsize + F * M * q_wide.dtype.itemsize)
    decodes = F > 1 or is_coded
    scales_scratch: dict[str, Any] = {
        "scales_s": plgpu.SMEM((workers, CHUNK_TOKENS), jnp.float32),
        "scales_ready": plgpu.Barrier(num_barriers=workers),
    }
    fixed_bytes = 4 * workers * CHUNK_TOKENS if is_coded else 0
    fixed_bytes += workers * (M * (CHUNK_TOKENS * F * 2 + 8) + (CHUNK_TOKENS * columns * F * 2 if decodes else 0))
    slots = min((_SMEM_BYTES - fixed_bytes) // slot_bytes, 6)
    kernel = plgpu.kernel(
        functools.partial(_weights_body, workers=workers, block_size=S),
        out_type=[
            jax.ShapeDtypeStruct((R, F, M, chunks * CHUNK_TOKENS), q_wide.dtype),
            jax.ShapeDtypeStruct((R, chunks, M), jnp.float32),
            jax.ShapeDtypeStruct((R, chunks, M), jnp.float32),
        ],
        grid=(R, tiles),
        grid_names=("row", "tile"),
        num_threads=workers + 1,
        thread_name="wg",
        scratch_types={
            "pages": plgpu.SMEM((gpu_pages.copied_pages(pages),), jnp.int32),
            "ring": plgpu.SMEM((slots, workers, CHUNK_TOKENS, columns), pool.dtype, transforms=_tiles(pool.dtype)),
            "q_ring": plgpu.SMEM((slots, F, M, columns), q_wide.dtype, transforms=TILES),
            "weights_s": plgpu.SMEM((workers, F, M, CHUNK_TOKENS), q_wide.dtype, transforms=TILES),
            "parts_s": gpu_pages.parts_scratch(F, workers, columns, decoded=q_wide.dtype if is_coded else None),
            "top_s": plgpu.SMEM((workers, M), jnp.float32),
            "total_s": plgpu.SMEM((workers, M), jnp.float32),
            "table_ready": plgpu.Barrier(),
            "full": plgpu.Barrier(num_arrivals=gpu_pages.copies_per_chunk(S), num_barriers=slots * workers),
            "q_full": plgpu.Barrier(num_arrivals=F, num_barriers=slots),
            "empty": plgpu.Barrier(num_arrivals=workers, num_barriers=slots),
            **(scales_scratch if is_coded else {}),
        },
        compiler_params=gpu_pages.compiler(pool.dtype),
        interpret=interpret,
    )
    return kernel(q_wide, pool, scales, table, length)


def _tiles(dtype: jnp.dtype) -> Any:
    """The layout of a tile of the pool in shared memory."""
    return {1: TILES_8, 2: TILES, 4: TILES_32}[dtype.itemsize]


def _weights_body(  # type: ignore[no-untyped-def]
    q_wide, pool, scales, table, length, weights, tops, totals, *, pages, ring, q_ring, weights_s, parts_s, top_s,
    total_s, table_ready, full, q_full, empty, workers, block_size, scales_s=None, scales_ready=None,
):  # fmt: skip
    """One CUDA block of the first pass. q_wide `[R, F, M, D]`, weights `[R, F, M, X*C]`, tops, totals `[R, X, M]`."""
    row, tile, worker = lax.axis_index("row"), lax.axis_index("tile"), lax.axis_index("wg")
    slots, tile_tokens = ring.shape[0], workers * CHUNK_TOKENS
    todo = jnp.minimum(length[row] - tile * tile_tokens, tile_tokens)
    step_columns, is_coded = ring.shape[3], ring.dtype == jnp.int8
    F = q_wide.shape[1]
    steps = q_wide.shape[3] // step_columns

    @pl.when((todo > 0) & (worker == workers))
    def _memory() -> None:
        first = tile * tile_tokens
        plgpu.copy_gmem_to_smem(table.at[row, pl.ds(lax.div(first, block_size), pages.shape[0])], pages, table_ready)
        plgpu.barrier_wait(table_ready)
        for chunk in range(workers if is_coded else 0):

            @pl.when(chunk * CHUNK_TOKENS < todo)
            def _(chunk: int = chunk) -> None:
                start = lax.rem(first, block_size) + chunk * CHUNK_TOKENS
                inside = pl.multiple_of(lax.rem(start, block_size), CHUNK_TOKENS)
                own = scales.at[pages[lax.div(start, block_size)], 0, pl.ds(inside, CHUNK_TOKENS)]
                plgpu.copy_gmem_to_smem(own, scales_s.at[chunk], scales_ready.at[chunk])

        @pl.loop(0, steps)
        def _(step: jax.Array) -> None:
            slot = lax.rem(step, slots)

            @pl.when(step >= slots)
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            columns = pl.ds(step * step_columns, step_columns)
            for i in range(F):
                plgpu.copy_gmem_to_smem(q_wide.at[row, i, :, columns], q_ring.at[slot, i], q_full.at[slot])
            for chunk in range(workers):

                @pl.when(chunk * CHUNK_TOKENS < todo)
                def _(chunk: int = chunk) -> None:
                    gpu_pages.load_chunk(
                        pool, pages, ring.at[slot, chunk], full.at[slot * workers + chunk], chunk, todo, block_size,
                        columns, lax.rem(first, block_size),
                    )  # fmt: skip

        gpu_pages.drain(empty, steps)

    @pl.when((todo > 0) & (worker < workers))
    def _compute() -> None:
        active = worker * CHUNK_TOKENS < todo

        @pl.when(jnp.logical_not(active))
        def _idle() -> None:
            @pl.loop(0, steps)
            def _(step: jax.Array) -> None:
                slot = lax.rem(step, slots)
                plgpu.barrier_wait(q_full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

        @pl.when(active)
        def _work() -> None:
            def multiply(acc: Any) -> jax.Array:
                @pl.loop(0, steps)
                def _(step: jax.Array) -> None:
                    slot = lax.rem(step, slots)
                    plgpu.barrier_wait(q_full.at[slot])
                    plgpu.barrier_wait(full.at[slot * workers + worker])
                    if is_coded:
                        gpu_pages.store_decoded(ring.at[slot, worker], None, todo, parts_s.at[worker, 0], 1)
                        plgpu.wgmma(acc, parts_s.at[worker, 0], q_ring.at[slot, 0].T)
                    elif F == 1:
                        plgpu.wgmma(acc, ring.at[slot, worker], q_ring.at[slot, 0].T)
                    else:
                        vectors = plgpu.layout_cast(ring.at[slot, worker][...], _WGMMA)
                        gpu_pages.store_parts(vectors, parts_s.at[worker])
                        for i, j in gpu_pages.part_pairs(F):
                            plgpu.wgmma(acc, parts_s.at[worker, i], q_ring.at[slot, j].T)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot])

                return acc[...]

            M = top_s.shape[1]
            scores = pl.run_scoped(multiply, plgpu.ACC((CHUNK_TOKENS, M), jnp.float32))
            scores = plgpu.layout_cast(scores, _WGMMA)
            valid = gpu_pages.valid_rows(todo - worker * CHUNK_TOKENS, scores.shape)
            factors = None
            if is_coded:
                plgpu.barrier_wait(scales_ready.at[worker])
                own_scales = plgpu.load(scales_s.at[worker], layout=_WGMMA.reduce(1), optimized=False)
                factors = gpu_pages.over_columns(own_scales, scores.shape)
                scores = scores * factors
            scores = jnp.where(valid, scores, NEVER)
            top = gpu_pages.column(scores.max(axis=0))
            found = jnp.exp(scores - gpu_pages.over_rows(top, scores.shape))
            total_s.at[worker][...] = gpu_pages.column(found.sum(axis=0))
            if factors is not None:
                found = jnp.where(valid, found * factors, 0.0)
            for i, part in enumerate([found.astype(weights_s.dtype)] if F == 1 else gpu_pages.split_float32(found)):
                weights_s.at[worker, i].T[...] = plgpu.layout_cast(part, _WGMMA)
            top_s.at[worker][...] = top
            plgpu.commit_smem()
            chunk = tile * workers + worker
            tokens = pl.ds(chunk * CHUNK_TOKENS, CHUNK_TOKENS)
            for i in range(F):
                plgpu.copy_smem_to_gmem(weights_s.at[worker, i], weights.at[row, i, :, tokens])
            plgpu.copy_smem_to_gmem(top_s.at[worker], tops.at[row, chunk])
            plgpu.copy_smem_to_gmem(total_s.at[worker], totals.at[row, chunk])
            plgpu.wait_smem_to_gmem(0)


def _context(
    weights: jax.Array, factors: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array, interpret: object
) -> jax.Array:
    """Second pass: `[R, M, D]` float32 from weights `[R, F, M, X*C]` and the factor `[R, X, M]` of each chunk."""
    R, F, M, _ = weights.shape
    _, S, D = pool.shape
    is_coded = pool.dtype == jnp.int8
    width = 2 * TILE_COLUMNS if D % (2 * TILE_COLUMNS) == 0 and F == 1 else TILE_COLUMNS  # columns of one warpgroup
    workers = 2 if D % (2 * width) == 0 else 1
    columns = workers * width
    capacity = blocks.shape[1] * S
    wanted = -(-_BLOCKS_WANTED // (R * (D // columns)))
    longest = max(-(-capacity // wanted), 4 * CHUNK_TOKENS)
    split = gpu_pages.split_tokens(blocks.shape[1], S, longest)
    table, splits = gpu_pages.pad_table(blocks, split // S)
    factors = jnp.pad(factors, ((0, 0), (0, 0), (0, -M % 32)))
    slot_bytes = CHUNK_TOKENS * (columns * pool.dtype.itemsize + F * M * 2) + factors.shape[2] * 4
    fixed_bytes = columns * M * 4 + (columns * CHUNK_TOKENS * F * 2 if F > 1 or is_coded else 0)
    slots = min((_SMEM_BYTES - fixed_bytes) // slot_bytes, 6)
    kernel = plgpu.kernel(
        functools.partial(_context_body, split=split, workers=workers, block_size=S),
        out_type=jax.ShapeDtypeStruct((R, splits, M, D), jnp.float32),
        grid=(R, splits, D // columns),
        grid_names=("row", "split", "slice"),
        num_threads=workers + 1,
        thread_name="wg",
        scratch_types={
            "pages": plgpu.SMEM((gpu_pages.copied_pages(split // S),), jnp.int32),
            "ring": plgpu.SMEM((slots, CHUNK_TOKENS, columns), pool.dtype, transforms=_tiles(pool.dtype)),
            "weights_ring": plgpu.SMEM((slots, F, M, CHUNK_TOKENS), weights.dtype, transforms=TILES),
            "parts_s": gpu_pages.parts_scratch(F, workers, width, decoded=weights.dtype if is_coded else None),
            "factor_ring": plgpu.SMEM((slots, factors.shape[2]), jnp.float32),
            "out_s": plgpu.SMEM((workers, M, width), jnp.float32, transforms=TILES_32),
            "table_ready": plgpu.Barrier(),
            "full": plgpu.Barrier(num_arrivals=gpu_pages.copies_per_chunk(S) + F + 1, num_barriers=slots),
            "empty": plgpu.Barrier(num_arrivals=workers, num_barriers=slots),
        },
        compiler_params=gpu_pages.compiler(pool.dtype),
        interpret=interpret,
    )
    parts = kernel(weights, factors, pool, table, length)
    if splits == 1:
        return parts[:, 0]  # no other pass over it: it is wide
    used = (jnp.arange(splits) * split < length[:, None])[..., None, None]
    return jnp.where(used, parts, 0).sum(1)


def _context_body(  # type: ignore[no-untyped-def]
    weights, factors, pool, table, length, out, *, pages, ring, weights_ring, parts_s, factor_ring, out_s, table_ready,
    full, empty, split, workers, block_size,
):  # fmt: skip
    """One CUDA block of the second pass: weights `[R, F, M, X*C]`, factors `[R, X, M']`, out `[R, splits, M, D]`."""
    row = weights.shape[0] - 1 - lax.axis_index("row")  # what the first pass read last may still be in L2
    part, worker = lax.axis_index("split"), lax.axis_index("wg")
    slots, columns = ring.shape[0], ring.shape[2]
    F = weights.shape[1]
    M, width = out_s.shape[1:]
    todo = jnp.minimum(length[row] - part * split, split)
    chunks = jnp.maximum(pl.cdiv(todo, CHUNK_TOKENS), 0)
    first_column = lax.axis_index("slice") * columns

    @pl.when((todo > 0) & (worker == workers))
    def _memory() -> None:
        first_page = part * (split // block_size)
        plgpu.copy_gmem_to_smem(table.at[row, pl.ds(first_page, pages.shape[0])], pages, table_ready)
        plgpu.barrier_wait(table_ready)

        @pl.loop(0, chunks)
        def _(chunk: jax.Array) -> None:
            slot = lax.rem(chunk, slots)

            @pl.when(chunk >= slots)
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            at = part * (split // CHUNK_TOKENS) + chunk
            gpu_pages.load_chunk(
                pool, pages, ring.at[slot], full.at[slot], chunk, todo, block_size, pl.ds(first_column, columns)
            )
            tokens = pl.ds(at * CHUNK_TOKENS, CHUNK_TOKENS)
            for i in range(F):
                plgpu.copy_gmem_to_smem(weights.at[row, i, :, tokens], weights_ring.at[slot, i], full.at[slot])
            plgpu.copy_gmem_to_smem(factors.at[row, at], factor_ring.at[slot], full.at[slot])

        gpu_pages.drain(empty, chunks)

    @pl.when((worker < workers) & ((todo > 0) | (out.shape[1] == 1)))
    def _compute() -> None:  # a row without tokens gets zeros, unless splits are added later, which leaves it out
        mine = pl.ds(worker * width, width)

        def step(chunk: jax.Array, acc: jax.Array) -> jax.Array:
            slot = lax.rem(chunk, slots)
            plgpu.barrier_wait(full.at[slot])
            vectors = ring.at[slot, :, mine]
            if ring.dtype == jnp.int8:
                gpu_pages.store_decoded(vectors, None, todo, parts_s.at[worker, 0], 1)
                pairs = [(parts_s.at[worker, 0].T, weights_ring.at[slot, 0].T)]
            elif F == 1:
                gpu_pages.clear_tail(vectors, todo - chunk * CHUNK_TOKENS)
                pairs = [(vectors.T, weights_ring.at[slot, 0].T)]
            else:
                found = plgpu.layout_cast(vectors[...], _WGMMA)
                valid = gpu_pages.valid_rows(todo - chunk * CHUNK_TOKENS, found.shape)
                gpu_pages.store_parts(jnp.where(valid, found, 0.0), parts_s.at[worker])
                numbers = gpu_pages.part_pairs(F)
                pairs = [(parts_s.at[worker, i].T, weights_ring.at[slot, j].T) for i, j in numbers]
            added = gpu_pages.product((width, M), *pairs)
            factor = plgpu.load(factor_ring.at[slot, pl.ds(0, M)], layout=_WGMMA.reduce(0))
            plgpu.commit_smem()  # orders this read before the copy that overwrites the slot
            plgpu.barrier_arrive(empty.at[slot])
            return acc + added * gpu_pages.over_rows(factor, acc.shape)

        acc = lax.fori_loop(0, chunks, step, plgpu.layout_cast(jnp.zeros((width, M), jnp.float32), _WGMMA))
        out_s.at[worker].T[...] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[worker], out.at[row, part, :, pl.ds(first_column + worker * width, width)])
        plgpu.wait_smem_to_gmem(0)
