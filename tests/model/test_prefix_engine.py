"""The whole engine but for the model: random conversations over a cache that holds token ids (`token_runner.py`)."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason, SamplingParams
from tests.support.conversations import Conversations
from tests.support.engines import Orders, finish
from tests.support.token_runner import VOCABULARY, answer, make_engine

POLICIES = ("fcfs", "apt", "apt:mixed=off", "sarathi", "mlfq", "vllm-v0", "vllm-v1")


def greedy(max_tokens: int) -> SamplingParams:
    """Every third one has a penalty, so that the runner compares the device's history with the tokens."""
    penalty = 0.5 * (max_tokens % 3 == 0)
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, presence_penalty=penalty)


def converse(policy: str, mode: str, asynchronous: bool, seed: int, *, cached: bool = True, **options) -> Conversations:
    draw = random.Random(seed)
    blocks = draw.randint(24, 40) if mode == "hidden" else draw.randint(48, 70)  # about two contexts
    engine = make_engine(
        blocks, cache_mode=mode, async_scheduling=asynchronous, scheduling_policy=policy,
        enable_prefix_caching=cached, **options,
    )  # fmt: skip
    engine.state.least_projected_tokens = draw.choice([None, 4, 8])
    talks = Conversations(engine, draw, VOCABULARY, greedy)
    talks.run(draw.randint(1, 12))
    for request in talks.answered:
        assert request.output_token_ids == answer(request.prompt_token_ids, request.max_new_tokens)
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
    assert sum(t.aborted for t in talks) > sum(t.resumed for t in talks) > 0


def test_a_kv_request_goes_on_from_hidden_pages_that_were_projected_for_it():
    engine = make_engine(60, cache_mode="hybrid", enable_prefix_caching=True)
    engine.policy = Orders(kinds={"hidden": CacheKind.HIDDEN})
    engine.state.least_projected_tokens = 4
    first = engine.add([*range(30)], greedy(9), request_id="hidden")
    finish(engine)
    turn = [*first.prompt_token_ids, *first.output_token_ids, 5, 6]
    both = [engine.add(turn, greedy(9), request_id=name) for name in ("kv", "hidden")]
    finish(engine)
    assert [r.num_cached_tokens for r in both] == [36, 36] and both[0].cache_history == [CacheKind.KV]
    assert all(r.output_token_ids == answer(turn, 9) for r in both)


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
