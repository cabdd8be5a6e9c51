"""`experiments.engine_replay`: real runs of a small model, and what is printed about them."""

import argparse

import numpy as np
import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.model_config import ModelConfig
from apt_jax.request import Slo
from apt_jax.simulation.requests.classes import Terms
from apt_jax.simulation.workload import Arrival, Lengths
from experiments import engine_replay
from tests.support.checkpoint_folders import random_model

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip
OPTIONS = EngineConfig(dtype="float32", num_blocks=24, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
LENGTHS = Lengths("small", np.arange(4, 24), np.arange(24, 4, -1))
PATIENT, IMPATIENT = Terms(Slo(60.0, 60.0), name="patient"), Terms(Slo(60.0, 1e-9, 1e-9), name="impatient")


@pytest.fixture(scope="module")
def engines():
    model = random_model(CONFIG, seed=3)
    return {setup: engine_replay.prepare(model, CONFIG, OPTIONS, setup) for setup in engine_replay.SETUPS}


def test_requests_end_at_the_trace_s_length_and_every_iteration_is_timed(engines):
    prepared = engines["fcfs", "kv"]
    arrivals = [Arrival(0.01 * i, 8, 3 + i, PATIENT) for i in range(6)]
    requests = engine_replay.replay(prepared, arrivals)
    assert [len(r.output_token_ids) for r in requests] == [3, 4, 5, 6, 7, 8]
    assert len(prepared.served) == len(prepared.ends_s) >= 8 and prepared.ends_s == sorted(prepared.ends_s)
    assert all(observation.candidates for observation in prepared.served)
    busy_s = sum(observation.seconds for observation in prepared.served)
    assert 0 < busy_s <= prepared.ends_s[-1] + 1e-6, "iterations do not overlap"


def test_classes_and_both_readings_beside_the_simulator_s(engines, capsys):
    """Whoever has more than one token misses in one class, and nobody in the other, for engine and simulator alike."""
    args = argparse.Namespace(duration_s=0.5, seed=0)
    found = engine_replay.run(engines, LENGTHS, [(PATIENT, 1.0), (IMPATIENT, 1.0)], [40.0], args)
    assert [(row["rate"], row["policy"]) for row in found] == [(40.0, "fcfs"), (40.0, "apt")]
    for row in found:
        for which in ("measured", *engine_replay.SIMULATIONS):
            impatient, patient = row[which]["attainment_by_class"]["slo"]
            assert (impatient["class"], impatient["strict_attainment"], patient["strict_attainment"]) == (
                "impatient", 0.0, 1.0,
            )  # fmt: skip
            assert 0 < row[which]["strict_attainment"] < 1 and engine_replay.worst_quartile(row[which]) < 1
        assert row["iterations"] > 20 and row["pace"] > 0
    shown = capsys.readouterr().out
    assert "impatient" in shown and "0.0% (  0.0%)" in shown and "100.0% (100.0%)" in shown
    summary = engine_replay.summarise(found)
    assert summary["median_difference_points"]["simulated"] == {"strict_attainment": 0.0, "attainment": 0.0}
    assert "measured and simulated attainment differ in the median" in capsys.readouterr().out
