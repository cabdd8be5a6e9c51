"""The GPU kernels, interpreted on a CPU, against their references: memory, barriers and tensor-core products simulated.

`tests/aot/test_gpu.py` compiles the same kernels for an H200.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import Case, assert_close, make_case

from pallas_kernels import gpu_hidden_decode, gpu_kv_decode, gpu_pages, reference
from pallas_kernels.reference import NEVER, Partial

# a slot that is overwritten before it was read, or read before it was written, is a race
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
PAGES = 5  # per table
BLOCKS = 40  # of the pool


def case_of(lengths, *, heads, head_dim, block_size, dtype=jnp.bfloat16, pages=PAGES, seed=0, blocks=BLOCKS) -> Case:
    """A case whose pool always has the same number of blocks, so that one compiled kernel serves several cases."""
    case = make_case(
        lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, table_pages=pages, seed=seed
    )
    missing = ((0, blocks - case.pool.shape[0]), (0, 0), (0, 0))
    return case._replace(pool=jnp.pad(case.pool, missing, constant_values=np.nan))


@functools.cache
def kv_kernel(split: int):
    return jax.jit(functools.partial(gpu_kv_decode.kv_decode_attention, split_tokens=split, interpret=INTERPRET))


@functools.cache
def hidden_kernel():
    return jax.jit(functools.partial(gpu_hidden_decode.hidden_decode_attention, interpret=INTERPRET))


def check_kv(case: Case, split: int) -> Partial:
    args = (case.q, case.pool, case.first_blocks, case.second_blocks, case.length)
    found = jax.block_until_ready(kv_kernel(split)(*args))
    assert not gpu_callbacks.get_races().races_found
    assert_close(found, reference.kv_decode_attention(*args), jnp.bfloat16)
    return found


def check_hidden(case: Case) -> Partial:
    args = (case.q_wide, case.pool, case.first_blocks, case.length)
    found = jax.block_until_ready(hidden_kernel()(*args))
    assert not gpu_callbacks.get_races().races_found
    assert_close(found, reference.hidden_decode_attention(*args), jnp.bfloat16)
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
        found = check_kv(case_of(lengths, seed=seed, **shape), split)
        assert (found.out[0] == 0).all() and (found.lse[0] == NEVER).all()


# three heads are padded to eight; blocks of 512 tokens hold several tiles of the first pass, and make two splits of the
# second
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "pages"), [(4, 64, 16, 9), (3, 64, 8, 5), (1, 64, 512, 2)])
def test_hidden_kernel_matches_its_reference(heads, head_dim, block_size, pages):
    for seed, lengths in enumerate(lengths_around(block_size, pages)):
        shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "pages": pages}
        found = check_hidden(case_of(lengths, seed=seed, **shape))
        assert (found.out[0] == 0).all() and (found.lse[0] == NEVER).all()


def test_a_large_score_in_one_chunk_outweighs_the_others():
    """Chunk maxima differ by 40, so weights relative to them must be rescaled."""
    case = case_of([70, 80, 3], heads=4, head_dim=64, block_size=16, pages=9)
    row, page, inside = 1, 4, 3  # position 67
    vector = jnp.sign(case.q[row].reshape(-1).astype(jnp.float32)) * 8
    key_block = case.first_blocks[row, page]
    check_kv(case._replace(pool=case.pool.at[key_block, inside].set(vector.astype(case.pool.dtype))), split=64)
    vector = case.q_wide[row].astype(jnp.float32).sum(0)
    vector = vector * 40 / jnp.abs(case.q_wide[row].astype(jnp.float32) @ vector).max()
    check_hidden(case._replace(pool=case.pool.at[key_block, inside].set(vector.astype(case.pool.dtype))))


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (jnp.zeros((4, 16, 256), jnp.float32), "float32"),
        (jnp.zeros((4, 24, 256), jnp.bfloat16), "block_size=24"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused_with_a_cure(pool, message):
    table, length = jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match=f"{message}.*--attention-backend xla"):
        gpu_kv_decode.kv_decode_attention(jnp.zeros((1, 4, 64)), pool, table, table, length)
    with pytest.raises(NotImplementedError, match=f"{message}.*--attention-backend xla"):
        gpu_hidden_decode.hidden_decode_attention(jnp.zeros((1, 4, 256)), pool, table, length)


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
