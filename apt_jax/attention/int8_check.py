"""Check at start-up of the C++ kernels that read an int8 pool, against XLA's decode attention over the same pool."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from apt_jax.attention import xla
from apt_jax.attention.int8 import Channels
from apt_jax.attention.pool import Kept, Pool, scale_row
from apt_jax.cpu_kernels.calls import hidden_decode_int8, kv_decode_int8
from apt_jax.pallas_kernels.reference import Partial

_TOLERANCE = {4: 1e-4, 2: 2e-2}  # of the greatest number, by the bytes of the model's numbers
_LENGTHS = (0, 1, 17, 300)


def check_int8_kernels(*, heads: int, head_dim: int, block_size: int, dtype: DTypeLike) -> str | None:
    """Compare them on a few rows, blocks being NaN beyond a row's tokens; the reason not to use them, or None."""
    rng = np.random.default_rng(0)
    D, S, lengths = heads * head_dim, block_size, np.array(_LENGTHS, np.int32)
    pages = -(-max(_LENGTHS) // xla.CHUNK_TOKENS) * xla.CHUNK_TOKENS // S or 1
    tables = rng.permutation(2 * len(lengths) * pages).reshape(2, len(lengths), pages).astype(np.int32)
    used = np.zeros((tables.size, S), bool)
    for table in tables:
        for blocks, length in zip(table, lengths, strict=True):
            used[blocks] = np.arange(pages * S).reshape(pages, S) < length
    vectors = jnp.asarray(rng.standard_normal((tables.size * S, D), np.float32))
    shapes = jnp.zeros((tables.size, S, D), jnp.int8), jnp.zeros((tables.size, 1, scale_row(S, heads)), jnp.float32)
    empty = Pool(*shapes, heads=heads, computes=jnp.dtype(dtype))

    def pool_of(kept: Kept) -> tuple[Pool, tuple[jax.Array, jax.Array]]:
        assert kept.scales is not None
        scales = jnp.where(used.reshape(-1, 1), kept.scales, jnp.nan)
        pool = empty.replace_blocks(jnp.arange(tables.size), kept._replace(scales=scales))
        assert pool.scales is not None
        return pool, (pool.numbers, pool.scales)

    by_head, codes_by_head = pool_of(empty.keep(vectors.reshape(-1, heads, head_dim)))
    hidden, codes = pool_of(empty.keep_hidden(vectors, Channels(jnp.zeros(D), jnp.ones(D))))
    q = jnp.asarray(rng.standard_normal((len(lengths), heads, head_dim)) * head_dim**-0.5, dtype)
    wide = jnp.asarray(rng.standard_normal((len(lengths), heads, D)) * D**-0.5, dtype)
    keys, values, length = jnp.asarray(tables[0]), jnp.asarray(tables[1]), jnp.asarray(lengths)
    runs: dict[str, tuple[Callable[[], Partial], Callable[[], Partial]]] = {
        "kv_decode_int8": (
            lambda: kv_decode_int8(q, *codes_by_head, keys, values, length),
            lambda: xla.kv_decode(q, by_head, keys, values, length),
        ),
        "hidden_decode_int8": (
            lambda: hidden_decode_int8(wide, *codes, keys, length),
            lambda: xla.hidden_decode(wide.astype(jnp.float32), hidden, keys, length),
        ),
    }
    for name, run in runs.items():
        try:
            found, expected = (jax.device_get(each()) for each in run)
        except Exception as error:
            return f"{name} fails: {error}"
        wrong = np.abs(found.out - expected.out)[lengths > 0].max() / np.abs(expected.out[lengths > 0]).max()
        difference = np.maximum(wrong, np.abs(found.lse - expected.lse)[lengths > 0].max())
        tolerance = _TOLERANCE[jnp.dtype(dtype).itemsize]
        if not difference <= tolerance:
            return f"{name} differs from XLA by {difference:.1e}, more than {tolerance:.0e}"
    return None
