"""Flags from a YAML file and the environment: which source wins, and what is refused."""

import dataclasses

import pytest

from apt_jax.flags.sources import flags_of, unknown_variables, with_sources
from apt_jax.scheduling.policies.catalogue import policy_names
from apt_jax.serve.cli import OTHER_SPELLINGS, RunBatch, Serve, read_command, warn_of_variables, with_own_spelling
from apt_jax.serve.options import AddressOptions, LimitOptions, LogOptions, ServerOptions, ShutdownOptions


def read(monkeypatch, *arguments, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return read_command(with_own_spelling(["serve", *map(str, arguments)]))


@pytest.fixture
def config(tmp_path):
    def write(text):
        (tmp_path / "server.yaml").write_text(text, "utf-8")
        return tmp_path / "server.yaml"

    return write


def test_the_nearest_source_of_a_flag_wins(config, monkeypatch):
    file = config("model: of-file\nport: 1\nmax-num-seqs: 2\nblock_size: 32\nlog-requests: true\n")
    found = read(monkeypatch, "--config", file, "--port", 3, APT_JAX_PORT="2", APT_JAX_MAX_NUM_SEQS="4")
    assert (found.model, found.server.port, found.engine.max_num_seqs) == ("of-file", 3, 4)
    assert found.engine.block_size == 32 and found.server.log_requests
    again = read(monkeypatch, "given", f"--config={file}", "--no-log-requests")
    assert again.model == "given" and again.server.port == 2 and not again.server.log_requests
    assert read(monkeypatch, APT_JAX_CONFIG=str(file), APT_JAX_MODEL="of-environment").model == "of-environment"


def test_kinds_of_values(config, monkeypatch):
    file = config(
        "allowed-hosts: [a.example, b.example]\nasync-scheduling: true\nsnapshot-file: None\nttft-slo-ms: 250\n"
        "gpu_memory_utilization: 0.5\nenable-prefix-caching: true\nreject-predicted-late: false\ntp: 2\n"
    )
    found = read(monkeypatch, "--config", file, APT_JAX_LOG_REQUESTS="1", APT_JAX_API_KEY="left to the server")
    assert found.server.allowed_hosts == ("a.example", "b.example") and found.engine.async_scheduling is True
    assert found.server.snapshot_file is None and found.engine.ttft_slo_ms == 250.0 and found.server.log_requests
    assert found.engine.device_memory_utilization == 0.5 and found.engine.tensor_parallel_size == 2
    assert found.engine.enable_prefix_caching and not found.server.reject_predicted_late and found.server.api_key == ()


def test_a_cluster_s_variable_is_no_port(monkeypatch):
    assert read(monkeypatch, APT_JAX_PORT="tcp://10.0.0.1:8000").server.port == 8000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot: 1", "has 'prot', which is no flag of this command; did you mean port?"),
        ("- port", "must hold flags as NAME: VALUE, not a list"),
        ("port: [1, 2]", "port must be one value, not a list"),
        ("port: {a: 1}", "port must be one value, not a dict"),
        ("a: b: c", "is not YAML"),
        ("log-requests: perhaps", "server.yaml: log_requests='perhaps' must be true or false"),
        ("port: 1\nhost: a\nport: 2", "server.yaml: line 3 has 'port' for the second time; leave one out"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "server.yaml: 'max_num_seqs' is max_num_seqs for the second time"),
    ],
)
def test_a_file_with_a_fault_is_refused_in_a_sentence(config, text, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (compared below)
        with_sources(["--config", str(config(text))], Serve, {})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_value_names_its_file_or_variable(config, monkeypatch, capsys):
    file = config("port: abc\nblock-size: 32\n")
    with pytest.raises(SystemExit) as ended:
        read(monkeypatch, "--config", file)
    assert ended.value.code == 2 and f"that value is from --config {file}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        read(monkeypatch, APT_JAX_PORT="99999")
    shown = capsys.readouterr().err
    assert "port=99999 must be between" in shown and "that value is from APT_JAX_PORT of the environment" in shown
    with pytest.raises(SystemExit):
        read(monkeypatch, "--port", "abc", APT_JAX_PORT="1")
    assert "that value is from" not in capsys.readouterr().err


def test_a_variable_that_is_nearly_a_flag_s_is_told():
    known = {"max_num_seqs", "port", "config", "api_key"}
    environment = {
        "APT_JAX_MAX_NUM_SEQ": "8", "APT_JAX_PORT": "1", "APT_JAX_CONFIG": "a", "OTHER_PORTT": "1",
        "APT_JAX_PORT_8000_TCP_ADDR": "10.0.0.1", "APT_JAX_SERVICE_PORT": "1", "APT_JAX_SERVICE_HOST": "10.0.0.1",
    }  # fmt: skip
    (sentence,) = unknown_variables(environment, known)
    assert sentence == "APT_JAX_MAX_NUM_SEQ is no flag's and is ignored; did you mean APT_JAX_MAX_NUM_SEQS?"


def test_the_command_tells_of_such_a_variable(monkeypatch, capsys):
    monkeypatch.setenv("APT_JAX_MAX_NUM_SEQ", "8")
    warn_of_variables()
    assert capsys.readouterr().err.startswith("warning: APT_JAX_MAX_NUM_SEQ is no flag's and is ignored; did you mean")


def test_a_size_in_gib_in_a_file(config, monkeypatch):
    assert read(monkeypatch, "--config", config("kv-offloading-size: 2")).engine.host_cache_bytes == 2 * 2**30


def test_the_server_s_flags_are_in_groups_with_titles(capsys):
    with pytest.raises(SystemExit):
        read_command(["serve", "--help"])
    shown = capsys.readouterr().out
    for title in ("address", "limit", "shutdown", "log", "engine", "load"):
        assert f" {title} options " in shown
    groups = (AddressOptions, LimitOptions, ShutdownOptions, LogOptions)
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(ServerOptions))


def test_no_file_and_an_empty_one(config):
    with pytest.raises(ValueError, match="--config needs a YAML file"):
        with_sources(["--config"], Serve, {})
    with pytest.raises(FileNotFoundError):
        with_sources(["--config", "nowhere.yaml"], Serve, {})
    assert with_sources(["--port", "1", f"--config={config('# nothing')}"], Serve, {}) == ["--port", "1"]


def test_every_flag_of_the_server_has_a_variable():
    flags = flags_of(Serve)
    assert {"model", "port", "max_num_seqs", "replicas", "tokenizer", "coordinator_address"} <= set(flags)
    assert flags["log_requests"].is_switch and flags["async_scheduling"].is_tristate and flags["api_key"].may_repeat
    assert "source" not in flags_of(RunBatch)


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        (["--gpu-memory-utilization", "0.5"], ["--device-memory-utilization", "0.5"]),
        (["--gpu_memory_utilization=0.5"], ["--device-memory-utilization=0.5"]),
        (["-tp", "2"], ["--tensor-parallel-size", "2"]),
        (["--disable-uvicorn-access-log"], ["--no-access-log"]),
    ],
)
def test_vllm_s_spellings(arguments, own):
    assert with_own_spelling(arguments) == own
    assert all(name.removeprefix("--no-").removeprefix("--").replace("-", "_") in flags_of(Serve)
               for name in OTHER_SPELLINGS.values())  # fmt: skip


def test_the_model_as_a_flag(monkeypatch):
    assert read(monkeypatch, "--port", 1, "--model", "m", "--seed", 2).model == "m"
    assert read(monkeypatch, "--model=m").model == "m"


def test_the_help_names_every_policy(capsys):
    with pytest.raises(SystemExit):
        read_command(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"Scheduling policy: {', '.join(policy_names())};" in shown
    assert "--gpu-memory-utilization" not in shown and "address options" in shown and "engine options" in shown
