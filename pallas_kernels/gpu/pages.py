"""What the GPU decode kernels share: pages into shared memory, tails, small tensor-core products, merging of splits.

Pages of an int8 pool are read from shared memory into registers, where they become numbers of the query's type, and
written to shared memory again, since wgmma wants both its operands alike.

Shape letters as in `reference.py`; C tokens in a chunk, E columns of D that one CUDA block reads.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from apt_jax.pallas_kernels.reference import NEVER, Partial

CHUNK_TOKENS = 64  # the row dimension of one wgmma
PADDED_HEADS = 8  # the narrowest column dimension of wgmma
TILE_ROWS = 32  # of a tile on CUDA cores: 4 warps of 8 rows
TILE_COLUMNS = 64  # 128 bytes of bfloat16: the widest swizzle
# 16-bit and 32-bit arrays in the layout that wgmma and TMA share: rows of 128 bytes, swizzled
TILES: tuple[Any, ...] = (plgpu.TilingTransform((8, TILE_COLUMNS)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
TILES_32: tuple[Any, ...] = (plgpu.TilingTransform((8, TILE_COLUMNS // 2)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
# Lane semantics: layouts are as written here, where inferring them takes minutes for the loops of these kernels.
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
TILES_8: tuple[Any, ...] = (plgpu.TilingTransform((8, TILE_COLUMNS)), plgpu.SwizzleTransform(64))  # type: ignore[abstract]
_WGMMA = plgpu.Layout.WGMMA


def compiler(dtype: jnp.dtype) -> plgpu.CompilerParams:
    """Compiler parameters: exponentials and logarithms as exact as the pool's numbers."""
    return dataclasses.replace(COMPILER, approx_math=dtype != jnp.float32)


def check_pool(pool: jax.Array, width: int, query: DTypeLike = jnp.bfloat16, is_coded: bool = False) -> None:
    """Raise NotImplementedError, with a cure, for a pool `[L*P, S, D]` that wgmma kernels cannot read.

    Args:
        query: number type of queries.
        is_coded: the pool is int8, with scales.
    """
    _, S, D = pool.shape
    if is_coded and S % CHUNK_TOKENS:
        raise NotImplementedError(f"block_size={S} of an int8 cache is no multiple of 64; set --block-size 64")
    if is_coded and jnp.dtype(query).itemsize != 2:
        raise NotImplementedError(f"queries of {jnp.dtype(query)} over an int8 cache; use --attention-backend xla")
    if S % 8 or (CHUNK_TOKENS % S and S % CHUNK_TOKENS):
        raise NotImplementedError(
            f"block_size={S} must be 8, 16, 32 or a multiple of 64; set --block-size, or --attention-backend xla"
        )
    if width != D:
        raise ValueError(f"queries are {width} wide, the pool's vectors {D}")


def split_tokens(pages: int, block_size: int, longest: int) -> int:
    """Tokens of one split: `longest`, or the whole table if that is shorter; a multiple of chunk and block."""
    unit = max(CHUNK_TOKENS, block_size)
    return min(max(longest // unit, 1), -(-pages * block_size // unit)) * unit


def copied_pages(pages: int) -> int:
    """Table entries that one block copies for a split of `pages`: TMA here moves multiples of 128 bytes."""
    return -(-pages // 32) * 32


def pad_table(blocks: jax.Array, pages: int) -> tuple[jax.Array, int]:
    """The table `[R, W]`, padded so that every split of `pages` can copy `copied_pages(pages)`; and how many splits."""
    splits = -(-blocks.shape[1] // pages)
    width = -(-((splits - 1) * pages + copied_pages(pages)) // 4) * 4  # rows of TMA start at multiples of 16 bytes
    return jnp.pad(blocks, ((0, 0), (0, max(width - blocks.shape[1], 0)))), splits


def copies_per_chunk(block_size: int) -> int:
    """TMA copies that bring one chunk."""
    return max(CHUNK_TOKENS // block_size, 1)


def load_chunk(
    pool: Any,
    pages: Any,
    slot: Any,
    full: Any,
    chunk: jax.Array | int,
    todo: jax.Array,
    block_size: int,
    columns: Any,
    skipped: jax.Array | int = 0,
) -> None:
    """Start the copies of one chunk into `slot [C, E]`; each arrives on `full`.

    Pages after the last one with a valid token are not read, since their table entries may be anything: the last valid
    page is read again in their place.

    Args:
        pages: the split's part of the table, in shared memory.
        chunk: which chunk of the split.
        todo: valid tokens of the split.
        columns: slice of D.
        skipped: tokens of the split's first page that belong to the split before, a multiple of C.
    """
    last = lax.div(todo - 1, block_size)
    if block_size >= CHUNK_TOKENS:
        start = chunk * CHUNK_TOKENS + skipped
        inside = pl.multiple_of(lax.rem(start, block_size), CHUNK_TOKENS)
        block = pages[lax.div(start, block_size)]
        plgpu.copy_gmem_to_smem(pool.at[block, pl.ds(inside, CHUNK_TOKENS), columns], slot, full)
        return
    for i in range(copies_per_chunk(block_size)):
        block = pages[jnp.minimum(chunk * copies_per_chunk(block_size) + i, last)]
        plgpu.copy_gmem_to_smem(pool.at[block, :, columns], slot.at[pl.ds(i * block_size, block_size)], full)


def scales_by_head(scales: jax.Array, heads: int, block_size: int) -> jax.Array:
    """Scales `[L*P, 1, X]` of an int8 pool as `[L*P, X/S, S]`: of `heads` heads; the rest pads a row."""
    if scales.shape[2] % block_size or scales.shape[2] < heads * block_size:
        raise NotImplementedError(f"{block_size=} does not divide the row of scales; use --attention-backend xla")
    return scales.reshape(scales.shape[0], -1, block_size)


def load_scales(
    scales: Any, pages: Any, slot: Any, full: Any, chunk: jax.Array | int, block_size: int, heads: Any
) -> None:
    """Start the copy of a chunk's scales `[L*P, N, S]` of some heads into `slot [heads, C]`; it arrives on `full`."""
    start = chunk * CHUNK_TOKENS
    inside = pl.multiple_of(lax.rem(start, block_size), CHUNK_TOKENS)
    own = scales.at[pages[lax.div(start, block_size)], heads, pl.ds(inside, CHUNK_TOKENS)]
    plgpu.copy_gmem_to_smem(own, slot, full)


def store_decoded(codes: Any, scales: Any, valid: jax.Array, slot: Any, heads: int) -> None:
    """Write `codes [C, E]` times `scales [heads, C]` into `slot [C, E]` in its type, for wgmma; 0 from row `valid` on.

    Args:
        scales: None: codes as they are, all rows of them; their scales go elsewhere.
        heads: whose columns E are.
    """
    width = codes.shape[1] // heads
    columns = math.gcd(codes.shape[1], TILE_COLUMNS)  # whole tiles of both layouts, though not of heads
    for at in range(0, codes.shape[1], columns):
        own = pl.ds(at, columns)
        found = plgpu.load(codes.at[:, own], layout=_WGMMA, optimized=False).astype(jnp.float32)
        if scales is not None:
            column = plgpu.broadcasted_iota(jnp.int32, found.shape, 1, layout=_WGMMA)
            factor: jax.Array | float = 1.0
            for head in range(at // width, -(-(at + columns) // width)):
                row_factor = plgpu.load(scales.at[head], layout=_WGMMA.reduce(1), optimized=False)
                of_head = over_columns(row_factor, found.shape)
                before = head * width - at  # columns of the tile that are other heads'
                factor = of_head if before <= 0 else jnp.where(column >= before, of_head, factor)
            found = jnp.where(valid_rows(valid, found.shape), found * factor, 0.0)
        slot.at[:, own][...] = plgpu.layout_cast(found.astype(slot.dtype), _WGMMA)
    plgpu.commit_smem()


def stream_keys_values(
    pool: Any,
    tables: tuple[tuple[Any, Any], tuple[Any, Any]],
    table_ready: Any,
    ring: Any,
    full: Any,
    empty: Any,
    todo: jax.Array,
    block_size: int,
    columns: Any,
    scales: tuple[Any, Any, Any] | None = None,
) -> None:
    """What the memory warpgroup does: keys and values of every chunk, alternately, through `ring [slots, C, E]`.

    Args:
        scales: of an int8 pool those of all heads `[L*P, N, S]`, a ring `[slots, heads, C]` and which heads.
        tables: for keys and for values, the split's part of the row's table in GMEM and its place in shared memory.
        todo: valid tokens of the split.
        columns: slice of D.
    """
    for blocks, pages in tables:
        plgpu.copy_gmem_to_smem(blocks, pages, table_ready)
    plgpu.barrier_wait(table_ready)
    chunks, slots = pl.cdiv(todo, CHUNK_TOKENS), ring.shape[0]

    @pl.loop(0, chunks)
    def _(chunk: jax.Array) -> None:
        for source, (_, pages) in enumerate(tables):
            load = 2 * chunk + source
            slot = lax.rem(load, slots)

            @pl.when(load >= slots)
            def _(slot: jax.Array = slot) -> None:
                plgpu.barrier_wait(empty.at[slot])

            load_chunk(pool, pages, ring.at[slot], full.at[slot], chunk, todo, block_size, columns)
            if scales is not None:
                own, scale_ring, heads = scales
                load_scales(own, pages, scale_ring.at[slot], full.at[slot], chunk, block_size, heads)

    drain(empty, 2 * chunks)


def split_float32(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is a finite float32 `x`, to one bit: 8 bits of its 24-bit mantissa each. Pure."""
    parts = []
    for _ in range(3):
        high = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)  # truncated, so that all is exact
        part = lax.bitcast_convert_type(high, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def part_pairs(parts: int) -> list[tuple[int, int]]:
    """Which products of parts make up a product: all of them except those under 2^-21 of it."""
    return [(i, j) for i in range(parts) for j in range(parts) if i + j < parts]


def parts_scratch(
    parts: int, workers: int, columns: int, transforms: tuple[Any, ...] = TILES, decoded: DTypeLike | None = None
) -> Any:
    """Shared memory for the parts of each warpgroup's tile `[C, columns]`; next to nothing where nothing is split.

    Args:
        decoded: type of the one part that codes become; None: there are none.
    """
    if parts == 1 and decoded is None:
        return plgpu.SMEM((1, 1, 8, TILE_COLUMNS), jnp.bfloat16, transforms=TILES)
    return plgpu.SMEM((workers, parts, CHUNK_TOKENS, columns), decoded or jnp.bfloat16, transforms=transforms)


def store_parts(x: jax.Array, slot: Any) -> None:
    """Write float32 `x [C, E]` as bfloat16 parts into `slot [3, C, E]`, for wgmma to read."""
    for i, part in enumerate(split_float32(x)):
        slot.at[i][...] = plgpu.layout_cast(part, _WGMMA)
    plgpu.commit_smem()


def drain(empty: Any, loads: jax.Array) -> None:
    """Wait until the last loads have been read: no barrier may be left in the middle of a phase."""
    slots = empty.shape[0]

    @pl.loop(jnp.maximum(loads - slots, 0), loads)
    def _(load: jax.Array) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(load, slots)])


def product(shape: tuple[int, int], *pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of `a @ b` over pairs of shared-memory refs on tensor cores, float32 `shape` in registers."""

    def multiply(acc: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return plgpu.layout_cast(pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32)), _WGMMA)


def add_product(x: jax.Array, *pairs: tuple[Any, Any], interpreted: bool) -> Any:
    """`x` and the sum of `a @ b` over pairs, in place in registers on a GPU; interpreted, accumulators are fresh."""
    if interpreted:
        return x + product((x.shape[0], x.shape[1]), *pairs)

    def multiply(total: Any) -> None:
        for a, b in pairs:
            plgpu.wgmma(total, a, b)

    return plgpu.layout_cast(pl.run_state(multiply)(plgpu.ACC.init(x)), _WGMMA)


def valid_rows(count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Whether a row of `shape` is one of the first `count`."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WGMMA) < count


def clear_tail(slot: Any, count: jax.Array) -> None:
    """Zero the rows of `slot [C, E]` from `count` on, if there are any: a zero weight does not silence a NaN."""

    @pl.when(count < slot.shape[0])
    def _() -> None:
        columns = math.gcd(slot.shape[1], TILE_COLUMNS)  # whole tiles of its layout
        for at in range(0, slot.shape[1], columns):
            tile = slot.at[:, pl.ds(at, columns)]
            values = plgpu.layout_cast(tile[...], _WGMMA).astype(jnp.float32)
            values = jnp.where(valid_rows(count, values.shape), values, 0.0)
            tile[...] = plgpu.layout_cast(values.astype(slot.dtype), _WGMMA)
        plgpu.commit_smem()


def column(x: jax.Array) -> jax.Array:
    """One number per column, in the layout that a reduction over rows leaves."""
    return plgpu.layout_cast(x, _WGMMA.reduce(0))


def row(x: jax.Array) -> jax.Array:
    """One number per row, in the layout that a reduction over columns leaves."""
    return plgpu.layout_cast(x, _WGMMA.reduce(1))


def over_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number per row, for every column."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), _WGMMA)


def over_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number per column, for every row."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [1]), _WGMMA)


def rows_of_slots(
    length: jax.Array, first_query: jax.Array, num_queries: jax.Array, num_slots: int
) -> tuple[jax.Array, jax.Array]:
    """The row that each query slot belongs to, int32 `[T]`, and whether to one with cached tokens, bool `[T]`. Pure.

    Args:
        length, first_query, num_queries: int32 `[R]`, as in `reference.kv_prefix_attention`.
    """
    slot = jnp.arange(num_slots)[:, None]
    mine = (length > 0) & (slot >= first_query) & (slot < first_query + num_queries)
    return jnp.argmax(mine, axis=1), mine.any(axis=1)


def rows_layout() -> Any:
    """Registers of a tile of `TILE_ROWS` rows on CUDA cores: 8 rows a warp, 4 lanes a row, 4 numbers a load.

    Eight bfloat16 would fit into a load of 16 bytes, but queries and results have the same layout in float32, and
    Mosaic (jax 0.12) moves at most 16 bytes a thread at a time.
    """
    vector = 4
    tiling = plgpu.Tiling(((TILE_ROWS, 4 * vector), (8, 4 * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def splits_of(longest: int, pages: int, block_size: int) -> tuple[int, int]:
    """Tokens of a CUDA block, whole pages and about `longest`, and how many such splits the tables' pages have."""
    tokens = pages * block_size
    split = -(-min(longest, tokens) // block_size) * block_size
    return split, -(-tokens // split)


def merge_splits(out: jax.Array, lse: jax.Array, length: jax.Array, split: int, parts: int = 1) -> Partial:
    """Attention over all parts of all splits from out `[R, splits*parts, N, X]` and lse `[R, splits*parts, N]`.

    Splits past a length are unread; a part without tokens has lse `NEVER`. In XLA: its bytes are those of one cached
    token per part.
    """
    used = (jnp.arange(lse.shape[1]) // parts * split < length[:, None])[..., None]
    lse = jnp.where(used, lse, NEVER)
    top = lse.max(1, keepdims=True)
    weights = jnp.where(used, jnp.exp(lse - top), 0)
    total = weights.sum(1)
    some = total > 0
    total = jnp.where(some, total, 1)
    merged = jnp.where(used[..., None], out * weights[..., None], 0).sum(1) / total[..., None]
    return Partial(merged, jnp.where(some, top[:, 0] + jnp.log(total), NEVER))


def store(ref: Any, value: jax.Array) -> None:
    """`ref[...] = value` to GMEM for a few numbers: jax 0.12 refuses less than whole cache lines otherwise."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
