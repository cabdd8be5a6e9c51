"""`make soak`: load and faults on a real server with the demo model. Nothing may be lost, leaked or left open.

    python tests/soak [--scale 0.1] [--only streams,random,...] [serve flags]

Each scenario checks what must hold and prints what it saw. After one that fails the next has a new server.
Scale 1 is 1,000 concurrent streams and 10,000 requests.
"""

import argparse
import asyncio
import collections
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.soak.client import Outcome, complete, send_raw
from tests.soak.conversations import conversations
from tests.soak.server import Server
from tests.soak.stalls import stalls

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
PATHS = (b"/v1/completions", b"/v1/chat/completions", b"/tokenize", b"/detokenize", b"/debug/profile")
WORDS = ("def", "return", "the", "file", "of", "a", "list", "is", "not", "self", "import", "for", "in", "class", "(")


def prompt(numbers: random.Random, words: int) -> str:
    return " ".join(numbers.choices(WORDS, k=words))


def streams(server: Server, scale: float) -> str:
    """Many streams at once, all of which end whole."""
    count = max(int(1000 * scale), 10)

    async def run() -> list[Outcome]:
        body = {"prompt": "def read(", "max_tokens": 16, "stream": True, "ignore_eos": True}
        return await asyncio.gather(*(complete(server.port, body) for _ in range(count)))

    began = time.monotonic()
    outcomes = asyncio.run(run())
    bad = [o for o in outcomes if not o.whole or o.events != 16]
    assert not bad, f"{len(bad)} of {count} streams did not end whole, the first: {bad[0]}"
    return f"{count} streams at once, {count * 16 / (time.monotonic() - began):,.0f} tokens/s"


def mixed(server: Server, scale: float) -> str:
    """Requests of random size, a fifth of whose clients leave; memory must be flat in the second half."""
    sizes, shown = [], []
    for half in range(2):
        shown.append(half_mixed(server, scale / 2, half))
        sizes.append(server.figures()["rss_mb"])
    assert sizes[1] < 1.05 * sizes[0], f"memory: {sizes[0]:.0f} MB after the first half, {sizes[1]:.0f} MB after all"
    return f"{shown[0]}; again {shown[1]}; {sizes[0]:.0f} MB after the first half, {sizes[1]:.0f} MB after the second"


def half_mixed(server: Server, scale: float, seed: int) -> str:
    count, numbers = max(int(10_000 * scale), 50), random.Random(seed)
    before = server.figures()

    async def run() -> collections.Counter[str]:
        seen: collections.Counter[str] = collections.Counter()
        slots = asyncio.Semaphore(300)

        async def one() -> None:
            body = {
                "prompt": prompt(numbers, numbers.randint(1, 120)),
                "max_tokens": numbers.randint(1, 40),
                "n": numbers.choice([1, 1, 1, 2]),
                "temperature": numbers.choice([0, 0.8]),
                "stream": numbers.random() < 0.7,
            }
            leave = numbers.randint(0, 6) if numbers.random() < 0.2 else None
            async with slots:
                outcome = await complete(server.port, body, leave_after=leave)
            if leave is not None and not outcome.whole:
                seen["left"] += 1
            elif outcome.status == 200:
                assert outcome.whole and len(outcome.reasons) == body["n"], outcome
                seen["answered"] += 1
            else:
                assert outcome.status == 503, outcome
                seen["refused"] += 1

        await asyncio.gather(*(one() for _ in range(count)))
        return seen

    seen = asyncio.run(run())
    after = server.settle()
    assert sum(seen.values()) == count
    assert after.get('vllm:request_success_total{finished_reason="error"}', 0) == 0
    assert after["fds"] <= before["fds"] + 16, f"file descriptors: {before['fds']} before, {after['fds']} after"
    assert after["threads"] <= before["threads"] + 40, "threads leaked"  # the pools fill up once
    tasks = [found["apt:event_loop_tasks"] for found in (before, after)]
    assert tasks[1] <= tasks[0] + 2, f"event loop tasks: {tasks[0]:.0f} before, {tasks[1]:.0f} after"
    return ", ".join(f"{number} {name}" for name, number in sorted(seen.items()))


def slow(server: Server, scale: float) -> str:
    """Readers that take a few bytes now and then do not slow the others down, and end whole."""

    async def run() -> tuple[list[Outcome], float]:
        body = {"prompt": "def", "max_tokens": 64, "stream": True, "ignore_eos": True}
        lazy = [asyncio.create_task(complete(server.port, body, pause_s=0.2, read_bytes=2048)) for _ in range(20)]
        await asyncio.sleep(0.5)
        began = time.monotonic()
        quick = await asyncio.gather(*(complete(server.port, body) for _ in range(20)))
        took_s = time.monotonic() - began
        return [*quick, *await asyncio.gather(*lazy)], took_s

    outcomes, took_s = asyncio.run(run())
    assert all(outcome.whole for outcome in outcomes)
    return f"20 quick streams took {took_s:.1f} s beside 20 slow ones"


GOOD = json.dumps({"prompt": "a", "max_tokens": 1, "stop": ["x"], "logit_bias": {"5": 1}, "slo": {"ttft_ms": 5}})


def noise(numbers: random.Random) -> tuple[bytes, bool]:
    """Bytes to send, and whether they end before a request does."""
    kind = numbers.randrange(6)
    text = bytearray(GOOD.encode())
    if kind == 0:
        return numbers.randbytes(numbers.randint(1, 3000)), True
    if kind == 1:
        for _ in range(numbers.randint(1, 6)):
            text[numbers.randrange(len(text))] = numbers.randrange(256)
    elif kind == 2:
        text = bytearray(b"[" * numbers.randint(1, 50_000))
    elif kind == 3:
        wrong = numbers.choice([[[]], [[1e9]], {}, 7, [-5], "\ud800", [10**30]])
        text = bytearray(json.dumps({"prompt": wrong}).encode())
    elif kind == 4:
        del text[numbers.randrange(len(text)) :]
    length = len(text) + (numbers.randint(1, 50) if kind == 5 else 0)
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return head % (numbers.choice(PATHS), length) + text, length > len(text)


def hostile(server: Server, scale: float) -> str:
    """Bytes and bodies that are wrong in every way get a 4xx or a closed connection, never a 5xx."""
    numbers, count = random.Random(2), max(int(2000 * scale), 100)

    async def run() -> collections.Counter[int]:
        slots = asyncio.Semaphore(50)

        async def one() -> int:
            async with slots:
                data, ends = noise(numbers)
                return await send_raw(server.port, data, ends=ends)

        return collections.Counter(await asyncio.gather(*(one() for _ in range(count))))

    seen = asyncio.run(run())
    worst = [status for status in seen if status >= 500 and status != 503]
    assert not worst, f"{worst} came back"
    assert server.get("/health").status_code == 200
    return ", ".join(f"{number} x {status or 'closed'}" for status, number in sorted(seen.items()))


def terminated(server: Server, scale: float, restart: Callable[..., Server]) -> str:
    """SIGTERM under load: every accepted request is answered or in the snapshot, and the next start finishes those."""
    count, left = max(int(200 * scale), 20), Path(server.log.parent) / "left.jsonl"

    async def run() -> list[Outcome]:
        body = {"prompt": "class", "max_tokens": 300, "ignore_eos": True, "stream": True, "seed": 3}
        tasks = [asyncio.create_task(complete(server.port, body)) for _ in range(count)]
        await asyncio.sleep(3)
        server.signal(signal.SIGTERM)
        return await asyncio.gather(*tasks)

    outcomes = asyncio.run(run())
    code = server.wait()
    assert code == 0, f"it exits with {code}: {server.tail()}"
    whole = sum("length" in outcome.reasons for outcome in outcomes)
    aborted = sum("abort" in outcome.reasons for outcome in outcomes)
    other = [o for o in outcomes if not o.is_definite]
    assert not other, f"{len(other)} requests are in no definite state, the first: {other[0]}"
    kept = len(left.read_text().splitlines()) if left.exists() else 0
    assert kept == aborted, f"{aborted} were aborted, {kept} are in the snapshot"
    again = restart()
    end = time.monotonic() + 300
    while left.exists():
        assert time.monotonic() < end, "they never end"
        time.sleep(1)
    done = left.with_name("left.jsonl.results.jsonl")
    results = [json.loads(line) for line in done.read_text().splitlines()] if kept else []
    assert len(results) == kept and all(r["response"]["status_code"] == 200 for r in results)
    texts = {r["response"]["body"]["choices"][0]["text"] for r in results}
    assert len(texts) <= 1, "the same seed and prompt came to different texts"
    again.settle()
    return f"{whole} finished within the grace time, {aborted} were kept and finished by the next start"


def killed(server: Server, scale: float, restart: Callable[..., Server]) -> str:
    """kill -9 under load, then a start that serves."""

    async def run() -> list[Outcome]:
        body = {"prompt": "class", "max_tokens": 300, "ignore_eos": True, "stream": True}
        tasks = [asyncio.create_task(complete(server.port, body)) for _ in range(60)]
        while (await asyncio.to_thread(server.get, "/load")).json()["running"] < 20:
            await asyncio.sleep(0.01)
        server.kill()
        return await asyncio.gather(*tasks)

    outcomes = asyncio.run(run())
    began = time.monotonic()
    again = restart()
    assert asyncio.run(complete(again.port, {"prompt": "a", "max_tokens": 1})).whole
    lost = sum(not outcome.whole for outcome in outcomes)
    assert lost, "it was killed when nothing ran any more"
    return f"{lost} of 60 streams broke off; serving again after {time.monotonic() - began:.0f} s"


def clock(server: Server, scale: float) -> str:
    """The wall clock jumps by hours at every look; nothing but time stamps may notice."""
    result = streams(server, scale / 4)
    found = server.settle()
    assert found["vllm:time_to_first_token_seconds_sum"] < 3600 * found["vllm:time_to_first_token_seconds_count"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", default="streams,mixed,slow,hostile,stalls,terminated,killed,conversations,clock")
    asked, flags = parser.parse_known_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))
    wanted = asked.only.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = folder / "template.jinja"
        template.write_text(TEMPLATE)
        keep = [
            "--chat-template",
            str(template),
            "--snapshot-file",
            str(folder / "left.jsonl"),
            "--resume-from",
            str(folder / "left.jsonl"),
            "--snapshot-cache",
        ]
        alive: list[Server] = []

        def start(clock_jumps: bool = False) -> Server:
            while alive:
                alive.pop().kill()
            alive.append(Server(folder, *keep, *flags, clock_jumps=clock_jumps))
            return alive[-1]

        faults: dict[str, str] = {}

        def run(part: Callable[..., str], *more: Any, clock_jumps: bool = False) -> None:
            """A part on the server that is there, on a new one after a part that failed."""
            name = part.__name__
            if name not in wanted:
                return
            try:
                server = alive[-1] if alive and not clock_jumps else start(clock_jumps=clock_jumps)
                before = server.settle()
                seen = part(server, asked.scale, *more)
                report(name, seen, before, alive[-1].settle())
                assert not alive[-1].count("Traceback"), f"a traceback in the log: {alive[-1].tail()}"
            except Exception as error:
                faults[name] = f"{type(error).__name__}: {error}"
                print(f"{name:10} FAILED: {faults[name]}", flush=True)
                if alive:
                    print(alive[-1].troubles(), file=sys.stderr, flush=True)
                    alive.pop().kill()

        try:
            for part in (streams, mixed, slow, hostile, stalls):
                run(part)
            for part in (terminated, killed, conversations):
                run(part, start)
            run(clock, clock_jumps=True)
        finally:
            while alive:
                alive.pop().kill()
        if faults:
            sys.exit(f"failed: {', '.join(faults)}")


def report(name: str, seen: str, before: dict[str, float], after: dict[str, float]) -> None:
    """One line per scenario, with memory, file descriptors and tasks before and after."""
    seen += f" [rss {before['rss_mb']:.0f} -> {after['rss_mb']:.0f} MB,"
    seen += f" fds {before['fds']:.0f} -> {after['fds']:.0f},"
    seen += f" tasks {before['apt:event_loop_tasks']:.0f} -> {after['apt:event_loop_tasks']:.0f}]"
    print(f"{name:10} ok: {seen}", flush=True)


if __name__ == "__main__":
    main()
