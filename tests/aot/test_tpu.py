"""The TPU kernels compiled for every chip: they fit in VMEM, and bring no copies of their operands.

In bfloat16 every kernel is compiled for each OPT size on each chip; what else varies (float32, block sizes) where it is
tightest or where the code takes another way. Each takes 1 to 6 s.

`make test-aot`; without libtpu these are skipped.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from apt_jax.pallas_kernels.bench.kernel_cycles import used_vmem_bytes
from apt_jax.pallas_kernels.tpu import cache_write as tpu_cache_write
from apt_jax.pallas_kernels.tpu import chunk as tpu_chunk
from apt_jax.pallas_kernels.tpu import hidden_decode as tpu_hidden_decode
from apt_jax.pallas_kernels.tpu import hidden_prefix as tpu_hidden_prefix
from apt_jax.pallas_kernels.tpu import kv_decode as tpu_kv_decode
from apt_jax.pallas_kernels.tpu import kv_prefix as tpu_kv_prefix
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from tests.aot.tpu_compiler import MISSING, OPT_SIZES, TOPOLOGIES, compile_for, device

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

ROWS, CONTEXT = 128, 2048
PAIRS = list(itertools.product(TOPOLOGIES, OPT_SIZES))
DECODE, ALL = ["kv", "hidden"], ["kv", "hidden", "kv_prefix", "hidden_prefix"]
VMEM_BYTES = 64 * 2**20  # the least that a chip has
QUERIES = {"kv_prefix": 512, "hidden_prefix": 64}


def shape(*sizes: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def compile_kernel(
    kernel: str, chip: str, size: str, block_size: int, dtype, query_dtype=None, rows: int | None = None
):
    """For 128 rows of 2,048 tokens over a pool that no VMEM holds; prefix attention for `QUERIES` tokens of 64 rows."""
    N, H = OPT_SIZES[size]
    rows = rows or (64 if kernel in QUERIES else ROWS)
    queries = QUERIES.get(kernel, rows)
    width = N * H if kernel.startswith("hidden") else H
    function = {
        "kv": tpu_kv_decode.kv_decode_attention,
        "hidden": functools.partial(tpu_hidden_decode.hidden_decode_attention, out_dtype=dtype),
        "kv_prefix": tpu_kv_prefix.kv_prefix_attention,
        "hidden_prefix": functools.partial(tpu_hidden_prefix.hidden_prefix_attention, out_dtype=dtype),
    }[kernel]
    if kernel != "hidden_prefix":
        function = functools.partial(function, cores=device(chip).num_cores)
    table, number = shape(rows, CONTEXT // block_size), shape(rows)
    program = compile_for(
        chip,
        function,
        shape(queries, N, width, dtype=query_dtype or dtype),
        shape(131072 // block_size, block_size, N * H, dtype=dtype),
        *[table] * (1 if kernel.startswith("hidden") else 2),
        *[number] * (3 if kernel in QUERIES else 1),
    )
    assert "tpu_custom_call" in program.as_text()
    # what is not the kernel's: queries by group or window, the output before rows without tokens are cleared
    out_bytes = queries * N * width * 4 * {"kv": 8, "kv_prefix": 4}.get(kernel, 1)
    tables = len(tpu_paging.row_groups(rows, CONTEXT // block_size, 1 if kernel.startswith("hidden") else 2))
    assert program.memory_analysis().temp_size_in_bytes <= (2 + tables) * out_bytes
    calls = [line for line in program.as_text().splitlines() if "tpu_custom_call" in line]
    vmem = max(used_vmem_bytes(call) or VMEM_BYTES + 1 for call in calls)
    assert vmem <= VMEM_BYTES, f"{vmem=}"
    print(f"{kernel} {chip} {size} blocks of {block_size} {jnp.dtype(dtype)}: {vmem / 2**20:.1f} MiB of VMEM")


@pytest.mark.parametrize(("kernel", "chip", "size"), [(kernel, *pair) for kernel in ALL for pair in PAIRS])
def test_every_opt_size_compiles_in_bfloat16(chip, size, kernel):
    compile_kernel(kernel, chip, size, 16, jnp.bfloat16)


@pytest.mark.parametrize(("chip", "size"), [("v5e", "125M"), ("v5e", "66B"), ("tpu7x", "2.7B"), ("tpu7x", "66B")])
@pytest.mark.parametrize("kernel", ALL)
def test_float32_compiles(chip, size, kernel):
    compile_kernel(kernel, chip, size, 16, jnp.float32)


@pytest.mark.parametrize(
    ("chip", "block_size", "size", "dtype", "kernels"),
    [
        ("v5e", 8, "125M", jnp.bfloat16, ALL),
        ("v5p", 8, "66B", jnp.bfloat16, DECODE),
        ("v5e", 32, "66B", jnp.bfloat16, DECODE),
        ("v5p", 64, "125M", jnp.bfloat16, DECODE),
        ("v5e", 128, "66B", jnp.bfloat16, ALL),
        ("v5e", 128, "66B", jnp.float32, ALL),
    ],
)
def test_every_block_size_compiles(chip, block_size, size, dtype, kernels):
    """The scoped VMEM of v5e and v5p is the smallest; the longest float32 blocks need the most."""
    for kernel in kernels:
        compile_kernel(kernel, chip, size, block_size, dtype)


@pytest.mark.parametrize(
    ("chip", "size", "dtype"),
    [*((*pair, jnp.bfloat16) for pair in PAIRS), ("v5e", "66B", jnp.float32), ("tpu7x", "2.7B", jnp.float32)],
)
def test_splash_attention_compiles_for_packed_chunks(chip, size, dtype):
    """Of 640 tokens, five blocks of 128; float32 as the engine multiplies it."""
    N, H = OPT_SIZES[size]
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        program = compile_for(chip, tpu_chunk.chunk_attention, *[shape(640, N, H, dtype=dtype)] * 3, shape(640))
    assert "tpu_custom_call" in program.as_text()


def compile_cache_write(chip: str, size: str, block_size: int, dtype, tokens: int) -> None:
    """Keys and values of `tokens` into a pool that is donated."""
    N, H = OPT_SIZES[size]

    def write(pool, keys, values, *places):
        writer = tpu_cache_write.cache_writer(*places, cores=device(chip).num_cores)
        return writer(pool, 7, keys, values)

    pool = shape(131072 // block_size, block_size, N * H, dtype=dtype)
    vectors = shape(tokens, N * H, dtype=dtype)
    program = compile_for(chip, write, pool, vectors, vectors, *[shape(tokens)] * 3, donate=(0,))
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes == sizes.output_size_in_bytes, "in place"
    assert sizes.temp_size_in_bytes <= 2 * 2**20
    (kernel,) = (line for line in program.as_text().splitlines() if "tpu_custom_call" in line)
    vmem = used_vmem_bytes(kernel)
    assert vmem is not None and vmem <= VMEM_BYTES, f"{vmem=}"
    print(f"cache write {chip} {size} {tokens} tokens: {vmem / 2**20:.1f} MiB of VMEM")


@pytest.mark.parametrize(("chip", "size"), PAIRS)
def test_cache_write_compiles(chip, size):
    compile_cache_write(chip, size, 16, jnp.bfloat16, 512)


@pytest.mark.parametrize(
    ("chip", "size", "block_size", "dtype", "tokens"),
    [
        ("v5e", "125M", 8, jnp.bfloat16, 1),
        ("v5p", "2.7B", 128, jnp.bfloat16, 100),
        ("v5e", "66B", 16, jnp.float32, 2048),
        ("tpu7x", "66B", 128, jnp.float32, 4),
    ],
)
def test_cache_write_compiles_for_other_shapes(chip, size, block_size, dtype, tokens):
    compile_cache_write(chip, size, block_size, dtype, tokens)


@pytest.mark.parametrize("rows_pages", [(1024, 128), (512, 256)], ids=str)
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("kernel", ALL)
def test_block_tables_larger_than_smem_compile(kernel, chip, rows_pages):
    compile_kernel(kernel, chip, "125M", CONTEXT // rows_pages[1], jnp.bfloat16, rows=rows_pages[0])


@pytest.mark.parametrize(("chip", "size"), [("v5e", "125M"), ("v5e", "66B"), ("tpu7x", "66B")])
def test_a_float32_query_over_a_bfloat16_pool_compiles(chip, size):
    compile_kernel("hidden", chip, size, 16, jnp.bfloat16, query_dtype=jnp.float32)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "dtype", "reason"),
    [
        (12, 64, 16, jnp.float16, "dtype float16 is neither bfloat16 nor float32"),
        (12, 64, 4, jnp.bfloat16, "block_size=4 < 8"),
        (2, 16, 16, jnp.bfloat16, "hidden_size=32 or columns=.* is no multiple of 128"),
    ],
)
@pytest.mark.parametrize("kernel", ALL)
def test_what_does_not_compile_is_refused(heads, head_dim, block_size, dtype, reason, kernel, monkeypatch):
    monkeypatch.setitem(OPT_SIZES, "this", (heads, head_dim))
    with pytest.raises(NotImplementedError, match=reason):
        compile_kernel(kernel, "v5e", "this", block_size, dtype)
