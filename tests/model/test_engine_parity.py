"""The engine against transformers: KV, hidden, mixed and converted requests give the same 64 greedy tokens."""

from dataclasses import replace

import pytest

from apt_jax.cache import CacheKind
from apt_jax.model_config import ModelConfig
from apt_jax.request import SamplingParams
from tests.golden import golden_names, load_golden
from tests.golden.compare import load_golden_model
from tests.support.checkpoint_folders import random_model
from tests.support.engines import GREEDY, Orders, finish, make_engine, run

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN
TREATMENTS = ("kv", "hidden", "converted", "preempted")


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks per context, so that the running softmax really runs; one prefill and one decode shape."""
    monkeypatch.setattr("apt_jax.attention.xla.CHUNK_TOKENS", 32)
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", golden_names())
def test_every_cache_kind_gives_the_greedy_tokens_of_transformers(name, tmp_path):
    """All four prompts in all four treatments, 16 requests in one batch; prompts are prefilled in chunks."""
    golden = load_golden(name)
    config = ModelConfig.from_hf(golden.config)
    # chunks of 16 absorb the cached prefix (16 <= head_dim), chunks of 48 re-project it, where head_dim is small
    budget = 16 if golden_names().index(name) % 2 else 48
    engine = make_engine(
        load_golden_model(golden, tmp_path), config, max_num_seqs=16, max_num_batched_tokens=budget, num_blocks=600
    )
    ids = {f"{prompt}-{how}": (prompt, how) for how in TREATMENTS for prompt in range(len(golden.prompts))}
    engine.policy = Orders(
        kinds={i: KV if how == "kv" else HIDDEN for i, (_, how) in ids.items()},
        convert_at={i: 9 + prompt for i, (prompt, how) in ids.items() if how == "converted"},
        preempt_at={i: 21 + prompt for i, (prompt, how) in ids.items() if how == "preempted"},
    )
    requests = {i: engine.add(golden.prompts[prompt], GREEDY, request_id=i) for i, (prompt, _) in ids.items()}
    finish(engine)
    for i, (prompt, how) in ids.items():
        assert requests[i].output_token_ids == golden.greedy_tokens[prompt], (name, i)
        assert requests[i].num_conversions == (how == "converted")
        assert requests[i].num_preemptions == (how == "preempted")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mode", ["kv", "hidden", "hybrid"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_fcfs_under_memory_pressure_gives_the_greedy_tokens_of_transformers(mode, asynchronous, tmp_path):
    """A pool for about two requests: fcfs preempts and, in hybrid mode, mixes kinds and converts.

    It converts nothing where preempted requests find their pages again, as they do with the prefix cache.
    """
    golden = load_golden("pre_norm")
    config = ModelConfig.from_hf(golden.config)
    blocks = {"kv": 36, "hidden": 25, "hybrid": 40}[mode]
    engine = make_engine(
        load_golden_model(golden, tmp_path),
        config,
        cache_mode=mode,
        max_num_seqs=4,
        num_blocks=blocks,
        async_scheduling=asynchronous,
        enable_prefix_caching=mode != "hybrid",
    )
    requests = run(engine, golden.prompts)
    assert [r.output_token_ids for r in requests] == golden.greedy_tokens
    assert sum(r.num_preemptions for r in requests) > 0
    kinds = {kind for r in requests for kind in r.cache_history}
    assert kinds == {"kv": {KV}, "hidden": {HIDDEN}, "hybrid": {KV, HIDDEN}}[mode]
    if mode == "hybrid":
        assert sum(r.num_conversions for r in requests) > 0


@pytest.mark.usefixtures("small_chunks")
def test_mixed_iterations_give_the_greedy_tokens_of_transformers(tmp_path):
    """Decoding requests and prefill chunks in one iteration."""
    golden = load_golden("post_norm_projected")
    engine = make_engine(load_golden_model(golden, tmp_path), ModelConfig.from_hf(golden.config), num_blocks=128)
    engine.policy = Orders(kinds={"1": HIDDEN, "3": HIDDEN}, mixed=True)
    seen = []
    requests = [engine.add(p, GREEDY, request_id=str(i)) for i, p in enumerate(golden.prompts)]
    finish(engine, lambda step: seen.append({entry.num_tokens > 1 for entry in engine.last_plan.scheduled}))
    assert [r.output_token_ids for r in requests] == golden.greedy_tokens
    assert {True, False} in seen, "no iteration was mixed"


def test_tokens_do_not_depend_on_the_batch():
    """Alone or beside seven others, sampled tokens are the same for the same seed."""
    config = ModelConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
        num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(),
    )  # fmt: skip
    engine = make_engine(random_model(config, seed=3), config)
    prompts = [[5, 6, 7 + i] for i in range(8)]
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40, max_tokens=30, seed=100 + i, presence_penalty=0.3)
        for i in range(8)
    ]
    together = [r.output_token_ids for r in run(engine, prompts, params)]
    alone = [run(engine, [p], s)[0].output_token_ids for p, s in zip(prompts, params, strict=True)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 8
    other = run(engine, [prompts[0]], replace(params[0], seed=1))[0].output_token_ids
    assert other != together[0]
