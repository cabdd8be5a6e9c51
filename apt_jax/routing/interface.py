"""The interface of a router: what it is asked, and what it answers.

A router answers one question: which instance gets this request. It gets every instance's last report, which may be
old, and adds what it sent itself after the report was counted (`sent.py`), so that all requests of an interval do not
go to the instance that looked best at its start. One router must not be used by two threads at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from apt_jax.request import Slo
from apt_jax.routing.instance import InstanceLoad


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What is known of a request before it is sent anywhere.

    Attributes:
        prompt_tokens: of its prompt, and of what it has generated elsewhere if it moves.
        time_s: now, in the router's clock.
        slo: its SLO.
        waited_s: seconds since it arrived at the service.
        has_started: it moves here with tokens out already: its first token is no longer a question.
        token_ids: its prompt, for routers that know prefixes.
        cache_salt: only requests with the same one share prefixes.
    """

    prompt_tokens: int
    time_s: float
    slo: Slo = field(default_factory=Slo)
    waited_s: float = 0.0
    has_started: bool = False
    token_ids: Sequence[int] = field(default=(), repr=False)
    cache_salt: str | None = None

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


@runtime_checkable
class Remembers(Protocol):
    """A router that remembers what instances have cached."""

    def forget(self) -> None:
        """The caches of all instances have been emptied."""


def check_loads(loads: Sequence[InstanceLoad]) -> None:
    """Raise ValueError if there is no instance."""
    if not loads:
        raise ValueError("loads is empty: no instance can take a request; start one, or wait until one is ready")
