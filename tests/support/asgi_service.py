"""The application around the fake engine, called without a socket."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx

from apt_jax.serve.batch.worker import BatchWorker
from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.status import EngineStatus

MAX_BODY_BYTES = 4096
NOTHING_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}  # in usage


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 20))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def serving(engine, *, wait=True, template=None, resumption=None, store=None, **options):
    """A client of an application around `engine`; `options` are the server's, `store` has files and batches."""
    thread = EngineThread(lambda: engine)
    service = Service.of_engine(thread, "tiny", ServerOptions(max_body_bytes=MAX_BODY_BYTES, **options))
    service.chat_template = template
    if store is not None:
        service.batches = BatchWorker(store, thread.submit, service.served_model, service.off_loop)
    app = create_app(service, resumption)
    async with app.router.lifespan_context(app):
        if wait:
            await until(lambda: thread.status is EngineStatus.READY)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                client.app, client.service = app, service
                yield client
        finally:
            if engine.is_paced:
                engine.allow_step(1000)


def events_of(reply: httpx.Response) -> list[Any]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, end = reply.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]
