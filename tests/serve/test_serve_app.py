"""The routes, called as an ASGI application over the fake engine."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.support.asgi_service import MAX_BODY_BYTES, NOTHING_CACHED, events_of, run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine


def exchange(body: Any, engine: FakeEngine | None = None, headers: dict[str, str] | None = None) -> httpx.Response:
    """The reply to one POST; the engine must be idle and whole afterwards."""
    replies = []
    engine = engine or FakeEngine(tokenizer=CharTokenizer())

    async def main():
        async with serving(engine) as client:
            content = body if isinstance(body, bytes) else json.dumps(body)
            replies.append(await client.post("/v1/completions", content=content, headers=headers))
            after = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert after.json()["choices"][0]["text"] == "bc", "it serves on"
            assert engine.is_idle

    run(main)
    return replies[0]


def test_a_completion_in_openai_s_shape():
    reply = exchange({"model": "tiny", "prompt": "abc", "max_tokens": 4})
    body = reply.json()
    assert reply.status_code == 200 and body.pop("id").startswith("cmpl-") and body.pop("created") > 0
    slo = body.pop("slo")
    assert slo["p99_tbt_ms"] >= 0 and slo["ttft_ms"] > 0 and slo["attained"] and slo["cache_kinds"] == ["kv"]
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "defg", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8} | NOTHING_CACHED,
    }


def test_every_sample_reports_its_slo_and_the_response_the_worst():
    slo = {"ttft_ms": 60000, "tbt_ms": 0.001}
    body = exchange({"prompt": "a", "n": 2, "max_tokens": 3, "slo": slo}).json()
    assert (body["slo"]["ttft_slo_ms"], body["slo"]["tbt_slo_ms"], body["slo"]["attained"]) == (60000, 0.001, False)
    assert body["slo"]["p99_tbt_ms"] == max(choice["slo"]["p99_tbt_ms"] for choice in body["choices"])
    assert body["slo"]["longest_gap_ms"] == max(choice["slo"]["longest_gap_ms"] for choice in body["choices"])
    assert not body["slo"]["attained_strict"] and not body["slo"]["abandoned"]
    slo = {"ttft_ms": 60000, "tbt_ms": 60000, "stall_ms": 0.001}
    strictly = exchange({"prompt": "a", "max_tokens": 3, "slo": slo}).json()["slo"]
    assert (strictly["attained_strict"], strictly["attained"], strictly["stall_slo_ms"]) == (False, True, 0.001)
    chunks = events_of(exchange({"prompt": "a", "max_tokens": 3, "stream": True}))
    assert ["slo" in chunk for chunk in chunks] == [False, False, True] and chunks[-1]["slo"]["attained"]


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_more_tokens_than_the_context_holds_are_refused(more):
    reply = exchange({"prompt": "abc", "max_tokens": 125, **more})  # and 4 of the prompt
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "max_tokens"
    assert "the context holds 128 tokens and the prompt has 4; ask for at most 124" in reply.text


def test_a_stream_can_count_as_it_goes():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events_of(exchange({"prompt": "a", "max_tokens": 2, "stream": True, "stream_options": options}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2]


def test_max_tokens_defaults_to_16():
    assert exchange({"prompt": "A"}).json()["choices"][0]["text"] == "BCDEFGHIJKLMNOPQ"


def test_prompts_and_samples_become_choices_in_order():
    body = exchange({"prompt": ["a", "x"], "n": 2, "max_tokens": 2}).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "bc"), (1, "bc"), (2, "yz"), (3, "yz")]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12} | NOTHING_CACHED


@pytest.mark.parametrize("prompt", [[97], [[97], [98]]])
def test_prompts_may_be_token_ids(prompt):
    choices = exchange({"prompt": prompt, "max_tokens": 1, "return_token_ids": True}).json()["choices"]
    assert [(c["token_ids"], c["prompt_token_ids"]) for c in choices] == [([98], [97]), ([99], [98])][: len(choices)]


@pytest.mark.parametrize(("prompt", "text"), [("ab", "abcd"), ([97, 98], "abcd"), (["ab", "x"], "abcd")])
def test_echo_puts_the_prompt_first(prompt, text):
    assert exchange({"prompt": prompt, "max_tokens": 2, "echo": True}).json()["choices"][0]["text"] == text


def test_stop_is_reported():
    choice = exchange({"prompt": "a", "stop_token_ids": [ord("c")]}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"


def test_logprobs_come_in_openai_s_shape():
    choice = exchange({"prompt": "a", "max_tokens": 2, "logprobs": 2}).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["b", "c"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"b": -0.5, "c": -1.5}, {"c": -0.5, "d": -1.5}],
        "text_offset": [0, 1],
    }


ECHOED = {"prompt": "ab", "logprobs": 1, "echo": True}
PROMPT_LOGPROBS = {
    "tokens": ["\x02", "a", "b"],
    "token_logprobs": [None, -1.5, -1.5],
    "top_logprobs": [None, {"a": -1.5, "b": -0.5}, {"b": -1.5, "c": -0.5}],
    "text_offset": [0, 0, 1],  # </s>, which the tokenizer puts in front, is no part of the text
}


@pytest.mark.parametrize("stream", [False, True])
def test_echo_brings_the_logprobs_of_the_prompt_before_those_of_the_answer(stream):
    reply = exchange({**ECHOED, "max_tokens": 2, "stream": stream})
    choices = [chunk["choices"][0] for chunk in events_of(reply)] if stream else reply.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "abcd"
    found = {name: [x for c in choices for x in c["logprobs"][name]] for name in PROMPT_LOGPROBS}
    answer = {
        "tokens": ["c", "d"],
        "token_logprobs": [-0.5] * 2,
        "top_logprobs": [{"c": -0.5}, {"d": -0.5}],
        "text_offset": [2, 3],
    }
    assert found == {name: [*PROMPT_LOGPROBS[name], *answer[name]] for name in answer}
    assert "prompt_logprobs" not in choices[0]


def test_offsets_count_a_first_token_that_is_text():
    choice = exchange({**ECHOED, "prompt": [97, 98], "max_tokens": 1}).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"] and choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -0.5]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [[], [ord("c")]])
def test_echo_alone_generates_nothing(stream, stop):
    reply = exchange({**ECHOED, "max_tokens": 0, "stream": stream, "n": 2, "stop_token_ids": stop})
    if stream:
        choices = [chunk["choices"][0] for chunk in events_of(reply)]
    else:
        choices = reply.json()["choices"]
        assert reply.json()["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3} | NOTHING_CACHED
    for choice in choices:
        assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("ab", PROMPT_LOGPROBS, "length")
    assert len(choices) == 2
    choice = exchange({"prompt": "ab", "max_tokens": 0, "echo": True, "return_token_ids": True}).json()["choices"][0]
    assert (choice["text"], choice["logprobs"], choice["token_ids"]) == ("ab", None, [])


def test_prompt_logprobs_come_in_vllm_s_shape():
    choices = exchange({"prompt": [[2, 97, 98], [99]], "n": 2, "max_tokens": 1, "prompt_logprobs": 1}).json()["choices"]
    a = {"logprob": -1.5, "rank": 2, "decoded_token": "a"}
    b = {"logprob": -0.5, "rank": 1, "decoded_token": "b"}
    c = {"logprob": -0.5, "rank": 1, "decoded_token": "c"}
    likely = [None, {"97": a, "98": b}, {"98": {**a, "decoded_token": "b"}, "99": c}]
    assert [choice["prompt_logprobs"] for choice in choices] == [likely, likely, [None], [None]]
    assert [choice["logprobs"] for choice in choices] == [None] * 4
    body = {"prompt": "ab", "max_tokens": 1, "prompt_logprobs": 0, "logprobs": 1, "echo": True}
    choice = exchange(body).json()["choices"][0]
    assert [list(entry) for entry in choice["prompt_logprobs"][1:]] == [["97"], ["98"]]
    assert choice["logprobs"]["top_logprobs"][1] == {"a": -1.5, "b": -0.5}


def test_tokens_that_are_no_text_are_written_as_bytes_or_id():
    choice = exchange({"prompt": [0xEE], "max_tokens": 2, "logprobs": 0}).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xef", "token_id:240"]


def test_a_model_without_tokenizer_takes_and_returns_token_ids():
    replies = []

    async def main():
        async with serving(FakeEngine()) as client:
            for body in (
                {"prompt": [7], "max_tokens": 2, "return_token_ids": True},
                {"prompt": "text"},
                {"prompt": [7], "stop": "x"},
                {"prompt": [7, 8], "max_tokens": 1, "prompt_logprobs": 0},
            ):
                replies.append(await client.post("/v1/completions", json=body))

    run(main)
    assert replies[0].json()["choices"][0]["token_ids"] == [8, 9]
    assert [r.status_code for r in replies] == [200, 400, 400, 200]
    expected = [None, {"8": {"logprob": -1.5, "rank": 2, "decoded_token": None}}]
    assert replies[3].json()["choices"][0]["prompt_logprobs"] == expected
    assert "no tokenizer; give the prompt as token ids" in replies[1].json()["error"]["message"]
    assert "use stop_token_ids" in replies[2].json()["error"]["message"]


def test_a_stream_brings_the_same_text_and_ends_with_usage():
    body = {"prompt": ["a", "x"], "n": 2, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events_of(exchange(body))
    texts, reasons = ["", "", "", ""], {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        assert chunk["usage"] is None and chunk["object"] == "text_completion"
        assert choice["index"] not in reasons
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["bc", "bc", "yz", "yz"] and reasons == dict.fromkeys(range(4), "length")
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8 and last["usage"]["prompt_tokens"] == 4
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


@pytest.mark.parametrize("more", [{}, {"logprobs": 0}, {"return_token_ids": True}])
def test_every_event_of_a_stream_is_built_alike(more):
    """Text that JSON must escape, with and without what varies from token to token."""
    fields = {"prompt": "\x1f", "max_tokens": 90, "n": 2, "stream_options": {"include_usage": True}, **more}
    *chunks, _ = events_of(exchange({**fields, "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == 1) == bytes(
        range(0x20, 0x20 + 90)
    ).decode("latin-1")
    keys = {"id", "object", "created", "model", "choices", "usage"}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        last = {"slo"} if choice["finish_reason"] else set()
        assert set(chunk) == keys | last and chunk["usage"] is None and chunk["object"] == "text_completion"
        assert {"index", "text", "logprobs", "finish_reason"} <= set(choice)
        assert (choice["logprobs"] is not None) == ("logprobs" in more) and ("token_ids" in choice) == (
            "return_token_ids" in more
        )


def test_a_stream_echoes_and_counts_text_offsets_on():
    chunks = events_of(exchange({"prompt": "a", "max_tokens": 3, "stream": True, "logprobs": 0}))
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in chunks] == [[0], [1], [2]]
    assert all("usage" not in chunk for chunk in chunks)
    chunks = events_of(exchange({"prompt": "a", "max_tokens": 2, "stream": True, "echo": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks) == "abc"


@pytest.mark.parametrize(
    ("body", "status", "param", "sentence"),
    [
        (b"{", 400, None, "the body is not valid JSON"),
        ({"prompt": ""}, 400, "prompt", "prompt is empty"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature", "did you mean temperature?"),
        ({"prompt": "a", "max_tokens": "many"}, 400, "max_tokens", "valid integer"),
        ({"prompt": [999]}, 400, "prompt", "token id 999, the vocabulary is 0..255"),
        ({"prompt": [-1], "stream": True}, 400, "prompt", "token id -1"),
        ({"prompt": [10] * 200}, 400, "prompt", "prompt has 200 tokens, the context holds 128"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model", "the model 'gpt-4' is not served here; use 'tiny'"),
        ({"prompt": ["a"] * 9}, 400, "prompt", "9 prompts x n=1 is more than the queue holds (8)"),
        (b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}', 413, None, "the body is longer than 4096 bytes"),
    ],
)
def test_bad_input_gets_a_sentence_and_the_server_serves_on(body, status, param, sentence):
    reply = exchange(body)
    error = reply.json()["error"]
    assert reply.status_code == status
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert sentence in error["message"]


def test_a_body_without_a_length_is_read_no_further_than_the_limit():
    read = []

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:

            async def pieces():
                for _ in range(1000):
                    read.append(1000)
                    yield b"a" * 1000

            reply = await client.post("/v1/completions", content=pieces())
            assert reply.status_code == 413

    run(main)
    assert sum(read) <= MAX_BODY_BYTES + 2000


def test_slo_of_headers_and_body_reaches_the_engine():
    engine = FakeEngine(tokenizer=CharTokenizer())
    seen = []
    add = engine.add
    engine.add = lambda *args, **options: (seen.append((options["slo"], options["priority"])), add(*args, **options))[1]
    body = {"prompt": "a", "max_tokens": 1, "slo": {"ttft_ms": 300}, "priority": 7}
    assert exchange(body, engine, headers={"x-slo-tbt-ms": "40", "x-slo-ttft-ms": "1"}).status_code == 200
    slo, priority = seen[0]
    assert (slo.ttft_s, slo.tbt_s, priority) == (0.3, 0.04, 7)
    assert exchange({"prompt": "a"}, headers={"x-slo-tbt-ms": "soon"}).status_code == 400
    twice = exchange({"prompt": "a"}, headers=[("x-slo-tbt-ms", "40"), ("x-slo-tbt-ms", "50")])
    assert twice.status_code == 400 and twice.json()["error"]["param"] == "x-slo-tbt-ms"


def test_a_full_queue_gives_503_with_retry_after():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            body = {"prompt": "a", "max_tokens": 1}
            first = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: engine.has_unfinished)
            others = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(10)]
            inbox = client.service.backend._inbox
            await until(lambda: inbox.qsize() == len(others))  # while the step is held
            engine.allow_step(1000)
            statuses = sorted([(await task).status_code for task in others])
            assert (await first).status_code == 200
            assert statuses == [200] * 8 + [503] * 2
            refused = next(r for r in [await task for task in others] if r.status_code == 503)
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "queue_full"

    run(main)


def test_a_failing_step_gives_500_or_an_error_event():
    async def main():
        for stream in (False, True):
            engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
            async with serving(engine) as client:
                post = client.post("/v1/completions", json={"prompt": "a", "stream": stream})
                task = asyncio.create_task(post)
                await until(lambda: engine.has_unfinished)  # noqa: B023
                engine.fail_with = RuntimeError("device on fire")
                engine.allow_step(1000)
                reply = await task
                error = events_of(reply)[-1]["error"] if stream else reply.json()["error"]
                assert reply.status_code == (200 if stream else 500)
                assert error["code"] == "engine_failure" and "device on fire" not in error["message"]

    run(main)


def test_probes_tell_loading_from_ready():
    engine = FakeEngine()

    async def main():
        held = asyncio.Event()
        loop = asyncio.get_running_loop()
        engine.warm_up = lambda progress: asyncio.run_coroutine_threadsafe(held.wait(), loop).result()
        async with serving(engine, wait=False) as client:
            await until(lambda: True)
            assert (await client.get("/health")).status_code == 200
            ready = await client.get("/ready")
            assert ready.status_code == 503 and ready.headers["retry-after"] == "1"
            refused = await client.post("/v1/completions", json={"prompt": [1]})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_ready"
            held.set()
            async with asyncio.timeout(5):
                while (await client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.005)
            assert (await client.get("/health")).json() == {"status": "ready"}

    run(main)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_disconnect_frees_the_blocks_at_once(stream, steps):
    """`receive` says http.disconnect after the body; the next step boundary must find the request gone."""

    async def main():
        engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
        async with serving(engine) as client:
            gone, sent = asyncio.Event(), []
            body = json.dumps({"prompt": "a", "max_tokens": 100, "stream": stream}).encode()
            inbox = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive():
                if inbox:
                    return inbox.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/completions",
                "raw_path": b"/v1/completions",
                "query_string": b"",
                "headers": [],
                "asgi": {"version": "3.0", "spec_version": "2.3"},
            }
            own, call = asyncio.all_tasks(), asyncio.create_task(client.app(scope, receive, send))
            await until(lambda: engine.has_unfinished)
            for _ in range(steps):
                engine.allow_step()
            await until(lambda: engine.num_steps == steps)
            gone.set()
            await call
            assert engine.has_unfinished  # the step that is under way
            engine.allow_step()
            await until(lambda: engine.is_idle)
            assert engine.num_steps == steps + 1
            assert asyncio.all_tasks() == own, "a task is left behind"

    run(main)
