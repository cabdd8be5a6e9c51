"""Threads of the C++ kernels: pieces of work, order of memory, pools larger than the cores that may be used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jax.cpu_kernels import library

SOURCE = Path(__file__).with_name("threads.cc")
CHECKS = ("rounds", "rounds with pauses", "inlined", "late", "asleep")
FORMS = {"optimized": ["-O2"], "thread sanitizer": ["-O1", "-g", "-fsanitize=thread"]}


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def program(request, tmp_path_factory):
    """`threads.cc`, compiled; the thread sanitizer is left out where the compiler or the system has none."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("threads") / "threads"
    command = [compiler, "-std=c++20", *request.param, "-pthread", "-Wall", "-Werror", "-o", str(path)]
    if len(request.param) > 1:
        empty = path.with_name("empty.cc")
        empty.write_text("int main() {}")
        built = subprocess.run([*command, str(empty)], capture_output=True, check=False).returncode == 0
        if not built or subprocess.run([path], capture_output=True, check=False).returncode:
            pytest.skip("the thread sanitizer does not run here")
    subprocess.run([*command, str(SOURCE)], check=True)
    return path


@pytest.mark.parametrize("check", CHECKS)
def test_a_team_of_threads(program, check):
    subprocess.run([program, check], check=True, timeout=120)


# Prints the milliseconds of processor time that six products take, one row each.
PRODUCTS = """
import time, jax, jax.numpy as jnp, numpy as np
from apt_jax.cpu_kernels import calls, library, packed
library.register()
kernels = [jnp.asarray(packed.pack(np.ones(shape, np.float32))) for shape in ((768, 3072), (3072, 768))]

@jax.jit
def products(x):
    for _ in range(3):
        x = jnp.tanh(calls.matmul(calls.matmul(x, kernels[0], 3072), kernels[1], 768))
    return x

x = jnp.ones((1, 768))
for _ in range(3):
    products(x).block_until_ready()
began = time.process_time()
for _ in range(40):
    products(x).block_until_ready()
print((time.process_time() - began) / 40 * 1e3)
"""


def test_a_pool_larger_than_the_processors_that_may_be_used_costs_nothing():
    """XLA makes as many threads as NPROC says. Processor time, since the time of day is other processes' too."""
    library.built()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    took = {size: [] for size in (allowed, 32 * allowed)}
    for _ in range(2):
        for size, found in took.items():
            env = {**os.environ, "NPROC": str(size), "JAX_PLATFORMS": "cpu"}
            done = subprocess.run([sys.executable, "-c", PRODUCTS], env=env, check=True, capture_output=True, text=True)
            found.append(float(done.stdout))
    few, many = map(min, took.values())  # what others on the machine add is never less than nothing
    assert many <= 2 * few, took
