"""Checkpoints that other tools have quantised are refused by name, with what to do."""

import json

import pytest

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.families import read_config
from apt_jax.model_config import ModelConfig

CURE = "name the checkpoint that it was made from, in 16 or 32 bits, with --quantization int8 if need be"


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "GPTQ (4 bits)"),
        ({"quant_method": "awq", "w_bit": 4, "version": "gemm"}, "AWQ (4 bits)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "newer"}, "'newer'"),
        ({}, "an unknown method"),
        ("int4", "an unknown method ('int4')"),
    ],
)
def test_a_quantised_checkpoint_is_refused_by_name(tmp_path, found, name):
    (tmp_path / "config.json").write_text(json.dumps({**ModelConfig().to_hf(), "quantization_config": found}))
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/config.json: unsupported quantization_config: the weights are quantised by {name}; {CURE}"
    )


@pytest.mark.parametrize(("file", "name"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")])
def test_a_folder_of_an_older_quantiser_is_refused_too(tmp_path, file, name):
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig().to_hf()))
    read_config(tmp_path)
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"unsupported {file}: the weights are quantised by {name}; {CURE}"):
        read_config(tmp_path)


def test_an_empty_setting_is_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**ModelConfig().to_hf(), "quantization_config": None}))
    assert read_config(tmp_path) == ModelConfig()
