"""The interface of a model family, and how a model's layers are stacked and run.

The layers of a model have one stack of weights for each parameter, `[L, ...]`, and run under `lax.scan`. They do not
know how attention finds earlier tokens: each hands its attention input `h` to a function that the caller gives,
together with a cache that is threaded through the layers. The paged cache (`apt_jax/attention/paged.py`) and plain
causal attention (`causal_attention`) are two such functions.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from apt_jax.models.kernels import LazySlice
from apt_jax.models.linear import SLICED_LAZILY, AttentionProjections


class Attend[Cache](Protocol):
    """Mixes tokens: `(projections, h [T, D], cache, layer) -> (context [T, N, H], cache)`."""

    def __call__(
        self, projections: AttentionProjections, h: jax.Array, cache: Cache, layer: jax.Array, /
    ) -> tuple[jax.Array, Cache]:
        """Return each token's attention context before the output projection, and the updated cache."""
        ...


class Layer(Protocol):
    """One layer of a model, an `nnx.Module`."""

    self_attn: AttentionProjections

    def __call__[Cache](
        self, x: jax.Array, attend: Attend[Cache], cache: Cache, layer: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Advance the residual stream `x [T, D]` by one layer. Pure."""
        ...


class Model(Protocol):
    """A model of any family, an `nnx.Module`."""

    layers: Layer  # of stacks `[L, ...]`, from `stack_layers`

    def embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """The residual stream `[..., D]` before the first layer."""
        ...

    def finish(self, x: jax.Array) -> jax.Array:
        """Hidden states `[..., E]` of the residual stream after the last layer."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[..., V]` of hidden states `[..., E]`."""
        ...


def causal_attention(
    projections: AttentionProjections, h: jax.Array, cache: None, layer: jax.Array
) -> tuple[jax.Array, None]:
    """Plain causal attention over whole sequences `[B, T, D]`, without a cache: for training and checks."""
    q = projections.query(h)
    k, v = projections.keys_values(h)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=1.0), cache


def stack_layers[L: nnx.Module](make: Callable[[nnx.Rngs], L], num_layers: int, rngs: nnx.Rngs) -> L:
    """A layer whose parameters are stacks `[L, ...]`, randomly initialised for each layer."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> L:
        return make(rngs)

    return stacked(rngs)


def num_layers(layers: Layer) -> int:
    """The number L of stacked layers."""
    return int(jax.tree.leaves(nnx.state(layers))[0].shape[0])


def run_layers[Cache](
    layers: Layer,
    x: jax.Array,
    attend: Attend[Cache],
    cache: Cache,
    *,
    unroll: bool = False,
    slice_lazily: bool = False,
) -> tuple[jax.Array, Cache]:
    """Advance the residual stream `x [T, D]` by all stacked layers. Pure.

    Args:
        unroll: write the layers out one after the other, which takes longer to compile.
        slice_lazily: slice the key and value kernels out of their stacks where they are read, not before.

    Returns:
        The residual stream, and the cache after the last layer.
    """
    graphdef, stacked = nnx.split(layers)

    def lazy(path: tuple[Any, ...], leaf: jax.Array, stack: jax.Array, layer: jax.Array) -> Any:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        is_kernel = "kernel" in names and not names & {"scale", "factor"}  # which of an int8 kernel are small
        return LazySlice(stack, layer) if is_kernel and names & set(SLICED_LAZILY) else leaf

    def body(carry: tuple[jax.Array, Cache], xs: tuple[jax.Array, nnx.State]) -> tuple[tuple[jax.Array, Cache], None]:
        x, cache = carry
        number, state = xs
        if slice_lazily:
            state = jax.tree.map_with_path(lambda path, a, stack: lazy(path, a, stack, number), state, stacked)
        return nnx.merge(graphdef, state)(x, attend, cache, number), None

    numbers = jnp.arange(num_layers(layers), dtype=jnp.int32)
    (x, cache), _ = jax.lax.scan(body, (x, cache), (numbers, stacked), unroll=unroll)
    return x, cache
