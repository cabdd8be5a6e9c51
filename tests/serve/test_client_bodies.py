"""Bodies as OpenAI's and vLLM's clients send them: what changes nothing is taken, what is not served is named."""

import json
import pickle
import re
from pathlib import Path

import pytest
from openai.types import chat, completion_create_params

from apt_jax.output import ContextExceeded
from apt_jax.serve.http.routes.table import openapi_document
from apt_jax.serve.openai.bodies.neutral_fields import OF_CHATS, OF_COMPLETIONS, OF_MESSAGES
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
HELLO = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
STARTS = {COMPLETIONS: {"prompt": "abc"}, CHATS: {"messages": HELLO}}


def post(path, *bodies):
    """The answers to each body, which is put over a valid one."""
    replies, engine = [], FakeEngine(tokenizer=CharTokenizer(TEMPLATE))

    async def main():
        async with serving(engine, template=TEMPLATE) as client:
            for body in bodies:
                replies.append(await client.post(path, json={**STARTS[path], "max_tokens": 3, **body}))

    run(main)
    return replies


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"max_tokens": 500}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x" * 200}, "prompt"),
        (COMPLETIONS, {"prompt": [7] * 128}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "x" * 200]}, "prompt"),
        (CHATS, {"max_tokens": None, "max_completion_tokens": 500}, "max_tokens"),
        (CHATS, {"messages": [{"role": "user", "content": "x" * 200}]}, "messages"),
    ],
)
def test_too_long_is_told_in_the_words_that_clients_look_for(path, fields, param, stream):
    (reply,) = post(path, {**fields, "stream": stream})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["code"] == "context_length_exceeded" and error["param"] == param
    assert "this model's maximum context length is 128 tokens" in error["message"]


def test_too_long_is_the_same_from_another_process():
    error = pickle.loads(pickle.dumps(ContextExceeded("it is long", 7)))
    assert str(error) == "this model's maximum context length is 7 tokens: it is long"


NEUTRAL_EVERYWHERE = {
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "store": False,
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "user": "u",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "stop": [],
    "length_penalty": 1.0,
    "bad_words": [],
    "best_of": 1,
    "suffix": "",
}
NEUTRAL_IN_CHATS = {
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "function_call": "none",
    "parallel_tool_calls": False,
    "modalities": ["text"],
    "chat_template_kwargs": {},
    "documents": [],
    "echo": False,
    "top_logprobs": 0,
    "verbosity": "medium",
    "reasoning_effort": "none",
    "continue_final_message": False,
}


@pytest.mark.parametrize(
    ("path", "bodies"),
    [
        (COMPLETIONS, [{name: value} for name, value in NEUTRAL_EVERYWHERE.items()]),
        (CHATS, [{name: value} for name, value in {**NEUTRAL_EVERYWHERE, **NEUTRAL_IN_CHATS}.items()]),
        (COMPLETIONS, [NEUTRAL_EVERYWHERE]),
        (CHATS, [{**NEUTRAL_EVERYWHERE, **NEUTRAL_IN_CHATS}]),
    ],
)
def test_values_that_change_nothing_are_taken(path, bodies):
    plain, *replies = post(path, {}, *bodies)
    assert [(body, reply.text) for body, reply in zip(bodies, replies, strict=True) if reply.status_code != 200] == []
    assert {choice_of(reply) for reply in replies} == {choice_of(plain)}


def choice_of(reply):
    return json.dumps([{**choice, "slo": None} for choice in reply.json()["choices"]])


def known_to_clients(kind, mine):
    """Fields of OpenAI's client, and those of our tables."""
    return {*kind.__annotations__, *mine} - {"model", "messages", "prompt", "max_tokens"}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (COMPLETIONS, known_to_clients(completion_create_params.CompletionCreateParamsBase, OF_COMPLETIONS)),
        (CHATS, known_to_clients(chat.completion_create_params.CompletionCreateParamsBase, OF_CHATS)),
    ],
)
def test_null_of_every_field_that_clients_know_is_taken(path, names):
    plain, *replies = post(path, {}, *({name: None} for name in names), dict.fromkeys(names))
    assert {reply.text for reply in replies if reply.status_code != 200} == set()
    assert {choice_of(reply) for reply in replies} == {choice_of(plain)}


def test_what_a_client_got_can_be_sent_back():
    (reply,) = post(CHATS, {})
    got = chat.ChatCompletion.model_validate(reply.json()).choices[0].message
    back = [*HELLO, got.model_dump(), {"role": "user", "content": "and?"}]
    assert {"refusal", "tool_calls", "annotations", "audio", "function_call"} <= back[1].keys()
    empty = {"tool_calls": [], "annotations": [], "reasoning_content": None}
    wanted = [*HELLO, {"role": "assistant", "content": got.content}, {"role": "user", "content": "and?"}]
    bodies = [{"messages": wanted}, {"messages": back}, {"messages": [HELLO[0], {**wanted[1], **empty}, wanted[2]]}]
    assert len({choice_of(reply) for reply in post(CHATS, *bodies)}) == 1
    silent = [*HELLO, {"role": "assistant", "content": None}, *HELLO]
    assert post(CHATS, {"messages": silent})[0].status_code == 200


def test_whole_numbers_may_be_written_with_a_point():
    exact = {"max_tokens": 4, "seed": 7, "n": 2, "min_tokens": 1, "top_k": 5, "stop_token_ids": [9], "priority": 1}
    pointed = {name: [float(v) for v in x] if isinstance(x, list) else float(x) for name, x in exact.items()}
    for path, more in ((COMPLETIONS, {"logprobs": 2}), (CHATS, {"logprobs": True, "top_logprobs": 2})):
        floats = {name: float(value) if type(value) is int else value for name, value in more.items()}
        replies = post(path, {**exact, **more}, {**pointed, **floats}, {"max_tokens": 4.5}, {"seed": 1e300})
        assert choice_of(replies[0]) == choice_of(replies[1])
        assert [reply.status_code for reply in replies] == [200, 200, 400, 400]
    prompts = post(COMPLETIONS, *({"prompt": p} for p in ([7, 8], [7.0, 8.0], [[7.0, 8]], [7.5], [7.0, "a"])))
    assert [reply.status_code for reply in prompts] == [200, 200, 200, 400, 400]
    assert len({choice_of(reply) for reply in prompts[:3]}) == 1


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"use_beam_search": True}, "use_beam_search"),
        (COMPLETIONS, {"response_format": {"type": "json_schema"}}, "response_format"),
        (COMPLETIONS, {"best_of": True}, "best_of"),
        (CHATS, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (CHATS, {"tool_choice": "required"}, "tool_choice"),
        (CHATS, {"modalities": ["text", "audio"]}, "modalities"),
        (CHATS, {"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs"),
        (CHATS, {"reasoning_effort": "high"}, "reasoning_effort"),
        (CHATS, {"continue_final_message": True}, "continue_final_message"),
        (CHATS, {"store": True}, "store"),
        (CHATS, {"metadata": "x"}, "metadata"),
        (
            CHATS,
            {"messages": [*HELLO, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "tool_calls",
        ),
        (CHATS, {"messages": [*HELLO, {"role": "assistant", "content": "", "refusal": "no"}]}, "refusal"),
        (CHATS, {"messages": [{"role": "user", "content": None}]}, "content"),
        (COMPLETIONS, {"temprature": None}, "temprature"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(path, fields, name):
    (reply,) = post(path, fields)
    error = reply.json()["error"]
    assert reply.status_code == 400 and name in error["message"] and "\n" not in error["message"]


def test_null_options_of_a_stream_are_the_defaults():
    plain, null = post(
        COMPLETIONS,
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": None, "continuous_usage_stats": None}},
    )
    assert plain.status_code == null.status_code == 200 and '"usage"' not in null.text


def test_the_tables_are_in_the_document_and_the_docs():
    schemas = openapi_document()["components"]["schemas"]
    tables = {"CompletionRequest": OF_COMPLETIONS, "ChatRequest": OF_CHATS, "Message": OF_MESSAGES}
    for name, table in tables.items():
        properties = schemas[name]["properties"]
        assert {field: properties[field] for field in table} == {f: neutral.schema() for f, neutral in table.items()}
        assert not table.keys() & {"model", "stream", "role", "content"}
    text = (Path(__file__).parents[2] / "docs/clients.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))
    everything = {**OF_CHATS, **OF_COMPLETIONS}
    assert rows == {name: described(name) for name in sorted(everything)}


def described(name):
    """The values as docs/clients.md has them."""
    shown = []
    for table in (OF_COMPLETIONS, OF_CHATS):
        if name in table:
            field = table[name]
            values = [f"`{json.dumps(value)}`" for value in field.values]
            text = f"any {field.any_of}" if field.any_of else ", ".join(values) or "only null"
            if text not in shown:
                shown.append(text)
    return "; in chats ".join(shown)
