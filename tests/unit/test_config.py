"""`ModelConfig`: transformers' defaults, the config.json files in the wild, and refusals that name field and value."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.families import read_config
from apt_jax.model_config import ACTIVATIONS, ModelConfig

MINIMAL = {"model_type": "opt"}


def test_an_empty_config_gets_the_defaults_of_transformers():
    assert ModelConfig.from_hf(MINIMAL) == ModelConfig.from_hf(OPTConfig().to_dict()) == ModelConfig()


@st.composite
def partial_configs(draw):
    """Some fields of an OPT config, the others left to their defaults."""
    heads = draw(st.integers(1, 8))
    hidden = heads * draw(st.integers(1, 96))
    vocab = draw(st.integers(3, 60000))
    token = st.none() | st.integers(0, vocab - 1)
    choices = {
        "ffn_dim": st.integers(1, 4096),
        "num_hidden_layers": st.integers(1, 64),
        "max_position_embeddings": st.integers(1, 4096),
        "word_embed_proj_dim": st.none() | st.integers(1, 512),
        "activation_function": st.sampled_from(ACTIVATIONS),
        "do_layer_norm_before": st.booleans(),
        "_remove_final_layer_norm": st.booleans(),
        "enable_bias": st.booleans(),
        "layer_norm_elementwise_affine": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "bos_token_id": token,
        "pad_token_id": token,
        "eos_token_id": token | st.lists(st.integers(0, vocab - 1), min_size=1, max_size=3),
        "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
    }
    kept = draw(st.sets(st.sampled_from(sorted(choices))))
    fields = {name: draw(choices[name]) for name in sorted(kept)}
    return {"hidden_size": hidden, "num_attention_heads": heads, "vocab_size": vocab, **fields}


@given(partial_configs())
def test_any_config_is_read_as_transformers_reads_it(fields):
    """Filled in by transformers or by us, the result is the same."""
    filled = json.loads(OPTConfig(**fields).to_json_string())
    ours = ModelConfig.from_hf({**MINIMAL, **fields})
    assert ours == ModelConfig.from_hf(filled) == ModelConfig.from_hf(ours.to_hf())
    assert ours.word_embed_proj_dim == filled["word_embed_proj_dim"]
    assert ours.remove_final_layer_norm == filled["_remove_final_layer_norm"]
    assert ours.head_dim * filled["num_attention_heads"] == filled["hidden_size"]
    assert ours.has_final_layer_norm == (filled["do_layer_norm_before"] and not filled["_remove_final_layer_norm"])
    eos = filled["eos_token_id"]
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [] if eos is None else [eos])
    assert ours.checkpoint_dtype == filled.get("dtype", "float32")


OPT_125M = {  # as published; the larger ones differ in the sizes and in what is replaced below
    "_name_or_path": "facebook/opt-125m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}


def sized(hidden, layers, heads):
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden,
    }  # fmt: skip


def test_opt_125m():
    assert ModelConfig.from_hf(OPT_125M) == ModelConfig(checkpoint_dtype="float16")


def test_opt_350m_is_post_norm_and_projected():
    raw = OPT_125M | sized(1024, 24, 16) | {"do_layer_norm_before": False, "word_embed_proj_dim": 512}
    config = ModelConfig.from_hf(raw)
    assert not config.do_layer_norm_before
    assert not config.has_final_layer_norm
    assert (config.hidden_size, config.word_embed_proj_dim, config.head_dim) == (1024, 512, 64)


def test_opt_2_7b_has_heads_of_80():
    config = ModelConfig.from_hf(OPT_125M | sized(2560, 32, 32))
    assert (config.head_dim, config.num_attention_heads, config.has_final_layer_norm) == (80, 32, True)


@pytest.mark.parametrize("flags", [{}, {"enable_bias": False, "layer_norm_elementwise_affine": False}])
def test_galactica_style(flags):
    raw = OPT_125M | sized(2048, 24, 32) | flags
    raw |= {"activation_function": "gelu", "vocab_size": 50000, "bos_token_id": 0}
    raw |= {"learned_embeddings": True, "scale_embeddings": False, "attention_dropout": 0.1}
    config = ModelConfig.from_hf(raw)
    assert (config.activation_function, config.vocab_size, config.bos_token_id) == ("gelu", 50000, 0)
    assert config.enable_bias == config.layer_norm_elementwise_affine == (not flags)


def test_newer_files_say_dtype_and_older_ones_torch_dtype():
    assert ModelConfig.from_hf({**MINIMAL, "dtype": "bfloat16"}).checkpoint_dtype == "bfloat16"
    assert ModelConfig.from_hf({**MINIMAL, "torch_dtype": "torch.float16"}).checkpoint_dtype == "float16"
    assert ModelConfig.from_hf({**MINIMAL, "dtype": None, "torch_dtype": "float16"}).checkpoint_dtype == "float16"


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("model_type", "llama", "only 'opt'"),
        ("model_type", None, "only 'opt'"),
        ("quantization_config", {"bits": 4}, "not supported"),
        ("rope_scaling", {"factor": 2.0}, "not supported"),
        ("sliding_window", 512, "not supported"),
        ("vocab_size", 0, "integer > 0"),
        ("hidden_size", 768.0, "integer > 0"),
        ("hidden_size", -768, "integer > 0"),
        ("num_hidden_layers", None, "integer > 0"),
        ("num_hidden_layers", True, "integer > 0"),
        ("ffn_dim", "3072", "integer > 0"),
        ("max_position_embeddings", [2048], "integer > 0"),
        ("num_attention_heads", 7, "divide hidden_size=768"),
        ("num_key_value_heads", 4, "multi-head"),
        ("word_embed_proj_dim", 0, "integer > 0"),
        ("activation_function", "xielu", "use one of relu"),
        ("activation_function", None, "use one of relu"),
        ("activation_function", ["relu"], "use one of relu"),
        ("do_layer_norm_before", 1, "true or false"),
        ("_remove_final_layer_norm", "no", "true or false"),
        ("enable_bias", None, "true or false"),
        ("layer_norm_elementwise_affine", 0.0, "true or false"),
        ("tie_word_embeddings", "true", "true or false"),
        ("bos_token_id", 50272, "0..vocab_size-1=50271"),
        ("bos_token_id", [2], "0..vocab_size-1"),
        ("pad_token_id", -1, "0..vocab_size-1"),
        ("eos_token_id", "</s>", "0..vocab_size-1"),
        ("eos_token_id", True, "0..vocab_size-1"),
        ("eos_token_id", [2, 99999], "0..vocab_size-1"),
        ("torch_dtype", "int8", "use one of float32"),
        ("dtype", "float64", "use one of float32"),
    ],
)
def test_refusal_names_field_value_and_cure(field, value, cure):
    with pytest.raises(ValueError, match=r"^unsupported ") as caught:
        ModelConfig.from_hf({**MINIMAL, field: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"unsupported {field}={value!r}: ")
    assert cure in sentence


def test_a_field_left_to_its_default_is_named_with_that_default():
    with pytest.raises(ValueError, match=r"^unsupported num_attention_heads=12: it must divide hidden_size=100$"):
        ModelConfig.from_hf({**MINIMAL, "hidden_size": 100})


def test_read_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OPT_125M), encoding="utf-8")
    assert read_config(tmp_path) == ModelConfig.from_hf(OPT_125M)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b'{"model_type": "gpt2"}', "unsupported model_type='gpt2'"),
    ],
)
def test_read_config_names_the_bad_file(tmp_path, content, problem):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_read_config_without_a_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_config(tmp_path)


def test_the_config_is_frozen_and_hashable():
    config = ModelConfig()
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
