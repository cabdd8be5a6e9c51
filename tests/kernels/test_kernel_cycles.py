"""Static cycles from a final program's text; `tests/aot/test_tpu_cycles.py` reads real ones."""

import json

import pytest

from apt_jax.pallas_kernels.bench import kernel_cycles, tpu_compiler
from apt_jax.pallas_kernels.bench.kernel_cycles import compile_static, loop_cycles, spills, used_vmem_bytes
from apt_jax.pallas_kernels.bench.kernels import BenchKernels, run

# rows: 2 bundles of its own; chunks: 3, with a loop of 2 over pages and one of 1; before them a loop of 1 in no chunk
PROGRAM = """= control target key start
LB: loop body

     0   :  { %a = x }
   0x1 LB: > { %b = x }
   0x2 LB: >> { %first = x }
   0x3 LB: >> { %c = x  ;;  %d = y }
   0x4   : >> { %e = x }
   0x5 LB: >>> { %start = x }
   0x6   :  {} /* a region ends */
   0x7 LB: >>> { %wait = x }
   0x8 PF: >> { %f = x }
   0x9 PF: > { %g = x }
   0xa   :  { %h = x }
"""


def test_a_chunk_takes_its_own_bundles_and_the_shortest_inner_loop_per_page():
    assert loop_cycles(PROGRAM, pages=8) == 3 + 8 * 1


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("no such dump", "no loop inside the loop over rows"),
        (PROGRAM.replace(">>>", ">>").replace("LB: >> { %wait", "  : >> { %wait"), "no loop that waits for pages"),
    ],
)
def test_a_program_without_the_loops_is_not_guessed_at(program, reason):
    with pytest.raises(ValueError, match=reason):
        loop_cycles(program, pages=8)


def test_spills_are_stores_of_vector_registers():
    store, load = "vst [vmem:[#allocation71_spill] sm:$0xff] %v1", "%v2 = vld [vmem:[#allocation71_spill] sm:$0xff]"
    other = "vst [vmem:[#allocation7 + $0x440] sm:$0xff] %v3 ;; %s1 = sst [smem:[#allocation82_spill]] %s2"
    assert spills(f"{{ {store}  ;;  {other} }}\n{{ {load} }}\n{{ {store} }}\n") == 2


def test_vmem_is_that_of_the_one_kernel():
    call = '%a = f32[8]{0} custom-call(), custom_call_target="tpu_custom_call", backend_config={"x":1,'
    used = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"5447680"}]}'
    other = "%b = f32[8]{0} fusion(), backend_config={" + used.replace("5447680", "1024")
    assert used_vmem_bytes(f"{other}\n{call}{used}\n") == 5447680
    assert used_vmem_bytes(other) is None, "no kernel"


def test_without_libtpu_the_table_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tpu_compiler, "MISSING", "libtpu is not installed")
    flags = {"model": "opt-125m", "batch": "1", "context": "64", "output": tmp_path / "counts.json"}
    assert run(BenchKernels(device="v5e", **flags)) == 0
    assert capsys.readouterr().out.count("not known: libtpu is not installed; pip install 'jax[tpu]'") == 2
    static = json.loads((tmp_path / "counts.json").read_text())["static"]
    assert [(line["way"], line["cycles_per_token"]) for line in static] == [("kv", None), ("hidden", None)]
    assert run(BenchKernels(device="h200", **flags)) == 0
    assert "compiled for TPUs" not in capsys.readouterr().out


def test_a_compiler_that_fails_is_a_line_of_the_table(monkeypatch):
    monkeypatch.setattr(tpu_compiler, "MISSING", None)
    monkeypatch.setattr(kernel_cycles.sys, "executable", "/bin/false")
    assert compile_static("v5e", "opt-125m", "kv", 16).line().endswith("not known: the compiler failed")
