"""An int8 cache and int8-dynamic weights in the C++ form in float32: a request's bits depend on the request alone.

Every code, scale, token and log-probability is the same wherever chunks end, beside whatever requests, after
preemption, and when a request is continued elsewhere.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from apt_jax.cache import CacheKind
from apt_jax.cpu_kernels import library
from apt_jax.model_config import ModelConfig
from apt_jax.request import SamplingParams
from apt_jax.scheduling.plan import Reason, Scheduled
from tests.support.checkpoint_folders import random_model
from tests.support.engines import Orders, finish, make_engine

try:
    library.register()
except library.Unavailable as error:
    pytest.skip(f"the C++ kernels cannot be had here: {error}", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)  # many shapes to compile
KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN
SEEDED = SamplingParams(temperature=0.8, seed=3, max_tokens=60, logprobs=5, ignore_eos=True)


class Cuts(Orders):
    """Chunks of any sizes, from one token on."""

    def __init__(self, kinds, seed, **options):
        super().__init__(kinds, mixed=True, **options)
        self.rng = np.random.default_rng(seed)

    def _prefills(self, state, gone, used):
        found = super()._prefills(state, gone, used)
        return [
            Scheduled(own.request, int(self.rng.integers(1, own.num_tokens + 1)), own.kind, Reason.CONTINUES_PREFILL)
            for own in found
        ]


def run(engine, config, policy, requests):
    """Of each request its tokens, their log-probabilities with those of others, and what it cached (see `read`).

    Args:
        requests: (id, prompt, the tokens that it has generated before).
    """
    engine.policy = policy
    added = [engine.add(list(p), SEEDED, request_id=i, output_token_ids=list(o)) for i, p, o in requests]
    cached = {}

    def look(_):
        for request in added:  # shortly before its blocks are freed, since others may get them
            if request.table is not None and len(request.output_token_ids) >= SEEDED.max_tokens - 2:
                cached[request.request_id] = read(engine, config, request)

    logprobs = {request.request_id: [] for request in added}
    for output in finish(engine, look):
        logprobs[output.request.request_id] += [(token.logprob, token.top) for token in output.logprobs]
    return {own.request_id: (own.output_token_ids, logprobs[own.request_id], cached[own.request_id]) for own in added}


def read(engine, config, request):
    """What a request has cached, `[L, tokens, ..]`: numbers, and their scales if they are codes, of each vector."""
    pool, S, P = engine.runner._pool, engine.state.pool.block_size, engine.runner.num_blocks
    L, N, tokens = config.num_hidden_layers, config.num_attention_heads, request.num_computed_tokens - 1
    parts = []
    for blocks in map(list, request.table.blocks):
        parts.append(np.asarray(pool.numbers).reshape(L, P, S, -1)[:, blocks].reshape(L, len(blocks) * S, -1))
        if pool.scales is not None:
            scales = np.asarray(pool.scales).reshape(L, P, -1)[:, blocks, : N * S].reshape(L, -1, N, S)
            parts.append(scales.swapaxes(2, 3).reshape(L, len(blocks) * S, N))
    return [part[:, :tokens] for part in parts]


def assert_same(found, expected):
    tokens, logprobs, parts = found
    for mine, other in zip(parts, expected[2], strict=True):
        n = min(mine.shape[1], other.shape[1])
        assert n > 100
        different = np.argwhere((mine[:, :n] != other[:, :n]).any(2))
        assert not len(different), f"first in layer {different[0][0]}, token {different[0][1]}"
    assert tokens == expected[0]
    assert len(logprobs) > 5 and logprobs == expected[1][-len(logprobs) :]  # of one that is continued, the last ones


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "embedded", "options"),
    [
        (4, 16, 8, 64, {"cache_dtype": "int8"}),
        (3, 32, 16, 48, {"cache_dtype": "int8", "quantization": "int8"}),
        (2, 80, 8, 160, {"cache_dtype": "int8", "quantization": "int8-dynamic"}),
        (4, 16, 32, 64, {"quantization": "int8-dynamic"}),
    ],
)
def test_every_bit_of_a_request_depends_on_the_request_alone(
    monkeypatch, heads, head_dim, block_size, embedded, options
):
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
    config = ModelConfig(
        vocab_size=101, hidden_size=heads * head_dim, num_hidden_layers=3, ffn_dim=150, max_position_embeddings=256,
        num_attention_heads=heads, word_embed_proj_dim=embedded, eos_token_ids=(),
    )  # fmt: skip
    model = random_model(config, seed=1)
    nnx.update(model, jax.tree.map(lambda a: a * 0.3, nnx.state(model)))  # attention to many tokens, not to one
    shapes = {"block_size": block_size, "num_blocks": 200, "enable_prefix_caching": False, "calibrate": False}
    engine = make_engine(
        model, config, attention_backend="native", max_num_seqs=8, max_num_batched_tokens=256, **shapes, **options
    )
    rng = np.random.default_rng(0)
    prompts = {f"{n}-{kind.value}": rng.integers(0, 101, n) for n in (57, 181) for kind in (KV, HIDDEN)}
    kinds = {i: HIDDEN if i.endswith(HIDDEN.value) else KV for i in prompts}
    expected = {i: run(engine, config, Orders(kinds), [(i, prompt, [])])[i] for i, prompt in prompts.items()}
    assert len({tuple(tokens) for tokens, *_ in expected.values()}) == len(prompts)

    everything = [(i, prompt, []) for i, prompt in prompts.items()]
    for seed in range(3):
        for i, found in run(engine, config, Cuts(kinds, seed), everything).items():
            assert_same(found, expected[i])
    preempted = Cuts(kinds, 3, preempt_at={i: 5 + 9 * n for n, i in enumerate(prompts)})
    for i, found in run(engine, config, preempted, everything).items():
        assert_same(found, expected[i])
    continued = [(i, prompt, expected[i][0][: 7 + 15 * n]) for n, (i, prompt) in enumerate(prompts.items())]
    for i, found in run(engine, config, Orders(kinds), continued).items():
        assert_same(found, expected[i])
