"""Where parameters go: into their shards on several devices, and through little host memory."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apt_jax.checkpoints.convert import convert
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.load import load_model
from apt_jax.checkpoints.placement import serving_dtype
from apt_jax.execution.platform import PLATFORMS
from apt_jax.model_config import ModelConfig
from apt_jax.models.sharding import Parallel
from experiments.checkpoint_memory import measure, write_folder
from tests.support.checkpoint_folders import TINY, assert_same_parameters, random_model, write_config, write_safetensors

DEVICES = 4
CONFIG = dataclasses.replace(TINY, vocab_size=62)  # which four devices do not divide


def test_weights_larger_than_memory_are_refused_before_any_is_read(tmp_path, monkeypatch):
    write_config(tmp_path, CONFIG)
    needed = load_model(str(tmp_path), load_format="dummy").weight_bytes
    for free in (needed, needed - 1):
        monkeypatch.setattr("apt_jax.checkpoints.placement.device_memory", lambda *args, free=free: (2 * free, free))
        if free == needed:
            load_model(str(tmp_path), load_format="dummy")
    monkeypatch.setattr("apt_jax.checkpoints.load.read_parameters", lambda *args, **options: pytest.fail("read"))
    with pytest.raises(CheckpointError) as error:
        load_model(str(tmp_path), load_format="dummy")
    sizes = rf"need {needed / 2**20:.1f} MiB .*{free / 2**20:.1f} MiB of {2 * free / 2**20:.1f} MiB are free"
    assert re.search(sizes, str(error.value)) and "--tensor-parallel-size" in str(error.value)


def test_shards_on_several_devices(tmp_path):
    model = random_model(CONFIG, seed=2)
    write_config(tmp_path / "source", CONFIG)
    write_safetensors(tmp_path / "source", export_huggingface(CONFIG, model))
    convert(str(tmp_path / "source"), tmp_path / "converted")
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    code = "import sys, tests.model.test_checkpoints_placement as t; t.check_shards(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)


def check_shards(place: str) -> None:
    """Run in a process with `DEVICES` devices."""
    mesh = Mesh(np.array(jax.devices()), ("model",))
    assert mesh.size == DEVICES

    def split_last(path, shape):
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "model"))

    expected = random_model(CONFIG, seed=2)
    for source, load_format in (("source", "auto"), ("converted", "auto"), ("source", "dummy")):
        loaded = load_model(f"{place}/{source}", load_format=load_format, shardings=split_last)
        for path, leaf in nnx.to_flat_state(nnx.state(loaded.model)):
            array = leaf[...]
            shapes = {shard.data.shape for shard in array.addressable_shards}
            assert shapes == {(*array.shape[:-1], array.shape[-1] // DEVICES)}, path
            assert {shard.device for shard in array.addressable_shards} == set(jax.devices()), path
        if load_format != "dummy":
            assert_same_parameters(loaded.model, expected)
    for hidden in (False, True):
        parallel = Parallel.over(DEVICES, hidden=hidden)
        placed = parallel.place(expected)
        for source, load_format in (("source", "auto"), ("converted", "auto"), ("source", "dummy")):
            model = load_model(f"{place}/{source}", load_format=load_format, parallel=parallel).model
            assert Parallel.of(model) == parallel
            if load_format != "dummy":
                assert_same_parameters(model, placed)
            shapes = {shard.data.shape for shard in model.embed_tokens.embedding[...].addressable_shards}
            assert shapes == {(64 // DEVICES, CONFIG.word_embed_proj_dim)}


def test_host_memory(tmp_path):
    # 300 MB of float32 from 150 MB of float16; `python -m experiments.checkpoint_memory` does it with 1.3B parameters.
    config = ModelConfig(
        vocab_size=22000,
        hidden_size=1024,
        num_hidden_layers=4,
        ffn_dim=4096,
        num_attention_heads=16,
        word_embed_proj_dim=1024,
    )
    write_folder(config, tmp_path / "model", "sharded")
    found = measure(tmp_path / "model", "auto")
    assert found.weight_bytes > 290e6
    assert 1 < found.ratio < 1.3


@pytest.mark.parametrize(
    ("requested", "stored", "platform", "expected"),
    [
        ("auto", "float16", "cpu", "float32"),
        ("auto", "bfloat16", "cpu", "float32"),
        ("auto", "float16", "tpu", "bfloat16"),
        ("auto", "bfloat16", "tpu", "bfloat16"),
        ("auto", "float32", "tpu", "float32"),
        ("auto", "float16", "gpu", "float16"),
        ("half", "float32", "gpu", "float16"),
        ("float", "float16", "tpu", "float32"),
        ("bfloat16", "float16", "cpu", "bfloat16"),
    ],
)
def test_serving_dtype(requested, stored, platform, expected):
    assert serving_dtype(requested, ModelConfig(checkpoint_dtype=stored), PLATFORMS[platform]).name == expected
