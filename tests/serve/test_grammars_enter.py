"""Requests whose grammar is to be compiled, or to follow tokens, wait for that; the engine and all others go on."""

import asyncio
import json
import os
import threading
import time

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.output import QueueFull
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.serve.errors import NotReady
from apt_jax.serve.runtime.samples import Sample
from apt_jax.tokenization.grammars.compiling import Grammars
from apt_jax.tokenization.grammars.following import Matcher
from apt_jax.tokenization.restriction import restriction as restriction_of
from tests.serve.test_serve_engine_thread import run, running, submit, tokens_of, until
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.unit.test_grammar_limits import ENDLESS, FOLDER, is_running, processes_of

DEMO = (FOLDER / "tokenizer.json").read_text("utf-8")


class Restricting(FakeEngine):
    """Makes what was not made for it, as the real one does."""

    def __init__(self, **options):
        tokenizer = CharTokenizer()
        tokenizer.grammars = Grammars(lambda: DEMO, 1)
        super().__init__(tokenizer=tokenizer, **options)
        self.made_here: list[str] = []

    def add(self, prompt, params, *, restriction=None, output_token_ids=(), request_id, **options):
        if restriction is None and params.is_restricted:
            self.made_here.append(request_id)
            restriction_of(params, self.tokenizer, self.model_config.vocab_size, output_token_ids)
        return super().add(prompt, params, request_id=request_id, output_token_ids=output_token_ids, **options)


def begun_one(name: str, grammar, tokens) -> list[Sample]:
    params = SamplingParams(max_tokens=5, structured_outputs=grammar)
    return [Sample(name, 0, [10], params, output_token_ids=tokens)]


@pytest.fixture
def following(monkeypatch):
    """Tokens that were generated before are followed once this is set."""
    may_go, accept = threading.Event(), Matcher.accept
    monkeypatch.setattr(Matcher, "accept", lambda *asked: may_go.wait(20) and accept(*asked))
    yield may_go
    may_go.set()


def token_of(text: str) -> int:
    return json.loads(DEMO)["model"]["vocab"][text]


def test_others_go_on_while_a_grammar_is_compiled():
    """It was compiled in the engine's thread if it had been evicted, under Ray, and after a restart."""

    async def main():
        async with running(Restricting()) as thread:
            slow = submit(thread, "slow", [10], structured_outputs=ENDLESS)
            began = time.monotonic()
            other = submit(thread, "other", [20], max_tokens=30)
            assert await tokens_of(other) == {0: list(range(21, 51))}
            others_s = time.monotonic() - began
            with pytest.raises(ValueError, match="grammar cannot be compiled: it takes more than"):
                await slow.accepted()
            assert others_s < (time.monotonic() - began) / 2

    run(main)


def test_others_go_on_while_a_resumed_request_follows_its_tokens(following):
    async def main():
        engine = Restricting()
        async with running(engine) as thread:
            asked = {"regex": "aa[a-c]{50}"}
            resumed = thread.submit(begun_one("resumed", asked, [token_of("a")] * 2))
            other = submit(thread, "other", [20], max_tokens=30)
            assert await tokens_of(other) == {0: list(range(21, 51))}
            assert engine.num_waiting == 0
            following.set()
            await resumed.accepted()
            assert sum(map(len, (await tokens_of(resumed)).values())) == 3
            bad = thread.submit(begun_one("bad", asked, [token_of("b")]))
            with pytest.raises(ValueError, match="output_token_ids do not follow structured_outputs"):
                await bad.accepted()
            known = submit(thread, "known", [30], structured_outputs=asked, max_tokens=2)
            assert await tokens_of(known) == {0: [31, 32]}
        assert engine.made_here == ["known"], "it waits for nothing"

    run(main)


def test_many_samples_enter_with_their_own(following):
    async def main():
        engine = Restricting(config=EngineConfig(max_num_seqs=4, max_num_queued_reqs=100, scheduling_policy="fcfs"))
        async with running(engine) as thread:
            group = submit(thread, "many", [10], n=80, max_tokens=2, structured_outputs={"regex": "[a-c]{40}"})
            assert await tokens_of(group) == {index: [11, 12] for index in range(80)}
        assert engine.made_here == []

    run(main)


@pytest.mark.parametrize("count", [1, 80])
def test_one_that_waits_can_be_aborted_and_ended(following, count):
    async def main():
        engine = Restricting(config=EngineConfig(max_num_seqs=4, max_num_queued_reqs=100, scheduling_policy="fcfs"))
        async with running(engine) as thread:
            samples = [
                Sample(f"{name}{number}", number, [10], params, output_token_ids=[token_of("a")])
                for name in ("left", "ended")
                for number in range(count)
                for params in [SamplingParams(max_tokens=9, structured_outputs={"regex": "[a-c]{40}"})]
            ]
            left, ended = thread.submit(samples[:count]), thread.submit(samples[count:])
            await tokens_of(submit(thread, "other", [20], max_tokens=3))
            left.close()
            thread.end(ended)
            await tokens_of(submit(thread, "next", [20], max_tokens=3))
            following.set()
            reasons = [output.finish_reason async for outputs in ended for _, output in outputs if output.finish_reason]
            assert reasons == [FinishReason.ABORT] * count
            await until(lambda: not engine.has_unfinished)
            assert engine.is_idle

    run(main)


def test_one_that_waits_fails_when_the_thread_ends_and_the_processes_end_with_it():
    """The process that knows the vocabulary stayed until the engine was collected."""

    async def main():
        engine = Restricting()
        async with running(engine) as thread:
            before = set(processes_of(os.getpid()))
            await tokens_of(submit(thread, "known", [30], structured_outputs={"regex": "[ab]"}, max_tokens=1))
            (forking,) = set(processes_of(os.getpid())) - before
            waits = submit(thread, "waits", [10], structured_outputs=ENDLESS)
            await tokens_of(submit(thread, "other", [20], max_tokens=3))
            began = time.monotonic()
            assert await asyncio.to_thread(thread.stop, 5)
            with pytest.raises(NotReady):
                await waits.accepted()
            assert time.monotonic() - began < 1.5
            assert not is_running(forking)

    run(main)


def test_how_many_wait_is_bounded(following):
    async def main():
        config = EngineConfig(max_num_seqs=4, max_num_queued_reqs=2, scheduling_policy="fcfs")
        async with running(Restricting(config=config)) as thread:
            groups = [thread.submit(begun_one(name, {"regex": "[a-c]{40}"}, [token_of("a")])) for name in "abc"]
            with pytest.raises(QueueFull, match="2 requests wait for their grammars; try again later"):
                await groups[2].accepted()
            following.set()
            for group in groups[:2]:
                await tokens_of(group)

    run(main)
