"""`experiments.engine_replay`: a real run of a small model."""

import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.model_config import ModelConfig
from apt_jax.request import Slo
from apt_jax.simulation.requests.classes import Terms
from apt_jax.simulation.workload import Arrival
from experiments import engine_replay
from tests.support.checkpoint_folders import random_model

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip
OPTIONS = EngineConfig(dtype="float32", num_blocks=24, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
PATIENT = Terms(Slo(60.0, 60.0), name="patient")


@pytest.fixture(scope="module")
def engines():
    model = random_model(CONFIG, seed=3)
    return {("fcfs", "kv"): engine_replay.prepare(model, CONFIG, OPTIONS, ("fcfs", "kv"))}


def test_requests_end_at_the_trace_s_length_and_every_iteration_is_timed(engines):
    prepared = engines["fcfs", "kv"]
    arrivals = [Arrival(0.01 * i, 8, 3 + i, PATIENT) for i in range(6)]
    requests = engine_replay.replay(prepared, arrivals)
    assert [len(r.output_token_ids) for r in requests] == [3, 4, 5, 6, 7, 8]
    assert len(prepared.served) == len(prepared.ends_s) >= 8 and prepared.ends_s == sorted(prepared.ends_s)
    assert all(observation.candidates for observation in prepared.served)
    busy_s = sum(observation.seconds for observation in prepared.served)
    assert 0 < busy_s <= prepared.ends_s[-1] + 1e-6, "iterations do not overlap"
