"""Writing a step's tokens into their blocks on TPUs, in place; `reference.cache_writer`.

HBM holds the pool in register tiles of 8 tokens, and only whole tiles can be copied. XLA's scatter reads and writes one
tile for every token. Here tokens that go to the same tile are one item of work: a full tile is written without being
read, another is read, changed and written, and several are in flight at once.

Slots of tokens come in tiles too, which the grid visits in order. An item ends where a tile of slots ends, and all
writes of a step are waited for before the next step, which may change the same tile of the pool.

Shape letters as in `reference.py`; B slots of a tile, I items of work.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from apt_jax.pallas_kernels.tpu.paging import LANES, Ref

_ROWS = 8  # tokens of a register tile
_SLOTS = 64  # B, at most
_RING = 8  # tiles of the pool in VMEM
_AHEAD = 4  # items whose reads are started before an item is served


class Work(NamedTuple):
    """Items of work, in the order of their tokens; entries past the last item are not looked at."""

    bounds: jax.Array  # int32 [tiles of slots + 1]: items of each tile of slots
    slot: jax.Array  # int32 [I]: first token's slot in its tile
    size: jax.Array  # int32 [I]: tokens, 1 to 8
    row: jax.Array  # int32 [I]: the first token's place in its block
    key_block: jax.Array  # int32 [I]: block for keys or hidden vectors
    value_block: jax.Array  # int32 [I]: block for values; negative: none


def cache_writer(
    key_block: jax.Array, value_block: jax.Array, offset: jax.Array, *, cores: int = 1, interpret: bool = False
) -> Callable[..., jax.Array]:
    """As the reference. Tokens of a block must be in consecutive slots, in the order of their places.

    Args:
        cores: of a chip that share its memory: each takes its part of the columns.
        interpret: run without a TPU.
    """
    tokens = key_block.shape[0]
    at_once = max(tpu_paging.TABLE_BYTES // (len(Work._fields) * 4) // _SLOTS, 1) * _SLOTS
    if tokens > at_once:  # what is known of all of them does not fit in SMEM
        parts = [slice(at, at + at_once) for at in range(0, tokens, at_once)]
        own = [cache_writer(key_block[p], value_block[p], offset[p], cores=cores, interpret=interpret) for p in parts]

        def write_parts(pool: jax.Array, base: jax.Array, keys: jax.Array, values: jax.Array | None) -> jax.Array:
            for part, write in zip(parts, own, strict=True):
                pool = write(pool, base, keys[part], None if values is None else values[part])
            return pool

        return write_parts
    work = find_work(key_block, value_block, offset)

    def write(pool: jax.Array, base: jax.Array, keys: jax.Array, values: jax.Array | None) -> jax.Array:
        return _write(work, pool, base, keys, values, cores=cores, interpret=interpret)

    return write


def find_work(key_block: jax.Array, value_block: jax.Array, offset: jax.Array) -> Work:
    """Items for the tokens `[T]` that have a block. Pure."""
    T = key_block.shape[0]
    B = min(T, _SLOTS)
    real = key_block >= 0
    slot = jnp.arange(T, dtype=jnp.int32)
    tile = offset // _ROWS
    starts = real & ((slot % B == 0) | (key_block != jnp.roll(key_block, 1)) | (tile != jnp.roll(tile, 1)))
    ends = real & ((slot == T - 1) | jnp.roll(starts | ~real, -1))
    start, end = (jnp.nonzero(x, size=T, fill_value=0)[0].astype(jnp.int32) for x in (starts, ends))
    before = jnp.cumsum(starts, dtype=jnp.int32) - starts  # items that start before a slot
    bounds = jnp.append(before[::B], jnp.sum(starts, dtype=jnp.int32))
    return Work(bounds, start % B, end - start + 1, offset[start], key_block[start], value_block[start])


def _write(
    work: Work, pool: jax.Array, base: jax.Array, keys: jax.Array, values: jax.Array | None, *, cores: int,
    interpret: bool,
) -> jax.Array:  # fmt: skip
    """Keys to `base + key_block`, values to `base + value_block`.

    Raises:
        NotImplementedError: a dtype, block size or width that the kernel does not handle.
    """
    D = pool.shape[2]
    tpu_paging.check_shapes(keys, pool, D, interpret)
    if pool.shape[1] % _ROWS:
        raise NotImplementedError(f"block_size={pool.shape[1]} is no multiple of {_ROWS}")
    columns = D // cores if D % (cores * LANES) == 0 else D
    sources = [x.astype(pool.dtype) for x in (keys, values) if x is not None]
    B = min(keys.shape[0], _SLOTS)
    scratch = [
        pltpu.VMEM((len(sources), (-(-B // _ROWS) + 2) * _ROWS, columns), jnp.float32),
        pltpu.VMEM((len(sources), _RING, _ROWS, columns), pool.dtype),
        pltpu.SemaphoreType.DMA((len(sources), _RING)),
        pltpu.SemaphoreType.DMA((len(sources), _RING)),
    ]
    base = jnp.asarray(base, jnp.int32).reshape(1)
    return pl.pallas_call(
        functools.partial(_kernel, num_sources=len(sources)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work) + 1,
            grid=(D // columns, work.bounds.shape[0] - 1),
            in_specs=[
                *[pl.BlockSpec((B, columns), lambda core, step, *_: (step, core)) for _ in sources],
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={len(work) + 1 + len(sources): 0},
        compiler_params=tpu_paging.compiler_params(scratch, len(sources) * B * columns * pool.dtype.itemsize),
        interpret=interpret,
        name="cache_write",
    )(*work, base, *sources, pool)


def _kernel(
    bounds: Ref,  # SMEM int32 [tiles of slots + 1]; the next five [I], as in Work
    slots: Ref,
    sizes: Ref,
    rows: Ref,
    key_block: Ref,
    value_block: Ref,
    base: Ref,  # SMEM int32 [1]
    *refs: Ref,
    num_sources: int,
) -> None:
    """Refs: the sources, VMEM `[B, columns]`; the pool in HBM, twice; and the scratch that `_write` asks for."""
    sources, (_pool_in, pool, padded, ring, arrived, written) = refs[:num_sources], refs[num_sources:]
    core, step = pl.program_id(0), pl.program_id(1)
    B, columns = sources[0].shape
    start, stop = bounds[step], bounds[step + 1]
    whole = columns == pool.shape[2]

    def copies(item: jax.Array, *, act: Callable[[Any], None], writes: bool) -> None:
        """Start or wait for an item's reads or its writes, for each source that has a block."""
        at = pl.multiple_of(rows[item] // _ROWS * _ROWS, _ROWS)
        own = slice(None) if whole else pl.ds(pl.multiple_of(core * columns, LANES), columns)
        place = lax.rem(item, _RING)
        for i, blocks in enumerate((key_block, value_block)[:num_sources]):

            @pl.when((blocks[item] >= 0) & (writes | (sizes[item] < _ROWS)))
            def _(i: int = i, blocks: Ref = blocks) -> None:
                there = pool.at[base[0] + blocks[item], pl.ds(at, _ROWS), own]
                here = ring.at[i, place]
                if writes:
                    act(pltpu.make_async_copy(here, there, written.at[i, place]))
                else:
                    act(pltpu.make_async_copy(there, here, arrived.at[i, place]))

    read = functools.partial(copies, writes=False)
    write = functools.partial(copies, writes=True)

    def begin(dma: Any) -> None:
        dma.start()

    def finish(dma: Any) -> None:
        dma.wait()

    def serve(item: jax.Array, _: None) -> None:
        ahead = item + _AHEAD

        @pl.when((ahead < stop) & (ahead - _RING >= start))
        def _free_its_place() -> None:
            write(ahead - _RING, act=finish)

        @pl.when(ahead < stop)
        def _read_ahead() -> None:
            read(ahead, act=begin)

        read(item, act=finish)
        place, inside = lax.rem(item, _RING), lax.rem(rows[item], _ROWS)
        wanted = _ROWS + slots[item] - inside
        near = pl.multiple_of(wanted // _ROWS * _ROWS, _ROWS)
        shift = wanted - near
        row = lax.broadcasted_iota(jnp.int32, (_ROWS, columns), 0)
        mine = (row >= inside) & (row < inside + sizes[item])
        for i in range(num_sources):
            found = padded[i, pl.ds(near, 2 * _ROWS), :]
            found = pltpu.roll(found, lax.rem(2 * _ROWS - shift, 2 * _ROWS), 0)[:_ROWS]
            found = jnp.where(mine, found, ring[i, place].astype(jnp.float32))
            ring[i, place] = found.astype(ring.dtype)
        write(item, act=begin)

    @pl.when(stop > start)
    def _serve_all() -> None:
        for i, source in enumerate(sources):
            padded[i, _ROWS : _ROWS + B, :] = source[...].astype(jnp.float32)  # of which any 8 rows can be read
        lax.fori_loop(start, jnp.minimum(start + _AHEAD, stop), lambda item, _: read(item, act=begin), None)
        lax.fori_loop(start, stop, serve, None)
        lax.fori_loop(jnp.maximum(stop - _RING, start), stop, lambda item, _: write(item, act=finish), None)
