"""Attention of few queries over cached hidden vectors on NVIDIA Hopper GPUs; `reference.hidden_prefix_attention`.

An SM cannot hold a tile of absorbed queries, 640 KB for 64 pairs of head and token of OPT-13B. So each query is a row
of decode attention (`gpu_hidden_decode.py`) and reads its row's vectors for itself. For more than some tens of queries
projecting the vectors is cheaper (`apt_jax/attention/prefix.py`).
"""

import jax
import jax.numpy as jnp

from apt_jax.pallas_kernels.gpu import hidden_decode as gpu_hidden_decode
from apt_jax.pallas_kernels.gpu import pages as gpu_pages
from apt_jax.pallas_kernels.reference import Partial


def hidden_prefix_attention(
    q_wide: jax.Array,
    pool: jax.Array,
    blocks: jax.Array,
    length: jax.Array,
    first_query: jax.Array,
    num_queries: jax.Array,
    *,
    scales: jax.Array | None = None,
    interpret: object = None,
) -> Partial:
    """As the reference, with queries rounded to the pool's dtype, unless that is int8. Pure.

    Args:
        scales: of an int8 pool.
        interpret: None on a GPU, `plgpu.InterpretGPUParams()` elsewhere.

    Raises:
        NotImplementedError: a dtype, block size or width that the kernel does not handle.
    """
    row, some = gpu_pages.rows_of_slots(length, first_query, num_queries, q_wide.shape[0])
    length = jnp.where(some, length[row], 0)
    decode = gpu_hidden_decode.hidden_decode_attention
    return decode(q_wide, pool, blocks[row], length, scales=scales, interpret=interpret)
