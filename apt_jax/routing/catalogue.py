"""The interface of a router, the table of routers by name, and the usual routers that know nothing about scheduling.

A router answers one question: which instance gets this request. It gets every instance's last report, which may be
old, and adds what it sent itself after the report was counted (`sent.py`), so that all requests of an interval do not
go to the instance that looked best at its start. One router must not be used by two threads at a time.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from apt_jax.request import Slo
from apt_jax.routing.instance import InstanceLoad
from apt_jax.routing.sent import Sent


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What is known of a request before it is sent anywhere.

    Attributes:
        prompt_tokens: of its prompt, and of what it has generated elsewhere if it moves.
        time_s: now, in the router's clock.
        slo: its SLO.
        waited_s: seconds since it arrived at the service.
        has_started: it moves here with tokens out already: its first token is no longer a question.
    """

    prompt_tokens: int
    time_s: float
    slo: Slo = field(default_factory=Slo)
    waited_s: float = 0.0
    has_started: bool = False

    @property
    def left_s(self) -> float:
        """Seconds in which its first token is due; infinite if it is out."""
        return math.inf if self.has_started else self.slo.ttft_s - self.waited_s


class Router(Protocol):
    """Chooses instances. Deterministic: the same seed, requests and reports give the same answers."""

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """The index in `loads` of the instance that gets `request`; it counts as sent there.

        Args:
            request: what is known of it.
            loads: the last report of each instance that may be chosen; their number and order may change between calls.

        Raises:
            ValueError: `loads` is empty.
        """
        ...


_ROUTERS: dict[str, Callable[[int], Router]] = {}
DEFAULT_ROUTER = "pending-time"


def register[R: type](name: str) -> Callable[[R], R]:
    """Class decorator: make a router available as `--router NAME`. The class is called with the seed."""

    def add(router: R) -> R:
        _ROUTERS[name] = router
        return router

    return add


def router_names() -> list[str]:
    """Names that `make_router` takes."""
    _load()
    return sorted(_ROUTERS)


def make_router(name: str = DEFAULT_ROUTER, seed: int = 0) -> Router:
    """A fresh router by name.

    Raises:
        ValueError: no router has that name; the message lists what there is.
    """
    _load()
    if name not in _ROUTERS:
        raise ValueError(f"unknown router={name!r}; known: {', '.join(router_names())}")
    return _ROUTERS[name](seed)


@register("round-robin")
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


@register("random")
class Random:
    """Drawn by lot."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """Any."""
        check_loads(loads)
        return self._random.randrange(len(loads))


@register("least-requests")
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


@register("power-of-two")
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


def check_loads(loads: Sequence[InstanceLoad]) -> None:
    """Raise ValueError if there is no instance."""
    if not loads:
        raise ValueError("loads is empty: no instance can take a request; start one, or wait until one is ready")


def _load() -> None:
    from apt_jax.routing import pending_time  # noqa: F401  (registers itself)
