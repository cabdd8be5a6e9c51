"""Open-loop load: every request is sent at its planned time, whatever happened to others.

In a conversation that is so for the first turn; the next one is due when the user has thought about the answer.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import aiohttp
import numpy as np

from apt_jax.serve.bench.serving.client import Endpoint, ask
from apt_jax.serve.bench.serving.records import Record, Run
from apt_jax.serve.bench.work import Content, Work

HEARTBEAT_S = 0.02
NOT_SENT = "not sent, since an earlier turn of its conversation failed"
NO_TOKEN_IDS = "the server returned no token ids to go on with; give --tokenizer, so that conversations are text"


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

    With `max_concurrency`, due requests wait in the client for their turn. Bodies are made before the clock starts, but
    for later turns of conversations. Where a turn fails, those after it fail unsent.
    """
    bodies = [endpoint.body(work) for work in works]
    records = [Record(float(at), w.prompt_tokens, w.output_tokens) for at, w in zip(planned_s, works, strict=True)]
    turn = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else contextlib.nullcontext()
    origin = time.perf_counter()

    async def send(work: Work, record: Record, body: bytes) -> Content | None:
        record.started_s = time.perf_counter() - origin
        async with turn:
            record.sent_s = time.perf_counter() - origin
            goes_on = work.then is not None
            answer = await ask(session, endpoint, body, record, origin, keeps_text=goes_on)
        on_done(record)
        return answer.said(work) if goes_on and record.error is None else None

    async def converse(work: Work, record: Record, body: bytes) -> None:
        said = await send(work, record, body)
        while work.then is not None:
            assert record.ended_s is not None
            due_s, then = record.ended_s + work.then.think_s, work.then
            before = record
            record = Record(due_s, then.prompt_tokens, then.output_tokens, turn=record.turn + 1)
            records.append(record)
            if said is None:
                record.error, record.ended_s = NOT_SENT if before.error else NO_TOKEN_IDS, due_s
                on_done(record)
                work = then
                continue
            work = work.answered(said)
            body = endpoint.body(work)
            await asyncio.sleep(max(origin + due_s - time.perf_counter(), 0.0))
            said = await send(work, record, body)

    lags: list[float] = []
    heart = asyncio.create_task(_beat(lags))
    cpu = time.process_time()
    try:
        async with asyncio.TaskGroup() as group:
            for work, record, body in zip(works, [*records], bodies, strict=True):
                delay = origin + record.planned_s - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                group.create_task(converse(work, record, body))
    finally:
        heart.cancel()
    seconds = time.perf_counter() - origin
    lag = float(np.percentile(lags, 99)) if lags else 0.0
    begins_s = max(planned_s, default=0.0) if any(work.then is not None for work in works) else None
    return Run(records, seconds, lag, (time.process_time() - cpu) / max(seconds, 1e-9), begins_s)


async def _beat(lags: list[float]) -> None:
    """Note how late a timer fires, for as long as it lives."""
    while True:
        due = time.perf_counter() + HEARTBEAT_S
        await asyncio.sleep(HEARTBEAT_S)
        lags.append(max(time.perf_counter() - due, 0.0))
