"""Whole decode steps with the GPU kernels, compiled for an H200: nothing copies the pool or the weights.

Skipped where `test_gpu.py` is.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from test_gpu import h200, pytestmark  # noqa: F401

from apt_jax.attention import Kinds
from apt_jax.batch import Rows, Tokens
from apt_jax.config import ModelConfig
from apt_jax.opt import OPT
from apt_jax.steps import run_step
from pallas_kernels.dispatch import gpu_kernels

# OPT-13B with two layers, and a pool of 5.4 GB: more than all that a step may keep beside it
CONFIG = ModelConfig(
    hidden_size=5120, num_attention_heads=40, num_hidden_layers=2, ffn_dim=20480, word_embed_proj_dim=5120,
    max_position_embeddings=2048,
)  # fmt: skip
BLOCK_SIZE, NUM_BLOCKS, ROWS, CONTEXT_TOKENS = 16, 16384, 64, 2048


@pytest.mark.parametrize(
    ("kinds", "generation"),
    [
        (Kinds(kv=True, hidden=True), "9.0"),
        (Kinds(kv=True, hidden=False), "9.0"),
        (Kinds(kv=False, hidden=True), "9.0"),
        (Kinds(kv=True, hidden=False), "8.0"),  # its kernel, compiled for an H200: it reads the pool in another shape
    ],
)
def test_no_decode_step_copies_the_pool_or_the_weights(kinds, generation):
    """Writing a step's tokens and attending, over all layers, unrolled as `Runner` has it on GPUs."""
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: OPT(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    kernels = gpu_kernels(generation)

    def step(weights, pool, history, tokens, rows):
        model = nnx.merge(graphdef, weights)
        return run_step(model, kinds, NUM_BLOCKS, True, ROWS, pool, history, tokens, rows, kernels, unroll=True)

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=h200())

    weights = jax.tree.map(lambda a: shape(*a.shape, dtype=a.dtype), weights)
    pool = shape(CONFIG.num_hidden_layers * NUM_BLOCKS, BLOCK_SIZE, CONFIG.hidden_size, dtype=jnp.bfloat16)
    number, flag, table = shape(ROWS), shape(ROWS, dtype=jnp.bool_), shape(ROWS, CONTEXT_TOKENS // BLOCK_SIZE)
    tokens = Tokens(number, flag, number, number)
    rows = Rows(number, number, number, number, flag, table, table)
    program = jax.jit(step, donate_argnums=(1, 2)).lower(weights, pool, shape(ROWS, CONTEXT_TOKENS), tokens, rows)
    program = program.compile()
    text = program.as_text()
    assert text.count("mosaic_gpu") >= kinds.kv + kinds.hidden
    memory, pool_bytes = program.memory_analysis(), 2 * pool.size
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool was not donated"
    layer_bytes = 2 * 12 * CONFIG.hidden_size**2
    assert memory.temp_size_in_bytes < layer_bytes / 2, f"{memory.temp_size_in_bytes=}, a layer has {layer_bytes}"
    pool_type = "bf16[" + ",".join(map(str, pool.shape)) + "]"
    copies = [line for line in text.splitlines() if re.search(re.escape(pool_type) + r"\S* copy", line)]
    assert not copies, copies[0]
    print(f"temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB")
