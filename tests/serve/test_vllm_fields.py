"""Fields and routes that vLLM and SGLang have beside OpenAI's, over the fake engine."""

import asyncio
import json
from typing import Any

import pytest

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.http.service import Service
from tests.support.asgi_service import events_of, run, serving, until
from tests.support.fake_engine import EOS, CharTokenizer, FakeEngine

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def post(*bodies, path="/v1/completions", engine=None, **options):
    """The replies to bodies, one after the other."""
    replies = []

    async def main():
        async with serving(engine or FakeEngine(tokenizer=CharTokenizer()), template=TEMPLATE, **options) as client:
            for body in bodies:
                replies.append(await client.post(path, json=body))

    run(main)
    return replies


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, [EOS, 97, 98, 99]),
        ({"add_special_tokens": False}, [97, 98, 99]),
        ({"truncate_prompt_tokens": 3}, [EOS, 98, 99]),
        ({"truncate_prompt_tokens": 2, "add_special_tokens": False}, [98, 99]),
        ({"truncate_prompt_tokens": -1}, [EOS, 97, 98, 99]),
        ({"truncate_prompt_tokens": 100}, [EOS, 97, 98, 99]),
        ({"prompt": [5, 6, 7], "truncate_prompt_tokens": 2}, [6, 7]),
    ],
)
def test_what_becomes_of_a_prompt(fields, prompt):
    (reply,) = post({"prompt": "abc", "max_tokens": 1, "return_token_ids": True, **fields})
    assert reply.json()["choices"][0]["prompt_token_ids"] == prompt
    assert reply.json()["usage"]["prompt_tokens"] == len(prompt)


def test_a_long_text_is_cut_to_what_fits_beside_the_answer():
    whole, fits = post(
        {"prompt": "a" * 500, "max_tokens": 28},
        {"prompt": "a" * 500 + "b", "max_tokens": 28, "truncate_prompt_tokens": -1, "echo": True},
    )
    assert whole.json()["error"]["code"] == "context_length_exceeded"
    usage = fits.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (100, 28, 128)
    text = fits.json()["choices"][0]["text"]
    assert text.startswith("\x02" + "a" * 98 + "b" + "cd"), "an echo is of what was served"


def test_a_chat_is_cut_and_has_special_tokens_if_asked():
    chat = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 1, "return_token_ids": True}
    plain, special, cut = post(
        chat, {**chat, "add_special_tokens": True}, {**chat, "truncate_prompt_tokens": 2}, path="/v1/chat/completions"
    )
    found = [reply.json()["choices"][0]["prompt_token_ids"] for reply in (plain, special, cut)]
    assert found == [[97, 98, 99], [EOS, 97, 98, 99], [98, 99]]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0 leaves nothing of the prompt"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2: input should be greater than or equal to -1"),
        ({"truncate_prompt_tokens": 129}, "truncate_prompt_tokens=129 is more than the context of 128 tokens"),
        ({"request_id": "a b"}, "request_id"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": ["a", " "]}, "bad_words has an empty string"),
        ({"bad_words": ["a"] * 257}, "bad_words has 257 entries, at most 256 are allowed"),
        ({"use_beam_search": True}, "field use_beam_search is not supported"),
        ({"guided_json": {"type": "object"}}, "guided_json is not supported; leave it out (json in structured_"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields, sentence):
    (reply,) = post({"prompt": "a", **fields})
    assert reply.status_code == 400 and sentence in reply.json()["error"]["message"]


def test_tokens_by_their_ids():
    body = {"prompt": "a", "max_tokens": 2, "logprobs": 1, "return_tokens_as_token_ids": True}
    completion = post(body)[0].json()["choices"][0]["logprobs"]
    assert completion["tokens"] == ["token_id:98", "token_id:99"]
    assert all(name.startswith("token_id:") for top in completion["top_logprobs"] for name in top)
    chat = {**body, "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1}
    del chat["prompt"]
    content = post(chat, path="/v1/chat/completions")[0].json()["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [("token_id:98", [98]), ("token_id:99", [99])]
    assert content[0]["top_logprobs"][0]["token"].startswith("token_id:")


def test_the_id_of_a_request_is_its_answer_s():
    first, again = post(*[{"prompt": "a", "max_tokens": 1, "request_id": "mine"}] * 2)
    assert first.json()["id"] == again.json()["id"] == "cmpl-mine"


@pytest.mark.parametrize("name", ["cmpl-mine", "mine", "header", None])
def test_a_request_is_ended_with_what_it_has(name):
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            body = {"prompt": "a", "max_tokens": 100, "request_id": "mine"}
            asking = asyncio.create_task(client.post("/v1/completions", json=body, headers={"x-request-id": "header"}))
            engine.allow_step(3)
            await until(lambda: engine.num_steps == 3)
            unknown = await client.post("/abort_request", json={"rid": "other"})
            assert unknown.json() == {"aborted": 0} and not asking.done()
            asked = {"abort_all": True} if name is None else {"request_id": name}
            assert (await client.post("/abort_request", json=asked)).json() == {"aborted": 1}
            engine.allow_step(1000)
            (choice,) = (await asking).json()["choices"]
            assert choice["finish_reason"] == "abort" and choice["text"].startswith("bcd")
            assert len(choice["text"]) < 100 and engine.is_idle
            assert (await client.post("/abort_request", json=asked)).json() == {"aborted": 0}
            assert (await client.post("/abort_request", json={})).status_code == 400
            assert (await client.post("/abort_request", json={"rid": "a", "abort_all": True})).status_code == 400

    run(main)


def test_a_stream_in_pieces_of_several_tokens():
    body = {"prompt": "a", "max_tokens": 12, "stream": True, "logprobs": 0, "return_token_ids": True, "n": 2, "seed": 1}
    (reply,) = post(body, stream_interval=4)
    for index in (0, 1):
        chunks = [c["choices"][0] for c in events_of(reply) if c["choices"][0]["index"] == index]
        assert [chunk["text"] for chunk in chunks] == ["b", "cdef", "ghij", "klm"]
        assert [len(chunk["token_ids"]) for chunk in chunks] == [1, 4, 4, 3]
        assert [len(chunk["logprobs"]["tokens"]) for chunk in chunks] == [1, 4, 4, 3]
        assert [chunk["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    whole = json.loads(post({**body, "stream": False}, stream_interval=4)[0].content)
    assert whole["choices"][0]["text"] == "bcdefghijklm"


def test_an_id_of_a_request_under_way_is_refused():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            body = {"prompt": "a", "max_tokens": 100, "request_id": "mine"}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            engine.allow_step(3)
            await until(lambda: engine.num_steps == 3)
            for other in ({**body, "n": 2}, body):
                reply = await client.post("/v1/completions", json=other)
                assert reply.status_code == 400 and reply.json()["error"]["param"] == "request_id"
                sentence = 'request_id="mine" is that of a request under way; give each its own'
                assert reply.json()["error"]["message"] == sentence
            engine.allow_step(1000)
            assert (await asking).status_code == 200

    run(main)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"structured_outputs": {}}, "structured_outputs is empty; give exactly one of json"),
        ({"structured_outputs": {"regex": ""}}, 'structured_outputs.regex="": '),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice=[]: "),
        ({"structured_outputs": {"json_object": False}}, "json_object=false asks for nothing; give true"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 9999}, "max_tokens=9999 leaves no room for a prompt"),
    ],
)
def test_faults_are_told_by_name(fields, sentence):
    (reply,) = post({"prompt": "a", **fields})
    assert reply.status_code == 400 and "None" not in reply.text
    assert sentence in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["b"]}}),
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_object"}}),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_object"}}}),
    ],
)
def test_grammars_are_compiled_where_others_do_not_wait(path, body, monkeypatch):
    """In no worker thread of other requests, and never on the event loop."""
    waited: list[Any] = []

    async def note(service, asked, model) -> None:
        waited.append(asked)
        raise BadRequest("compiled")

    monkeypatch.setattr(Service, "check_grammar", note)

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:
            reply = await client.post(path, json=body)
            assert reply.status_code == 400 and "compiled" in reply.text

    run(main)
    assert len(waited) == 1
