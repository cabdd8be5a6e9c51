"""Requests within the limit on bodies that would be long work for a careless server; for tests and the soak suite."""

import json
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MB = 1 << 20
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
WORDS = "def read(file, size): return the list of all 12345 words\n"


@dataclass(frozen=True)
class Hostile:
    """One request: `make` gives its body."""

    name: str
    path: str
    make: Callable[[], bytes]
    status: int = 400
    is_chunked: bool = False  # in chunks of one byte
    fills_batches: bool = False  # as many requests to the engine as it has seats, or as many tokens as it takes at once

    def wire(self) -> bytes:
        """What goes over the socket."""
        body = self.make()
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        )
        if not self.is_chunked:
            return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
        return head.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def _with(field: str, item: bytes, *, size: int = 4 * MB, more: str = "") -> Callable[[], bytes]:
    """A body whose `field` is a list of `size` bytes of one item."""

    def make() -> bytes:
        head = f'{{{more}"{field}": ['.encode()
        count = (size - len(head) - 8) // (len(item) + 1)
        return head + b",".join([item] * count) + b"]}"

    return make


def _body(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(fields, ensure_ascii=False).encode()


def _numbered(count: int, value: object = 1) -> dict[str, object]:
    return {str(number): value for number in range(count)}


def _text(words: str = WORDS, size: int = 4 * MB - 100) -> str:
    return words * (size // len(json.dumps(words, ensure_ascii=False).encode()))


def _digits(size: int) -> str:
    return random.Random(5).randbytes(size // 2).hex()


def _message(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


READ = (
    Hostile("prompt of 4 MB", COMPLETIONS, lambda: _body(prompt=_text())()),
    Hostile("prompt of one letter", COMPLETIONS, lambda: _body(prompt="a" * (4 * MB - 100))()),
    Hostile("prompt of emoji", COMPLETIONS, lambda: _body(prompt=_text("\U0001f600 "))()),
    Hostile("prompt of escapes", COMPLETIONS, lambda: b'{"prompt": "' + b"\\u00e9" * (4 * MB // 6 - 10) + b'"}'),
    Hostile("prompt of quotes and commas", COMPLETIONS, lambda: _body(prompt=_text('",[{\\":'))()),
    Hostile("a message of 4 MB", CHAT, lambda: _body(messages=[_message(_text())])()),
    Hostile("a stop string of 4 MB", COMPLETIONS, lambda: _body(prompt="a", stop=["a" * (4 * MB - 100)])(), 200),
    Hostile("a model's name of 4 MB", COMPLETIONS, lambda: _body(prompt="a", model="a" * (4 * MB - 100))(), 404),
    Hostile("messages that are numbers", CHAT, _with("messages", b"0")),
    Hostile("messages that are empty", CHAT, _with("messages", b"{}")),
    Hostile("many short messages", CHAT, _with("messages", b'{"role":"user","content":""}')),
    Hostile("the most messages", CHAT, _with("messages", b'{"role":"user","content":""}', size=29 * 4096), 400),
    Hostile("a message of many parts", CHAT, lambda: _body(messages=[_message([0] * 260_000)])()),
    Hostile("stop_token_ids that are text", COMPLETIONS, _with("stop_token_ids", b'""', more='"prompt":"a",')),
    Hostile("stop strings", COMPLETIONS, _with("stop", b'"a"', size=MB, more='"prompt":"a",')),
    Hostile("logit_bias", COMPLETIONS, lambda: _body(prompt="a", logit_bias=_numbered(30_000))()),
    Hostile("prompts of one token", COMPLETIONS, _with("prompt", b"[5]")),
    Hostile("prompts of one token that are read", COMPLETIONS, _with("prompt", b"[5]", size=4 * 32_000)),
    Hostile("prompts of one letter", COMPLETIONS, _with("prompt", b'"a"')),
    Hostile("token ids", COMPLETIONS, _with("prompt", b"5")),
    Hostile("token ids that are read", COMPLETIONS, _with("prompt", b"1000", size=5 * 260_000)),
    Hostile("token ids that are no whole numbers", COMPLETIONS, _with("prompt", b"1.5", size=MB)),
    Hostile("an unknown field of 4 MB", COMPLETIONS, lambda: _body(**{"prompt": "a", "x" * (4 * MB - 100): 1})()),
    Hostile("unknown fields", COMPLETIONS, lambda: _body(prompt="a", **_numbered(300_000))()),
    Hostile("unknown fields that are read", COMPLETIONS, lambda: _body(prompt="a", **_numbered(30_000))()),
    Hostile("unknown fields of the slo", COMPLETIONS, lambda: _body(prompt="a", slo=_numbered(30_000))()),
    Hostile("unknown fields of a message", CHAT, lambda: _body(messages=[{**_message("a"), **_numbered(30_000)}])()),
    Hostile("a number that is text", COMPLETIONS, lambda: _body(prompt="a", n="1" * (4 * MB - 100))()),
    Hostile("a number that is a list", COMPLETIONS, _with("n", b"1", size=MB // 2, more='"prompt":"a",')),
    Hostile("a long number", COMPLETIONS, lambda: b'{"prompt": [' + b"9" * (4 * MB - 20) + b"]}"),
    Hostile("long numbers", COMPLETIONS, _with("prompt", b"9" * 4200)),
    Hostile("lists", COMPLETIONS, _with("prompt", b"[]")),
    Hostile("deep lists", COMPLETIONS, lambda: b'{"prompt": ' + b"[" * (4 * MB - 20)),
    Hostile("many deep lists", COMPLETIONS, _with("prompt", b"[" * 150 + b"]" * 150)),
    Hostile("objects", COMPLETIONS, _with("prompt", b'{"a":1}')),
    Hostile("empty texts", COMPLETIONS, _with("prompt", b'""')),
    Hostile("no JSON", COMPLETIONS, lambda: b"\xff" * (4 * MB)),
    Hostile("chunks of one byte", COMPLETIONS, lambda: _body(prompt="a" * (MB // 4))(), is_chunked=True),
    Hostile("chats with token ids", TOKENIZE, _with("messages", b"0", size=MB)),
    Hostile("ids that are text", DETOKENIZE, _with("tokens", b'""', size=MB // 2)),
)
ANSWERED = (
    Hostile("tokens of 1 MB", TOKENIZE, lambda: _body(prompt=_text(size=MB), return_token_strs=True)(), 200),
    Hostile("tokens of digits", TOKENIZE, lambda: _body(prompt=_digits(MB), return_token_strs=True)(), 200),
    Hostile("tokens of one letter", TOKENIZE, lambda: _body(prompt="a" * (4 * MB - 100))()),
    Hostile("texts of ids", DETOKENIZE, _with("tokens", b"1000", size=5 * 260_000), 200),
    Hostile("ids that do not exist", DETOKENIZE, lambda: _body(tokens=list(range(10**9, 10**9 + 90_000)))(), 200),
    Hostile(
        "samples with likely tokens",
        COMPLETIONS,
        _body(prompt=[5], n=128, max_tokens=500, logprobs=20, ignore_eos=True),
        200,
        fills_batches=True,
    ),
    Hostile(
        "samples of a chat with likely tokens",
        CHAT,
        _body(messages=[_message("a")], n=64, max_tokens=100, logprobs=True, top_logprobs=20),
        200,
        fills_batches=True,
    ),
    Hostile(
        "a stream with likely tokens",
        COMPLETIONS,
        _body(prompt=[5], n=64, max_tokens=100, logprobs=20, stream=True),
        200,
        fills_batches=True,
    ),
    Hostile(
        "prompts with likely tokens",
        COMPLETIONS,
        lambda: _body(prompt=[[5] * 1000] * 64, max_tokens=1, prompt_logprobs=20)(),
        200,
        fills_batches=True,
    ),
    Hostile(
        "echoes of long prompts",
        COMPLETIONS,
        lambda: _body(prompt=[[5] * 1000] * 100, max_tokens=1, echo=True, return_token_ids=True)(),
        200,
        fills_batches=True,
    ),
    Hostile(
        "usage in every event of many prompts",
        COMPLETIONS,
        lambda: _body(
            prompt=[[5]] * 200,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )(),
        200,
    ),
    Hostile(
        "samples with a bias for many tokens",
        COMPLETIONS,
        lambda: _body(prompt=[[5]] * 7, n=128, max_tokens=1, seed=1, logit_bias=_numbered(300))(),
        200,
        fills_batches=True,
    ),
)


def send(host: str, port: int, wire: bytes, timeout_s: float = 60.0) -> tuple[int, int]:
    """Send a request and read the answer to its end without keeping it; its status and bytes."""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(wire)
        head = connection.recv(65536)
        num_bytes = len(head)
        while piece := connection.recv(1 << 20):
            num_bytes += len(piece)
    return int(head.split(b" ", 2)[1]), num_bytes
