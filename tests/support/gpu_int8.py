"""The GPU kernels over int8 pools with scales as a third argument: functions of a module, for `gpu_interpreter`."""

import jax

from apt_jax.pallas_kernels.gpu import hidden_decode, hidden_prefix, kv_decode, kv_fma, kv_prefix
from apt_jax.pallas_kernels.reference import Partial


def kv_decode_attention(
    q: jax.Array, pool: jax.Array, scales: jax.Array, *rest: jax.Array, interpret: object
) -> Partial:
    """`gpu/kv_decode.py`, cut into splits of two chunks."""
    return kv_decode.kv_decode_attention(q, pool, *rest, scales=scales, split_tokens=128, interpret=interpret)


def kv_fma_attention(
    q: jax.Array, pool: jax.Array, scales: jax.Array, *rest: jax.Array, split: int | None, tiles: int, interpret: object
) -> Partial:
    """`gpu/kv_fma.py`."""
    return kv_fma.kv_decode_attention(
        q, pool, *rest, scales=scales, split_tokens=split, strides_at_once=tiles, interpret=interpret
    )


def hidden_decode_attention(
    q: jax.Array, pool: jax.Array, scales: jax.Array, *rest: jax.Array, interpret: object
) -> Partial:
    """`gpu/hidden_decode.py`."""
    return hidden_decode.hidden_decode_attention(q, pool, *rest, scales=scales, interpret=interpret)


def kv_prefix_attention(
    q: jax.Array, pool: jax.Array, scales: jax.Array, *rest: jax.Array, interpret: object
) -> Partial:
    """`gpu/kv_prefix.py`."""
    return kv_prefix.kv_prefix_attention(q, pool, *rest, scales=scales, interpret=interpret)


def hidden_prefix_attention(
    q: jax.Array, pool: jax.Array, scales: jax.Array, *rest: jax.Array, interpret: object
) -> Partial:
    """`gpu/hidden_prefix.py`."""
    return hidden_prefix.hidden_prefix_attention(q, pool, *rest, scales=scales, interpret=interpret)
