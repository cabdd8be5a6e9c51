"""A checkpoint that is not whole and exact is refused with one sentence that names the file or key at fault."""

import contextlib
import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.load import load_model
from tests.support.checkpoint_folders import TINY, flax_tree, random_model, write_config, write_flax, write_safetensors

FC1 = "model.decoder.layers.1.fc1.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


@functools.cache
def _tensors():
    return export_huggingface(TINY, random_model(TINY, seed=3))


@pytest.fixture
def tensors():
    return dict(_tensors())


@pytest.fixture
def folder(tmp_path):
    write_config(tmp_path, TINY)
    return tmp_path


def refused(folder, *parts, **options):
    """Load `folder`; it must be refused with one line that has every one of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder), **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.mark.parametrize("shards", [1, 2])
def test_missing_keys(folder, tensors, shards):
    del tensors[FC1], tensors["model.decoder.layers.2.fc2.bias"]
    write_safetensors(folder, tensors, shards)
    refused(folder, "lacks", FC1, "model.decoder.layers.2.fc2.bias", "model.safetensors")


def test_only_the_first_missing_keys_are_listed(folder, tensors):
    write_safetensors(folder, {EMBEDDING: tensors[EMBEDDING]})
    refused(folder, "lacks model.decoder.embed_positions.weight", "and 48 more")


@pytest.mark.parametrize("extra", ["model.decoder.layers.3.fc1.weight", "something.weight", "lm_head.bias"])
def test_extra_key(folder, tensors, extra):
    tensors[extra] = np.zeros((48, 32), np.float32)
    write_safetensors(folder, tensors)
    refused(folder, "model.safetensors", "holds", extra)


def test_key_twice_in_two_spellings(folder, tensors):
    tensors[FC1.removeprefix("model.")] = tensors[FC1]
    write_safetensors(folder, tensors)
    refused(folder, f"{FC1} is stored twice")


@pytest.mark.parametrize("shape", [(32, 48), (48,), (48, 32, 1), (0, 32)])
def test_wrong_shape(folder, tensors, shape):
    tensors[FC1] = np.zeros(shape, np.float32)
    write_safetensors(folder, tensors)
    refused(folder, "model.safetensors", FC1, str(shape), "(48, 32)")


def test_wrong_shape_in_flax(folder, tensors):
    flat = flax_tree(TINY, tensors)
    path = ("model", "decoder", "layers", "1", "fc1", "kernel")
    flat[path] = flat[path].T
    write_flax(folder, flat)
    refused(folder, "flax_model.msgpack", "/".join(path), "(48, 32)", "(32, 48)")


def test_weights_of_another_config(folder, tensors):
    write_safetensors(folder, tensors)
    write_config(folder, dataclasses.replace(TINY, num_hidden_layers=2))
    refused(folder, "model.decoder.layers.2.", "has no place")
    write_config(folder, dataclasses.replace(TINY, tie_word_embeddings=False))
    refused(folder, "lacks lm_head.weight")
    write_config(folder, dataclasses.replace(TINY, ffn_dim=64))
    refused(folder, ".fc1.", "shape (48", "asks for (64")


def test_integers_are_no_weights(folder, tensors):
    tensors[FC1] = np.zeros((48, 32), np.int8)
    write_safetensors(folder, tensors)
    refused(folder, FC1, "I8")


def test_numbers_too_large_for_the_dtype(folder, tensors):
    tensors[FC1] = np.full((48, 32), 1e6, np.float32)
    write_safetensors(folder, tensors)
    refused(folder, FC1, "too large for float16", dtype="float16")


def test_tied_head_that_differs(folder, tensors):
    head = tensors[EMBEDDING].copy()
    head[63, 31] += 1
    write_safetensors(folder, {**tensors, "lm_head.weight": head})
    refused(folder, "lm_head.weight", "differs from", "tie_word_embeddings")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(folder, tensors, keep):
    write_safetensors(folder, tensors, shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    refused(folder, path, "truncated or corrupt")


def test_missing_shard(folder, tensors):
    write_safetensors(folder, tensors, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, folder / "model-00002-of-00003.safetensors", "is missing")


def test_shard_that_the_index_does_not_name(folder, tensors):
    write_safetensors(folder, tensors, shards=2)
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"")
    refused(folder, "model-00003-of-00003.safetensors", "not named by model.safetensors.index.json")


def test_shards_without_an_index(folder, tensors):
    write_safetensors(folder, tensors, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "model.safetensors.index.json is missing", "model-00001-of-00002.safetensors")


def test_whole_beside_sharded(folder, tensors):
    write_safetensors(folder, tensors, shards=2)
    write_safetensors(folder, tensors)
    refused(folder, "holds both model.safetensors and model-00001-of-00002.safetensors")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": [', "{}"])
def test_corrupt_index(folder, tensors, text):
    write_safetensors(folder, tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json")


def test_index_that_disagrees_with_its_shards(folder, tensors):
    write_safetensors(folder, tensors, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = dict(index["weight_map"])
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    moved[FC1] = first if moved[FC1] == second else second
    path.write_text(json.dumps({"weight_map": moved}))
    refused(folder, FC1, "model.safetensors.index.json")
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "model.decoder.other": first}}))
    refused(folder, first, "lacks model.decoder.other")


@functools.cache
def _flax_bytes(tmp_folder):
    write_flax(tmp_folder, flax_tree(TINY, _tensors()))
    return (tmp_folder / "flax_model.msgpack").read_bytes()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True))
def test_flax_file_cut_anywhere(folder, share):
    whole = _flax_bytes(folder)
    (folder / "flax_model.msgpack").write_bytes(whole[: int(len(whole) * share)])
    refused(folder, folder / "flax_model.msgpack", "truncated or corrupt")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40))
def test_flax_file_of_noise(folder, noise):
    (folder / "flax_model.msgpack").write_bytes(noise)
    refused(folder, "flax_model.msgpack")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3000), st.integers(1, 255))
def test_flax_file_with_a_wrong_byte_loads_or_is_refused(folder, position, change):
    damaged = bytearray(_flax_bytes(folder))
    damaged[position] ^= change
    (folder / "flax_model.msgpack").write_bytes(damaged)
    with contextlib.suppress(CheckpointError):  # and no other error; a wrong byte inside a weight cannot be seen
        load_model(str(folder))


def test_flax_file_with_something_behind_it(folder, tensors):
    write_flax(folder, flax_tree(TINY, tensors))
    path = folder / "flax_model.msgpack"
    path.write_bytes(path.read_bytes() + b"\x00")
    refused(folder, path, "1 bytes follow its end")


def test_folders_that_are_no_checkpoint(tmp_path, folder, tensors):
    refused(folder, "has no weights", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "dummy")
    write_safetensors(folder, tensors)
    refused(folder, "no weights in load_format='flax'", "safetensors", load_format="flax")
    refused(folder, "load_format='gguf' is not one of auto, safetensors", load_format="gguf")
    refused(folder, "'int8' is no dtype", dtype="int8")
    refused(folder / "model.safetensors", "is a file")
    refused(folder / "absent", "there is no folder")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")
