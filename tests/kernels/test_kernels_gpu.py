"""The GPU kernels, interpreted on a CPU, against their references: memory, barriers and tensor-core products simulated.

`tests/aot/test_gpu.py` compiles the same kernels for an H200.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_jax.pallas_kernels import dispatch, reference
from apt_jax.pallas_kernels.gpu import hidden_decode as gpu_hidden_decode
from apt_jax.pallas_kernels.gpu import kv_decode as gpu_kv_decode
from apt_jax.pallas_kernels.gpu import kv_fma as gpu_kv_fma
from apt_jax.pallas_kernels.gpu import pages as gpu_pages
from apt_jax.pallas_kernels.reference import NEVER, Partial
from tests.support.gpu_interpreter import INTERPRET, interpreted
from tests.support.kernel_cases import Case, assert_close, make_case

PAGES = 5  # per table
BLOCKS = 40  # of the pool


def case_of(lengths, *, heads, head_dim, block_size, dtype=jnp.bfloat16, pages=PAGES, seed=0, blocks=BLOCKS) -> Case:
    """A case whose pool always has the same number of blocks, so that one compiled kernel serves several cases."""
    case = make_case(
        lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, table_pages=pages, seed=seed
    )
    missing = ((0, blocks - case.pool.shape[0]), (0, 0), (0, 0))
    return case._replace(pool=jnp.pad(case.pool, missing, constant_values=np.nan))


def kv_kernel(split: int):
    return interpreted(gpu_kv_decode.kv_decode_attention, split_tokens=split)


def fma_kernel(split: int | None, strides: int = 2):
    return interpreted(gpu_kv_fma.kv_decode_attention, split_tokens=split, strides_at_once=strides)


def check_kv(case: Case, kernel) -> Partial:
    args = (case.q, case.pool, case.key_or_hidden_blocks, case.value_blocks, case.length)
    found = kernel(*args)
    assert_close(found, reference.kv_decode_attention(*args), case.pool.dtype)
    return found


def check_hidden(case: Case) -> Partial:
    args = (case.q_wide, case.pool, case.key_or_hidden_blocks, case.length)
    found = interpreted(gpu_hidden_decode.hidden_decode_attention)(*args)
    assert_close(found, reference.hidden_decode_attention(*args), case.pool.dtype)
    return found


def lengths_around(block_size: int, pages: int) -> list[list[int]]:
    """Nothing, then lengths at and around the edges of blocks, chunks of 64 tokens and the table."""
    S = block_size
    return [[0, 1, S * pages], [0, S + 1, min(65, S * pages - 1)]]


# 64-wide heads in groups of 4, 80-wide in groups of 4, 128-wide in groups of 2; blocks shorter and longer than a chunk
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "pages", "split"),
    [(4, 64, 16, 9, 64), (4, 80, 8, 5, 512), (2, 128, 128, 2, 512)],
)
def test_kv_kernel_matches_its_reference(heads, head_dim, block_size, pages, split):
    """The first shape cuts the context into splits of one chunk, to be merged."""
    for seed, lengths in enumerate(lengths_around(block_size, pages)):
        shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "pages": pages}
        found = check_kv(case_of(lengths, seed=seed, **shape), kv_kernel(split))
        assert (found.out[0] == 0).all() and (found.lse[0] == NEVER).all()


# three heads are padded to eight; a block of 128 tokens holds two tiles of the first pass, three blocks make two splits
# of the second
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "pages", "dtype"),
    [
        (4, 64, 16, 9, jnp.bfloat16),
        (3, 64, 8, 5, jnp.bfloat16),
        (1, 64, 128, 3, jnp.bfloat16),
        (2, 64, 16, 5, jnp.float32),
    ],
)
def test_hidden_kernel_matches_its_reference(heads, head_dim, block_size, pages, dtype):
    for seed, lengths in enumerate(lengths_around(block_size, pages)):
        shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "pages": pages, "dtype": dtype}
        found = check_hidden(case_of(lengths, seed=seed, **shape))
        assert (found.out[0] == 0).all() and (found.lse[0] == NEVER).all()


def test_a_large_score_in_one_chunk_outweighs_the_others():
    """Chunk maxima differ by 40, so weights relative to them must be rescaled."""
    case = case_of([70, 80, 3], heads=4, head_dim=64, block_size=16, pages=9)
    row, page, inside = 1, 4, 3  # position 67
    vector = jnp.sign(case.q[row].reshape(-1).astype(jnp.float32)) * 8
    key_block = case.key_or_hidden_blocks[row, page]
    large = case._replace(pool=case.pool.at[key_block, inside].set(vector.astype(case.pool.dtype)))
    check_kv(large, kv_kernel(64))
    check_kv(large, fma_kernel(None))
    vector = case.q_wide[row].astype(jnp.float32).sum(0)
    vector = vector * 40 / jnp.abs(case.q_wide[row].astype(jnp.float32) @ vector).max()
    check_hidden(case._replace(pool=case.pool.at[key_block, inside].set(vector.astype(case.pool.dtype))))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_kv_without_tensor_cores_for_any_shape(data):
    """A stride is 1 to 8 tokens; more strides than one block, splits that end inside the table, rows without tokens."""
    heads = data.draw(st.sampled_from([4, 12, 20, 32]), "heads")
    block_size = data.draw(st.sampled_from([8, 16, 24]), "block_size")
    head_dim = data.draw(st.sampled_from([16, 32, 48]), "head_dim")
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.bfloat16]), "dtype")
    edges = [0, 1, block_size - 1, block_size, block_size + 1, 2 * block_size]
    lengths = data.draw(st.lists(st.sampled_from(edges), min_size=2, max_size=2), "lengths")
    longest = data.draw(st.integers(3 * block_size, 4 * block_size), "longest")
    split = data.draw(st.sampled_from([None, block_size]), "split")
    strides = data.draw(st.integers(1, 2), "strides_at_once")
    shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    case = case_of([*lengths, longest], pages=5, **shape)
    found = check_kv(case, fma_kernel(split, strides))
    empty = np.asarray(case.length) == 0
    assert (np.asarray(found.out)[empty] == 0).all() and (np.asarray(found.lse)[empty] == NEVER).all()


@settings(max_examples=2, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 80), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_kernels_for_any_lengths_in_any_blocks(lengths, seed):
    """Compiled once, for the shape of a test above: lengths, tables and what lies in unused blocks vary."""
    check_kv(case_of(lengths, heads=4, head_dim=64, block_size=16, pages=9, seed=seed), kv_kernel(64))
    check_hidden(case_of(lengths, heads=2, head_dim=64, block_size=16, pages=5, seed=seed, dtype=jnp.float32))


def test_float32_is_the_sum_of_three_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(4096) * 10.0 ** np.arange(-8, 8).repeat(256), jnp.float32)
    parts = gpu_pages.split_float32(x)
    assert {part.dtype for part in parts} == {jnp.dtype(jnp.bfloat16)}
    total = sum(np.asarray(part, np.float64) for part in parts)
    assert (np.abs(total - np.asarray(x, np.float64)) <= np.abs(x) * 2.0**-23).all()


def test_float32_keys_and_values_go_to_the_kernel_without_tensor_cores(monkeypatch):
    monkeypatch.setattr(gpu_kv_fma, "kv_decode_attention", lambda *args, **options: (args, options))
    args = make_case([9, 0], heads=4, head_dim=16, block_size=8)
    args = (args.q, args.pool, args.key_or_hidden_blocks, args.value_blocks, args.length)
    assert gpu_kv_decode.kv_decode_attention(*args, interpret=INTERPRET) == (args, {"interpret": INTERPRET})


@pytest.mark.parametrize("kernel", [gpu_kv_decode, gpu_kv_fma, gpu_hidden_decode])
def test_what_the_kernels_cannot_read_is_refused_with_a_cure(kernel):
    table, length, pool = jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32), jnp.zeros((4, 36, 192), jnp.bfloat16)
    if kernel is gpu_hidden_decode:
        refused = functools.partial(kernel.hidden_decode_attention, jnp.zeros((1, 3, 192)), pool, table, length)
    else:
        refused = functools.partial(kernel.kv_decode_attention, jnp.zeros((1, 3, 64)), pool, table, table, length)
    with pytest.raises(NotImplementedError, match=r"block_size=36 must.*--attention-backend xla"):
        refused()


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0"])
def test_every_generation_of_gpus_gets_what_it_can_run(capability):
    kernels = dispatch.gpu_kernels(capability)
    if capability == "9.0":
        assert kernels.kv_decode is gpu_kv_decode.kv_decode_attention
        assert kernels.hidden_decode is gpu_hidden_decode.hidden_decode_attention
        assert kernels.kv_prefix is not None and kernels.hidden_prefix is not None
    else:
        assert isinstance(kernels.kv_decode, functools.partial) and kernels.hidden_decode is None
        assert kernels.kv_prefix is kernels.hidden_prefix is None
        assert kernels.kv_decode.func is gpu_kv_fma.kv_decode_attention
        assert kernels.kv_decode.keywords == {"strides_at_once": 2 if capability == "10.0" else 1}


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_an_older_gpu_is_refused(capability):
    with pytest.raises(NotImplementedError, match=f"{capability}.*8.0"):
        dispatch.gpu_kernels(capability)


def test_heads_that_do_not_group_are_refused():
    with pytest.raises(NotImplementedError, match="num_heads=3 of head_dim=8"):
        gpu_kv_decode.heads_in_group(3, 8)


@pytest.mark.parametrize(
    ("heads", "head_dim", "group"),
    [(12, 64, 4), (16, 64, 4), (32, 64, 4), (32, 80, 4), (32, 128, 2), (40, 128, 2), (56, 128, 2), (72, 128, 2)],
)
def test_every_opt_size_groups_into_about_256_columns(heads, head_dim, group):
    assert gpu_kv_decode.heads_in_group(heads, head_dim) == group


@pytest.mark.parametrize(
    ("pages", "block_size", "longest", "split"),
    [(128, 16, 512, 512), (2, 16, 512, 64), (9, 128, 512, 512), (3, 512, 256, 512)],
)
def test_splits_are_whole_chunks_and_blocks(pages, block_size, longest, split):
    assert gpu_pages.split_tokens(pages, block_size, longest) == split
