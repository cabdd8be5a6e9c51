"""Steps of models that are split over H200s, compiled for meshes of them: bytes, collectives, no pool copy.

`make test-aot ARGS="-rP -k split"` prints bytes and collectives of each. Skipped where `test_gpu.py` is.
"""

from pathlib import Path

import pytest
from jax.experimental import topologies

from apt_jax.attention.kinds import KindMix
from apt_jax.cache import CacheKind
from apt_jax.pallas_kernels.dispatch import Kernels
from apt_jax.pallas_kernels.gpu.hidden_decode import hidden_decode_attention
from apt_jax.pallas_kernels.gpu.kv_decode import kv_decode_attention
from tests.aot.split_steps import compile_split
from tests.aot.test_gpu import pytestmark  # noqa: F401

KV, HIDDEN, BOTH = KindMix((CacheKind.KV,)), KindMix((CacheKind.HIDDEN,)), KindMix((CacheKind.KV, CacheKind.HIDDEN))
DECODE, PREFILL, CONVERT = {"unroll": True}, {"tokens": 256}, {"convert": True}


@pytest.mark.parametrize(
    ("model", "count", "kinds", "step"),
    [
        ("opt-30b", 2, KV, DECODE),
        ("opt-30b", 2, BOTH, DECODE),
        ("opt-30b", 2, BOTH, PREFILL),
        ("opt-30b", 2, BOTH, CONVERT),
        ("opt-66b", 4, HIDDEN, DECODE),
        ("opt-66b", 4, BOTH, DECODE),
    ],
)
def test_no_split_step_copies_or_gathers_the_pool(model, count, kinds, step):
    config = Path(__file__).with_name("h200.txtpb").read_text()
    devices = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=config).devices
    kernels = Kernels("gpu", kv_decode_attention, hidden_decode_attention)
    done = compile_split(devices, model, kinds, kernels=kernels, **step)
    done.report(f"H200, {model} x{count}, {kinds}, {step}")
    # in a loop XLA copies a layer's weights out of their stack: 616 MB of OPT-30B's on each of two
    done.check(temporaries=800e6 if step is PREFILL else 250e6)
    if step is DECODE:
        assert done.program.as_text().count("mosaic_gpu") >= (CacheKind.KV in kinds), (
            "KV requests decode with the kernel"
        )
    if CacheKind.HIDDEN not in kinds:
        assert {kind for kind, _ in done.collectives()} == {"all-reduce"}
