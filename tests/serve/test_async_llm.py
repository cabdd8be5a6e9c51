"""`AsyncLLM` over the fake engine: results as they grow, aborts, and its application mounted in another."""

import asyncio
import contextlib
import itertools

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import apt_jax.serve.runtime.build
from apt_jax import AsyncLLM, SamplingParams
from apt_jax.output import QueueFull
from apt_jax.serve.errors import NotReady
from tests.support.asgi_service import run, until
from tests.support.fake_engine import CharTokenizer, FakeEngine


@pytest.fixture
def engine(monkeypatch):
    found = FakeEngine(tokenizer=CharTokenizer())
    monkeypatch.setattr(apt_jax.serve.runtime.build, "build_engine", lambda model, **options: found)
    return found


def test_the_result_grows(engine):
    async def main():
        async with AsyncLLM("tiny") as llm:
            texts = []
            async for result in llm.generate("a", SamplingParams(max_tokens=5, n=2, seed=1)):
                texts.append([output.text for output in result.outputs])
            assert texts[-1] == ["bcdef"] * 2 and all(len(a[0]) <= len(b[0]) for a, b in itertools.pairwise(texts))
            assert result.finished and result.prompt_token_ids == [2, 97]
            times = result.metrics
            assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
            assert times.ttft >= times.time_in_queue >= 0 and times.num_preemptions == 0
            assert llm.get_tokenizer() is engine.tokenizer
            await asyncio.gather(*(last(llm, "a", 3) for _ in range(8)))
        assert engine.is_idle

    run(main)


async def last(llm, prompt, max_tokens):
    results = [result async for result in llm.generate(prompt, SamplingParams(max_tokens=max_tokens))]
    return results[-1]


def test_what_cannot_be_served_raises(engine):
    async def main():
        llm = AsyncLLM("tiny")
        with pytest.raises(NotReady):
            await last(llm, "a", 1)
        async with llm:
            for prompt, sentence in (("", "prompt 0 is empty"), ("a" * 300, "context holds"), (5, "is a int")):
                with pytest.raises(ValueError, match=sentence):
                    await last(llm, prompt, 1)
            engine.fails_with = RuntimeError("broken")
            with pytest.raises(Exception, match="the engine failed"):
                await last(llm, "a", 5)
        with pytest.raises(NotReady):
            await last(llm, "a", 1)

    run(main)
    with pytest.raises(ValueError, match="unknown option max_num_seq=2; did you mean max_num_seqs"):
        AsyncLLM("tiny", max_num_seq=2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("a", "bad", "y"), "'bad' is no SamplingParams; give a SamplingParams, or leave it out"),
        (("a", None, 5), "5 is no .*; give a text, or leave it out"),
        (("a", None, ""), "request_id is empty; give at least one character, or leave it out"),
        ((None,), "prompt 0 is a NoneType; give a text"),
        (({"prompt": "a", "cache_salt": ""},), "prompt 0 has cache_salt=''"),
    ],
)
def test_arguments_of_another_type_are_a_sentence(engine, arguments, sentence):
    async def main():
        async with AsyncLLM("tiny") as llm:
            with pytest.raises(ValueError, match=sentence):
                async for _ in llm.generate(*arguments):
                    pass
            prompt = {"prompt_token_ids": [65] * (engine.max_model_len - 5)}
            results = [result async for result in llm.generate(prompt, SamplingParams(max_tokens=100))]
            assert len(results[-1].outputs[0].token_ids) == 5, "as of LLM"
        assert engine.is_idle

    run(main)


def test_leaving_the_loop_ends_the_request_and_abort_brings_what_there_is(engine):
    async def main():
        async with AsyncLLM("tiny") as llm:
            async with contextlib.aclosing(llm.generate("a", SamplingParams(max_tokens=100))) as results:
                async for _ in results:
                    break
            await until(lambda: engine.is_idle)

    run(main)


def test_abort_brings_what_there_is_and_a_full_queue_is_said(monkeypatch):
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)
    monkeypatch.setattr(apt_jax.serve.runtime.build, "build_engine", lambda model, **options: engine)

    async def main():
        async with AsyncLLM("tiny") as llm:
            results = llm.generate("a", SamplingParams(max_tokens=110), "mine")
            engine.allow_step()
            assert (await anext(results)).outputs[0].text == "b"
            asked = [asyncio.create_task(last(llm, "a", 1)) for _ in range(20)]
            await llm.abort("other")
            await llm.abort("mine")
            await asyncio.sleep(0.01)  # all of it is in the inbox
            engine.allow_step(1000)
            found = [result async for result in results][-1]
            assert found.outputs[0].finish_reason == "abort" and found.finished and found.outputs[0].text[:1] == "b"
            answers = await asyncio.gather(*asked, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, QueueFull)]
            assert 0 < len(refused) < 20 and all(isinstance(a, QueueFull) or a.finished for a in answers)

    run(main)


def test_a_model_that_cannot_be_loaded(monkeypatch):
    def build(model, **options):
        raise ValueError("no such model")

    monkeypatch.setattr(apt_jax.serve.runtime.build, "build_engine", build)

    async def main():
        with pytest.raises(ValueError, match="no such model"):
            await AsyncLLM("tiny").start()

    run(main)


def test_mounted_in_another_application(engine):
    llm = AsyncLLM("tiny")

    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with llm:
            yield

    async def own(http):
        return PlainTextResponse("mine")

    app = Starlette(
        routes=[Route("/own", own), Mount("/llm", llm.app(api_key=("secret",), served_model_name="named"))],
        lifespan=lifespan,
    )

    async def main():
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                assert (await client.get("/own")).text == "mine"
                assert (await client.get("/llm/health")).status_code == 200, "open, as where it is not mounted"
                body = {"model": "named", "prompt": "a", "max_tokens": 2}
                assert (await client.post("/llm/v1/completions", json=body)).status_code == 401
                reply = await client.post("/llm/v1/completions", json=body, headers={"authorization": "Bearer secret"})
                assert reply.json()["choices"][0]["text"] == "bc"
                assert (await last(llm, "a", 2)).outputs[0].text == "bc"

    run(main)


def test_an_id_that_is_under_way_is_refused(engine):
    """It used to wait for ever: both wanted the outputs of one."""

    async def main():
        async with AsyncLLM("tiny") as llm:
            first = llm.generate("a", SamplingParams(max_tokens=60), "same")
            begun = await anext(first)
            with pytest.raises(ValueError, match="request_id='same' is that of a request under way; give each its own"):
                await anext(llm.generate("a", SamplingParams(max_tokens=2), "same"))
            assert [begun, *[result async for result in first]][-1].finished
            found = await asyncio.gather(
                *(last_of(llm.generate("a", SamplingParams(max_tokens=9), "two")) for _ in range(2)),
                return_exceptions=True,
            )
            assert sum(isinstance(each, ValueError) for each in found) == 1

    async def last_of(results):
        return [result async for result in results][-1]

    run(main)
