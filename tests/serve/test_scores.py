"""POST /score: how likely a text is after another, by the log-probabilities of its tokens."""

import pytest

from apt_jax.serve.http.routes.table import ROUTES
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine


def post(*bodies, path="/score", tokenizer=True):
    replies = []

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer() if tokenizer else None)) as client:
            for body in bodies:
                replies.append(await client.post(path, json=body))

    run(main)
    return replies


def test_a_score_is_the_sum_over_the_tokens_of_the_second_text():
    """Every token of the fake engine's prompts has -1.5."""
    (reply,) = post({"model": "tiny", "text_1": "ab", "text_2": ["c", "defg"]})
    found = reply.json()
    assert found["id"].startswith("score-") and found["object"] == "list" and found["model"] == "tiny"
    assert found["data"] == [
        {"index": 0, "object": "score", "score": -1.5, "tokens": 1},
        {"index": 1, "object": "score", "score": -6.0, "tokens": 4},
    ]
    assert found["usage"] == {"prompt_tokens": 4 + 7, "total_tokens": 11}, "</s> goes before"


def test_pairs_one_to_one_and_from_nothing():
    pairs, nothing = post(
        {"text_1": ["a", "ab"], "text_2": ["x", "yz"]}, {"text_1": "", "text_2": "abc"}, path="/v1/score"
    )
    assert [(entry["score"], entry["tokens"]) for entry in pairs.json()["data"]] == [(-1.5, 1), (-3.0, 2)]
    assert nothing.json()["data"][0]["score"] == -4.5 and nothing.json()["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"text_1": ["a", "b"], "text_2": ["c"]}, "text_1", "give one, or as many"),
        ({"text_1": "a"}, "text_2", "missing"),
        ({"text_1": "a", "text_2": []}, "text_2", "text_2 must be a text or a list of texts"),
        ({"text_1": "a", "text_2": ["b", ""]}, "text_2", "text_2 1 is empty"),
        ({"text_1": "a", "text_2": {"content": []}}, "text_2", "text_2 must be a text or a list of texts"),
        (
            {"text_1": "", "text_2": "a", "add_special_tokens": False},
            "text_1",
            "nothing comes before what is to be scored",
        ),
        ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "cut off"),
        ({"text_1": "a" * 100, "text_2": "b" * 100}, "text_2", "maximum context length is 128"),
        ({"text_1": "a" * 200, "text_2": "b"}, "text_1", "maximum context length is 128"),
        ({"text_1": "a", "text_2": ["b"] * 9}, "text_2", "more than the queue holds"),
    ],
)
def test_what_cannot_be_scored_is_refused(body, param, words):
    (reply,) = post(body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert words in error["message"] and error["param"] == param


def test_a_token_in_which_both_texts_have_a_part_is_scored():
    """ "ab" and "cd" have "bc" in common, which is one token."""

    class Merging(CharTokenizer):
        def encode(self, text, add_special_tokens=True):
            ids = super().encode(text, add_special_tokens)
            return super().encode(text.replace("bc", "!"), add_special_tokens) if "bc" in text else ids

    async def main():
        async with serving(FakeEngine(tokenizer=Merging())) as client:
            reply = await client.post("/score", json={"text_1": "ab", "text_2": ["cd", "xd"]})
            assert [entry["tokens"] for entry in reply.json()["data"]] == [2, 2]
            assert reply.json()["usage"]["prompt_tokens"] == 4 + 5

    run(main)


def test_a_model_without_a_tokenizer_scores_no_texts():
    (reply,) = post({"text_1": "a", "text_2": "b"}, tokenizer=False)
    assert reply.status_code == 400 and "no tokenizer" in reply.json()["error"]["message"]


def test_both_paths_are_generation_routes():
    assert {route.path for route in ROUTES if route.is_generation} >= {"/score", "/v1/score", "/v1/embeddings"}
