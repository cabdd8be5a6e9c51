"""Every format, whole and in shards, gives the same parameters bit for bit."""

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx, serialization

from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.formats.weight_files import LoadFormat
from apt_jax.checkpoints.load import load_model
from tests.support.checkpoint_folders import (
    TINY,
    VARIANTS,
    assert_same_parameters,
    flax_tree,
    random_model,
    write_config,
    write_flax,
    write_safetensors,
)


@functools.cache
def reference(variant):
    """A config, its model, and the model's tensors under torch names."""
    config = VARIANTS[variant]
    model = random_model(config, seed=7)
    return config, model, export_huggingface(config, model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors(tmp_path, variant, shards):
    config, model, tensors = reference(variant)
    write_config(tmp_path, config)
    write_safetensors(tmp_path, tensors, shards)
    loaded = load_model(str(tmp_path))
    assert_same_parameters(loaded.model, model)
    assert loaded.config == config
    assert loaded.folder == tmp_path
    assert loaded.load_format is LoadFormat.SAFETENSORS
    assert loaded.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [1, 2])
def test_flax(tmp_path, variant, shards):
    config, model, tensors = reference(variant)
    write_config(tmp_path, config)
    write_flax(tmp_path, flax_tree(config, tensors), shards)
    loaded = load_model(str(tmp_path))
    assert_same_parameters(loaded.model, model)
    assert loaded.load_format is LoadFormat.FLAX


def test_flax_arrays_in_chunks_and_under_params(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)  # flax's own is 1 GiB
    config, model, tensors = reference("untied")
    write_config(tmp_path, config)
    write_flax(tmp_path, {("params", *path): tensor for path, tensor in flax_tree(config, tensors).items()})
    assert b"__msgpack_chunked_array__" in (tmp_path / "flax_model.msgpack").read_bytes()
    assert_same_parameters(load_model(str(tmp_path)).model, model)


def test_keys_of_the_base_model_and_a_stored_tied_head(tmp_path):
    config, model, tensors = reference("plain")
    write_config(tmp_path, config)
    spelled = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    spelled["decoder.version"] = np.array([3.0], np.float32)
    spelled["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    write_safetensors(tmp_path, spelled, shards=2)
    assert_same_parameters(load_model(str(tmp_path)).model, model)


def test_tied_head_of_flax(tmp_path):
    config, model, tensors = reference("projected")
    write_config(tmp_path, config)
    flat = flax_tree(config, tensors)
    flat[("lm_head", "kernel")] = tensors["model.decoder.embed_tokens.weight"].T
    write_flax(tmp_path, flat)
    assert_same_parameters(load_model(str(tmp_path)).model, model)


def test_more_rows_than_one_strip(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=300, ffn_dim=400)
    model = random_model(config, seed=1)
    tensors = export_huggingface(config, model)
    for name, write in (("a", write_safetensors), ("b", lambda f, t: write_flax(f, flax_tree(config, t)))):
        write_config(tmp_path / name, config)
        write(tmp_path / name, tensors)
        assert_same_parameters(load_model(str(tmp_path / name)).model, model)


@pytest.mark.parametrize(
    ("stored", "served", "file_format"),
    [
        *((stored, "auto", "safetensors") for stored in ("float16", "bfloat16", "float64")),
        *((stored, "bfloat16", "safetensors") for stored in ("float16", "bfloat16", "float32")),
        *((stored, "float16", "safetensors") for stored in ("float16", "bfloat16")),
        *((stored, "auto", "flax") for stored in ("float16", "bfloat16", "float64")),
    ],
)
def test_dtypes(tmp_path, stored, served, file_format):
    config, _, tensors = reference("projected")
    kind = np.dtype(getattr(ml_dtypes, stored, stored))
    tensors = {name: tensor.astype(kind) for name, tensor in tensors.items()}
    write_config(tmp_path, config, torch_dtype="float32" if stored == "float64" else stored)
    if file_format == "safetensors":
        write_safetensors(tmp_path, tensors)
    else:
        write_flax(tmp_path, flax_tree(config, tensors))
    loaded = load_model(str(tmp_path), dtype=served)
    expected = {"auto": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[served]
    assert loaded.dtype == expected  # "auto" is float32 on a CPU, whatever is stored
    back = export_huggingface(config, loaded.model)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor.astype(expected))


def test_dummy_needs_only_a_config_and_follows_the_seed(tmp_path):
    write_config(tmp_path, VARIANTS["untied"])
    first, again, other = (load_model(str(tmp_path), load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert_same_parameters(first.model, again.model)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for path, leaf in nnx.to_flat_state(nnx.state(first.model)):
        numbers = np.asarray(leaf[...])
        if path[-1] in ("bias", "scale"):
            assert (numbers == (path[-1] == "scale")).all()
        else:
            assert 0.015 < numbers.std() < 0.025, path
            rows = numbers.reshape(numbers.shape[0], -1)
            assert len(np.unique(rows[:, 0])) == len(rows), f"{path}: rows repeat"
    with pytest.raises(AssertionError):
        assert_same_parameters(first.model, other.model)


def test_one_sharding_or_a_function_of_the_path(tmp_path):
    config, model, tensors = reference("plain")
    write_config(tmp_path, config)
    write_safetensors(tmp_path, tensors)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert_same_parameters(load_model(str(tmp_path), shardings=single).model, model)
    asked = {}

    def choose(path, shape):
        asked[path] = shape
        return single

    assert_same_parameters(load_model(str(tmp_path), shardings=choose).model, model)
    assert asked[("layers", "self_attn", "q_proj", "kernel")] == (3, 32, 4, 8)


def test_formats_are_preferred_in_order(tmp_path):
    config, _, tensors = reference("plain")
    write_config(tmp_path, config)
    write_flax(tmp_path, flax_tree(config, tensors))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    write_safetensors(tmp_path, tensors)
    assert load_model(str(tmp_path)).load_format is LoadFormat.SAFETENSORS
    assert load_model(str(tmp_path), load_format="flax").load_format is LoadFormat.FLAX
