"""The GPU kernels over int8 pools, interpreted on a CPU, against their references; `tests/aot` compiles them."""

import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.reference import NEVER
from tests.support import gpu_int8
from tests.support.gpu_interpreter import interpreted
from tests.support.kernel_cases import assert_close, coded, make_case, prefix_arguments


@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [(4, 64, 64), (4, 80, 64), (2, 128, 128)])
def test_kv_decode(heads, head_dim, block_size):
    """Several splits; columns of 80-wide heads lie in tiles of two heads; half a block; no token; NaN beyond them."""
    case = make_case([0, 1, 200, 65], heads=heads, head_dim=head_dim, block_size=block_size, dtype=jnp.bfloat16)
    codes, scales = coded(case.pool, heads, heads)
    rest = case.key_or_hidden_blocks, case.value_blocks, case.length
    found = interpreted(gpu_int8.kv_decode_attention)(case.q, codes, scales, *rest)
    assert_close(found, reference.kv_decode_attention(case.q, codes, *rest, scales=scales), jnp.bfloat16)
    assert (np.asarray(found.out[0]) == 0).all() and (np.asarray(found.lse[0]) == NEVER).all()


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "dtype", "split", "tiles"),
    [
        (3, 64, 32, jnp.bfloat16, None, 1), (2, 32, 64, jnp.float32, 64, 2), (4, 32, 96, jnp.bfloat16, 96, 1),
    ],
)  # fmt: skip
def test_kv_decode_without_tensor_cores(heads, head_dim, block_size, dtype, split, tiles):
    """One split and several, that end inside the table; half a tile; no token; NaN in the scales beyond lengths."""
    for seed, lengths in enumerate([[0, 1, 200, 65], [32, 33, 191, 64]]):
        case = make_case(lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, seed=seed)
        codes, scales = coded(case.pool, heads, heads)
        assert jnp.isnan(scales).any()
        rest = case.key_or_hidden_blocks, case.value_blocks, case.length
        found = interpreted(gpu_int8.kv_fma_attention, split=split, tiles=tiles)(case.q, codes, scales, *rest)
        assert_close(found, reference.kv_decode_attention(case.q, codes, *rest, scales=scales), dtype)
        empty = np.asarray(case.length) == 0
        assert (np.asarray(found.out)[empty] == 0).all() and (np.asarray(found.lse)[empty] == NEVER).all()


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (80, 32)])
def test_what_the_kernel_without_tensor_cores_cannot_do_is_refused(head_dim, block_size):
    case = make_case([3], heads=2, head_dim=head_dim, block_size=block_size, dtype=jnp.bfloat16)
    codes, scales = coded(case.pool, 2, 2)
    rest = case.key_or_hidden_blocks, case.value_blocks, case.length
    with pytest.raises(NotImplementedError, match=r"multiple of 32, and head_dim=.* of 32; set --block-size 32, or"):
        gpu_int8.kv_fma_attention(case.q, codes, scales, *rest, split=None, tiles=1, interpret=None)


@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [(3, 64, 64), (2, 64, 128)])
def test_hidden_decode(heads, head_dim, block_size):
    """Three heads are padded to eight; a block of 128 tokens is two chunks."""
    case = make_case([0, 1, 200, 65], heads=heads, head_dim=head_dim, block_size=block_size, dtype=jnp.bfloat16)
    codes, scales = coded(case.pool, 1, heads)
    rest = case.key_or_hidden_blocks, case.length
    found = interpreted(gpu_int8.hidden_decode_attention)(case.q_wide, codes, scales, *rest)
    assert_close(found, reference.hidden_decode_attention(case.q_wide, codes, *rest, scales=scales), jnp.bfloat16)


# heads of 80 lie in tiles that are too narrow for int8 pages, which stay as they are
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "pages"), [(2, 64, 64, 4), (2, 80, 64, 2), (1, 128, 128, 2)]
)
def test_kv_prefix(heads, head_dim, block_size, pages):
    """A row of two tiles, the last with one query; 65 cached tokens; none; one; slots of no row."""
    longest = min(200, block_size * pages)
    (query, pool, *rest), _ = prefix_arguments(
        "kv", [longest, 65, 0, 1], [129, 71, 5, 2], [0, 0, 3, 0], heads=heads, head_dim=head_dim, dtype=jnp.bfloat16,
        block_size=block_size, table_pages=pages, slots=216, seed=1,
    )  # fmt: skip
    codes, scales = coded(pool, heads, heads)
    found = interpreted(gpu_int8.kv_prefix_attention)(query, codes, scales, *rest)
    expected = reference.kv_prefix_attention(jnp.nan_to_num(query), codes, *rest, scales=scales)
    assert_close(found, expected, jnp.bfloat16)


def test_few_queries_over_hidden_vectors():
    """Each is a row of decode attention."""
    (query, pool, *rest), _ = prefix_arguments(
        "hidden", [70, 0, 3], [4, 2, 1], [1, 0, 0], heads=2, head_dim=64, dtype=jnp.bfloat16, block_size=64,
        table_pages=2, slots=9, seed=2,
    )  # fmt: skip
    codes, scales = coded(pool, 1, 2)
    found = interpreted(gpu_int8.hidden_prefix_attention)(query, codes, scales, *rest)
    expected = reference.hidden_prefix_attention(jnp.nan_to_num(query), codes, *rest, scales=scales)
    assert_close(found, expected, jnp.bfloat16)


@pytest.mark.parametrize(
    ("block_size", "dtype", "reason"),
    [(32, jnp.bfloat16, "set --block-size 64"), (64, jnp.float32, "queries of float32")],
)
def test_what_the_kernels_cannot_do_is_refused(block_size, dtype, reason):
    case = make_case([3], heads=2, head_dim=64, block_size=block_size, dtype=dtype)
    codes, scales = coded(case.pool, 2, 2)
    with pytest.raises(NotImplementedError, match=reason):
        gpu_int8.kv_decode_attention(
            case.q, codes, scales, case.key_or_hidden_blocks, case.value_blocks, case.length, interpret=None
        )
