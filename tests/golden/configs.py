"""The OPT variants that are compared with transformers, as keyword arguments of its `OPTConfig`."""

from typing import Any

import numpy as np

GREEDY_TOKENS = 64  # tokens generated after every prompt
ACTIVATIONS = (
    "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu6", "swish", "tanh", "quick_gelu",
    "gelu_python", "gelu_fast", "gelu_accurate", "gelu_python_tanh",
)  # fmt: skip

_SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "ffn_dim": 192,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
}
FIXED: dict[str, dict[str, Any]] = {
    "pre_norm": {},  # opt-125m, 1.3b and larger
    "post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 40},  # opt-350m
    "head_dim_80": {"hidden_size": 240, "num_attention_heads": 3, "num_hidden_layers": 2},  # opt-2.7b
    "galactica": {
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "bos_token_id": 0,
    },
    "no_bias_odd_heads": {"enable_bias": False, "hidden_size": 60, "num_attention_heads": 5},
    "no_affine": {"layer_norm_elementwise_affine": False, "activation_function": "gelu_new", "vocab_size": 257},
    "untied_projected_up": {
        "tie_word_embeddings": False,
        "word_embed_proj_dim": 96,
        "hidden_size": 72,
        "num_attention_heads": 3,
    },
    "no_final_norm": {"_remove_final_layer_norm": True, "activation_function": "silu", "tie_word_embeddings": False},
    "post_norm_plain": {
        "do_layer_norm_before": False,
        "layer_norm_elementwise_affine": False,
        "enable_bias": False,
        "activation_function": "gelu_pytorch_tanh",
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "hidden_size": 48,
    },
}
FIXED = {name: _SMALL | changes for name, changes in FIXED.items()}


def random_configs(seed: int, count: int) -> dict[str, dict[str, Any]]:
    """`count` configs over the whole range of variants; each flag is on in half of them, in random pairings."""
    generator = np.random.default_rng(seed)

    def halves() -> list[bool]:
        return [bool(bit) for bit in generator.permutation(np.arange(count) % 2)]

    flags = {
        "do_layer_norm_before": halves(),
        "_remove_final_layer_norm": halves(),
        "enable_bias": halves(),
        "layer_norm_elementwise_affine": halves(),
        "tie_word_embeddings": halves(),
    }
    projected = halves()
    found = {}
    for i in range(count):
        heads = int(generator.integers(1, 7))
        head_dim = int(generator.choice([8, 12, 16, 20, 32, 64, 80]))
        config = {
            "vocab_size": int(generator.integers(64, 400)),
            "hidden_size": heads * head_dim,
            "num_attention_heads": heads,
            "num_hidden_layers": int(generator.integers(1, 5)),
            "ffn_dim": int(generator.integers(16, 320)),
            "max_position_embeddings": int(generator.integers(GREEDY_TOKENS + 16, 192)),
            "activation_function": ACTIVATIONS[(i + seed) % len(ACTIVATIONS)],
        }
        if projected[i]:
            config["word_embed_proj_dim"] = int(generator.integers(8, 128))
        found[f"random_{i:02d}"] = config | {name: values[i] for name, values in flags.items()}
    return found


def prompts(config: dict[str, Any], seed: int) -> list[list[int]]:
    """Four prompts of token ids; the longest leaves room for exactly `GREEDY_TOKENS` in the model's context."""
    generator = np.random.default_rng(seed)
    lengths = (1, 7, 33, config["max_position_embeddings"] - GREEDY_TOKENS)
    drawn = [generator.integers(0, config["vocab_size"], size=min(n, lengths[-1])).tolist() for n in lengths]
    return [[2, *ids[1:]] for ids in drawn]  # OPT's prompts begin with </s>
