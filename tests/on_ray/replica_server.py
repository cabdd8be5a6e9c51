"""`apt-jax serve` with replicas in a process of its own, and clients that know what they should get."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.served_model import NAME, is_ready, start_server


@dataclass
class Answer:
    """What a stream brought; `longest_gap_s` is between events."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def replicas(self) -> list[dict[str, Any]]:
        return httpx.get(f"{self.url}/debug/state", timeout=10).json()["replicas"]

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    """Serve until the block ends; then nothing of Ray may be left."""
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
    with environment({"RAY_TMPDIR": temporary, "RAY_AUTH_MODE": "disabled"}):
        process, url = start_server(folder, "--served-model-name", NAME, "--snapshot-file", "None", *flags)
    assert process.stderr is not None
    log = Path(temporary) / "server.log"
    with log.open("w") as file:
        copy = subprocess.Popen(["cat"], stdin=process.stderr, stdout=file)
    try:
        until(lambda: is_ready(url) or process.poll() is not None, 300)
        assert process.poll() is None, log.read_text()
        yield Server(process, url)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        finally:
            process.kill()
            process.stderr.close()
            copy.wait(10)
    assert code == 0, log.read_text()[-2000:]
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.1)


def body(number: int, **more: Any) -> dict[str, Any]:
    """Request `number`: its own prompt and seed, so that it has one right answer."""
    return {
        "model": NAME, "prompt": f"the quick brown fox {number}", "max_tokens": 60, "temperature": 0.9, "seed": number,
        "ignore_eos": True, "return_token_ids": True, **more,
    }  # fmt: skip


async def stream(client: httpx.AsyncClient, number: int) -> Answer:
    answer, last_s = Answer(), None
    async with client.stream("POST", "/v1/completions", json=body(number, stream=True)) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.monotonic()
            answer.longest_gap_s = max(answer.longest_gap_s, 0.0 if last_s is None else now - last_s)
            last_s = now
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            (choice,) = event["choices"]
            answer.text += choice["text"]
            answer.token_ids += choice["token_ids"]
            answer.finish_reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return answer


@contextlib.asynccontextmanager
async def clients(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        yield client


async def keep_asking(
    client: httpx.AsyncClient, expected: list[Answer], stop: asyncio.Event, at_once: int, pause_s: float = 0.0
) -> int:
    """`at_once` streams until `stop`, `pause_s` between them; every answer must be the expected one. How many."""
    count = 0

    async def ask(first: int) -> None:
        nonlocal count
        number = first
        while not stop.is_set():
            check(await stream(client, number % len(expected)), expected[number % len(expected)])
            count += 1
            number += at_once
            await asyncio.sleep(pause_s)

    async with asyncio.TaskGroup() as group:
        for first in range(at_once):
            group.create_task(ask(first))
    return count


def check(answer: Answer, expected: Answer) -> None:
    assert answer.token_ids == expected.token_ids and answer.text == expected.text
    assert answer.finish_reasons == ["length"]
