"""The TPU kernels and the steps that hold them, compiled for every chip: they fit in VMEM, and nothing copies the pool.

`make test-aot`; without libtpu these are skipped.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from tpu_compiler import MISSING, OPT_SIZES, TOPOLOGIES, compile_for, device

from pallas_kernels import tpu_hidden_decode, tpu_kv_decode

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

ROWS, CONTEXT = 128, 2048
CHIPS = pytest.mark.parametrize("chip", list(TOPOLOGIES))
SIZES = pytest.mark.parametrize("size", list(OPT_SIZES))
KERNELS = pytest.mark.parametrize("kernel", ["kv", "hidden"])


def shape(*sizes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def compile_kernel(kernel: str, chip: str, size: str, block_size: int, dtype, query_dtype=None):
    """For 128 rows of 2,048 tokens over a pool that no VMEM holds."""
    N, H = OPT_SIZES[size]
    query_dtype = query_dtype or dtype
    pool = shape(131072 // block_size, block_size, N * H, dtype=dtype)
    table, length = shape(ROWS, CONTEXT // block_size), shape(ROWS)
    cores = device(chip).num_cores
    if kernel == "kv":
        function = functools.partial(tpu_kv_decode.kv_decode_attention, cores=cores)
        args = shape(ROWS, N, H, dtype=query_dtype), pool, table, table, length
    else:
        function = functools.partial(tpu_hidden_decode.hidden_decode_attention, cores=cores, out_dtype=dtype)
        args = shape(ROWS, N, N * H, dtype=query_dtype), pool, table, length
    program = compile_for(chip, function, *args)
    assert "tpu_custom_call" in program.as_text()
    out_bytes = ROWS * N * N * H * 4 if kernel == "hidden" else ROWS * N * H * 8 * 4
    # what is not the kernel's: the grouped query, the output before rows without tokens are cleared
    assert program.memory_analysis().temp_size_in_bytes <= 3 * out_bytes
    return program


@CHIPS
@SIZES
@KERNELS
def test_every_opt_size_compiles_in_bfloat16(chip, size, kernel):
    compile_kernel(kernel, chip, size, 16, jnp.bfloat16)


@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
@pytest.mark.parametrize("size", ["125M", "2.7B", "13B", "66B"])
@KERNELS
def test_float32_compiles(chip, size, kernel):
    compile_kernel(kernel, chip, size, 16, jnp.float32)


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
@pytest.mark.parametrize("block_size", [8, 32, 64, 128])
@pytest.mark.parametrize(("size", "dtype"), [("125M", jnp.bfloat16), ("66B", jnp.bfloat16), ("66B", jnp.float32)])
@KERNELS
def test_every_block_size_compiles(chip, block_size, size, dtype, kernel):
    compile_kernel(kernel, chip, size, block_size, dtype)


@CHIPS
def test_a_float32_query_over_a_bfloat16_pool_compiles(chip):
    for size in ("125M", "66B"):
        compile_kernel("hidden", chip, size, 16, jnp.bfloat16, query_dtype=jnp.float32)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "dtype", "reason"),
    [
        (12, 64, 16, jnp.float16, "dtype float16 is neither bfloat16 nor float32"),
        (12, 64, 4, jnp.bfloat16, "block_size=4 < 8"),
        (2, 16, 16, jnp.bfloat16, "hidden_size=32 or columns=.* is no multiple of 128"),
    ],
)
@KERNELS
def test_what_does_not_compile_is_refused(heads, head_dim, block_size, dtype, reason, kernel, monkeypatch):
    monkeypatch.setitem(OPT_SIZES, "this", (heads, head_dim))
    with pytest.raises(NotImplementedError, match=reason):
        compile_kernel(kernel, "v5e", "this", block_size, dtype)
