"""`apt-jax serve` from opening the port to its exit code, in this process: the engine is the one without a model."""

import gc
import logging
import os
import re
import signal
import socket
import threading

import httpx
import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.http import server
from apt_jax.serve.http.server import report_failure, serve, url_of, with_environment
from apt_jax.serve.http.snapshot_file import read_snapshot
from apt_jax.serve.options import LoadOptions, ServerOptions
from apt_jax.serve.replicas.options import RayOptions, ReplicaOptions
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import until

BODY = {"prompt": "a", "max_tokens": 2}


@pytest.fixture
def command(monkeypatch, caplog):
    """Serve `engine` (or fail with it) until `visit`, called in another thread with the address, has returned."""
    caplog.set_level(logging.INFO, "apt_jax.serve")
    levels = {name: logging.getLogger(name).level for name in ("uvicorn.error",)}
    built = []

    def run(engine, visit=lambda url: None, *, model=None, load=None, **options):
        def build(*args, **fields):
            built.append((args, fields))
            if isinstance(engine, Exception):
                raise engine
            actor.start()
            return engine

        monkeypatch.setattr("apt_jax.serve.runtime.build.build_engine", build)
        failures = []

        def act():
            try:
                until(lambda: "answers at" in caplog.text)
                visit(re.findall(r"answers at (\S+)/v1/completions", caplog.text)[-1])
            except BaseException as error:
                failures.append(error)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        actor = threading.Thread(target=act)  # who ends the server, once there is one
        config = EngineConfig(scheduling_policy="fcfs")
        code = serve(model, load or LoadOptions(), ServerOptions(port=0, **options), config)
        if actor.ident is not None:
            actor.join()
        assert not failures, failures
        return code

    run.built = built
    yield run
    gc.unfreeze()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "apt_jax.serve"]


def test_from_the_start_to_the_end(command, caplog):
    found = []

    def visit(url):
        reply = httpx.post(f"{url}/v1/completions", json=BODY)
        found.append((reply.json()["model"], reply.json()["choices"][0]["text"]))
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: "SIGHUP is ignored: there are no replicas to update" in caplog.text)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    engine = FakeEngine(tokenizer=CharTokenizer())
    assert command(engine, visit, load=LoadOptions(revision="r"), snapshot_file=None) == 0
    assert found == [("apt-jax-demo", "bc")] and engine.warmed
    ((args, fields),) = command.built
    assert args == (None,) and (fields["revision"], fields["leader_host"]) == ("r", None)
    said = messages(caplog)
    assert re.fullmatch(
        r"listening on (\S+), loading apt-jax-demo; \1/ready turns 200 when requests are taken", said[0]
    )
    (ready,) = [text for text in said if text.startswith("ready after")]
    assert re.search(
        r"imports \d+\.\d, .*measuring \d+\.\d\): apt-jax-demo answers at http://127\.0\.0\.1:\d+/v1/", ready
    )
    assert said[-1] == "stopped" and not any("not finished" in text or "stopping;" in text for text in said)
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(("model", "given", "name"), [("folder", None, "folder"), ("folder", "own", "own")])
def test_the_name_of_the_model(command, model, given, name):
    found = []

    def visit(url):
        found.append(httpx.get(f"{url}/v1/models").json()["data"][0]["id"])

    assert command(FakeEngine(), visit, model=model, served_model_name=given, snapshot_file=None) == 0
    assert found == [name]


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_unfinished_at_the_end_of_the_grace_time(command, caplog, tmp_path, kept):
    path = tmp_path / "left.jsonl"
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
    asked = []

    def visit(url):
        asked.append(threading.Thread(target=lambda: httpx.post(f"{url}/v1/completions", json=BODY, timeout=30)))
        asked[0].start()
        until(lambda: engine.num_waiting == 1)
        threading.Timer(0.3, engine.allow_step, (100,)).start()  # the engine is asked to end it by then

    options = {"snapshot_file": str(path) if kept else None, "shutdown_timeout": 0.01}
    assert command(engine, visit, **options) == 0
    asked[0].join()
    said = messages(caplog)
    assert "stopping; 1 running requests get 0.01 s" in said
    if kept:
        assert [record["model"] for record in read_snapshot(path)] == ["apt-jax-demo"]
        assert f"1 unfinished requests are in {path}; --resume-from {path} finishes them" in said
    else:
        assert "1 requests were not finished" in said and not path.exists()


def test_a_snapshot_is_resumed(command, caplog, tmp_path):
    path = tmp_path / "left.jsonl"
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    def stop(url):
        threading.Thread(target=lambda: httpx.post(f"{url}/v1/completions", json=BODY, timeout=30)).start()
        until(lambda: engine.num_waiting == 1)
        threading.Timer(0.3, engine.allow_step, (100,)).start()

    assert command(engine, stop, snapshot_file=str(path), shutdown_timeout=0.01) == 0
    caplog.clear()
    again = FakeEngine(tokenizer=CharTokenizer())
    assert command(again, lambda url: until(lambda: not path.exists()), resume_from=str(path), snapshot_file=None) == 0
    assert f"{path}: every request is done; results are in {path}.results.jsonl" in messages(caplog)


def test_a_model_that_cannot_be_loaded_ends_the_server(command, caplog, capsys):
    assert command(ValueError("no such model")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such model" and messages(caplog)[-1] == "stopped"
    assert command(ZeroDivisionError("odd")) == 1
    (record,) = [record for record in caplog.records if record.getMessage() == "the engine failed"]
    assert isinstance(record.exc_info[1], ZeroDivisionError)


def test_what_cannot_be_used_is_told_before_anything_is_loaded(command, capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve(None, LoadOptions(), ServerOptions(port=port, snapshot_file=None), EngineConfig()) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot listen on 127.0.0.1:{port} (") and "choose another --host or --port" in said
    for options in ({"snapshot_file": str(tmp_path)}, {"chat_template": str(tmp_path)}, {"resume_from": str(tmp_path)}):
        with pytest.raises((ValueError, OSError), match="folder"):
            command(FakeEngine(), **{"snapshot_file": None, **options})
    with pytest.raises(ValueError, match="unknown scheduling_policy='none'"):
        serve(None, LoadOptions(), ServerOptions(port=0), EngineConfig(scheduling_policy="none"))
    assert command.built == []


def test_a_chat_template_and_a_key_of_the_environment(command, monkeypatch, tmp_path):
    (tmp_path / "t").write_text("{{ messages[0].content }}")
    monkeypatch.setenv("APT_JAX_API_KEY", "secret")
    found = []

    def visit(url):
        for key in ("wrong", "secret"):
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            found.append(reply.status_code)

    engine = FakeEngine(tokenizer=CharTokenizer())
    assert command(engine, visit, chat_template=str(tmp_path / "t"), snapshot_file=None) == 0 and found == [401, 200]


def test_the_key_of_the_environment_is_added_to_those_given(monkeypatch):
    monkeypatch.delenv("APT_JAX_API_KEY", raising=False)
    given = ServerOptions(api_key=("a",))
    assert with_environment(given) is given
    monkeypatch.setenv("APT_JAX_API_KEY", "b")
    assert with_environment(given).api_key == ("a", "b")


class Bound:
    def __init__(self, *name):
        self.getsockname = lambda: name


def test_an_address_as_a_url():
    assert (
        url_of(Bound("::1", 80, 0, 0)) == "http://[::1]:80" and url_of(Bound("127.0.0.1", 80)) == "http://127.0.0.1:80"
    )


def test_a_failure_is_a_sentence_or_a_traceback(caplog, capsys):
    for error in (ValueError("no"), OSError(2, "No such file or directory", "f")):
        report_failure(error)
    assert capsys.readouterr().err == "error: no\nerror: No such file or directory: 'f'\n" and not caplog.records
    report_failure(KeyError("x"))
    assert capsys.readouterr().err == "" and caplog.records[0].exc_info[0] is KeyError


def test_a_second_signal_ends_the_server_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    made = object.__new__(server.Server)
    made.should_exit = made.force_exit = False
    made._captured_signals = []
    made.handle_exit(signal.SIGINT, None)
    assert made.should_exit and codes == []
    made.handle_exit(signal.SIGINT, None)
    assert codes == [130]


@pytest.mark.parametrize("given", [None, RayOptions(ray_address="other:1")])
def test_replicas_are_kept_by_ray_as_it_is_told(monkeypatch, given):
    """Ray itself is another package; `make test-ray` runs the replicas."""

    class Stop(Exception):
        pass

    def backend(spec, replicas, ray, on_ready, on_failure):
        raise Stop(spec.model, spec.model_name, replicas, ray)

    monkeypatch.setattr(server, "check_ray", lambda: None)
    monkeypatch.setattr(server, "ReplicaBackend", backend)
    options, replicas = ServerOptions(port=0, snapshot_file=None, served_model_name="n"), ReplicaOptions(replicas=2)
    with server.listen("127.0.0.1", 0) as listener:
        monkeypatch.setattr(server, "listen_everywhere", lambda *address: [listener])
        with pytest.raises(Stop) as caught:
            serve("folder", LoadOptions(), options, EngineConfig(), replicas, given)
    assert caught.value.args == ("folder", "n", replicas, given or RayOptions())
