"""Tensor parallelism: same tokens on any number of devices, and refusals that say what is possible."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from checkpoint_folders import TINY, random_model
from engines import make_engine
from jax.sharding import PartitionSpec
from sharded_engines import CONFIG

from apt_jax.sharding import Parallel, padded_shape

TESTS = Path(__file__).parent


def in_new_process(*command: str, **environment: str) -> str:
    """Output of a Python process that finds the packages of these tests.

    Raises:
        AssertionError: it failed; shows what it wrote.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), **environment}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_same_greedy_tokens_on_any_number_of_devices():
    """KV, hidden, converted and preempted requests; the pool is split and never copied or gathered."""
    said = in_new_process(str(TESTS / "sharded_engines.py"), "2:kv", "4:hidden", "8:hybrid")
    assert said.count("same tokens") == 3


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


def test_a_vocabulary_that_does_not_divide_is_padded():
    mesh = jax.sharding.AbstractMesh((4,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("model", None))
    assert padded_shape((101, 64), sharding) == (104, 64)
    assert padded_shape((104, 63), sharding) == (104, 63)
