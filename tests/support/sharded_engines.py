"""Engines on several virtual devices, against tokens made on one; in a process of its own, with eight devices.

    PYTHONPATH=.:tests python tests/support/sharded_engines.py [DEVICES:MODE ...]

Prints one line per engine; fails on the first difference. Without arguments every number of devices in every mode:
two minutes. `tests/model/test_tensor_parallel.py` runs some.
"""

import os
import sys
import time

if __name__ == "__main__":  # before jax is imported
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}

import jax
import numpy as np

import apt_jax.attention.hidden_slices
import apt_jax.attention.xla
import apt_jax.batching.buckets
from apt_jax.attention.pool import scale_row
from apt_jax.batching.buckets import Buckets
from apt_jax.cache import CacheKind
from apt_jax.engine.engine import Engine
from apt_jax.execution.compiler import temporary_bytes
from apt_jax.execution.pool import pool_shape
from apt_jax.execution.programs import ConversionKey, StepKey
from apt_jax.model_config import ModelConfig
from apt_jax.models.sharding import POOL, Parallel
from apt_jax.request import SamplingParams
from tests.support.checkpoint_folders import random_model
from tests.support.engines import Reader, finish, make_engine

# eight heads; 101 tokens, which no number of devices divides; pages of 8, tables of 96 tokens
CONFIG = ModelConfig(
    vocab_size=101, hidden_size=64, num_hidden_layers=2, ffn_dim=128, max_position_embeddings=96,
    num_attention_heads=8, word_embed_proj_dim=64, eos_token_ids=(),
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = ([5, 6, 7], [9] * 20, [11, 12] * 13, list(range(3, 43)))
KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN
TREATMENTS = {"kv": KV, "hidden": HIDDEN, "converted": HIDDEN, "preempted": HIDDEN}
NUM_BLOCKS = 2000


def sharded_engine(num_devices: int, mode: str, **options) -> Engine:
    """An engine of one prefill and one decode shape on that many devices."""
    model = random_model(CONFIG, seed=0)
    if num_devices > 1:
        model = Parallel.over(num_devices, hidden=mode != "kv").place(model)
    options = {"max_num_seqs": 16, "max_num_batched_tokens": 16, "num_blocks": NUM_BLOCKS, **options}
    return make_engine(model, CONFIG, cache_mode=mode, tensor_parallel_size=num_devices, **options)


def greedy_tokens(engine: Engine, mode: str) -> dict[str, list[int]]:
    """Of every prompt in every treatment that the mode has, all in one batch."""
    treatments = {"kv": ["kv", "preempted"], "hidden": ["hidden", "preempted"]}.get(mode, list(TREATMENTS))
    ids = {f"{prompt}-{how}": (prompt, how) for how in treatments for prompt in range(len(PROMPTS))}
    engine.policy = Reader(
        kinds={i: KV if mode == "kv" else TREATMENTS[how] for i, (_, how) in ids.items()},
        convert_at={i: 5 + prompt for i, (prompt, how) in ids.items() if how == "converted"},
        preempt_at={i: 9 + prompt for i, (prompt, how) in ids.items() if how == "preempted"},
        mixed=mode == "hybrid",
    )
    requests = {i: engine.add(PROMPTS[prompt], GREEDY, request_id=i) for i, (prompt, _) in ids.items()}
    finish(engine)
    for i, (_, how) in ids.items():
        assert requests[i].num_conversions == (how == "converted")
        assert requests[i].num_preemptions == (how == "preempted")
    return {i: request.output_token_ids for i, request in requests.items()}


def check_memory(engine: Engine) -> None:
    """Each device has its part of pool and weights, and no program copies the pool."""
    devices, runner = engine.runner.num_devices, engine.runner
    shape = pool_shape(CONFIG, NUM_BLOCKS, 8)
    numbers = runner._pool.numbers
    assert all(array.sharding.spec == POOL for array in jax.tree.leaves(runner._pool))
    assert {shard.data.shape for shard in numbers.addressable_shards} == {(*shape[:2], shape[2] // devices)}
    pool_bytes = int(np.prod(shape)) * numbers.dtype.itemsize // devices
    if runner._pool.is_coded:
        pool_bytes += shape[0] * scale_row(8, CONFIG.num_attention_heads // devices) * 4
    assert engine.setup.memory.pool_bytes == pool_bytes
    full = sum(leaf.nbytes for leaf in runner.weights.outer.arrays)
    assert (
        full / devices < runner.weights.nbytes < full / devices + 40_000
    )  # norms, biases and positions are everywhere
    keys = [key for key in runner.programs if isinstance(key, StepKey | ConversionKey)]
    for program in (program for key in keys for program in runner.programs[key].programs):
        assert program.memory_analysis().alias_size_in_bytes >= pool_bytes, "the pool was not donated"
        assert temporary_bytes(program) < pool_bytes / 2, f"{temporary_bytes(program)=}, {pool_bytes=}"
        gathers = [line for line in program.as_text().splitlines() if "all-gather" in line and f"[{shape[0]}," in line]
        assert not gathers, gathers[0]


def check_int8(num_devices: str, mode: str) -> None:
    """Over an int8 cache tokens of one kind depend neither on preemption nor on chunks."""
    started = time.perf_counter()
    engine = sharded_engine(int(num_devices), mode, cache_dtype="int8")
    found = greedy_tokens(engine, mode)
    check_memory(engine)
    other = greedy_tokens(sharded_engine(int(num_devices), mode, cache_dtype="int8", max_num_batched_tokens=24), mode)
    assert found == other
    alike = ("kv", "preempted") if mode == "kv" else ("hidden", "preempted")
    for prompt in range(len(PROMPTS)):
        assert found[f"{prompt}-{alike[0]}"] == found[f"{prompt}-{alike[1]}"], (num_devices, mode, prompt)
        if mode == "hybrid":
            assert found[f"{prompt}-converted"][: 5 + prompt] == found[f"{prompt}-hidden"][: 5 + prompt]
    print(f"{num_devices} devices, {mode}, int8: same tokens, {time.perf_counter() - started:.1f} s", flush=True)


def check_weights(num_devices: str, mode: str) -> None:
    """With int8 weights every treatment gives the tokens of one device."""
    started = time.perf_counter()
    expected = {
        i.partition("-")[0]: t for i, t in greedy_tokens(sharded_engine(1, "kv", quantization="int8"), "kv").items()
    }
    engine = sharded_engine(int(num_devices), mode, quantization="int8")
    assert engine.runner.weights.quantization == "int8"
    for i, tokens in greedy_tokens(engine, mode).items():
        assert tokens == expected[i.partition("-")[0]], (num_devices, mode, i)
    check_memory(engine)
    print(
        f"{num_devices} devices, {mode}, int8 weights: same tokens, {time.perf_counter() - started:.1f} s", flush=True
    )


def few_shapes() -> None:
    """One decode, one prefill and one sampling program from now on in this process."""
    apt_jax.batching.buckets.ladder = lambda smallest, largest: [largest]
    every_size = Buckets.__init__

    def one_size(self, **limits):
        every_size(self, **limits)
        self.sample_rows = [self.max_rows]

    Buckets.__init__ = one_size


def main(cases: list[str]) -> None:
    apt_jax.attention.xla.CHUNK_TOKENS = 16  # several chunks per context
    apt_jax.attention.hidden_slices.GROUP_BYTES = 192 * 64  # several groups per batch
    apt_jax.attention.hidden_slices._SHORTEST = 40  # and of two widths
    few_shapes()
    weights = [case for case in cases if case.endswith(":weights")]
    for case in weights:
        check_weights(*case.split(":")[:2])
    if weights:
        return
    alone = sharded_engine(1, "kv")
    expected = {i.partition("-")[0]: t for i, t in greedy_tokens(alone, "kv").items()}
    int8 = [case for case in cases if case.endswith(":int8")]
    for case in int8:
        check_int8(*case.split(":")[:2])
    if int8:
        return
    every = [f"{devices}:{mode}" for devices in (2, 4, 8) for mode in ("kv", "hidden", "hybrid")]
    for case in cases or every:
        started = time.perf_counter()
        num_devices, mode = int(case.partition(":")[0]), case.partition(":")[2]
        engine = sharded_engine(num_devices, mode)
        for i, tokens in greedy_tokens(engine, mode).items():
            assert tokens == expected[i.partition("-")[0]], (num_devices, mode, i)
        for i, (state,) in engine.policy.seen.items():
            np.testing.assert_allclose(state, alone.policy.seen[i.partition("-")[0] + "-kv"][0], atol=1e-3)
        check_memory(engine)
        print(f"{num_devices} devices, {mode}: same tokens, {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    main(sys.argv[1:])
