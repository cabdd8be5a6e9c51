"""What one iteration computes, as pure functions of arrays; `forms/` compile them.

`run_step` is the whole model in one program. Where that copies weights, `start_step`, `run_layer` once per layer, and
`end_step` do the same in several.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from apt_jax.attention.kinds import KindMix
from apt_jax.attention.paged import paged_attention
from apt_jax.attention.pool import Pool
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.batching.sampling_rows import Sampling
from apt_jax.execution.sampling import Sampled, sample
from apt_jax.models.collectives import all_reduce
from apt_jax.models.interface import Layer, Model, run_layers
from apt_jax.pallas_kernels.dispatch import Kernels


class StepOutput[Array, Cache](NamedTuple):
    """Results of a step, on the device."""

    last: Array  # [max_rows, E]: hidden states after each row's last token, padded: sampling has one input shape
    pool: Cache
    history: Array  # with this step's tokens
    every: Array | None  # [T, E]: after every token; None in a decode step, where they are the first
    outside: Array | None = None  # uint32: see `Pool.outside`, of all devices together


def run_step(
    model: Model,
    kinds: KindMix,
    num_blocks: int,
    decode_only: bool,
    max_rows: int,
    pool: Pool,
    history: jax.Array,
    tokens: Tokens,
    rows: Rows,
    kernels: Kernels | None = None,
    *,
    unroll: bool = False,
    by_kind: bool = False,
    slice_lazily: bool = False,
) -> StepOutput[jax.Array, Pool]:
    """One iteration of the model: tokens in, cache written. Pure; compiled by the forms.

    `unroll` and `slice_lazily` are those of `run_layers`.

    `by_kind` compiles the layers for each mix of cache kinds and chooses among them before the first layer, where
    otherwise each layer would ask which kinds occur. On a TPU a condition inside the loop copies the weights that it
    needs out of the stack, in every layer.
    """
    ids, history = _token_ids(history, tokens, rows)

    def all_layers(pool: Pool, kinds: KindMix) -> tuple[jax.Array, Pool]:
        attend = paged_attention(
            tokens, rows, kinds, num_blocks, pool.block_size, decode_only=decode_only, kernels=kernels
        )
        x = model.embed(ids, tokens.position)
        x, pool = run_layers(model.layers, x, attend, pool, unroll=unroll, slice_lazily=slice_lazily)
        return model.finish(x), pool

    if by_kind and kinds.asks:
        branches = [partial(all_layers, kinds=part) for part in kinds.parts()]
        hidden, pool = jax.lax.switch(kinds.part_of(rows), branches, pool)
    else:
        hidden, pool = all_layers(pool, kinds)
    last, every = _last_states(hidden, decode_only, max_rows, rows)
    return StepOutput(last, pool, history, every, count_of(pool))


def start_step(model: Model, history: jax.Array, tokens: Tokens, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """What `run_step` does before the first layer: the residual stream `[T, D]` and the history. Pure."""
    ids, history = _token_ids(history, tokens, rows)
    return model.embed(ids, tokens.position), history


def run_layer(
    layer: Layer,
    kinds: KindMix,
    num_blocks: int,
    decode_only: bool,
    pool: Pool,
    x: jax.Array,
    index: jax.Array,
    tokens: Tokens,
    rows: Rows,
    kernels: Kernels | None = None,
) -> tuple[jax.Array, Pool]:
    """Layer number `index` (int32 scalar) of `run_step`: the residual stream `[T, D]` and the pool. Pure."""
    attend = paged_attention(tokens, rows, kinds, num_blocks, pool.block_size, decode_only=decode_only, kernels=kernels)
    return layer(x, attend, pool, index)


def end_step(
    model: Model, decode_only: bool, max_rows: int, x: jax.Array, rows: Rows
) -> tuple[jax.Array, jax.Array | None]:
    """What `run_step` does after the last layer; returns its first and last result. Pure."""
    return _last_states(model.finish(x), decode_only, max_rows, rows)


def count_of(pool: Pool) -> jax.Array | None:
    """`Pool.outside` of all devices together, as an array of its own: the pool is donated to the next step."""
    return None if pool.outside is None else all_reduce(pool.outside)[0, 0, 0]


def run_sampling(
    model: Model,
    history: jax.Array,
    hidden: jax.Array,
    sampling: Sampling,
    slot: jax.Array,
    length: jax.Array,
    allowed: jax.Array | None = None,
) -> tuple[Sampled, jax.Array]:
    """Sample after the first rows of `hidden`, as many as `slot` has. Pure.

    Args:
        slot: int32 `[R]`, out of range for padding rows.
        length: int32 `[R]`, tokens before the one to sample.
        allowed: see `sample`.

    Returns:
        What was sampled, and the history with it.
    """
    known = history[jnp.minimum(slot, history.shape[0] - 1)]
    sampled = sample(model.logits(hidden[: slot.shape[0]]), known, length, sampling, allowed)
    return sampled, history.at[slot, length].set(sampled.token, mode="drop")


def _token_ids(history: jax.Array, tokens: Tokens, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Ids of the step's tokens, and the history with them."""
    slot = jnp.append(rows.slot, history.shape[0])[tokens.row]  # out of range for padding tokens
    ids = jnp.where(tokens.on_device, history[jnp.minimum(slot, history.shape[0] - 1), tokens.position], tokens.ids)
    return ids, history.at[slot, tokens.position].set(ids, mode="drop")


def _last_states(hidden: jax.Array, decode_only: bool, max_rows: int, rows: Rows) -> tuple[jax.Array, jax.Array | None]:
    last = hidden if decode_only else hidden[rows.last]
    return jnp.pad(last, ((0, max_rows - last.shape[0]), (0, 0))), None if decode_only else hidden
