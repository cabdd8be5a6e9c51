"""What the command line hands on, to whom, and with which code it ends."""

import json
import runpy
import sys

import pytest

from apt_jax.serve.bench.offline import latency, throughput
from apt_jax.serve.bench.offline.options import BenchLatency, BenchThroughput
from apt_jax.serve.bench.serving import measure
from apt_jax.serve.bench.serving.options import BenchServe
from apt_jax.serve.cli import Bench, Serve, main, read_command, with_own_spelling
from tests.support.checkpoint_folders import VARIANTS, write_config


def run(*arguments):
    """Exit code of the command in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture
def called(monkeypatch):
    """What was called, with which arguments, in place of servers and engines."""
    calls = []

    def stands_for(name, code=0):
        return lambda *args, **options: calls.append((name, args, options)) or code

    monkeypatch.setattr("apt_jax.serve.http.server.serve", stands_for("serve", 3))
    monkeypatch.setattr("apt_jax.serve.batch.batch_jobs.run_batch", stands_for("run_batch", 4))
    monkeypatch.setattr("apt_jax.serve.replicas.batch.run_batch_on_ray", stands_for("run_batch_on_ray", 5))
    monkeypatch.setattr("apt_jax.serve.runtime.build.build_engine", stands_for("build_engine"))
    monkeypatch.setattr(
        "apt_jax.serve.runtime.starting.distributed.join", lambda options: options.process_id in (None, 0)
    )
    return calls


SEVERAL = ["--coordinator-address", "host:1", "--num-processes", "2", "--process-id"]


def test_process_0_serves_and_its_code_is_the_command_s(called):
    assert run("serve", "folder", "--port", 7, *SEVERAL, 0) == 3
    ((name, args, options),) = called
    assert (name, args[0], args[2].port, options) == ("serve", "folder", 7, {"leader_host": "host"})


def test_process_0_answers_a_batch(called):
    assert run("run-batch", "-i", "a", "-o", "b", "folder", "--served-model-name", "n", *SEVERAL, 0) == 4
    ((name, args, _),) = called
    assert (name, *map(str, args[:4]), args[-1]) == ("run_batch", "a", "b", "folder", "n", "host")


@pytest.mark.parametrize("command", [["serve"], ["run-batch", "-i", "a", "-o", "b"]])
def test_another_process_runs_what_process_0_runs(called, command):
    """It never gets an engine: the real `build_engine` ends with process 0."""
    with pytest.raises(AssertionError, match="only process 0 gets an engine"):
        main([*command, "folder", "--max-num-seqs", "3", "--revision", "r", *SEVERAL, "1"])
    ((name, args, options),) = called
    assert (name, args, options["engine_config"].max_num_seqs, options["revision"]) == (
        "build_engine",
        ("folder",),
        3,
        "r",
    )


def test_replicas_start_their_own_processes(called, capsys):
    assert run("serve", "--replicas", 2, *SEVERAL, 0) == 1 and not called
    assert "--replicas starts its own processes; leave --coordinator-address out" in capsys.readouterr().err
    assert run("serve", "--replicas", 2) == 3 and run("serve", *SEVERAL, 0) == 3 and len(called) == 2


@pytest.mark.parametrize(
    ("flags", "name"), [([], "apt-jax-demo"), (["folder"], "folder"), (["folder", "--served-model-name", "n"], "n")]
)
def test_a_batch_on_ray_has_a_name_for_its_model(called, flags, name):
    assert run("run-batch", "-i", "a", "-o", "b", "--ray", "local", *flags) == 5
    ((found, args, _),) = called
    assert (found, args[2].model_name, args[2].model) == ("run_batch_on_ray", name, flags[0] if flags else None)


def test_a_batch_whose_requests_may_be_abandoned_is_wrong_usage(called, capsys):
    assert run("run-batch", "-i", "a", "-o", "b", "--abandon-after", 5) == 2 and not called
    assert "offline requests are never abandoned" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_convert_says_what_it_wrote(tmp_path, capsys):
    write_config(tmp_path / "model", VARIANTS["plain"])
    assert run("convert", tmp_path / "model", tmp_path / "new", "--load-format", "dummy", "--dtype", "float16") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {tmp_path}/new (") and "bytes of float16 weights, " in said
    assert json.loads((tmp_path / "new" / "config.json").read_text())


@pytest.mark.parametrize(
    ("words", "module", "kind"),
    [("serve", measure, BenchServe), ("throughput", throughput, BenchThroughput), ("latency", latency, BenchLatency)],
)
def test_a_measurement_is_run_by_its_own_module(words, module, kind, monkeypatch):
    ran = []
    monkeypatch.setattr(module, "run", lambda args: ran.append(args) or 6)
    assert run("bench", words) == 6 and [type(args) for args in ran] == [kind]


def test_a_command_is_read_alone_or_with_its_group():
    assert isinstance(read_command(["serve"]), Serve)
    assert read_command(["bench", "latency"]) == Bench(BenchLatency()) == read_command(["bench", "latency"])
    with pytest.raises(SystemExit) as caught:
        read_command(["bench"])
    assert caught.value.code == 2


def test_only_a_flag_s_name_has_another_spelling():
    given = ["--kv-cache-dtype=--kv-cache-dtype", "--kv_cache_dtype", "a=b", "--x-y=z_w", "--a"]
    assert with_own_spelling(given) == ["--cache-dtype=--kv-cache-dtype", "--cache-dtype", "a=b", "--x-y=z_w", "--a"]


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (["--kv-offloading-size", "2"], ["--host-cache-bytes", "2147483648"]),
        (["--kv_offloading_size=0.5", "3"], ["--host-cache-bytes=536870912", "3"]),
        (["--kv-offloading-size", "many", "4"], ["--host-cache-bytes", "many", "4"]),
        (["--kv-offloading-size=inf"], ["--host-cache-bytes=inf"]),
        (["--host-cache-bytes", "2"], ["--host-cache-bytes", "2"]),
    ],
)
def test_the_size_of_host_memory_in_gib(given, own):
    assert with_own_spelling(given) == own


def test_the_arguments_are_the_process_s_where_none_are_given(monkeypatch):
    seen = []
    monkeypatch.setattr(Serve, "run", lambda self: seen.append(self.model) or 0)
    monkeypatch.setattr(sys, "argv", ["apt-jax", "serve", "folder"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0 and seen == ["folder"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_module_runs_as_a_program_and_not_when_it_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["apt-jax", "--help"])
    runpy.run_module("apt_jax.serve.cli", run_name="imported")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):  # what it does is tested in processes of its own
        runpy.run_module("apt_jax.serve.cli", run_name="__main__")


def test_an_error_of_the_system_names_its_file_in_words(monkeypatch, capsys):
    def fail(self):
        raise OSError(13, "Permission denied", "f")

    monkeypatch.setattr(Serve, "run", fail)
    assert run("serve") == 1
    assert capsys.readouterr().err == "error: f: permission denied\n"


def test_simulate_ends_with_0_whatever_its_figures_are(monkeypatch):
    ran = []
    monkeypatch.setattr("apt_jax.simulation.cli.run", lambda args: ran.append(args.rate) or {"runs": []})
    assert run("simulate", "--rate", 1) == 0 and ran == ["1"]
