"""Real replicas: processes that Ray starts, a server in front, and what may happen to them while clients stream."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import httpx
import openai
import pytest

from tests.support import served_model
from tests.support.live_server import until as until_soon

pytest.importorskip("ray", reason="Ray is not installed; `make test-ray` installs it and runs these")

from tests.on_ray.replica_server import Answer, Server, body, check, clients, keep_asking, serving, stream, until

REQUESTS = 8

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_model.write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder) -> list[Answer]:
    """What one engine, without Ray, answers."""
    with served_model.serving(folder) as server:
        replies = [
            httpx.post(f"{server.url}/v1/completions", json=body(i), timeout=60).json()["choices"][0]
            for i in range(REQUESTS)
        ]
        until_soon(lambda: server.is_idle)
    return [Answer(reply["text"], reply["token_ids"], [reply["finish_reason"]]) for reply in replies]


@pytest.fixture(scope="module")
def server(folder, expected, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text("{{ 'a' * 5 }}")
    flags = ("--chat-template", str(template))
    with serving(folder, "--replicas", "2", "--router", "round-robin", *flags) as server:
        until(lambda: len(ready(server)) == 2, 120)
        yield server


def ready(server: Server) -> list[dict]:
    return [replica for replica in server.replicas() if replica["status"] == "ready"]


def test_two_replicas_answer_as_one_engine_does(server, expected):
    async def main():
        async with clients(server.url) as client:
            for answer, right in zip(
                await asyncio.gather(*(stream(client, i) for i in range(REQUESTS))), expected, strict=True
            ):
                check(answer, right)
            whole = (await client.post("/v1/completions", json=body(0))).json()
            assert whole["choices"][0]["token_ids"] == expected[0].token_ids and whole["slo"]["cache_kinds"]
            wrong = await client.post("/v1/completions", json=body(0, temprature=1))
            assert wrong.status_code == 400 and "did you mean temperature" in wrong.text
            long = await client.post("/v1/completions", json={"prompt": [5] * 200})
            assert long.status_code == 400 and "the context holds 128" in long.text
            chat = {"messages": [{"role": "user", "content": "Is anything of this read?"}], "max_tokens": 1}
            reply = (await client.post("/v1/chat/completions", json=chat)).json()
            text = {"prompt": "aaaaa", "add_special_tokens": False}
            count = (await client.post("/tokenize", json=text)).json()["count"]
            assert reply["usage"]["prompt_tokens"] == count  # the template of the file, not of the model

    asyncio.run(main())
    assert server.metric("vllm:generation_tokens_total") == 60 * (REQUESTS + 1) + 1
    text = httpx.get(f"{server.url}/metrics").text
    steps = [line for line in text.splitlines() if line.startswith("apt:batch_requests_count")]
    assert len(steps) == 2 and all(float(line.split()[-1]) > 30 for line in steps)  # both worked


def test_a_replica_killed_under_load_loses_nothing(server, expected):
    victim = ready(server)[0]

    async def main():
        async with clients(server.url) as client:
            stop = asyncio.Event()
            asking = asyncio.create_task(keep_asking(client, expected, stop, REQUESTS, pause_s=2))
            os.kill(victim["process_id"], signal.SIGSTOP)  # what it holds now it cannot finish any more
            await asyncio.to_thread(until, lambda: num_requests(server, victim["name"]) > 0, 60)
            os.kill(victim["process_id"], signal.SIGKILL)
            await asyncio.to_thread(until, lambda: victim["name"] not in names(server), 30)
            await asyncio.to_thread(until, lambda: len(ready(server)) == 2, 120)
            stop.set()
            assert await asking >= REQUESTS

    asyncio.run(main())
    assert server.metric("apt:requests_moved_total") >= 1 and server.metric("apt:replica_failures_total") == 1
    assert server.metric("apt:idle_lost_blocks") == 0


def num_requests(server: Server, name: str) -> int:
    """Unfinished requests of a replica."""
    return sum(replica["requests"] for replica in server.replicas() if replica["name"] == name)


def names(server: Server) -> set[str]:
    return {replica["name"] for replica in server.replicas()}


def test_an_update_under_load_drops_nothing(server, expected):
    before, moved = names(server), server.metric("apt:requests_moved_total")

    async def main():
        async with clients(server.url) as client:
            stop = asyncio.Event()
            asking = asyncio.create_task(keep_asking(client, expected, stop, 4, pause_s=1))
            await asyncio.to_thread(until, lambda: any(num_requests(server, name) for name in before), 60)
            server.signal(signal.SIGHUP)
            least = 2

            def is_updated() -> bool:
                nonlocal least
                least = min(least, len(ready(server)))
                return not before & names(server) and len(ready(server)) == 2

            await asyncio.to_thread(until, is_updated, 200)
            stop.set()
            assert await asking >= 4 and least == 2

    asyncio.run(main())
    assert server.metric("apt:requests_moved_total") == moved and server.metric("apt:replica_failures_total") == 1


def test_a_replica_whose_machine_will_be_taken_away_hands_its_requests_over(folder, expected, tmp_path):
    flags = ("--preemption-notice", f"file:{tmp_path}/{{replica}}", "--preemption-grace", "6")
    with serving(folder, "--replicas", "2", "--router", "round-robin", *flags) as server:
        until(lambda: len(ready(server)) == 2, 120)
        victim = ready(server)[0]["name"]

        async def main():
            async with clients(server.url) as client:
                stop = asyncio.Event()
                asking = asyncio.create_task(keep_asking(client, expected, stop, REQUESTS))
                await asyncio.to_thread(until, lambda: num_requests(server, victim) > 0, 60)
                (tmp_path / victim).touch()
                await asyncio.to_thread(until, lambda: victim not in names(server), 30)
                await asyncio.to_thread(until, lambda: len(ready(server)) == 2, 120)
                stop.set()
                assert await asking >= REQUESTS

        asyncio.run(main())
        assert server.metric("apt:replica_failures_total") == 0 and server.metric("apt:idle_lost_blocks") == 0


def test_replicas_follow_the_queue_up_and_down(folder, expected):
    flags = ("--replicas", "1", "--max-replicas", "2", "--scale-up-delay", "0.5", "--scale-down-delay", "2")
    with serving(folder, *flags, "--router", "pending-time", "--tbt-slo-ms", "60000") as server:

        async def main():
            async with clients(server.url) as client:
                stop = asyncio.Event()
                asking = asyncio.create_task(keep_asking(client, expected, stop, 16))
                await asyncio.to_thread(until, lambda: len(ready(server)) == 2, 120)
                stop.set()
                assert await asking >= 16

        asyncio.run(main())
        until(lambda: len(server.replicas()) == 1, 60)
        assert server.metric("apt:replicas_wanted") == 1


def test_replicas_follow_broken_promises_up_and_down(folder):
    """One seat each and far more blocks than it takes: nothing waits for memory, and nobody waits for long."""
    one_seat = ("--max-num-seqs", "1", "--num-blocks", "400", "--scheduling-policy", "fcfs")
    scaling = ("--replicas", "1", "--max-replicas", "2", "--scale-up-delay", "0.5", "--scale-down-delay", "2")

    async def ask(client, ttft_ms: float) -> tuple[bool, float]:
        """Whether an answer kept its promise, and the seconds that it took."""
        began = time.monotonic()
        slo = {"ttft_ms": ttft_ms, "tbt_ms": 60_000}
        reply = await client.post("/v1/completions", json=body(0, max_tokens=100, slo=slo))
        assert reply.status_code == 200, reply.text
        return reply.json()["slo"]["attained"], time.monotonic() - began

    async def keep_on(client, ttft_ms: float, kept: list[bool], stop: asyncio.Event) -> None:
        while not stop.is_set():
            kept.append((await ask(client, ttft_ms))[0])

    async def main() -> list[bool]:
        async with clients(server.url) as client:
            took_s = sorted([(await ask(client, 60_000))[1] for _ in range(7)])[3]
            kept: list[bool] = []
            stop = asyncio.Event()
            # two who always ask: with one seat each waits for the other's answer, twice as long as was promised
            asking = [asyncio.create_task(keep_on(client, took_s * 500, kept, stop)) for _ in range(2)]
            await asyncio.to_thread(until, lambda: len(ready(server)) == 2, 120)
            before = len(kept)
            assert sum(kept) < 0.5 * before and server.metric("vllm:kv_cache_usage_perc") < 0.2
            await asyncio.to_thread(until, lambda: len(kept) >= before + 40, 120)
            stop.set()
            await asyncio.gather(*asking)
            return kept[before + 5 :]  # some had been sent before

    with serving(folder, *scaling, *one_seat) as server:
        kept = asyncio.run(main())
        assert sum(kept) > 0.7 * len(kept)
        until(lambda: len(server.replicas()) == 1, 90)  # the broken promises are half a minute old by then
        assert server.metric("apt:replicas_wanted") == 1 and server.metric("apt:replica_failures_total") == 0


def test_a_batch_over_http_outlives_a_replica_that_is_killed(folder, tmp_path):
    """OpenAI's Batch API over two replicas: every line once, with the text that a completion of it has."""
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {**body(i % REQUESTS), "max_tokens": 8 + i},
        }
        for i in range(40)
    ]
    source = b"".join(
        json.dumps({**line, "body": {**line["body"], "stream": False}}).encode() + b"\n" for line in lines
    )
    flags = ("--replicas", "2", "--router", "round-robin", "--batch-dir", str(tmp_path))
    with serving(folder, *flags) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        until(lambda: len(ready(server)) == 2, 120)
        file = client.files.create(file=("in.jsonl", source), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 5, 120)
        os.kill(ready(server)[0]["process_id"], signal.SIGKILL)
        until(lambda: client.batches.retrieve(batch.id).status == "completed", 240)
        batch = client.batches.retrieve(batch.id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (len(lines), 0)
        found = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in found}
        assert len(found) == len(texts) == len(lines)
        for line in lines:
            asked = {**line["body"], "stream": False}
            reply = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()
            assert reply["choices"][0]["text"] == texts[line["custom_id"]]
        assert server.metric("apt:replica_failures_total") == 1


def test_replicas_take_the_level_of_logs_and_follow_grammars(folder, tmp_path):
    """Each compiles a grammar for itself, outside of its engine's thread."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "apt_jax.serve.cli", "serve", str(folder), "--load-format", "dummy"]
    flags = ["--port", str(port), "--replicas", "2", "--snapshot-file", "None", "--log-level", "warning"]
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
    log, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    environment = {**os.environ, "RAY_TMPDIR": temporary, "RAY_AUTH_MODE": "disabled"}
    with log.open("w") as file:
        process = subprocess.Popen([*command, *served_model.flags(), *flags], stderr=file, env=environment)
    try:
        until(lambda: served_model.is_ready(url), 300)
        for number in range(4):
            asked = {"prompt": "a", "max_tokens": 60, "structured_outputs": {"regex": f"{number}[ab]{{3}}"}}
            choice = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]
            assert re.fullmatch(f"{number}[ab]{{3}}", choice["text"]) and choice["finish_reason"] == "stop"
    finally:
        process.terminate()
        code = process.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)
    assert code == 0 and "INFO" not in log.read_text()
