"""`make device-check` in its form for a CPU: every stage measures what it is for, and says so.

It needs no compiler, but minutes; `make test-aot` runs it. `tests/unit/test_device_check.py` has what fails and hangs.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from apt_jax.attention.pool import scale_row
from apt_jax.pallas_kernels.bench import chunk_runs
from apt_jax.pallas_kernels.bench.chunk_runs import ChunkResult
from apt_jax.pallas_kernels.bench.timing import repeated
from apt_jax.pallas_kernels.dispatch import gpu_kernels
from experiments.device_check.__main__ import RESULTS, STAGES, SUMMARY
from experiments.device_check.records import read_records
from experiments.device_check.sizes import GPU
from tests.aot.test_gpu import h200, has_compiler
from tests.aot.tpu_compiler import MISSING

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

pytestmark = pytest.mark.timeout(3000)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device-check")
    command = [sys.executable, "-m", "experiments.device_check", "--platform", "cpu", "--minutes", "45"]
    done = subprocess.run(
        [*command, "--results", str(folder)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + (folder / "log.txt").read_text()[-4000:]
    found = read_records(folder / RESULTS)
    shown = (folder / SUMMARY).read_text()
    assert all(f"## {stage.name}: done" in shown for stage in STAGES)
    return found


def results(records, stage):
    return {r["check"]: r for r in records if r["event"] == "result" and r["stage"] == stage}


def test_nothing_failed_and_every_stage_was_done(records):
    assert records[0]["event"] == "started" and records[0]["jax"]
    assert {r["event"] for r in records} == {"started", "begins", "result", "stage"}
    ends = [(r["stage"], r["end"]) for r in records if r["event"] == "stage"]
    assert ends == [(stage.name, "done") for stage in STAGES]


def test_every_kernel_is_checked_in_every_number_type(records):
    found = results(records, "correctness")
    kernels = ["kv_decode", "hidden_decode", "kv_prefix", "hidden_prefix", "chunk", "writes"]
    wanted = {(kernel, dtype) for kernel in kernels for dtype in ("bfloat16", "int8")}
    assert {tuple(name.split()[:2]) for name in found} == wanted - {("chunk", "int8")}
    assert all(r["difference"] <= r["tolerance"] and r["seconds"] > r["compile_s"] >= 0 for r in found.values())
    assert sum(r["compile_s"] + r["lower_s"] for r in found.values()) > 1


def test_attention_is_a_share_of_a_copy(records):
    found = results(records, "attention")
    speed = found.pop("copy")["copy_bytes_per_s"]
    measured = {(r["way"], r["cache_dtype"], r["implementation"]): r for r in found.values()}
    kernels = {(way, dtype, "pallas") for way in ("kv", "hidden") for dtype in ("auto", "int8")}
    assert set(measured) == kernels | {("kv", "auto", "xla"), ("hidden", "auto", "xla")}
    for r in measured.values():
        assert r["copy_share"] == pytest.approx(r["bytes_per_s"] / speed) and r["copy_share"] > 0
        assert r["relative_difference"] < 0.02
    assert measured["kv", "int8", "pallas"]["block_size"] == 32


def test_chunks_over_prefixes_of_both_kinds(records):
    measured = {(r["kind"], r["cached"] > 0, r["implementation"]): r for r in results(records, "chunks").values()}
    shapes = [("kv", True), ("hidden", True), ("kv", False)]
    assert set(measured) == {(*shape, by) for shape in shapes for by in ("kernel", "xla")}
    assert all(r["flops_per_s"] > 0 for r in measured.values())


def test_steps_have_a_floor_and_rho(records):
    found = results(records, "steps")
    models = ["opt-125m float32 2 layers", "opt-125m float32 12 layers", "opt-125m int8 2 layers"]
    assert list(found) == [name for each in models for name in (f"engine {each}", f"{each} 2x32")]
    steps = [r for r in found.values() if "steps" in r]
    for r in steps:
        assert [step["kind"] for step in r["steps"]] == ["kv", "hidden"] and isinstance(r["rho_s"], float)
        assert all(step["floor_share"] > 0 for step in r["steps"])


def test_two_policies_at_two_rates_the_higher_first(records):
    found = results(records, "serving")
    runs = ["apt/hybrid at 4/s", "fcfs/kv at 4/s", "apt/hybrid at 2/s", "fcfs/kv at 2/s"]
    assert [name for name in found if " at " in name] == runs
    for name in runs:
        assert 0 <= found[name]["strict_attainment"] <= 1 and found[name]["output_tokens"] > 0
        assert found[name]["ttft_s"]["p50"] <= found[name]["ttft_s"]["p99"] and found[name]["tbt_s"]["p99"] > 0
    engine = found["engine apt/hybrid"]
    assert (engine["layers"], engine["scheduled_blocks"]) == (12, 32), "all layers were measured before"


@pytest.mark.skipif(not has_compiler(), reason="jax[cuda13] is not installed; run make test-aot")
@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("way", ["kv", "hidden"])
def test_the_programs_that_time_attention_compile_for_an_h200(way, cache):
    """The first shape, as `kernel_runs` repeats it over the layers of a pool."""
    shape, sharding = GPU.decodes[0], h200()
    block_size = GPU.block_size if cache == "auto" else GPU.int8_block_size
    blocks, pages, wide = 4096, shape.context_tokens // block_size, shape.hidden_size if way == "hidden" else 128
    kernels = gpu_kernels("9.0")

    def attend(i, arguments):
        queries, pool, scales, *tables, length = arguments
        options = {} if scales is None else {"scales": scales}
        return getattr(kernels, f"{way}_decode")(queries, pool, *tables, length, **options)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tables = [array((shape.batch, pages), jnp.int32)] * (1 if way == "hidden" else 2)
    numbers = jnp.bfloat16 if cache == "auto" else jnp.int8
    scales = None if cache == "auto" else array((blocks, 1, scale_row(block_size, 40)), jnp.float32)
    pool = array((blocks, block_size, shape.hidden_size), numbers)
    queries, length = array((shape.batch, 40, wide), jnp.bfloat16), array((shape.batch,), jnp.int32)
    with jax.default_device(next(iter(sharding.device_set))):
        repeated(attend, 4).lower(queries, pool, scales, *tables, length).compile()


@pytest.mark.skipif(not has_compiler(), reason="jax[cuda13] is not installed; run make test-aot")
@pytest.mark.parametrize("tokens", [tokens for tokens, _ in GPU.chunks])
def test_a_chunk_over_hidden_vectors_compiles_for_an_h200(tokens):
    """Absorbed and projected, in one program."""
    base = ChunkResult(GPU.chunk_model, tokens, 1, "kernel", GPU.chunks[0][1], kind="hidden")
    shapes = jax.eval_shape(lambda: chunk_runs._of_hidden(base)[0])
    sharding = h200()
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in shapes]
    with jax.default_device(next(iter(sharding.device_set))):
        program = repeated(lambda i, given: chunk_runs._over_hidden(gpu_kernels("9.0"), *given), 4)
        program.lower(*arguments).compile()
