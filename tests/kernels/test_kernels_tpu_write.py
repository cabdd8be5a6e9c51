"""The TPU kernel that writes to the cache against a scatter, interpreted on CPU; compiled for chips in `tests/aot`."""

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
from apt_jax.pallas_kernels.tpu import cache_write as tpu_cache_write
from apt_jax.pallas_kernels.tpu import scale_write as tpu_scale_write
from apt_jax.pallas_kernels.tpu.scale_read import scale_reader

WIDTH, BASE = 16, 5


def make_places(rows, *, block_size: int, slots: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Blocks of keys (or hidden vectors), of values, and offsets `[slots]` of packed rows.

    Args:
        rows: (start, tokens, hidden, empty slots before) each.
    """
    rng = np.random.default_rng(seed)
    pages = max(-(-(start + count) // block_size) for start, count, *_ in rows)
    blocks = rng.permutation(2 * len(rows) * pages).reshape(2, len(rows), pages)
    key_block, value_block, offset = (
        np.full(slots, -1),
        np.full(slots, -1),
        rng.integers(0, block_size, slots),
    )
    at = 0
    for row, (start, count, hidden, gap) in enumerate(rows):
        position = start + np.arange(count)
        mine = slice(at + gap, at + gap + count)
        key_block[mine], offset[mine] = blocks[0, row, position // block_size], position % block_size
        if not hidden:
            value_block[mine] = blocks[1, row, position // block_size]
        at += gap + count
    assert at <= slots
    return key_block, value_block, offset, blocks.size


@functools.partial(jax.jit, static_argnames=("reads_values", "options"))
def write(places, pool, keys, values, reads_values, options):
    writer = reference.cache_writer if options is None else tpu_cache_write.cache_writer
    return writer(*places, **dict(options or {}))(pool, BASE, keys, values if reads_values else None)


def check(rows, *, block_size=16, slots=96, dtype=jnp.bfloat16, seed=0, reads_values=True, width=WIDTH, **options):
    """Every number of the pool is what the scatter makes it; the pool is NaN here and there, unless it is int8."""
    *places, blocks = make_places(rows, block_size=block_size, slots=slots, seed=seed)
    rng = np.random.default_rng(seed)
    scale = 40 if dtype == jnp.int8 else 1
    pool = scale * rng.standard_normal((BASE + blocks, block_size, width), np.float32)
    if dtype != jnp.int8:
        pool[rng.random(pool.shape[:2]) < 0.3] = np.nan
    keys, values = scale * rng.standard_normal((2, slots, width), np.float32)
    arguments = [jnp.asarray(x, jnp.int32) for x in places], *(jnp.asarray(x, dtype) for x in (pool, keys, values))
    options = {"interpret": True, **options}
    found = write(*arguments, reads_values, tuple(options.items()))
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (found, write(*arguments, reads_values, None))))
    return np.asarray(found, np.float32), pool


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("block_size", [8, 16, 128])
def test_rows_of_any_length_from_anywhere_in_a_block(block_size, dtype):
    """Over tiles of 64 slots, one of them inside a row; a hidden row; a row of one token; slots of no row."""
    rows = [(3, 70, False, 2), (block_size - 1, 1, False, 0), (8, 21, True, 3), (0, 9, False, 1)]
    check(rows, block_size=block_size, slots=120, dtype=dtype)


@pytest.mark.parametrize("slots", [1, 2, 5, 64, 65])
def test_a_token_for_each_row(slots):
    check([(7 * slot % 41, 1, slot % 3 == 0, 0) for slot in range(slots)], slots=slots)


@pytest.mark.parametrize(("block_size", "slots"), [(32, 120), (128, 130)])
def test_int8(block_size, slots):
    """Tiles of 32 tokens, of which four lie in 32 bits; whole ones, and single tokens at any place."""
    rows = [(3, 70, False, 2), (31, 1, False, 0), (8, 21, True, 3), (2, 9, False, 1), (41, 1, True, 0)]
    check(rows, block_size=block_size, slots=slots, dtype=jnp.int8)
    check([(7 * slot % 41, 1, slot % 3 == 0, 0) for slot in range(5)], slots=5, block_size=32, dtype=jnp.int8)


@functools.partial(jax.jit, static_argnames=("block_size", "reads_values", "options"))
def write_scales(places, scales, keys, values, block_size, reads_values, options):
    writer = reference.scale_writer if options is None else tpu_scale_write.scale_writer
    own = writer(*places, block_size=block_size, **dict(options or {}))
    return own(scales, BASE, keys, values if reads_values else None)


def check_scales(rows, *, block_size, heads, slots, reads_values=True, **options):
    """Every scale is what the scatter makes it; the others keep what they were, NaN here and there."""
    *places, blocks = make_places(rows, block_size=block_size, slots=slots, seed=0)
    rng = np.random.default_rng(0)
    scales = rng.standard_normal((BASE + blocks, 1, -(-heads * block_size // 128) * 128), np.float32)
    scales[rng.random(scales.shape) < 0.3] = np.nan
    arguments = [jnp.asarray(x, jnp.int32) for x in places], jnp.asarray(scales), *rng.random((2, slots, heads))
    options = tuple({"interpret": True, **options}.items())
    both = (write_scales(*arguments, block_size, reads_values, own) for own in (options, None))
    np.testing.assert_array_equal(*(x[..., : heads * block_size] for x in both))  # what pads a row is nobody's


SCALED_ROWS = [(3, 70, False, 2), (31, 1, False, 0), (8, 21, True, 3), (2, 9, False, 1), (41, 1, True, 0)]


@pytest.mark.parametrize(("block_size", "heads"), [(32, 12), (64, 3), (128, 2)])
def test_scales_beside_int8_numbers(block_size, heads):
    check_scales(SCALED_ROWS, block_size=block_size, heads=heads, slots=120)


def test_scales_of_hidden_vectors_alone_and_of_no_token():
    check_scales([(5, 30, True, 0), (2, 1, True, 0)], block_size=32, heads=4, slots=32, reads_values=False)
    check_scales([(9, 0, False, 0)], block_size=32, heads=4, slots=32)


def test_more_blocks_than_the_ring_has_places():
    check_scales([(7 * slot % 41, 1, slot % 3 == 0, 0) for slot in range(70)], block_size=32, heads=4, slots=70)


@pytest.mark.parametrize(("blocks", "lanes"), [([5], 128), ([3, 3, 0, 40, 17], 384), (list(range(40, 8, -1)), 1280)])
@pytest.mark.parametrize(
    "interpret",
    [True, pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")],
)
def test_scales_are_read(blocks, lanes, interpret):
    scales = jnp.asarray(np.random.default_rng(0).standard_normal((41, 1, lanes)), jnp.float32)
    found = scale_reader(scales, jnp.asarray(blocks), interpret=interpret)
    np.testing.assert_array_equal(found, reference.scale_reader(scales, np.array(blocks)))
    if interpret is not True:
        assert not interpret_pallas_call.races.races_found


def test_no_tokens_and_no_values():
    found, pool = check([(9, 0, False, 0), (5, 0, True, 4)], slots=8)
    np.testing.assert_array_equal(found, np.asarray(jnp.asarray(pool, jnp.bfloat16), np.float32))
    check([(5, 30, True, 0), (2, 1, True, 0)], slots=32, reads_values=False)


def test_cores_take_columns():
    check([(3, 20, False, 0), (9, 1, True, 1)], slots=24, width=256, cores=2)
    check([(3, 20, False, 0), (9, 1, True, 1)], slots=24, width=128, cores=2)


@settings(max_examples=12)
@given(
    starts=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    counts=st.lists(st.integers(0, 24) | st.sampled_from([1, 8, 16]), min_size=4, max_size=4),
    hidden=st.lists(st.booleans(), min_size=4, max_size=4),
    gaps=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_any_rows(starts, counts, hidden, gaps, seed):
    rows = [*zip(starts, counts, hidden, gaps, strict=True), (95, 1, False, 0)]  # the last for one shape of the pool
    check(rows, slots=112, seed=seed)


def test_no_races_and_no_read_before_a_write():
    """Copies run late and memory starts as NaN; a buffer that is read while it is written is reported."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    rows = [(3, 70, False, 1), (8, 21, True, 0), (12, 1, False, 0)]
    check(rows, slots=96, width=128, interpret=params)
    check([(3, 70, False, 1), (12, 1, False, 0)], slots=80, width=128, block_size=32, dtype=jnp.int8, interpret=params)
    check_scales([(3, 70, False, 1), (12, 1, False, 0)], block_size=32, heads=4, slots=80, interpret=params)
    assert not interpret_pallas_call.races.races_found


def test_items_are_tiles_of_the_pool_and_end_with_a_tile_of_slots():
    places = make_places([(6, 66, False, 1), (0, 3, True, 0)], block_size=16, slots=72, seed=0)[:3]
    work = tpu_cache_write.find_work(*map(jnp.asarray, places), rows=8)
    assert work.bounds.tolist() == [0, 9, 11]
    slot, size, row = (np.asarray(x)[:11].tolist() for x in (work.slot, work.size, work.row))
    assert slot == [1, 3, 11, 19, 27, 35, 43, 51, 59, 0, 3]
    assert size == [2, 8, 8, 8, 8, 8, 8, 8, 5, 3, 3]
    assert row == [6, 8, 0, 8, 0, 8, 0, 8, 0, 5, 0]


@pytest.mark.parametrize(
    ("block_size", "width", "reason"), [(12, 128, "block_size=12 is no multiple of 8"), (16, 96, "hidden_size=96")]
)
def test_what_the_kernel_cannot_do_is_refused(block_size, width, reason):
    zeros = jnp.zeros(4, jnp.int32)
    write = tpu_cache_write.cache_writer(zeros, zeros, zeros)
    vectors = jnp.zeros((4, width))
    with pytest.raises(NotImplementedError, match=reason):
        write(jnp.zeros((2, block_size, width)), 0, vectors, vectors)
