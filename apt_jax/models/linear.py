"""Projections of a model. Their code is the same however a kernel is stored or split over devices.

`kernels.py` has the ways to store a kernel. Where a model is split over devices (`sharding.py`), a projection has the
device's part of its kernel: by outputs its result is a part too; by inputs the devices' results are summed here.

Shape letters: T tokens (any leading dimensions), N heads (this device's), H head_dim, D hidden size, E embedding size,
V vocabulary size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from apt_jax.models.collectives import all_gather, all_reduce, device_index, reduce_scatter
from apt_jax.models.kernels import ArrayKernel, Kernel, kernel_of

SLICED_LAZILY = ("k_proj", "v_proj")  # what attention reads under conditions and in loops

_normal = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """`x W + b` over the last axes of `x`, as many as `inputs` has."""

    def __init__(
        self, inputs: int | Sequence[int], outputs: int | Sequence[int], *, bias: bool = True, dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.inputs, self.outputs = _sizes(inputs), _sizes(outputs)
        matrix = _normal(rngs.params(), (math.prod(self.inputs), math.prod(self.outputs)), jnp.dtype(dtype))
        self.kernel = nnx.Param(matrix.reshape(*self.inputs, *self.outputs))
        self.bias = nnx.Param(jnp.zeros(self.outputs, dtype)) if bias else None

    def __call__(self, x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """`[..., *inputs] -> [..., *outputs]`, in `dtype` or that of `x`."""
        kernel = kernel_of(self.kernel)
        out = kernel.matmul(x, len(self.inputs), dtype)
        if kernel.shape[0] < self.inputs[0]:  # this device's slice of the inputs
            out = all_reduce(out)
        return out if self.bias is None else out + self.bias[...]


class Embedding(nnx.Module):
    """A table `[V, E]` of vectors, which may be split by rows."""

    def __init__(self, rows: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.rows, self.dtype = rows, jnp.dtype(dtype)
        self.embedding = nnx.Param(_normal(rngs.params(), (rows, width), jnp.dtype(dtype)))

    def __call__(self, index: jax.Array) -> jax.Array:
        """The vectors `[..., E]` at `index`."""
        table = self.embedding.get_value()

        def look_up(index: jax.Array) -> jax.Array:
            return table.columns(index).astype(self.dtype) if isinstance(table, Kernel) else table[index]

        rows = table.shape[-1] if isinstance(table, Kernel) else table.shape[0]
        if rows == self.rows:
            return look_up(index)
        index = index - device_index() * rows
        here = (index >= 0) & (index < rows)  # the other devices add 0
        return all_reduce(jnp.where(here[..., None], look_up(jnp.where(here, index, 0)), 0))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 products `[..., V]` of `hidden [..., E]` with all vectors."""
        table = self.embedding.get_value()
        kernel = table if isinstance(table, Kernel) else ArrayKernel(table.T)
        return _whole(kernel.matmul(hidden, dtype=jnp.float32), self.rows)


class Head(Linear):
    """Output projection to logits with an untied kernel `[E, V]`, which may be split by outputs."""

    def __init__(self, width: int, vocab_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(width, vocab_size, bias=False, dtype=dtype, rngs=rngs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 `[..., V]` of `hidden [..., E]`."""
        return _whole(self(hidden, jnp.float32), self.outputs[0])


class AttentionProjections(nnx.Module):
    """Query, key, value and output projections of one attention layer; the caller computes attention from them."""

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, *, bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        D, heads = hidden_size, (num_heads, head_dim)
        self.q_proj = Linear(D, heads, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(D, heads, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(D, heads, bias=bias, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(heads, D, bias=bias, dtype=dtype, rngs=rngs)
        self.scale = head_dim**-0.5

    @property
    def kv(self) -> "KeyValueProjections":
        """The key and value projections: all that attention to hidden vectors needs."""
        (key, key_bias), (value, value_bias) = (
            (kernel_of(linear.kernel), None if linear.bias is None else linear.bias[...])
            for linear in (self.k_proj, self.v_proj)
        )
        splits_inputs = key.shape[0] < self.k_proj.inputs[0]
        return KeyValueProjections(key, value, key_bias, value_bias, splits_inputs)

    def query(self, h: jax.Array) -> jax.Array:
        """Scaled queries `[T, N, H]` of attention inputs `[T, D]`."""
        return self.q_proj(h) * jnp.asarray(self.scale, h.dtype)

    def keys_values(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[T, N, H]` of attention inputs `[T, D]`."""
        return self.kv.keys_values(h)

    def output(self, context: jax.Array) -> jax.Array:
        """What attention adds to the residual stream, `[T, N, H] -> [T, D]`."""
        return self.out_proj(context)


@dataclass(frozen=True)
class KeyValueProjections:
    """The key and value projections of one attention layer, for use under conditions and in loops too.

    Attributes:
        key, value: kernels `[D, N, H]`.
        splits_inputs: they take a slice of D: this device's, where hidden vectors are split (`sharding.py`).
    """

    key: Kernel
    value: Kernel
    key_bias: jax.Array | None  # [N, H]
    value_bias: jax.Array | None
    splits_inputs: bool

    def after(self, known: jax.Array) -> "KeyValueProjections":
        """The same projections for use inside the loop that counts `known`: lazy slices are taken there, not before."""
        return replace(self, key=self.key.after(known), value=self.value.after(known))

    def keys_values(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[T, N, H]` of attention inputs `[T, D]`, or of this device's slice if it `splits_inputs`."""
        if not self.splits_inputs:
            keys = _heads(self.key, self.key_bias, h)
            # else XLA on a TPU slices both kernels out at once, which copies
            return keys, _heads(self.value.after(keys), self.value_bias, h)
        keys = self.key.matmul(h)
        # else XLA on a GPU makes one product of both, of a copy of their weights side by side
        values = self.value.matmul(jax.lax.optimization_barrier(h))
        keys, values = scatter_heads(jnp.stack([keys, values]))
        return _add(keys, self.key_bias), _add(values, self.value_bias)


def scatter_heads(x: jax.Array) -> jax.Array:
    """This device's heads of the sum of all devices' `x [..., N, H]`.

    Scattered along N*H: for half of N, where that is no multiple of a TPU's tile, XLA would reduce all on each device.
    """
    *leading, N, H = x.shape
    return reduce_scatter(x.reshape(*leading, N * H), axis=len(leading)).reshape(*leading, -1, H)


def _heads(kernel: Kernel, bias: jax.Array | None, h: jax.Array) -> jax.Array:
    """`[T, D] -> [T, N, H]`; of a kernel that is sliced lazily it lies as `[N, T, H]`.

    Else XLA on a TPU7x may want it as `[T, N*H]`, for which it transposes a kernel that lies head by head.
    """
    out = _add(kernel.matmul(h), bias)
    if not kernel.is_sliced_lazily:
        return out
    return jax.lax.optimization_barrier(out.swapaxes(0, 1)).swapaxes(0, 1)


def _add(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias


def _whole(logits: jax.Array, vocab_size: int) -> jax.Array:
    """All devices' logits; split over devices, the vocabulary is padded."""
    return all_gather(logits, axis=logits.ndim - 1)[..., :vocab_size]


def _sizes(axes: int | Sequence[int]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
