"""POST /v1/embeddings and its like from Python, over the fake engine, whose vectors are made by hand."""

import asyncio
import base64

import numpy as np
import openai
import pytest

import apt_jax.serve.llm
from apt_jax import LLM
from tests.support.asgi_service import run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine


def post(*bodies, engine=None):
    replies = []

    async def main():
        async with serving(engine or FakeEngine(tokenizer=CharTokenizer())) as client:
            for body in bodies:
                replies.append(await client.post("/v1/embeddings", json=body))

    run(main)
    return replies


def vector(tokens: int, last: int) -> np.ndarray:
    """The fake engine's."""
    found = np.array([tokens, last, 0, 0], np.float32)
    return found / np.linalg.norm(found)


@pytest.mark.parametrize(
    ("given", "vectors"),
    [
        ("ab", [vector(3, 98)]),
        (["ab", "c"], [vector(3, 98), vector(2, 99)]),
        ([5, 6], [vector(2, 6)]),
        ([[5, 6], [7]], [vector(2, 6), vector(1, 7)]),
    ],
)
def test_every_form_of_input(given, vectors):
    (reply,) = post({"model": "tiny", "input": given})
    body = reply.json()
    assert reply.status_code == 200 and body["object"] == "list" and body["id"].startswith("embd-")
    assert [(item["object"], item["index"]) for item in body["data"]] == [
        ("embedding", index) for index in range(len(vectors))
    ]
    np.testing.assert_allclose([item["embedding"] for item in body["data"]], vectors, rtol=1e-6)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0


def test_base64_is_little_endian_float32_and_normalising_may_be_left_out():
    plain, encoded, raw = post(
        {"input": "ab"}, {"input": "ab", "encoding_format": "base64"}, {"input": "ab", "normalize": False}
    )
    found = np.frombuffer(base64.b64decode(encoded.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(found, np.array(plain.json()["data"][0]["embedding"], np.float32))
    assert raw.json()["data"][0]["embedding"] == [3.0, 98.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"input": "a", "dimensions": 2}, 400, "dimensions=2: these embeddings cannot be shortened"),
        ({"input": ""}, 400, "input is empty"),
        ({"input": []}, 400, "input is empty"),
        ({"input": {"a": 1}}, 400, "input must be a string"),
        ({}, 400, "field input is missing"),
        ({"input": "a", "encoding_format": "bytes"}, 400, "encoding_format"),
        ({"input": "a", "max_tokens": 1}, 400, 'unknown field "max_tokens"'),
        ({"input": "a" * 200}, 400, "maximum context length is 128"),
        ({"input": [300]}, 400, "300"),
        ({"input": ["a"] * 9}, 400, "9 inputs are more than the queue holds (8)"),
        ({"input": "a", "model": "other"}, 404, "other"),
    ],
)
def test_what_cannot_be_is_refused(body, status, sentence):
    (reply,) = post(body)
    assert reply.status_code == status and sentence in reply.json()["error"]["message"]


def test_a_model_without_a_tokenizer_takes_token_ids():
    text, ids = post({"input": "a"}, {"input": [5]}, engine=FakeEngine())
    assert text.status_code == 400 and "give the prompt as token ids" in text.json()["error"]["message"]
    assert ids.status_code == 200


def test_one_that_is_ended_is_not_half_an_answer():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            asking = asyncio.create_task(client.post("/v1/embeddings", json={"input": ["a"] * 6, "request_id": "mine"}))
            await until(lambda: engine.num_waiting == 6)
            assert (await client.get("/load")).json()["server_load"] == 1
            assert (await client.post("/abort_request", json={"rid": "mine"})).json() == {"aborted": 1}
            engine.allow_step(100)
            assert (await asking).status_code == 503

    run(main)


def test_the_openai_client_reads_them():
    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:
            asking = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client)
            found = await asking.embeddings.create(model="tiny", input=["ab", "c"])  # asks for base64 by itself
            np.testing.assert_allclose([item.embedding for item in found.data], [vector(3, 98), vector(2, 99)])

    run(main)


def test_from_python(monkeypatch):
    engine = FakeEngine(tokenizer=CharTokenizer())
    monkeypatch.setattr(apt_jax.serve.llm, "build_engine", lambda model, **options: engine)
    llm = LLM("tiny")
    first, second = llm.encode(["ab", {"prompt_token_ids": [5]}], use_tqdm=False)
    np.testing.assert_allclose(first.outputs.data, vector(3, 98))
    np.testing.assert_allclose(second.outputs.embedding, vector(1, 5), rtol=1e-6)
    assert first.prompt_token_ids == [2, 97, 98]
    (raw,) = llm.encode("ab", normalize=False, use_tqdm=False)
    assert raw.outputs.data.tolist() == [3, 98, 0, 0]
    assert llm.embed("ab", use_tqdm=False)[0].outputs.embedding == first.outputs.embedding
    same, other = llm.score("ab", ["ab", "c"], use_tqdm=False)
    assert same.outputs.score == pytest.approx(1) and other.outputs.score == pytest.approx(
        vector(3, 98) @ vector(2, 99)
    )
    pairs = llm.score(["ab", "c"], ["c", "c"], use_tqdm=False)
    assert [round(pair.outputs.score, 3) for pair in pairs] == [round(other.outputs.score, 3), 1.0]
    with pytest.raises(ValueError, match="2 texts on the left and 3 on the right"):
        llm.score(["a", "b"], ["a"] * 3)
    with pytest.raises(ValueError, match="prompt 1 of 2: "):
        llm.encode(["a", "b" * 200], use_tqdm=False)
    assert engine.is_idle
