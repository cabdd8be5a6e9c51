"""Deterministic weights for OPT checkpoints of any shape, in numpy alone.

The maker of the golden files (torch) and the tests (jax) both call `make_weights`, so that the weights need not
be committed. Names and shapes are written out here from transformers' `modeling_opt.py`, apart from
`checkpoints/mapping.py`, so that the two check each other.
"""

import hashlib
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_LOGIT_SPREAD = 3.0  # standard deviation of the logits that the output table aims at


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Torch name to shape of every tensor that `OPTForCausalLM` saves for a filled-in `config.json`."""
    D, F, E, V = (config[k] for k in ("hidden_size", "ffn_dim", "word_embed_proj_dim", "vocab_size"))
    positions = config["max_position_embeddings"] + 2
    base = "model.decoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{base}embed_tokens.weight": (V, E),
        f"{base}embed_positions.weight": (positions, D),
    }
    if E != D:
        shapes |= {f"{base}project_in.weight": (D, E), f"{base}project_out.weight": (E, D)}
    linear = {f"self_attn.{p}_proj": (D, D) for p in ("q", "k", "v", "out")} | {"fc1": (F, D), "fc2": (D, F)}
    norms = [
        f"{base}layers.{i}.{name}"
        for i in range(config["num_hidden_layers"])
        for name in ("self_attn_layer_norm", "final_layer_norm")
    ]
    if config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]:
        norms.append(f"{base}final_layer_norm")
    for i in range(config["num_hidden_layers"]):
        for name, shape in linear.items():
            shapes[f"{base}layers.{i}.{name}.weight"] = shape
            if config["enable_bias"]:
                shapes[f"{base}layers.{i}.{name}.bias"] = shape[:1]
    if config["layer_norm_elementwise_affine"]:
        shapes |= {f"{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, E)
    return shapes


def make_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Float32 tensors by torch name: spread logits, peaked attention, and no bias or norm at its default."""
    return {name: _tensor(config, name, shape, seed) for name, shape in tensor_shapes(config).items()}


def fingerprint(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}{weights[name].shape}".encode())
        digest.update(np.ascontiguousarray(weights[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def _tensor(config: Mapping[str, Any], name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    unit = _uniform((seed, zlib.crc32(name.encode())), math.prod(shape)).reshape(shape)
    return (_mean(name) + _std(config, name, shape) * math.sqrt(3.0) * unit).astype(np.float32)


def _uniform(entropy: tuple[int, ...], count: int) -> np.ndarray:
    """Float64 in [-1, 1) from raw PCG64 bits: numpy keeps those the same for ever, but not `Generator`'s draws."""
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def _mean(name: str) -> float:
    return 1.0 if name.endswith("layer_norm.weight") else 0.0


def _std(config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> float:
    """Chosen so that positions, earlier tokens and the last token all sway the logits, and none of them alone."""
    if name.endswith(("layer_norm.weight", ".bias")):
        return 0.3 if name.endswith("layer_norm.weight") else 0.15
    if "embed_positions" in name:
        return 1.5
    output_table = "embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    if output_table in name:
        normed = not (config["do_layer_norm_before"] and config["_remove_final_layer_norm"])
        return _LOGIT_SPREAD / math.sqrt(shape[1]) / (1.0 if normed else 3.0)  # the residual stream's own spread
    if "embed_tokens" in name:
        return 1.0
    values = 2.0 if config["do_layer_norm_before"] else 1.0
    gains = {"q_proj": 1.5, "k_proj": 1.5, "v_proj": values, "fc1": 1.5, "fc2": 0.5}
    gain = next((gain for part, gain in gains.items() if part in name), 1.0)
    return gain / math.sqrt(shape[1])
