"""The cache kinds that a compiled program handles, and which of them an iteration has at run time."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from apt_jax.batching.arrays import Rows
from apt_jax.cache import CacheKind, Vector


@dataclass(frozen=True)
class KindMix:
    """Cache kinds that a program's rows can have; fixed when it is traced.

    Attributes:
        kinds: each that can occur.
        all_occur: each of them occurs in every iteration, so that the program need not test for it.
    """

    kinds: tuple[CacheKind, ...]
    all_occur: bool = False

    def __contains__(self, kind: CacheKind) -> bool:
        return kind in self.kinds

    def __iter__(self) -> Iterator[CacheKind]:
        return iter(self.kinds)

    def keep(self, vector: Vector) -> bool:
        """Whether one of the kinds keeps that vector of each token."""
        return any(vector in kind.spec.vectors for kind in self.kinds)

    @property
    def asks(self) -> bool:
        """Whether the program tests at run time which kinds occur."""
        return len(self.kinds) > 1 and not self.all_occur

    @property
    def converts(self) -> bool:
        """Whether one of its kinds can be converted to another of them."""
        return any(kind.converts_to in self.kinds for kind in self.kinds)

    def parts(self) -> list["KindMix"]:
        """Every mix that the rows of one iteration can have, all of its kinds occurring."""
        numbers = range(1, 1 << len(self.kinds))
        return [
            KindMix(tuple(kind for i, kind in enumerate(self.kinds) if number >> i & 1), all_occur=True)
            for number in numbers
        ]

    def part_of(self, rows: Rows) -> jax.Array:
        """Index in `parts()`, an int32 scalar, of the mix that `rows` have; any index where no row runs."""
        running = rows.length > 0
        occurs = [jnp.any(running & rows.of_kind(kind)).astype(jnp.int32) << i for i, kind in enumerate(self.kinds)]
        return jnp.maximum(sum(occurs[1:], occurs[0]) - 1, 0)
