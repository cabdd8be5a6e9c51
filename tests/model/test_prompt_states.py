"""Hidden states after prompts that an engine hands to policies that ask, and what `alise` makes of them."""

from dataclasses import replace

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.engine.engine import Engine
from apt_jax.engine_config import EngineConfig
from apt_jax.model_config import ModelConfig
from apt_jax.request import SamplingParams
from apt_jax.sampling.params import PoolingParams
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.serve.runtime.build import build_engine
from tests.support.checkpoint_folders import random_model
from tests.support.engines import Orders, Reader, finish, make_engine

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN
CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=96,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip
PROMPTS = [[2, 50, 60, 70], [2, *range(20, 80)], [2], [2, *range(40, 70)], [2, *range(20, 60), 7]]
KINDS = {"0": KV, "1": HIDDEN, "2": HIDDEN, "3": KV, "4": HIDDEN}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=0)


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request, model) -> Engine:
    engine = make_engine(model, CONFIG, async_scheduling=request.param, num_blocks=96, enable_prefix_caching=False)
    engine.runner.compile_all()
    return engine


def run(engine, prompts=PROMPTS, params=GREEDY) -> list[list[int]]:
    requests = [engine.add(prompt, params, request_id=str(i)) for i, prompt in enumerate(prompts)]
    finish(engine)
    return [request.output_token_ids for request in requests]


def dispatched(engine, monkeypatch) -> list:
    """The batches that the engine starts from now on."""
    batches, dispatch = [], engine.runner.dispatch
    monkeypatch.setattr(engine.runner, "dispatch", lambda batch: batches.append(batch) or dispatch(batch))
    return batches


@pytest.fixture(scope="module")
def expected(engine) -> dict[str, np.ndarray]:
    """The states that clients get who ask for embeddings."""
    engine.policy = Orders(KINDS)
    for i, prompt in enumerate(PROMPTS):
        engine.add(prompt, PoolingParams(), request_id=str(i))
    return {output.request.request_id: output.hidden for output in finish(engine)}


@pytest.mark.parametrize("mixed", [False, True])
def test_a_policy_sees_each_prompt_once_whatever_becomes_of_its_request(engine, expected, mixed, monkeypatch):
    """Prompts in chunks of 16, KV and hidden, preempted while and after the first token, converted."""
    engine.policy = Orders(KINDS, mixed=mixed)
    tokens = run(engine)
    engine.policy = reader = Reader(KINDS, preempt_at={"0": 1, "1": 3, "4": 2}, convert_at={"1": 6}, mixed=mixed)
    batches, programs = dispatched(engine, monkeypatch), engine.runner.num_programs
    assert run(engine) == tokens
    assert {i: len(states) for i, states in reader.seen.items()} == dict.fromkeys(expected, 1)
    for i, (state,) in reader.seen.items():
        assert state.dtype == np.float32
        np.testing.assert_allclose(state, expected[i], atol=1e-4)
    assert sum(batch.pools for batch in batches) <= len(PROMPTS), "only where a prompt ends"
    assert engine.runner.num_programs == programs, "nothing was compiled for it"


def test_a_policy_that_does_not_ask_costs_nothing(engine, monkeypatch):
    engine.policy, batches = Orders(KINDS), dispatched(engine, monkeypatch)
    run(engine)
    assert batches and not any(batch.pools for batch in batches)


def test_texts_that_are_only_embedded_are_not_shown(engine):
    engine.policy = reader = Reader(KINDS)
    engine.add(PROMPTS[0], PoolingParams(), request_id="0")
    engine.add(PROMPTS[1], GREEDY, request_id="1")
    outputs = finish(engine)
    assert [*reader.seen] == ["1"] and outputs[0].hidden is not None
    assert all(output.hidden is None for output in outputs if output.request.request_id == "1")


def test_a_policy_that_raises_about_a_prompt_takes_no_output_away(engine):
    engine.policy = Orders(KINDS)
    tokens = run(engine)
    engine.policy, before = Reader(KINDS, fails=True), engine.figures().num_failed_steps
    assert run(engine) == tokens and engine.figures().num_failed_steps == before + len(PROMPTS)


def test_a_request_that_is_continued_is_not_shown(engine):
    """What is left of its prompt is the middle of what is computed; its tokens are those of before."""
    engine.policy = reader = Reader(KINDS)
    tokens = run(engine)
    reader.seen.clear()
    request = engine.add(PROMPTS[1], GREEDY, request_id="1", output_token_ids=tokens[1][:5])
    finish(engine)
    assert request.output_token_ids == tokens[1] and not reader.seen


def test_cached_prefixes_change_no_state(model, expected):
    engine = make_engine(model, CONFIG, cache_mode="hidden", num_blocks=96)
    for _ in range(2):
        engine.policy = reader = Reader(dict.fromkeys(KINDS, HIDDEN))
        run(engine)
    assert engine.figures().prefix_hits >= 64
    for i, states in reader.seen.items():
        np.testing.assert_allclose(states[0], expected[i], atol=1e-4)


@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_alise_changes_no_token_in_a_small_pool_with_host_memory(model, mode):
    """Seventy requests of two lengths; many are preempted, moved and brought back while it learns."""
    prompts = [[2, *range(10 + k % 7, 14 + k % 13 + k % 7)] for k in range(70)]
    params = [replace(GREEDY, max_tokens=(4, 40)[k % 2]) for k in range(70)]
    blocks = {"kv": 40, "hidden": 20}[mode]
    engine = make_engine(model, CONFIG, cache_mode=mode, num_blocks=blocks, host_cache_bytes=10**6, calibrate=False)
    found = {}
    for policy in ("fcfs", "alise:retrieval=off", "alise"):
        engine.reset_prefix_cache()
        engine.policy, requests = make_policy(policy, PolicyContext()), []
        for k, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            requests.append(engine.add(prompt, each, request_id=str(k)))
            engine.step()
        finish(engine)
        found[policy] = [request.output_token_ids for request in requests]
        assert sum(request.num_preemptions for request in requests) > 5
    assert found["fcfs"] == found["alise"] == found["alise:retrieval=off"]
    assert engine.policy._predictor._count == 70, "all have become neighbours"
    assert not engine.policy._predictor._states


NOUNS = ("file", "path", "key", "line")
VERBS = ("read", "write", "open", "close", "send", "join", "split", "parse", "load", "dump", "find", "sort")
CODE = [f"def {verb}_{noun}(self, {noun}):\n    return" for verb in VERBS for noun in NOUNS]
PROSE = [f"The {noun} module can {verb} values, and this" for verb in VERBS for noun in NOUNS]


def test_alise_estimates_by_prompts_that_the_demo_model_sees_alike():
    """Answers to code are short here and those to prose long; after a new prompt of either kind alise knows which."""
    config = EngineConfig(
        scheduling_policy="alise", max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32, num_blocks=64,
        calibrate=False,
    )  # fmt: skip
    engine = build_engine(None, engine_config=config)
    prompts = [[list(engine.tokenizer.encode(text)) for text in texts] for texts in (CODE, PROSE)]
    for kind, length in zip(prompts, (3, 24), strict=True):
        run(engine, kind[:-1], replace(GREEDY, max_tokens=length))
    new = [engine.add(kind[-1], GREEDY, request_id=str(i)) for i, kind in enumerate(prompts)]
    counts = np.array([request.num_prompt_tokens for request in new])

    def estimates() -> list[float]:
        return engine.policy._predictor.remaining_of(new, counts, np.ones(2)).tolist()

    before = estimates()
    while not all(request.output_token_ids for request in new):
        engine.step()
    assert max(before) - min(before) < 3, "the same history for both"
    assert estimates() == [2.0, 23.0]
    finish(engine)
