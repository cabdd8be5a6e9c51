"""The `user` of a request: from every route and from Python to the engine, by which `fastswitch` shares fairly."""

import pytest

from apt_jax import SamplingParams
from apt_jax.request import MAX_USER_CHARS
from apt_jax.serve.python.prompts import Prompted
from apt_jax.serve.replicas.route import Progress
from apt_jax.serve.runtime.samples import fan_out
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine

BODIES = {
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 2, "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/score": {"text_1": "a", "text_2": "b"},
}
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
SENTENCE = f"prompt 0 has user=.*; give a text of at most {MAX_USER_CHARS} characters, or leave it out"


def users_of(path, **fields):
    """A reply, and the users that the engine was told."""
    engine = FakeEngine(tokenizer=CharTokenizer())
    found, add = [], engine.add

    def told(*args, **named):
        found.append(named["user"])
        return add(*args, **named)

    engine.add = told
    replies = []

    async def main():
        async with serving(engine, template=CHAT) as client:
            replies.append(await client.post(path, json={**BODIES[path], **fields}))

    run(main)
    return replies[0], found


@pytest.mark.parametrize("path", BODIES)
def test_the_engine_is_told_whose_a_request_is(path):
    reply, found = users_of(path, user="someone")
    assert reply.status_code == 200, reply.text
    assert set(found) == {"someone"} and len(found) == {"/v1/completions": 4, "/v1/embeddings": 2}.get(path, 1)
    assert set(users_of(path)[1]) == {None}


@pytest.mark.parametrize("path", BODIES)
def test_a_user_of_any_length_is_refused(path):
    assert users_of(path, user="x" * MAX_USER_CHARS)[0].status_code == 200
    for wrong in ("x" * (MAX_USER_CHARS + 1), 5):
        reply, found = users_of(path, user=wrong)
        assert reply.status_code == 400 and not found
        assert reply.json()["error"]["param"] == "user" and "user" in reply.json()["error"]["message"]


@pytest.mark.parametrize("user", [None, "someone", ""])
def test_python_tells_it_with_the_prompt(user):
    engine = FakeEngine(tokenizer=CharTokenizer())
    prompted = Prompted.prepare({"prompt": "a", "user": user}, SamplingParams(n=2), engine, request_id="r")
    assert [sample.user for sample in prompted.samples] == [user] * 2


@pytest.mark.parametrize("wrong", [5, "x" * (MAX_USER_CHARS + 1)])
def test_python_refuses_what_is_no_user(wrong):
    engine = FakeEngine(tokenizer=CharTokenizer())
    with pytest.raises(ValueError, match=SENTENCE):
        Prompted.prepare({"prompt": "a", "user": wrong}, SamplingParams(), engine, request_id="r")


def test_a_request_that_goes_on_on_another_replica_keeps_its_user():
    (sample,) = fan_out("r", [[1, 2]], SamplingParams(max_tokens=4), user="someone")
    progress = Progress.of(sample, FakeEngine(), 7, 0.0)
    assert progress.request.user == "someone" == progress.remainder().user
