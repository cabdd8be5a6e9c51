"""Writing the scales of a step's tokens to an int8 pool on TPUs, in place; `reference.scale_writer`.

A block's scales are one row of lanes, in which a token has one lane of each head. So the tokens of a block are one item
of work: its row is read, changed and written, while those of other items are on their way. The grid and the order of
items are those of `cache_write.py`.

Shape letters as in `reference.py`; X lanes of a block's row, B slots of a tile.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apt_jax.pallas_kernels.tpu import cache_write as tpu_cache_write
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from apt_jax.pallas_kernels.tpu.paging import Ref

_RING = 32  # rows of blocks in VMEM: they are short, so many have to be on their way
_AHEAD = 16  # items whose reads are started before an item is served


def scale_writer(
    key_block: jax.Array,
    value_block: jax.Array,
    offset: jax.Array,
    *,
    block_size: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> Callable[..., jax.Array]:
    """As the reference. Tokens of a block must be in consecutive slots, in the order of their places.

    Args:
        interpret: run without a TPU.
    """
    parts = []
    for part in tpu_cache_write.slot_parts(len(offset)):
        places = key_block[part], value_block[part], offset[part]
        parts.append((part, tpu_cache_write.find_work(*places, rows=block_size)))

    def write(scales: jax.Array, base: jax.Array, keys: jax.Array, values: jax.Array | None) -> jax.Array:
        for part, work in parts:
            sources = [x[part] for x in (keys, values) if x is not None]
            scales = _write(work, scales, base, sources, block_size=block_size, interpret=interpret)
        return scales

    return write


def _write(
    work: tpu_cache_write.Work, scales: jax.Array, base: jax.Array, sources: list[jax.Array], *, block_size: int,
    interpret: Any,
) -> jax.Array:  # fmt: skip
    """Each source's scales `[T, N]` in the blocks of `work`."""
    T, N = sources[0].shape
    X = scales.shape[2]
    B = min(T, tpu_cache_write.SLOTS)
    # each head's scale in all of its lanes, of which the kernel takes that of the token
    rows = [jnp.pad(jnp.repeat(x, block_size, 1), ((0, 0), (0, X - N * block_size)))[:, None] for x in sources]
    scratch = [
        pltpu.VMEM((len(rows), _RING, 1, X), jnp.float32),
        pltpu.SemaphoreType.DMA((len(rows), _RING)),
        pltpu.SemaphoreType.DMA((len(rows), _RING)),
    ]
    base = jnp.asarray(base, jnp.int32).reshape(1)
    return pl.pallas_call(
        functools.partial(_kernel, num_sources=len(rows), block_size=block_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work) + 1,
            grid=(1, work.bounds.shape[0] - 1),
            in_specs=[
                *[pl.BlockSpec((B, 1, X), lambda core, step, *_: (step, 0, 0)) for _ in rows],
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(scales.shape, scales.dtype),
        input_output_aliases={len(work) + 1 + len(rows): 0},
        compiler_params=tpu_paging.compiler_params(scratch, len(rows) * B * X * 4),
        interpret=interpret,
        name="scale_write",
    )(*work, base, *rows, scales)


def _kernel(
    bounds: Ref,  # SMEM int32 [tiles of slots + 1]; the next five [I], as in `cache_write.Work`
    slots: Ref,
    sizes: Ref,
    places: Ref,
    key_block: Ref,
    value_block: Ref,
    base: Ref,  # SMEM int32 [1]
    *refs: Ref,
    num_sources: int,
    block_size: int,
) -> None:
    """Refs: the sources, VMEM `[B, 1, X]`; the scales in HBM, twice; and the scratch that `_write` asks for."""
    sources, (_scales_in, scales, ring, arrived, written) = refs[:num_sources], refs[num_sources:]
    step = pl.program_id(1)
    start, stop = bounds[step], bounds[step + 1]
    place = lax.broadcasted_iota(jnp.int32, (1, scales.shape[2]), 1) % block_size

    def copies(item: jax.Array, *, act: Callable[[Any], None], writes: bool) -> None:
        at = lax.rem(item, _RING)
        for i, blocks in enumerate((key_block, value_block)[:num_sources]):

            @pl.when(blocks[item] >= 0)
            def _(i: int = i, blocks: Ref = blocks) -> None:
                there, here = scales.at[base[0] + blocks[item]], ring.at[i, at]
                if writes:
                    act(pltpu.make_async_copy(here, there, written.at[i, at]))
                else:
                    act(pltpu.make_async_copy(there, here, arrived.at[i, at]))

    def change(item: jax.Array) -> None:
        at = lax.rem(item, _RING)
        for i, source in enumerate(sources):

            def one_token(number: jax.Array, row: jax.Array, source: Ref = source) -> jax.Array:
                return jnp.where(place == places[item] + number, source[slots[item] + number], row)

            ring[i, at] = lax.fori_loop(0, sizes[item], one_token, ring[i, at])

    @pl.when(stop > start)
    def _serve_all() -> None:
        tpu_cache_write.serve_items(start, stop, copies, change, ring=_RING, ahead=_AHEAD)
