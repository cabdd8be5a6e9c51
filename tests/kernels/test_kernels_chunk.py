"""Attention of packed chunks among their own tokens: the reference, XLA's tiles, splash attention (interpreted), cuDNN.

cuDNN runs on GPUs only; `tests/aot/test_gpu_steps.py` sees that XLA calls it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.attention import paged as attention
from apt_jax.batching.arrays import Tokens
from apt_jax.pallas_kernels import reference
from apt_jax.pallas_kernels.dispatch import REFERENCES, check_chunk
from apt_jax.pallas_kernels.gpu import chunk as gpu_chunk
from apt_jax.pallas_kernels.reference import Partial
from apt_jax.pallas_kernels.tpu import chunk as tpu_chunk

N, H = 2, 8
# interpreted kernels run for milliseconds and compile for seconds
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def case(counts: list[int], slots: int, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """Queries, keys and values of rows with `counts` tokens, then slots of no row (number `len(counts)`)."""
    row = np.append(np.repeat(np.arange(len(counts)), counts), np.full(slots - sum(counts), len(counts)))
    keys = jax.random.split(jax.random.key(0), 3)
    return *(jax.random.normal(key, (slots, N, H), dtype) for key in keys), jnp.asarray(row, jnp.int32)


def by_hand(q, k, v, row) -> Partial:
    q, k, v, row = *(np.asarray(x, np.float64) for x in (q, k, v)), np.asarray(row)
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    for t in range(len(row)):
        seen = np.flatnonzero(row[: t + 1] == row[t])
        scores = np.einsum("NH,CNH->NC", q[t], k[seen])
        lse[t] = np.log(np.exp(scores).sum(-1))
        out[t] = np.einsum("NC,CNH->NH", np.exp(scores - lse[t][:, None]), v[seen])
    return Partial(out, lse)


@jit
def splash(q, k, v, row) -> Partial:
    return tpu_chunk.chunk_attention(q, k, v, row, interpret=True)


@jit
def xla(q, k, v, row) -> Partial:
    return attention.causal_tiles(q, k, v, Tokens(row, row, row, jnp.arange(len(row))))


@pytest.mark.parametrize(
    ("attend", "counts", "slots"),
    [
        (jit(reference.chunk_attention), [5, 1, 130], 150),
        (xla, [5, 1, 130], 256),
        (xla, [7, 2], 20),
        (splash, [5, 1, 131], 256),
        (splash, [7, 2], 20),
    ],
    ids=["reference", "XLA in tiles", "XLA in one tile", "splash in blocks", "splash with padding"],
)
def test_each_token_sees_its_own_row_up_to_itself(attend, counts, slots):
    args = case(counts, slots)
    expected, found, real = by_hand(*args), attend(*args), sum(counts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.float32 and ours.shape == theirs.shape
        np.testing.assert_allclose(ours[:real], theirs[:real], atol=1e-5)


def test_splash_in_bfloat16():
    args = case([9, 3], 16, jnp.bfloat16)
    found, expected = splash(*args), reference.chunk_attention(*args)
    np.testing.assert_allclose(found.out[:12], expected.out[:12], atol=2e-2)
    np.testing.assert_allclose(found.lse[:12], expected.lse[:12], atol=1e-3)


def test_cudnn_refuses_float32_with_a_reason_and_the_engine_hears_it():
    found = check_chunk(REFERENCES._replace(chunk=gpu_chunk.chunk_attention), heads=N, head_dim=H, dtype=jnp.float32)
    assert found is not None and found.startswith("chunk failed: ")
