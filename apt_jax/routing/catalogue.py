"""The table of routers by name. To add one: a class that is a `Router` (`interface.py`), and a row."""

from collections.abc import Callable

from apt_jax.routing.interface import Router
from apt_jax.routing.pending_time import PendingTime
from apt_jax.routing.prefix import Prefix
from apt_jax.routing.simple import LeastRequests, PowerOfTwo, Random, RoundRobin

DEFAULT_ROUTER = "pending-time"
# Called with a seed.
ROUTERS: dict[str, Callable[[int], Router]] = {
    "least-requests": LeastRequests,
    "pending-time": PendingTime,
    "power-of-two": PowerOfTwo,
    "prefix": Prefix,
    "random": Random,
    "round-robin": RoundRobin,
}


def router_names() -> list[str]:
    """Names that `make_router` takes."""
    return sorted(ROUTERS)


def make_router(name: str = DEFAULT_ROUTER, seed: int = 0) -> Router:
    """A fresh router by name.

    Raises:
        ValueError: no router has that name; the message lists what there is.
    """
    if name not in ROUTERS:
        raise ValueError(f"unknown router={name!r}; known: {', '.join(router_names())}")
    return ROUTERS[name](seed)
