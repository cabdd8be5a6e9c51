"""Attention of packed chunks among their own tokens on an NVIDIA GPU: cuDNN's flash attention, as JAX calls it.

What it computes: `reference.chunk_attention`. cuDNN skips what is above the diagonal; other rows' tokens are masked.
`jax.nn.dot_product_attention(implementation="cudnn")` makes the same call, but rounds the log-sum-exp to the dtype of
the queries: in bfloat16, 3% of a chunk's weight against its prefix. So the function below it is called.
"""

import jax
import jax.numpy as jnp

from apt_jax.pallas_kernels.reference import Partial


def chunk_attention(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array) -> Partial:
    """As the reference, with `out` rounded to the dtype of `q`. Pure.

    Raises:
        NotImplementedError: a dtype or head size that cuDNN does not handle, float32 among them.
        RuntimeError: there is no cuDNN.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    T = q.shape[0]
    odd = T % 2  # cuDNN takes an even number of tokens
    q, k, v = (jnp.pad(x, ((0, odd), (0, 0), (0, 0)))[None] for x in (q, k, v))
    row = jnp.pad(row, (0, odd), constant_values=-1)
    out, lse = dot_product_attention(
        q, k, v, mask=(row[:, None] == row)[None, None], mask_type=MaskType.CAUSAL, return_residual=True
    )
    return Partial(out[0, :T].astype(jnp.float32), lse[0].T[:T])
