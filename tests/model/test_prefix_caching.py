"""The engine with a prefix cache: the same tokens as without, whatever is shared, preempted, aborted or in flight."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_jax.cache import CacheKind
from apt_jax.model_config import ModelConfig
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.scheduling.policies.catalogue import make_policy
from tests.support.checkpoint_folders import random_model
from tests.support.engines import GREEDY, Orders, failing_dispatch, finish, make_engine, run

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=48, max_position_embeddings=96,
    num_attention_heads=4, word_embed_proj_dim=32, eos_token_ids=(),
)  # fmt: skip
PROMPT = [5 + 3 * i % 80 for i in range(40)]
SHORT = replace(GREEDY, max_tokens=5)
SETTINGS = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
        yield


@pytest.fixture(scope="module")
def model(few_shapes):
    return random_model(CONFIG, seed=11)


@pytest.fixture(scope="module")
def alone(model):
    """Tokens of one request on an engine without a prefix cache, each computed once."""
    engine, known = make_engine(model, CONFIG, cache_mode="kv", num_blocks=40), {}

    def tokens_of(prompt: list[int], params: SamplingParams) -> list[int]:
        key = (tuple(prompt), repr(params))
        if key not in known:
            known[key] = run(engine, [prompt], params)[0].output_token_ids
        return known[key]

    return tokens_of


def caching(model, mode="kv", **options):
    return make_engine(model, CONFIG, enable_prefix_caching=True, cache_mode=mode, **options)


TURN = st.tuples(st.integers(1, 14), st.integers(1, 9), st.booleans())  # new tokens, answer, seeded
CONVERSATION = st.tuples(
    st.integers(0, 1),
    st.integers(0, 40),
    st.lists(TURN, min_size=1, max_size=2),
    st.integers(0, 12),
    st.none() | st.integers(0, 20),
)  # fmt: skip   beginning, its length, turns, the step at which it comes, the step after which it is aborted

ENGINES = {
    "kv": {"mode": "kv", "num_blocks": 28},
    "kv, async, apt": {"mode": "kv", "num_blocks": 28, "async_scheduling": True, "scheduling_policy": "apt"},
    "hidden, async": {"mode": "hidden", "num_blocks": 15, "async_scheduling": True},
    "hybrid": {"mode": "hybrid", "num_blocks": 26},
    "hybrid, async, sarathi": {
        "mode": "hybrid", "num_blocks": 26, "async_scheduling": True, "scheduling_policy": "sarathi",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=ENGINES)
def engine(model, request):
    made = caching(model, **ENGINES[request.param], max_num_seqs=4)
    yield made
    assert made.state.prefix_hits > 0, "nothing was ever shared"


@given(conversations=st.lists(CONVERSATION, min_size=1, max_size=6), reset=st.booleans())
@SETTINGS
def test_conversations_get_the_same_tokens(engine, alone, conversations, reset):
    """A pool for about two contexts, its table kept from one example to the next unless reset."""
    if reset:
        engine.reset_prefix_cache()
    coming = {}
    running = {}
    for number, (begins, shared, turns, step, aborted) in enumerate(conversations):
        history = [1 + begins + 2 * i % 90 for i in range(shared)]
        coming.setdefault(step, []).append((str(number), history, list(turns), aborted))
    step = 0

    def start(name, history, turns, aborted):
        (count, output, seeded), *rest = turns
        prompt = [*history, *((7 * len(history) + 5 * i + int(name)) % 96 for i in range(count))]
        params = SamplingParams(temperature=0.8 if seeded else 0, seed=len(prompt), max_tokens=output, ignore_eos=True)
        added = engine.add(prompt, params, request_id=f"{name}-{len(rest)}")
        running[added.request_id] = (added, name, rest, aborted)

    while coming or engine.has_unfinished or running:
        for entry in coming.pop(step, []):
            start(*entry)
        engine.step()
        engine.state.check()
        step += 1
        for request_id, (request, name, rest, aborted) in list(running.items()):
            if request.finish_reason is None:
                if aborted is not None and step > aborted:
                    engine.abort(request_id)
                    del running[request_id]
                continue
            del running[request_id]
            assert request.finish_reason is FinishReason.LENGTH
            assert request.output_token_ids == alone(list(request.prompt_token_ids), request.params)
            if rest:
                start(name, [*request.prompt_token_ids, *request.output_token_ids], rest, aborted)
        assert step < 3000
    assert engine.state.pool.num_free == engine.state.pool.num_blocks


@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_only_uncached_tokens_run(model, alone, mode):
    engine = caching(model, mode, num_blocks=60, max_num_batched_tokens=48)
    assert run(engine, [PROMPT], SHORT)[0].output_token_ids == alone(PROMPT, SHORT)
    second = engine.add(PROMPT, SHORT, request_id="again")
    engine.step()
    assert [entry.num_tokens for entry in engine.last_plan.scheduled] == [8]
    finish(engine)
    assert (second.num_cached_tokens, second.output_token_ids) == (32, alone(PROMPT, SHORT))
    figures = engine.figures()
    assert (figures.prefix_queries, figures.prefix_hits) == (80, 32)
    engine.reset_prefix_cache()
    assert run(engine, [PROMPT], SHORT)[0].num_cached_tokens == 0


def test_a_readmitted_request_takes_its_own_pages_and_a_new_table(model, alone):
    """Preempted in the middle of its answer, which is cached too; its slot held the old table."""
    engine = caching(model, num_blocks=60, max_num_batched_tokens=48)
    params = replace(GREEDY, max_tokens=20)
    engine.policy = Orders(kinds={}, preempt_at={"0": 12})
    request, *_ = [engine.add(PROMPT[:10], params, request_id=str(i)) for i in range(2)]
    tokens = []
    finish(engine, lambda step: tokens.extend(e.num_tokens for e in engine.last_plan.scheduled))
    assert request.num_preemptions == 1 and request.output_token_ids == alone(PROMPT[:10], params)
    assert sum(tokens) < 2 * 10 + 2 * 20 + 12, "the answer so far was computed again"


def test_scored_prompts_and_penalties_are_as_without(model):
    plain, engine = make_engine(model, CONFIG, num_blocks=60), caching(model, "hybrid", num_blocks=60)
    for asked in ({"prompt_logprobs": 1}, {"repetition_penalty": 1.5}, {"frequency_penalty": 0.7}):
        params = replace(SHORT, **asked)
        run(engine, [PROMPT], SHORT)
        found = [run(one, [PROMPT], params)[0] for one in (plain, engine)]
        assert found[0].output_token_ids == found[1].output_token_ids
        assert found[1].num_cached_tokens == 0


def test_what_is_not_finite_is_not_found_again(model, alone):
    engine = caching(model, num_blocks=60)
    request = engine.add(PROMPT[:20], SHORT, request_id="bad")
    while not request.output_token_ids:
        engine.step()
    runner = engine.runner
    runner._pool = runner._pool.at[jnp.asarray(request.table.blocks[0])].set(jnp.nan)
    finish(engine)
    assert request.finish_reason is FinishReason.ERROR
    again = run(engine, [PROMPT[:20]], SHORT)[0]
    assert (again.num_cached_tokens, again.output_token_ids) == (0, alone(PROMPT[:20], SHORT))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_step_empties_the_table(model, alone, asynchronous):
    engine = caching(model, num_blocks=60, async_scheduling=asynchronous)
    run(engine, [PROMPT], SHORT)
    engine.add(PROMPT, SHORT, request_id="unlucky")
    engine.step()
    with failing_dispatch(engine, "RESOURCE_EXHAUSTED: out of memory"):
        engine.step()
    finish(engine)
    assert engine.state.pool.num_idle == 0
    again = run(engine, [PROMPT], SHORT)[0]
    assert (again.num_cached_tokens, again.output_token_ids) == (0, alone(PROMPT, SHORT))


def test_requests_that_share_hidden_pages_are_not_converted(model, alone):
    """fcfs converts the oldest hidden request once memory is free; not while its pages are another's too."""
    engine = caching(model, "hybrid", num_blocks=70, max_num_batched_tokens=48)
    params = replace(GREEDY, max_tokens=30)
    engine.policy = Orders(kinds={"a": CacheKind.HIDDEN, "b": CacheKind.HIDDEN})
    first = engine.add(PROMPT, params, request_id="a")
    engine.step()
    second = engine.add(PROMPT, replace(params, max_tokens=10), request_id="b")
    engine.step()
    assert second.num_cached_tokens == 32 and engine.state.shared_blocks(first)
    engine.policy = make_policy("fcfs")
    while second.finish_reason is None:
        engine.step()
        assert not first.num_conversions
    finish(engine)
    assert first.num_conversions == 1
    assert first.output_token_ids == alone(PROMPT, params)
    assert second.output_token_ids == alone(PROMPT, replace(params, max_tokens=10))
    assert run(engine, [PROMPT], SHORT)[0].output_token_ids == alone(PROMPT, SHORT)
