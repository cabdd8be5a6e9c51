"""Calibration on a real engine: what it measures, where it is kept, and that it leaves the engine as it was."""

import numpy as np
import pytest

from apt_jax.cache import BlockPool, CacheKind
from apt_jax.engine.calibration import _iterations, calibrate, measure
from apt_jax.engine.trials import Trials
from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.fit import MIN_OBSERVATIONS, Observation, fit, relative_errors
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.state import Limits, SchedulerState
from tests.support.checkpoint_folders import random_model
from tests.support.engines import make_engine, run

KV, HIDDEN = CacheKind.KV.index, CacheKind.HIDDEN.index

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Calibrations kept in a folder of this test."""
    path = tmp_path / "cost.json"
    monkeypatch.setattr("apt_jax.engine.setup.calibration_path", lambda runner, model: path)
    return path


def calibrated(engine):
    return calibrate(engine.trials, engine.setup.cost_model, engine.setup.calibration_file)


def test_decodes_and_prompts_of_every_kind_are_measured(model):
    engine = make_engine(model, CONFIG)
    loads = [o.load for o in measure(engine.trials, max_seconds=60)]
    assert len(loads) >= 12
    for seen in (
        lambda x: x.context_tokens[KV] and not x.prefill_tokens,
        lambda x: x.context_tokens[HIDDEN] and not x.prefill_tokens,
        lambda x: x.prefill_tokens >= 16, lambda x: x.chunks, lambda x: x.decode_requests >= 8,
    ):  # fmt: skip
        assert any(map(seen, loads)), loads
    engine.state.check()
    assert engine.state.pool.num_free == engine.state.pool.num_blocks


@pytest.mark.parametrize("mode", ["hybrid", "hidden"])
def test_what_is_measured_tells_every_term_apart(mode):
    """Times made by a device whose hidden requests are slow to begin with and then faster than KV."""
    state = SchedulerState(BlockPool(40_000, 16), Limits(256, 2048, mode))
    trials, loads = Trials(state, None, None, 2048), []  # neither builds nor runs
    for shapes in _iterations(trials):
        with trials.prepared(shapes) as trial:
            loads.append(trial.load)
    base = CostModel(MODELS["opt-13b"], HARDWARE["h200"])
    truth = base.with_scales(
        Scales(1.5, 1.2, 1.3, 4.0, attention=(1.1, 0.6), pairs=2.0, per_request_s=(4e-6, 9e-5), mixing=1.7, prefix=2.5)
    )
    fitted = fit(base, [Observation(load, truth.step_s(load)) for load in loads])
    hidden = [(model.request_s[HIDDEN], model.attention_s[HIDDEN]) for model in (fitted, truth)]
    assert hidden[0] == pytest.approx(hidden[1], rel=0.1)
    if mode == "hybrid":
        assert truth.hidden_delay_s(100) > 0 > truth.hidden_delay_s(2000)
        for tokens in (30, 300, 2000):
            assert fitted.hidden_delay_s(tokens) == pytest.approx(truth.hidden_delay_s(tokens), abs=3e-6), tokens
        assert fitted.scales.mixing == pytest.approx(1.7, rel=0.1)
    assert fitted.scales.prefix == pytest.approx(2.5, rel=0.1)


def test_an_engine_gives_the_same_tokens_with_and_without(model, folder):
    prompts = [[5, 6, 7], list(range(3, 30))]
    plain, measured = make_engine(model, CONFIG), make_engine(model, CONFIG)
    calibrated(measured)
    expected = [r.output_token_ids for r in run(plain, prompts)]
    assert [r.output_token_ids for r in run(measured, prompts)] == expected


def test_the_second_start_reads_what_the_first_measured(model, folder, monkeypatch):
    first = calibrated(make_engine(model, CONFIG))
    monkeypatch.setattr("apt_jax.engine.calibration.measure", lambda trials, max_seconds: pytest.fail("measured again"))
    assert calibrated(make_engine(model, CONFIG)).model == first.model
    assert first.num_observations >= MIN_OBSERVATIONS


def test_another_model_has_another_file(model, tmp_path):
    wide = ModelConfig(
        vocab_size=96, hidden_size=48, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
        num_attention_heads=2, word_embed_proj_dim=48, eos_token_ids=(2,),
    )  # fmt: skip
    paths = {
        make_engine(model, CONFIG).setup.calibration_file,
        make_engine(random_model(wide, seed=3), wide).setup.calibration_file,
    }
    assert len(paths) == 2 and None not in paths


def test_a_busy_engine_is_refused(model, folder):
    engine = make_engine(model, CONFIG)
    engine.add([4, 5], params=run.__defaults__[0], request_id="busy")
    with pytest.raises(RuntimeError, match="unfinished"):
        calibrated(engine)


def test_policies_that_predict_get_the_measured_model_and_others_measure_nothing(model, folder):
    engine = make_engine(model, CONFIG, scheduling_policy="fcfs")
    engine.warm_up()
    run(engine, [[5, 6, 7]] * 3)
    assert not folder.exists() and engine.policy_context.cost_model is None
    assert not engine.times.calibration.num_observations
    engine = make_engine(model, CONFIG, scheduling_policy="apt", attention_backend="xla")  # steps that are padded
    engine.warm_up()
    assert folder.exists() and engine.policy_context.cost_model == engine.times.calibration.model
    assert engine.policy_context.cost_model.sizes.decode == tuple(b.tokens for b in engine.runner.buckets.decode)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_real_iterations_refine_the_model(model, async_scheduling):
    """The engine's own timings are learned; here the clock is made to say that an iteration takes a second."""
    ticks = iter(range(10**6))
    engine = make_engine(model, CONFIG, async_scheduling=async_scheduling)
    engine._clock = lambda: float(next(ticks))
    engine.times.learns = True
    run(engine, [[5, 6, 7]] * 3)
    recent = list(engine.times.calibration._recent)
    assert len(recent) > 50
    seconds = np.array([o.seconds for o in recent])
    assert (seconds > 0).all() and np.median(seconds) in (1.0, 2.0, 3.0)  # it reads the clock up to three times
    engine.times.calibration._since_fit = 10**6
    assert engine.times.calibration.observe(recent[0].load, recent[0].seconds)
    assert np.median(relative_errors(engine.times.calibration.model, recent)) < 0.15
