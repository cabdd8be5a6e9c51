"""The command line: flags, help, and errors of one sentence."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import pytest

import apt_jax.serve.cli
import apt_jax.serve.runtime.build
from apt_jax.engine_config import EngineConfig
from apt_jax.serve.cli import COMMANDS, main
from apt_jax.serve.logs import tell
from apt_jax.serve.options import LoadOptions, ServerOptions
from apt_jax.serve.replicas.options import parse_resources


@pytest.fixture
def ran(monkeypatch):
    """Commands that `main` would have run."""
    commands = []
    for kind in (apt_jax.serve.cli.Serve, apt_jax.serve.cli.RunBatch, apt_jax.serve.cli.Convert):
        monkeypatch.setattr(kind, "run", lambda self: commands.append(self) or 0)
    return commands


def run(*arguments):
    """Exit code of the command in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_serve_without_arguments_takes_every_default(ran):
    assert run("serve") == 0
    assert ran == [apt_jax.serve.cli.Serve()]
    assert ran[0].engine == EngineConfig() and ran[0].model is None


def test_flags_are_flat_and_hyphenated(ran):
    flags = ["--max-num-seqs", 8, "--cache-mode", "hidden", "--ttft-slo-ms", 250, "--port", 0, "--load-format", "dummy"]
    assert run("serve", "folder", *flags) == 0
    (command,) = ran
    assert command.model == "folder"
    assert command.engine == EngineConfig(max_num_seqs=8, cache_mode="hidden", ttft_slo_ms=250.0)
    assert command.server == ServerOptions(port=0) and command.load == LoadOptions(load_format="dummy")


def test_a_flag_of_one_value_that_is_given_twice_has_the_last_one(ran):
    """As argparse has it, and so vLLM: a script's flags can be overridden by those appended to it."""
    assert run("serve", "--port", 1, "--cache-mode", "kv", "--port=2", "--cache-mode", "hidden") == 0
    assert (ran[0].server.port, ran[0].engine.cache_mode) == (2, "hidden")


def test_a_full_standard_output_is_told_before_the_work(ran, monkeypatch, capfd):
    ran_simulations = []
    monkeypatch.setattr(apt_jax.serve.cli.Simulate, "run", lambda self: ran_simulations.append(self) or 0)
    output, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, 1)
        assert run("simulate") == 1 and run("convert", "a", "b") == 1 and not ran_simulations and not ran
        assert run("serve") == 0 and len(ran) == 1, "a server prints nothing there"
        os.close(1)
        assert run("simulate") == 0 and len(ran_simulations) == 1, "nor does one whose output is closed"
    finally:
        os.dup2(output, 1)
        os.close(output)
        os.close(full)
    assert capfd.readouterr().err == "error: standard output: no space left on device\n" * 2


@pytest.mark.parametrize("flags", [["--cache-dtype", "int8"], ["--kv-cache-dtype", "int8"], ["--kv_cache_dtype=int8"]])
def test_the_number_type_of_the_cache_has_two_spellings(ran, flags):
    assert run("serve", *flags) == run("run-batch", "-i", "in", "-o", "out", *flags) == 0
    assert [command.engine for command in ran] == [EngineConfig(cache_dtype="int8")] * 2


def test_every_field_of_the_engine_configuration_is_a_flag(capsys):
    for command in ("serve", "run-batch"):
        assert run(command, "--help") == 0
        text = capsys.readouterr().out
        for field in dataclasses.fields(EngineConfig):
            assert f"--{field.name.replace('_', '-')}" in text


def test_run_batch_takes_input_output_and_model(ran, tmp_path):
    assert run("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "folder", "--max-model-len", 64) == 0
    (command,) = ran
    assert (command.input.name, command.output.name, command.model) == ("in.jsonl", "out.jsonl", "folder")
    assert command.engine.max_model_len == 64


def test_convert_takes_source_and_destination(ran):
    assert run("convert", "a", "b", "--dtype", "bfloat16") == 0
    assert (ran[0].source, str(ran[0].destination), ran[0].dtype) == ("a", "b", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Expected one of {serve, run-batch, convert, simulate, plan, bench}"),
        (["sreve"], "sreve"),
        (["serve", "--max-num-seq", "3"], "--max-num-seqs"),
        (["serve", "--block-size", "3"], "block_size=3 must be a power of"),
        (["serve", "--cache-mode", "both"], "both"),
        (["serve", "--kv-cache-dtype", "fp8"], "cache_dtype='fp8' is not offered"),
        (["serve", "--cache-dtype", "int4"], "cache_dtype='int4' is not one of auto, int8"),
        (["serve", "--port", "70000"], "port=70000 must be between 0 and 65535"),
        (["run-batch", "-i", "x"], "--output"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments, sentence, capsys):
    assert run(*arguments) == 2
    text = capsys.readouterr().err
    assert sentence in " ".join(text.replace("│", " ").split()) and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["simulate", "--jobs", "x"], "Error parsing --jobs: 'x' is not a whole number"),
        (["simulate", "--jobs", "1.5"], "Error parsing --jobs: '1.5' is not a whole number"),
        (["simulate", "--seed="], "Error parsing --seed: '' is not a whole number"),
        (["simulate", "--cv", "wide"], "Error parsing --cv: 'wide' is not a number"),
        (["serve", "--port", "http"], "Error parsing --port: 'http' is not a whole number"),
        (["bench", "latency", "--batch-size", "1e3"], "Error parsing --batch-size: '1e3' is not a whole number"),
    ],
)
def test_a_value_that_is_no_number_is_told_in_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(*arguments) == 2
    text = capsys.readouterr().err
    assert sentence in text and "could be instantiated" not in text


def test_numbers_that_may_be_left_out_may_be_none(ran):
    assert run("serve", "--max-num-seqs", "None", "--max-model-len", "64", "--max-step-seconds", "1e2") == 0
    (command,) = ran
    assert (command.engine.max_num_seqs, command.engine.max_model_len) == (None, 64)
    assert command.server.max_step_seconds == 100.0


LEAVES = [name for name in COMMANDS if name != "bench"]


@pytest.mark.parametrize("name", LEAVES)
def test_an_error_points_to_the_help_of_its_own_command(name, capsys):
    assert run(*name.split(), "--no-such-flag") == 2
    assert f"apt-jax {name} --help" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "simulate",
            "default: the gap SLO or, if larger, that of the first token up to 1 s.",
        ),
        ("serve", "adds; default: the larger of --tbt-slo-ms and the smaller of --ttft-slo-ms and 1000."),
        (
            "bench serve",
            "headers x-slo-ttft-ms, x-slo-tbt-ms and x-slo-stall-ms; servers that do not know them ignore them.",
        ),
        (
            "bench throughput",
            "a CSV file with prompt_tokens, output_tokens and, optionally, arrival_s; a ShareGPT",
        ),
    ],
)
def test_help_is_broken_where_the_terminal_ends_and_nowhere_else(name, text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert run(*name.split(), "--help") == 0
    assert text in capsys.readouterr().out


def test_an_error_of_the_system_is_a_sentence_without_its_number(capsys):
    tell(FileNotFoundError(2, "No such file or directory", "a.jsonl"))
    assert capsys.readouterr().err == "error: No such file or directory: 'a.jsonl'\n"
    tell(OSError(28, "No space left on device"))
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_the_package_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "apt_jax.serve", "simulate", "--rate", "0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.startswith("error: rate='0' must be numbers")


def command(*arguments):
    """The command in a process of its own."""
    line = [sys.executable, "-m", "apt_jax.serve.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_help_does_not_import_jax():
    code = (
        "import sys; sys.argv = ['apt-jax', '--help']\n"
        "try:\n  from apt_jax.serve.cli import COMMANDS, main; main()\n"
        "finally:\n  print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "run-batch" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"jax", "numpy", "flax", "transformers", "pydantic", "uvicorn"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "no/such/folder/at/all", "--port", "0"], "there is no folder no/such/folder/at/all"),
        (["serve", "{tmp}/broken", "--port", "0"], "{tmp}/broken/config.json: unsupported model_type='bert'"),
        (["serve", "--chat-template", "{tmp}/broken/bad.jinja"], "{tmp}/broken/bad.jinja is not a Jinja template"),
        (["serve", "--chat-template", "{tmp}/none", "--port", "0"], "{tmp}/none: no such file or directory"),
        (["serve", "--chat-template", "{tmp}/broken", "--port", "0"], "{tmp}/broken is a folder; a file is needed"),
        (["serve", "{tmp}/pipe", "--port", "0"], "{tmp}/pipe/config.json is a pipe or a device"),
        (["convert", "no/such/folder/at/all", "{tmp}/out"], "there is no folder no/such/folder/at/all"),
        (["run-batch", "-i", "{tmp}/none.jsonl", "-o", "{tmp}/out.jsonl"], "--input {tmp}/none.jsonl does not exist"),
    ],
)
def test_what_cannot_be_done_ends_with_1_and_one_sentence(arguments, sentence, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "broken/bad.jinja").write_text("{% for %}")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/config.json")
    assert run(*(argument.format(tmp=tmp_path) for argument in arguments)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence.format(tmp=tmp_path) in line


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        began = time.monotonic()
        done = command("serve", tmp_path, "--port", taken.getsockname()[1])
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert done.stderr.startswith("error: cannot listen on 127.0.0.1:")
    assert "choose another --host or --port" in done.stderr


def test_a_simulated_int8_cache_is_larger_and_named(tmp_path):
    flags = "--model opt-125m --hardware tpu-v5e --workload humaneval --num-requests 9 --policies fcfs --cache-modes kv"
    found = []
    for dtype in ("auto", "int8"):
        more = [
            "--effective-throughput",
            "0.9",
            "--duration-s",
            "1",
            "--cache-dtype",
            dtype,
            "--json",
            tmp_path / dtype,
        ]
        assert run("simulate", *flags.split(), *more) == 0
        found.append(json.loads((tmp_path / dtype).read_text()))
        assert {row["cache_dtype"] for row in found[-1]["effective_throughput"]} == {dtype}
    assert found[1]["num_blocks"] / found[0]["num_blocks"] == pytest.approx(2 / (1 + 4 / 64), rel=0.01)


def test_simulate_prints_a_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = "--model opt-125m --hardware tpu-v5e --workload humaneval --rate 0.03 --num-requests 9 --policies fcfs"
    assert run("simulate", *flags.split(), "--cache-modes", "kv", "--json", str(out)) == 0
    record = json.loads(out.read_text())["runs"][0]
    assert (record["policy"], record["cache_mode"], record["rate"]) == ("fcfs", "kv", 0.03)
    assert "strict" in capsys.readouterr().out


def test_simulate_names_what_there_is(capsys):
    assert run("simulate", "--hardware", "a100") == 1
    assert "a100-40gb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "field", "values"),
    [
        (["--api-key", "k"], "api_key", ("k",)),
        (["--api-key", "k", "--api-key", "l,m"], "api_key", ("k", "l,m")),
        (["--allowed-origins", "https://a"], "allowed_origins", ("https://a",)),
        (["--allowed-origins", '["https://a", "https://b"]'], "allowed_origins", ("https://a", "https://b")),
        (["--allowed-origins", "a,b", "--allowed-origins", "*"], "allowed_origins", ("a", "b", "*")),
        (["--allowed-hosts", "a,b"], "allowed_hosts", ("a", "b")),
    ],
)
def test_flags_of_several_values_leave_the_model_alone(ran, flags, field, values):
    assert run("serve", *flags, "folder") == 0 and run("serve", "folder", *flags) == 0
    assert [(c.model, getattr(c.server, field)) for c in ran] == [("folder", values)] * 2


def test_resources_leave_the_model_alone(ran):
    assert run("serve", "--replica-resources", "GPU=1,CPU=2", "--replica-resources", "x=3", "folder") == 0
    assert run("run-batch", "-i", "a", "-o", "b", "--replica-resources", "GPU=1", "folder") == 0
    assert [command.model for command in ran] == ["folder"] * 2
    assert parse_resources(ran[0].ray.replica_resources) == {"GPU": 1, "CPU": 2, "x": 3}


def test_an_empty_value_of_several_is_refused(capsys):
    for flag, text in (("--allowed-origins", "a,,b"), ("--allowed-hosts", '["a", 3]'), ("--replica-resources", "")):
        assert run("serve", flag, text) == 2
        assert f"{flag.removeprefix('--').replace('-', '_')}=" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["run-batch", "-i", "{tmp}/in", "-o", "{tmp}/out"]])
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--scheduling-policy", "aptt"], "unknown scheduling_policy='aptt'; known: alise, apt,"),
        (["--scheduling-policy", "apt:pace=3"], "unknown option 'pace=3' of policy 'apt'"),
        (["--scheduling-policy", "apt:lane_share=x"], "option lane_share='x' of policy 'apt' must be"),
        (["--max-model-len", "4096"], "max_model_len=4096 is more than the model's max_position_embeddings=1024"),
        (["--tokenizer", "{tmp}"], "tokenizer"),
        (["--chat-template", "{tmp}/none"], "{tmp}/none: no such file or directory"),
    ],
)
def test_bad_options_are_found_before_the_weights_are_loaded(command, flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(apt_jax.serve.runtime.build, "load_model", lambda *a, **b: pytest.fail("weights were loaded"))
    body = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}
    (tmp_path / "in").write_text(json.dumps(body) + "\n")
    assert run(*(argument.format(tmp=tmp_path) for argument in [*command, *flags])) == 1
    assert sentence.format(tmp=tmp_path) in capsys.readouterr().err


def test_with_json_logs_an_error_is_a_record_too(tmp_path):
    for flags in (["--scheduling-policy", "aptt"], ["--host", "256.0.0.1"], [str(tmp_path / "none/at/all")]):
        done = command("serve", *flags, "--log-format", "json", "--port", 0)
        records = [json.loads(line) for line in done.stderr.splitlines()]
        assert done.returncode == 1 and [r["level"] for r in records].count("ERROR") == 1
        assert not any("running requests" in record["message"] for record in records)
