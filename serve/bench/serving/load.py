"""Open-loop load: every request is sent at its planned time, whatever happened to earlier ones."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import aiohttp
import numpy as np

from apt_jax.serve.bench.serving.client import Endpoint, ask
from apt_jax.serve.bench.serving.records import Record, Run
from apt_jax.serve.bench.work import Work

HEARTBEAT_S = 0.02


async def load(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    works: Sequence[Work],
    planned_s: Sequence[float],
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[Record], None] = lambda record: None,
) -> Run:
    """Send `works` at `planned_s`, in seconds after the start and in order; returns once every one has ended.

    With `max_concurrency`, due requests wait in the client for their turn. Bodies are made before the clock starts.
    """
    bodies = [endpoint.body(work) for work in works]
    records = [Record(float(at), w.prompt_tokens, w.output_tokens) for at, w in zip(planned_s, works, strict=True)]
    turn = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else contextlib.nullcontext()
    origin = time.perf_counter()

    async def send(record: Record, body: bytes) -> None:
        record.started_s = time.perf_counter() - origin
        async with turn:
            record.sent_s = time.perf_counter() - origin
            await ask(session, endpoint, body, record, origin)
        on_done(record)

    lags: list[float] = []
    heart = asyncio.create_task(_beat(lags))
    cpu = time.process_time()
    try:
        async with asyncio.TaskGroup() as group:
            for record, body in zip(records, bodies, strict=True):
                delay = origin + record.planned_s - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                group.create_task(send(record, body))
    finally:
        heart.cancel()
    seconds = time.perf_counter() - origin
    lag = float(np.percentile(lags, 99)) if lags else 0.0
    return Run(records, seconds, lag, (time.process_time() - cpu) / max(seconds, 1e-9))


async def _beat(lags: list[float]) -> None:
    """Note how late a timer fires, for as long as it lives."""
    while True:
        due = time.perf_counter() + HEARTBEAT_S
        await asyncio.sleep(HEARTBEAT_S)
        lags.append(max(time.perf_counter() - due, 0.0))
