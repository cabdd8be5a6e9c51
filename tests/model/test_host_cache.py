"""Host memory behind the prefix cache: the engine over a cache that holds token ids, and real copies of a real pool."""

import random
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_jax.engine_config import EngineConfig
from apt_jax.execution.programs import RestoreKey, SaveKey
from apt_jax.execution.runner import Runner
from apt_jax.model_config import ModelConfig
from apt_jax.request import SamplingParams
from apt_jax.scheduling.plan import Fetched, Reason
from tests.model import test_prefix_engine
from tests.model.test_prefix_engine import converse, greedy
from tests.support.checkpoint_folders import random_model
from tests.support.conversations import Conversations
from tests.support.engines import finish, make_engine
from tests.support.token_runner import VOCABULARY, answer
from tests.support.token_runner import make_engine as token_engine

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class FetchingToo:
    """A policy's plans, with pages of those that wait copied back as it happens."""

    def __init__(self, policy, seed: int):
        self.policy, self.draw, self.num_fetched = policy, random.Random(seed), 0

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def schedule(self, state, now):
        plan = self.policy.schedule(state, now)
        served = {entry.request.order for entry in plan.scheduled} | {entry.request.order for entry in plan.fetched}
        more = [
            Fetched(request, self.draw.choice(state.limits.kinds), self.draw.randint(0, 9), Reason.FETCHED_AHEAD)
            for request in state.waiting
            if request.order not in served and self.draw.random() < 0.5
        ]
        return replace(plan, fetched=(*plan.fetched, *more)) if plan.scheduled else plan


@pytest.mark.parametrize("policy", ["fcfs", "apt", "sarathi", "mlfq", "fastserve", "alise", "fastswitch"])
@given(
    mode=st.sampled_from(["kv", "hidden", "hybrid"]), asynchronous=st.booleans(), slots=st.sampled_from([2, 9, 40]),
    seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_answer_is_that_of_its_own_tokens(policy, mode, asynchronous, slots, seed):
    converse(policy, mode, asynchronous, seed, host_cache_bytes=slots)


@pytest.mark.parametrize("policy", ["fcfs", "apt", "fastswitch"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_answer_is_that_of_its_own_tokens_whatever_is_fetched(policy, asynchronous, monkeypatch):
    """Beside aborts, resumes, resets, preemptions, conversions and copies that fail."""
    fetched = failures = 0
    for seed in range(24):
        draw = random.Random(seed)

        def fails(draw=draw) -> bool:
            nonlocal failures
            failed = draw.random() < 0.03
            failures += failed
            return failed

        def changed(blocks, *, seed=seed, draw=draw, fails=fails, **options):
            engine = token_engine(blocks, **options)
            engine.policy = FetchingToo(engine.policy, seed)
            engine.runner.failing_copies = fails if draw.random() < 0.5 else bool
            return engine

        monkeypatch.setattr(test_prefix_engine, "make_engine", changed)
        mode = ("kv", "hidden", "hybrid")[seed % 3]
        talks = test_prefix_engine.converse(policy, mode, asynchronous, seed, host_cache_bytes=draw.choice([4, 40]))
        fetched += talks.engine.runner.num_fetched
    assert fetched > 40 and failures > 3


def test_these_conversations_copy_in_both_directions():
    """So that the test above is about what it says."""
    for mode in ("kv", "hidden", "hybrid"):
        tiers = [
            converse("fcfs", mode, False, seed, host_cache_bytes=40).engine.state.pool.host for seed in range(8)
        ]  # fmt: skip
        assert sum(tier.num_saved for tier in tiers) > 20 and sum(tier.num_restored for tier in tiers) > 5, mode


@pytest.mark.parametrize("policy", ["fcfs", "apt", "vllm-v1", "fastserve"])
def test_copies_that_fail_are_computed_again(policy):
    """Beside projections, conversions, preemption, aborts and resumes."""
    failures = projections = conversions = preemptions = 0
    for seed in range(12):
        draw = random.Random(seed)
        engine = token_engine(
            50, cache_mode="hybrid", enable_prefix_caching=True, host_cache_bytes=30, async_scheduling=bool(seed % 2),
            scheduling_policy=policy,
        )  # fmt: skip
        engine.state.least_projected_tokens = draw.choice([4, 8])
        happened, project = [], engine.runner.project

        def fails(draw=draw, happened=happened) -> bool:
            happened.append(draw.random() < 0.3)
            return happened[-1]

        def counted(found, project=project) -> None:
            nonlocal projections
            projections += len(found)
            project(found)

        engine.runner.failing_copies, engine.runner.project = fails, counted
        talks = Conversations(engine, draw, VOCABULARY, greedy)
        talks.run(10)
        for request in talks.answered:
            assert request.output_token_ids == answer(request.prompt_token_ids, request.max_new_tokens)
        failures += sum(happened)
        conversions += talks.conversions
        preemptions += talks.preemptions
        assert engine.state.pool.num_free == 50 and engine.figures().num_failed_steps == 0
    assert failures > 10 and preemptions > 0
    assert (projections > conversions > 0) if policy == "fcfs" else projections >= 0


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=3)


def cached_engine(model, **options):
    return make_engine(
        model, CONFIG, **{"dtype": "float32", "enable_prefix_caching": True, "host_cache_bytes": 2**20, **options}
    )


@pytest.mark.parametrize(("mode", "cache_dtype"), [("kv", "auto"), ("hidden", "int8")])
def test_a_model_goes_on_from_host_memory(model, mode, cache_dtype):
    """Prompts' pages leave a pool of two contexts for others', come back, and the answers stay as they were."""
    blocks = 28 if mode == "kv" else 14
    engine = cached_engine(model, cache_mode=mode, cache_dtype=cache_dtype, num_blocks=blocks, max_num_seqs=2)
    prompts = [[4 + (7 * k + 13 * i) % 90 for k in range(40)] for i in range(4)]

    def answers(again: int) -> list[list[int]]:
        found = []
        for number, prompt in enumerate(prompts):
            found.append(engine.add(prompt, GREEDY, request_id=f"{again}.{number}"))
            finish(engine)
        return [list(request.output_token_ids) for request in found]

    first, tier = answers(0), engine.state.pool.host
    assert tier.num_saved > 0 and answers(1) == first
    assert tier.num_restored >= 4 * blocks // 14 and engine.figures().prefix_hits >= 3 * 32
    assert engine.figures().num_failed_steps == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_int8_blocks_come_back_within_half_a_scale(model, mode, dtype):
    """A scale is a 127th of the greatest number of a token's head; with bfloat16 it is rounded once more."""
    engine = cached_engine(model, cache_mode=mode, dtype=dtype, num_blocks=28, host_cache_dtype="int8")
    runner = engine.runner
    numbers = np.random.default_rng(0).normal(0, 3, runner._pool.numbers.shape).astype(np.float32)
    numbers[3, 1, :16] = 0.0
    before = jnp.asarray(numbers, runner._pool.numbers.dtype)
    runner._pool = replace(runner._pool, numbers=before)
    runner.save([(block, block + 1) for block in range(11)])
    stored = runner._host._blocks[1]
    assert stored.numbers.dtype == jnp.int8 and stored.scales.shape == (*stored.numbers.shape[:2], 2)
    bytes_kept = sum(array.nbytes for array in stored)
    assert bytes_kept == runner.host_block_bytes(codes=True)
    assert bytes_kept / runner.host_block_bytes(codes=False) == (1 + 4 / 16) / before.dtype.itemsize
    runner._pool = replace(runner._pool, numbers=jnp.zeros_like(before))
    runner.restore([(block + 1, block) for block in range(5)])
    runner.fetch([(block + 1, block) for block in range(5, 11)])
    runner.land()
    was = np.asarray(before, np.float32).reshape(2, 28, -1, 2, 16)[:, :11]
    found = np.asarray(runner._pool.numbers, np.float32).reshape(2, 28, -1, 2, 16)[:, :11]
    scales = np.abs(was).max(-1, keepdims=True) / 127
    rounding = 0 if dtype == "float32" else 2.0**-8 * np.abs(found)
    assert (np.abs(found - was) <= scales / 2 * 1.001 + rounding).all() and (found != was).any()


def test_a_model_goes_on_with_int8_pages_from_host_memory(model):
    engine = cached_engine(model, cache_mode="kv", num_blocks=28, max_num_seqs=2, host_cache_dtype="int8")
    exact = cached_engine(model, cache_mode="kv", num_blocks=28, max_num_seqs=2)
    assert engine.state.pool.host.num_slots > 3 * exact.state.pool.host.num_slots, "of float32 nearly a quarter"
    ahead = {key.codes for key in engine.runner._keys() if isinstance(key, SaveKey | RestoreKey)}
    assert ahead == {True}, "compiled at start-up"
    prompts = [[4 + (7 * k + 13 * i) % 90 for k in range(40)] for i in range(4)]
    answers = []
    for again in range(2):
        for number, prompt in enumerate(prompts):
            answers.append(engine.add(prompt, GREEDY, request_id=f"{again}.{number}"))
            finish(engine)
    figures = engine.figures()
    assert figures.host_restored > 0 and figures.num_failed_steps == 0 and figures.prefix_hits >= 3 * 32
    assert all(len(request.output_token_ids) == 12 for request in answers)


@pytest.mark.parametrize("beside", [False, True])
def test_blocks_come_back_as_they_were(model, beside):
    runner = cached_engine(model, cache_mode="hybrid", cache_dtype="int8", num_blocks=24).runner
    rng, pool = np.random.default_rng(0), runner._pool
    numbers = rng.integers(-127, 127, pool.numbers.shape).astype(np.int8)
    scales = rng.random(pool.scales.shape).astype(np.float32)

    def fill(factor: int) -> None:
        arrays = jnp.asarray(factor * numbers), jnp.asarray((factor * scales).astype(np.float32))
        runner._pool = replace(runner._pool, numbers=arrays[0], scales=arrays[1])

    fill(1)
    pairs = [(block, 20 - block) for block in range(11)]  # eight at once, then one by one
    runner.save(pairs)
    fill(0)
    back = [(slot, 23 - block) for block, slot in pairs]
    if beside:
        runner.fetch(back)
        runner.save([(23, 20)])  # the slot may be taken while its copy is under way
        assert not np.asarray(runner._pool.numbers).any(), "not before it lands"
        runner.land()
        runner.land()
    else:
        runner.restore(back)
    for found, was in ((runner._pool.numbers, numbers), (runner._pool.scales, scales)):
        by_layer, before = (np.asarray(array).reshape(2, 24, -1) for array in (found, was))
        assert (by_layer[:, 13:] == before[:, 10::-1]).all() and not by_layer[:, :13].any()


@pytest.mark.parametrize(("mode", "block_s"), [("kv", None), ("hidden", 1.0)])
def test_preempted_requests_of_a_model_go_on_with_pages_that_came_beside_others(model, mode, block_s):
    """Priorities change all the time, in a pool of two contexts: the same tokens as where nobody is preempted.

    Pages come all at once, or with a second for a block two in an iteration.
    """

    def serve(blocks: int, **options):
        engine = cached_engine(
            model, cache_mode=mode, num_blocks=blocks, max_num_seqs=4, scheduling_policy="fastswitch:update_every=3",
            calibrate=False, **options,
        )  # fmt: skip
        if engine.state.pool.num_blocks == few:  # not as measured, or a busy machine finds that nothing need be put off
            engine.state.pool.host.block_s = block_s
        params, made = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), []
        for k in range(8):
            prompt = [4 + (7 * i + 13 * k) % 90 for i in range(24 + k)]
            made.append(engine.add(prompt, params, request_id=str(k), priority=k % 3))
        finish(engine)
        engine.state.check()
        assert engine.figures().num_failed_steps == 0 and engine.state.pool.num_free == blocks
        return [list(request.output_token_ids) for request in made]

    fetched = []
    few = 28 if mode == "kv" else 14
    with pytest.MonkeyPatch.context() as patch:
        whole = Runner.fetch
        patch.setattr(Runner, "fetch", lambda self, pairs: (fetched.extend(pairs), whole(self, pairs))[1])
        found = serve(few)
    assert fetched and found == serve(200, host_cache_bytes=0, enable_prefix_caching=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"host_cache_bytes": 1, "enable_prefix_caching": False}, "which is off; use --enable-prefix-caching too"),
        ({"host_cache_bytes": -1}, "host_cache_bytes=-1 must be at least 0"),
        ({"host_cache_bytes": 1, "host_cache_dtype": "fp8"}, "host_cache_dtype='fp8' must be one of auto, int8"),
        (
            {"host_cache_dtype": "int8"},
            "host_cache_dtype='int8' is of pages in host memory; use --host-cache-bytes too",
        ),
        (
            {"host_cache_bytes": 1, "host_cache_dtype": "int8", "cache_dtype": "int8"},
            "host_cache_dtype='int8' changes nothing of an int8 cache; leave it out, or cache_dtype",
        ),
    ],
)
def test_options_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("size", "words"), [(100, "less than one block of the cache, 2048 bytes"), (2**60, "has left")]
)
def test_what_is_no_block_or_no_memory_is_refused(model, size, words):
    with pytest.raises(ValueError, match=f"host_cache_bytes={size} is .*{words}"):
        cached_engine(model, host_cache_bytes=size)
