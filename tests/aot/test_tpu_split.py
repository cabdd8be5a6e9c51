"""Steps of models that are split over TPUs, compiled for meshes of v5e and v6e: bytes, collectives, no pool copy.

`make test-aot ARGS="-rP -k split"` prints bytes and collectives of each; without libtpu these are skipped.
"""

import re

import pytest
from jax.experimental import topologies

from apt_jax.attention.kinds import KindMix
from apt_jax.cache import CacheKind
from apt_jax.pallas_kernels import dispatch
from tests.aot.split_steps import compile_split
from tests.aot.tpu_compiler import MISSING, TOPOLOGIES

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

KV, HIDDEN, BOTH = KindMix((CacheKind.KV,)), KindMix((CacheKind.HIDDEN,)), KindMix((CacheKind.KV, CacheKind.HIDDEN))
DECODE, PREFILL, CONVERT = {}, {"tokens": 256}, {"convert": True}


@pytest.mark.parametrize(
    ("chip", "model", "count", "kinds", "step"),
    [
        ("v5e", "opt-30b", 2, KV, DECODE),
        ("v5e", "opt-30b", 2, BOTH, DECODE),
        ("v5e", "opt-30b", 2, BOTH, PREFILL),
        ("v5e", "opt-30b", 2, BOTH, CONVERT),
        ("v5e", "opt-66b", 4, BOTH, DECODE),
        ("v6e", "opt-30b", 2, BOTH, DECODE),
        ("v6e", "opt-30b", 2, HIDDEN, DECODE),
        ("v6e", "opt-66b", 4, BOTH, DECODE),
        ("v6e", "opt-66b", 4, BOTH, PREFILL),
    ],
)
def test_no_split_step_copies_or_gathers_the_pool(chip, model, count, kinds, step):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[:count]
    kernels = dispatch.tpu_kernels("tpu", cores=devices[0].num_cores, interpret=False)
    done = compile_split(devices, model, kinds, kernels=kernels, **step)
    done.report(f"{chip}, {model} x{count}, {kinds}, {step or 'decode'}")
    done.check(temporaries=250e6)
    found = done.collectives()
    if step is DECODE:
        text = done.program.as_text()
        assert text.count("tpu_custom_call") >= (CacheKind.KV in kinds), (
            "KV requests decode with the kernel, each device its heads"
        )
        if CacheKind.HIDDEN in kinds:
            slices = re.findall(r"gather_fusion[.\d]* = bf16\[\d+,16,\d+\]\S*", text)
            assert slices and all("S(1)" in line for line in slices), "hidden slices go into VMEM, and are read once"
    if CacheKind.HIDDEN not in kinds:
        assert {kind for kind, _ in found} == {"all-reduce"}
    if CacheKind.HIDDEN in kinds and step is not CONVERT:
        assert "reduce-scatter" in {kind for kind, _ in found}
