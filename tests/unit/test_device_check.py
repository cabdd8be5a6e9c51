"""`make device-check`: what hangs or crashes is ended and the rest goes on, and results survive any end.

`tests/aot/test_device_check.py` runs all of its stages.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from experiments.device_check.__main__ import STAGES, attention_backend, chosen, main, parsed
from experiments.device_check.records import Records, begin, begun, read_records, under_way
from experiments.device_check.summary import failures, line, table
from experiments.device_check.supervisor import MOST_STARTS, OVER, Stage, Supervisor

ROOT = Path(__file__).parents[2]
# runs the measurements that were not begun; each is Python to execute
STAGE = """
import os, sys, time
from pathlib import Path
from experiments.device_check.records import Records, begun, read_records
from experiments.device_check.supervisor import end_with_parent
end_with_parent()
path, stage, *measurements = sys.argv[1:]
records = Records(Path(path))
for name, code in (each.split("=", 1) for each in measurements):
    if name not in begun(read_records(Path(path)), stage):
        records.add("begins", stage=stage, check=name, limit_s=1.5)
        exec(code)
        figures = dict(difference=0.0, tolerance=1.0, seconds=0.0, compile_s=0.0, lower_s=0.0)
        records.add("result", stage=stage, check=name, **figures)
"""
HANGS, CRASHES, WORKS = "time.sleep(600)", "os._exit(9)", "pass"


def run(path, stages, seconds=120.0):
    """Records of a check whose stages do what `stages` says, and how each ended."""
    given = {}

    def command(stage, seconds):
        given[stage.name] = seconds
        return [sys.executable, "-c", STAGE, str(path), stage.name, *stages[stage.name]]

    supervisor = Supervisor(Records(path), command, {**os.environ, "PYTHONPATH": str(ROOT)}, path.with_name("log.txt"))
    return supervisor.run([Stage(name, 10.0) for name in stages], seconds), read_records(path), given


def events(records, stage):
    return [(r["event"], r["check"]) for r in records if r.get("stage") == stage and "check" in r]


@pytest.mark.parametrize(("fault", "why"), [(HANGS, "no answer after 2 s"), (CRASHES, "exit code 9")])
def test_a_measurement_that_hangs_or_crashes_is_ended_and_the_rest_goes_on(fault, why, tmp_path):
    stages = {"first": [f"a={WORKS}", f"b={fault}", f"c={WORKS}"], "second": [f"d={WORKS}"]}
    ends, records, _ = run(tmp_path / "results.jsonl", stages)
    assert ends == {"first": "done", "second": "done"}
    assert events(records, "first") == [
        ("begins", "a"), ("result", "a"), ("begins", "b"), ("ended", "b"), ("begins", "c"), ("result", "c"),
    ]  # fmt: skip
    assert [r["reason"] for r in records if r["event"] == "ended"] == [why] and failures(records) == ["b"]
    assert events(records, "second") == [("begins", "d"), ("result", "d")]
    shown = table(records)
    assert f"| b | ended: {why} |" in shown and "| c | differs by 0.0e+00 of at most 1e+00 | 0.0 | 0.0 |" in shown


def test_a_stage_that_hangs_before_it_measures_loses_its_own_time_only(tmp_path):
    """The first has half of the time; the second gets all that is left."""
    path = tmp_path / "results.jsonl"
    stages = {"first": [f"a={WORKS}"], "second": [f"b={WORKS}"]}
    original = STAGE.replace("end_with_parent()", "stage = sys.argv[2]; stage == 'first' and time.sleep(600)")

    def command(stage, seconds):
        return [sys.executable, "-c", original, str(path), stage.name, *stages[stage.name]]

    supervisor = Supervisor(Records(path), command, {**os.environ, "PYTHONPATH": str(ROOT)}, tmp_path / "log.txt")
    started = time.monotonic()
    ends = supervisor.run([Stage("first", 2.0), Stage("second", 60.0)], 62.0)
    assert ends == {"first": OVER, "second": "done"} and time.monotonic() - started < 60
    assert events(read_records(path), "second") == [("begins", "b"), ("result", "b")]


def test_a_stage_that_ends_at_once_is_not_started_for_ever(tmp_path):
    path, starts = tmp_path / "results.jsonl", []

    def command(stage, seconds):
        starts.append(seconds)
        return [sys.executable, "-c", "import sys; sys.exit(5)"]

    ends = Supervisor(Records(path), command, dict(os.environ), tmp_path / "log.txt").run([Stage("first", 9.0)], 60.0)
    assert ends == {"first": "exit code 5"} and len(starts) == 1 < MOST_STARTS


def test_time_that_a_stage_saves_goes_to_the_next(tmp_path):
    _, _, given = run(tmp_path / "results.jsonl", {"first": [f"a={WORKS}"], "second": [f"b={WORKS}"]}, seconds=600.0)
    assert given["first"] == pytest.approx(300, abs=1) and given["second"] > 400


def test_results_survive_a_kill_and_no_stage_is_left(tmp_path):
    """SIGKILL of the process that runs the stages while one of them measures."""
    path = tmp_path / "results.jsonl"
    runs = f"""
from pathlib import Path
import tests.unit.test_device_check as t
t.run(Path({str(path)!r}), {{"first": ["a={WORKS}", "b=time.sleep(599)"]}}, seconds=500.0)
"""
    script = runs.replace("import tests", "import sys; import tests")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while under_way(read_records(path), "first") is None or begun(read_records(path), "first") != {"a", "b"}:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (stage,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert events(read_records(path), "first") == [("begins", "a"), ("result", "a"), ("begins", "b")]
    assert psutil.wait_procs([stage], timeout=60)[1] == [], "the stage ends with what started it"


def test_half_a_line_is_not_read_until_it_is_whole(tmp_path):
    records = Records(tmp_path / "results.jsonl")
    records.add("skipped", stage="first", check="a", reason="why")
    with records.path.open("a") as file:
        file.write('{"event": "res')
        file.flush()
        assert [r["event"] for r in records.new()] == ["skipped"] and records.new() == []
        file.write('ult"}\n')
    assert [r["event"] for r in records.new()] == ["result"] and begin() <= time.monotonic()


def test_engines_do_without_kernels_that_did_not_come_back():
    """A kernel that hung would hang again where an engine checks it; one that lacked time says nothing."""
    hung = {"event": "ended", "stage": "correctness", "check": "kv_decode", "reason": "no answer after 60 s"}
    late = {**hung, "reason": OVER}
    assert [attention_backend(records) for records in ([], [late], [late, hung])] == ["auto", "auto", "xla"]
    assert attention_backend([{**hung, "stage": "attention"}]) == "auto"


def test_stages_keep_their_order_and_impossible_arguments_are_named(tmp_path):
    assert [stage.name for stage in chosen("serving,attention")] == ["attention", "serving"]
    assert sum(stage.planned_s for stage in STAGES) == 60 * parsed([]).minutes
    with pytest.raises(ValueError, match=r"^stages='all': unknown 'all'; known: correctness, attention, "):
        main(parsed(["--stages", "all", "--results", str(tmp_path)]))
    with pytest.raises(ValueError, match=r"^minutes=0 must be above 0"):
        main(parsed(["--minutes", "0", "--results", str(tmp_path)]))


def test_a_line_says_what_was_measured():
    times = {"median_s": 123e-6}
    base = {"at_s": 12.0, "stage": "x", "check": "kv", "seconds": 3.0, "compile_s": 1.5, "lower_s": 0.5}
    result = {**base, "event": "result", "copy_share": 0.81, "times": times}
    assert line(result) == "    12 s  kv: 123 us, 81.0% of a copy (3.0 s, 2.0 of them compiling)"
    steps = [{"kind": "kv", "times": times, "floor_share": 0.5}, {"kind": "hidden", "times": None, "error": "no room"}]
    assert "kv 0.12 ms, floor 50.0%, hidden not measured: no room (" in line(
        {**base, "event": "result", "steps": steps, "rho_s": None}
    )
    assert (
        line({**base, "event": "error", "error": "E: x"}) == "    12 s  kv: FAILED E: x (3.0 s, 2.0 of them compiling)"
    )
    assert line({**base, "event": "begins"}) is None


def test_it_needs_nothing_that_only_the_server_needs():
    """So that it runs from the tree on a machine with JAX and what comes with it."""
    names = ["tyro", "starlette", "uvicorn", "pydantic", "llguidance", "python_multipart", "aiohttp", "jinja2"]
    modules = [f"experiments.device_check.{stage.name}" for stage in STAGES]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({names!r}))  # importing one raises
for module in {["experiments.device_check.__main__", *modules]!r}:
    importlib.import_module(module)
"""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
