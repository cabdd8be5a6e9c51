"""Clients that send slowly, over real sockets: each request has its time to come in, and no more."""

import json
import re
import socket
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live, until

LIMIT_S = 0.4
BODY = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def engine():
    return FakeEngine(tokenizer=CharTokenizer())


@pytest.fixture(scope="module")
def service(engine):
    return Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions(request_read_timeout=LIMIT_S))


@pytest.fixture(scope="module")
def address(service):
    with live(service) as url:
        yield urlsplit(url).hostname, urlsplit(url).port


@contextmanager
def connection(address):
    with socket.create_connection(address, timeout=10) as client:
        yield client


def trickle(client: socket.socket, data: bytes, rest_s: float = 0.05) -> tuple[bytes, float]:
    """Send a byte at a time until the server has had enough; what it says, and how long it took."""
    began = time.monotonic()
    for byte in data:
        try:
            client.sendall(bytes([byte]))
        except OSError:
            break
        time.sleep(rest_s)
        assert time.monotonic() < began + 8, "nobody minds"
        client.setblocking(False)
        try:
            if client.recv(1, socket.MSG_PEEK) is not None:
                break
        except BlockingIOError:
            pass
        except OSError:
            break
        finally:
            client.settimeout(10)
    return everything(client), time.monotonic() - began


def whole_answer(client: socket.socket) -> bytes:
    """One answer: its body may come after its head."""
    said, length = b"", None
    while length is None or len(said) < length:
        piece = client.recv(4096)
        assert piece, "the connection was closed in the middle of an answer"
        said += piece
        head, end, _ = said.partition(b"\r\n\r\n")
        if end and length is None:
            (body,) = re.findall(rb"(?i)content-length: (\d+)", head)
            length = len(head) + len(end) + int(body)
    return said


def everything(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    said = b""
    try:
        while piece := client.recv(4096):
            said += piece
    except ConnectionResetError:
        pass
    return said


@pytest.mark.parametrize("head", [b"", HEAD % len(BODY) + b"{"])
def test_headers_and_bodies_that_trickle_get_408(address, service, head):
    with connection(address) as client:
        client.sendall(head)
        said, took_s = trickle(client, (HEAD % 5000 + b" " * 5000)[: 5000 if not head else len(BODY) - 2])
    assert said.startswith(b"HTTP/1.1 408 ") and 0.75 * LIMIT_S < took_s < LIMIT_S + 2
    error = json.loads(said.split(b"\r\n\r\n", 1)[1])["error"]
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", said)
    assert error["code"] == "request_too_slow" and "0.4 s, the limit of --request-read-timeout" in error["message"]
    until(lambda: service.num_generating == 0)


def test_a_connection_that_says_nothing_is_closed_without_a_word(address):
    with connection(address) as client:
        began = time.monotonic()
        assert everything(client) == b"" and 0.75 * LIMIT_S < time.monotonic() - began < LIMIT_S + 2


def test_each_request_of_a_connection_has_its_own_time(address):
    with connection(address) as client:
        for _ in range(4):  # longer than the limit together
            time.sleep(0.15 * LIMIT_S)
            client.sendall(HEAD % len(BODY))
            time.sleep(0.15 * LIMIT_S)
            client.sendall(BODY)
            assert whole_answer(client).startswith(b"HTTP/1.1 200 ")
        said, _ = trickle(client, b"GET /health HTTP/1.1\r\n" + b"x-more: 1\r\n" * 100)
        assert said.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_trickles_on_after_its_answer_is_cut_off(address):
    with connection(address) as client:
        client.sendall(HEAD % 10_000_000)
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
        said, took_s = trickle(client, b" " * 1000)
        assert b"HTTP" not in said and took_s < LIMIT_S + 2


def test_an_answer_may_take_longer_than_its_request():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
    service = Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions(request_read_timeout=LIMIT_S))
    with live(service) as url, httpx.Client(base_url=url) as client:
        body = {"prompt": "a", "max_tokens": 4, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            for _ in range(4):
                time.sleep(0.5 * LIMIT_S)
                engine.allow_step()
            assert "".join(reply.iter_lines()).endswith("data: [DONE]")
        engine.allow_step(100)
    assert engine.is_idle


def test_a_client_that_shuts_down_its_sending_side_has_left():
    """The end of its stream looks like that of a client that is gone, whose blocks must be freed at once."""
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
    service = Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions())
    with live(service) as url, connection((urlsplit(url).hostname, urlsplit(url).port)) as client:
        client.sendall(HEAD % len(BODY) + BODY)
        until(lambda: engine.state.num_unfinished == 1)
        client.shutdown(socket.SHUT_WR)
        assert everything(client) == b""
        engine.allow_step(1000)
        until(lambda: engine.state.num_unfinished == 0)
        assert engine.figures().num_held_blocks == 0
        with connection((urlsplit(url).hostname, urlsplit(url).port)) as other:
            other.sendall(b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            other.shutdown(socket.SHUT_WR)
            assert everything(other).startswith(b"HTTP/1.1 200"), "what is answered at once is answered"


def test_the_limit_is_checked():
    with pytest.raises(ValueError, match="request_read_timeout=0 must be greater than 0 seconds"):
        ServerOptions(request_read_timeout=0)
