"""Prefill chunks over cached prefixes by kernels (here their references) against the engine's XLA attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.attention import paged as attention
from apt_jax.attention import prefix as prefix_attention
from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.attention.prefix import absorbing_is_cheaper
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import MODE_KINDS, CacheKind
from apt_jax.model_config import ModelConfig
from apt_jax.models.linear import AttentionProjections
from apt_jax.pallas_kernels.dispatch import REFERENCES

N, H, S, W = 2, 8, 8, 32
D = N * H
CONFIG = ModelConfig(hidden_size=D, num_attention_heads=N, num_hidden_layers=1)
# cached tokens, tokens of the chunk, hidden: both kinds with few and with many queries, decodes, fresh prompts, nothing
ROWS = [
    (90, 40, False), (250, 3, True), (0, 20, True), (100, 30, True), (8, 1, True), (0, 5, False),
    (17, 2, False), (9, 25, True), (200, 4, True), (0, 0, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def projections() -> AttentionProjections:
    """Projections with biases that matter."""
    made = AttentionProjections(CONFIG.hidden_size, N, H, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for key, projection in zip(jax.random.split(jax.random.key(1)), (made.k_proj, made.v_proj), strict=True):
        assert projection.bias is not None
        projection.bias[...] = jax.random.normal(key, projection.bias.shape)
        projection.kernel[...] = jax.random.normal(key, projection.kernel.shape) * 0.3
    return made


def batch(slots: int) -> tuple[Tokens, Rows]:
    """`ROWS` packed into token slots, tables of shuffled blocks."""
    start, length, hidden = (np.array(column) for column in zip(*ROWS, strict=True))
    R = len(ROWS)
    row = np.repeat(np.arange(R), length)
    position = np.concatenate([np.arange(s, s + n) for s, n in zip(start, length, strict=True)])
    padding = slots - len(row)
    assert padding > 0
    last = np.maximum(np.cumsum(length) - 1, 0)
    tables = np.random.default_rng(0).permutation(2 * R * W).reshape(2, R, W)
    zeros = np.zeros(slots, int)
    tokens = Tokens(zeros, zeros, np.pad(row, (0, padding), constant_values=R), np.pad(position, (0, padding)))
    kind = np.where(hidden, CacheKind.HIDDEN.index, CacheKind.KV.index)
    rows = Rows(np.arange(R), start, length, length, last, length, kind, tuple(tables))
    return jax.tree.map(jnp.asarray, (tokens, rows))


@pytest.mark.parametrize("kinds", [KindMix(kinds) for kinds in MODE_KINDS.values()], ids=str)
def test_kernels_give_what_xla_gives(kinds, projections, monkeypatch):
    """More slots than are absorbed at a time, and no multiple of it; rows of more pages than are projected at once."""
    monkeypatch.setattr(prefix_attention, "BALANCE_FLOPS_PER_BYTE", 0)  # so that few queries are absorbed at this H
    monkeypatch.setattr(prefix_attention, "PROJECTED_TOKENS", 7 * S)
    tokens, rows = batch(slots=145)
    if len(kinds.kinds) == 1:
        rows = rows._replace(kind=jnp.full_like(rows.kind, kinds.kinds[0].index))
    absorbs = np.asarray(absorbing_is_cheaper(rows.length, rows.start, heads=N, head_dim=H))[np.asarray(rows.start) > 0]
    assert {True, False} == set(absorbs.tolist())
    keys = jax.random.split(jax.random.key(2), 5)
    q, k, v = (jax.random.normal(key, (145, N, H)) for key in keys[:3])
    q *= H**-0.5
    pool = jax.random.normal(keys[3], (2 * len(ROWS) * W, S, D))
    context = jnp.arange(W * S).reshape(W, S) < rows.start[:, None, None]  # NaN beyond each row's cached tokens
    for table in rows.tables:
        pool = pool.at[table].set(jnp.where(context[..., None], pool[table], jnp.nan))
    floats = Pool(pool)
    arguments = projections.kv, q, k, v, floats, floats.channels_of(jnp.int32(0)), tokens, rows, kinds
    expected, found = (attention._chunks(*arguments, kernels) for kernels in (None, REFERENCES))
    real = np.asarray(tokens.row) < len(ROWS)
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-5)
    own = attention.causal_tiles(q, k, v, tokens).out
    changed = np.abs(np.asarray(expected - own))[real].max((1, 2)) > 1e-2
    assert (changed == (np.asarray((rows.start > 0) & (rows.length > 1))[np.asarray(tokens.row)[real]])).all()


@pytest.mark.parametrize(
    ("queries", "cached", "reads", "absorbs"),
    [
        (2, 2048, 0, True),
        (98, 2048, 0, True),
        (99, 2048, 0, False),
        (2048, 2048, 0, False),
        (58, 512, 0, True),
        (59, 512, 0, False),
        (5, 16, 0, False),
        (17, 2048, 2, True),
        (18, 2048, 2, False),
    ],
)
def test_absorbing_pays_for_few_queries_over_a_long_prefix(queries, cached, reads, absorbs):
    found = absorbing_is_cheaper(jnp.int32(queries), jnp.int32(cached), heads=40, head_dim=128, reads=reads)
    assert bool(found) is absorbs
