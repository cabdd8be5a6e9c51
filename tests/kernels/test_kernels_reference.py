"""The references of the decode kernels against the engine's own XLA attention, and against plain softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.attention import paged as attention
from apt_jax.attention.absorption import absorb_query, absorbed_values, key_bias_score
from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import Rows
from apt_jax.cache import CacheKind
from apt_jax.model_config import ModelConfig
from apt_jax.models.linear import AttentionProjections
from apt_jax.pallas_kernels.reference import (
    NEVER,
    Partial,
    hidden_decode_attention,
    hidden_prefix_attention,
    kv_decode_attention,
    kv_prefix_attention,
    merge,
)
from tests.support.kernel_cases import Case, assert_close, make_case

N, H, S = 3, 8, 16
LENGTHS = [0, 1, 15, 16, 17, 200]
CONFIG = ModelConfig(hidden_size=N * H, num_attention_heads=N, num_hidden_layers=1)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(LENGTHS, heads=N, head_dim=H, block_size=S, table_pages=16)


@pytest.fixture(scope="module")
def projections() -> AttentionProjections:
    """Projections with biases that matter."""
    made = AttentionProjections(CONFIG.hidden_size, N, H, dtype=jnp.float32, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 4)
    for key, projection in zip(keys, (made.k_proj, made.v_proj), strict=False):
        assert projection.bias is not None
        projection.bias[...] = jax.random.normal(key, projection.bias.shape)
        projection.kernel[...] = jax.random.normal(key, projection.kernel.shape) * 0.3
    return made


def rows_of(case: Case, kinds: list[CacheKind]) -> Rows:
    number = jnp.zeros_like(case.length)
    kind = jnp.array([kind.index for kind in kinds])
    return Rows(*(number,) * 6, kind, (case.key_or_hidden_blocks, case.value_blocks))


def test_kv_reference_is_softmax_row_by_row(case):
    found = kv_decode_attention(case.q, case.pool, case.key_or_hidden_blocks, case.value_blocks, case.length)
    pool = np.asarray(case.pool, np.float64)
    for r, length in enumerate(LENGTHS):
        if not length:
            assert (found.out[r] == 0).all() and (found.lse[r] == NEVER).all()
            continue
        keys = pool[case.key_or_hidden_blocks[r]].reshape(-1, N, H)[:length]
        values = pool[case.value_blocks[r]].reshape(-1, N, H)[:length]
        for n in range(N):
            weights = np.exp(keys[:, n] @ np.asarray(case.q[r, n], np.float64))
            np.testing.assert_allclose(found.lse[r, n], np.log(weights.sum()), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.out[r, n], weights @ values[:, n] / weights.sum(), rtol=1e-4, atol=1e-6)


def test_hidden_reference_is_the_kv_reference_of_wide_heads(case):
    """A query laid out block-diagonally gives the KV scores; the diagonal blocks of the context are the KV output."""
    wide = jnp.einsum("RNH,NM->RNMH", case.q, jnp.eye(N)).reshape(len(LENGTHS), N, N * H)
    found = hidden_decode_attention(wide, case.pool, case.key_or_hidden_blocks, case.length)
    diagonal = jnp.einsum("RNNH->RNH", found.out.reshape(-1, N, N, H))
    expected = kv_decode_attention(case.q, case.pool, case.key_or_hidden_blocks, case.key_or_hidden_blocks, case.length)
    assert_close(Partial(diagonal, found.lse), expected, jnp.float32)


@pytest.mark.parametrize("kind", CacheKind)
def test_references_agree_with_the_engines_attention(case, projections, kind):
    rows = rows_of(case, [kind] * len(LENGTHS))
    pool = Pool(case.pool)
    channels = pool.channels_of(jnp.int32(0))
    engine = attention._decode(projections.kv, case.q, pool, channels, rows, KindMix((kind,)), case.length)
    if kind is CacheKind.HIDDEN:
        wide = absorb_query(projections.kv, case.q)
        part = hidden_decode_attention(wide, case.pool, case.key_or_hidden_blocks, case.length)
        found = absorbed_values(projections.kv, part.out)
        found = jnp.where((case.length > 0)[:, None, None], found, 0)  # a row without tokens has no value bias either
    else:
        found = kv_decode_attention(case.q, case.pool, case.key_or_hidden_blocks, case.value_blocks, case.length).out
    np.testing.assert_allclose(found, engine, rtol=1e-4, atol=1e-5)


def test_a_context_that_is_part_kv_and_part_hidden_merges_to_the_whole(projections):
    """Projected keys and values of 37 tokens: attention over all of them, or 21 as KV and 16 as hidden vectors."""
    h = jax.random.normal(jax.random.key(5), (37, N * H))
    q = jax.random.normal(jax.random.key(6), (1, N, H)) * H**-0.5
    k, v = projections.k_proj(h).reshape(37, -1), projections.v_proj(h).reshape(37, -1)

    def pages(vectors: jax.Array) -> jax.Array:
        return jnp.pad(vectors, ((0, 48 - len(vectors)), (0, 0)), constant_values=jnp.nan).reshape(3, S, -1)

    pool = jnp.concatenate([pages(k), pages(v), pages(h[21:])])
    table = jnp.arange(3)[None]
    whole = kv_decode_attention(q, pool, table, table + 3, jnp.array([37]))
    kv_part = kv_decode_attention(q, pool, table, table + 3, jnp.array([21]))
    part = hidden_decode_attention(absorb_query(projections.kv, q), pool, table + 6, jnp.array([16]))
    hidden_part = Partial(absorbed_values(projections.kv, part.out), part.lse + key_bias_score(projections.kv, q))
    assert_close(merge(kv_part, hidden_part), whole, jnp.float32)
    without_bias = merge(kv_part, Partial(hidden_part.out, part.lse))
    assert np.abs(without_bias.out - whole.out).max() > 1e-2, "the bias of the keys does not matter in this test"


def test_merging_with_nothing_changes_nothing(case):
    part = kv_decode_attention(case.q, case.pool, case.key_or_hidden_blocks, case.value_blocks, case.length)
    nothing = Partial(jnp.zeros_like(part.out), jnp.full_like(part.lse, NEVER))
    merged = merge(merge(nothing, part), nothing)
    some = np.asarray(case.length) > 0
    np.testing.assert_allclose(merged.out[some], part.out[some], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(merged.lse[some], part.lse[some], rtol=1e-6)


def test_prefix_references_are_decode_attention_query_by_query(case):
    """Rows' queries in any order, with slots of no row between them, and a row whose cache is empty."""
    first, count = jnp.array([0, 11, 3, 4, 9, 6]), jnp.array([2, 3, 1, 2, 1, 3])
    row_of = {slot: r for r in range(len(LENGTHS)) for slot in range(int(first[r]), int(first[r] + count[r]))}
    q = jax.random.normal(jax.random.key(0), (16, N, H))
    wide = jax.random.normal(jax.random.key(1), (16, N, N * H))
    tables = case.key_or_hidden_blocks, case.value_blocks
    rows = [jnp.array([row_of.get(slot, 0)]) for slot in range(16)]
    found = [
        kv_prefix_attention(q, case.pool, *tables, case.length, first, count),
        hidden_prefix_attention(wide, case.pool, tables[0], case.length, first, count),
    ]
    for slot, row in enumerate(rows):
        length = case.length[row] * (slot in row_of)
        one = slice(slot, slot + 1)
        expected = [
            kv_decode_attention(q[one], case.pool, *(table[row] for table in tables), length),
            hidden_decode_attention(wide[one], case.pool, tables[0][row], length),
        ]
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(Partial(ours.out[one], ours.lse[one]), theirs, jnp.float32)
    assert (found[0].lse[jnp.array([2, 14, 0])] == NEVER).all(), "no row, no row, and a row without cached tokens"
