"""The GPU kernels over int8 pools compiled to machine code for an NVIDIA H200, with no GPU: registers, spills, memory.

Every OPT size in blocks of 64 tokens, and one in longer blocks, as `test_gpu.py` does the others.
"""

import jax
import jax.numpy as jnp
import pytest

from apt_jax.attention.pool import scale_row
from apt_jax.pallas_kernels.gpu.hidden_decode import hidden_decode_attention
from apt_jax.pallas_kernels.gpu.kv_decode import kv_decode_attention
from apt_jax.pallas_kernels.gpu.kv_prefix import kv_prefix_attention
from apt_jax.scheduling.costs.hardware import MODELS
from tests.aot.test_gpu import CONTEXT_TOKENS, check_report, h200, has_compiler, ptxas

__all__ = ["ptxas"]  # a fixture

pytestmark = pytest.mark.skipif(
    not has_compiler(), reason="jax[cuda13] is not installed, so nothing compiles for GPUs here; run make test-aot"
)
CASES = [(model, 64, 32) for model in MODELS] + [("opt-13b", 128, 128)]
KERNELS = {"kv": kv_decode_attention, "hidden": hidden_decode_attention, "kv_prefix": kv_prefix_attention}


@pytest.mark.parametrize(("model", "block_size", "rows"), CASES)
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_int8_compiles_without_spills(kernel, model, block_size, rows, ptxas):
    """Prefix attention for a chunk of 512 tokens."""
    config, sharding = MODELS[model], h200()
    N, D, is_hidden = config.num_attention_heads, config.hidden_size, kernel == "hidden"
    tokens, numbers = (512, 3) if kernel == "kv_prefix" else (rows, 1)
    shapes = [
        ((tokens, N, D if is_hidden else config.head_dim), jnp.bfloat16),
        ((1000, block_size, D), jnp.int8),
        ((1000, 1, scale_row(block_size, N)), jnp.float32),
        *[((rows, CONTEXT_TOKENS // block_size), jnp.int32)] * (1 if is_hidden else 2),
        *[((rows,), jnp.int32)] * numbers,
    ]

    def attend(query, pool, scales, *rest):
        return KERNELS[kernel](query, pool, *rest, scales=scales)

    arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    with jax.default_device(next(iter(sharding.device_set))):  # Mosaic asks it for the compute capability
        jax.jit(attend).lower(*arguments).compile()
    assert check_report(ptxas(), kernels=2 if is_hidden else 1) == {"sm_90a"}
