"""The C++ kernels as functions for compiled programs on a CPU; `library.register` comes first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.batching.arrays import Rows
from apt_jax.cache import Vector
from apt_jax.pallas_kernels.dispatch import Kernels
from apt_jax.pallas_kernels.reference import Partial


def kv_decode(
    q: jax.Array, pool: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array, *,
    scales: jax.Array | None = None,
) -> Partial:  # fmt: skip
    """As `apt_jax.pallas_kernels.reference.kv_decode_attention`. Pure."""
    if scales is not None:
        return _attend("apt_kv_decode_int8", q, pool, scales, key_blocks, value_blocks, length)
    return _attend("apt_kv_decode", q, pool, key_blocks, value_blocks, length)


def hidden_decode(
    q_wide: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array, *, scales: jax.Array | None = None
) -> Partial:
    """As `apt_jax.pallas_kernels.reference.hidden_decode_attention`. Pure.

    Over int8 queries of bfloat16 are multiplied as that, if the processor does.
    """
    if scales is not None:
        as_bfloat16 = q_wide.dtype == jnp.bfloat16
        return _attend("apt_hidden_decode_int8", q_wide, pool, scales, blocks, length, as_bfloat16=as_bfloat16)
    return _attend("apt_hidden_decode", q_wide, pool, blocks, length)


def chunk(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array) -> Partial:
    """As `apt_jax.pallas_kernels.reference.chunk_attention`. Pure."""
    return _attend("apt_chunk", q, k.astype(jnp.float32), v.astype(jnp.float32), row)


KERNELS = Kernels("cpu", kv_decode, hidden_decode, chunk=chunk, reads_int8=True)


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


def _attend(target: str, q: jax.Array, *args: jax.Array, **options: bool) -> Partial:
    shapes = (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32))
    return Partial(*jax.ffi.ffi_call(target, shapes)(q.astype(jnp.float32), *args, **options))


@dataclass(frozen=True)
class LayersShape:
    """What all layers have in common.

    Attributes:
        num_blocks: P, the pool's blocks of a layer.
        norm_first: pre-norm.
        dynamic: of each kernel of a layer, whether rows are quantised for it if it is int8 (see `PackedInt8Kernel`).
            Keys and values of hidden rows are never multiplied so, since what is absorbed is not.
    """

    heads: int
    ffn_dim: int
    num_blocks: int
    norm_first: bool
    dynamic: Sequence[bool]

    @property
    def attributes(self) -> dict[str, np.int64 | bool]:
        """Attributes of the call."""
        dynamic = sum(own << i for i, own in enumerate(self.dynamic))
        return {
            "heads": np.int64(self.heads), "ffn": np.int64(self.ffn_dim), "blocks": np.int64(self.num_blocks),
            "norm_first": self.norm_first, "dynamic": np.int64(dynamic),
        }  # fmt: skip


class Coded(NamedTuple):
    """The arrays of an int8 pool, see apt_jax/attention/pool.py."""

    codes: jax.Array
    scales: jax.Array
    outside: jax.Array  # uint32 of one number


def all_layers(
    x: jax.Array, pool: jax.Array, rows: Rows, parameters: Sequence[jax.Array], shape: LayersShape
) -> tuple[jax.Array, jax.Array]:
    """All layers of a step: the residual stream `[T, D]` and the pool, both in place. Pure.

    Args:
        x: `[T, D]`. Tokens after which hidden states are not wanted get anything finite, padding stays as it is.
        rows: see `apt_jax/batching/arrays.py`.
        parameters: layer by layer in the order of `Layer` in layers.h, kernels from `packed.pack`, all of x's dtype, or
            from `packed_int8.pack_int8`, and after each kernel the scales of its outputs and factors of its inputs
            (powers of two), float32; one that the model or the kernel does not have is an array without elements.
    """
    new_x, new_pool = _in_place("apt_all_layers", x, pool)(x, pool, *_of_rows(rows), *parameters, **shape.attributes)
    return new_x, new_pool


def all_layers_int8(
    x: jax.Array,
    pool: Coded,
    channels: jax.Array,
    rows: Rows,
    parameters: Sequence[jax.Array],
    shape: LayersShape,
) -> tuple[jax.Array, Coded]:
    """As `all_layers`, with an int8 pool. Pure.

    Args:
        channels: `[2, L, D]`; without elements no row is hidden.
    """
    call = _in_place("apt_all_layers_int8", x, *pool)
    new_x, *new_pool = call(x, *pool, channels, *_of_rows(rows), *parameters, **shape.attributes)
    return new_x, Coded(*new_pool)


def _in_place(target: str, *arrays: jax.Array) -> Callable[..., Sequence[jax.Array]]:
    """A call that updates its first arguments."""
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    call: Callable[..., Sequence[jax.Array]] = jax.ffi.ffi_call(
        target, shapes, input_output_aliases={i: i for i in range(len(arrays))}
    )
    return call


def _of_rows(rows: Rows) -> list[jax.Array]:
    return [rows.start, rows.length, rows.prompt, rows.last, rows.wanted, rows.keep(Vector.HIDDEN), *rows.tables]
