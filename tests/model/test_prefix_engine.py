"""The whole engine but for the model: random conversations over a cache that holds token ids (`token_runner.py`)."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_jax.request import FinishReason, SamplingParams
from tests.support.token_runner import VOCABULARY, answer, make_engine

POLICIES = ("fcfs", "apt", "apt:mixed=off", "sarathi", "mlfq", "vllm-v0", "vllm-v1")


class Conversations:
    """Turns of several users on one engine, with three beginnings, two salts, aborts and resets, by a seed."""

    def __init__(self, engine, draw: random.Random):
        self.engine, self.draw, self.running = engine, draw, {}
        self.preemptions = self.conversions = 0

    def begin(self, name: str) -> None:
        begins, shared = self.draw.randint(0, 2), self.draw.randint(0, 40)
        history = [(11 * begins + k) % VOCABULARY for k in range(shared)]
        self.turn(name, history, self.draw.choice([None, None, "salt"]))

    def turn(self, name: str, history: list[int], salt: str | None) -> None:
        prompt = [*history, *((5 * int(name) + k) % VOCABULARY for k in range(self.draw.randint(1, 12)))]
        params = SamplingParams(temperature=0, max_tokens=self.draw.randint(1, 14), ignore_eos=True)
        request_id = f"{name}.{len(prompt)}"
        self.running[request_id] = name, self.engine.add(prompt, params, request_id=request_id, cache_salt=salt)

    def run(self, count: int) -> None:
        coming, step = sorted((self.draw.randint(0, 30), str(i)) for i in range(count)), 0
        while coming or self.running or self.engine.has_unfinished:
            while coming and coming[0][0] <= step:
                self.begin(coming.pop(0)[1])
            self.engine.step()
            self.engine.state.check()
            if self.draw.random() < 0.01:
                self.engine.reset_prefix_cache()
            for request_id, (name, request) in list(self.running.items()):
                self.look(request_id, name, request)
            step += 1
            assert step < 4000, "no end in sight"

    def look(self, request_id: str, name: str, request) -> None:
        if request.finish_reason is None:
            if self.draw.random() < 0.005:
                self.engine.abort(request_id)
                del self.running[request_id]
            return
        del self.running[request_id]
        assert request.finish_reason is FinishReason.LENGTH
        assert request.output_token_ids == answer(request.prompt_token_ids, request.max_new_tokens)
        self.preemptions += request.num_preemptions
        self.conversions += request.num_conversions
        if request.num_tokens < 60 and self.draw.random() < 0.5:
            self.turn(name, [*request.prompt_token_ids, *request.output_token_ids], request.cache_salt)


def converse(policy: str, mode: str, asynchronous: bool, seed: int, *, cached: bool = True, **options) -> Conversations:
    draw = random.Random(seed)
    blocks = draw.randint(24, 40) if mode == "hidden" else draw.randint(48, 70)  # about two contexts
    engine = make_engine(
        blocks, cache_mode=mode, async_scheduling=asynchronous, scheduling_policy=policy,
        enable_prefix_caching=cached, **options,
    )  # fmt: skip
    talks = Conversations(engine, draw)
    talks.run(draw.randint(1, 12))
    assert engine.state.pool.num_free == engine.state.pool.num_blocks
    assert engine.figures().num_failed_steps == 0
    return talks


@pytest.mark.parametrize("policy", POLICIES)
@given(mode=st.sampled_from(["kv", "hidden", "hybrid"]), asynchronous=st.booleans(), seed=st.integers(0, 2**32))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_answer_is_that_of_its_own_tokens(policy, mode, asynchronous, seed):
    converse(policy, mode, asynchronous, seed)


def test_these_conversations_share_preempt_and_convert():
    """So that the test above is about what it says."""
    talks = [converse("fcfs", mode, False, seed) for mode in ("kv", "hidden", "hybrid") for seed in range(8)]
    assert all(sum(t.engine.state.prefix_hits for t in talks[i : i + 8]) > 0 for i in (0, 8, 16))
    assert sum(t.preemptions for t in talks) > 0 and sum(t.conversions for t in talks) > 0


def test_without_the_cache_nothing_is_shared():
    assert converse("fcfs", "kv", False, 1, cached=False).engine.figures().prefix_queries == 0


def test_the_runner_notices_a_wrong_page():
    engine = make_engine(40, enable_prefix_caching=True)
    request = engine.add([1, 2, 3, 4, 5], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), request_id="a")
    engine.step()
    engine.runner.pool[request.table.blocks[0][0]] = 0
    while engine.has_unfinished:
        engine.step()
    assert request.finish_reason is FinishReason.ERROR
