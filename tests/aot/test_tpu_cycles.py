"""Static cycles and VMEM of real final programs, as `apt-jax bench kernels` reports them."""

import pytest

from apt_jax.pallas_kernels.bench.kernel_cycles import compile_static
from apt_jax.scheduling.costs.hardware import MODELS
from tests.aot.tpu_compiler import MISSING

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("way", ["kv", "hidden"])
def test_memory_bounds_all_on_v5e_but_hidden_rows_of_the_smallest(way, model):
    found = compile_static("v5e", model, way, 16)
    print(found.line())
    assert found.error is None
    assert found.cycles_per_token is not None and found.hbm_cycles_per_token is not None
    assert (found.cycles_per_token < found.hbm_cycles_per_token) == ((model, way) != ("opt-125m", "hidden"))
    assert found.vmem_bytes is not None and 2**19 < found.vmem_bytes < 18 * 2**20
    most = 12 if (model, way) == ("opt-125m", "hidden") else 0
    assert found.spills is not None and found.spills <= most, "registers stored for want of them"
