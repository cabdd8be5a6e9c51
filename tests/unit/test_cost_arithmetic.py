"""Every term of the cost model in seconds worked out by hand, for a toy model on a toy device."""

from dataclasses import replace

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.model_config import GROUP_BYTES, ModelConfig
from apt_jax.scheduling.costs.cost_model import CostModel, Scales, cache_blocks
from apt_jax.scheduling.costs.fit import Calibration, Observation, fit, pace, relative_errors
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS, Hardware
from apt_jax.scheduling.costs.host_times import HostTime
from apt_jax.scheduling.costs.step_load import Chunk, PaddedSizes, StepLoad, step_load
from apt_jax.scheduling.plan import Converted, Plan, Reason, Scheduled
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import run, wait

KV, HIDDEN = CacheKind.KV.index, CacheKind.HIDDEN.index

# A layer has 4 x 8 x 8 + 2 x 8 x 32 weights, 9 x 8 + 32 biases and norms: 872. Two layers, 100 x 8 embeddings: 2,544.
TOY = ModelConfig(
    vocab_size=100, hidden_size=8, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=8,
    max_position_embeddings=50,
)  # fmt: skip
# 500 operations and 2,000 bytes a second
SLOW = Hardware("toy", 1e6, 1000, 8000, 1000, "made up", 0.5, 0.25, overhead_s=0.5, link_latency_s=0.01)
FAST_MATHS = replace(SLOW, flops_per_s=1e6)
ONE = CostModel(TOY, SLOW)
TWO = CostModel(TOY, SLOW, devices=2)
READ_S, TOKEN_S, LOGITS_S = 2544 * 2 / 2000, 2 * 2 * 872 / 500, 2 * 800 / 500
PROJECTED_S, PAIR_S = 2 * 4 * 64 / 500, 2 * 4 * 8 / 500


@pytest.mark.parametrize(
    ("load", "seconds"),
    [
        ({"prefill_tokens": 3, "prefill_pairs": 6}, 0.5 + 3 * TOKEN_S + 6 * PAIR_S),
        ({"prefill_tokens": 2, "decode_requests": 2}, 0.5 + 4 * TOKEN_S),
        ({"prefill_tokens": 3, "samples": 1}, 0.5 + 3 * TOKEN_S + LOGITS_S),
        (
            {"decode_requests": 2, "samples": 2, "context_tokens": (10, 0)},
            0.5 + 2 * TOKEN_S + 2 * LOGITS_S + 10 * 0.128,
        ),
        ({"decode_requests": 1, "context_tokens": (0, 10)}, 0.5 + TOKEN_S + 10 * 0.256),
        ({"prefill_tokens": 1, "projected_tokens": 5}, 0.5 + TOKEN_S + 5 * PROJECTED_S),
        ({"projected_tokens": 1}, 0.5 + READ_S),  # 1.0 of products while the weights are read for 2.5
        ({"projected_tokens": 3}, 0.5 + 3 * PROJECTED_S),
        ({}, 0.0),
        ({"samples": 1}, 0.0),  # nothing is computed that could be sampled from
    ],
)
def test_seconds_of_an_iteration(load, seconds):
    assert ONE.step_s(StepLoad(**load)) == pytest.approx(seconds)


def test_the_toy_is_what_the_table_says():
    assert ONE.num_weights == 2544
    found = (ONE.weights_s, ONE.token_s, ONE.logits_s, ONE.projection_s, ONE.pair_s, ONE.overhead_s)
    assert found == pytest.approx((2.544, 6.976, 3.2, 1.024, 0.128, 0.5))


@pytest.mark.parametrize(
    ("model", "kv_s", "hidden_s"),
    [
        # KV: 2 layers x 16 numbers x 2 bytes = 64 bytes, or 2 x 4 x 8 = 64 operations; hidden half the bytes
        (ONE, 64 / 500, 2 * 64 / 500),  # 2 heads: twice KV's operations
        (replace(ONE, hidden_mode="recompute"), 64 / 500, 2 * (4 * 64 + 4 * 8) / 500),
        (CostModel(TOY, FAST_MATHS), 64 / 2000, 32 / 2000),
        (CostModel(TOY, FAST_MATHS, "recompute"), 64 / 2000, 32 / 2000),
        (ONE.with_scales(Scales(attention=(3.0, 5.0))), 3 * 64 / 500, 5 * 128 / 500),
    ],
)
def test_seconds_of_a_cached_token_and_rho(model, kv_s, hidden_s):
    assert model.attention_s == pytest.approx((kv_s, hidden_s))
    assert model.rho_s == pytest.approx(hidden_s - kv_s)


def test_two_devices_share_the_work_and_exchange():
    """A link moves 1,000 bytes a second; once around two devices is half of the bytes, 2 layers."""
    assert (TWO.weights_s, TWO.token_s) == pytest.approx((READ_S / 2, TOKEN_S / 2))
    assert TWO.overhead_s == pytest.approx(0.5 + 2 * 2 * 0.01)
    assert TWO.exchange_token_s == pytest.approx(2 * 2 * (2 * 8) * 2 / 2 / 1000)  # two all-reduces of 8, each twice
    assert TWO.slices_s == pytest.approx(3 * 2 * 0.01)
    scores = 2 * 2 * (2 * 2) * 2 / 2 / 1000  # two heads of float32
    group = 2 * 8 * 2 / 2 / GROUP_BYTES * 0.01
    assert TWO.attention_s[HIDDEN] == pytest.approx(128 / 1000 + scores + group, rel=1e-12)
    assert replace(TWO, hidden_mode="recompute").attention_s[HIDDEN] == pytest.approx(
        2 * (4 * 64 + 32) / 1000 + 2 * 8 * 2 / 2 / 1000
    )
    assert replace(TWO, hidden_mode="recompute").slices_s == ONE.slices_s == 0.0
    load = StepLoad(decode_requests=3, context_tokens=(0, 10))
    assert TWO.exchange_s(load) == pytest.approx(3 * TWO.exchange_token_s + TWO.slices_s)
    assert TWO.exchange_s(replace(load, context_tokens=(0, 0))) == pytest.approx(3 * TWO.exchange_token_s)
    dear = TWO.with_scales(Scales(exchange=4.0))
    assert dear.step_s(load) - TWO.step_s(load) == pytest.approx(3 * TWO.exchange_s(load))
    four = replace(TWO, devices=4)
    assert four.exchange_token_s == pytest.approx(TWO.exchange_token_s * (3 / 4) / (1 / 2))


@pytest.mark.parametrize("mode", ["absorbed", "one-pass", "recompute"])
@pytest.mark.parametrize("devices", [1, 2])
def test_iterations_that_decode_take_as_long_together_as_one_by_one(mode, devices):
    """Bit for bit: a simulation's times do not depend on how many iterations are computed at once."""
    model = CostModel(
        MODELS["opt-13b"], HARDWARE["a100-40gb"], mode, devices, Scales(dense=1.1, mixing=0.7, prefix=1.3)
    )
    loads = [
        StepLoad(decode_requests=9, context_tokens=(700 + 6 * k, 311 + 3 * k), samples=9, decodes=(6, 3))
        for k in range(40)
    ]
    assert model.decodes_s(loads[0], 40).tolist() == [model.step_s(load) for load in loads]
    assert len(set(model.decodes_s(loads[0], 40).tolist())) == 40


def test_scales_multiply_their_term():
    load = StepLoad(
        prefill_tokens=3, prefill_pairs=6, decode_requests=3, context_tokens=(7, 2), samples=1, decodes=(2, 1)
    )  # fmt: skip
    products = 6 * TOKEN_S + LOGITS_S
    scaled = ONE.with_scales(
        Scales(2.0, 1.5, 0.5, attention=(3.0, 1.0), pairs=4.0, per_request_s=(0.25, 4.0), mixing=3.0)
    )
    attention = 7 * 3 * 0.128 + 2 * 0.256 + 2 * 0.25 + 4.0
    mixing = 2 * 2 * 64 * 2 / 2000 + 2 * 0.096  # Wk and Wv of two layers once more, two KV requests' wide numbers
    assert scaled.step_s(load) == pytest.approx(
        2 * 0.5 + 1.5 * 0.5 * products + attention + 6 * 4 * PAIR_S + 3 * mixing
    )


@pytest.mark.parametrize(("knee", "seconds"), [(1.0, 7.0), (2.0, 5.0), (np.inf, 4.0)])
def test_reading_and_computing_overlap_by_the_knee(knee, seconds):
    assert CostModel.blend(3.0, 4.0, knee) == pytest.approx(seconds)
    assert CostModel.blend(np.array([3.0]), np.array([4.0]), knee).tolist() == pytest.approx([seconds])


def test_free_tokens_are_those_computed_while_weights_are_read():
    fast = CostModel(TOY, FAST_MATHS)  # 0.006976 s a token
    assert fast.free_tokens == 364  # 2.544 / 0.006976 = 364.7
    assert fast.with_scales(Scales(compute=2.0)).free_tokens == 182


@pytest.mark.parametrize(
    ("devices", "memory", "blocks"),
    [
        # weights: (2,544 + 50 x 8) x 2 = 5,888; activations: 10 x (64 + 64) x 2 + 3 x 100 x 8 = 4,960
        # a block: 2 layers x 8 numbers x 2 bytes x 4 tokens = 128
        (1, 5888 + 4960 + 128 * 2, 2),
        (1, 5888 + 4960 + 128 * 3 - 1, 2),
        (1, 5888 + 4960 + 128 * 7, 7),
        (2, (5888 + 2 * 4960 + 128 * 7) / 2, 7),
    ],
)
def test_blocks_that_fit_beside_weights_and_activations(devices, memory, blocks):
    model = CostModel(TOY, replace(SLOW, memory_bytes=memory / 0.5), devices=devices)
    options = {"block_size": 4, "max_num_batched_tokens": 10, "max_num_seqs": 3, "utilization": 0.5}
    assert cache_blocks(model, **options) == blocks
    less = replace(
        model, hardware=replace(model.hardware, memory_bytes=memory / 0.5 - 2 * 128 * (blocks - 1) / devices)
    )
    with pytest.raises(ValueError, match="leave no room"):
        cache_blocks(less, **options)


def spans_of(state, *entries, converted=()):
    plan = Plan(scheduled=tuple(entries), converted=converted)
    return plan, state.apply(plan, 0.0)


def test_a_mixed_step_is_counted_from_its_plan():
    """Two decode as KV at contexts 9 and 6, one as hidden at 5; a chunk of 3 follows 4 hidden tokens; a prompt of 4."""
    state = make_state(100, mode="hybrid")
    a, b = run(state, "a", 8), run(state, "b", 4, 2)
    c = run(state, "c", 4, kind=CacheKind.HIDDEN)
    chunked, new = run(state, "chunked", 9, computed=4, kind=CacheKind.HIDDEN), wait(state, "new", 4)
    plan, spans = spans_of(
        state,
        *(Scheduled(r, 1, r.cache_kind, Reason.DECODES) for r in (a, b, c)),
        Scheduled(chunked, 3, CacheKind.HIDDEN, Reason.CONTINUES_PREFILL),
        Scheduled(new, 4, CacheKind.KV, Reason.ADMITTED_KV),
    )
    assert step_load(plan, spans) == StepLoad(
        prefill_tokens=7, prefill_pairs=(5 + 6 + 7) + (1 + 2 + 3 + 4), decode_requests=3, context_tokens=(9 + 6, 5),
        samples=4, decodes=(2, 1), chunks=(Chunk(HIDDEN, 3, 4),),
    )  # fmt: skip


def test_a_chunk_and_a_conversion_are_counted_with_what_is_cached():
    state = make_state(100, mode="hybrid")
    chunked = run(state, "chunked", 9, computed=4)
    hidden = run(state, "hidden", 6, 2, kind=CacheKind.HIDDEN)
    plan, spans = spans_of(
        state,
        Scheduled(chunked, 5, CacheKind.KV, Reason.CONTINUES_PREFILL),
        Scheduled(hidden, 1, CacheKind.KV, Reason.DECODES),
        converted=(Converted(hidden, Reason.CONVERTED_MEMORY_FREE),),
    )
    # `hidden` has 7 of its 8 tokens cached; by the time it is counted the plan is applied: the eighth is too
    assert step_load(plan, spans) == StepLoad(5, 5 + 6 + 7 + 8 + 9, 1, (8, 0), 8, 2, (1, 0), (Chunk(KV, 5, 4),))


def test_a_prompt_of_one_token_is_a_prompt():
    state = make_state(100)
    new = wait(state, "new", 1)
    plan, spans = spans_of(state, Scheduled(new, 1, CacheKind.KV, Reason.ADMITTED_KV))
    assert step_load(plan, spans) == StepLoad(prefill_tokens=1, prefill_pairs=1, samples=1)


@pytest.mark.parametrize(
    ("load", "tokens", "samples"),
    [
        (StepLoad(decode_requests=8, samples=8), 8, 16), (StepLoad(decode_requests=9, samples=4), 16, 4),
        (StepLoad(prefill_tokens=64), 64, 0), (StepLoad(prefill_tokens=1, decode_requests=64, samples=5), 128, 16),
        (StepLoad(prefill_tokens=128), 128, 0), (StepLoad(prefill_tokens=129), 129, 0),
    ],
)  # fmt: skip
def test_padding_is_to_the_next_size_of_its_kind(load, tokens, samples):
    padded = PaddedSizes(decode=(1, 8, 16), prefill=(64, 128), samples=(4, 16)).pad(load)
    assert (padded.prefill_tokens + padded.decode_requests, padded.samples) == (tokens, samples)
    assert padded.decode_requests == load.decode_requests


@pytest.mark.parametrize("sizes", [{"decode": (8,)}, {"prefill": (8,)}, {"samples": (8,)}])
def test_one_table_of_sizes_is_enough_to_pad(sizes):
    load = StepLoad(prefill_tokens=3 if "prefill" in sizes else 0, decode_requests=3, samples=3)
    assert PaddedSizes(**sizes).pad(load) != load


def loads(count, seed=0):
    """Iterations in which every term of the toy counts."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        prompt = int(rng.choice([0, 1, 4, 60, 900]))
        decodes = [(1, 0), (30, 0), (0, 1), (0, 30), (7, 9), (20, 15)][int(rng.integers(6))]
        context_tokens = tuple(n * int(rng.integers(1, 60)) for n in decodes)
        chunks = (
            (Chunk(int(rng.integers(2)), prompt, int(rng.integers(1, 400))),) if prompt and rng.random() < 0.5 else ()
        )
        yield StepLoad(
            prompt, prompt * (prompt + 1) // 2 + sum(c.tokens * c.cached_tokens for c in chunks), sum(decodes),
            context_tokens, samples=sum(decodes), decodes=decodes, chunks=chunks,
        )  # fmt: skip


TRUTHS = [
    Scales(),
    Scales(overhead=30.0), Scales(dense=3.0), Scales(attention=(4.0, 1.0)), Scales(attention=(1.0, 5.0)),
    Scales(pairs=6.0), Scales(per_request_s=(2.0, 0.5)), Scales(per_request_s=(0.0, 3.0)), Scales(exchange=7.0),
    Scales(mixing=5.0), Scales(mixing=0.0), Scales(prefix=6.0), Scales(knee=1.0),
    Scales(knee=2.0, dense=2.0, attention=(0.5, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
@pytest.mark.parametrize("devices", [1, 2])
def test_fit_finds_each_scale_that_made_the_times(truth, devices):
    base = CostModel(TOY, replace(SLOW, flops_per_s=100_000), devices=devices)
    true_model = base.with_scales(truth)
    observed = [Observation(load, true_model.step_s(load)) for load in loads(150)]
    fitted = fit(base.with_scales(Scales(9.0, 9.0, 9.0)), observed)
    assert relative_errors(fitted, observed).max() < 0.02
    for name in ("attention", "pairs", "mixing", "prefix"):
        assert getattr(fitted.scales, name) == pytest.approx(getattr(truth, name), rel=0.03, abs=0.01), name
    slower = [model.request_s[HIDDEN] - model.request_s[KV] for model in (fitted, true_model)]
    assert slower[0] == pytest.approx(slower[1], rel=0.03, abs=0.05)


def test_what_was_not_seen_keeps_its_scale():
    base = CostModel(TOY, SLOW)
    observed = [
        Observation(StepLoad(prefill_tokens=n), 2 * base.step_s(StepLoad(prefill_tokens=n))) for n in range(1, 20)
    ]
    scales = fit(base, observed).scales
    assert (*scales.attention, scales.pairs, scales.exchange, scales.mixing, scales.prefix) == (1.0,) * 6
    assert scales.per_request_s == base.request_s


def test_an_outlier_does_not_bend_the_fit():
    base = CostModel(TOY, SLOW)
    observed = [Observation(load, base.step_s(load)) for load in loads(60)]
    spoiled = [replace(o, seconds=20 * o.seconds) if i % 20 == 3 else o for i, o in enumerate(observed)]
    assert np.median(relative_errors(fit(base, spoiled), observed)) < 0.02


def test_eight_observations_are_enough_and_errors_are_shares_of_what_was_measured():
    observed = [Observation(load, ONE.step_s(load)) for load in loads(8)]
    assert relative_errors(fit(ONE, observed), observed).max() < 0.02
    assert relative_errors(ONE, [Observation(o.load, 4 * o.seconds) for o in observed[:1]]) == pytest.approx([0.75])
    assert relative_errors(ONE, [Observation(o.load, o.seconds / 4) for o in observed[:1]]) == pytest.approx([3.0])


def test_one_iteration_that_took_no_time_is_refused():
    observed = [Observation(load, ONE.step_s(load)) for load in loads(9)]
    with pytest.raises(ValueError, match=r"an observation took 0\.0 s"):
        fit(ONE, [*observed, replace(observed[0], seconds=0.0)])


def test_a_calibration_is_fitted_again_after_so_many_steps():
    requests = tuple(2 * s for s in ONE.request_s)
    twice = ONE.with_scales(
        Scales(2.0, 2.0, attention=(2.0, 2.0), pairs=2.0, per_request_s=requests, mixing=2.0, prefix=2.0)
    )
    steps = [(load, twice.step_s(load)) for load in loads(30)]
    calibration = Calibration(ONE, refit_every=10)
    assert (calibration.median_error(), calibration.num_observations, calibration.is_fitted) == (0.0, 0, False)
    assert [calibration.observe(*step) for step in steps[:9]] == [False] * 9
    assert calibration.median_error() == pytest.approx(0.5) and not calibration.is_fitted
    assert not calibration.observe(steps[9][0], 0.0), "an iteration that took no time tells nothing"
    assert calibration.observe(*steps[9]) and calibration.is_fitted
    assert calibration.median_error() < 0.02 and calibration.num_observations == 10
    assert [calibration.observe(*step) for step in steps[10:30]] == ([False] * 9 + [True]) * 2


def test_the_host_s_time_is_what_serving_takes_longer_than_a_batch_alone():
    host = HostTime(0.5, 0.01)
    alone = [Observation(load, ONE.step_s(load)) for load in loads(40)]
    served = [
        Observation(load, ONE.step_s(load) + host.seconds(1 + i % 30), 1 + i % 30) for i, load in enumerate(loads(60))
    ]
    fitted = fit(ONE, [*alone, *served])
    assert fitted.scales.host.iteration_s == pytest.approx(0.5, rel=0.02)
    assert fitted.scales.host.candidate_s == pytest.approx(0.01, rel=0.02)
    assert relative_errors(fitted, [*alone, *served]).max() < 0.02
    assert fit(ONE, alone).host_s(100) == ONE.host_s(100) == 0.0, "a batch alone tells nothing about it"


def test_a_calibration_is_at_the_pace_of_what_served():
    """One iteration in four takes three times as long, as on a machine that others share: usually it takes 1, on
    average 1.5, and a queue grows by the average."""
    steps = [(load, ONE.step_s(load) * (3.0 if i % 4 == 0 else 1.0)) for i, load in enumerate(loads(400))]
    usual = fit(ONE, [Observation(*step) for step in steps])
    calibration = Calibration(ONE, refit_every=400)
    assert [calibration.observe(*step) for step in steps][-1]
    total = sum(seconds for _, seconds in steps)
    assert sum(usual.step_s(load) for load, _ in steps) < 0.8 * total
    assert sum(calibration.model.step_s(load) for load, _ in steps) == pytest.approx(total, rel=0.01)


def test_one_freeze_does_not_set_the_pace():
    served = [Observation(load, ONE.step_s(load)) for load in loads(100)]
    frozen = [*served[1:], replace(served[0], seconds=1e6)]
    assert pace(ONE, served) == pytest.approx(1.0) and 1.0 < pace(ONE, frozen) < 1.2


def test_scales_at_a_pace_multiply_every_time():
    truth = Scales(2.0, 1.5, 1.7, 4.0, (3.0, 0.1), 1.3, (2e-5, 3e-4), mixing=0.5, prefix=0.7, host=HostTime(1.0, 2.0))
    model, twice = ONE.with_scales(truth), ONE.with_scales(truth.at_pace(2.0))
    for load in loads(30):
        assert twice.step_s(load) == pytest.approx(2 * model.step_s(load))
    assert twice.host_s(3) == 2 * model.host_s(3) == 14.0
    preset = ONE.with_scales(Scales().at_pace(2.0))
    assert preset.scales.per_request_s is None or preset.scales.per_request_s == tuple(2 * s for s in ONE.request_s)


def test_start_up_s_iterations_fit_at_once_if_they_are_enough():
    observed = [Observation(load, 2 * ONE.step_s(load)) for load in loads(8)]
    assert Calibration(ONE, observed).is_fitted and Calibration(ONE, observed).median_error() < 0.02
    few = Calibration(ONE, observed[:7])
    assert not few.is_fitted and few.model is ONE and few.num_observations == 7


def test_only_start_up_s_iterations_and_the_newest_512_are_kept(tmp_path):
    observed = [Observation(load, ONE.step_s(load)) for load in loads(8)]
    calibration = Calibration(ONE, observed, refit_every=10_000)
    for load in loads(600):
        calibration.observe(load, 1.0)
    assert calibration.num_observations == 8 + 512
    calibration.save(tmp_path / "cost.json")
    again = Calibration.load(tmp_path / "cost.json", ONE)
    assert again is not None and again.num_observations == 8 and again.median_error() < 0.02
    text = (tmp_path / "cost.json").read_text()
    (tmp_path / "cost.json").write_text(text.replace('"version": 4', '"version": 3'))
    assert Calibration.load(tmp_path / "cost.json", ONE) is None


def test_models_are_those_of_their_paper_and_memories_those_of_their_datasheets():
    shapes = {name: (c.num_hidden_layers, c.hidden_size, c.num_attention_heads) for name, c in MODELS.items()}
    assert shapes == {
        "opt-125m": (12, 768, 12), "opt-350m": (24, 1024, 16), "opt-1.3b": (24, 2048, 32), "opt-2.7b": (32, 2560, 32),
        "opt-6.7b": (32, 4096, 32), "opt-13b": (40, 5120, 40), "opt-30b": (48, 7168, 56), "opt-66b": (64, 9216, 72),
    }  # fmt: skip
    assert all((c.ffn_dim, c.word_embed_proj_dim) == (4 * c.hidden_size, c.hidden_size) for c in MODELS.values())
    assert {name: round(device.memory_bytes / 2**30) for name, device in HARDWARE.items()} == {
        "a100-40gb": 40, "a100-80gb": 80, "h100-80gb": 80, "h200": 131, "tpu-v5e": 16, "tpu-v5p": 95, "tpu-v6e": 32,
        "tpu7x": 192,
    }  # fmt: skip
