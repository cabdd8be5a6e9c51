"""Random conversations on a real small model: with the prefix cache every answer has the tokens it has without.

APT_JAX_CONVERSATIONS=1000 serves so many at once instead of a dozen, on the same engines.
"""

import os
from dataclasses import replace

import pytest

from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.policies.catalogue import make_policy
from tests.support.checkpoint_folders import random_model
from tests.support.conversations import alone, converse
from tests.support.engines import make_engine

CONFIG = ModelConfig(
    vocab_size=101, hidden_size=64, num_hidden_layers=2, ffn_dim=128, max_position_embeddings=96,
    num_attention_heads=4, word_embed_proj_dim=64, eos_token_ids=(),
)  # fmt: skip
COUNT = int(os.environ.get("APT_JAX_CONVERSATIONS", "8"))


@pytest.fixture(scope="module")
def engine():
    """Few shapes to compile; a pool of one context as KV."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
        yield make_engine(random_model(CONFIG, seed=0), CONFIG, num_blocks=28, enable_prefix_caching=True)


@pytest.mark.parametrize(
    ("policy", "mode", "asynchronous"),
    [("fcfs", "hybrid", False), ("apt", "hybrid", True), ("sarathi", "hidden", True), ("vllm-v1", "kv", False)],
)
def test_every_answer_has_the_tokens_that_it_has_without_the_cache(engine, policy, mode, asynchronous):
    engine.state.limits = replace(engine.state.limits, cache_mode=mode)
    engine._depth = int(asynchronous)
    engine.state.least_projected_tokens = 8
    engine.policy = make_policy(policy, engine.policy_context)
    engine.reset_prefix_cache()
    before = engine.state.prefix_hits
    talks = converse(engine, COUNT, seed=5)
    assert engine.state.prefix_hits > before and engine.figures().num_failed_steps == 0
    assert talks.preemptions > 0 or policy not in ("fcfs", "vllm-v1"), "the pool was meant to be too small"
    alone(engine, talks)
