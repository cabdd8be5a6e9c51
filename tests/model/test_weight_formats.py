"""What runs on TPUs only, on a CPU: weights in other layouts, and layers compiled for each mix of cache kinds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import CacheKind
from apt_jax.execution.steps import run_step
from apt_jax.execution.weights.layout import StackedLayout, path_of
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT
from apt_jax.pallas_kernels.dispatch import REFERENCES

BOTH = KindMix((CacheKind.KV, CacheKind.HIDDEN))

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time
P, S, R, W = 24, 8, 4, 3
MODEL = ModelConfig(
    vocab_size=32, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=32,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(OPT(MODEL, rngs=nnx.Rngs(0)))


def order(array: jax.Array) -> tuple[int, ...]:
    return array.format.layout.major_to_minor


def put_for_tpu(path, array: jax.Array) -> jax.Array:
    """As a loader puts it."""
    return StackedLayout(jax.devices()[0], custom_layouts=True).place(path_of(path), array).array


def test_only_the_projections_are_laid_out_anew_and_hold_the_same_numbers(model):
    state = model[1]
    placed = jax.tree.map_with_path(put_for_tpu, state)
    attention = placed["layers"]["self_attn"]
    for name in ("q_proj", "k_proj", "v_proj"):
        assert order(attention[name]["kernel"][...]) == (0, 2, 3, 1), "heads of 16 columns would be padded to 128"
        assert order(attention[name]["bias"][...]) == (0, 1, 2)
    assert order(attention["out_proj"]["kernel"][...]) == (0, 1, 2, 3)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), placed, state))


def test_heads_of_whole_register_tiles_keep_their_columns_last():
    state = nnx.state(nnx.Dict(q_proj=nnx.Dict(kernel=nnx.Param(jnp.ones((2, 8, 3, 128))))))
    assert order(jax.tree.leaves(jax.tree.map_with_path(put_for_tpu, state))[0]) == (0, 2, 1, 3)


@pytest.fixture(scope="module")
def steps(model):
    """The same step, asking in each layer or choosing before the first."""
    graphdef, state = model

    def step(by_kind: bool):
        def run(state, pool, tokens, rows):
            history = jnp.zeros((R, W * S), jnp.int32)
            model = nnx.merge(graphdef, state)
            found = run_step(model, BOTH, P, True, R, Pool(pool), history, tokens, rows, REFERENCES, by_kind=by_kind)
            return found.last, found.pool.numbers

        return jax.jit(run, compiler_options=QUICK)

    return state, step(False), step(True)


@pytest.mark.parametrize("hidden", ["", "0", "1", "01"], ids=["nothing", "kv", "hidden", "both"])
def test_layers_for_a_mix_of_kinds_do_what_all_layers_do(steps, hidden):
    """Rows in KV for 0, hidden for 1; the last row is padding."""
    state, asking, choosing = steps
    is_hidden = jnp.array([kind == "1" for kind in (hidden * 3)[:3]] + [False] * (R - min(3, 3 * len(hidden))))
    kind = jnp.where(is_hidden, CacheKind.HIDDEN.index, CacheKind.KV.index)
    length = jnp.array([1] * min(3, 3 * len(hidden)) + [0] * (R - min(3, 3 * len(hidden))))
    start = jnp.array([0, 9, 17, 0]) * length
    tables = jnp.asarray(np.random.default_rng(0).permutation(P).reshape(2, R, W))
    tokens = Tokens(jnp.arange(R), jnp.zeros(R, bool), jnp.where(length > 0, jnp.arange(R), R), start)
    rows = Rows(jnp.arange(R), start, length, 0 * length, jnp.arange(R), length, kind, tuple(tables))
    pool = jax.random.normal(jax.random.key(0), (MODEL.num_hidden_layers * P, S, MODEL.hidden_size))
    expected, found = (step(state, pool, tokens, rows) for step in (asking, choosing))
    some = np.asarray(length) > 0
    np.testing.assert_allclose(found[0][some], expected[0][some], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)
    assert some.any() == bool((np.asarray(found[1]) != np.asarray(pool)).any())


def test_kernels_sliced_lazily_are_the_same_kernels(model):
    """A prefill step of rows over cached prefixes, hidden ones absorbed and projected, KV ones, and a decode."""
    graphdef, state = model
    length, start = jnp.array([2, 6, 5, 1]), jnp.array([17, 5, 9, 4])
    row, T = jnp.repeat(jnp.arange(R), length), 14
    position = jnp.concatenate([jnp.arange(s, s + n) for s, n in zip(start.tolist(), length.tolist(), strict=True)])
    tables = jnp.asarray(np.random.default_rng(0).permutation(P).reshape(2, R, W))
    tokens = Tokens(jnp.arange(T), jnp.zeros(T, bool), row, position)
    kind = jnp.array([kind.index for kind in (CacheKind.HIDDEN, CacheKind.HIDDEN, CacheKind.KV, CacheKind.HIDDEN)])
    rows = Rows(jnp.arange(R), start, length, length, jnp.cumsum(length) - 1, length, kind, tuple(tables))
    pool = jax.random.normal(jax.random.key(0), (MODEL.num_hidden_layers * P, S, MODEL.hidden_size))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def step(slice_lazily: bool, state, pool):
        history = jnp.zeros((R, W * S), jnp.int32)
        found = run_step(
            nnx.merge(graphdef, state), BOTH, P, False, R, Pool(pool), history, tokens, rows, REFERENCES,
            slice_lazily=slice_lazily,
        )  # fmt: skip
        return found.last, found.pool.numbers

    early, late = step(False, state, pool), step(True, state, pool)
    for ours, theirs in zip(late, early, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
