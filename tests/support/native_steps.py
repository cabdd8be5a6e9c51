"""Steps of small models with every kind of row, in one C++ call and layer by layer in XLA."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apt_jax.attention.int8 import encode
from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool, scale_row
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import CacheKind
from apt_jax.cpu_kernels.calls import KERNELS as CPU_KERNELS
from apt_jax.execution.forms.native import NativeForm, run_native_step
from apt_jax.execution.steps import run_step
from apt_jax.execution.weights.int8 import PARTS, Int8Choice
from apt_jax.execution.weights.layer_layout import LayerLayout
from apt_jax.execution.weights.layout import StackedLayout
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT

PLAIN = ModelConfig(
    vocab_size=96, hidden_size=96, num_hidden_layers=2, ffn_dim=150, max_position_embeddings=256, num_attention_heads=3,
    word_embed_proj_dim=96, eos_token_ids=(),
)  # fmt: skip
POST_NORM = replace(PLAIN, do_layer_norm_before=False, word_embed_proj_dim=32)
BARE = replace(PLAIN, enable_bias=False, layer_norm_elementwise_affine=False, num_attention_heads=1, hidden_size=64)
ODD = replace(PLAIN, ffn_dim=147)
UNEVEN = replace(
    PLAIN, hidden_size=192, num_attention_heads=4, word_embed_proj_dim=192
)  # heads of one and a half packed tiles
BLOCK_SIZE, PAGES = 8, 16
KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN


@cache
def noisy(config, dtype):
    """A model whose biases and scales are not what they begin as; nobody changes it."""
    model = OPT(config, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda a: a + jnp.asarray(rng.normal(0, 0.1, a.shape), a.dtype), nnx.state(model))
    nnx.update(model, state)
    return model


def step_of(requests, rng):
    """Arrays of a step: row r has cached tokens and tokens now (none: padding), and is hidden or not, as `requests[r]`.

    Its blocks lie anywhere; two tokens of padding come last, except in a decode step.
    """
    R = len(requests)
    start, length, hidden = (np.array(column) for column in zip(*requests, strict=True))
    start, length = start.astype(np.int32), length.astype(np.int32)
    free = iter(rng.permutation(blocks_of(requests)))
    first, second = np.zeros((R, PAGES), np.int32), np.zeros((R, PAGES), np.int32)
    for r in range(R):
        for page in range(-(-(start[r] + length[r]) // BLOCK_SIZE) if length[r] else 0):
            first[r, page] = next(free)
            if not hidden[r]:
                second[r, page] = next(free)
    slot = np.where(length > 0, np.arange(R, dtype=np.int32), R)
    if decodes(requests):
        last, row, position = np.arange(R, dtype=np.int32), slot, start
    else:
        last = np.maximum(np.cumsum(length) - 1, 0).astype(np.int32)
        row = np.append(np.repeat(np.arange(R), length), [R, R]).astype(np.int32)
        position = np.concatenate([*(range(c, c + n) for c, n, _ in requests), [0, 0]]).astype(np.int32)
    ids = rng.integers(0, 96, len(row)).astype(np.int32)
    kind = np.where(hidden, HIDDEN.index, KV.index)
    prompt = np.zeros_like(length) if decodes(requests) else length
    rows = Rows(slot, start, length, prompt, last, length, kind, (first, second))
    return Tokens(ids, np.zeros(len(row), bool), row, position), rows


def decodes(requests):
    """Whether this is a decode step."""
    return all(now <= 1 for _, now, _ in requests)


def blocks_of(requests):
    """Blocks of a pool that holds them."""
    return sum(2 * -(-(cached + now) // BLOCK_SIZE) for cached, now, _ in requests) + 3


def packed_weights(model, int8=None):
    """A copy of a model's weights as the C++ kernels take them."""
    return LayerLayout.of(model, jax.devices("cpu")[0], CPU_KERNELS, int8).lay_out(model)


def coded(vectors, config, dtype, is_hidden, rng):
    """An int8 pool that holds `vectors [L, P, S, D]`, relative to channels where `is_hidden [P]`; NaN stays so."""
    L, P, S, D = vectors.shape
    heads = config.num_attention_heads
    channels = np.stack([rng.normal(size=(L, D)), rng.uniform(1 / 127, 3 / 127, (L, D))]).astype(np.float32)
    centre, width = channels[:, :, None, None]
    relative = (vectors - centre) / width
    x = np.where(is_hidden[:, None, None], relative, vectors).reshape(L * P * S, D)
    by_head, whole = encode(jnp.asarray(x), heads), encode(jnp.asarray(x), 1)
    whole = whole._replace(scales=jnp.broadcast_to(whole.scales, by_head.scales.shape))
    mask = np.repeat(np.tile(is_hidden, L), S)[:, None]
    codes, scales = jax.tree.map(lambda a, b: jnp.where(mask, a, b), whole, by_head)
    row = scale_row(S, heads)
    scales = scales.reshape(L * P, S, heads).swapaxes(1, 2)
    scales = jnp.pad(scales.reshape(L * P, 1, -1), ((0, 0), (0, 0), (0, row - S * heads)), constant_values=jnp.nan)
    outside = jnp.full((1, 1, 1), 5, jnp.uint32)
    return Pool(codes.reshape(L * P, S, D), scales, jnp.asarray(channels), outside, heads, jnp.dtype(dtype))


class Step:
    """A step: its model, arrays, and a pool with NaN where nothing is cached, which is int8 if it is `coded`."""

    def __init__(self, config, dtype, requests, is_coded=False, quantization="none", parts=PARTS):
        model, rng = noisy(config, dtype), np.random.default_rng(1)
        self.tokens, self.rows = step_of(requests, rng)
        self._decodes, self._blocks, R = decodes(requests), blocks_of(requests), len(requests)
        pool = np.full((config.num_hidden_layers, self._blocks, BLOCK_SIZE, config.hidden_size), np.nan, np.float32)
        for r, (cached, now, hidden) in enumerate(requests):
            for position in range(cached if now else 0):
                page, offset = divmod(position, BLOCK_SIZE)
                for table in map(self.rows.table_of, (HIDDEN if hidden else KV).spec.vectors):
                    pool[:, table[r, page], offset] = rng.normal(size=(config.num_hidden_layers, config.hidden_size))
        is_hidden = np.zeros(self._blocks, bool)
        is_hidden[self.rows.tables[0][[own[2] for own in requests]]] = True
        if is_coded:
            self.pool = coded(pool, config, dtype, is_hidden, rng)
        else:
            self.pool = Pool(jnp.asarray(pool.reshape(-1, BLOCK_SIZE, config.hidden_size), dtype))
        self.history = jnp.zeros((R, PAGES * BLOCK_SIZE), jnp.int32)
        int8 = Int8Choice.of(model, quantization, parts)
        weights = packed_weights(model, int8)
        assert NativeForm.takes(weights)
        self._stacked = StackedLayout(jax.devices("cpu")[0], int8=int8).lay_out(model)

        @jax.jit
        def native(outer_arrays, layer_arrays, pool, tokens, rows):
            own = weights.model(outer_arrays)
            modules = [weights.layers[0].module(arrays) for arrays in layer_arrays]
            return run_native_step(own, modules, self._blocks, self._decodes, R, pool, self.history, tokens, rows)

        # these return the rows' last hidden states, the pool, and the hidden states after every token
        self.in_one_call = lambda tokens, rows: self._found(
            native(weights.outer.arrays, [layer.arrays for layer in weights.layers], self.pool, tokens, rows)
        )

    def in_xla(self, tokens, rows):
        """As `in_one_call`."""
        kinds = KindMix(tuple(kind for kind in (KV, HIDDEN) if rows.of_kind(kind).any()))
        tokens, rows = jax.tree.map(jnp.asarray, (tokens, rows))
        model = self._stacked.model(self._stacked.outer.arrays)
        step = jax.jit(partial(run_step, model, kinds, self._blocks, self._decodes, len(rows.slot)))
        return self._found(step(self.pool, self.history, tokens, rows))

    def _found(self, found):
        last, pool, _, every, _ = found
        self.outside, self.new_pool = pool.outside, pool
        numbers = pool.read(jnp.arange(len(pool.numbers)), jnp.float32 if pool.is_coded else pool.dtype)
        return last, numbers, last if every is None else every
