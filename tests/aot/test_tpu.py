"""The TPU kernels and the steps that hold them, compiled for every chip: they fit in VMEM, and nothing copies the pool.

`make test-aot`; without libtpu these are skipped.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tpu_compiler import MISSING, OPT_SIZES, TOPOLOGIES, compile_for, device

from apt_jax.attention import Kinds
from apt_jax.batch import Rows, Tokens
from apt_jax.cache_arrays import convert_blocks
from apt_jax.config import ModelConfig
from apt_jax.opt import OPT
from apt_jax.steps import run_step
from pallas_kernels import dispatch, tpu_hidden_decode, tpu_kv_decode

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


# OPT-13B with two layers, and a pool of 5.4 GB: more than all that a step may keep beside it
CONFIG = ModelConfig(
    hidden_size=5120, num_attention_heads=40, num_hidden_layers=2, ffn_dim=20480, word_embed_proj_dim=5120,
    max_position_embeddings=2048,
)  # fmt: skip
BLOCK_SIZE, NUM_BLOCKS, STEP_ROWS, STEP_TOKENS = 16, 16384, 64, 256
POOL = shape(CONFIG.num_hidden_layers * NUM_BLOCKS, BLOCK_SIZE, CONFIG.hidden_size, dtype=jnp.bfloat16)


def model_shapes():
    """The model's structure and the shapes of its weights."""
    return nnx.split(nnx.eval_shape(lambda: OPT(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))


def in_place(program) -> None:
    """The pool that comes out is the one that went in, and there is no other of its size."""
    memory = program.memory_analysis()
    pool_bytes = POOL.size * 2
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool was not donated"
    assert memory.temp_size_in_bytes < pool_bytes / 3, f"{memory.temp_size_in_bytes=}, the pool is {pool_bytes}"
    pool_type = "bf16[" + ",".join(map(str, POOL.shape)) + "]"
    copies = [line for line in program.as_text().splitlines() if re.search(re.escape(pool_type) + r"\S* copy", line)]
    assert not copies, copies[0]


@pytest.mark.parametrize(
    ("chip", "decode_only", "kinds"),
    [
        *((chip, True, Kinds(True, True)) for chip in TOPOLOGIES),
        ("v5e", True, Kinds(True, False)),
        ("v5e", True, Kinds(False, True)),
        ("v5e", False, Kinds(True, True)),
        ("tpu7x", False, Kinds(True, True)),
    ],
)
def test_no_step_copies_the_pool(chip, decode_only, kinds):
    """Writing a step's tokens and attending, with the kernels, over all layers."""
    graphdef, weights = model_shapes()
    kernels = dispatch.tpu_kernels("tpu", cores=device(chip).num_cores, interpret=False)
    tokens_, rows_ = (STEP_ROWS, STEP_ROWS) if decode_only else (STEP_TOKENS, STEP_ROWS)

    def step(weights, pool, history, tokens, rows):
        model = nnx.merge(graphdef, weights)
        return run_step(model, kinds, NUM_BLOCKS, decode_only, STEP_ROWS, pool, history, tokens, rows, kernels)

    number, flag = functools.partial(shape, dtype=jnp.int32), functools.partial(shape, dtype=jnp.bool_)
    tokens = Tokens(number(tokens_), flag(tokens_), number(tokens_), number(tokens_))
    table = number(rows_, CONTEXT // BLOCK_SIZE)
    rows = Rows(number(rows_), number(rows_), number(rows_), number(rows_), flag(rows_), table, table)
    program = compile_for(chip, step, weights, POOL, number(STEP_ROWS, CONTEXT), tokens, rows, donate=(1, 2))
    assert program.as_text().count("tpu_custom_call") >= kinds.kv + kinds.hidden
    in_place(program)


@CHIPS
def test_conversion_does_not_copy_the_pool(chip):
    graphdef, weights = model_shapes()

    def convert(weights, pool, hidden_blocks, value_blocks):
        return convert_blocks(nnx.merge(graphdef, weights), pool, hidden_blocks, value_blocks, NUM_BLOCKS)

    in_place(compile_for(chip, convert, weights, POOL, shape(16), shape(16), donate=(1,)))
