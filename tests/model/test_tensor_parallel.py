"""Tensor parallelism: same tokens on any number of devices, and refusals that say what is possible."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from apt_jax.attention import hidden_slices
from apt_jax.attention.pool import Pool
from apt_jax.checkpoints.convert import convert
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.model_config import ModelConfig
from apt_jax.models.sharding import Parallel, padded_shape
from apt_jax.pallas_kernels import reference
from tests.support import two_processes
from tests.support.checkpoint_folders import TINY, random_model, write_config, write_safetensors
from tests.support.engines import make_engine
from tests.support.sharded_engines import CONFIG

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests/support"
ALL = bool(os.environ.get("APT_JAX_TEST_DEVICES"))  # set by `make test-devices`, which takes minutes


pytestmark = pytest.mark.timeout(900)


def in_new_process(*command: str, **environment: str) -> str:
    """Output of a Python process that finds the packages of these tests.

    Raises:
        AssertionError: it failed; shows what it wrote.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_same_greedy_tokens_on_any_number_of_devices():
    """KV, hidden, converted and preempted requests; the pool is split and never copied or gathered."""
    said = in_new_process(str(SUPPORT / "sharded_engines.py"), *([] if ALL else ["4:hybrid"]))
    assert said.count("same tokens") == (9 if ALL else 1)


def test_more_devices_than_there_are_is_refused():
    count = len(jax.devices()) + 1
    with pytest.raises(ValueError, match=f"tensor_parallel_size={count} is more than the {count - 1} cpu device"):
        Parallel.over(count, hidden=True)


def test_a_model_that_cannot_be_split_is_refused():
    parallel = Parallel.over(1, hidden=True)
    parallel.check(CONFIG)

    class OverThree:
        num_devices = 3

    with pytest.raises(ValueError, match=r"=3 does not divide num_attention_heads=8 .*may be 1, 2, 4, 8$"):
        Parallel.check(OverThree(), CONFIG)
    with pytest.raises(ValueError, match=r"ffn_dim=120; --tensor-parallel-size may be 1, 2, 4, 8$"):
        Parallel.check(OverThree(), replace(CONFIG, ffn_dim=120))


def test_weights_on_another_number_of_devices_are_refused():
    with pytest.raises(ValueError, match="tensor_parallel_size=2, but the weights lie on 1 device"):
        make_engine(random_model(TINY, seed=0), TINY, tensor_parallel_size=2)


def test_hidden_slices_on_one_device_equal_the_reference(monkeypatch):
    """Groups of several widths, rows without tokens, NaN beyond a row's length; and as many groups as are counted."""
    monkeypatch.setattr(hidden_slices, "_SHORTEST", 16)
    monkeypatch.setattr(hidden_slices, "GROUP_BYTES", 3 * 32 * 16 * 4)  # three rows of 32 tokens
    generator = np.random.default_rng(0)
    length = np.array([3, 0, 64, 17, 32, 33, 1], np.int32)
    blocks = generator.permutation(7 * 8).reshape(7, 8).astype(np.int32)
    pool = generator.standard_normal((56, 8, 16), np.float32)
    for row, tokens in zip(blocks, length, strict=True):
        pool[row] = np.where((np.arange(64) < tokens).reshape(8, 8, 1), pool[row], np.nan)
    args = generator.standard_normal((7, 4, 16), np.float32), pool, blocks, length
    found = jax.jit(hidden_slices.hidden_decode_slices)(args[0], Pool(pool), *args[2:])
    expected = reference.hidden_decode_attention(*map(jnp.asarray, args))
    np.testing.assert_allclose(found.out, expected.out, atol=1e-5)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-5)
    # widths 64, 32 and 16 take 1, 3 and 6 rows: 64 | 33 | 32 17 3 | 1
    assert hidden_slices.num_groups(length[length > 0].tolist(), 64, token_bytes=64) == 4


def test_a_vocabulary_that_does_not_divide_is_padded():
    mesh = jax.sharding.AbstractMesh((4,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("model", None))
    assert padded_shape((101, 64), sharding) == (104, 64)
    assert padded_shape((104, 63), sharding) == (104, 63)


TWO_PROCESSES = ModelConfig(
    vocab_size=4096, hidden_size=128, num_hidden_layers=2, ffn_dim=512, max_position_embeddings=64,
    num_attention_heads=4, word_embed_proj_dim=128,
)  # fmt: skip


@pytest.mark.skipif(not ALL, reason="make test-devices runs this")
def test_two_processes_give_the_tokens_of_one_and_read_their_shards_only(tmp_path, monkeypatch):
    """Process 0 schedules, process 1 follows; weights come from an Orbax folder, of which each reads its part."""
    model = random_model(TWO_PROCESSES, seed=4)
    write_config(tmp_path / "source", TWO_PROCESSES)
    write_safetensors(tmp_path / "source", export_huggingface(TWO_PROCESSES, model))
    monkeypatch.setattr("apt_jax.checkpoints.formats.orbax_store._CHUNK_BYTES", 2**15)  # of a small model
    folder = tmp_path / "converted"
    convert(str(tmp_path / "source"), folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = (str(SUPPORT / "two_processes.py"), str(folder), address)
    with ThreadPoolExecutor() as pool:
        said = [pool.submit(in_new_process, *command, str(number)) for number in range(2)]
        first, second = ([json.loads(line) for line in one.result().splitlines() if line[0] == "{"] for one in said)
    for loaded, *_ in (first, second):
        assert loaded["held"] < 0.55
        assert loaded["read"] < 0.65 * loaded["bytes"]  # its half, what is on all, and files' indexes
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
    expected = two_processes.generate(two_processes.make_engine(str(folder), 1))
    assert first[1] == {"tokens": expected, "recompiles": 0}
    assert len(second) == 1
