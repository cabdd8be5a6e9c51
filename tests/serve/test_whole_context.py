"""Prompts that fill the context exactly are scored; nothing more fits. Over the fake engine, whose context is 128."""

import httpx
import pytest

import apt_jax.serve.llm
from apt_jax import LLM, SamplingParams
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine


def exchange(body) -> httpx.Response:
    found = []

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:
            found.append(await client.post("/v1/completions", json=body))

    run(main)
    return found[0]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_prompt_that_fills_the_context_is_scored_and_one_more_token_is_refused(logprobs):
    """As the perplexity of a model is measured: windows of the whole context. FakeEngine's holds 128 tokens."""
    body = {"max_tokens": 0, "echo": True, "logprobs": logprobs}
    choice = exchange({**body, "prompt": [97] * 128}).json()["choices"][0]
    assert choice["text"] == "a" * 128 and choice["finish_reason"] == "length"
    assert logprobs is None or len(choice["logprobs"]["token_logprobs"]) == 128
    for refused in ({**body, "prompt": [97] * 129}, {"max_tokens": 1, "prompt": [97] * 128}):
        reply = exchange(refused)
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"


def test_the_library_scores_a_whole_context_too(monkeypatch):
    monkeypatch.setattr(apt_jax.serve.llm, "build_engine", lambda model, **options: FakeEngine())
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    (result,) = LLM("tiny").generate({"prompt_token_ids": [97] * 128}, params, use_tqdm=False)
    (output,) = result.outputs
    assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == 128
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([], "length", None)
