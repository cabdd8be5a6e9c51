"""Hidden states that an engine hands out for embeddings: those from which its own next tokens follow."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax

from apt_jax.checkpoints.load import load_model
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.request import SamplingParams
from apt_jax.sampling.params import PoolingParams

PROMPTS = [[2, 50, 60, 70], [2, *range(100, 190)], [2], [2, *range(300, 340)]]


@pytest.fixture(scope="module")
def loaded():
    return load_model(None)


def made(loaded, **options):
    chosen = {"max_model_len": 128, "num_blocks": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32, **options}
    return Engine(set_up(loaded.weights, loaded.config, EngineConfig(**chosen)))


def outputs_of(engine, params, prompts=PROMPTS):
    for number, prompt in enumerate(prompts):
        engine.add(prompt, params, request_id=str(number))
    found = {}
    while engine.has_unfinished:
        for output in engine.step():
            found[int(output.request.request_id)] = output
    assert engine.figures().num_held_blocks == 0 or engine.config.enable_prefix_caching
    return [found[number] for number in range(len(prompts))]


@pytest.mark.parametrize("options", [{"cache_mode": "kv"}, {"cache_mode": "hidden", "async_scheduling": True}])
def test_the_next_token_follows_from_the_hidden_state(loaded, options):
    engine = made(loaded, **options)
    pooled = outputs_of(engine, PoolingParams())
    generated = outputs_of(engine, SamplingParams(max_tokens=1, temperature=0.0, logprobs=3))
    model = loaded.weights.model(loaded.weights.outer.arrays)
    for hidden, output in zip((output.hidden for output in pooled), generated, strict=True):
        assert hidden.dtype == np.float32 and hidden.shape == (loaded.config.word_embed_proj_dim,)
        logprobs = np.asarray(log_softmax(model.logits(jnp.asarray(hidden)[None])[0].astype(jnp.float32)))
        (entry,) = output.logprobs
        assert int(logprobs.argmax()) == entry.token_id
        np.testing.assert_allclose(logprobs[[token for token, _ in entry.top]], [p for _, p in entry.top], atol=2e-4)
    assert all(output.hidden is None for output in generated)


def test_neighbours_and_cached_prefixes_change_nothing(loaded):
    engine = made(loaded, enable_prefix_caching=True)
    together = [output.hidden for output in outputs_of(engine, PoolingParams())]
    again = [output.hidden for output in outputs_of(engine, PoolingParams())]
    alone = [outputs_of(engine, PoolingParams(), [prompt])[0] for prompt in PROMPTS]
    assert engine.figures().prefix_hits > 0
    for first, second, third in zip(together, again, alone, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)
        np.testing.assert_allclose(first, third.hidden, atol=1e-4)


def test_a_prompt_may_fill_the_context(loaded):
    engine = made(loaded)
    (output,) = outputs_of(engine, PoolingParams(), [list(range(2, 130))])
    assert output.hidden is not None
    with pytest.raises(ValueError, match="the prompt has 129 tokens, but the context holds 128"):
        engine.add(list(range(2, 131)), PoolingParams(), request_id="long")
