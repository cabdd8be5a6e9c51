"""The TPU kernels over int8 pools against their references, interpreted on the CPU. Compiled: `tests/aot`."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.dispatch import tpu_kernels
from apt_jax.pallas_kernels.reference import Partial
from apt_jax.pallas_kernels.tpu import hidden_prefix as tpu_hidden_prefix
from apt_jax.pallas_kernels.tpu import kv_prefix as tpu_kv_prefix
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from tests.support.kernel_cases import assert_close, coded, make_case, prefix_arguments

CHUNK = 64
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KERNELS = tpu_kernels("interpreted", cores=1, interpret=True)
WAYS = pytest.mark.parametrize("way", ["kv", "hidden"])


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Several chunks for contexts of some hundred tokens, several tiles for tens of queries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_paging, "MAX_CHUNK_TOKENS", CHUNK)
        patch.setattr(tpu_kv_prefix, "TILE", 16)
        patch.setattr(tpu_hidden_prefix, "tile_queries", lambda width: 16)
        yield


def compare(name: str, query: jax.Array, pool: jax.Array, *rest: jax.Array, heads: int, kernels=KERNELS) -> None:
    """The kernel `name` over what an int8 pool of `pool` would be, and its reference; float32 or bfloat16 queries."""
    codes, scales = coded(pool, heads if name.startswith("kv") else 1, heads)
    args = query, codes, *rest
    run = jax.jit(functools.partial(getattr(kernels, name)), compiler_options=QUICK)
    expected = getattr(reference, f"{name}_attention")(jnp.nan_to_num(query), codes, *rest, scales=scales)
    found = run(*args, scales=scales)
    some = expected.lse > reference.NEVER  # `hidden_decode` gives anything in rows without tokens
    out = jnp.where(some[..., None], found.out.astype(jnp.float32), 0)
    assert_close(Partial(out, found.lse), expected, query.dtype)


def check_decode(way: str, lengths, *, heads: int, head_dim: int, kernels=KERNELS, **options) -> None:
    case = make_case(lengths, heads=heads, head_dim=head_dim, **options)
    tables = (case.key_or_hidden_blocks, case.value_blocks)[: 2 if way == "kv" else 1]
    query = case.q if way == "kv" else case.q_wide
    compare(f"{way}_decode", query, case.pool, *tables, case.length, heads=heads, kernels=kernels)


LENGTHS = [1, 0, 31, 32, 33, CHUNK - 1, 0, CHUNK, CHUNK + 1, 200]


@WAYS
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "dtype"),
    [
        (12, 64, 32, jnp.float32),
        (12, 64, 32, jnp.bfloat16),
        (5, 16, 64, jnp.float32),
        (3, 16, 256, jnp.float32),
    ],
)
def test_decode_over_blocks_and_heads(way, heads, head_dim, block_size, dtype):
    """Four and two heads to a register row of scales, and heads of two rows; the last group of heads is not full."""
    check_decode(way, LENGTHS, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)


@WAYS
def test_decode_on_two_cores(way):
    kernels = tpu_kernels("interpreted", cores=2, interpret=True)
    check_decode(way, [40, 0, 70, 1, 33], heads=3, head_dim=16, block_size=32, kernels=kernels)


@pytest.mark.parametrize(
    ("way", "heads", "head_dim", "dtype"),
    [
        ("kv", 8, 64, jnp.bfloat16),
        ("kv", 32, 80, jnp.float32),
        ("hidden", 4, 64, jnp.bfloat16),
        ("hidden", 3, 16, jnp.float32),
    ],
)
def test_prefixes_over_tiles_and_chunks(way, heads, head_dim, dtype):
    """A row of several tiles, tiles of several rows, a row without cached tokens; four groups of heads of 80."""
    (query, pool, *rest), _ = prefix_arguments(
        way, [96, 33, 0, 8], [20, 3, 5, 1], [0, 0, 0, 4], heads=heads, head_dim=head_dim, dtype=dtype, block_size=32,
        slots=40, table_pages=3, seed=0,
    )  # fmt: skip
    compare(f"{way}_prefix", query, pool, *rest, heads=heads)


@WAYS
def test_no_races_and_no_read_before_a_write(way):
    """Copies run late and memory starts as NaN; a buffer that is read while it is written is reported."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    kernels = tpu_kernels("interpreted", cores=1, interpret=params)
    check_decode(way, [0, 70, 17, 0, 33], heads=3, head_dim=16, block_size=32, kernels=kernels)
    (query, pool, *rest), _ = prefix_arguments(
        way, [0, 70, 17], [3, 15, 4], [0, 0, 2], heads=2, head_dim=16, dtype=jnp.float32, block_size=32, slots=24,
        table_pages=3, seed=0,
    )  # fmt: skip
    compare(f"{way}_prefix", query, pool, *rest, heads=2, kernels=kernels)
    assert not interpret_pallas_call.races.races_found


def test_what_the_kernels_cannot_do_is_refused():
    zeros, lengths = jnp.zeros((1, 4), jnp.int32), jnp.ones(1, jnp.int32)
    for block_size, interpret, reason in [
        (16, False, "set --block-size 32"),
        (24, True, "block_size=24 of an int8 cache"),
    ]:
        kernels = tpu_kernels("tpu", cores=1, interpret=interpret)
        pool = jnp.zeros((4, block_size, 256), jnp.int8)
        scales = jnp.ones((4, 1, 128), jnp.float32)
        with pytest.raises(NotImplementedError, match=reason):
            kernels.hidden_decode(jnp.zeros((1, 2, 256)), pool, zeros, lengths, scales=scales)
