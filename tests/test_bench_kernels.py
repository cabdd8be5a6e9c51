"""`apt-jax bench kernels`: counts by hand, measuring on the CPU that is here, and one failure among many results."""

import json

import jax
import pytest

from apt_jax.scheduling.hardware import HARDWARE
from serve.bench import kernel_runs, timing
from serve.bench.decode_steps import StepResult, rho_s
from serve.bench.kernel_counts import Shape, count, counted_table
from serve.bench.kernels import BenchKernels, run
from serve.bench.timing import Times


def test_counts_are_those_of_the_formulas():
    """OPT-13B: 40 heads of 128, 5,120 wide; 2 requests of 100 tokens."""
    shape = Shape("opt-13b", 2, 100)
    kv, hidden, recompute = (count(shape, way) for way in ("kv", "hidden", "recompute"))
    assert kv.flops == 2 * 2 * (2 * 100 * 5120) and hidden.flops == 40 * kv.flops
    vectors = 200 * 5120 * 2
    assert kv.bytes == 2 * vectors + 2 * 5120 * 6
    assert hidden.bytes == vectors + 40 * 2 * 5120 * 6
    assert recompute.flops == 2 * 200 * 2 * 5120**2 + kv.flops


def test_absorbed_is_memory_bound_and_faster_than_kv_on_an_h200():
    """The main claim of DESIGN 2.1, for long contexts; recomputing is compute-bound and many times slower."""
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
        ({"model": "opt-99b"}, "unknown model 'opt-99b'"),
        ({"batch": "8;9"}, "--batch"),
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
    for ours, theirs in ((keys, inputs.first), (values, inputs.second)):
        gathered = ours[:, table].transpose(1, 2, 3, 0, 4).reshape(2, 2, 16, 768)
        assert (gathered == inputs.pool[theirs]).all()


def test_rho_is_the_difference_per_cached_token():
    def result(kind: str, seconds: float) -> StepResult:
        return StepResult(8, 1000, kind, 0.0, times=Times(seconds, seconds, seconds))

    assert rho_s([result("kv", 0.010), result("hidden", 0.008)]) == {"8x1000": pytest.approx(-2.5e-7)}
    assert rho_s([result("hidden", 0.008)]) == {}


def test_clusters_are_measured_apart(capsys):
    """Elsewhere than on Hopper a result says why not."""
    assert run(BenchKernels(model="opt-30b", batch="1", context="64", clusters=True, allow_cpu=True)) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert "cluster" in line and "NotImplementedError: no cluster of at most 8 CUDA blocks holds 56" in line
