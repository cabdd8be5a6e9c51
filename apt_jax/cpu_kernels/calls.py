"""The C++ kernels as functions for compiled programs on a CPU; `library.register` comes first."""

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.cpu_kernels import large_pages
from pallas_kernels.dispatch import Kernels
from pallas_kernels.reference import Partial


def kv_decode(
    q: jax.Array, pool: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array
) -> Partial:
    """As `pallas_kernels.reference.kv_decode_attention`. Pure."""
    return _attend("apt_kv_decode", q, pool, key_blocks, value_blocks, length)


def hidden_decode(q_wide: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array) -> Partial:
    """As `pallas_kernels.reference.hidden_decode_attention`. Pure."""
    return _attend("apt_hidden_decode", q_wide, pool, blocks, length)


def chunk(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array) -> Partial:
    """As `pallas_kernels.reference.chunk_attention`. Pure."""
    return _attend("apt_chunk", q, k.astype(jnp.float32), v.astype(jnp.float32), row)


KERNELS = Kernels("cpu", kv_decode, hidden_decode, chunk=chunk)
PANEL = 32  # outputs; as kPanel in panels.h


def panels_of(kernel: np.ndarray) -> np.ndarray:
    """A kernel `[inputs, outputs]` as `matmul` takes it, `[panels, inputs, PANEL]`; zeros complete the last panel.

    It lies in memory with large pages where the system has them, which is read up to a quarter faster.
    """
    inputs, outputs = kernel.shape
    panels = -(-outputs // PANEL)
    found = large_pages.empty((panels, inputs, PANEL), kernel.dtype)
    whole = outputs // PANEL
    found[:whole] = kernel[:, : whole * PANEL].reshape(inputs, whole, PANEL).swapaxes(0, 1)
    if whole < panels:
        found[whole] = 0
        found[whole, :, : outputs - whole * PANEL] = kernel[:, whole * PANEL :]
    return found


def matmul(x: jax.Array, panels: jax.Array, outputs: int) -> jax.Array:
    """Float32 `[R, outputs]`: `x [R, inputs]` times a kernel of float32 or bfloat16 from `panels_of`. Pure.

    Sums are of float32 products, and those of a row do not depend on the other rows.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    return jax.ffi.ffi_call("apt_matmul", shape)(x.astype(jnp.float32), panels)


def _attend(target: str, q: jax.Array, *args: jax.Array) -> Partial:
    shapes = (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32))
    return Partial(*jax.ffi.ffi_call(target, shapes)(q.astype(jnp.float32), *args))
