"""Vectors as 8-bit numbers: what an int8 cache keeps of keys, values and hidden vectors.

Keys and values: `x = scale * code`, with a scale for each token and head. Hidden vectors: `h = centre + width * t *
code`, with a static centre and width for each layer and channel, since a few channels of OPT are up to a hundred times
larger than the others, and a scale t for each token. Codes are in -127..127; a scale is the largest magnitude through
127, so nothing is clipped. Source: docs/hybrid_cache.md.

Shape letters as in docs/architecture.md; G groups of numbers that share a scale.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LARGEST = 127  # code


class Coded(NamedTuple):
    """Vectors as codes `[..., D]` in groups of D / G numbers, and float32 scales `[..., G]` of these."""

    codes: jax.Array
    scales: jax.Array


def encode(x: jax.Array, groups: int) -> Coded:
    """Codes and scales of vectors `[..., D]`. Pure.

    A group with a number that is not finite gets a scale that is not, so that it is not finite when it is decoded.
    """
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    scales = jnp.abs(parts).max(-1) / LARGEST
    usable = (scales > 0) & jnp.isfinite(scales)
    codes = jnp.round(parts / jnp.where(usable, scales, 1)[..., None])
    codes = jnp.where(usable[..., None], codes, 0).astype(jnp.int8)
    return Coded(codes.reshape(x.shape), scales)


def decode(coded: Coded, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The vectors `[..., D]` that codes and scales stand for. Pure."""
    codes, scales = coded
    parts = codes.reshape(*codes.shape[:-1], scales.shape[-1], -1)
    return (parts.astype(jnp.float32) * scales[..., None]).reshape(codes.shape).astype(dtype)


@dataclass(frozen=True)
class Channels:
    """Centre and width of each channel of a layer's hidden vectors, float32 `[D]`; neither where they are not coded.

    A cached vector stands for `centre + width * x`, where x is what the pool gives. Absorbed attention does not compute
    that: the widths go into the query and the context, and the centre adds a constant to all scores of a query, which
    the softmax cancels, and once to the context.
    """

    centre: jax.Array | None = None
    width: jax.Array | None = None

    def relative(self, h: jax.Array) -> jax.Array:
        """`x` of hidden vectors `[..., D]`, float32."""
        assert self.centre is not None and self.width is not None
        return (h.astype(jnp.float32) - self.centre) / self.width

    def vectors(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Hidden vectors `[..., D]` of `x`: what a cached vector stands for."""
        if self.centre is None or self.width is None:
            return x.astype(dtype)
        return (self.centre + self.width * x.astype(jnp.float32)).astype(dtype)

    def query(self, wide: jax.Array) -> jax.Array:
        """What absorbed queries `[..., D]` are over `x` instead of hidden vectors."""
        return wide if self.width is None else wide * self.width

    def constant_score(self, wide: jax.Array) -> jax.Array:
        """What `query` leaves out of every score of an absorbed query, `[..., D] -> [...]`, of this device's channels.

        It cancels in a softmax, but counts when parts of a context are merged.
        """
        if self.centre is None:
            return jnp.zeros(wide.shape[:-1], jnp.float32)
        return jnp.einsum("...D,D->...", wide.astype(jnp.float32), self.centre)

    def context(self, x: jax.Array) -> jax.Array:
        """Context over hidden vectors of one over `x`, `[..., D]`: weights sum to 1, so the centre is added once."""
        if self.centre is None or self.width is None:
            return x
        return (self.centre + self.width * x.astype(jnp.float32)).astype(x.dtype)
