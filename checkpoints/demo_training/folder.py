"""Write the trained demo model as a Hugging Face folder with the facts of its training."""

import json
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from apt_jax.checkpoints.demo_training.tokenizer import save_tokenizer
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.model_config import ModelConfig


def write_folder(
    folder: Path,
    config: ModelConfig,
    state: nnx.State,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    license_text: str,
) -> None:
    """Write config.json, model.safetensors (float16), the tokenizer's files and training.json to `folder`.

    The licence of the training text goes with it as `PYTHON_LICENSE.txt`.
    """
    save_tokenizer(tokenizer, folder, config.max_position_embeddings)
    (folder / "PYTHON_LICENSE.txt").write_text(license_text, encoding="utf-8")
    weights = {name: array.astype(np.float16) for name, array in export_huggingface(config, state).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", hf_config(config))
    versions = {"python": sys.version.split()[0], "jax": jax.__version__, "flax": flax.__version__}
    _write_json(folder / "training.json", {**facts, "versions": {**versions, "optax": optax.__version__}})


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The mapping of transformers' `OPTConfig` for a float16 folder of this shape."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "ffn_dim": config.ffn_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "word_embed_proj_dim": config.word_embed_proj_dim,
        "do_layer_norm_before": config.do_layer_norm_before,
        "_remove_final_layer_norm": config.remove_final_layer_norm,
        "activation_function": config.activation_function,
        "enable_bias": config.enable_bias,
        "layer_norm_elementwise_affine": config.layer_norm_elementwise_affine,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": 0.02,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
        "pad_token_id": config.pad_token_id,
        "dtype": "float16",
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
