"""What clients and operators see of the prefix cache: usage, metrics, histories, and the route that empties it."""

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.request import SamplingParams
from apt_jax.serve.runtime.samples import fan_out
from tests.support.asgi_service import events_of, run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine

PROMPT = "a prompt of 25 characters"  # and </s>: 26 tokens, of which 24 are in full pages of 4
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def engine(on=True) -> FakeEngine:
    config = EngineConfig(
        max_num_seqs=4, max_num_queued_reqs=8, max_num_batched_tokens=64, scheduling_policy="fcfs",
        enable_prefix_caching=on,
    )  # fmt: skip
    return FakeEngine(config, CharTokenizer())


async def cached(client, path="/v1/completions", **fields):
    asked = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    reply = await client.post(path, json={"max_tokens": 2, **asked, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["usage"].get("prompt_tokens_details", {}).get("cached_tokens")


def test_usage_metrics_and_history_say_what_came_from_the_cache():
    async def main():
        async with serving(engine()) as client:
            assert [await cached(client) for _ in range(2)] == [0, 24]
            assert await cached(client, prompt=[PROMPT, PROMPT], n=2) == 48
            body = {"prompt": PROMPT, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
            events = events_of(await client.post("/v1/completions", json=body))
            assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 24}
            story = (await client.get(f"/debug/requests/{events[0]['id']}")).json()
            assert [sample["cached_tokens"] for sample in story["samples"]] == [24]
            metrics = (await client.get("/metrics")).text
            assert 'vllm:prefix_cache_queries_total{model_name="tiny"} 182.0' in metrics
            assert 'vllm:prefix_cache_hits_total{model_name="tiny"} 144.0' in metrics
            assert 'cache_config_info{block_size="4",enable_prefix_caching="True",model_name="tiny"} 1.0' in metrics
            assert 'apt:weights_info{dtype="float32",model_name="tiny",quantization="int8"} 1.0' in metrics

    run(main)


def test_salts_divide_completions_and_chats():
    async def main():
        async with serving(engine(), template=CHAT) as client:
            for path in ("/v1/completions", "/v1/chat/completions"):
                asked = {"cache_salt": "a"}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": None}
                found = [await cached(client, path, **fields) for fields in asked]
                assert found[0] == found[2] == found[3] == 0 < found[1]
                await client.post("/reset_prefix_cache")
            for wrong in (3, "", ["a"]):
                reply = await client.post("/v1/completions", json={"prompt": PROMPT, "cache_salt": wrong})
                assert reply.status_code == 400 and reply.json()["error"]["param"] == "cache_salt"

    run(main)


def test_the_route_empties_it():
    async def main():
        async with serving(engine()) as client:
            assert [await cached(client) for _ in range(2)] == [0, 24]
            reply = await client.post("/reset_prefix_cache")
            assert (reply.status_code, reply.content) == (200, b"")
            assert await cached(client) == 0

    run(main)


def test_without_the_flag_answers_have_no_details():
    async def main():
        async with serving(engine(on=False)) as client:
            assert [await cached(client, cache_salt="a") for _ in range(2)] == [None, None]
            assert (await client.post("/reset_prefix_cache")).status_code == 200
            assert 'vllm:prefix_cache_queries_total{model_name="tiny"} 0.0' in (await client.get("/metrics")).text

    run(main)


@pytest.mark.parametrize("text", [None, "a"])
def test_every_sample_has_its_request_s_salt_and_user(text):
    samples = fan_out("r", [[1, 2], [3]], SamplingParams(n=2), cache_salt=text, user=text)
    assert [(sample.cache_salt, sample.user) for sample in samples] == [(text, text)] * 4
    made = engine()
    requests = [sample.add_to(made) for sample in samples]
    assert [(request.cache_salt, request.user) for request in requests] == [(text, text)] * 4
