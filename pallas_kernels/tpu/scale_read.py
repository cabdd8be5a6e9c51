"""Reading the scales of some blocks of an int8 pool on TPUs; `reference.scale_reader`.

XLA wants another layout of the array than the one that the other kernels use when it gathers or slices rows of it, and
copies all of it first. Here each row is one copy from HBM, and all are started before any is awaited.

Shape letters: K blocks, X lanes of a block's row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apt_jax.pallas_kernels.tpu.paging import Ref, compiler_params


def scale_reader(scales: jax.Array, blocks: jax.Array, *, interpret: bool | pltpu.InterpretParams = False) -> jax.Array:
    """As the reference.

    Args:
        interpret: run without a TPU.
    """
    (K,), X = blocks.shape, scales.shape[2]
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((K, 1, X), lambda step, blocks: (0, 0, 0)),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct((K, 1, X), scales.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=compiler_params([], K * X * 4).vmem_limit_bytes),
        interpret=interpret,
        name="scale_read",
    )(blocks.astype(jnp.int32), scales)


def _kernel(blocks: Ref, scales: Ref, out: Ref, arrived: Ref) -> None:
    """Refs: SMEM int32 `[K]`; the scales in HBM; VMEM `[K, 1, X]`; one semaphore, since all have one size."""

    def copy(k: jax.Array) -> Any:
        return pltpu.make_async_copy(scales.at[blocks[k]], out.at[k], arrived)

    def start(k: jax.Array, _: None) -> None:
        copy(k).start()

    def wait(k: jax.Array, _: None) -> None:
        copy(k).wait()

    lax.fori_loop(0, blocks.shape[0], start, None)
    lax.fori_loop(0, blocks.shape[0], wait, None)
