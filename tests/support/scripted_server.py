"""An OpenAI server whose answers are a script: what it sends and when, or how it fails. For tests of clients."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from apt_jax.serve.http.server import listen, url_of

Script = AsyncIterator[Any]  # objects to send as events, bytes to send as they are


class Scripted:
    """Answers request number n (from 0) by `script(n, body)`, or by the response that it returns."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Any], **model: Any):
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.model = {"id": "scripted", "object": "model", **model}

    async def models(self, http: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.model]})

    async def complete(self, http: Request) -> Response:
        self.bodies.append(await http.json())
        self.headers.append(dict(http.headers))
        made = self.script(len(self.bodies) - 1, self.bodies[-1])
        return made if isinstance(made, Response) else StreamingResponse(events(made), media_type="text/event-stream")

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve on a free port of this process; gives the address."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        listener = listen("127.0.0.1", 0)
        http = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, lifespan="off"))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not http.started:
                time.sleep(0.005)
            yield url_of(listener)
        finally:
            http.should_exit = True
            thread.join(20)
            listener.close()


async def events(script: Script) -> AsyncIterator[bytes]:
    async for item in script:
        yield item if isinstance(item, bytes) else b"data: " + json.dumps(item).encode() + b"\n\n"


def piece(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    """An event of /v1/completions."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The event that counts tokens."""
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


DONE = b"data: [DONE]\n\n"


async def tokens(body: dict[str, Any], *, first_s: float = 0.0, gap_s: float = 0.0) -> Script:
    """As many tokens as asked for, with these pauses."""
    count = body["max_tokens"]
    for number in range(count):
        await asyncio.sleep(gap_s if number else first_s)
        yield piece("x", "length" if number == count - 1 else None)
    prompt = body.get("prompt")
    yield usage(len(prompt) if isinstance(prompt, list) else 7, count)
    yield DONE
