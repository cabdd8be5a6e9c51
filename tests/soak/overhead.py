"""What HTTP costs: streamed tokens per second of CPU time, with an engine that costs nothing; and the detokeniser.

    python tests/soak/overhead.py [--streams 256] [--steps-per-s 40] [--seconds 10]

Every stream gets one token per step, so nothing is saved by sending several tokens at once. CPU time of the server's
process (all its threads) is what counts: it does not depend on what else the machine does. Clients are another process.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from typing import Any

import psutil
import uvicorn

from apt_jax.cache import CacheKind
from apt_jax.checkpoints.source import DEMO_FOLDER
from apt_jax.engine_config import EngineConfig
from apt_jax.output import Output
from apt_jax.request import FinishReason
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from apt_jax.serve.http.app import create_app
from apt_jax.serve.http.server import http_config, listen, url_of
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.tokenization.tokenizer import Tokenizer
from tests.support.fake_engine import CharTokenizer, FakeEngine


class FreeEngine(FakeEngine):
    """Gives every request a token per step, at a given rate, and does no more than hand them out."""

    def __init__(self, streams: int, steps_per_s: float):
        config = EngineConfig(max_num_seqs=streams, max_num_queued_reqs=streams)
        super().__init__(config, CharTokenizer(), num_blocks=8 * streams)
        self.max_model_len = 1 << 20
        self._period_s = 1 / steps_per_s
        self._next_s = 0.0

    def step(self) -> list[Output]:
        time.sleep(max(0.0, self._next_s - time.monotonic()))
        self._next_s = max(self._next_s, time.monotonic() - self._period_s) + self._period_s
        now = time.monotonic()
        outputs, self._ended = self._ended, []
        requests = list(self._requests.values())
        entries = tuple(Scheduled(request, 1, CacheKind.KV, Reason.DECODES) for request in requests)
        self.last_plan = Plan(scheduled=entries)
        for request in requests:
            request.num_inflight_tokens += 1
            reason: FinishReason | None = self.state.commit(request, 120, now)
            outputs.append(Output(request, "x", (120,), (), reason))
            if reason is not None:
                del self._requests[request.request_id]
        return outputs


def serve_free(streams: int, steps_per_s: float, port: Any) -> None:
    """The server's process."""
    service = Service.of_engine(EngineThread(lambda: FreeEngine(streams, steps_per_s)), "free", ServerOptions())
    listener = listen("127.0.0.1", 0)
    port.put(url_of(listener))
    uvicorn.Server(http_config(create_app(service), service.options)).run(sockets=[listener])


class Counter(asyncio.Protocol):
    """One client: sends its request and counts events."""

    def __init__(self, tokens: int, total: list[int]):
        body = json.dumps({"prompt": "a", "max_tokens": tokens, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        self._request, self._total = head.encode() + body, total

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._total[0] += data.count(b"data: {")


async def measure(url: str, pid: int, streams: int, seconds: float, tokens: int) -> tuple[float, float]:
    """Streamed tokens per second of wall time, and per second of the server's CPU time."""
    host, port = url.removeprefix("http://").split(":")
    loop, total = asyncio.get_running_loop(), [0]
    for _ in range(streams):
        await loop.create_connection(lambda: Counter(tokens, total), host, int(port))
    await asyncio.sleep(3)
    server = psutil.Process(pid)
    used, count, began = sum(server.cpu_times()[:2]), total[0], time.monotonic()
    await asyncio.sleep(seconds)
    done = total[0] - count
    return done / (time.monotonic() - began), done / (sum(server.cpu_times()[:2]) - used)


def detokenizer_s(tokens: Sequence[int]) -> float:
    """Seconds per token of the demo model's detokeniser."""
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    detokenizer = tokenizer.detokenizer()
    began = time.process_time()
    for token in tokens:
        detokenizer.push([token])
    return (time.process_time() - began) / len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps-per-s", type=float, default=40)
    parser.add_argument("--seconds", type=float, default=10)
    asked = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    server = context.Process(target=serve_free, args=(asked.streams, asked.steps_per_s, port), daemon=True)
    server.start()
    assert server.pid is not None
    url = port.get(timeout=120)
    try:
        tokens = int(10 * asked.steps_per_s * (asked.seconds + 10))
        wall, cpu = asyncio.run(measure(url, server.pid, asked.streams, asked.seconds, tokens))
    finally:
        server.terminate()
        server.join(20)
    ids = list(itertools.islice(itertools.cycle(range(5, 2000)), 100_000))
    load = f"{asked.streams} streams, {asked.steps_per_s:g} steps/s"
    print(f"{load}, an event per token and stream, {os.cpu_count()} cores")
    print(f"streamed: {wall:,.0f} tokens/s of {asked.streams * asked.steps_per_s:,.0f} offered")
    print(f"per second of the server's CPU time: {cpu:,.0f} tokens ({1e6 / cpu:.0f} us per token)")
    print(f"of that the detokeniser: {1e6 * detokenizer_s(ids):.1f} us per token (not run by the free engine)")


if __name__ == "__main__":
    main()
