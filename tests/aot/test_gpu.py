"""The GPU kernels compiled to machine code for an NVIDIA H200 and A100, with no GPU: registers, spills, shared memory.

Needs the compilers that come with `jax[cuda13]`; skipped where they are missing. `*.txtpb` describe the devices to XLA.
Speed and numbers need a real one: `apt-jax bench kernels`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from apt_jax.pallas_kernels.gpu.hidden_decode import hidden_decode_attention
from apt_jax.pallas_kernels.gpu.kv_decode import kv_decode_attention
from apt_jax.pallas_kernels.gpu.kv_prefix import kv_prefix_attention
from apt_jax.scheduling.costs.hardware import MODELS


def has_compiler() -> bool:
    return bool(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"))


pytestmark = pytest.mark.skipif(
    not has_compiler(), reason="jax[cuda13] is not installed, so nothing compiles for GPUs here; run make test-aot"
)
CONTEXT_TOKENS = 2048
REGISTERS_OF_AN_SM = 65_536
SHARED_BYTES_OF_A_BLOCK = 232_448
# every OPT size in blocks of 16 tokens; one size also in the shortest and longest blocks; batches of 8, 32 and 128 rows
CASES = [(model, 16, 32) for model in MODELS] + [("opt-13b", block, rows) for block, rows in ((8, 8), (128, 128))]
# heads of whole lines of 128 bytes, on CUDA cores
INT8_CASES = [(model, 32, 32) for model in MODELS if MODELS[model].head_dim % 32 == 0] + [("opt-13b", 128, 128)]
FLOAT32_CASES = [*CASES, ("opt-125m", 8, 32)]  # a stride of 8 tokens in blocks of 8


@cache
def gpu(name: str) -> SingleDeviceSharding:
    config = Path(__file__).with_name(f"{name}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    return SingleDeviceSharding(topology.devices[0])


def h200() -> SingleDeviceSharding:
    return gpu("h200")


def compile_kernel(
    kernel,
    queries,
    model: str,
    block_size: int,
    rows: int,
    tables: int,
    dtype=jnp.bfloat16,
    target="h200",
    *,
    numbers=1,
) -> None:
    """`tables` block tables and `numbers` arrays with a number for each row follow queries and pool."""
    config, sharding = MODELS[model], gpu(target)
    shapes = [
        (queries, dtype),
        ((1000, block_size, config.hidden_size), dtype),
        *[((rows, CONTEXT_TOKENS // block_size), jnp.int32)] * tables,
        *[((rows,), jnp.int32)] * numbers,
    ]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    with jax.default_device(next(iter(sharding.device_set))):  # Mosaic asks it for the compute capability
        jax.jit(kernel).lower(*arguments).compile()


def check_report(report: str, kernels: int) -> set[str]:
    """Fail on spills; print what `ptxas -v` and Mosaic say of each of `kernels` kernels (shown by `pytest -rP`).

    Returns the architectures that were compiled for.
    """
    # the assembler's line for each kernel; it also warns of those that spill
    frames = re.findall(r"bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    spills = [int(stores) + int(loads) for stores, loads in frames]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    threads = [int(n) for n in re.findall(r"\.maxntid (\d+)", report)]
    shared = [int(n) for n in re.findall(r"smem_scratch_bytes=(\d+)", report)]
    assert len(registers) == len(threads) == len(shared) == len(spills) == kernels, report[-2000:]
    print(f"registers {registers}, threads {threads}, shared bytes {shared}, spilled bytes {spills}")
    assert max(shared) <= SHARED_BYTES_OF_A_BLOCK
    assert not any(spills), f"{spills=} bytes for {registers=}"
    for used, count in zip(registers, threads, strict=True):
        assert used * count <= REGISTERS_OF_AN_SM
    return set(re.findall(r"Compiling entry function .* for '(\w+)'", report))


@pytest.fixture
def ptxas(monkeypatch, capfd):
    """Mosaic GPU prints PTX and the assembler's report when these are set."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_RESOURCES", "1")
    jax.clear_caches()
    return lambda: "".join(capfd.readouterr())


@pytest.mark.parametrize(("model", "block_size", "rows"), CASES)
def test_kv_decode_compiles_without_spills(model, block_size, rows, ptxas):
    config = MODELS[model]
    queries = (rows, config.num_attention_heads, config.head_dim)
    compile_kernel(kv_decode_attention, queries, model, block_size, rows, tables=2)
    check_report(ptxas(), kernels=1)


@pytest.mark.parametrize(("model", "block_size", "rows"), CASES)
def test_hidden_decode_compiles_without_spills(model, block_size, rows, ptxas):
    config = MODELS[model]
    queries = (rows, config.num_attention_heads, config.hidden_size)
    compile_kernel(hidden_decode_attention, queries, model, block_size, rows, tables=1)
    check_report(ptxas(), kernels=2)


@pytest.mark.parametrize(("model", "block_size", "rows"), CASES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kv_prefix_compiles_without_spills(dtype, model, block_size, rows, ptxas):
    """A chunk of 512 tokens."""
    config = MODELS[model]
    queries = (512, config.num_attention_heads, config.head_dim)
    compile_kernel(kv_prefix_attention, queries, model, block_size, rows, 2, dtype, numbers=3)
    check_report(ptxas(), kernels=1)


@pytest.mark.parametrize(("model", "block_size", "rows"), FLOAT32_CASES)
@pytest.mark.parametrize("kind", ["kv", "hidden"])
def test_float32_compiles_without_spills(kind, model, block_size, rows, ptxas):
    """KV on CUDA cores, hidden on tensor cores in three parts."""
    config = MODELS[model]
    if kind == "kv":
        queries = (rows, config.num_attention_heads, config.head_dim)
        compile_kernel(kv_decode_attention, queries, model, block_size, rows, 2, jnp.float32)
    else:
        queries = (rows, config.num_attention_heads, config.hidden_size)
        compile_kernel(hidden_decode_attention, queries, model, block_size, rows, 1, jnp.float32)
    assert check_report(ptxas(), kernels=1 if kind == "kv" else 2) == {"sm_90a"}


def run_for_ampere(*arguments: str, **environment: str) -> str:
    """Mosaic compiles for one architecture in a process, so in another one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.ampere", *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_what_the_engine_takes_on_an_a100_compiles_without_spills():
    report = run_for_ampere(MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_RESOURCES="1")
    assert check_report(report, kernels=2 * len(FLOAT32_CASES)) == {"sm_80"}  # bfloat16 and float32


def test_int8_kv_decode_for_an_a100_compiles_without_spills():
    dumps = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
    assert check_report(run_for_ampere("int8", **dumps), kernels=len(INT8_CASES)) == {"sm_80"}


def test_kernels_for_hopper_are_refused_for_an_a100():
    """The day that these compile, `dispatch.gpu_kernels` should give them to Ampere."""
    refused = re.findall(r"(\w+) for Hopper refused: .*Hopper and newer", run_for_ampere("hopper"))
    assert refused == ["kv_decode_attention", "hidden_decode_attention"]
