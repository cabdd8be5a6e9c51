"""The C++ kernels as functions for compiled programs on a CPU; `library.register` comes first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from apt_jax.batching.builder import Rows
from apt_jax.cpu_kernels.large_pages import LargePages, aligned
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
PANEL = 32  # outputs; as kPanel in matmul.h


def takes(inputs: int, dtype: DTypeLike) -> bool:
    """Whether `matmul` knows such kernels: of bfloat16 two inputs lie side by side."""
    return dtype == jnp.float32 or (dtype == jnp.bfloat16 and inputs % 2 == 0)


def panels_bytes(inputs: int, outputs: int, dtype: DTypeLike) -> int:
    """What `panels_of` a kernel takes of `LargePages`."""
    return aligned(-(-outputs // PANEL) * inputs * PANEL * np.dtype(dtype).itemsize)


def panels_of(kernel: np.ndarray, memory: LargePages | None = None) -> np.ndarray:
    """A kernel `[inputs, outputs]` as `matmul` takes it; zeros complete the last panel.

    Args:
        kernel: one that `matmul` takes.
        memory: where it is to be: from large pages it is read up to a quarter faster. None takes any.

    Returns:
        `[panels, inputs, PANEL]`, of bfloat16 `[panels, inputs / 2, PANEL, 2]`.
    """
    inputs, outputs = kernel.shape
    wide = _in_step(kernel.dtype)
    panels, whole = -(-outputs // PANEL), outputs // PANEL
    shape = (panels, inputs // wide, PANEL, wide)
    found = np.empty(shape, kernel.dtype) if memory is None else memory.empty(shape, kernel.dtype)
    steps = kernel.reshape(inputs // wide, wide, outputs)
    found[:whole] = steps[:, :, : whole * PANEL].reshape(*steps.shape[:2], whole, PANEL).transpose(2, 0, 3, 1)
    if whole < panels:
        found[whole] = 0
        found[whole, :, : outputs - whole * PANEL] = steps[:, :, whole * PANEL :].swapaxes(1, 2)
    return found if wide > 1 else found[..., 0]


def inputs_first(panels: jax.Array) -> jax.Array:
    """`[panels, inputs, PANEL]` of any panels. Pure."""
    if panels.ndim == 3:
        return panels
    return panels.swapaxes(2, 3).reshape(len(panels), -1, PANEL)


def outputs_at(panels: jax.Array, index: jax.Array) -> jax.Array:
    """The kernel's columns `index [...]`, `[..., inputs]`. Pure."""
    return panels[index // PANEL, :, index % PANEL].reshape(*index.shape, -1)


def matmul(x: jax.Array, panels: jax.Array, outputs: int) -> jax.Array:
    """Float32 `[R, outputs]`: `x [R, inputs]` times a kernel of float32 or bfloat16 from `panels_of`. Pure.

    Sums are of float32 products, or of bfloat16 ones if both are that and the processor multiplies it; those of a row
    do not depend on the other rows.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    return jax.ffi.ffi_call("apt_matmul", shape)(x if x.dtype == panels.dtype else x.astype(jnp.float32), panels)


def _in_step(dtype: DTypeLike) -> int:
    return 2 if dtype == jnp.bfloat16 else 1  # as kInStep in matmul.h


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
) -> tuple[jax.Array, jax.Array]:
    """All layers of a step: the residual stream `[T, D]` and the pool, both in place. Pure.

    Args:
        x: `[T, D]`. Tokens after which hidden states are not wanted get anything finite, padding stays as it is.
        rows: see `apt_jax/batching/builder.py`.
        parameters: layer by layer in the order of `Layer` in layers.h, kernels from `panels_of`, all of x's dtype; one
            that the model does not have is an array without elements.
        num_blocks: P, the pool's blocks of a layer.
    """
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(pool.shape, pool.dtype))
    call = jax.ffi.ffi_call("apt_all_layers", shapes, input_output_aliases={0: 0, 1: 1})
    new_x, new_pool = call(
        x, pool, rows.start, rows.length, rows.last, rows.wanted, rows.is_hidden, rows.first_blocks, rows.second_blocks,
        *parameters,
        heads=np.int64(heads), ffn=np.int64(ffn_dim), blocks=np.int64(num_blocks), norm_first=norm_first,
    )  # fmt: skip
    return new_x, new_pool
