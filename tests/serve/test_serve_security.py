"""What other programs, web pages and proxies may do to a server: over real sockets and in the application."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import httpx
import pytest

from apt_jax.serve.http import server
from apt_jax.serve.http.middleware import MAX_HEADERS
from apt_jax.serve.http.service import Service
from apt_jax.serve.logs import JsonFormatter, TextFormatter
from apt_jax.serve.openai.generation import Generation
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live

BODY = b'{"prompt": "a", "max_tokens": 2}'
LENGTH = b"content-length: %d" % len(BODY)
JSON = {"content-type": "application/json"}


def service(**options):
    engine = FakeEngine(tokenizer=CharTokenizer())
    return Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions(**options))


@pytest.fixture(scope="module")
def url():
    with live(service()) as url:
        yield url


def said(url: str, *lines: bytes, body: bytes = BODY, end: bytes = b"\r\n") -> bytes:
    """All that comes back until the server closes the connection, or half a second after a whole answer."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10) as client:
        client.sendall(end.join([*lines, b"", b""]) + body)
        client.settimeout(10)
        answer = b""
        while piece := client.recv(4096):
            answer += piece
        return answer


POST = b"POST /v1/completions HTTP/1.1"
HOST = b"host: localhost"
CHUNKED = b"20\r\n" + BODY + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ((POST, HOST, LENGTH, b"transfer-encoding: chunked"), "both Content-Length and Transfer-Encoding"),
        ((POST, HOST, b"Transfer-Encoding: chunked", LENGTH), "both Content-Length and Transfer-Encoding"),
        ((POST, HOST, LENGTH, LENGTH), "several Content-Length headers"),
        ((POST, HOST, LENGTH, b"content-length: 5"), "several Content-Length headers"),
        ((POST, HOST, b"content-length: 32, 32"), "Content-Length is not one number"),
        ((POST, HOST, b"content-length: +32"), "Content-Length is not one number"),
        ((POST, HOST, b"content-length:"), "Content-Length is not one number"),
        ((POST, HOST, b"transfer-encoding: chunked", b"transfer-encoding: identity"), "several Transfer-Encoding"),
        ((POST, HOST, b"transfer-encoding:", b" chunked"), "a header folded over several lines"),
        ((POST, HOST, LENGTH, b"x-a: b", b"\tc: d"), "a header folded over several lines"),
        ((POST, HOST, LENGTH, b"x-a: b\rx-b: c"), "a carriage return inside a line"),
        ((POST[:-1] + b"0", HOST, b"transfer-encoding: chunked"), "a Transfer-Encoding in HTTP/1.0"),
        ((POST, HOST, b"x-request-id: mine", LENGTH, b"content length: 3"), "not a valid HTTP request"),
    ],
)
@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_a_request_that_can_be_read_in_two_ways_is_refused_and_the_connection_closed(url, lines, what, end):
    answer = said(url, *lines, body=CHUNKED + POST + b"\r\n\r\n", end=end)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"connection: close" in head and b"x-request-id: " in head
    error = json.loads(body)["error"]  # and no second answer after it
    assert what in error["message"] and error["code"] == "invalid_http"


def test_what_is_read_in_one_way_only_is_served(url):
    close = b"connection: close"
    for lines, body in (
        ((POST, HOST, close, LENGTH), BODY),
        ((POST, HOST, close, b"transfer-encoding: chunked"), CHUNKED),
        ((POST, HOST, close, LENGTH, b"x-a: b", b"x-a: c"), BODY),
    ):
        assert said(url, *lines, body=body).startswith(b"HTTP/1.1 200 ")


def test_a_huge_number_of_headers_is_refused(url):
    for count, status in ((100, 200), (MAX_HEADERS + 1, 431)):
        reply = httpx.get(f"{url}/health", headers=[("x", str(i)) for i in range(count)])
        assert reply.status_code == status and reply.headers["x-request-id"]
    assert reply.json()["error"]["code"] == "headers_too_large"
    answer = said(url, b"GET /health HTTP/1.1", HOST, b"connection: close", b"x: " + b"y" * 100_000, body=b"")
    assert answer.startswith(b"HTTP/1.1 431 ") and b"see --max-header-bytes" in answer


def ask(url: str, host: str | None = None, path="/v1/completions", content=BODY, **headers) -> httpx.Response:
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(url + path, content=content, headers={**JSON, **({"host": host} if host else {}), **more})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("app.localhost", 200),
        ("127.0.0.1", 200),
        ("127.1.2.3:80", 200),
        ("[::1]:8000", 200),
        ("localhost.", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("0.0.0.0", 403),
    ],
)
def test_on_a_loopback_address_only_its_names_are_taken(url, host, status):
    reply = ask(url, host)
    assert reply.status_code == status
    if status == 403:
        error = reply.json()["error"]
        assert error["code"] == "host_not_allowed" and "--allowed-hosts" in error["message"]
        assert httpx.get(f"{url}/debug/state", headers={"host": host}).status_code == 403


def test_other_names_can_be_allowed_and_other_addresses_are_not_checked():
    with live(service(allowed_hosts=("a.example,*.b.example",))) as url:
        found = [ask(url, f"{name}:1").status_code for name in ("a.example", "x.b.example", "b.example", "c.example")]
        assert found == [200, 200, 403, 403] and ask(url).status_code == 200
    for options in ({"host": "0.0.0.0"}, {"allowed_hosts": ("*",)}):
        with live(service(**options)) as url:
            assert ask(url, "evil.example").status_code == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("text/plain; application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("text/json", 415),
        ("", 415),
    ],
)
def test_what_any_web_page_could_send_is_not_taken(url, content_type, status):
    paths = {"/v1/completions": BODY, "/tokenize": b'{"prompt": "a"}', "/detokenize": b'{"tokens": [97]}'}
    for path, content in paths.items():
        reply = ask(url, path=path, content=content, content_type=content_type)
        assert reply.status_code == status
        if status == 415:
            error = reply.json()["error"]
            assert error["code"] == "unsupported_media_type" and "Content-Type: application/json" in error["message"]


def test_without_a_content_type_a_program_is_served_and_a_browser_is_not(url):
    for more, status in (({}, 200), ({"origin": "http://evil.example"}, 415), ({"sec-fetch-site": "cross-site"}, 415)):
        assert httpx.post(f"{url}/v1/completions", content=BODY, headers=more).status_code == status


def test_a_story_is_given_for_whole_ids_only():
    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:
            ids = [(await client.post("/v1/completions", json={"prompt": "a", "n": n})).json()["id"] for n in (1, 3)]
            both = (await client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2})).json()["id"]
            found = {}
            for name in (*ids, both, f"{ids[1]}-2", "cmpl", "cmpl-", ids[0][:-1], ids[0][:12], f"{ids[0]}-", ".*", ""):
                reply = await client.get(f"/debug/requests/{name}")
                found[name] = len(reply.json()["samples"]) if reply.status_code == 200 else 0
            assert [*found.values()] == [1, 3, 4, 1] + [0] * 7

    run(main)


def test_an_unforeseen_failure_carries_the_request_s_id(monkeypatch, caplog):
    def fail(*args, **more):
        raise ZeroDivisionError("it is not for clients")

    monkeypatch.setattr(Generation, "prepare", fail)

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:
            headers = {"x-request-id": "mine"}
            reply = await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
            assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine")
            assert reply.json()["error"]["code"] == "internal_error" and "not for clients" not in reply.text

    run(main)
    (record,) = [r for r in caplog.records if r.exc_info]
    assert record.fields["request_id"] == "mine" and record.exc_info[0] is ZeroDivisionError


def record_of(message, *args, **fields):
    record = logging.LogRecord("apt_jax.x", logging.INFO, "f.py", 1, message, args, None)
    record.fields = fields
    return record


@pytest.mark.parametrize(
    "bad", ["/x status=500", "a\n2026-01-01 INFO x: y", 'a" b="c', "", "a\u2028b", "a\x85b", "\x1b[2J"]
)
def test_a_client_s_text_looks_like_no_field_and_no_line(bad):
    line = TextFormatter().format(record_of("request", path=bad, status=200))
    assert len(line.splitlines()) == 1 and line.endswith(f" path={json.dumps(bad)} status=200")
    (shown,) = JsonFormatter().format(record_of("request", path=bad)).splitlines()
    assert json.loads(shown)["path"] == bad


def test_a_second_line_of_a_message_looks_like_no_record():
    try:
        raise ValueError("x\n2026-01-01 00:00:00,000 INFO apt_jax: all is well\u2028here too")
    except ValueError:
        record = record_of("it said %s", "a\n2026-01-01 b\rc")
        record.exc_info = sys.exc_info()
    _, *others = TextFormatter().format(record).splitlines()
    assert others and all(line.startswith("    ") for line in others) and "\\u000dc" in others[0]


def test_a_hangup_is_ignored_with_a_word(caplog, monkeypatch):
    caplog.set_level(logging.INFO)

    class Runs:
        def run(self, sockets):
            signal.raise_signal(signal.SIGHUP)

    before = signal.getsignal(signal.SIGHUP)  # ignored in a process that nohup started
    server.run_until_signal(Runs(), [])
    assert "SIGHUP is ignored" in caplog.text
    heard = []
    server.run_until_signal(Runs(), [], lambda: heard.append(1))
    assert heard == [1] and signal.getsignal(signal.SIGHUP) is before


def test_localhost_is_every_address_that_it_has(monkeypatch):
    names = {"two.example": ["127.0.0.1", "127.0.0.2"], "localhost": ["127.0.0.1", "::1"]}
    real = socket.getaddrinfo

    def resolve(host, *args, **more):
        return [entry for name in names.get(host, [host]) for entry in real(name, *args, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for host, hosts in names.items():
        found = server.listen_everywhere(host, 0)
        try:
            addresses = [listener.getsockname() for listener in found]
            possible = [name for name in hosts if ":" not in name or has_ipv6()]
            assert [address[0] for address in addresses] == possible and len({a[1] for a in addresses}) == 1
            for address in addresses:
                socket.create_connection(address[:2], timeout=5).close()
        finally:
            for listener in found:
                listener.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_a_port_taken_on_one_address_is_told(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", two_addresses(socket.getaddrinfo))
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            server.listen_everywhere("two.example", taken.getsockname()[1])


def two_addresses(real):
    return lambda host, *args, **more: [
        entry
        for name in (["127.0.0.1", "127.0.0.2"] if host == "two.example" else [host])
        for entry in real(name, *args, **more)
    ]


def test_stopping_is_told_only_while_something_runs(caplog):
    caplog.set_level(logging.INFO)
    idle = service()
    http = server.Server(server.http_config(lambda *args: None, idle.options), idle)
    http.servers, http.lifespan = [], type("Lifespan", (), {"shutdown": staticmethod(nothing)})()
    for running, lines in ((0, 0), (2, 1)):
        idle.num_generating = running
        caplog.clear()
        thread = threading.Thread(target=lambda: run(http.shutdown))
        thread.start()
        thread.join()
        assert len([r for r in caplog.records if "stopping" in r.message]) == lines


async def nothing() -> None:
    """No lifespan."""


def test_logs_are_this_program_s_and_other_libraries_say_only_what_is_wrong():
    code = (
        "import logging, warnings\n"
        "from apt_jax.serve.logs import set_up_logs\n"
        "set_up_logs('json')\n"
        "logging.getLogger('apt_jax.x').info('ours')\n"
        "logging.getLogger('absl').info('theirs'); logging.getLogger('absl').warning('a fault')\n"
        "warnings.warn('a warning')\n"
        "from apt_jax.progress import is_hidden; import sys; sys.stderr.isatty = lambda: True; assert is_hidden()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert messages[:2] == ["ours", "a fault"] and "a warning" in messages[2] and len(messages) == 3
