"""Engines with an int8 cache: same tokens whatever happens to a request; calibration, memory, figures."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.attention.pool import scale_row
from apt_jax.cache import CacheKind
from apt_jax.execution.cache import ranges as cache_ranges
from apt_jax.execution.cache.ranges import cache_channels, calibration_tokens, packed
from apt_jax.execution.pool import abstract_pool, block_bytes
from apt_jax.execution.programs import ConversionKey, StepKey
from apt_jax.execution.weights.layout import StackedLayout
from apt_jax.model_config import ModelConfig
from apt_jax.pallas_kernels import dispatch
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.scheduling.policies.catalogue import make_policy
from tests.support.checkpoint_folders import random_model
from tests.support.conversations import alone, converse
from tests.support.engines import Orders, finish, make_engine

pytestmark = pytest.mark.timeout(900)  # many shapes to compile

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN
CONFIG = ModelConfig(
    vocab_size=101, hidden_size=64, num_hidden_layers=2, ffn_dim=128, max_position_embeddings=96,
    num_attention_heads=4, word_embed_proj_dim=64, eos_token_ids=(),
)  # fmt: skip
PROMPTS = ([5, 6, 7], [9] * 20, [11, 12] * 13, list(range(3, 43)))
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True)
TREATMENTS = {"kv": KV, "hidden": HIDDEN, "converted": HIDDEN, "preempted-kv": KV, "preempted-hidden": HIDDEN}


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Several chunks per context, so that prefixes are merged; few shapes to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apt_jax.attention.xla.CHUNK_TOKENS", 16)
        patch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
        yield


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=0)


def int8_engine(model, **options):
    options = {
        "max_num_seqs": 24,
        "max_num_batched_tokens": 24,
        "num_blocks": 400,
        "cache_dtype": "int8",
        "enable_prefix_caching": True,
        **options,
    }
    return make_engine(model, CONFIG, **options)


@pytest.fixture(scope="module")
def engine(model):
    """One for the tests that need nothing special; it must be idle between them."""
    return int8_engine(model)


@pytest.fixture(scope="module")
def small_engine(model):
    """Chunks of 8 tokens, over which prefixes are absorbed, and XLA for everything."""
    return int8_engine(
        model, max_num_batched_tokens=8, max_num_seqs=8, attention_backend="xla", enable_prefix_caching=False
    )


@pytest.fixture(scope="module")
def stacked_engine(model):
    """One program of stacked weights, as on an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "apt_jax.execution.weights.choice.LayerLayout.of",
            lambda model, device, kernels, int8: StackedLayout(device, kernels=kernels, int8=int8),
        )
        found = int8_engine(model, attention_backend="xla", enable_prefix_caching=False)
    assert found.runner.weights.layers is None
    return found


def tokens(engine, params, treatments=tuple(TREATMENTS), prompts=(0, 1, 2, 3), mixed=False):
    """Of every prompt in every treatment, all in one batch."""
    ids = {f"{prompt}-{how}": (prompt, how) for how in treatments for prompt in prompts}
    engine.policy = Orders(
        kinds={i: TREATMENTS[how] for i, (_, how) in ids.items()},
        convert_at={i: 5 + prompt for i, (prompt, how) in ids.items() if how == "converted"},
        preempt_at={i: 9 + prompt for i, (prompt, how) in ids.items() if how.startswith("preempted")},
        mixed=mixed,
    )
    engine.reset_prefix_cache()
    requests = {i: engine.add(PROMPTS[p], params, request_id=i, cache_salt=i) for i, (p, _) in ids.items()}
    finish(engine)
    for i, (_, how) in ids.items():
        assert requests[i].num_conversions == (how == "converted")
        assert requests[i].num_preemptions == how.startswith("preempted")
    return {i: request.output_token_ids for i, request in requests.items()}


@pytest.mark.parametrize("params", [SEEDED], ids=["seeded"])  # greedy tokens of this model hardly vary
def test_tokens_of_one_kind_depend_on_nothing_but_the_request(engine, small_engine, stacked_engine, params):
    """Chunks, absorbed and projected prefixes, batch mates, mixed steps, preemption, conversion, forms of a step."""
    found = tokens(engine, params)
    for prompt in range(len(PROMPTS)):
        assert found[f"{prompt}-preempted-kv"] == found[f"{prompt}-kv"]
        assert found[f"{prompt}-preempted-hidden"] == found[f"{prompt}-hidden"]
        same = 5 + prompt  # conversion changes the kind, and with it the rounding
        assert found[f"{prompt}-converted"][:same] == found[f"{prompt}-hidden"][:same]
    assert tokens(engine, params, mixed=True) == found
    assert tokens(stacked_engine, params) == found
    for how in ("hidden", "kv", "converted"):
        for prompt in range(len(PROMPTS)):
            alone = tokens(small_engine, params, (how,), (prompt,))
            assert alone == {f"{prompt}-{how}": found[f"{prompt}-{how}"]}


@pytest.mark.parametrize("kind", ["kv", "hidden"])
def test_a_request_that_is_continued_elsewhere_goes_on_as_it_would_have(engine, kind):
    """As after a restart: the first tokens come with the request and are computed again as a prompt."""
    (whole,) = tokens(engine, SEEDED, (kind,), (3,)).values()
    engine.policy = Orders(kinds={"resumed": TREATMENTS[kind]})
    request = engine.add(PROMPTS[3], SEEDED, request_id="resumed", output_token_ids=whole[:11])
    finish(engine)
    assert request.output_token_ids == whole


@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_tokens_are_the_same_from_the_prefix_cache(engine, mode):
    limits, hits = engine.state.limits, engine.state.prefix_hits
    engine.state.limits, engine.policy = replace(limits, cache_mode=mode), make_policy("fcfs")
    talks = converse(engine, 6, seed=1)
    assert engine.state.prefix_hits > hits
    alone(engine, talks)
    engine.state.limits = limits


def test_kinds_differ_from_float_and_each_other_within_a_tolerance(model, engine):
    """Log-probabilities of a prompt, computed in chunks over the cache; random weights, so logits are large."""
    found = {}
    for dtype, each in (("auto", int8_engine(model, cache_dtype="auto", attention_backend="xla")), ("int8", engine)):
        for kind in (KV, HIDDEN):
            each.policy = Orders(kinds={"r": kind})
            each.add(PROMPTS[3], replace(GREEDY, prompt_logprobs=0, max_tokens=1), request_id="r")
            (entries,) = [o.prompt_logprobs for o in finish(each) if o.prompt_logprobs is not None]
            found[dtype, kind] = np.array([entry.logprob for entry in entries])
    exact = found["auto", KV]
    np.testing.assert_allclose(found["auto", HIDDEN], exact, atol=1e-3 * exact.std())
    for kind in (KV, HIDDEN):
        error = np.abs(found["int8", kind] - exact).mean() / exact.std()
        assert 1e-4 < error < 0.05, (kind, error)


def test_bytes_of_the_pool_are_a_quarter_of_float32_and_scales(engine):
    L, S, D, N = 2, 8, 64, 4
    wide, narrow = (abstract_pool(CONFIG, 400, S, np.float32, is_coded=coded) for coded in (False, True))
    assert block_bytes(wide, 400) == L * S * D * 4
    assert block_bytes(narrow, 400) == L * (S * D + scale_row(S, N) * 4) and scale_row(S, N) == 128
    assert scale_row(32, 12) == 384 and scale_row(16, 12) == 256, "a TPU's lanes"
    pool, memory = engine.runner._pool, engine.setup.memory
    assert memory.block_bytes == block_bytes(narrow, 400)
    assert pool.numbers.nbytes + pool.scales.nbytes == memory.pool_bytes


def test_steps_update_the_pool_in_place(engine, stacked_engine):
    for each in (engine, stacked_engine):
        tokens(each, GREEDY, ("kv", "converted"))
        pool_bytes, programs = each.setup.memory.pool_bytes, each.runner.programs
        taking = [
            program.memory_analysis() for key in programs if isinstance(key, StepKey | ConversionKey)
            for program in programs[key].programs
        ]  # fmt: skip
        taking = [memory for memory in taking if memory.argument_size_in_bytes > pool_bytes]
        assert taking and all(memory.alias_size_in_bytes >= pool_bytes for memory in taking)


def test_stale_scales_and_numbers_that_are_not_finite_stay_in_their_request(engine):
    expected = tokens(engine, GREEDY, ("kv", "hidden"))
    runner, pool = engine.runner, engine.runner._pool
    stale = {"scales": jnp.full_like(pool.scales, jnp.nan), "numbers": jnp.full_like(pool.numbers, 77)}
    runner._pool = replace(pool, **stale)
    assert tokens(engine, GREEDY, ("kv", "hidden")) == expected, "blocks that were free held NaN"
    requests = [engine.add(PROMPTS[1], GREEDY, request_id=f"0-{how}") for how in ("kv", "hidden")]
    engine.step()
    blocks = jnp.asarray(requests[0].table.blocks[0])
    runner._pool = replace(runner._pool, scales=runner._pool.scales.at[blocks].set(jnp.nan))
    ends = {output.request.request_id: output.finish_reason for output in finish(engine) if output.finish_reason}
    assert ends == {"0-kv": FinishReason.ERROR, "0-hidden": FinishReason.LENGTH}


@pytest.mark.parametrize("backend", ["xla", "auto"])
def test_numbers_outside_their_calibrated_range_are_counted(model, backend):
    """With ranges that nothing is in, every number of every hidden vector counts, and none of KV."""
    engine = int8_engine(model, attention_backend=backend)
    engine.warm_up()
    assert engine.figures().num_outside_range == 0, "what warm-up runs is not counted"
    tokens(engine, GREEDY, ("hidden",))
    within = engine.figures().num_outside_range
    written = (sum(map(len, PROMPTS)) + len(PROMPTS) * (GREEDY.max_tokens - 1)) * 64 * 2
    assert within < written / 10
    far = np.stack([np.full((2, 64), 1e4, np.float32), np.ones((2, 64), np.float32)])
    engine.runner.allocate(engine.runner.num_blocks, far)
    tokens(engine, GREEDY, ("hidden", "kv"))
    assert engine.figures().num_outside_range == within + written


@pytest.fixture
def cache_folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_ranges_are_measured_once_for_the_same_weights(engine, cache_folder, monkeypatch):
    runner = engine.runner
    first = cache_channels(runner, fingerprint="weights:one")
    (kept,) = (cache_folder / "cache-ranges").iterdir()
    measured = []
    measure = runner.measure_ranges
    monkeypatch.setattr(runner, "measure_ranges", lambda ids: measured.append(1) or measure(ids))
    assert (cache_channels(runner, fingerprint="weights:one") == first).all() and not measured
    cache_channels(runner, fingerprint="weights:other")
    assert len(measured) == 1
    whole = kept.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for times, damaged in enumerate((b"", whole[:-7], flipped, b"PK\x03\x04", packed(first, "weights:other")), 2):
        kept.write_bytes(damaged)
        assert (cache_channels(runner, fingerprint="weights:one") == first).all() and len(measured) == times
        assert kept.read_bytes() == whole, "a damaged file is replaced"


def test_ranges_are_those_of_the_attention_inputs_after_the_first_token(model, engine, stacked_engine):
    sequences = [list(range(3, 40)), [7, 8, 9, 7]]
    found = [np.stack(each.runner.measure_ranges(sequences)) for each in (engine, stacked_engine)]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)
    least, greatest = found[0]
    seen = {0: [], 1: []}

    def attend(projections, h, cache, layer):
        seen[int(layer)].append(np.asarray(h)[1:])
        q, (k, v) = projections.query(h), projections.keys_values(h)
        return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0)[0], cache

    with jax.default_matmul_precision("highest"), jax.disable_jit():
        for ids in sequences:
            model(jnp.asarray(ids), jnp.arange(len(ids)), attend, None)
    for layer, vectors in seen.items():
        np.testing.assert_allclose(least[layer], np.concatenate(vectors).min(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(greatest[layer], np.concatenate(vectors).max(0), rtol=1e-4, atol=1e-4)


def test_without_a_tokenizer_random_ids_are_read_and_the_log_says_so(engine, caplog):
    with caplog.at_level(logging.WARNING):
        cache_channels(engine.runner)
    assert "no tokenizer, so the ranges of hidden vectors are measured on random token ids" in caplog.text
    ids = calibration_tokens(None, 101, 96)
    assert {len(row) for row in ids} == {96} and ids == calibration_tokens(None, 101, 96)


class Words:
    """A tokenizer that has ids for few words, and `unknown` for each of the others, or once for a whole text."""

    def __init__(self, ids, unknown=(), whole=False):
        self.ids, self.unknown, self.whole = ids, unknown, whole

    def encode(self, text):
        return [own for word in ([text] if self.whole else text.split()) for own in self.ids.get(word, self.unknown)]


@pytest.mark.parametrize("tokenizer", [Words({}), Words({}, [7], whole=True), Words({"the": [101]}, [500])])
def test_a_tokenizer_that_makes_nothing_of_the_text_is_like_none(engine, caplog, tokenizer):
    """Hidden vectors were called not finite, or ids were read that the model does not have."""
    with caplog.at_level(logging.WARNING):
        found = cache_channels(engine.runner, tokenizer)
    assert "the tokenizer has no ids of this model for the text, so the ranges" in caplog.text
    np.testing.assert_array_equal(found, cache_channels(engine.runner))


def test_ids_that_the_model_does_not_have_and_single_tokens_are_left_out():
    rows = calibration_tokens(Words({"the": [101], "a": [100], "of": [5]}), 101, 4)
    assert {token for row in rows for token in row} == {100, 5}
    assert {len(row) for row in rows} <= {2, 3, 4}


def test_ranges_do_not_depend_on_the_longest_context_that_is_served(model, engine):
    """They were of shorter texts, or with a context of one token of none, which was an error."""
    short = int8_engine(model, max_model_len=1, max_num_seqs=1, max_num_batched_tokens=1, attention_backend="xla")
    np.testing.assert_allclose(short.runner._channels, engine.runner._channels, rtol=1e-5, atol=1e-6)


def test_the_text_has_several_kinds_and_its_licence_is_in_the_file():
    text = cache_ranges.TEXT.read_text(encoding="utf-8")
    assert "public domain" in text.partition("----")[0] and 3000 < len(text.encode()) < 10_000
    for part in ("def ", "SELECT", "3.14159", "Утром", "今日は", "صباح"):
        assert part in text

    class ByCharacter:
        def encode(self, text):
            return list(map(ord, text))

    rows = calibration_tokens(ByCharacter(), 0x110000, 100)
    assert max(map(len, rows)) == 100 and "public domain" not in "".join(chr(code) for row in rows for code in row)


def test_a_backend_without_int8_kernels_is_refused_when_it_is_named(model, monkeypatch):
    kernels = dispatch.REFERENCES._replace(reads_int8=False)
    monkeypatch.setattr(dispatch, "kernels_for", lambda _: kernels)
    with pytest.raises(ValueError, match=r"pallas.* has no kernels here for cache_dtype='int8'; use auto or xla"):
        int8_engine(model, attention_backend="pallas")


def test_what_attends_is_named(engine, small_engine):
    assert engine.runner.attention == "cpu"
    assert small_engine.runner.attention == "xla"


def test_pallas_kernels_give_the_tokens_of_xla(model, stacked_engine, monkeypatch):
    """The TPU's, interpreted: decode rows, chunks over KV, absorbed and projected prefixes, writes, conversion."""
    monkeypatch.setattr("apt_jax.attention.prefix.BALANCE_FLOPS_PER_BYTE", 0)
    monkeypatch.setattr("apt_jax.pallas_kernels.tpu.paging.MAX_CHUNK_TOKENS", 16)
    engine = int8_engine(model, attention_backend="pallas", block_size=32, num_blocks=100, enable_prefix_caching=False)
    assert engine.runner.attention == "tpu-interpreted"
    few = ("kv", "converted", "preempted-hidden"), (0, 3)
    assert tokens(engine, SEEDED, *few) == tokens(stacked_engine, SEEDED, *few)
