"""The TPU decode kernels against their references, interpreted on the CPU. Compiled for real chips: `tests/aot`."""

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
from apt_jax.pallas_kernels.tpu import hidden_decode as tpu_hidden_decode
from apt_jax.pallas_kernels.tpu import kv_decode as tpu_kv_decode
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from tests.support.kernel_cases import Case, assert_close, make_case

CHUNK = 32


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Several chunks for contexts of a hundred tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_paging, "MAX_CHUNK_TOKENS", CHUNK)
        yield


# interpreted kernels run for milliseconds and compile for seconds
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
reference_kv = jax.jit(reference.kv_decode_attention)
reference_hidden = jax.jit(reference.hidden_decode_attention)


@functools.partial(jax.jit, static_argnames=("cores", "out_dtype"), compiler_options=QUICK)
def hidden_kernel(*args, **options) -> Partial:
    return tpu_hidden_decode.hidden_decode_attention(*args, **options, interpret=True)


@functools.partial(jax.jit, static_argnames="cores", compiler_options=QUICK)
def kv_kernel(*args, **options) -> Partial:
    return tpu_kv_decode.kv_decode_attention(*args, **options, interpret=True)


def check_kv(case: Case, kernel=kv_kernel, **options) -> None:
    args = case.pool, case.key_or_hidden_blocks, case.value_blocks, case.length
    q = case.q.astype(case.pool.dtype)
    assert_close(kernel(q, *args, **options), reference_kv(q, *args), case.pool.dtype)


def check_hidden(case: Case, kernel=hidden_kernel, **options) -> None:
    args = case.q_wide, case.pool, case.key_or_hidden_blocks, case.length
    assert_close(kernel(*args, **options), reference_hidden(*args), case.pool.dtype)


CHECKS = pytest.mark.parametrize("check", [check_kv, check_hidden], ids=["kv", "hidden"])


@CHECKS
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [(12, 64, jnp.float32), (12, 64, jnp.bfloat16), (32, 80, jnp.float32)],
    ids=["125M-float32", "125M-bfloat16", "2.7B-float32"],
)
def test_opt_shapes_at_the_edges_of_blocks_and_chunks(check, heads, head_dim, dtype):
    lengths = [1, 0, 15, 16, 17, CHUNK - 1, 0, CHUNK, CHUNK + 1, 0, 100]
    check(make_case(lengths, heads=heads, head_dim=head_dim, block_size=16, dtype=dtype))


@CHECKS
@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 96) | st.sampled_from([1, 8, 16, 31, 32, 33, 64, 96]), min_size=5, max_size=5),
    shape=st.sampled_from([(3, 8, 8, jnp.float32), (9, 16, 16, jnp.float32), (9, 16, 16, jnp.bfloat16)]),
    seed=st.integers(0, 2**31),
)
def test_any_lengths_in_any_block_order(check, lengths, shape, seed):
    heads, head_dim, block_size, dtype = shape
    check(
        make_case(
            lengths, heads=heads, head_dim=head_dim, block_size=block_size, table_pages=96 // block_size, seed=seed,
            dtype=dtype, num_blocks=200,
        )
    )  # fmt: skip


@CHECKS
@pytest.mark.parametrize(
    "lengths", [[0, 0, 0, 0], [0, 0, 7, 0], [1, 500, 3, 2], [40, 0, 41, 42]], ids=["none", "one", "one long", "three"]
)
def test_rows_are_shared_among_two_cores(check, lengths):
    """None, one or both have rows, and their numbers of steps differ. All four share one program."""
    check(make_case(lengths, heads=3, head_dim=8, block_size=16, table_pages=32, num_blocks=80), cores=2)


@CHECKS
def test_blocks_larger_than_a_chunk(check):
    check(make_case([1, 63, 65, 130], heads=3, head_dim=8, block_size=64))


@CHECKS
def test_one_row(check):
    check(make_case([70], heads=3, head_dim=8, block_size=8), cores=2)


def bfloat16_case(**options) -> Case:
    """Of a shape that is compiled already."""
    lengths = [90, 0, 31, 1, 64]
    return make_case(
        lengths, heads=9, head_dim=16, block_size=16, dtype=jnp.bfloat16, table_pages=6, num_blocks=200, **options
    )


def test_a_float32_query_over_a_bfloat16_pool_keeps_its_precision():
    """The reference multiplies in float32; a query rounded to bfloat16 is a hundred times farther off in the scores."""
    case = bfloat16_case(query_dtype=jnp.float32)
    exact = reference_hidden(case.q_wide, case.pool, case.key_or_hidden_blocks, case.length)

    def error_of_lse(query_dtype) -> float:
        found = hidden_kernel(case.q_wide.astype(query_dtype), case.pool, case.key_or_hidden_blocks, case.length)
        return float(jnp.abs(found.lse - exact.lse).max())

    assert error_of_lse(jnp.float32) < 1e-5 < 0.03 * error_of_lse(jnp.bfloat16)


def test_output_in_bfloat16():
    case = bfloat16_case()
    found = hidden_kernel(case.q_wide, case.pool, case.key_or_hidden_blocks, case.length, out_dtype=jnp.bfloat16)
    assert found.out.dtype == jnp.bfloat16
    expected = reference_hidden(case.q_wide, case.pool, case.key_or_hidden_blocks, case.length)
    assert_close(Partial(found.out.astype(jnp.float32), found.lse), expected, jnp.bfloat16)
    assert (found.out[1] == 0).all() and (found.lse[1] == NEVER).all()


@CHECKS
def test_no_races_and_no_read_before_a_write(check):
    """Copies run late and memory starts as NaN; a buffer that is read while it is written is reported."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")

    def kernel(*args, **options) -> Partial:
        module = tpu_kv_decode if check is check_kv else tpu_hidden_decode
        name = "kv_decode_attention" if check is check_kv else "hidden_decode_attention"
        return getattr(module, name)(*args, **options, interpret=params)

    check(make_case([0, 70, 17, 0, 33], heads=3, head_dim=8, block_size=8), kernel=kernel)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("width", "block_size", "itemsize", "sources", "tokens"),
    [(768, 16, 2, 2, 32), (9216, 16, 2, 2, 32), (9216, 16, 4, 2, 32), (9216, 128, 4, 2, 128), (768, 128, 2, 1, 128)],
)
def test_a_chunk_is_whole_blocks(width, block_size, itemsize, sources, tokens):
    assert tpu_paging.chunk_tokens(width, block_size, itemsize, sources) == tokens


def test_chunks_fill_the_buffers_and_no_more(monkeypatch):
    monkeypatch.setattr(tpu_paging, "MAX_CHUNK_TOKENS", 256)
    found = {
        (width, sources): tpu_paging.chunk_tokens(width, 16, 2, sources)
        for width in (768, 5120, 9216)
        for sources in (1, 2)
    }
    assert found == {(768, 1): 256, (768, 2): 256, (5120, 1): 256, (5120, 2): 128, (9216, 1): 128, (9216, 2): 64}
    assert all(2 * s * t * w * 2 <= tpu_paging.BUFFER_BYTES for (w, s), t in found.items())


def test_rows_without_tokens_are_not_visited():
    row_order = tpu_paging.order_rows(jnp.array([0, 5, 0, 9, 0]))
    np.testing.assert_array_equal(row_order.order[:2], [3, 1])
    assert row_order.num_rows[0] == 2
    assert tpu_paging.grid(row_order, cores=1)[1] == 2 and tpu_paging.grid(row_order, cores=2)[1] == 1
