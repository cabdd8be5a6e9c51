"""Programs survive a restart: a second runner neither traces nor compiles, and damage only costs time."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from apt_jax.execution import compiler
from apt_jax.model_config import ModelConfig
from tests.support.checkpoint_folders import random_model
from tests.support.engines import GREEDY, count_compilations, make_engine, run

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=4, word_embed_proj_dim=32, eos_token_ids=(),
)  # fmt: skip
WIDE_HEADS = replace(CONFIG, num_attention_heads=2)
"""Heads of 16, whose layers the C++ kernels take all in one call."""


@pytest.fixture
def cache_folder(tmp_path):
    """A store of its own, without JAX's cache beside it: what that holds already would not be stored."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(("config", "of_a_step"), [(CONFIG, 3), (WIDE_HEADS, 1)])
def test_second_start_loads_every_program_and_gives_the_same_tokens(
    config, of_a_step, cache_folder, monkeypatch, caplog
):
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
    model = random_model(config, seed=0)
    if of_a_step == 1 and make_engine(model, config, max_num_seqs=4).runner.weights.kernels is None:
        pytest.skip("the C++ kernels cannot be had here")

    def start(**options) -> list[int]:
        engine = make_engine(model, config, max_num_seqs=4, **options)
        engine.warm_up()
        return run(engine, [[5, 6, 7]], GREEDY)[0].output_token_ids

    first = start()
    stored = sorted(cache_folder.iterdir())
    # prefill and decode, two samplers, gathering, scoring, pooling, conversion, tokens that are known
    own = 2 * of_a_step + 7 + 2 * (of_a_step == 1)  # and, of C++ layers, iterations with either sampler
    assert len(stored) == own
    compilations = count_compilations()
    monkeypatch.setattr(jax, "jit", None)  # a second start must not even trace
    assert start() == first
    assert compilations() == 0
    monkeypatch.undo()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder.parent))
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
    stored[0].write_bytes(stored[0].read_bytes()[:1000])
    assert start() == first
    assert "cannot be used" in caplog.text
    start(num_blocks=100)  # another size is another program
    assert len(list(cache_folder.iterdir())) == own + 3 + 2 * (of_a_step == 1)  # layers of two shapes, conversion


def test_programs_with_kernels_of_ours_are_not_those_without(cache_folder, monkeypatch):
    """In float32 both take the same arrays, and a host may lose its compiler."""
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
    model = random_model(CONFIG, seed=0)
    counts = []
    for backend in ("xla", "auto"):
        engine = make_engine(model, CONFIG, max_num_seqs=4, attention_backend=backend)
        engine.warm_up()
        counts.append(len(list(cache_folder.iterdir())))
    if engine.runner.weights.kernels is None:
        pytest.skip("the C++ kernels cannot be had here")
    assert counts[1] == 2 * counts[0]


def test_what_comes_from_jax_s_own_cache_is_not_kept(tmp_path):
    """Such an executable lacks its functions once it is written again (XLA on CPU)."""
    folder = tmp_path / "jax"
    code = (
        "import jax, sys; from pathlib import Path; from apt_jax.execution.program_store import ProgramStore\n"
        "jax.config.update('jax_compilation_cache_dir', sys.argv[1])\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)\n"
        "x = jax.numpy.arange(64.0)\n"
        "make = lambda: jax.jit(lambda x: jax.numpy.sort(jax.numpy.sin(x) * x)).lower(x).compile()\n"
        "print(float(ProgramStore(Path(sys.argv[2]), jax.devices()[0]).get('p', make)(x)[0]))\n"
    )

    def start(store: Path) -> tuple[str, int]:
        command = [sys.executable, "-c", code, str(folder), str(store)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout, len(list(store.iterdir())) if store.exists() else 0

    first, kept = start(tmp_path / "a")
    assert kept == 1 and any(folder.iterdir())
    assert start(tmp_path / "a") == (first, 1)
    for _ in range(2):
        assert start(tmp_path / "b") == (first, 0)


def test_an_xla_that_lacks_the_option_is_said_and_works_without(monkeypatch, caplog):
    compiler.one_order.cache_clear()
    assert compiler.one_order() is not None, "this jaxlib has it"
    compiler.one_order.cache_clear()
    monkeypatch.setattr(compiler, "_ONE_ORDER", {"xla_cpu_no_such_option": "1"})
    with caplog.at_level("WARNING"):
        assert compiler.one_order() is None
    assert "log-probabilities depend on the batch" in caplog.text
    compiler.one_order.cache_clear()
