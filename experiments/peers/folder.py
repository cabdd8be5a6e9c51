"""A Hugging Face folder as every peer reads it: the shape of an OPT size, random weights, a tokenizer of its size."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from apt_jax.model_config import POSITION_OFFSET, ModelConfig
from apt_jax.scheduling.costs.hardware import MODELS, by_name
from experiments.preset_model import write_config

VOCABULARY = ModelConfig.vocab_size  # of all sizes
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
SCALE = 0.02


def write_folder(folder: Path, *, model: str = "opt-125m", dummy: bool = False, seed: int = 0) -> Path:
    """Write config, weights and tokenizer, unless they are there; returns the folder (opt-125m: 500 MB in float32).

    Args:
        model: an OPT size by name, with its embeddings as wide as its layers.
        dummy: write no weights; the engine that loads it draws them.
        seed: of the weights.
    """
    weights_file, config = folder / "model.safetensors", by_name(MODELS, model, "model")
    if not weights_file.is_file():
        write_config(folder, config)
        write_tokenizer(folder, config)
        if not dummy:
            save_file(weights(config, seed), weights_file, metadata={"format": "pt"})
    return folder


def without_tokenizer(folder: Path) -> Path:
    """A sibling folder with the same model and no tokenizer, for engines that are given token ids only."""
    bare = folder.with_name(folder.name + "-ids")
    bare.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        if (folder / name).exists() and not (bare / name).exists():
            (bare / name).symlink_to((folder / name).resolve())
    return bare


def weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Normal numbers for matrices, 1 and 0 for norms, small biases; the same for a seed."""
    generator = np.random.default_rng(seed)
    hidden, ffn = config.hidden_size, config.ffn_dim

    def matrix(*shape: int) -> np.ndarray:
        return SCALE * generator.standard_normal(shape, np.float32)

    found = {
        "model.decoder.embed_tokens.weight": matrix(config.vocab_size, hidden),
        "model.decoder.embed_positions.weight": matrix(config.max_position_embeddings + POSITION_OFFSET, hidden),
        "model.decoder.final_layer_norm.weight": np.ones(hidden, np.float32),
        "model.decoder.final_layer_norm.bias": np.zeros(hidden, np.float32),
    }
    for layer in range(config.num_hidden_layers):
        base = f"model.decoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{base}.self_attn.{name}.weight"] = matrix(hidden, hidden)
            found[f"{base}.self_attn.{name}.bias"] = matrix(hidden)
        for name, rows, columns in (("fc1", ffn, hidden), ("fc2", hidden, ffn)):
            found[f"{base}.{name}.weight"] = matrix(rows, columns)
            found[f"{base}.{name}.bias"] = matrix(rows)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            found[f"{base}.{name}.weight"] = np.ones(hidden, np.float32)
            found[f"{base}.{name}.bias"] = np.zeros(hidden, np.float32)
    return found


def write_tokenizer(folder: Path, config: ModelConfig) -> None:
    """A byte-level vocabulary of the model's size; beyond the bytes, its tokens are names that no text has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = dict(SPECIAL)
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    while len(vocabulary) < config.vocab_size:
        vocabulary[f"token{len(vocabulary)}"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "model_max_length": config.max_position_embeddings, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
