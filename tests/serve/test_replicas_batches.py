"""A server in front of replicas as its clients see it: the Batch API while replicas die, and the dashboard's routes.

The backend is the real one; its replicas are actors of this process instead of Ray's.
"""

import asyncio
import json
import time

import httpx
import openai
import pytest

from apt_jax.serve.batch.store import BatchStore
from apt_jax.serve.batch.worker import BatchWorker
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.replicas import backend as backend_module
from apt_jax.serve.replicas.backend import ReplicaBackend
from apt_jax.serve.replicas.options import RayOptions, ReplicaOptions
from tests.serve.test_batch_api import lines_of
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live, until
from tests.support.local_replicas import SPEC, LocalHandle

LINES = 60


class Noting(FakeEngine):
    """Remembers how many requests it had at once."""

    def __init__(self):
        super().__init__(tokenizer=CharTokenizer())
        self.most = 0

    def step(self):
        time.sleep(0.002)
        self.most = max(self.most, self.state.num_unfinished)
        return super().step()


class LocalBackend(ReplicaBackend):
    """Replicas of this process, by name."""

    def __init__(self, replicas: int):
        super().__init__(SPEC, ReplicaOptions(replicas=replicas, router="round-robin"), RayOptions("local"))
        self.handles: dict[str, LocalHandle] = {}

    def _launch(self, name):
        self.handles[name] = LocalHandle(name, Noting())
        return self.handles[name]


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(backend_module, "connect", lambda address: None)
    monkeypatch.setattr(backend_module, "disconnect", lambda: None)
    monkeypatch.setattr("apt_jax.serve.http.service.LOOK_EVERY_S", 0.05)
    backend = LocalBackend(2)
    service = Service(backend, backend.view("tiny"), "tiny", ServerOptions(snapshot_file=None))
    store = BatchStore(tmp_path)
    service.batches = BatchWorker(
        store, backend.submit, service.served_model, service.off_loop, lambda: backend.num_engines
    )
    with live(service) as url:
        until(lambda: len(backend.fleet.ready()) == 2)
        yield backend, url
    store.close()


def test_a_batch_is_answered_by_all_replicas_and_outlives_one(served):
    """Every line once, with the text that one engine would give; half of the seats of all."""
    backend, url = served
    source = lines_of(*({"prompt": chr(97 + i % 20), "max_tokens": 3 + i % 5} for i in range(LINES)))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", source), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 10)
        lost = backend.handles[min(backend.handles)]
        asyncio.run_coroutine_threadsafe(kill(lost), backend._loop).result()
        until(lambda: client.batches.retrieve(batch.id).status == "completed")
        batch = client.batches.retrieve(batch.id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (LINES, 0)
        answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in answers}
    assert len(answers) == LINES
    for i in range(LINES):
        first = 97 + i % 20
        assert texts[str(i)] == "".join(chr(first + 1 + k) for k in range(3 + i % 5))
    seats = SPEC.config.max_num_seqs or FakeEngine().config.max_num_seqs
    assert all(0 < handle.engine.most <= seats for handle in backend.handles.values())
    until(lambda: len(backend.fleet.ready()) == 2)


async def kill(handle):
    handle.kill()


def test_the_dashboard_s_routes_are_of_all_replicas(served):
    backend, url = served
    for _ in range(6):
        body = {"prompt": "a", "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
    found = httpx.get(f"{url}/debug/requests").json()["requests"]
    assert len(found) == 6 and {entry["replica"] for entry in found} == set(backend.handles)
    assert [entry["arrived_ago_ms"] for entry in found] == sorted(entry["arrived_ago_ms"] for entry in found)
    story = httpx.get(f"{url}/debug/requests/{found[0]['id']}").json()["samples"][0]
    assert story["replica"] == found[0]["replica"] and story["tokens"] == 4 and len(story["token_ms"]) == 4
    until(lambda: httpx.get(f"{url}/debug/history").json()["sums"]["prefix_queries"] > 0)
    sums = httpx.get(f"{url}/debug/history").json()["sums"]
    assert (sums["finished"], sums["kept"], sums["tokens"]) == (6, 6, 24)
    state = httpx.get(f"{url}/debug/state").json()
    assert {plan["replica"] for plan in state["plans"]} == set(backend.handles)
    assert state["counts"]["prefix_queries"] == sums["prefix_queries"]
