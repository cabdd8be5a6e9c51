"""Writing a step's tokens into their blocks on TPUs, in place; `reference.cache_writer`.

HBM holds the pool in register tiles of 8 tokens, or 32 of int8, and only whole tiles can be copied. XLA's scatter reads
and writes one tile for every token, and of an int8 pool makes a copy in smaller tiles first. Here tokens that go to the
same tile are one item of work: a full tile is written without being read, another is read, changed and written, and
several are in flight at once.

Slots of tokens come in tiles too, which the grid visits in order. An item ends where a tile of slots ends, and all
writes of a step are waited for before the next step, which may change the same tile of the pool.

Four tokens' int8 numbers of a column lie in 32 bits. They are changed there, one token after the other.

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
from apt_jax.pallas_kernels.tpu.paging import INT8_ROWS, LANES, Ref

SLOTS = 64  # B, at most
_ROWS = 8  # tokens of a register tile
_RING = 8  # tiles of the pool in VMEM
_AHEAD = 4  # items whose reads are started before an item is served
_SLICE = 1024  # columns of an int8 tile that stay in registers


class Work(NamedTuple):
    """Items of work, in the order of their tokens; entries past the last item are not looked at."""

    bounds: jax.Array  # int32 [tiles of slots + 1]: items of each tile of slots
    slot: jax.Array  # int32 [I]: first token's slot in its tile
    size: jax.Array  # int32 [I]: tokens, at most those of a tile
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
    parts = slot_parts(key_block.shape[0])
    found = dict[int, list[Work]]()  # by rows of a tile: for the type of the pool, which is not known yet

    def write(pool: jax.Array, base: jax.Array, keys: jax.Array, values: jax.Array | None) -> jax.Array:
        rows = INT8_ROWS if pool.dtype == jnp.int8 else _ROWS
        if rows not in found:
            found[rows] = [find_work(key_block[p], value_block[p], offset[p], rows) for p in parts]
        for part, work in zip(parts, found[rows], strict=True):
            own = keys[part], None if values is None else values[part]
            pool = _write(work, pool, base, *own, rows=rows, cores=cores, interpret=interpret)
        return pool

    return write


def slot_parts(tokens: int) -> list[slice]:
    """Slots of each call of a kernel: what is known of their items has to fit in SMEM."""
    at_once = max(tpu_paging.TABLE_BYTES // (len(Work._fields) * 4) // SLOTS, 1) * SLOTS
    return [slice(at, min(at + at_once, tokens)) for at in range(0, tokens, at_once)]


def find_work(key_block: jax.Array, value_block: jax.Array, offset: jax.Array, rows: int) -> Work:
    """Items of up to `rows` tokens for the tokens `[T]` that have a block. Pure."""
    T = key_block.shape[0]
    B = min(T, SLOTS)
    real = key_block >= 0
    slot = jnp.arange(T, dtype=jnp.int32)
    tile = offset // rows
    starts = real & ((slot % B == 0) | (key_block != jnp.roll(key_block, 1)) | (tile != jnp.roll(tile, 1)))
    ends = real & ((slot == T - 1) | jnp.roll(starts | ~real, -1))
    start, end = (jnp.nonzero(x, size=T, fill_value=0)[0].astype(jnp.int32) for x in (starts, ends))
    before = jnp.cumsum(starts, dtype=jnp.int32) - starts  # items that start before a slot
    bounds = jnp.append(before[::B], jnp.sum(starts, dtype=jnp.int32))
    return Work(bounds, start % B, end - start + 1, offset[start], key_block[start], value_block[start])


def _write(
    work: Work, pool: jax.Array, base: jax.Array, keys: jax.Array, values: jax.Array | None, *, rows: int, cores: int,
    interpret: bool,
) -> jax.Array:  # fmt: skip
    """Keys to `base + key_block`, values to `base + value_block`.

    Raises:
        NotImplementedError: a dtype, block size or width that the kernel does not handle.
    """
    D, is_coded = pool.shape[2], pool.dtype == jnp.int8
    tpu_paging.check_shapes(keys, pool, D, interpret, is_coded)
    if pool.shape[1] % rows:
        raise NotImplementedError(f"block_size={pool.shape[1]} is no multiple of {rows}")
    columns = D // cores if D % (cores * LANES) == 0 else D
    sources = [x.astype(pool.dtype) for x in (keys, values) if x is not None]
    B = min(keys.shape[0], SLOTS)
    if is_coded:  # whole tiles
        B = -(-B // rows) * rows
        sources = [jnp.pad(x, ((0, -len(x) % B), (0, 0))) for x in sources]
    scratch = [
        pltpu.VMEM((len(sources), _RING, rows, columns), pool.dtype),
        pltpu.SemaphoreType.DMA((len(sources), _RING)),
        pltpu.SemaphoreType.DMA((len(sources), _RING)),
    ]
    if is_coded:
        scratch.append(pltpu.VMEM((len(sources), B, columns), jnp.int32))
    else:
        scratch.append(pltpu.VMEM((len(sources), (-(-B // rows) + 2) * rows, columns), jnp.float32))
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
    places: Ref,
    key_block: Ref,
    value_block: Ref,
    base: Ref,  # SMEM int32 [1]
    *refs: Ref,
    num_sources: int,
) -> None:
    """Refs: the sources, VMEM `[B, columns]`; the pool in HBM, twice; and the scratch that `_write` asks for."""
    sources, (_pool_in, pool, ring, arrived, written, wide) = refs[:num_sources], refs[num_sources:]
    rows, is_coded = ring.shape[2], ring.dtype == jnp.int8
    core, step = pl.program_id(0), pl.program_id(1)
    B, columns = sources[0].shape
    start, stop = bounds[step], bounds[step + 1]
    whole = columns == pool.shape[2]

    def copies(item: jax.Array, *, act: Callable[[Any], None], writes: bool) -> None:
        """Start or wait for an item's reads or its writes, for each source that has a block."""
        at = pl.multiple_of(places[item] // rows * rows, rows)
        own = slice(None) if whole else pl.ds(pl.multiple_of(core * columns, LANES), columns)
        place = lax.rem(item, _RING)
        for i, blocks in enumerate((key_block, value_block)[:num_sources]):

            @pl.when((blocks[item] >= 0) & (writes | (sizes[item] < rows)))
            def _(i: int = i, blocks: Ref = blocks) -> None:
                there = pool.at[base[0] + blocks[item], pl.ds(at, rows), own]
                here = ring.at[i, place]
                if writes:
                    act(pltpu.make_async_copy(here, there, written.at[i, place]))
                else:
                    act(pltpu.make_async_copy(there, here, arrived.at[i, place]))

    def change(item: jax.Array) -> None:
        place, inside = lax.rem(item, _RING), lax.rem(places[item], rows)
        wanted = rows + slots[item] - inside
        near = pl.multiple_of(wanted // rows * rows, rows)
        shift = wanted - near
        row = lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
        mine = (row >= inside) & (row < inside + sizes[item])
        for i in range(num_sources):
            found = wide[i, pl.ds(near, 2 * rows), :]
            found = pltpu.roll(found, lax.rem(2 * rows - shift, 2 * rows), 0)[:rows]
            found = jnp.where(mine, found, ring[i, place].astype(jnp.float32))
            ring[i, place] = found.astype(ring.dtype)

    def change_codes(item: jax.Array) -> None:
        at, inside = lax.rem(item, _RING), lax.rem(places[item], rows)
        slices = [slice(first, min(first + _SLICE, columns)) for first in range(0, columns, _SLICE)]
        for i in range(num_sources):
            for own in slices:
                words = pltpu.bitcast(ring[i, at, :, own], jnp.int32)
                word = lax.broadcasted_iota(jnp.int32, words.shape, 0)

                def one_token(number, words, i=i, own=own, word=word):  # type: ignore[no-untyped-def]
                    place = inside + number
                    bits = 8 * lax.rem(place, 4)
                    code = lax.shift_left(wide[i, pl.ds(slots[item] + number, 1), own] & 255, bits)
                    changed = words & ~lax.shift_left(jnp.int32(255), bits) | code
                    return jnp.where(word == lax.div(place, 4), changed, words)

                words = lax.fori_loop(0, sizes[item], one_token, words)
                ring[i, at, :, own] = pltpu.bitcast(words, jnp.int8)

    @pl.when(stop > start)
    def _serve_all() -> None:
        for i, source in enumerate(sources):
            if is_coded:
                wide[i] = source[...].astype(jnp.int32)  # of which any row can be read
            else:
                wide[i, rows : rows + B, :] = source[...].astype(jnp.float32)  # or any 8
        serve_items(start, stop, copies, change_codes if is_coded else change, ring=_RING, ahead=_AHEAD)


def serve_items(
    start: jax.Array, stop: jax.Array, copies: Callable[..., None], change: Callable[[jax.Array], None], *, ring: int,
    ahead: int,
) -> None:  # fmt: skip
    """In a kernel: read, `change(item)` and write items `start .. stop`, whose places in VMEM are a ring.

    Args:
        copies: `copies(item, act=, writes=)` does `act` with an item's reads, or its writes.
        ahead: items whose reads are started before an item is served.
    """
    read = functools.partial(copies, writes=False)
    write = functools.partial(copies, writes=True)

    def begin(dma: Any) -> None:
        dma.start()

    def finish(dma: Any) -> None:
        dma.wait()

    def serve(item: jax.Array, _: None) -> None:
        coming = item + ahead

        @pl.when((coming < stop) & (coming - ring >= start))
        def _free_its_place() -> None:
            write(coming - ring, act=finish)

        @pl.when(coming < stop)
        def _read_ahead() -> None:
            read(coming, act=begin)

        read(item, act=finish)
        change(item)
        write(item, act=begin)

    lax.fori_loop(start, jnp.minimum(start + ahead, stop), lambda item, _: read(item, act=begin), None)
    lax.fori_loop(start, stop, serve, None)
    lax.fori_loop(jnp.maximum(stop - ring, start), stop, lambda item, _: write(item, act=finish), None)
