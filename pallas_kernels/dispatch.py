"""Which decode kernels a platform has, and whether they compute what they should on this very device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import reference
from pallas_kernels.reference import Partial

_TOLERANCE = {2: 2e-2, 4: 1e-3}  # by bytes of a number; float32 kernels may multiply in a shorter format


class Kernels(NamedTuple):
    """The decode kernels of a platform, with the signatures of `reference.py`.

    Looser than there: `hidden_decode` may give `out` in the pool's dtype, and anything in rows of length 0. It is None
    where there is no kernel for hidden rows and XLA attends to them.
    """

    name: str
    kv_decode: Callable[..., Partial]
    hidden_decode: Callable[..., Partial] | None


REFERENCES = Kernels("reference", reference.kv_decode_attention, reference.hidden_decode_attention)


def kernels_for(device: jax.Device) -> Kernels:
    """The kernels for a device's platform; on a CPU those for TPU, interpreted.

    Raises:
        NotImplementedError: there are none for this platform, or this generation of GPUs.
    """
    if device.platform == "gpu":
        return gpu_kernels(device.compute_capability)
    if device.platform == "tpu":
        return tpu_kernels("tpu", cores=getattr(device, "num_cores", None) or 1, interpret=False)
    if device.platform == "cpu":
        return tpu_kernels("tpu-interpreted", cores=1, interpret=True)
    raise NotImplementedError(f"there are no Pallas kernels for platform {device.platform!r}; use tpu, gpu or cpu")


def gpu_kernels(compute_capability: str) -> Kernels:
    """The GPU kernels: Hopper (9.0) has both; later and Ampere and Ada (8.0 and up) that for KV, without tensor cores.

    Raises:
        NotImplementedError: an older GPU, or one of another make.
    """
    from pallas_kernels import gpu_hidden_decode, gpu_kv_decode, gpu_kv_fma

    generation = compute_capability.split(".")[0]
    if generation == "9":
        return Kernels("gpu", gpu_kv_decode.kv_decode_attention, gpu_hidden_decode.hidden_decode_attention)
    if generation.isdecimal() and int(generation) >= 8:
        return Kernels("gpu-kv", gpu_kv_fma.kv_decode_attention, None)
    raise NotImplementedError(
        f"there are no Pallas kernels for GPUs of {compute_capability=}; they need 8.0 (KV) or 9.0 (KV and hidden)"
    )


def tpu_kernels(name: str, **options: Any) -> Kernels:
    """The TPU kernels, with options that both have (`cores`, `interpret`)."""
    from pallas_kernels import tpu_hidden_decode, tpu_kv_decode

    def hidden_decode(q_wide: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array) -> Partial:
        kernel = tpu_hidden_decode.hidden_decode_attention
        return kernel(q_wide, pool, blocks, length, out_dtype=pool.dtype, clears=False, **options)

    return Kernels(name, functools.partial(tpu_kv_decode.kv_decode_attention, **options), hidden_decode)


def self_check(kernels: Kernels, *, heads: int, head_dim: int, block_size: int, dtype: DTypeLike) -> str | None:
    """Run the kernels on a few rows against the references, on the default device; why they cannot be used, or None.

    Rows have no token, one, a block and one more, and several hundred; blocks are shuffled and NaN beyond a row's
    length. Takes some seconds, most of it compiling.
    """
    D, dtype = heads * head_dim, jnp.dtype(dtype)
    lengths = np.array([block_size + 1, 0, 1, 517], np.int32)
    pages = -(-lengths.max() // block_size)
    rng = np.random.default_rng(0)
    blocks = rng.permutation(4 * 2 * pages).reshape(2, 4, pages).astype(np.int32)
    vectors = rng.standard_normal((8 * pages, block_size, D), np.float32)
    for table in blocks:
        for row, length in zip(table, lengths, strict=True):
            position = np.arange(pages * block_size).reshape(pages, block_size)
            vectors[row] = np.where((position < length)[..., None], vectors[row], np.nan)
    pool = jnp.asarray(vectors, dtype)
    q = jnp.asarray(rng.standard_normal((4, heads, head_dim), np.float32) * head_dim**-0.5, dtype)
    q_wide = jnp.asarray(rng.standard_normal((4, heads, D), np.float32) * D**-0.5, dtype)
    cases = {
        "kv_decode": (q, pool, blocks[0], blocks[1], lengths),
        "hidden_decode": (q_wide, pool, blocks[0], lengths),
    }
    for name, args in cases.items():
        if getattr(kernels, name) is None:
            continue
        try:
            found, expected = (jax.device_get(getattr(k, name)(*map(jnp.asarray, args))) for k in (kernels, REFERENCES))
        except Exception as error:
            return f"{name} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        out = np.asarray(found.out, np.float32)
        difference = np.abs(out - expected.out)[lengths > 0].max() / np.abs(expected.out).max()
        difference = max(difference, np.abs(np.where(expected.lse < -1e29, 0, found.lse - expected.lse)).max())
        if not difference <= _TOLERANCE[dtype.itemsize]:
            return f"{name} differs from its reference by {difference:.1e}, more than {_TOLERANCE[dtype.itemsize]:.0e}"
    return None
