"""The interface of a scheduling policy, and the table of policies by name."""

from collections.abc import Callable
from typing import Protocol

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.state import SchedulerState


class Policy(Protocol):
    """Decides each iteration. It reads the state and never changes it; `now` is in seconds."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """The next iteration. Every step must advance some request if one is unfinished and can run."""
        ...

    def finished(self, request: Request, now: float) -> None:
        """Told once of every request that ends, for policies that learn."""
        ...


_POLICIES: dict[str, Callable[[], Policy]] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a policy available as `--scheduling-policy NAME`."""

    def add(policy: type) -> type:
        _POLICIES[name] = policy
        return policy

    return add


def policy_names() -> list[str]:
    """Names that `make_policy` takes."""
    _load()
    return sorted(_POLICIES)


def make_policy(name: str) -> Policy:
    """A fresh policy by name.

    Raises:
        ValueError: no policy has that name; the message lists those there are.
    """
    _load()
    if name not in _POLICIES:
        raise ValueError(f"unknown scheduling_policy={name!r}; known: {', '.join(policy_names())}")
    return _POLICIES[name]()


def _load() -> None:
    from apt_jax.scheduling import fcfs  # noqa: F401  (registers itself)
