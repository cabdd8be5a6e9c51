"""The first request of each kind finds everything imported: an import on the event loop holds up every stream."""

import subprocess
import sys

REQUESTS = """
import json, sys
from tests.support.hostile_requests import send
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live

short = {"prompt": "a", "max_tokens": 2}
chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
ASKED = [
    ("completions", short), ("completions", {**short, "stream": True}),
    ("completions", {**short, "n": 4, "logprobs": 2}), ("completions", {"prompt": "a" * 100}),
    ("completions", {"prompt": ["a" * 40] * 9, "max_tokens": 2}), ("completions", {"prompt": [5] * 5000}),
    ("completions", {"promt": 3}), ("chat/completions", chat), ("chat/completions", {**chat, "stream": True}),
]
engine = FakeEngine(tokenizer=CharTokenizer())
service = Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions())
service.chat_template = "{{ messages[0].content }}"
with live(service) as url:
    host, port = url.removeprefix("http://").split(":")
    for path, body in ASKED:
        data = json.dumps(body).encode()
        head = f"POST /v1/{path} HTTP/1.1\\r\\nhost: localhost\\r\\nconnection: close\\r\\n"
        head += f"content-length: {len(data)}\\r\\n"
        before = set(sys.modules)
        status, _ = send(host, int(port), head.encode() + b"\\r\\n" + data)
        print(status, path, sorted(set(sys.modules) - before))
"""


def test_no_request_imports_anything():
    """A tenth of a second and more, once, on the first body that was read off the event loop."""
    done = subprocess.run([sys.executable, "-c", REQUESTS], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 9 and {line.split()[0] for line in lines} == {"200", "400"}
    assert [line for line in lines if not line.endswith(" []")] == []
