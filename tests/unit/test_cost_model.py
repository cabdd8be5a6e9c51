"""The cost model's physics against figures worked out by hand, and its fit against known truths."""

import dataclasses
import random

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.scheduling.costs.cost_model import CostModel, Scales, cache_blocks
from apt_jax.scheduling.costs.fit import Calibration, Observation, fit, relative_errors
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS, by_name
from apt_jax.scheduling.costs.step_load import PaddedSizes, StepLoad

KV, HIDDEN = CacheKind.KV.index, CacheKind.HIDDEN.index

A100 = HARDWARE["a100-40gb"]
OPT_13B = CostModel(MODELS["opt-13b"], A100)
ONE_PASS = dataclasses.replace(OPT_13B, hidden_mode="one-pass")


def random_loads(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        prompt = rng.choice([0, 0, 16, 64, 200, 900, 2000])
        batch = rng.choice([0, 1, 4, 16, 60, 200])
        if prompt + batch:
            hidden = rng.choice([0, batch, batch // 2])
            decodes = (batch - hidden, hidden)
            yield StepLoad(
                prefill_tokens=prompt, prefill_pairs=prompt * (prompt + 1) // 2, decode_requests=batch,
                context_tokens=tuple(n * rng.randint(10, 900) for n in decodes), samples=batch + (prompt > 0),
                decodes=decodes,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "billions"),
    [("opt-125m", 0.124), ("opt-1.3b", 1.31), ("opt-2.7b", 2.65), ("opt-6.7b", 6.65), ("opt-13b", 12.85),
     ("opt-30b", 29.96), ("opt-66b", 65.7)],
)  # fmt: skip
def test_weights_of_the_presets(name, billions):
    assert CostModel(MODELS[name], A100).num_weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_decode_step_of_13b_on_an_a100():
    # 25.7 GB of weights and 50 * 300 tokens of 819,200 bytes, at 0.8 * 1555 GB/s
    seconds = OPT_13B.step_s(StepLoad(decode_requests=50, context_tokens=(15000, 0), samples=50))
    assert seconds == pytest.approx(0.003 + 25.7e9 / 1.244e12 + 15000 * 819200 / 1.244e12, rel=0.01)


def test_prefill_is_compute_bound_beyond_the_knee():
    knee = OPT_13B.free_tokens
    assert 100 < knee < 250
    one = OPT_13B.step_s(StepLoad(prefill_tokens=1))
    assert OPT_13B.step_s(StepLoad(prefill_tokens=knee)) == pytest.approx(one, rel=0.01)
    assert OPT_13B.step_s(StepLoad(prefill_tokens=10 * knee)) > 5 * one


def test_rho_by_hidden_mode_and_device():
    recompute = dataclasses.replace(OPT_13B, hidden_mode="recompute")
    assert ONE_PASS.rho_s < 0, "half the bytes, still memory-bound: one pass would be faster on an A100"
    assert OPT_13B.rho_s > 10 * OPT_13B.attention_s[KV], "by XLA's loops it is not"
    assert recompute.rho_s == pytest.approx(40 * 4 * 5120**2 / (0.6 * 312e12), rel=0.05)
    # 72 heads need 144 FLOP per byte; 0.6 * 918 TFLOP/s over 0.8 * 1638 GB/s is 420
    assert CostModel(MODELS["opt-66b"], HARDWARE["tpu-v6e"], devices=8).rho_s < 0


def test_memory_of_13b_on_an_a100():
    blocks = cache_blocks(OPT_13B, block_size=16, max_num_batched_tokens=2048, max_num_seqs=256)
    tokens_as_kv = blocks // 2 * 16
    assert 13_500 < tokens_as_kv < 16_000  # the vLLM paper, section 6: 12 GB for KV, 15.7 thousand slots


def test_weights_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="--tensor-parallel-size"):
        cache_blocks(CostModel(MODELS["opt-30b"], A100), block_size=16, max_num_batched_tokens=2048, max_num_seqs=256)


def test_rho_counts_what_split_hidden_vectors_exchange():
    two = dataclasses.replace(OPT_13B, devices=2)
    h, layers, tokens = A100, 40, 1000
    scores = tokens * layers * 2 * 40 * 4 / 2 / h.link_bytes_per_s  # float32, 40 heads, sent twice, half of it
    groups = tokens * layers * 5120 / (48 * 2**20) * h.link_latency_s  # slices of 5,120 bytes, 48 MiB an all-reduce
    read = 4 * layers * 5120 * 2 / (2 * 0.8 * h.bytes_per_s)  # gathered: read, written and read twice, by two devices
    assert tokens * two.attention_s[HIDDEN] == pytest.approx(tokens * read + scores + groups)
    none = StepLoad(decode_requests=1, context_tokens=(1, 0), decodes=(1, 0))
    few = StepLoad(decode_requests=1, context_tokens=(0, 1), decodes=(0, 1))
    assert two.step_s(few) - two.step_s(none) == pytest.approx(3 * layers * h.link_latency_s + two.hidden_delay_s(1))


def test_two_devices_are_faster_but_not_twice():
    load = StepLoad(decode_requests=50, context_tokens=(15000, 0), samples=50)
    two = dataclasses.replace(OPT_13B, devices=2)
    assert OPT_13B.step_s(load) / 2 < two.step_s(load) < OPT_13B.step_s(load)


def test_an_empty_iteration_costs_nothing_and_conversion_something():
    assert OPT_13B.step_s(StepLoad()) == 0
    base = StepLoad(prefill_tokens=500)
    assert OPT_13B.step_s(dataclasses.replace(base, projected_tokens=1000)) > OPT_13B.step_s(base)


def test_unknown_hardware_names_those_known():
    with pytest.raises(ValueError, match="a100-40gb"):
        by_name(HARDWARE, "a100", "hardware")


def test_fit_recovers_the_truth_it_was_made_from():
    truth = OPT_13B.with_scales(Scales(2.0, 1.5, 1.7, 4.0, (3.0, 0.1), 1.3, (2e-5, 3e-4), mixing=0.5))
    observations = [Observation(load, truth.step_s(load)) for load in random_loads(200)]
    fitted = fit(OPT_13B, observations)
    held_out = [Observation(load, truth.step_s(load)) for load in random_loads(60, seed=1)]
    assert np.median(relative_errors(fitted, held_out)) < 0.02
    assert fitted.rho_s == pytest.approx(truth.rho_s, rel=0.1)
    assert truth.hidden_delay_s(100) > 0 > truth.hidden_delay_s(1000), "slower when short, faster when long"
    for tokens in (16, 100, 1000):
        assert fitted.hidden_delay_s(tokens) == pytest.approx(truth.hidden_delay_s(tokens), rel=0.1), tokens


def test_fit_under_noise_beats_the_preset():
    rng = random.Random(3)
    truth = OPT_13B.with_scales(Scales(dense=2.0, attention=(2.0, 4.0)))
    noisy = [Observation(load, truth.step_s(load) * rng.uniform(0.85, 1.15)) for load in random_loads(120)]
    held_out = [Observation(load, truth.step_s(load)) for load in random_loads(60, seed=9)]
    fitted = fit(OPT_13B, noisy)
    assert np.median(relative_errors(fitted, held_out)) < 0.05 < np.median(relative_errors(OPT_13B, held_out))


def test_calibration_refines_and_comes_back_from_its_file(tmp_path):
    truth = OPT_13B.with_scales(Scales(dense=1.8, attention=(2.5, 1.0)))
    calibration = Calibration(OPT_13B, refit_every=64)
    for load in random_loads(80):
        calibration.observe(load, truth.step_s(load))
    held_out = [Observation(load, truth.step_s(load)) for load in random_loads(40, seed=5)]
    assert np.median(relative_errors(calibration.model, held_out)) < 0.03
    measured = Calibration(OPT_13B, [Observation(load, truth.step_s(load)) for load in random_loads(80)])
    path = tmp_path / "deep" / "cost.json"
    measured.save(path)
    again = Calibration.load(path, OPT_13B)
    assert again is not None and again.num_observations == measured.num_observations
    assert np.median(relative_errors(again.model, held_out)) < 0.03


def test_a_damaged_file_is_ignored(tmp_path):
    (tmp_path / "cost.json").write_text("{broken")
    assert Calibration.load(tmp_path / "cost.json", OPT_13B) is None
    assert Calibration.load(tmp_path / "none.json", OPT_13B) is None


def test_too_few_or_timeless_observations_are_refused():
    with pytest.raises(ValueError, match="at least 8"):
        fit(OPT_13B, [Observation(StepLoad(1), 1.0)] * 7)
    with pytest.raises(ValueError, match="more than 0"):
        fit(OPT_13B, [Observation(StepLoad(1), 0.0)] * 8)


def test_padded_sizes_are_what_the_device_computes():
    sizes = PaddedSizes(decode=(1, 8, 16), prefill=(64, 128), samples=(4, 16))
    load = sizes.pad(StepLoad(decode_requests=9, context_tokens=(90, 0), samples=9))
    assert (load.prefill_tokens, load.decode_requests, load.samples) == (7, 9, 16)
    load = sizes.pad(StepLoad(prefill_tokens=60, decode_requests=9, samples=10))
    assert (load.prefill_tokens + load.decode_requests, load.samples) == (128, 16)
    assert sizes.pad(StepLoad(prefill_tokens=500, samples=99)) == StepLoad(prefill_tokens=500, samples=99)
    assert sizes.pad(StepLoad(projected_tokens=3)) == StepLoad(projected_tokens=3)
    padded = dataclasses.replace(OPT_13B, sizes=PaddedSizes(decode=(1, 200)))
    assert padded.step_s(StepLoad(decode_requests=2)) == padded.step_s(StepLoad(decode_requests=200))


def test_what_was_measured_at_start_up_outweighs_one_regime():
    """A long time of nothing but small decodes does not spoil the fit of prompts."""
    truth = OPT_13B.with_scales(Scales(dense=1.8, attention=(2.5, 1.0), pairs=3.0))
    measured = [Observation(load, truth.step_s(load)) for load in random_loads(40)]
    calibration = Calibration(OPT_13B, measured, refit_every=64)
    for _ in range(640):
        calibration.observe(StepLoad(decode_requests=8, context_tokens=(2000, 0), samples=8), 0.031)
    held_out = [Observation(load, truth.step_s(load)) for load in random_loads(40, seed=5) if load.prefill_tokens > 400]
    assert np.median(relative_errors(calibration.model, held_out)) < 0.1


def test_an_int8_cache_has_a_byte_a_number_and_scales():
    """OPT-13B's heads have 128 numbers: 132 bytes instead of 256, in the pool and for what KV decodes read."""
    int8 = dataclasses.replace(OPT_13B, cache_dtype="int8")
    sizes = {"block_size": 16, "max_num_batched_tokens": 2048, "max_num_seqs": 256}
    assert cache_blocks(int8, **sizes) / cache_blocks(OPT_13B, **sizes) == pytest.approx(256 / 132, rel=1e-3)
    assert int8.attention_s[KV] == pytest.approx(OPT_13B.attention_s[KV] * 132 / 256)
    assert int8.weights_s == OPT_13B.weights_s and int8.pair_s == OPT_13B.pair_s
    one_pass = dataclasses.replace(int8, hidden_mode="one-pass", hardware=HARDWARE["tpu-v5e"])
    wide = dataclasses.replace(one_pass, cache_dtype="auto")
    assert one_pass.attention_s[HIDDEN] == pytest.approx(wide.attention_s[HIDDEN] * 132 / 256)
    assert one_pass.prefix_s(CacheKind.KV, 64, 1000) == pytest.approx(wide.prefix_s(CacheKind.KV, 64, 1000) * 132 / 256)
