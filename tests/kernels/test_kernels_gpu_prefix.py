"""The GPU's prefix attention, interpreted on a CPU, against its reference; `tests/aot/test_gpu.py` compiles it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.gpu import hidden_prefix as gpu_hidden_prefix
from apt_jax.pallas_kernels.gpu import kv_prefix as gpu_kv_prefix
from apt_jax.pallas_kernels.reference import NEVER, Partial
from tests.support.gpu_interpreter import interpreted
from tests.support.kernel_cases import assert_close, prefix_arguments

reference_kv = jax.jit(reference.kv_prefix_attention)
reference_hidden = jax.jit(reference.hidden_prefix_attention)


def check(way, lengths, counts, gaps, *, dtype=jnp.bfloat16, **shape) -> tuple[Partial, np.ndarray]:
    """Compare with the reference; see `kernel_cases.prefix_arguments`."""
    (queries, *rest), mine = prefix_arguments(way, lengths, counts, gaps, dtype=dtype, **shape)
    kernels = {"kv": gpu_kv_prefix.kv_prefix_attention, "hidden": gpu_hidden_prefix.hidden_prefix_attention}
    found = interpreted(kernels[way])(queries, *rest)
    expected = (reference_kv if way == "kv" else reference_hidden)(jnp.nan_to_num(queries), *rest)
    assert_close(found, expected, dtype)
    return found, mine


# heads of 64, 80 and 128 lie in three layouts; blocks shorter and longer than a chunk of 64 tokens
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "pages", "dtype"),
    [
        (2, 64, 16, 13, jnp.bfloat16),
        (2, 80, 8, 9, jnp.bfloat16),
        (1, 128, 128, 2, jnp.bfloat16),
        (2, 64, 16, 13, jnp.float32),
        (1, 80, 64, 2, jnp.float32),
        (1, 128, 16, 13, jnp.float32),
    ],
)
def test_head_sizes_over_tiles_and_chunks(heads, head_dim, block_size, pages, dtype):
    """A row of two tiles, in float32 three, the last with one query; 65 cached tokens; none; one; slots of no row."""
    shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "table_pages": pages, "dtype": dtype}
    longest = min(200, block_size * pages)
    found, mine = check("kv", [longest, 65, 0, 1], [129, 71, 5, 2], [0, 0, 3, 0], slots=216, seed=1, **shape)
    assert (found.out[~mine] == 0).all() and (found.lse[~mine] == NEVER).all()
    assert (found.lse[203:208] == NEVER).all(), "a row without cached tokens"


@settings(max_examples=4)
@given(
    lengths=st.lists(st.integers(0, 144) | st.sampled_from([1, 63, 64, 65, 128, 144]), min_size=3, max_size=3),
    counts=st.lists(st.integers(0, 40) | st.sampled_from([8, 64]), min_size=3, max_size=3),
    gaps=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_any_lengths_and_any_queries(lengths, counts, gaps, seed):
    check(
        "kv", lengths, counts, gaps, heads=2, head_dim=64, block_size=16, table_pages=9, slots=200, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_few_queries_over_hidden_vectors(dtype):
    """Each is a row of decode attention; a row without cached tokens, and slots of no row."""
    shape = {"heads": 2, "head_dim": 64, "block_size": 16, "table_pages": 5}
    found, mine = check("hidden", [70, 0, 3], [4, 2, 1], [1, 0, 0], slots=9, seed=2, dtype=dtype, **shape)
    assert (found.out[~mine] == 0).all() and (found.lse[~mine] == NEVER).all()


def test_tiles_start_at_a_rows_first_query():
    """Row 1 has no cached tokens, row 2 none of its own, row 3 two tiles of 128."""
    num_queries = jnp.array([5, 0, 0, 130])
    places = gpu_kv_prefix._starts(num_queries, 8)
    tiles = gpu_kv_prefix._find_tiles(num_queries, places, tile=128, num_tiles=5)
    used = np.asarray(tiles.size) > 0
    assert places.tolist() == [0, 8, 8, 8]
    assert [np.asarray(a)[used].tolist() for a in tiles] == [[0, 3, 3], [0, 8, 136], [5, 128, 2]]


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype", "reason"),
    [
        (24, 16, jnp.bfloat16, "head_dim=24 over a cached prefix is left to XLA: it must be a multiple of 16"),
        (64, 36, jnp.bfloat16, r"block_size=36 must.*--attention-backend xla"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(head_dim, block_size, dtype, reason):
    q, pool = jnp.zeros((4, 2, head_dim)), jnp.zeros((4, block_size, 2 * head_dim), dtype)
    table, number = jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match=reason):
        gpu_kv_prefix.kv_prefix_attention(q, pool, table, table, number, number, number)
