"""Attention of packed chunks among their own tokens on a TPU: JAX's splash attention, with rows as its segments.

What it computes: `reference.chunk_attention`. Blocks above the diagonal are skipped; blocks of two different rows are
computed and masked. Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import CausalMask, MultiHeadMask

from apt_jax.pallas_kernels.reference import Partial

_BLOCKS = (512, 256, 128)  # queries and keys of one step; splash wants multiples of 128


def chunk_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array, *, interpret: bool | pltpu.InterpretParams = False
) -> Partial:
    """As the reference, with `out` rounded to the dtype of `q`. Pure.

    Args:
        interpret: run without a TPU.
    """
    T, N, _ = q.shape
    padding = -T % _BLOCKS[-1]
    q, k, v = (jnp.pad(x, ((0, padding), (0, 0), (0, 0))).swapaxes(0, 1) for x in (q, k, v))
    row = jnp.pad(row, (0, padding), constant_values=-1)
    block = next(size for size in _BLOCKS if len(row) % size == 0)
    kernel = splash.make_splash_mha_single_device(
        MultiHeadMask([CausalMask((len(row), len(row)))] * N),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        save_residuals=True,
        interpret=interpret,
    )
    out, (lse,) = kernel(q, k, v, segment_ids=splash.SegmentIds(row, row))
    return Partial(out.swapaxes(0, 1)[:T].astype(jnp.float32), lse.T[:T])
