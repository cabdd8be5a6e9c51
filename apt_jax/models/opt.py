"""OPT in Flax NNX, layers stacked and run under `lax.scan`.

Shape letters: T tokens (any leading dimensions), N heads, H head_dim, D hidden_size, F ffn_dim,
E word_embed_proj_dim, V vocab_size, L layers.

The model does not know how attention finds earlier tokens. Each layer hands its attention input `h` to a
function that the caller gives, together with a cache that is threaded through the layers; the paged cache
(`apt_jax/attention/paged.py`) and plain causal attention (`causal_attention` below) are two such functions.

Source: transformers `modeling_opt.py` (behaviour), checked against it by `tests/model/test_opt.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from apt_jax.model_config import POSITION_OFFSET, ModelConfig
from apt_jax.models.collectives import join, num_devices, own_number, sum_and_scatter, sum_over_devices

_FEW_ROWS = 128


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
}  # by transformers' names, some of which are one function


class SelfAttention(nnx.Module):
    """The four projections of one attention layer; how they are combined is the caller's choice."""

    stacks: "_Stacks | None" = None

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, N, H = config.hidden_size, config.num_attention_heads, config.head_dim

        def heads_in() -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                D, (N, H), use_bias=config.enable_bias, dtype=dtype, param_dtype=dtype,
                kernel_init=_normal, rngs=rngs,
            )  # fmt: skip

        self.q_proj = heads_in()
        self.k_proj = heads_in()
        self.v_proj = heads_in()
        self.out_proj = nnx.LinearGeneral(
            (N, H), D, axis=(-2, -1), use_bias=config.enable_bias, dtype=dtype, param_dtype=dtype,
            kernel_init=_normal, rngs=rngs,
        )  # fmt: skip
        self.scale = config.head_dim**-0.5

    @property
    def splits_inputs(self) -> bool:
        """Whether k and v take a slice of D: this device's, where hidden vectors are split (`sharding.py`)."""
        return self.k_proj.kernel.shape[-3] < self.q_proj.kernel.shape[-3]

    def cut_late(self) -> "KeysValues":
        """The key and value projections for use under a condition or in a loop.

        If the model was called with `cut_late`, their kernels are cut out of the stack where they are read.
        """

        def late(name: str) -> _Projection:
            projection = getattr(self, name)
            if self.stacks is None:
                return _Projection(projection.kernel, projection.bias)
            return _Projection(_StackedKernel(self.stacks.kernels[name], self.stacks.layer), projection.bias)

        return KeysValues(late("k_proj"), late("v_proj"), self.splits_inputs)

    def query(self, h: jax.Array) -> jax.Array:
        """Scaled queries `[T, N, H]` of attention inputs `[T, D]`; N are this device's heads."""
        return _to_heads(self.q_proj, h) * jnp.asarray(self.scale, h.dtype)

    def keys_values(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[T, N, H]` of attention inputs `[T, D]`, or of this device's slice if it `splits_inputs`."""
        return KeysValues(self.k_proj, self.v_proj, self.splits_inputs).keys_values(h)

    def output(self, context: jax.Array) -> jax.Array:
        """What attention adds to the residual stream, `[T, N, H] -> [T, D]`."""
        return _summed(self.out_proj, context, axes=2)


class Attend[Cache](Protocol):
    """Mixes tokens: `(projections, h [T, D], cache, layer) -> (context [T, N, H], cache)`."""

    def __call__(
        self, projections: SelfAttention, h: jax.Array, cache: Cache, layer: jax.Array, /
    ) -> tuple[jax.Array, Cache]:
        """Return each token's attention context before the output projection, and the updated cache."""
        ...


def causal_attention(projections: SelfAttention, h: jax.Array, cache: None, layer: jax.Array) -> tuple[jax.Array, None]:
    """Plain causal attention over whole sequences `[B, T, D]`, without a cache: for training and checks."""
    q = projections.query(h)
    k, v = projections.keys_values(h)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=1.0), cache


class DecoderLayer(nnx.Module):
    """One transformer layer, pre-norm or post-norm."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.ffn_dim
        self.norm_first = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.self_attn_layer_norm = _layer_norm(config, dtype, rngs)
        self.fc1 = _linear(D, F, config.enable_bias, dtype, rngs)
        self.fc2 = _linear(F, D, config.enable_bias, dtype, rngs)
        self.final_layer_norm = _layer_norm(config, dtype, rngs)

    def __call__[Cache](
        self, x: jax.Array, attend: Attend[Cache], cache: Cache, layer: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Advance the residual stream `x [T, D]` by one layer. Pure."""
        h = self.self_attn_layer_norm(x) if self.norm_first else x
        context, cache = attend(self.self_attn, h, cache, layer)
        x = x + self.self_attn.output(context)
        if not self.norm_first:
            x = self.self_attn_layer_norm(x)
        h = self.final_layer_norm(x) if self.norm_first else x
        x = x + _summed(
            self.fc2,
            ACTIVATION_FUNCTIONS[self.activation](_add_bias(self.fc1, product(h, self.fc1.kernel))),
            axes=1,
        )
        if not self.norm_first:
            x = self.final_layer_norm(x)
        return x, cache


class OPT(nnx.Module):
    """`OPTForCausalLM`: token ids in, hidden states out, logits on request."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        D, E, V = config.hidden_size, config.word_embed_proj_dim, config.vocab_size
        positions = config.max_position_embeddings + POSITION_OFFSET
        self.vocab_size = V
        self.embed_tokens = _embed(V, E, dtype, rngs)
        self.embed_positions = _embed(positions, D, dtype, rngs)
        self.project_in = _linear(E, D, False, dtype, rngs) if E != D else None
        self.project_out = _linear(D, E, False, dtype, rngs) if E != D else None

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, dtype=dtype, rngs=rngs)

        self.layers = stacked_layers(rngs)  # every parameter has a leading axis L
        self.num_layers = config.num_hidden_layers
        self.final_layer_norm = _layer_norm(config, dtype, rngs) if config.has_final_layer_norm else None
        self.lm_head = None if config.tie_word_embeddings else _linear(E, V, False, dtype, rngs)

    def __call__[Cache](
        self, token_ids: jax.Array, positions: jax.Array, attend: Attend[Cache], cache: Cache, *, unroll: bool = False,
        cut_late: bool = False,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """Run all layers over `token_ids` and `positions` (same shape, int32). Pure.

        `unroll` writes the layers out one after the other: more to compile, but on a GPU the matrix products then read
        the weights where they are, which in a loop XLA copies out of the stack first. On a CPU it copies either way.

        `cut_late` lets `SelfAttention.cut_late` do so: a kernel that is cut before a condition is copied to enter it.

        Returns:
            Hidden states `[..., E]` ready for `logits`, and the cache after the last layer.
        """
        x = self.embed(token_ids, positions)
        graphdef, stacked = nnx.split(self.layers)

        def body(
            carry: tuple[jax.Array, Cache], xs: tuple[jax.Array, nnx.State]
        ) -> tuple[tuple[jax.Array, Cache], None]:
            x, cache = carry
            layer, state = xs
            module = nnx.merge(graphdef, state)
            if cut_late:
                attention: Any = stacked["self_attn"]
                kernels = {name: attention[name]["kernel"][...] for name in ("k_proj", "v_proj")}
                module.self_attn.stacks = _Stacks(kernels, layer)
            return module(x, attend, cache, layer), None

        layers = jnp.arange(self.num_layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (layers, stacked), unroll=unroll)
        return self.finish(x), cache

    def embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """The residual stream `[..., D]` before the first layer."""
        x = _looked_up(self.embed_tokens, token_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        return x + self.embed_positions(positions + POSITION_OFFSET)

    def finish(self, x: jax.Array) -> jax.Array:
        """Hidden states `[..., E]` of the residual stream after the last layer."""
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[..., V]` of hidden states `[..., E]`."""
        weights: Any = self.embed_tokens.embedding if self.lm_head is None else self.lm_head.kernel
        if self.lm_head is None and own_product(weights) is None:
            weights = weights[...].T
        logits = product(hidden, weights, dtype=jnp.float32)
        # split over devices, the vocabulary is padded
        return join(logits, axis=logits.ndim - 1)[..., : self.vocab_size]


@dataclass(frozen=True)
class KeysValues:
    """The key and value projections of one attention layer: all that attention to hidden vectors needs."""

    k_proj: Any  # with `kernel` and `bias`
    v_proj: Any
    splits_inputs: bool  # see `SelfAttention`

    def within(self, turn: jax.Array) -> "KeysValues":
        """These for use inside the loop that counts `turn`: kernels that are cut late are not cut before the loop."""

        return KeysValues(_read_after(turn, self.k_proj), _read_after(turn, self.v_proj), self.splits_inputs)

    def keys_values(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `SelfAttention.keys_values`."""
        if not self.splits_inputs:
            keys = _head_by_head(self.k_proj, h)  # else XLA on a TPU cuts both kernels out at once, which copies
            return keys, _head_by_head(_read_after(keys, self.v_proj), h)
        keys = jnp.tensordot(h, self.k_proj.kernel[...], axes=1)
        # else XLA on a GPU makes one product of both, of a copy of their weights side by side
        values = jnp.tensordot(jax.lax.optimization_barrier(h), self.v_proj.kernel[...], axes=1)
        both = scatter_heads(jnp.stack([keys, values]))
        return _add_bias(self.k_proj, both[0]), _add_bias(self.v_proj, both[1])


@dataclass(frozen=True)
class _Stacks:
    """Kernels of all layers, by the names of the projections, and the number of one layer."""

    kernels: dict[str, jax.Array]  # [L, ...]
    layer: jax.Array  # int32


@dataclass(frozen=True)
class _Projection:
    kernel: Any
    bias: Any


@dataclass(frozen=True)
class _StackedKernel:
    """A layer's kernel that is cut out of the stack of all layers where it is read, `kernel[...]`."""

    stack: jax.Array  # [L, ...]
    layer: jax.Array  # int32

    def __getitem__(self, index: Any) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)[index]


def _read_after(known: jax.Array, projection: Any) -> Any:
    """`projection`; if its kernel is cut late, not before `known` is."""
    kernel = projection.kernel
    if not isinstance(kernel, _StackedKernel):
        return projection
    layer, _ = jax.lax.optimization_barrier((kernel.layer, known))
    return _Projection(_StackedKernel(kernel.stack, layer), projection.bias)


def scatter_heads(x: jax.Array) -> jax.Array:
    """This device's heads of the sum of all devices' `x [..., N, H]`.

    Scattered along N*H: for half of N, where that is no multiple of a TPU's tile, XLA would reduce all on each device.
    """
    *leading, N, H = x.shape
    return sum_and_scatter(x.reshape(*leading, N * H), axis=len(leading)).reshape(*leading, -1, H)


def _to_heads(linear: nnx.LinearGeneral, h: jax.Array) -> jax.Array:
    """`[T, D] -> [T, N, H]`, N as many heads as this device's kernel has (the module's own call wants all)."""
    return _add_bias(linear, product(h, linear.kernel))


def _head_by_head(projection: Any, h: jax.Array) -> jax.Array:
    """As `_to_heads`; with a kernel that is cut late the result lies as `[N, T, H]`.

    Else XLA on a TPU7x may want it as `[T, N*H]`, for which it turns a kernel round that lies head by head.
    """
    out = _to_heads(projection, h)
    if not isinstance(projection.kernel, _StackedKernel):
        return out
    return jax.lax.optimization_barrier(out.swapaxes(0, 1)).swapaxes(0, 1)


def _summed(linear: nnx.Linear | nnx.LinearGeneral, x: jax.Array, axes: int) -> jax.Array:
    """`linear` over the last `axes` axes of `x`, of which each device has its slice; the bias counts once."""
    return _add_bias(linear, sum_over_devices(product(x, linear.kernel, axes)))


def _add_bias(linear: nnx.Linear | nnx.LinearGeneral, out: jax.Array) -> jax.Array:
    return out if linear.bias is None else out + linear.bias[...]


def _looked_up(embed: nnx.Embed, token_ids: jax.Array) -> jax.Array:
    """Embeddings `[..., E]` from a table whose rows are split over devices: the others add 0."""
    table = embed.embedding[...]
    if num_devices() == 1:
        return table[token_ids].astype(embed.dtype)
    row = token_ids - own_number() * table.shape[0]
    here = (row >= 0) & (row < table.shape[0])
    return sum_over_devices(jnp.where(here[..., None], embed(jnp.where(here, row, 0)), 0))


@runtime_checkable
class OwnProduct(Protocol):
    """Weights in the place of a parameter that know better than XLA how they are multiplied."""

    shape: tuple[int, ...]  # inputs first, either may be several axes

    @property
    def parts(self) -> jax.Array:
        """`[P, inputs, outputs / P]`; where outputs are heads, P is a multiple of their number."""
        ...

    def product(self, x: jax.Array) -> jax.Array:
        """Float32 `[R, outputs]` of `x [R, inputs]`."""
        ...


def own_product(weights: Any) -> OwnProduct | None:
    """The weights, if they are multiplied by themselves."""
    own = weights.get_value() if isinstance(weights, nnx.Variable) else None
    return own if isinstance(own, OwnProduct) else None


def product(
    x: jax.Array, weights: nnx.Variable | jax.Array, axes: int = 1, dtype: DTypeLike | None = None
) -> jax.Array:
    """`x` times `weights` over the last `axes` axes of `x`, in `dtype` or that of `x`.

    On a CPU few rows are multiplied as columns, `(kernel^T x^T)^T`: there XLA takes up to twice as long for the plain
    form, and rewrites the one into the other unless it is kept from it (docs/log/2026-11-30-performance.md).
    """
    out = dtype or x.dtype
    own = own_product(weights)
    if own is not None:
        rows = x.reshape(-1, math.prod(own.shape[:axes]))
        return own.product(rows).reshape(*x.shape[: x.ndim - axes], *own.shape[axes:]).astype(out)
    kernel = weights[...]

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.tensordot(x, kernel, axes, preferred_element_type=jnp.promote_types(out, kernel.dtype)).astype(out)

    def columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = jnp.promote_types(out, kernel.dtype)
        rows, inputs = x.shape[0], math.prod(kernel.shape[:axes])
        turned, x = kernel.reshape(inputs, -1).T, x.reshape(rows, inputs).astype(kernel.dtype)
        found = jax.lax.optimization_barrier(jnp.matmul(turned, x.T, preferred_element_type=wide))
        return found.T.reshape(rows, *kernel.shape[axes:]).astype(out)

    if x.ndim != axes + 1 or x.shape[0] > _FEW_ROWS:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=columns, default=plain)


_normal = nnx.initializers.normal(0.02)


def _linear(d_in: int, d_out: int, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(d_in, d_out, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=_normal, rngs=rngs)


def _embed(rows: int, width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(rows, width, dtype=dtype, param_dtype=dtype, embedding_init=_normal, rngs=rngs)


def _layer_norm(config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return nnx.LayerNorm(
        config.hidden_size, epsilon=1e-5, use_bias=affine, use_scale=affine, use_fast_variance=False,
        dtype=dtype, param_dtype=dtype, rngs=rngs,
    )  # fmt: skip
