"""What one attempt at an iteration has decided so far. A value: each step takes a draft and returns a new one.

An attempt that turns out badly is dropped and the next one starts afresh.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Ints


class Admission(NamedTuple):
    """A waiting request, by its position in the queue, that gets `blocks` as `kind`.

    `victims` are the running requests, by position, that are preempted for it and for no other.
    """

    position: int
    kind: CacheKind
    reason: Reason
    blocks: int
    victims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draft:
    """An attempt. Arrays are `[running]`.

    Attributes:
        decodes: whether it computes a token, unless it is preempted.
        prefills: whether it continues its prefill, unless it is preempted.
        mixes: whether decodes and prompt chunks share the iteration.
        claims: blocks that preempting it gives back: those it alone holds and those set aside for its growth.
        free_blocks: blocks that are neither held nor reserved.
        seats: requests that may still be admitted under `max_num_seqs`.
        preempted: why, by index in the running queue, in the order decided.
        admitted: in the order decided.
    """

    decodes: Bools
    prefills: Bools
    mixes: bool
    claims: Ints
    free_blocks: int
    seats: int
    preempted: Mapping[int, Reason] = field(default_factory=dict)
    admitted: tuple[Admission, ...] = ()

    @cached_property
    def stays(self) -> Bools:
        """Whether it is not preempted."""
        stays = np.ones(len(self.claims), np.bool_)
        stays[list(self.preempted)] = False
        return stays

    @cached_property
    def decode_index(self) -> Ints:
        """Indices of the running requests that decode."""
        return np.flatnonzero(self.decodes & self.stays)

    def without(self, dropped: Collection[int]) -> "Draft":
        """This draft without these admissions, by index; those preempted for them stay as far as there is room."""
        kept = tuple(entry for k, entry in enumerate(self.admitted) if k not in dropped)
        gone = [entry for k, entry in enumerate(self.admitted) if k in dropped]
        free = self.free_blocks + sum(entry.blocks for entry in gone)
        seats, spared = self.seats + len(gone), set()
        for entry in reversed(gone):
            for victim in entry.victims:
                if self.claims[victim] <= free and seats > 0:
                    free, seats = free - int(self.claims[victim]), seats - 1
                    spared.add(victim)
        return replace(
            self, admitted=kept, free_blocks=free, seats=seats,
            preempted={i: reason for i, reason in self.preempted.items() if i not in spared},
        )  # fmt: skip

    @property
    def runs_any(self) -> bool:
        """Whether any request holds memory under this draft."""
        return bool(self.admitted) or len(self.preempted) < len(self.claims)
