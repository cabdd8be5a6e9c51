"""/v1/responses with the openai client: text in, text out, streamed or whole, and nothing kept."""

import asyncio
import json

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.http.service import Service
from apt_jax.serve.http.snapshot import record_of, restore
from apt_jax.serve.openai.bodies.requests import parse_completion
from apt_jax.serve.openai.bodies.responses import ELSEWHERE, parse_response
from apt_jax.serve.openai.completions import Completion
from apt_jax.serve.openai.generation import ServedModel
from apt_jax.serve.openai.responses import ModelResponse
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.asgi_service import run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
KINDS = [
    *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    *["response.output_text.delta"] * 4,
    *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
]


@pytest.fixture(scope="module")
def url():
    engine = FakeEngine(tokenizer=CharTokenizer())
    with live(Service.of_engine(EngineThread(lambda: engine), "tiny", ServerOptions())) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_text_is_answered(client):
    made = client.responses.create(model="tiny", input="a", max_output_tokens=4, metadata={"k": "v"}, temperature=0)
    assert (made.output_text, made.object, made.status) == ("bcde", "response", "incomplete")
    assert made.incomplete_details.reason == "max_output_tokens" and made.error is None
    (message,) = made.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert made.usage.model_dump(exclude_none=True) == {
        "input_tokens": 2, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 6,
    }  # fmt: skip
    assert made.metadata == {"k": "v"} and made.temperature == 0 and made.store is False and made.tools == []
    assert made.slo["attained"], "as other answers"


def test_an_end_of_its_own_completes_an_answer(client):
    made = client.responses.create(model="tiny", input="a", max_output_tokens=9, extra_body={"stop_token_ids": [100]})
    assert (made.status, made.output_text, made.incomplete_details) == ("completed", "bcd", None)
    assert made.output[0].status == "completed" and made.completed_at >= made.created_at


def test_instructions_go_before_a_text_where_there_is_no_template(client):
    made = client.responses.create(model="tiny", instructions="say", input="a", max_output_tokens=1)
    assert made.output_text == "b" and made.usage.input_tokens == len("</s>"[:1] + "say\n\na")
    assert made.instructions == "say"


def test_events_come_as_openai_has_them(client):
    with client.responses.create(model="tiny", input="a", max_output_tokens=4, stream=True) as stream:
        events = list(stream)
    assert [event.type for event in events] == [*KINDS, "response.incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.delta for event in events[4:8]] == ["b", "c", "d", "e"]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    done = events[-1].response
    assert done.output_text == events[8].text == events[9].part.text == "bcde"
    assert {event.item_id for event in events[3:10]} == {done.output[0].id} and done.usage.total_tokens == 6
    assert done.id == events[0].response.id and events[10].item.id == done.output[0].id


def test_the_stream_helper_gathers_the_response(client):
    asked = {"model": "tiny", "input": "a", "max_output_tokens": 9, "extra_body": {"stop_token_ids": [100]}}
    with client.responses.stream(**asked) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots == ["b", "bc", "bcd"] and final.output_text == "bcd" and final.status == "completed"
    assert final.output[0].content[0].text == "bcd"


def test_log_probabilities(client):
    asked = {"model": "tiny", "input": "a", "max_output_tokens": 2, "include": ["message.output_text.logprobs"]}
    made = client.responses.create(**asked, top_logprobs=2)
    first, second = made.output[0].content[0].logprobs
    assert (first.token, first.logprob, first.bytes) == ("b", -0.5, [98]) and second.token == "c"
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("b", -0.5), ("c", -1.5)]
    with client.responses.create(**asked, top_logprobs=1, stream=True) as stream:
        events = list(stream)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [entry.token for event in deltas for entry in event.logprobs] == ["b", "c"]
    done = next(event for event in events if event.type == "response.output_text.done")
    assert [entry.token for entry in done.logprobs] == ["b", "c"]
    assert client.responses.create(model="tiny", input="a").output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"store": True}, "store", "nothing is kept"),
        ({"previous_response_id": "resp-1"}, "previous_response_id", "earlier messages in input"),
        ({"tools": [{"type": "web_search"}]}, "tools", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens=0"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens=5000 is more than fits"),
        ({"input": "x" * 500}, "input", "maximum context length"),
        ({"input": [{"role": "user", "content": "hi"}]}, "input", "--chat-template"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "input_text"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", "metadata has 17 entries, at most 16"),
        (
            {"metadata": {"k": "v" * 513}},
            "metadata",
            "of metadata may have 64 characters, and its value 512",
        ),
        ({"truncation": "auto"}, "truncation", "truncate_prompt_tokens"),
        ({"background": True}, "background", "not supported"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, "text", "needs a schema"),
        ({"extra_body": {"n": 2}}, "n", "several requests"),
        ({"extra_body": {"max_tokens": 2}}, "max_tokens", "use max_output_tokens"),
        ({"extra_body": {"inptu": 2}}, "inptu", "did you mean input"),
    ],
)
def test_what_is_not_served_is_refused_in_a_sentence(client, asked, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as found:
        client.responses.create(**{"model": "tiny", "input": "a", **asked})
    assert found.value.body["param"] == param


def test_other_models_are_not_found_and_nothing_is_kept(client, url):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.responses.create(model="gpt-5", input="a")
    made = client.responses.create(model="tiny", input="a", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    assert client.responses.create(model="tiny", input="a", tools=[], truncation="disabled", reasoning={}).output_text
    assert "/v1/responses" in httpx.get(f"{url}/openapi.json").json()["paths"]
    assert set(ELSEWHERE) & set(parse_response({"input": "a", "n": 1}).model_fields_set) == set()


def test_a_conversation_goes_through_the_template():
    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer(TEMPLATE))) as http:
            answer = {"type": "message", "role": "assistant", "id": "msg-1", "status": "completed"}
            parts = [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]
            said = [
                {"role": "user", "content": "a"},
                {**answer, "content": parts},
                {"role": "user", "content": [{"type": "input_text", "text": "c"}]},
            ]
            body = {"instructions": "be", "input": said, "max_output_tokens": 2}
            reply = (await http.post("/v1/responses", json=body)).json()
            assert reply["usage"]["input_tokens"] == len("s:be;u:a;a:b;u:c;")
            assert reply["output"][0]["content"][0]["text"] == "<=", "what follows ;"
            reply = (await http.post("/v1/responses", json={"input": "a", "max_output_tokens": 1})).json()
            assert reply["usage"]["input_tokens"] == len("u:a;")

    run(main)


def test_a_step_that_fails_fails_the_response():
    async def main():
        engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
        async with serving(engine) as http:
            task = asyncio.create_task(
                http.post("/v1/responses", json={"input": "a", "stream": True, "max_output_tokens": 5})
            )
            engine.allow_step(2)
            while engine.num_steps < 2:
                await asyncio.sleep(0.01)
            engine.fail_with = RuntimeError("out of memory")
            engine.allow_step(5)
            text = (await task).text
            assert "event: response.failed\n" in text and '"code":"server_error"' in text
            assert "out of memory" not in text and text.index("response.output_text.delta") < text.index("failed\n")

    run(main)


@pytest.mark.parametrize("begun", [False, True])
def test_one_that_was_given_up_is_refused_before_its_first_token_and_cancelled_after(begun):
    seats = 4 if begun else 1
    config = EngineConfig(max_num_seqs=seats, max_num_batched_tokens=64, scheduling_policy="fcfs", abandon_after=40.0)
    engine = FakeEngine(config, CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as http:
            long = {"input": "a", "max_output_tokens": 90, "slo": {"stall_ms": 30_000}}
            first = asyncio.create_task(http.post("/v1/responses", json=long))
            engine.allow_step(3)
            await until(lambda: engine.num_steps == 3)
            second = asyncio.create_task(http.post("/v1/responses", json={"input": "x", "max_output_tokens": 2}))
            await until(lambda: engine.num_begun > engine.num_steps)
            while engine.num_waiting < 1:
                begun_ = engine.num_begun
                engine.allow_step()
                await until(lambda begun_=begun_: engine.num_begun > begun_)
            engine.ahead_s = 100.0
            engine.allow_step(200)
            late = await (first if begun else second)
            if begun:
                reply = late.json()
                assert reply["status"] == "cancelled" and reply["output"][0]["status"] == "incomplete"
                assert reply["slo"]["abandoned"] and reply["output"][0]["content"][0]["text"].startswith("bc")
            else:
                assert (late.status_code, late.json()["error"]["code"]) == (503, "slo_abandoned")
            await asyncio.gather(first, second)

    run(main)


def test_what_is_unfinished_at_a_stop_goes_on_with_the_same_body():
    """Whose fields have names that Python keeps for itself."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    format_ = {"type": "json_schema", "name": "x", "schema": schema}
    body = parse_response({"input": "a", "text": {"format": format_}, "metadata": {"k": "v"}, "n": 1})
    engine = FakeEngine(tokenizer=CharTokenizer())
    model = ServedModel(engine, "tiny")
    plain = parse_response({"input": "a", "metadata": {"k": "v"}})
    generation = ModelResponse.prepare(plain, model, request_id="resp-1")
    generation.body = body
    again, (sample,) = restore(json.loads(json.dumps(record_of(generation, ""))), model)
    assert again.body == body and list(sample.prompt_token_ids) == [2, 97]
    chat = parse_completion(
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    )
    generation = Completion.prepare(parse_completion({"prompt": "a"}), model, request_id="cmpl-1")
    for body in (chat, parse_completion({"prompt": "a", "structured_outputs": {"json": schema}})):
        generation.body = body
        assert restore(json.loads(json.dumps(record_of(generation, ""))), model)[0].body == body


class Answer(BaseModel):
    name: str
    size: int


def test_a_schema_is_asked_for():
    format_ = {"type": "json_schema", "name": "Answer", "schema": Answer.model_json_schema(), "strict": True}
    body = parse_response({"input": "a", "text": {"format": format_, "verbosity": "medium"}})
    assert body.asked_structure() == {"json": Answer.model_json_schema()}
    assert parse_response({"input": "a", "text": {"format": {"type": "json_object"}}}).asked_structure() == {
        "json_object": True
    }
