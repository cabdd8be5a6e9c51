"""Sharing the device's memory: what the pool gets, and errors that name bytes and the flag to turn."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import pytest

import apt_jax.engine.memory
from apt_jax.cache import CacheKind
from apt_jax.engine.memory import budget_memory, check_longest_request, device_memory
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.platform import PLATFORMS
from apt_jax.model_config import ModelConfig
from apt_jax.serve.runtime.build import build_engine

MIB = 2**20
HYBRID = (CacheKind.KV, CacheKind.HIDDEN)


@dataclass
class Accelerator:
    """What `budget_memory` asks of a jax.Device, with figures chosen here: 1,000 MiB, 300 of them taken by weights."""

    platform: str = "gpu"
    device_kind: str = "Test GPU"
    limit_mib: int = 1000
    in_use_mib: int = 300

    def memory_stats(self):
        return {"bytes_limit": self.limit_mib * MIB, "bytes_in_use": self.in_use_mib * MIB}


def plan(device=None, *, kinds=HYBRID, max_model_len=64, max_num_seqs=1000, activation_mib=100, **options):
    """Blocks of 1 MiB and 16 tokens."""
    return budget_memory(
        EngineConfig(**options),
        device=device or Accelerator(),
        weight_bytes=300 * MIB,
        activation_bytes=activation_mib * MIB,
        block_bytes=MIB,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kinds=kinds,
    )


def test_the_pool_is_the_share_of_the_device_less_weights_and_activations():
    found = plan(device_memory_utilization=0.9)
    assert (found.num_blocks, found.pool_bytes) == (500, 500 * MIB)
    assert (found.total_bytes, found.weight_bytes, found.activation_bytes) == (1000 * MIB, 300 * MIB, 100 * MIB)
    assert plan(device_memory_utilization=0.5).num_blocks == 100


def test_the_pool_is_never_larger_than_all_requests_can_use():
    assert plan(max_num_seqs=3).num_blocks == 3 * 8  # 4 pages of 2 blocks each
    assert plan(max_num_seqs=3, kinds=(CacheKind.HIDDEN,)).num_blocks == 3 * 4


def test_blocks_and_bytes_can_be_given():
    assert plan(num_blocks=7).num_blocks == 7
    assert plan(num_blocks=600).num_blocks == 600, "all that is left, whatever the share"
    assert plan(cache_memory_bytes=20 * MIB + 5).num_blocks == 20


@pytest.mark.parametrize(
    ("kinds", "longest", "kv_tokens"), [((CacheKind.KV,), 48, 48), ((CacheKind.HIDDEN,), 112, 48), (HYBRID, 112, 48)]
)
def test_what_seven_blocks_hold(kinds, longest, kv_tokens):
    found = plan(num_blocks=7, kinds=kinds, max_model_len=200)
    assert (found.tokens(CacheKind.KV), found.tokens(CacheKind.HIDDEN)) == (kv_tokens, 112)
    assert found.longest_context_tokens == longest
    assert plan(num_blocks=7, kinds=kinds, max_model_len=30).longest_context_tokens == 30


def test_the_table_names_every_use_of_memory_and_what_the_pool_holds():
    assert plan(num_blocks=250, max_model_len=5000).table().splitlines() == [
        "  memory           1,000.0 MiB  gpu: Test GPU",
        "  weights            300.0 MiB",
        "  activations        100.0 MiB  largest compiled step",
        "  cache pool         250.0 MiB  250 blocks of 16 tokens",
        "  the pool holds 2,000 tokens as KV or 4,000 as hidden vectors",
        "  longest context: 4,000 tokens (max_model_len 5,000)",
    ]


USED = "weights (300.0 MiB) and activations (100.0 MiB) leave 600.0 MiB of 1,000.0 MiB"
REFUSED = [
    ({"num_blocks": 601}, f"num_blocks=601 takes 601.0 MiB, but {USED}; lower --num-blocks"),
    (
        {"max_model_len": 10_000},
        f"max_model_len=10000 needs 625.0 MiB of cache, 500.0 MiB are meant for it; {USED}: raise "
        "--device-memory-utilization (now 0.9), lower --max-num-batched-tokens, or lower --max-model-len to at most "
        "8000",
    ),
    (
        {"max_model_len": 5_000, "kinds": (CacheKind.KV,)},
        f"max_model_len=5000 needs 626.0 MiB of cache, 500.0 MiB are meant for it; {USED}: raise "
        "--device-memory-utilization (now 0.9), lower --max-num-batched-tokens, or lower --max-model-len to at most "
        "4000",
    ),
    (
        {"cache_memory_bytes": 3 * MIB},
        f"max_model_len=64 needs 4.0 MiB of cache, 3.0 MiB are meant for it; {USED}: raise --cache-memory-bytes "
        f"(now {3 * MIB}), or lower --max-model-len to at most 48",
    ),
    (
        {"cache_memory_bytes": 700 * MIB},
        f"cache_memory_bytes={700 * MIB} would take 700.0 MiB, but {USED}; lower --cache-memory-bytes",
    ),
    (
        {"device_memory_utilization": 0.3},
        f"max_model_len=64 needs 4.0 MiB of cache, 0.0 MiB are meant for it; {USED}: raise "
        "--device-memory-utilization (now 0.3), lower --max-num-batched-tokens",
    ),
    (
        {"activation_mib": 800},
        "max_model_len=64 needs 4.0 MiB of cache, 0.0 MiB are meant for it; weights (300.0 MiB) and activations "
        "(800.0 MiB) leave 0.0 MiB of 1,000.0 MiB: raise --device-memory-utilization (now 0.9), lower "
        "--max-num-batched-tokens",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=[next(iter(options)) for options, _ in REFUSED])
def test_too_little_memory_names_bytes_limit_and_cure(options, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (compared whole below)
        plan(**options)
    assert str(error.value) == sentence


def test_following_the_cure_is_enough():
    assert plan(max_model_len=8000).longest_context_tokens == 8000
    assert plan(max_model_len=4000, kinds=(CacheKind.KV,)).longest_context_tokens == 4000
    assert plan(max_model_len=10_000, max_num_seqs=1, cache_memory_bytes=600 * MIB, num_blocks=600).num_blocks == 600


@pytest.fixture
def cpu(monkeypatch):
    """The real CPU device, on a machine said to have so many bytes available."""

    def with_available(count, allowed=None):
        monkeypatch.setattr(apt_jax.engine.memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=count))
        monkeypatch.setattr(apt_jax.engine.memory, "unused_memory_bytes", lambda: allowed)
        return jax.devices("cpu")[0]

    return with_available


def test_on_a_cpu_memory_is_what_the_machine_has_available(cpu):
    assert device_memory(cpu(700 * MIB), weight_bytes=300 * MIB) == (1000 * MIB, 700 * MIB)
    found = plan(cpu(700 * MIB), device_memory_utilization=0.9)
    assert (found.num_blocks, found.device) == (500, "cpu: cpu")


def test_on_a_cpu_the_control_groups_limit_counts_where_it_is_tighter(cpu):
    assert device_memory(cpu(9000 * MIB, allowed=700 * MIB), weight_bytes=300 * MIB) == (1000 * MIB, 700 * MIB)
    assert device_memory(cpu(700 * MIB, allowed=9000 * MIB), weight_bytes=300 * MIB) == (1000 * MIB, 700 * MIB)
    assert device_memory(cpu(9000 * MIB, allowed=700 * MIB), 0, sharers=2) == (350 * MIB, 350 * MIB)


def test_on_a_cpu_the_default_pool_is_limited_and_the_error_names_the_right_flag(cpu):
    assert PLATFORMS["cpu"].cache_limit_bytes == 4096 * MIB
    limit = 4096
    assert plan(cpu(100 * limit * MIB)).num_blocks == limit
    more = plan(cpu(100 * limit * MIB), cache_memory_bytes=2 * limit * MIB, max_num_seqs=10_000)
    assert more.num_blocks == 2 * limit
    with pytest.raises(ValueError, match=r"4,096.0 MiB are meant for it.*: raise --cache-memory-bytes, or lower"):
        plan(cpu(100 * limit * MIB), max_model_len=10**6)
    with pytest.raises(ValueError, match=r" 2.0 MiB are meant for it.*: raise --device-memory-utilization"):
        plan(cpu(200 * MIB), activation_mib=148)


@pytest.mark.parametrize(
    ("mode", "needed", "fits"), [("kv", 8, 32), ("hidden", 4, 64), ("hybrid", 4, 64)], ids=["kv", "hidden", "hybrid"]
)
def test_blocks_that_hold_no_request_of_the_longest_context_are_refused(mode, needed, fits):
    model = ModelConfig(max_position_embeddings=64)
    for options in ({}, {"max_model_len": 64}):
        check_longest_request(EngineConfig(num_blocks=needed, cache_mode=mode, **options), model)
        with pytest.raises(ValueError) as error:  # noqa: PT011  (compared whole below)
            check_longest_request(EngineConfig(num_blocks=needed - 1, cache_mode=mode, **options), model)
        assert str(error.value) == (
            f"num_blocks={needed - 1} cannot hold one request of max_model_len=64, which takes {needed} blocks of 16 "
            f"tokens; raise --num-blocks, or lower --max-model-len to at most 48"
        )
    four = EngineConfig(num_blocks=4, cache_mode=mode, max_model_len=fits)
    check_longest_request(four, ModelConfig(max_position_embeddings=2048))
    with pytest.raises(ValueError, match=f"num_blocks=4 .*max_model_len=2048.*to at most {fits}$"):
        check_longest_request(EngineConfig(num_blocks=4, cache_mode=mode), ModelConfig(max_position_embeddings=2048))
    check_longest_request(EngineConfig(cache_mode=mode), model)


def test_they_are_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr("apt_jax.serve.runtime.build.load_model", lambda *args, **options: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"num_blocks=4 cannot hold one request of max_model_len=1024.*--num-blocks"):
        build_engine(None, engine_config=EngineConfig(num_blocks=4))
