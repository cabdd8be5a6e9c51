"""The C++ kernels as functions for compiled programs on a CPU; `library.register` comes first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.batching.arrays import Rows
from apt_jax.cache import Vector
from apt_jax.pallas_kernels.dispatch import Kernels
from apt_jax.pallas_kernels.reference import Partial


def kv_decode(
    q: jax.Array, pool: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array
) -> Partial:
    """As `apt_jax.pallas_kernels.reference.kv_decode_attention`. Pure."""
    return _attend("apt_kv_decode", q, pool, key_blocks, value_blocks, length)


def hidden_decode(q_wide: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array) -> Partial:
    """As `apt_jax.pallas_kernels.reference.hidden_decode_attention`. Pure."""
    return _attend("apt_hidden_decode", q_wide, pool, blocks, length)


def chunk(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array) -> Partial:
    """As `apt_jax.pallas_kernels.reference.chunk_attention`. Pure."""
    return _attend("apt_chunk", q, k.astype(jnp.float32), v.astype(jnp.float32), row)


KERNELS = Kernels("cpu", kv_decode, hidden_decode, chunk=chunk)


def matmul(x: jax.Array, packed: jax.Array, outputs: int) -> jax.Array:
    """Float32 `[R, outputs]`: `x [R, inputs]` times a kernel of float32 or bfloat16 from `packed.pack`. Pure.

    Sums are of float32 products, or of bfloat16 ones if both are that and the processor multiplies it; those of a row
    do not depend on the other rows.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    return jax.ffi.ffi_call("apt_matmul", shape)(x if x.dtype == packed.dtype else x.astype(jnp.float32), packed)


def matmul_int8(x: jax.Array, packed: jax.Array, scale: jax.Array, outputs: int, *, dynamic: bool) -> jax.Array:
    """Float32 `[R, outputs]`: `x [R, inputs]` times codes from `packed_int8.pack_int8` and the outputs' scales. Pure.

    Sums are as `PackedInt8Kernel.dynamic` says; those of a row do not depend on the other rows. A dynamic row that is
    not finite gives NaN.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    return jax.ffi.ffi_call("apt_matmul_int8", shape)(x, packed, scale, dynamic=dynamic)


def _attend(target: str, q: jax.Array, *args: jax.Array) -> Partial:
    shapes = (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32))
    return Partial(*jax.ffi.ffi_call(target, shapes)(q.astype(jnp.float32), *args))


def all_layers(
    x: jax.Array,
    pool: jax.Array,
    rows: Rows,
    parameters: Sequence[jax.Array],
    *,
    heads: int,
    ffn_dim: int,
    num_blocks: int,
    norm_first: bool,
    dynamic: Sequence[bool],
) -> tuple[jax.Array, jax.Array]:
    """All layers of a step: the residual stream `[T, D]` and the pool, both in place. Pure.

    Args:
        x: `[T, D]`. Tokens after which hidden states are not wanted get anything finite, padding stays as it is.
        rows: see `apt_jax/batching/arrays.py`.
        parameters: layer by layer in the order of `Layer` in layers.h, kernels from `packed.pack`, all of x's dtype, or
            from `packed_int8.pack_int8`, and after each kernel the scales of its outputs and factors of its inputs
            (powers of two), float32; one that the model or the kernel does not have is an array without elements.
        num_blocks: P, the pool's blocks of a layer.
        dynamic: see `PackedInt8Kernel`, of the kernels of a layer, in their order. Keys and values of hidden rows are
            never multiplied so, since what is absorbed is not.
    """
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(pool.shape, pool.dtype))
    call = jax.ffi.ffi_call("apt_all_layers", shapes, input_output_aliases={0: 0, 1: 1})
    new_x, new_pool = call(
        x, pool, rows.start, rows.length, rows.last, rows.wanted, rows.keep(Vector.HIDDEN),
        *rows.tables,
        *parameters,
        heads=np.int64(heads), ffn=np.int64(ffn_dim), blocks=np.int64(num_blocks), norm_first=norm_first,
        dynamic=np.int64(sum(own << i for i, own in enumerate(dynamic))),
    )  # fmt: skip
    return new_x, new_pool
