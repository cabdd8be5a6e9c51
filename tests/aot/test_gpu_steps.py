"""Whole steps with the GPU kernels, compiled for an H200: nothing copies the pool, and no decode step the weights.

Skipped where `test_gpu.py` is.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import CacheKind
from apt_jax.execution.pool import convert_blocks
from apt_jax.execution.steps import run_step
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT
from apt_jax.pallas_kernels.dispatch import gpu_kernels
from tests.aot.test_gpu import h200, pytestmark  # noqa: F401

# OPT-13B with two layers, and a pool of 5.4 GB: more than all that a step may keep beside it
CONFIG = ModelConfig(
    hidden_size=5120, num_attention_heads=40, num_hidden_layers=2, ffn_dim=20480, word_embed_proj_dim=5120,
    max_position_embeddings=2048,
)  # fmt: skip
BLOCK_SIZE, NUM_BLOCKS, ROWS, CONTEXT_TOKENS = 16, 16384, 64, 2048


def shape(*sizes, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=h200())


def make_pool() -> jax.ShapeDtypeStruct:
    return shape(CONFIG.num_hidden_layers * NUM_BLOCKS, BLOCK_SIZE, CONFIG.hidden_size, dtype=jnp.bfloat16)


def make_model():
    """How to put the model together, and the shapes of its weights."""
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: OPT(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    return graphdef, jax.tree.map(lambda a: shape(*a.shape, dtype=a.dtype), weights)


def compile_step(kinds, generation, num_tokens=None):
    """As `Runner` compiles it: a decode step, unrolled, without `num_tokens`."""
    graphdef, weights = make_model()
    kernels, decode_only = gpu_kernels(generation), num_tokens is None

    def step(weights, pool, history, tokens, rows):
        model = nnx.merge(graphdef, weights)
        return run_step(
            model, kinds, NUM_BLOCKS, decode_only, ROWS, Pool(pool), history, tokens, rows, kernels, unroll=decode_only
        )

    T, pool = num_tokens or ROWS, make_pool()
    number, table = shape(ROWS), shape(ROWS, CONTEXT_TOKENS // BLOCK_SIZE)
    tokens = Tokens(shape(T), shape(T, dtype=jnp.bool_), shape(T), shape(T))
    rows = Rows(*(number,) * 7, (table, table))
    program = jax.jit(step, donate_argnums=(1, 2)).lower(weights, pool, shape(ROWS, CONTEXT_TOKENS), tokens, rows)
    program = program.compile()
    in_place(program, pool)
    return program


def in_place(program, pool: jax.ShapeDtypeStruct) -> None:
    """The pool that comes out is the one that went in, and nothing copies it."""
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pool.size, "the pool was not donated"
    pool_type = "bf16[" + ",".join(map(str, pool.shape)) + "]"
    copies = re.findall(re.escape(pool_type) + r"\S* copy.*", program.as_text())
    assert not copies, copies[0]
    print(f"temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB")


@pytest.mark.parametrize(
    ("kinds", "generation"),
    [
        (KindMix((CacheKind.KV, CacheKind.HIDDEN)), "9.0"),
        (KindMix((CacheKind.KV,)), "9.0"),
        (KindMix((CacheKind.HIDDEN,)), "9.0"),
        (KindMix((CacheKind.KV,)), "8.0"),  # its kernel compiled for an H200: it reads the pool in another shape
    ],
)
def test_no_decode_step_copies_the_pool_or_the_weights(kinds, generation):
    """Writing a step's tokens and attending, over all layers, unrolled as `Runner` has it on GPUs."""
    program = compile_step(kinds, generation)
    assert program.as_text().count("mosaic_gpu") >= len(kinds.kinds)
    temporaries, layer_bytes = program.memory_analysis().temp_size_in_bytes, 2 * 12 * CONFIG.hidden_size**2
    assert temporaries < layer_bytes / 2, f"{temporaries=}, a layer has {layer_bytes}"


def test_conversion_does_not_copy_the_pool():
    """Of 16 blocks of hidden vectors at a time, to keys in their place and values in other blocks."""
    graphdef, weights = make_model()
    pool = make_pool()

    def convert(weights, pool, hidden_blocks, key_blocks, value_blocks):
        model = nnx.merge(graphdef, weights)
        return convert_blocks(model, Pool(pool), hidden_blocks, key_blocks, value_blocks, NUM_BLOCKS)

    program = jax.jit(convert, donate_argnums=1).lower(weights, pool, shape(16), shape(16), shape(16)).compile()
    in_place(program, pool)
    assert program.memory_analysis().temp_size_in_bytes < 250e6, "two layers have 1.3 GB, the pool 5.4 GB"


def test_a_prefill_step_attends_to_cached_prefixes_by_kernels():
    """KV rows by one, beside that of rows with a single token."""
    text = compile_step(KindMix((CacheKind.KV,)), "9.0", num_tokens=512).as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 2, "once each, in the loop over layers"


def test_a_prefill_step_attends_among_a_chunks_own_tokens_by_cudnn():
    """As XLA calls it; cuDNN plans where there is a GPU, so that is not seen here."""
    text = compile_step(KindMix((CacheKind.KV, CacheKind.HIDDEN)), "9.0", num_tokens=512).as_text()
    calls = [line for line in text.splitlines() if '"__cudnn$fmhaScaleBiasSoftmax"' in line]
    assert len(calls) == 1, "once, in the loop over layers"
    assert "bf16[1,40,512,128]" in calls[0] and "f32[1,40,512]" in calls[0], "out, and log-sum-exp in float32"
