"""The usual routers, which know nothing about scheduling."""

import random
from collections.abc import Sequence

from apt_jax.routing.instance import InstanceLoad
from apt_jax.routing.interface import RouteRequest, check_loads
from apt_jax.routing.sent import Sent


class RoundRobin:
    """One instance after the other, in the order of `loads`."""

    def __init__(self, seed: int = 0):
        self._next = 0

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """The next one."""
        check_loads(loads)
        index = self._next % len(loads)
        self._next = index + 1
        return index


class Random:
    """Drawn by lot."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """Any."""
        check_loads(loads)
        return self._random.randrange(len(loads))


class LeastRequests:
    """The instance with the fewest unfinished requests; ties are broken by lot."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)
        self._sent = Sent()

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """The one with the fewest."""
        check_loads(loads)
        counts = [load.num_requests + self._sent.since(load).num_requests for load in loads]
        fewest = min(counts)
        index = self._random.choice([i for i, count in enumerate(counts) if count == fewest])
        self._sent.add(loads[index], request)
        return index


class PowerOfTwo:
    """Of two instances drawn by lot the one with fewer unfinished requests.

    Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (IEEE TPDS 2001).
    """

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)
        self._sent = Sent()

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """The better of two."""
        check_loads(loads)
        drawn = self._random.sample(range(len(loads)), min(2, len(loads)))
        index = min(drawn, key=lambda i: loads[i].num_requests + self._sent.since(loads[i]).num_requests)
        self._sent.add(loads[index], request)
        return index
