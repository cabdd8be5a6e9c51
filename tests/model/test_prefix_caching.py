"""A real model with the prefix cache: the demo model gives the same tokens cold and from the cache, in both kinds."""

import pytest

from apt_jax.cache import CacheKind
from apt_jax.engine_config import EngineConfig
from apt_jax.request import Request, SamplingParams
from apt_jax.serve.runtime.build import build_engine
from tests.support.engines import Orders

TEXT = 'def read(file):\n    """Read the file."""\n' * 12
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=5, max_tokens=24, ignore_eos=True)
PENALISED = SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(
        enable_prefix_caching=True, num_blocks=2000, calibrate=False, scheduling_policy="fcfs", dtype="float32"
    )
    return build_engine(None, engine_config=config)


def served(engine, prompt: list[int], params: SamplingParams, kind: CacheKind) -> Request:
    engine.policy = Orders(kinds={"r": kind})
    request = engine.add(prompt, params, request_id="r")
    while engine.has_unfinished:
        engine.step()
        engine.state.check()
    return request


@pytest.mark.parametrize("kind", CacheKind)
@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
def test_turns_of_a_chat_get_the_same_tokens_cold_and_from_the_cache(engine, kind, params):
    prompt = engine.tokenizer.encode(TEXT)
    engine.reset_prefix_cache()
    first, again = (served(engine, prompt, params, kind) for _ in range(2))
    turn = [*prompt, *first.output_token_ids, 7, 8]
    second = served(engine, turn, params, kind)
    engine.reset_prefix_cache()
    cold = served(engine, turn, params, kind)
    full = (len(prompt) - 1) // 16 * 16
    assert [r.num_cached_tokens for r in (first, again, cold)] == [0, full, 0]
    assert second.num_cached_tokens >= len(prompt)  # some of the answer too
    assert first.output_token_ids == again.output_token_ids
    assert second.output_token_ids == cold.output_token_ids


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_kv_request_gets_its_tokens_from_projected_hidden_pages(engine, params):
    prompt = engine.tokenizer.encode(TEXT)
    engine.reset_prefix_cache()
    cold = served(engine, prompt, params, CacheKind.KV)
    engine.reset_prefix_cache()
    served(engine, prompt, params, CacheKind.HIDDEN)
    engine.state.least_projected_tokens = 16
    projected = served(engine, prompt, params, CacheKind.KV)
    assert projected.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    assert projected.output_token_ids == cold.output_token_ids
