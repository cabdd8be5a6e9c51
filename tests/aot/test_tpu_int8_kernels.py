"""The TPU kernels over int8 pools, compiled for every chip: they fit in VMEM, and bring no copies of their operands.

Each OPT size on each chip with blocks of 32 tokens, the rows of a tile of int8; other block sizes and float32 queries
where memory is tightest. `make test-aot`; without libtpu these are skipped.
"""

import functools

import jax.numpy as jnp
import pytest

from apt_jax.attention.pool import scale_row
from apt_jax.pallas_kernels.bench.kernel_cycles import used_vmem_bytes
from apt_jax.pallas_kernels.tpu import cache_write as tpu_cache_write
from apt_jax.pallas_kernels.tpu import hidden_decode as tpu_hidden_decode
from apt_jax.pallas_kernels.tpu import hidden_prefix as tpu_hidden_prefix
from apt_jax.pallas_kernels.tpu import kv_decode as tpu_kv_decode
from apt_jax.pallas_kernels.tpu import kv_prefix as tpu_kv_prefix
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from apt_jax.pallas_kernels.tpu import scale_write as tpu_scale_write
from tests.aot.test_tpu import ALL, CONTEXT, PAIRS, QUERIES, ROWS, VMEM_BYTES, shape
from tests.aot.tpu_compiler import MISSING, OPT_SIZES, compile_for, device

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

BLOCK_SIZE = 32


def pool_of(size: str, block_size: int):
    """Shapes of an int8 pool that no VMEM holds, and of its scales."""
    N, H = OPT_SIZES[size]
    blocks = 131072 // block_size
    scales = shape(blocks, 1, scale_row(block_size, N), dtype=jnp.float32)
    return shape(blocks, block_size, N * H, dtype=jnp.int8), scales


def compile_kernel(
    kernel: str, chip: str, size: str, block_size: int = BLOCK_SIZE, dtype=jnp.bfloat16, rows: int | None = None
) -> None:
    """As `test_tpu.compile_kernel`."""
    N, H = OPT_SIZES[size]
    rows = rows or (64 if kernel in QUERIES else ROWS)
    queries = QUERIES.get(kernel, rows)
    is_hidden = kernel.startswith("hidden")
    function = {
        "kv": tpu_kv_decode.kv_decode_attention,
        "hidden": functools.partial(tpu_hidden_decode.hidden_decode_attention, out_dtype=dtype, clears=False),
        "kv_prefix": tpu_kv_prefix.kv_prefix_attention,
        "hidden_prefix": functools.partial(tpu_hidden_prefix.hidden_prefix_attention, out_dtype=dtype),
    }[kernel]
    if kernel != "hidden_prefix":
        function = functools.partial(function, cores=device(chip).num_cores)
    table, number = shape(rows, CONTEXT // block_size), shape(rows)
    width = N * H if is_hidden else H
    pool, scales = pool_of(size, block_size)
    program = compile_for(
        chip,
        lambda query, pool, scales, *rest: function(query, pool, *rest, scales=scales),
        shape(queries, N, width, dtype=dtype),
        pool,
        scales,
        *[table] * (1 if is_hidden else 2),
        *[number] * (3 if kernel in QUERIES else 1),
    )
    out_bytes = queries * N * width * 4 * {"kv": 8, "kv_prefix": 4}.get(kernel, 1)
    calls = len(tpu_paging.row_groups(rows, CONTEXT // block_size, 1 if is_hidden else 2))
    assert program.memory_analysis().temp_size_in_bytes <= (2 + calls) * out_bytes
    vmem = [used_vmem_bytes(line) for line in program.as_text().splitlines() if "tpu_custom_call" in line]
    assert len(vmem) == calls and all(own is not None and own <= VMEM_BYTES for own in vmem), f"{vmem=}"
    print(f"{kernel} {chip} {size} blocks of {block_size} {jnp.dtype(dtype)}: {max(vmem) / 2**20:.1f} MiB of VMEM")


@pytest.mark.parametrize(("kernel", "chip", "size"), [(kernel, *pair) for kernel in ALL for pair in PAIRS])
def test_every_opt_size_compiles(chip, size, kernel):
    compile_kernel(kernel, chip, size)


@pytest.mark.parametrize(
    ("chip", "size", "block_size", "dtype", "rows"),
    [
        ("v5e", "66B", 128, jnp.bfloat16, None),
        ("v5p", "125M", 64, jnp.bfloat16, None),
        ("v5e", "66B", 32, jnp.float32, None),
        ("tpu7x", "2.7B", 128, jnp.float32, None),
        ("v6e", "125M", 32, jnp.bfloat16, 2048),
    ],
)
@pytest.mark.parametrize("kernel", ALL)
def test_other_blocks_float32_queries_and_tables_larger_than_smem_compile(kernel, chip, size, block_size, dtype, rows):
    compile_kernel(kernel, chip, size, block_size, dtype, rows)


def compile_writes(chip: str, size: str, block_size: int, tokens: int) -> None:
    """Codes and scales of keys and values of `tokens` into a pool that is donated."""
    N, H = OPT_SIZES[size]

    def write(pool, scales, keys, values, key_scales, value_scales, *places):
        numbers = tpu_cache_write.cache_writer(*places, cores=device(chip).num_cores)(pool, 7, keys, values)
        return numbers, tpu_scale_write.scale_writer(*places, block_size=block_size)(
            scales, 7, key_scales, value_scales
        )

    vectors, scales = shape(tokens, N * H, dtype=jnp.int8), shape(tokens, N, dtype=jnp.float32)
    pool = pool_of(size, block_size)
    arguments = vectors, vectors, scales, scales, *[shape(tokens)] * 3
    program = compile_for(chip, write, *pool, *arguments, donate=(0, 1))
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes == pool[0].size + pool[1].size * 4, "in place"
    expanded = 2 * max(tokens, tpu_cache_write.SLOTS) * pool[1].shape[2] * 4
    assert sizes.temp_size_in_bytes <= 2 * 2**20 + 2 * expanded
    vmem = [used_vmem_bytes(line) for line in program.as_text().splitlines() if "tpu_custom_call" in line]
    assert len(vmem) == 2 and all(own is not None and own <= VMEM_BYTES for own in vmem), f"{vmem=}"
    print(f"writes {chip} {size} {tokens} tokens: {max(vmem) / 2**20:.1f} MiB of VMEM")


@pytest.mark.parametrize(("chip", "size"), PAIRS)
def test_writes_compile(chip, size):
    compile_writes(chip, size, BLOCK_SIZE, 512)


@pytest.mark.parametrize(
    ("chip", "size", "block_size", "tokens"),
    [("v5e", "125M", 32, 1), ("v5p", "2.7B", 128, 100), ("v5e", "66B", 64, 2048)],
)
def test_writes_compile_for_other_shapes(chip, size, block_size, tokens):
    compile_writes(chip, size, block_size, tokens)


@pytest.mark.parametrize("kernel", ALL)
def test_smaller_blocks_are_refused_with_the_cure(kernel):
    with pytest.raises(NotImplementedError, match=r"block_size=16 is no multiple of 32.*set --block-size 32"):
        compile_kernel(kernel, "v5e", "125M", 16)
