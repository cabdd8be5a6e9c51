"""Storage of a projection's kernel (its weight matrix), and the product of rows with it.

A kernel takes `inputs` to `outputs`, either of which may be several axes. As an array it is `[*inputs, *outputs]`; a
form that a CPU multiplies faster, or that a TPU slices lazily, takes the array's place in the model's parameter.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

_FEW_ROWS = 128
LARGEST = 127  # of an 8-bit weight or activation; -128 is not used


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

    @property
    def is_sliced_lazily(self) -> bool:
        """Whether it is sliced out of a stack where it is read."""
        return False


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

    @property
    def is_sliced_lazily(self) -> bool:
        """See `Kernel`."""
        return True


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


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["dynamic", "dtype"])
@dataclass(frozen=True)
class Int8Kernel(Kernel):
    """A kernel of 8-bit integers with a scale for each output: `array = values * scale` (`quantization.py`).

    Attributes:
        values: int8 `[*inputs, *outputs]`, in -127..127; or a stack of such in a lazy slice.
        scale: float32 `[*outputs]`.
        dynamic: each row of `x` is quantised too, with a scale of its own (greatest magnitude / 127), and products are
            sums of int32. Otherwise the integers are multiplied in the number type of `x`, where they are exact.
        dtype: number type of `array`, `columns` and `by_head`.
    """

    values: Any
    scale: jax.Array
    dynamic: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape `[*inputs, *outputs]`."""
        return tuple(self.values.shape)

    @property
    def numbers(self) -> jax.Array:
        """The integers, as an array of `shape`."""
        found: jax.Array = self.values.array if isinstance(self.values, Kernel) else self.values
        return found

    @property
    def array(self) -> jax.Array:
        """See `Kernel`, in `dtype`."""
        return (self.numbers.astype(jnp.float32) * self.scale).astype(self.dtype)

    def matmul(self, x: jax.Array, axes: int = 1, dtype: DTypeLike | None = None) -> jax.Array:
        """See `Kernel`."""
        return int8_product(x, self.numbers, axes, self.scale, self.dynamic).astype(dtype or x.dtype)

    def after(self, known: jax.Array) -> Self:
        """See `Kernel`."""
        return replace(self, values=self.values.after(known)) if self.is_sliced_lazily else self

    @property
    def is_sliced_lazily(self) -> bool:
        """See `Kernel`."""
        return isinstance(self.values, Kernel)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["dynamic", "dtype"])
@dataclass(frozen=True)
class Int8Table(Int8Kernel):
    """A kernel that is stored as `values [outputs, inputs]`: the vocabulary's table of embeddings."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape `[inputs, outputs]`."""
        return tuple(self.values.shape[::-1])

    @property
    def array(self) -> jax.Array:
        """See `Kernel`, in `dtype`."""
        return (self.values.T.astype(jnp.float32) * self.scale).astype(self.dtype)

    def matmul(self, x: jax.Array, axes: int = 1, dtype: DTypeLike | None = None) -> jax.Array:
        """See `Kernel`."""
        return int8_product(x, self.values.T, axes, self.scale, self.dynamic).astype(dtype or x.dtype)

    def columns(self, index: jax.Array) -> jax.Array:
        """See `Kernel`, in `dtype`."""
        return (self.values[index].astype(jnp.float32) * self.scale[index][..., None]).astype(self.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "factor"], meta_fields=[])
@dataclass(frozen=True)
class RowScaledKernel(Kernel):
    """A kernel whose inputs are multiplied by constant factors first: `array = factor * kernel.array`.

    Factors of a quantised kernel are powers of two, which change no digit (`quantization.py`).

    Attributes:
        factor: float32 `[*inputs]`.
    """

    kernel: Kernel
    factor: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape `[*inputs, *outputs]`."""
        return self.kernel.shape

    @property
    def array(self) -> jax.Array:
        """See `Kernel`."""
        found = self.kernel.array
        factor = jnp.expand_dims(self.factor, tuple(range(self.factor.ndim, found.ndim)))
        return found * factor.astype(found.dtype)

    def matmul(self, x: jax.Array, axes: int = 1, dtype: DTypeLike | None = None) -> jax.Array:
        """See `Kernel`."""
        return self.kernel.matmul(x * self.factor.astype(x.dtype), axes, dtype)

    def columns(self, index: jax.Array) -> jax.Array:
        """See `Kernel`."""
        found = self.kernel.columns(index)
        return found * self.factor.astype(found.dtype)

    def by_head(self) -> jax.Array:
        """See `Kernel`."""
        found = self.kernel.by_head()  # [parts of heads, D, ...]
        return found * self.factor[:, None].astype(found.dtype)

    def after(self, known: jax.Array) -> Self:
        """See `Kernel`."""
        return replace(self, kernel=self.kernel.after(known)) if self.is_sliced_lazily else self

    @property
    def is_sliced_lazily(self) -> bool:
        """See `Kernel`."""
        return self.kernel.is_sliced_lazily


def int8_product(x: jax.Array, values: jax.Array, axes: int, scale: jax.Array, dynamic: bool) -> jax.Array:
    """`x [..., *inputs]` times int8 `values [*inputs, *outputs]` and `scale [*outputs]`, float32; see `Int8Kernel`."""
    if not dynamic:
        return jnp.tensordot(x, values.astype(x.dtype), axes, preferred_element_type=jnp.float32) * scale
    inputs = tuple(range(x.ndim - axes, x.ndim))
    wide = x.astype(jnp.float32)
    step = jnp.abs(wide).max(inputs, keepdims=True) / LARGEST
    usable = (step > 0) & jnp.isfinite(step)
    codes = jnp.where(usable, jnp.round(wide / jnp.where(usable, step, 1)), 0).astype(jnp.int8)
    found = jnp.tensordot(codes, values, axes, preferred_element_type=jnp.int32).astype(jnp.float32)
    # a row that is not finite has a step that is not, and so has its product; unless that is 0, hence the NaN
    step = jnp.where(jnp.isfinite(step), step, jnp.nan).reshape(*x.shape[: x.ndim - axes], *[1] * scale.ndim)
    return found * step * scale


def kernel_of(parameter: nnx.Param) -> Kernel:
    """The kernel in a parameter: an array, or what has taken its place."""
    stored = parameter.get_value()
    return stored if isinstance(stored, Kernel) else ArrayKernel(stored)
