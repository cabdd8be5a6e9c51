"""The TPU prefix kernels against their references, interpreted on the CPU. Compiled for real chips: `tests/aot`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.reference import NEVER, Partial
from apt_jax.pallas_kernels.tpu import hidden_prefix as tpu_hidden_prefix
from apt_jax.pallas_kernels.tpu import kv_prefix as tpu_kv_prefix
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from apt_jax.pallas_kernels.tpu import query_tiles as tpu_query_tiles
from tests.support.kernel_cases import assert_close, prefix_arguments

CHUNK, TILE = 32, 16


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Several chunks for contexts of a hundred tokens, several tiles for tens of queries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_paging, "MAX_CHUNK_TOKENS", CHUNK)
        patch.setattr(tpu_kv_prefix, "TILE", TILE)
        patch.setattr(tpu_hidden_prefix, "tile_queries", lambda width: TILE)
        yield


# interpreted kernels run for milliseconds and compile for seconds
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnames=("cores", "interpret"), compiler_options=QUICK)
def kv_kernel(*args, cores=1, interpret=True) -> Partial:
    return tpu_kv_prefix.kv_prefix_attention(*args, cores=cores, interpret=interpret)


@functools.partial(jax.jit, static_argnames="interpret", compiler_options=QUICK)
def hidden_kernel(*args, interpret=True) -> Partial:
    return tpu_hidden_prefix.hidden_prefix_attention(*args, interpret=interpret)


reference_kv = jax.jit(reference.kv_prefix_attention, compiler_options=QUICK)
reference_hidden = jax.jit(reference.hidden_prefix_attention, compiler_options=QUICK)


def check(way, lengths, counts, gaps, *, heads, head_dim, dtype=jnp.float32, block_size=8, slots=40, seed=0, **options):
    """Compare with the reference; see `kernel_cases.prefix_arguments`."""
    (queries, *rest), mine = prefix_arguments(
        way, lengths, counts, gaps, heads=heads, head_dim=head_dim, dtype=dtype, block_size=block_size, slots=slots,
        table_pages=96 // block_size, seed=seed,
    )  # fmt: skip
    kernel, expected = (kv_kernel, reference_kv) if way == "kv" else (hidden_kernel, reference_hidden)
    found = kernel(queries, *rest, **options)
    theirs = expected(jnp.nan_to_num(queries), *rest)
    assert_close(found, theirs, dtype)
    return found, mine


WAYS = pytest.mark.parametrize("way", ["kv", "hidden"])


@pytest.mark.parametrize(
    ("way", "heads", "head_dim", "dtype"),
    [("kv", 4, 64, jnp.bfloat16), ("kv", 8, 80, jnp.float32), ("hidden", 4, 64, jnp.bfloat16)],
)
def test_head_sizes_over_tiles_and_chunks(way, heads, head_dim, dtype):
    """A row of several tiles, tiles of several rows, rows without cached tokens, slots of no row."""
    found, mine = check(way, [96, 33, 0, 8], [20, 3, 5, 1], [0, 0, 0, 4], heads=heads, head_dim=head_dim, dtype=dtype)
    assert (found.out[~mine] == 0).all() and (found.lse[~mine] == NEVER).all()
    assert (found.lse[23:28] == NEVER).all(), "a row without cached tokens"


@WAYS
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 96) | st.sampled_from([1, 8, 31, 32, 33, 64, 96]), min_size=4, max_size=4),
    counts=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    gaps=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_any_lengths_and_any_queries(way, lengths, counts, gaps, seed):
    check(way, lengths, counts, gaps, heads=3, head_dim=8, seed=seed)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [0, 70, 0], [1, 40, 96]], ids=["none", "one", "three"])
def test_groups_of_heads_are_shared_among_two_cores(lengths, monkeypatch):
    """Three groups of one head: one core has two of them."""
    monkeypatch.setattr(tpu_kv_prefix, "_heads_of_a_group", lambda heads, head_dim: 1)
    check("kv", lengths, [7, 20, 13], [0, 0, 0], heads=3, head_dim=16, cores=2)


@pytest.mark.parametrize("way", ["kv"])  # the other reads pages by the same code
def test_no_races_and_no_read_before_a_write(way):
    """Copies run late and memory starts as NaN; a buffer that is read while it is written is reported."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    check(way, [0, 70, 17], [3, 15, 4], [0, 0, 2], heads=2, head_dim=8, slots=24, interpret=params)
    assert not interpret_pallas_call.races.races_found


def test_a_group_of_heads_is_whole_register_tiles():
    groups = {
        (heads, head_dim): tpu_kv_prefix._heads_of_a_group(heads, head_dim)
        for heads, head_dim in [(12, 64), (16, 64), (32, 64), (32, 80), (32, 128), (40, 128), (56, 128), (72, 128)]
    }
    assert all(heads % group == 0 and group * head_dim % 128 == 0 for (heads, head_dim), group in groups.items())
    assert groups[12, 64] == 12 and groups[32, 64] == 16 and groups[32, 80] == 8 and groups[40, 128] == 8


def test_work_is_what_tiles_and_rows_have_in_common():
    """Slots 0-4 and 12 have no row, row 1 has no cached tokens, row 2 spans two tiles of eight."""
    work, some = tpu_query_tiles.find_work(
        jnp.array([9, 0, 30]), jnp.array([5, 6, 7]), jnp.array([1, 1, 5]), num_slots=13, tile=8
    )
    count = int(work.num_items[0])
    found = list(zip(work.tile[:count].tolist(), work.row[:count].tolist(), strict=True))
    assert found == [(0, 0), (0, 2), (1, 2)]
    assert np.flatnonzero(some).tolist() == [5, 7, 8, 9, 10, 11]
