"""Programs survive a restart: a second runner neither traces nor compiles, and damage only costs time."""

import jax
import pytest
from checkpoint_folders import random_model
from engines import GREEDY, count_compilations, make_engine, run

from apt_jax.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(),
)  # fmt: skip


@pytest.fixture
def cache_folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def test_second_start_loads_every_program_and_gives_the_same_tokens(cache_folder, monkeypatch, caplog):
    monkeypatch.setattr("apt_jax.buckets.ladder", lambda smallest, largest: [largest])
    model = random_model(CONFIG, seed=0)

    def start(**options) -> list[int]:
        engine = make_engine(model, CONFIG, max_num_seqs=4, **options)
        engine.warm_up()
        return run(engine, [[5, 6, 7]], GREEDY)[0].output_token_ids

    first = start()
    stored = sorted(cache_folder.iterdir())
    assert len(stored) == 5  # prefill, decode, two samplers, conversion
    compilations = count_compilations()
    monkeypatch.setattr(jax, "jit", None)  # a second start must not even trace
    assert start() == first
    assert compilations() == 0
    monkeypatch.undo()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder.parent))
    monkeypatch.setattr("apt_jax.buckets.ladder", lambda smallest, largest: [largest])
    stored[0].write_bytes(stored[0].read_bytes()[:1000])
    assert start() == first
    assert "cannot be used" in caplog.text
    start(num_blocks=100)  # another size is another program
    assert len(list(cache_folder.iterdir())) == 8
