"""Compile what the engine takes on an A100, KV decode; a program of its own, since Mosaic knows one target a process.

With the argument `hopper` it tries the kernels for Hopper instead, and prints why Mosaic refuses them.
"""

import sys

import jax.numpy as jnp

from apt_jax.pallas_kernels import dispatch
from apt_jax.pallas_kernels.gpu import hidden_decode as gpu_hidden_decode
from apt_jax.pallas_kernels.gpu import kv_decode as gpu_kv_decode
from tests.aot.test_gpu import FLOAT32_CASES, MODELS, compile_kernel

DTYPES = (jnp.bfloat16, jnp.float32)


def compile_ours() -> None:
    kernel = dispatch.gpu_kernels("8.0").kv_decode
    for dtype in DTYPES:
        for model, block_size, rows in FLOAT32_CASES:
            config = MODELS[model]
            queries = (rows, config.num_attention_heads, config.head_dim)
            compile_kernel(kernel, queries, model, block_size, rows, 2, dtype, target="a100")


def try_hopper() -> None:
    model = "opt-13b"
    config = MODELS[model]
    N, H, D = config.num_attention_heads, config.head_dim, config.hidden_size
    for kernel, width, tables in (
        (gpu_kv_decode.kv_decode_attention, H, 2),
        (gpu_hidden_decode.hidden_decode_attention, D, 1),
    ):
        try:
            compile_kernel(kernel, (8, N, width), model, 16, 8, tables, jnp.bfloat16, target="a100")
            print(f"{kernel.__name__} for Hopper compiles")
        except (ValueError, NotImplementedError) as error:
            print(f"{kernel.__name__} for Hopper refused: {error}")


if __name__ == "__main__":
    try_hopper() if sys.argv[1:] == ["hopper"] else compile_ours()
