"""OPT (arXiv 2205.01068) in Flax NNX.

Shape letters: T tokens (any leading dimensions), N heads, H head_dim, D hidden_size, F ffn_dim,
E word_embed_proj_dim, V vocab_size, L layers.

Source: transformers `modeling_opt.py` (behaviour), checked against it by `tests/model/test_opt.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from apt_jax.model_config import POSITION_OFFSET, ModelConfig
from apt_jax.models.activations import ACTIVATION_FUNCTIONS
from apt_jax.models.interface import Attend, run_layers, stack_layers
from apt_jax.models.linear import AttentionProjections, Embedding, Head, Linear


class DecoderLayer(nnx.Module):
    """One transformer layer, pre-norm or post-norm."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F, N, H = config.hidden_size, config.ffn_dim, config.num_attention_heads, config.head_dim
        bias = config.enable_bias
        self.norm_first = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn = AttentionProjections(D, N, H, bias=bias, dtype=dtype, rngs=rngs)
        self.self_attn_layer_norm = _layer_norm(config, dtype, rngs)
        self.fc1 = Linear(D, F, bias=bias, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(F, D, bias=bias, dtype=dtype, rngs=rngs)
        self.final_layer_norm = _layer_norm(config, dtype, rngs)

    def __call__[Cache](
        self, x: jax.Array, attend: Attend[Cache], cache: Cache, layer: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Advance the residual stream `x [T, D]` by one layer. Pure."""
        h = self.self_attn_layer_norm(x) if self.norm_first else x  # [T, D]
        context, cache = attend(self.self_attn, h, cache, layer)  # [T, N, H]
        x = x + self.self_attn.output(context)
        if not self.norm_first:
            x = self.self_attn_layer_norm(x)

        h = self.final_layer_norm(x) if self.norm_first else x
        activated = ACTIVATION_FUNCTIONS[self.activation](self.fc1(h))  # [T, F]
        x = x + self.fc2(activated)
        if not self.norm_first:
            x = self.final_layer_norm(x)
        return x, cache


class OPT(nnx.Module):
    """`OPTForCausalLM`: token ids in, hidden states out, logits on request."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, E, V = config.hidden_size, config.word_embed_proj_dim, config.vocab_size
        positions = config.max_position_embeddings + POSITION_OFFSET
        self.embed_tokens = Embedding(V, E, dtype=dtype, rngs=rngs)
        self.embed_positions = Embedding(positions, D, dtype=dtype, rngs=rngs)
        self.project_in = Linear(E, D, bias=False, dtype=dtype, rngs=rngs) if E != D else None
        self.project_out = Linear(D, E, bias=False, dtype=dtype, rngs=rngs) if E != D else None
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.final_layer_norm = _layer_norm(config, dtype, rngs) if config.has_final_layer_norm else None
        self.lm_head = None if config.tie_word_embeddings else Head(E, V, dtype=dtype, rngs=rngs)

    def __call__[Cache](
        self, token_ids: jax.Array, positions: jax.Array, attend: Attend[Cache], cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Run all layers over `token_ids` and `positions` (same shape, int32). Pure.

        Returns:
            Hidden states `[..., E]` ready for `logits`, and the cache after the last layer.
        """
        x, cache = run_layers(self.layers, self.embed(token_ids, positions), attend, cache)
        return self.finish(x), cache

    def embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """The residual stream `[..., D]` before the first layer."""
        x = self.embed_tokens(token_ids)  # [..., E]
        if self.project_in is not None:
            x = self.project_in(x)
        return x + self.embed_positions(positions + POSITION_OFFSET)

    def finish(self, x: jax.Array) -> jax.Array:
        """Hidden states `[..., E]` of the residual stream after the last layer."""
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[..., V]` of hidden states `[..., E]`."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).logits(hidden)


def _layer_norm(config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return nnx.LayerNorm(
        config.hidden_size, epsilon=1e-5, use_bias=affine, use_scale=affine, use_fast_variance=False,
        dtype=dtype, param_dtype=dtype, rngs=rngs,
    )  # fmt: skip
