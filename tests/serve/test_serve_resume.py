"""Stopping and going on with a real engine: the tokens are those of a server that was never stopped."""

import http.client
import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from apt_jax.serve.http.resume import Resumption
from apt_jax.serve.http.server import keep_caches
from apt_jax.serve.http.snapshot_file import write_snapshot
from tests.support.live_server import until
from tests.support.served_model import NAME, serving, start_server, write_folder

KEPT = re.compile(r"cached pages of \d+ of \d+ unfinished samples are in (.*): (\d+) tokens, ([0-9.]+) MiB")

COMMON = {"ignore_eos": True, "return_token_ids": True, "model": NAME}
REQUESTS = [
    ("/v1/completions", {"prompt": "the quick", "temperature": 0, "max_tokens": 60}),
    ("/v1/completions", {"prompt": ["def add(", "the lazy dog"], "n": 2, "seed": 5, "max_tokens": 50, "logprobs": 2}),
    ("/v1/completions", {"prompt": "def", "seed": 9, "max_tokens": 60, "logprobs": 1, "echo": True}),
    ("/v1/completions", {"prompt": "lazy return dog", "seed": 10, "max_tokens": 60, "prompt_logprobs": 2}),
    ("/v1/completions", {"prompt": "x", "seed": 6, "frequency_penalty": 1.5, "max_tokens": 70, "stream": True}),
    ("/v1/completions", {"prompt": "return", "seed": 7, "top_p": 0.8, "stop": ["zz", "qq"], "max_tokens": 60}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "seed": 8, "max_tokens": 50}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"))


def ask(url, path, body):
    return httpx.post(f"{url}{path}", json={**COMMON, **body}, timeout=60)


def choices_of(body):
    return [
        (c["token_ids"], c["text"] if "text" in c else c["message"]["content"], c["finish_reason"], c["logprobs"])
        for c in body["choices"]
    ]


def numbers(logprobs):
    """0 for the first token of a prompt, which has none."""
    return [0.0 if value is None else value for value in logprobs]


def prompt_logprobs_of(body):
    """Of each choice's prompt, token by token."""
    return [
        [value["logprob"] for entry in c.get("prompt_logprobs", []) for value in (entry or {}).values()]
        for c in body["choices"]
    ]


def close(found, expected):
    """The same tokens and texts; log-probabilities may differ in the last digits."""
    for (ids, text, reason, logprobs), (want_ids, want_text, want_reason, want_logprobs) in zip(
        found, expected, strict=True
    ):
        assert (ids, text, reason) == (want_ids, want_text, want_reason)
        assert (logprobs is None) == (want_logprobs is None)
        if logprobs is not None:
            assert numbers(logprobs["token_logprobs"]) == pytest.approx(
                numbers(want_logprobs["token_logprobs"]), abs=1e-3
            )


@pytest.mark.parametrize(
    "cache", [{}, {"cache_dtype": "int8", "cache_mode": "hidden"}, {"cache_dtype": "int8", "cache_mode": "kv"}]
)
def test_a_stopped_server_s_requests_end_with_the_tokens_of_one_that_was_never_stopped(folder, tmp_path, caplog, cache):
    """With the pages that the server had cached of them, and without."""
    caplog.set_level("INFO", "apt_jax.serve")
    paths = tmp_path / "left.jsonl", tmp_path / "with caches.jsonl"
    with serving(folder, **cache) as server, ThreadPoolExecutor(len(REQUESTS)) as pool:
        whole = [{**body, "stream": False} for _, body in REQUESTS]
        bodies = [ask(server.url, r[0], body).json() for r, body in zip(REQUESTS, whole, strict=True)]
        expected = [(choices_of(body), prompt_logprobs_of(body)) for body in bodies]
        assert len(expected[3][1][0]) > 4
        step = server.engine.step
        server.engine.step = lambda: (time.sleep(0.02), step())[1]
        asked = [pool.submit(ask, server.url, *request) for request in REQUESTS]
        until(lambda: any(len(r.output_token_ids) > 35 for r in server.engine.state.running))
        server.service.is_stopping = True
        server.thread.abort_all()
        replies = [reply.result() for reply in asked]
        records = server.service.unfinished_records
        keep_caches(server.service, paths[1], records)
        assert server.is_idle
    assert all(reply.status_code == 200 and '"abort"' in reply.text for reply in replies)
    (kept,) = [found for text in caplog.messages if (found := KEPT.search(text))]
    caches, tokens = Path(kept[1]), int(kept[2])
    assert (
        caches.is_dir()
        and tokens > 16
        and float(kept[3]) == pytest.approx(sum(path.stat().st_size for path in caches.iterdir()) / 2**20, abs=0.1)
    )
    for path in paths:
        assert write_snapshot(path, records) == len(REQUESTS)
        resumption = Resumption(path)
        with serving(folder, resumption=resumption, scheduling_policy="fcfs", **cache) as server:
            until(lambda path=path: not path.exists())
            assert server.is_idle
            hits = server.engine.figures().prefix_hits
        check_results(resumption, records, expected)
        assert (hits >= 16) is (path is paths[1])
    assert f"tokens of them came from {caches}" in caplog.text and not caches.exists()


def check_results(resumption, records, expected):
    """Each request has the tokens that it was to have."""
    results = {}
    for line in map(json.loads, resumption.results_path.read_text().splitlines()):
        body = line["response"]["body"]
        results[line["custom_id"]] = (choices_of(body), prompt_logprobs_of(body))
    found = {json.dumps(record["prompts"]): results[record["id"]] for record in records}
    for want, (_, body) in zip(expected, REQUESTS, strict=True):
        (record,) = [r for r in records if r["body"].get("seed") == body.get("seed")]
        choices, prompt_logprobs = found[json.dumps(record["prompts"])]
        close(choices, want[0])
        for one, other in zip(prompt_logprobs, want[1], strict=True):
            assert one == pytest.approx(other, abs=1e-3)


def test_sigterm_keeps_what_runs_and_a_second_one_ends_at_once(folder, tmp_path):
    path = tmp_path / "left.jsonl"
    process, url = start_server(folder, "--shutdown-timeout", "60", "--snapshot-file", str(path))
    stuck = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        stuck.putrequest("POST", "/v1/completions")
        stuck.putheader("content-length", "100")
        stuck.endheaders(b"{")  # the rest never comes
        assert httpx.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        until(lambda: not listens(url))
        assert process.poll() is None, "it waits for the request"
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM
    finally:
        stuck.close()
        process.kill()
        process.communicate()


def listens(url: str) -> bool:
    """Whether new connections are taken."""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
