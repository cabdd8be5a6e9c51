"""Compile what the engine takes on an A100, KV decode; a program of its own, since Mosaic knows one target a process.

With the argument `int8` it compiles KV decode over int8 pools instead; with `hopper` it tries the kernels for Hopper,
and prints why Mosaic refuses them.
"""

import sys

import jax
import jax.numpy as jnp

from apt_jax.attention.pool import scale_row
from apt_jax.pallas_kernels import dispatch
from apt_jax.pallas_kernels.gpu import hidden_decode as gpu_hidden_decode
from apt_jax.pallas_kernels.gpu import kv_decode as gpu_kv_decode
from tests.aot.test_gpu import CONTEXT_TOKENS, FLOAT32_CASES, INT8_CASES, MODELS, compile_kernel, gpu

DTYPES = (jnp.bfloat16, jnp.float32)


def compile_ours() -> None:
    kernel = dispatch.gpu_kernels("8.0").kv_decode
    for dtype in DTYPES:
        for model, block_size, rows in FLOAT32_CASES:
            config = MODELS[model]
            queries = (rows, config.num_attention_heads, config.head_dim)
            compile_kernel(kernel, queries, model, block_size, rows, 2, dtype, target="a100")


def compile_int8() -> None:
    kernel, sharding = dispatch.gpu_kernels("8.0").kv_decode, gpu("a100")
    for model, block_size, rows in INT8_CASES:
        config = MODELS[model]
        N = config.num_attention_heads
        shapes = [
            ((rows, N, config.head_dim), jnp.bfloat16),
            ((1000, block_size, config.hidden_size), jnp.int8),
            ((1000, 1, scale_row(block_size, N)), jnp.float32),
            *[((rows, CONTEXT_TOKENS // block_size), jnp.int32)] * 2,
            ((rows,), jnp.int32),
        ]
        arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
        with jax.default_device(next(iter(sharding.device_set))):  # Mosaic asks it for the compute capability
            jax.jit(lambda q, pool, scales, *rest: kernel(q, pool, *rest, scales=scales)).lower(*arguments).compile()


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
    chosen = sys.argv[1:]
    try_hopper() if chosen == ["hopper"] else compile_int8() if chosen == ["int8"] else compile_ours()
