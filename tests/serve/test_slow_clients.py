"""Clients that do not read their answers: while the server runs, and when it stops."""

import contextlib
import json
import socket
import threading
import time

import pytest

from apt_jax.serve.http import server as server_module
from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.server import Server, http_config, listen
from apt_jax.serve.http.service import Service
from apt_jax.serve.http.snapshot_file import write_snapshot
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.status import EngineStatus
from tests.serve.test_serve_operations import resume
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import until

BUFFER_BYTES = 4096
# more than the sockets' and the server's buffers hold
BODY = {"prompt": ["a", "b", "c", "d"], "n": 2, "max_tokens": 100, "logprobs": 5, "ignore_eos": True}


class Stopping:
    """A server whose sockets hold next to nothing; `stop()` is a SIGTERM."""

    def __init__(self, flush_s, monkeypatch, **options):
        monkeypatch.setattr(server_module, "FLUSH_S", flush_s)
        self.engine = FakeEngine(tokenizer=CharTokenizer())
        self.thread = EngineThread(lambda: self.engine)
        options = ServerOptions(shutdown_timeout=0, **options)
        self.service = Service.of_engine(self.thread, "tiny", options)
        self.listener = listen("127.0.0.1", 0)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self.http = Server(http_config(create_app(self.service), options), self.service)
        self.runner = threading.Thread(target=self.http.run, kwargs={"sockets": [self.listener]})
        self.runner.start()
        until(lambda: self.thread.status is EngineStatus.READY)

    def ask(self, **more):
        """Send a request and read nothing; wait until the engine has finished it."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        client.connect(self.listener.getsockname())
        body = json.dumps({**BODY, **more}).encode()
        fields = {"host": "127.0.0.1", "content-type": "application/json", "content-length": len(body)}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + body)
        until(lambda: self.engine.num_steps > 0 and self.engine.is_idle and not self.engine.has_unfinished)
        return client

    def stop(self):
        self.http.should_exit = True

    def stopped(self):
        self.runner.join(20)
        self.listener.close()
        assert not self.runner.is_alive()
        return self.service.unfinished_records


def read_all(client):
    with contextlib.closing(client):
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_reads_nothing_finds_its_answer_in_the_results_of_the_next_start(tmp_path, monkeypatch, stream):
    server = Stopping(0.5, monkeypatch)
    client = server.ask(stream=stream)
    server.stop()
    (record,) = server.stopped()
    assert b"[DONE]" not in read_all(client)
    path = tmp_path / "left.jsonl"
    write_snapshot(path, [record])
    (result,) = resume(path).values()
    choices = result["body"]["choices"]
    assert [choice["text"][:2] for choice in choices] == ["bc", "bc", "cd", "cd", "de", "de", "ef", "ef"]
    assert {len(choice["logprobs"]["tokens"]) for choice in choices} == {100}
    assert {choice["finish_reason"] for choice in choices} == {"length"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_reads_in_time_gets_everything_and_is_not_kept(monkeypatch, stream):
    server = Stopping(20, monkeypatch)
    client = server.ask(stream=stream)
    server.stop()
    until(lambda: server.service.is_stopping)
    reply = read_all(client)
    assert reply.endswith((b"data: [DONE]\n\n" if stream else b"}") + b"\r\n0\r\n\r\n")
    assert server.stopped() == []


def test_a_client_that_has_gone_and_one_that_was_refused_are_not_kept(monkeypatch):
    server = Stopping(0.5, monkeypatch)
    server.ask(stream=True).close()
    refused = server.ask(prompt="a" * 300)
    server.stop()
    assert server.stopped() == []
    refused.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_reads_nothing_is_cut_off_and_its_answer_let_go(monkeypatch, caplog, stream):
    """It would hold its connection and its answer's memory for ever, and many of them all that there is."""
    server = Stopping(0.1, monkeypatch, response_write_timeout=0.2)
    with caplog.at_level("INFO", "apt_jax.access"):
        client = server.ask(stream=stream)
        until(lambda: server.service.num_generating == 0 and not server.http.server_state.connections)
    with contextlib.suppress(ConnectionResetError):
        assert b"[DONE]" not in read_all(client)
    assert "a client that reads nothing is cut off" in caplog.text
    server.stop()
    assert server.stopped() == [], "as if it had disconnected"


def test_a_client_that_reads_slowly_is_not_cut_off(monkeypatch):
    server = Stopping(0.1, monkeypatch, response_write_timeout=3.0)
    client = server.ask(stream=True)
    found, began = b"", time.monotonic()
    with contextlib.closing(client):
        while piece := client.recv(4096):
            found += piece
            if time.monotonic() - began < 4.5:
                time.sleep(0.1)
    assert found.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    server.stop()
    assert server.stopped() == []
