"""Compile KV decode without tensor cores for an A100; a program of its own, since Mosaic knows one target a process."""

import jax.numpy as jnp
from test_gpu import FLOAT32_CASES, MODELS, compile_kernel

from pallas_kernels.gpu_kv_fma import kv_decode_attention

for model, block_size, rows in FLOAT32_CASES:
    config = MODELS[model]
    queries = (rows, config.num_attention_heads, config.head_dim)
    compile_kernel(kv_decode_attention, queries, model, block_size, rows, 2, jnp.bfloat16, target="a100")
