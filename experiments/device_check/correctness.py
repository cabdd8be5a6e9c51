"""Every kernel against its reference: decode, prefix and chunk attention, and writes; 16 bits, int8 cache, float32."""

from functools import partial
from typing import Any

import jax.numpy as jnp

from apt_jax.pallas_kernels import dispatch
from apt_jax.pallas_kernels.dispatch import Kernels
from experiments.device_check.session import NotThere, Session

ATTENTION = ("kv_decode", "hidden_decode", "kv_prefix", "hidden_prefix", "chunk")
WRITER = "cache_writer"
LIMIT_S = 40.0  # compiling takes most of it; a kernel that hangs costs so much


class Wrong(ArithmeticError):
    """A kernel does not compute what its reference does."""


def run(session: Session) -> None:
    """One measurement for each kernel, number type and shape, the larger shape first."""
    kernels = dispatch.kernels_for(session.device)
    for heads, head_dim in session.sizes.checked:
        for name in session.sizes.numbers:
            is_coded = name == "int8"
            shape: dict[str, Any] = {
                "heads": heads, "head_dim": head_dim, "dtype": jnp.bfloat16 if is_coded else jnp.dtype(name)
            }  # fmt: skip
            pool = {
                "block_size": session.sizes.int8_block_size if is_coded else session.sizes.block_size,
                "is_coded": is_coded,
            }
            for kernel in ATTENTION:
                if kernel != "chunk" or not is_coded:
                    measure = partial(_attention, kernels, kernel, **shape, **pool)
                    session.check(f"{kernel} {name} {heads}x{head_dim}", measure, limit_s=LIMIT_S)
            writes = partial(_writes, kernels, **shape, **pool)
            session.check(f"writes {name} {heads}x{head_dim}", writes, limit_s=LIMIT_S)


def _attention(kernels: Kernels, name: str, **shape: Any) -> dict[str, Any]:
    if getattr(kernels, name) is None or (shape["is_coded"] and not kernels.reads_int8):
        raise NotThere("XLA computes it on this device")
    try:
        found = dispatch.difference(kernels, name, **shape)
    except NotImplementedError as error:
        raise NotThere(f"XLA computes it in this shape: {error}") from error
    if not found.is_small:
        raise Wrong(f"{name} differs from its reference by {found.largest:.1e}, more than {found.tolerance:.0e}")
    return {"difference": found.largest, "tolerance": found.tolerance}


def _writes(kernels: Kernels, **shape: Any) -> dict[str, Any]:
    """Of an int8 pool its scales too."""
    if getattr(kernels, WRITER) is None:
        raise NotThere("XLA writes to the cache on this device")
    reason = dispatch.check_cache_writer(kernels, **shape)
    if reason is not None:
        raise Wrong(reason)
    return {"difference": 0.0, "tolerance": 0.0}
