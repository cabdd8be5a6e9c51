"""A Hugging Face folder as every peer reads it: OPT-125M's shape, seeded random weights, a tokenizer of its size."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCABULARY, LAYERS, HIDDEN, HEADS, FFN, CONTEXT = 50272, 12, 768, 12, 3072, 2048
POSITION_OFFSET = 2  # OPT's table of positions begins with two unused rows
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
SCALE = 0.02


def write_folder(folder: Path, seed: int = 0) -> Path:
    """Write config, weights and tokenizer, unless they are there; returns the folder (about 500 MB in float32)."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(), indent=1) + "\n", encoding="utf-8")
    write_tokenizer(folder)
    save_file(weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without_tokenizer(folder: Path) -> Path:
    """A folder beside it with the same model and no tokenizer, for engines that are given token ids only."""
    bare = folder.with_name(folder.name + "-ids")
    bare.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        if not (bare / name).exists():
            (bare / name).symlink_to((folder / name).resolve())
    return bare


def config() -> dict[str, object]:
    """OPT-125M's, as transformers writes it."""
    return {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN,
        "max_position_embeddings": CONTEXT, "activation_function": "relu", "do_layer_norm_before": True,
        "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "init_std": SCALE, "tie_word_embeddings": True,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "prefix": "</s>", "dtype": "float32",
    }  # fmt: skip


def weights(seed: int) -> dict[str, np.ndarray]:
    """Normal numbers for matrices, 1 and 0 for norms, small biases; the same for a seed."""
    generator = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return SCALE * generator.standard_normal(shape, np.float32)

    found = {
        "model.decoder.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.decoder.embed_positions.weight": matrix(CONTEXT + POSITION_OFFSET, HIDDEN),
        "model.decoder.final_layer_norm.weight": np.ones(HIDDEN, np.float32),
        "model.decoder.final_layer_norm.bias": np.zeros(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        base = f"model.decoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{base}.self_attn.{name}.weight"] = matrix(HIDDEN, HIDDEN)
            found[f"{base}.self_attn.{name}.bias"] = matrix(HIDDEN)
        for name, rows, columns in (("fc1", FFN, HIDDEN), ("fc2", HIDDEN, FFN)):
            found[f"{base}.{name}.weight"] = matrix(rows, columns)
            found[f"{base}.{name}.bias"] = matrix(rows)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            found[f"{base}.{name}.weight"] = np.ones(HIDDEN, np.float32)
            found[f"{base}.{name}.bias"] = np.zeros(HIDDEN, np.float32)
    return found


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary of the model's size; beyond the bytes, its tokens are names that no text has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = dict(SPECIAL)
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    while len(vocabulary) < VOCABULARY:
        vocabulary[f"token{len(vocabulary)}"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
