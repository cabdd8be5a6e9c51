"""Tiny OPT configs of every variant, and models of them with random parameters, for the checkpoint tests."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.config import ModelConfig
from apt_jax.opt import OPT

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    ffn_dim=48,
    max_position_embeddings=16,
    num_attention_heads=4,
    word_embed_proj_dim=32,
)
VARIANTS = {
    "plain": TINY,
    "post_norm": dataclasses.replace(TINY, do_layer_norm_before=False),
    "no_final_norm": dataclasses.replace(TINY, remove_final_layer_norm=True),
    "projected": dataclasses.replace(TINY, word_embed_proj_dim=24),
    "no_bias": dataclasses.replace(TINY, enable_bias=False),
    "no_affine": dataclasses.replace(TINY, layer_norm_elementwise_affine=False),
    "untied": dataclasses.replace(TINY, tie_word_embeddings=False, word_embed_proj_dim=24),
}


def random_model(config: ModelConfig, *, seed: int, dtype=jnp.float32) -> OPT:
    """A model with numpy's normal draws everywhere, biases and scales too; compiles nothing."""
    generator = np.random.default_rng(seed)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, dtype=dtype, rngs=nnx.Rngs(0))))
    flat = [
        (path, leaf.replace(jnp.asarray(generator.normal(size=leaf.shape).astype(np.float32), dtype)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
