"""`apt-jax bench kernels`: counts by hand, measuring on the CPU that is here, and one failure among many results."""

import json
import re
import sys

import jax
import pytest

from apt_jax.model_config import ModelConfig
from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.bench import decode_steps, kernel_parts, kernel_runs, timing, write_runs
from apt_jax.pallas_kernels.bench.chunk_runs import ChunkResult, row_tokens
from apt_jax.pallas_kernels.bench.decode_steps import StepResult, rho_s
from apt_jax.pallas_kernels.bench.kernel_counts import Shape, count, counted_table
from apt_jax.pallas_kernels.bench.kernels import BenchKernels, run
from apt_jax.pallas_kernels.bench.timing import Times
from apt_jax.scheduling.costs.hardware import HARDWARE


def test_counts_are_those_of_the_formulas():
    """OPT-13B: 40 heads of 128, 5,120 wide; 2 requests of 100 tokens."""
    shape = Shape("opt-13b", 2, 100)
    kv, hidden, recompute = (count(shape, way) for way in ("kv", "hidden", "recompute"))
    assert kv.flops == 2 * 2 * (2 * 100 * 5120) and hidden.flops == 40 * kv.flops
    vectors = 200 * 5120 * 2
    assert kv.bytes == 2 * vectors + 2 * 5120 * 6
    assert hidden.bytes == vectors + 40 * 2 * 5120 * 6
    kv, hidden = (count(shape, way, is_coded=True) for way in ("kv", "hidden"))
    assert kv.bytes == 2 * 200 * (5120 + 40 * 4) + 2 * 5120 * 6, "a scale for each head of a key or value"
    assert hidden.bytes == 200 * (5120 + 4) + 40 * 2 * 5120 * 6, "and one for each hidden vector"
    assert recompute.flops == 2 * 200 * 2 * 5120**2 + kv.flops


def test_absorbed_is_memory_bound_and_faster_than_kv_on_an_h200():
    """The main claim of docs/hybrid_cache.md, for long contexts; recomputing is compute-bound and many times slower."""
    chip = HARDWARE["h200"]
    shape = Shape("opt-13b", 32, 2048)
    kv, hidden, recompute = (count(shape, way) for way in ("kv", "hidden", "recompute"))
    assert hidden.bound_s(chip) == hidden.bytes / chip.bytes_per_s < 0.55 * kv.bound_s(chip)
    assert recompute.bound_s(chip) == recompute.flops / chip.flops_per_s > 20 * kv.bound_s(chip)


def test_table_has_a_row_per_shape_and_way_and_columns_per_chip():
    table = counted_table([Shape("opt-13b", 8, 1024), Shape("opt-30b", 8, 1024)], ["h200", "tpu7x"])
    lines = table.splitlines()
    assert len(lines) == 2 + 2 * 3
    assert "h200 us" in lines[1] and "tpu7x us" in lines[1]
    assert "35.0   1.00" in lines[2]  # 168 MB at 4.8 TB/s


def test_command_counts_and_writes_json(tmp_path, capsys):
    output = tmp_path / "counts.json"
    assert run(BenchKernels(device="v5e", model="opt-125m", batch="1,2", context="64", output=output)) == 0
    assert "tpu-v5e us" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert len(found["counts"]) == 2 * 3 and found["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "opt-99b"}, "unknown 'opt-99b'"),
        ({"batch": "8;9"}, "batch='8;9' must be whole numbers"),
        ({"context": "0"}, "at least 1"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        run(BenchKernels(device="h200", **flags))


def test_measuring_checks_first_and_survives_an_implementation_that_fails(monkeypatch, tmp_path, capsys):
    right = kernel_runs.Implementation("right", "kv", kernel_runs._xla_kv)
    wrong = kernel_runs.Implementation("wrong", "kv", lambda q, *rest: kernel_runs._xla_kv(2 * q, *rest))
    broken = kernel_runs.Implementation("broken", "hidden", lambda *_: 1 / 0)
    monkeypatch.setattr(kernel_runs, "implementations", lambda device: [broken, wrong, right])
    monkeypatch.setattr(timing, "REPEATS", 1)
    output = tmp_path / "kernels.json"
    flags = {"model": "opt-125m", "batch": "2", "context": "32", "output": output, "allow_cpu": True}
    assert run(BenchKernels(**flags)) == 0
    found = json.loads(output.read_text())
    first, second, third = found["kernels"]
    assert "ZeroDivisionError" in first["error"] and first["times"] is None
    assert "differs from the reference" in second["error"] and second["times"] is None
    assert third["error"] is None and third["times"]["median_s"] > 0 and third["relative_difference"] < 0.02
    assert found["copy_bytes_per_s"] > 0
    assert "not measured: ZeroDivisionError" in capsys.readouterr().out


def test_pools_by_head_hold_what_the_tables_name():
    """The arrays for jax's own kernel give the same keys and values as pool and tables, in every layer."""
    inputs = kernel_runs.make_inputs(Shape("opt-125m", 2, 32), "kv", 16)
    inputs = inputs._replace(layers=1)
    blocks, (q, keys, values, table, _, length) = kernel_runs._by_head(inputs, 12)
    assert blocks == 4 and keys.shape == (12, 4, 16, 64) and (length == 32).all() and q is inputs.queries
    for ours, theirs in ((keys, inputs.key_blocks), (values, inputs.value_blocks)):
        gathered = ours[:, table].transpose(1, 2, 3, 0, 4).reshape(2, 2, 16, 768)
        assert (gathered == inputs.pool[theirs]).all()


def test_rho_is_the_difference_per_cached_token():
    def result(kind: str, seconds: float) -> StepResult:
        return StepResult(8, 1000, kind, 0.0, times=Times(seconds, seconds, seconds))

    assert rho_s([result("kv", 0.010), result("hidden", 0.008)]) == {"8x1000": pytest.approx(-2.5e-7)}
    assert rho_s([result("hidden", 0.008)]) == {}


def test_chunks_are_measured_apart(monkeypatch, capsys, tmp_path):
    """One row and eight rows, and one over cached tokens of both kinds; checked against the reference first."""
    monkeypatch.setattr(timing, "REPEATS", 1)
    output = tmp_path / "chunks.json"
    flags = {"model": "opt-125m", "context": "16", "chunks": True, "allow_cpu": True, "output": output}
    assert run(BenchKernels(**flags)) == 0
    found = json.loads(output.read_text())["chunks"]
    shapes = [(r["rows"], r["cached"], r["kind"], r["implementation"], r["error"]) for r in found]
    expected = [(1, 0, "kv"), (8, 0, "kv"), (1, 16, "kv"), (1, 16, "hidden")]
    assert shapes == [(*shape, "xla", None) for shape in expected]
    assert all(r["relative_difference"] < 0.02 and r["times"]["median_s"] > 0 for r in found)
    assert "opt-125m      16    8      0 kv     xla" in capsys.readouterr().out


def test_writes_are_measured_apart(monkeypatch, capsys, tmp_path):
    """A token of each of three rows, and 40 tokens of one row over several blocks."""
    monkeypatch.setattr(timing, "REPEATS", 1)
    output = tmp_path / "writes.json"
    flags = {"model": "opt-125m", "batch": "3", "context": "40", "writes": True, "allow_cpu": True, "output": output}
    assert run(BenchKernels(**flags)) == 0
    found = json.loads(output.read_text())["writes"]
    shapes = [(r["tokens"], r["rows"], r["implementation"], r["error"]) for r in found]
    assert shapes == [(3, 3, "xla", None), (40, 1, "xla", None)]
    assert all(r["times"]["median_s"] > 0 for r in found)
    assert "opt-125m      40    1 xla" in capsys.readouterr().out


def test_a_write_that_differs_is_not_timed():
    def wrong(*places):
        write = reference.cache_writer(*places)
        return lambda *args: write(*args).at[-1, -1, -1].add(1)

    with pytest.raises(ArithmeticError, match="differs from what the scatter makes of it"):
        write_runs._run(write_runs.WriteResult("opt-125m", 4, 4, "wrong"), wrong, 16)


def test_work_of_a_chunk():
    assert row_tokens(10, 4) == [3, 3, 2, 2]
    pairs = 6 + 6 + 3 + 3
    assert ChunkResult("opt-125m", 10, 4, "xla").flops == 4 * 768 * pairs
    assert ChunkResult("opt-125m", 10, 1, "xla", cached=20).flops == 4 * 768 * 200


@pytest.mark.parametrize("flag", ["end_to_end", "chunks", "writes"])
def test_measuring_needs_an_accelerator(flag):
    with pytest.raises(ValueError, match="needs an accelerator"):
        run(BenchKernels(**{flag: True}))


def test_all_needs_a_folder():
    with pytest.raises(ValueError, match="-o FOLDER"):
        run(BenchKernels(all=True))


def test_a_part_that_hangs_is_ended_and_leaves_what_it_said(tmp_path, capsys, monkeypatch):
    says = "import time; print('a line', flush=True); time.sleep(60)"
    code = kernel_parts._run_part([sys.executable, "-c", says], tmp_path / "part.txt", limit_s=1)
    assert code < 0 and (tmp_path / "part.txt").read_text() == "a line\n"
    assert "killed by signal 9; a part may take 1 s" in capsys.readouterr().out


@pytest.mark.parametrize(("broken", "code"), [("writes", 0), ("end-to-end", 1)])
def test_parts_run_apart_and_one_that_fails_leaves_the_others(broken, code, tmp_path, capsys, monkeypatch):
    seen = []

    def run_part(command, text, limit_s):
        seen.append(command)
        return 3 if text.stem == broken else 0

    monkeypatch.setattr(kernel_parts, "_run_part", run_part)
    flags = {"model": "opt-125m", "batch": "2", "output": tmp_path / "new", "allow_cpu": True, "all": True}
    assert run(BenchKernels(**flags)) == code
    assert [command[-3] for command in seen] == ["--allow-cpu", "--chunks", "--writes", "--end-to-end"]
    assert all("--all" not in command and "opt-125m" in command for command in seen)
    assert f"{broken} ended with 3" in capsys.readouterr().out


def test_summary_holds_results_against_the_aims():
    def kernel(way, implementation, batch, seconds, share=0.5):
        times = seconds and {"median_s": seconds}
        shape = {"model": "opt-13b", "batch": batch, "context_tokens": 512}
        return {**shape, "way": way, "implementation": implementation, "times": times, "copy_share": share}

    def chunk(implementation, seconds, cached=0, kind="kv"):
        return {"model": "opt-13b", "tokens": 512, "rows": 1, "cached": cached, "kind": kind,
                "implementation": implementation, "times": {"median_s": seconds}}  # fmt: skip

    steps = [
        {"kind": kind, "floor_s": 1.0, "times": {"median_s": seconds}}
        for kind, seconds in (("kv", 2), ("hidden", 1.25))
    ]
    lines = kernel_parts.summary({
        "attention": {"kernels": [
            kernel("kv", "pallas", 8, 1.0, share=0.3), kernel("kv", "pallas", 32, 2.0, share=0.85),
            kernel("kv", "pallas", 128, 8.0, share=0.9), kernel("hidden", "pallas", 32, 1.0),
            kernel("kv", "jax", 8, None),
        ]},
        "chunks": {"chunks": [
            chunk("xla", 2.0), chunk("kernel", 0.5), chunk("xla", 5.0, 512), chunk("kernel", 0.5, 512),
            chunk("xla", 4.0, 512, "hidden"), chunk("kernel", 1.0, 512, "hidden"),
        ]},
        "writes": {"writes": [chunk("xla", 8.0), chunk("kernel", 2.0)]},
        "end-to-end": {"end_to_end": {"model": "opt-13b", "steps": steps, "rho_s": {"32x512": -2e-9}}},
    })  # fmt: skip
    assert lines == [
        "opt-13b: KV by the kernel, share of a copy at batch >= 32 (aim 0.8): 0.85 to 0.90",
        "opt-13b: time of hidden by pallas, against KV by the kernel (aim 0.6): 0.50 to 0.50",
        "opt-13b: a chunk among itself, time of the kernel against XLA: 0.25 to 0.25",
        "opt-13b: a chunk over a cached prefix, time of the kernel against XLA: 0.10 to 0.10",
        "opt-13b: a chunk over cached hidden vectors, time of the kernel against XLA: 0.25 to 0.25",
        "opt-13b: writing to the cache, time of the kernel against XLA: 0.25 to 0.25",
        "opt-13b: floor of a kv decode step against its time: 0.50 to 0.50",
        "opt-13b: floor of a hidden decode step against its time: 0.80 to 0.80",
        "opt-13b: rho, ns per hidden token and step: -2.00 to -2.00",
    ]
    assert kernel_parts.summary({}) == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"batch": "8,8"}, "batch='8,8' has 8 twice; leave one out"),
        ({"batch": "0"}, "batch='0' must be whole numbers separated by commas, at least 1"),
        ({"context": ""}, "context='' must be whole numbers"),
        ({"context": "1000000000"}, "batch='8,32,128' and context='1000000000' are more than 1,000,000,000 tokens"),
        ({"model": "opt-13b,opt-13b"}, "model='opt-13b,opt-13b' has opt-13b twice"),
        ({"model": "opt-7b"}, "model='opt-7b': unknown 'opt-7b'; known: opt-125m"),
        ({"block_size": 0}, "block_size=0 must be a power of two, at most 128"),
        ({"chunks": True, "writes": True}, "--chunks and --writes measure different things; give one of them"),
        ({"end_to_end": True, "all": True}, "--end-to-end and --all measure different things"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_sentence(flags, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        run(BenchKernels(device="h200", **flags))


def test_whole_steps_are_measured_beside_layers_of_every_form():
    """Beside C++ layers, where this host compiles them, a step is a turn of a loop whose results are only read."""
    config = ModelConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, ffn_dim=64, max_position_embeddings=64,
        num_attention_heads=2, word_embed_proj_dim=64,
    )  # fmt: skip
    engine = decode_steps.make_engine(config, dtype="float32", batch=2, context_tokens=32, block_size=16)
    found = decode_steps.measure_steps(engine, [2], [32], 1e10, lambda result: None)
    assert [(result.kind, result.error) for result in found] == [("kv", None), ("hidden", None)]
    assert all(result.times is not None and result.times.fastest_s > 0 for result in found)
