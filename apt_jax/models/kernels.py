"""Storage of a projection's kernel (its weight matrix), and the product of rows with it.

A kernel takes `inputs` to `outputs`, either of which may be several axes. As an array it is `[*inputs, *outputs]`; a
form that a CPU multiplies faster, or that a TPU slices lazily, takes the array's place in the model's parameter.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

_FEW_ROWS = 128


class Kernel(ABC):
    """Weights of one projection."""

    shape: tuple[int, ...]  # inputs first

    @property
    @abstractmethod
    def array(self) -> jax.Array:
        """The plain array, of `shape`."""

    def matmul(self, x: jax.Array, axes: int = 1, dtype: DTypeLike | None = None) -> jax.Array:
        """`x` times the kernel over the last `axes` axes of `x`, in `dtype` or that of `x`."""
        kernel, out = self.array, dtype or x.dtype
        return jnp.tensordot(x, kernel, axes, preferred_element_type=jnp.promote_types(out, kernel.dtype)).astype(out)

    def columns(self, index: jax.Array) -> jax.Array:
        """The kernel's outputs `index [...]`, `[..., inputs]`: for a table of embeddings, their vectors."""
        return jnp.moveaxis(self.array[:, index], 0, -1)

    def by_head(self) -> jax.Array:
        """A kernel of heads as `[N, D, H]`, or as parts of heads `[P, D, N H / P]` with P a multiple of N.

        That is its layout in a TPU's memory (`execution/weights/tpu_layouts.py`); another order is copied there.
        """
        return self.array.swapaxes(0, 1)

    def after(self, known: jax.Array) -> Self:
        """The kernel; one that is sliced lazily is not sliced before `known` is."""
        return self


@dataclass(frozen=True)
class ArrayKernel(Kernel):
    """A plain array."""

    stored: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape `[*inputs, *outputs]`."""
        return self.stored.shape

    @property
    def array(self) -> jax.Array:
        """The array as it is stored."""
        return self.stored


@dataclass(frozen=True)
class LazySlice(Kernel):
    """A layer's kernel that is sliced out of the stack of all layers where it is read.

    On a TPU a kernel that is sliced before a condition or a loop is copied to enter it.
    """

    stack: jax.Array  # [L, *shape]
    layer: jax.Array  # int32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape `[*inputs, *outputs]`."""
        return self.stack.shape[1:]

    @property
    def array(self) -> jax.Array:
        """The layer's slice, taken here."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)

    def after(self, known: jax.Array) -> Self:
        """See `Kernel`."""
        layer, _ = jax.lax.optimization_barrier((self.layer, known))
        return replace(self, layer=layer)


@dataclass(frozen=True)
class TransposedKernel(Kernel):
    """A kernel that is stored as `[outputs, inputs]`, for matrix products of few rows on a CPU.

    XLA takes up to twice as long there for the plain form, and would rewrite this form into that one unless
    prevented (docs/log/2026-11-30-performance.md). Transposed where it is read, it is part of the matrix product and
    costs nothing; transposed before a `lax.cond` it would be copied to enter it.
    """

    stored: jax.Array
    shape: tuple[int, ...]

    @property
    def array(self) -> jax.Array:
        """The array `[inputs, outputs]`, transposed here."""
        return self.stored.T.reshape(self.shape)

    def matmul(self, x: jax.Array, axes: int = 1, dtype: DTypeLike | None = None) -> jax.Array:
        """See `Kernel`; few rows are multiplied as columns, `(W^T x^T)^T`."""
        if x.ndim != axes + 1 or x.shape[0] > _FEW_ROWS:
            return super().matmul(x, axes, dtype)
        rows, out = x.shape[0], dtype or x.dtype
        columns = x.reshape(rows, math.prod(self.shape[:axes])).astype(self.stored.dtype).T
        wide = jnp.promote_types(out, self.stored.dtype)
        found = jax.lax.optimization_barrier(jnp.matmul(self.stored, columns, preferred_element_type=wide))
        return found.T.reshape(rows, *self.shape[axes:]).astype(out)

    def columns(self, index: jax.Array) -> jax.Array:
        """See `Kernel`."""
        return self.stored[index]


def kernel_of(parameter: nnx.Param) -> Kernel:
    """The kernel in a parameter: an array, or what has taken its place."""
    stored = parameter.get_value()
    return stored if isinstance(stored, Kernel) else ArrayKernel(stored)
