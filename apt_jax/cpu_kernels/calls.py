"""The C++ kernels as functions for compiled programs on a CPU; `library.register` comes first."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.dispatch import Kernels
from pallas_kernels.reference import Partial


def kv_decode(
    q: jax.Array, pool: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array
) -> Partial:
    """As `pallas_kernels.reference.kv_decode_attention`. Pure."""
    return _decode("apt_kv_decode", q, pool, key_blocks, value_blocks, length)


def hidden_decode(q_wide: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array) -> Partial:
    """As `pallas_kernels.reference.hidden_decode_attention`. Pure."""
    return _decode("apt_hidden_decode", q_wide, pool, blocks, length)


KERNELS = Kernels("cpu", kv_decode, hidden_decode)


def max_rows(dtype: DTypeLike) -> float:
    """Most rows for which `matmul` with a kernel of `dtype` is faster than XLA's products (docs/performance.md)."""
    return 32 if jnp.dtype(dtype) == jnp.float32 else 128


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Float32 `[R, outputs]`: `x [R, inputs]` times `kernel [outputs, inputs]`, float32 or bfloat16. Pure.

    Sums are of float32 products, and those of a row do not depend on the other rows.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("apt_matmul", shape)(x.astype(jnp.float32), kernel)


def _decode(target: str, q: jax.Array, *args: jax.Array) -> Partial:
    shapes = (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32))
    return Partial(*jax.ffi.ffi_call(target, shapes)(q.astype(jnp.float32), *args))
