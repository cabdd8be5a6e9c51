"""What prompts' later chunks pay for the tokens before them, against figures counted by hand and the kernels' notes."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from apt_jax.attention.prefix import absorbing_is_cheaper
from apt_jax.cache import CacheKind
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.decode_kernels import START_S
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.prefix_kernels import HOPPER, PROJECTED, TPU
from apt_jax.scheduling.costs.step_load import Chunk, StepLoad

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN
MODEL = MODELS["opt-13b"]
LAYERS, D, N = 40, 5120, 40


def opt_13b(device, mode="absorbed"):
    return CostModel(MODEL, HARDWARE[device], mode)


@pytest.mark.parametrize("kernel", [HOPPER, TPU], ids=lambda kernel: kernel.name)
def test_few_queries_absorb_a_prefix_where_attention_chooses_to(kernel):
    for model in (MODEL, MODELS["opt-2.7b"]):
        for tokens in (2, 5, 17, 18, 22, 23, 58, 59, 98, 99, 300):
            for cached in (1, 40, 128, 512, 1000, 2048):
                expected = absorbing_is_cheaper(
                    jnp.int32(tokens), jnp.int32(cached), heads=model.num_attention_heads, head_dim=model.head_dim,
                    reads=kernel.absorbed_reads,
                )  # fmt: skip
                assert kernel.absorbs(Chunk(HIDDEN.index, tokens, cached), model) == bool(expected), (tokens, cached)
    assert not PROJECTED.absorbs(Chunk(HIDDEN.index, 2, 2048), MODEL)


def test_a_chunk_over_a_kv_prefix_on_hopper_is_as_the_notes_predict():
    """512 tokens over 2,048: 80 us a layer (docs/log/2026-11-30-gpu-kernels.md) with pairs; 4 tiles read 42 MB each."""
    model = opt_13b("h200")
    read_s = 4 * 2048 * 4 * D / 3.84e12
    assert model.prefix_s(KV, 512, 2048) == pytest.approx(LAYERS * read_s)
    pairs_s = 512 * 2048 * model.pair_s
    assert (model.prefix_s(KV, 512, 2048) + pairs_s) / LAYERS == pytest.approx(80e-6, rel=0.1)


def test_a_hidden_prefix_is_projected_again_for_every_chunk():
    """DESIGN's 33 ms for 1,500 tokens of OPT-13B on an A100, and the bytes around it: 22 us a token."""
    model = opt_13b("a100-40gb", "recompute")
    projected_s = 1500 * 4 * LAYERS * D**2 / (0.6 * 312e12)
    assert projected_s == pytest.approx(33.6e-3, rel=0.01)
    moved_s = LAYERS * 1500 * 5 * 2 * D / 1.244e12  # read; keys and values written, and read
    assert model.prefix_s(HIDDEN, 300, 1500) == pytest.approx(projected_s + moved_s)
    v6e = opt_13b("tpu-v6e")
    assert v6e.prefix_s(HIDDEN, 512, 1500) > v6e.prefix_s(HIDDEN, 256, 1500) > v6e.prefix_s(KV, 256, 1500)
    assert v6e.prefix_s(HIDDEN, 8, 1500) < v6e.prefix_s(HIDDEN, 256, 1500) / 3, "few queries absorb"
    assert v6e.prefix_s(HIDDEN, 256, 0) == 0.0


def test_a_short_prefix_waits_for_the_weights_that_project_it():
    model = opt_13b("h200")
    weights_s, moved_s = 2 * 2 * D**2 / 3.84e12, 16 * (3 + 2) * 2 * D / 3.84e12
    assert model.prefix_s(HIDDEN, 100, 16) == pytest.approx(LAYERS * (weights_s + moved_s))


def test_absorbed_queries_by_hand():
    """8 queries over 2,048 vectors: on Hopper each reads them twice; on a TPU sums of 5.8 MB share a read."""
    h200 = opt_13b("h200")
    moved_s = (8 * 8 * N * D + 8 * 2 * 2048 * D * 2) / 3.84e12
    flops_s = (4 * 8 * D**2 + 4 * 8 * 2048 * (N - 1) * D) / (0.6 * 989.4e12)
    assert h200.prefix_s(HIDDEN, 8, 2048) == pytest.approx(LAYERS * max(moved_s, flops_s))
    v5e = opt_13b("tpu-v5e")
    reads = 8 * N * D * 4 / (11 * 2**19)
    moved_s = (8 * 8 * N * D + reads * 2048 * D * 2) / (0.8 * 819e9)
    flops_s = (4 * 8 * D**2 + 4 * 8 * 2048 * (N - 1) * D) / (0.6 * 197e12)
    assert v5e.prefix_s(HIDDEN, 8, 2048) == pytest.approx(LAYERS * max(moved_s, flops_s))


def test_xla_s_loops_take_every_prefix_over_all_tokens_of_the_iteration():
    """A step for 128 cached tokens moves scores of all tokens and heads five times, or starts 10 programs."""
    model = opt_13b("a100-40gb")

    def of(slots, *chunks):
        return model.prefixes_s(StepLoad(slots, slots, chunks=chunks))

    scores_s = 16 * 5 * 512 * N * 128 * 4 / 1.244e12
    read_s = 4 * 2048 * D * 2 / 1.244e12
    assert of(512, Chunk(0, 512, 2048)) == pytest.approx(LAYERS * (scores_s + read_s))
    assert LAYERS * scores_s > LAYERS * 500e-6, "the notes say 500 us a layer or more, on an H200"
    assert of(512, Chunk(0, 100, 2048)) == of(512, Chunk(0, 512, 2048))
    assert of(512, Chunk(0, 100, 2048), Chunk(0, 50, 2048)) == pytest.approx(2 * of(512, Chunk(0, 512, 2048)))
    assert of(2, Chunk(0, 2, 100)) == pytest.approx(LAYERS * 10 * START_S)
    projected_s = 2048 * 4 * D**2 / (0.6 * 312e12)
    assert of(512, Chunk(1, 512, 2048)) == pytest.approx(LAYERS * (scores_s + read_s + projected_s))
    absorbed_s = 16 * 5 * 100 * N * D * 4 / 1.244e12
    assert of(100, Chunk(1, 100, 2048)) == pytest.approx(LAYERS * absorbed_s)


def test_split_hidden_prefixes_go_through_xla_too():
    two = replace(opt_13b("h200"), devices=2)
    assert two.prefix_s(HIDDEN, 512, 2048) > 3 * two.prefix_s(KV, 512, 2048)


def test_an_iteration_is_longer_by_its_chunks_prefixes():
    model = opt_13b("tpu-v6e")
    load = StepLoad(256, 256 * 129 + 256 * 1000, samples=1)
    with_prefix = replace(load, chunks=(Chunk(HIDDEN.index, 256, 1000),))
    slow = model.with_scales(replace(model.scales, prefix=3.0))
    assert model.step_s(with_prefix) - model.step_s(load) == pytest.approx(model.prefix_s(HIDDEN, 256, 1000))
    assert slow.step_s(with_prefix) - slow.step_s(load) == pytest.approx(3 * model.prefix_s(HIDDEN, 256, 1000))
    assert slow.prefix_s(HIDDEN, 256, 1000) == pytest.approx(3 * model.prefix_s(HIDDEN, 256, 1000))
