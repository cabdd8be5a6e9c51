"""Static cycles and VMEM of real final programs, as `apt-jax bench kernels` reports them."""

import pytest
from tpu_compiler import MISSING

from serve.bench.kernel_cycles import compile_static

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)


@pytest.mark.parametrize("way", ["kv", "hidden"])
def test_13b_on_v5e_is_bound_by_memory(way):
    found = compile_static("v5e", "opt-13b", way, 16)
    print(found.line())
    assert found.error is None
    assert found.cycles_per_token is not None and found.hbm_cycles_per_token is not None
    assert 5 < found.cycles_per_token < found.hbm_cycles_per_token
    assert found.vmem_bytes is not None and 4 * 2**20 < found.vmem_bytes < 16 * 2**20
