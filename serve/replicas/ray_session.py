"""The only file that uses Ray's core: a session, and an `EngineActor` in a Ray actor."""

import importlib.util
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

from apt_jax.serve.replicas.actor import EngineActor
from apt_jax.serve.replicas.messages import Answer, Command, EngineSpec, Facts, Report

MISSING = "--replicas and --ray need Ray, which is not installed; pip install 'apt-jax[ray]'"
STORE_BYTES = 100 * 2**20  # of a Ray of this machine alone: only messages go through it

logger = logging.getLogger("apt_jax.serve")


def check_ray() -> None:
    """Whether Ray can be used; imports nothing.

    Raises:
        ValueError: it is not installed.
    """
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # some folder called ray
        raise ValueError(MISSING)


def import_ray() -> Any:
    """The package.

    Raises:
        ValueError: it is not installed.
    """
    check_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of messages to an actor that has died meanwhile
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # who reserves no GPU sees them all
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # the server has its own, without a stack trace
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # of log lines, which may go to a file
    import ray

    return ray


def connect(address: str | None, **options: Any) -> None:
    """Join the cluster at `address`, or start a local Ray, which ends with this process.

    Raises:
        ValueError: Ray is not installed.
        ConnectionError: there is no cluster at `address`.
    """
    ray = import_ray()
    if ray.is_initialized():
        return
    if address is None:
        alone = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "_node_ip_address": "127.0.0.1"}
        options = {**alone, **options}
    ray.init(address=address or "local", logging_level=logging.ERROR, **options)


def disconnect() -> None:
    """End the session, and every actor of it; doing it again changes nothing."""
    ray = import_ray()
    if ray.is_initialized():
        ray.shutdown()


class RayHandle:
    """An `EngineActor` in a process that Ray starts, somewhere in the cluster."""

    def __init__(self, name: str, spec: EngineSpec, resources: dict[str, Any]):
        self._ray = ray = import_ray()
        actor = ray.remote(EngineActor).options(**resources, scheduling_strategy="SPREAD", max_concurrency=100)
        self._actor = actor.remote(name, spec)

    async def start(self) -> Facts:
        """See `Handle`."""
        try:
            return await self._actor.start.remote()
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    async def reports(self) -> AsyncIterator[Report]:
        """See `Handle`."""
        async for reference in self._actor.reports.options(num_returns="streaming").remote():
            yield await reference

    def command(self, number: int, commands: list[Command]) -> None:
        """See `Handle`."""
        self._actor.command.remote(number, commands)

    async def ask(self, question: str, argument: Any = "") -> Answer:
        """See `Handle`."""
        return await self._actor.ask.remote(question, argument)

    def kill(self) -> None:
        """See `Handle`."""
        self._ray.kill(self._actor)
