"""Bodies as OpenAI's and vLLM's clients send them: what changes nothing is taken, what is not served is named."""

import pickle

import pytest

from apt_jax.output import ContextExceeded
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
