"""Which machine takes which place when groups are formed anew, so that weights and cache move least.

SpotServe (arXiv 2311.15566, section 3.3): a matching of machines and places, weighted by the bytes that a machine has
and its place needs, by Kuhn and Munkres' algorithm (scipy's). A place is a slice of a group's tensor parallelism:
[t / T, (t + 1) / T) of every layer's weights and of the cache of the requests that the group takes over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class Held:
    """What a machine has: a slice of the weights, and the same slice of the cache of a group of old."""

    group: int
    slice_of: int  # how many slices the group has
    number: int

    def overlap(self, slice_of: int, number: int) -> float:
        """Share of the whole that it has of another slice."""
        begin = max(self.number / self.slice_of, number / slice_of)
        return max(min((self.number + 1) / self.slice_of, (number + 1) / slice_of) - begin, 0.0)


@dataclass(frozen=True)
class Formation:
    """Groups of machines: `groups[d][t]` is the machine at slice t of group d."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def degree(self) -> int:
        """Slices of a group; 0 without groups."""
        return len(self.groups[0]) if self.groups else 0

    def held(self) -> dict[int, Held]:
        """What each machine of it has."""
        return {
            machine: Held(group, self.degree, number)
            for group, machines in enumerate(self.groups)
            for number, machine in enumerate(machines)
        }


@dataclass(frozen=True)
class Move:
    """A new formation and what has to move for it.

    Attributes:
        formation: the new groups.
        received_bytes: by each machine, of weights and cache.
        cold_bytes: of these, weights that no machine of the old formation has: they come from storage.
    """

    formation: Formation
    received_bytes: Mapping[int, float] = field(default_factory=dict)
    cold_bytes: Mapping[int, float] = field(default_factory=dict)

    def seconds(self, link_bytes_per_s: float, storage_bytes_per_s: float) -> list[float]:
        """Until each group has everything: a machine receives at its link's speed, and from storage at that one's."""
        return [
            max(
                (self.received_bytes[machine] - self.cold_bytes[machine]) / link_bytes_per_s
                + self.cold_bytes[machine] / storage_bytes_per_s
                for machine in machines
            )
            for machines in self.formation.groups
        ]


def inherit(cache_bytes: Sequence[float], num_groups: int) -> list[list[int]]:
    """Groups of old whose requests each new group takes over: the largest first, to whichever has least so far."""
    takes: list[list[int]] = [[] for _ in range(num_groups)]
    totals = [0.0] * num_groups
    for group in sorted(range(len(cache_bytes)), key=lambda g: -cache_bytes[g]):
        least = min(range(num_groups), key=lambda d: totals[d])
        takes[least].append(group)
        totals[least] += cache_bytes[group]
    return takes


def least_movement(
    held: Mapping[int, Held], machines: Sequence[int], takes: Sequence[Sequence[int]], degree: int, *,
    weight_bytes: float, cache_bytes: Sequence[float], assigns: bool = True,
) -> Move:  # fmt: skip
    """Put `machines` at the places of `len(takes)` groups of `degree` slices.

    Args:
        held: what machines have now, of those that will stay and of those that go (which can still send).
        machines: those that there are to choose from; at least as many as places.
        takes: for each new group, the groups of old whose requests it takes over.
        degree: slices of each new group.
        weight_bytes: of the whole model.
        cache_bytes: of each group of old.
        assigns: whether to look for the least movement; else machines are taken in order.
    """
    places = [(d, t) for d in range(len(takes)) for t in range(degree)]
    kept = np.zeros((len(machines), len(places)))
    for i, machine in enumerate(machines):
        have = held.get(machine)
        for j, (group, number) in enumerate(places):
            if have is not None:
                whole = weight_bytes + (cache_bytes[have.group] if have.group in takes[group] else 0.0)
                kept[i, j] = have.overlap(degree, number) * whole
    rows, columns = linear_sum_assignment(kept, maximize=True) if assigns else (range(len(places)), range(len(places)))
    at = {places[int(j)]: int(i) for i, j in zip(rows, columns, strict=True)}
    received, cold = {}, {}
    for j, (group, number) in enumerate(places):
        i = at[group, number]
        needed = (weight_bytes + sum(cache_bytes[g] for g in takes[group])) / degree
        received[machines[i]] = needed - kept[i, j]
        cold[machines[i]] = 0.0 if _covers(held, degree, number) else weight_bytes / degree
    groups = tuple(tuple(machines[at[d, t]] for t in range(degree)) for d in range(len(takes)))
    return Move(Formation(groups), received, cold)


def _covers(held: Mapping[int, Held], slice_of: int, number: int) -> bool:
    """Whether machines have all of a slice between them."""
    parts = sorted({(have.number / have.slice_of, (have.number + 1) / have.slice_of) for have in held.values()})
    reached, end = number / slice_of, (number + 1) / slice_of
    for begin, until in parts:
        if begin <= reached + 1e-12:
            reached = max(reached, until)
    return reached >= end - 1e-12
