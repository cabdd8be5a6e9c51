"""One replica as the front sees it."""

import asyncio
import dataclasses
import enum
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from apt_jax.routing.instance import InstanceLoad
from apt_jax.serve.replicas.leaving.hand_over import Link, measured
from apt_jax.serve.replicas.messages import Answer, Command, Facts, Report
from apt_jax.serve.replicas.route import Route


class ReplicaStatus(enum.Enum):
    """The value is what /debug/state reports."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class Handle(Protocol):
    """An `EngineActor` elsewhere. Every method but `command` and `kill` raises when it has died."""

    async def start(self) -> Facts:
        """See `EngineActor.start`; raises what the engine failed with."""

    def reports(self) -> AsyncIterator[Report]:
        """See `EngineActor.reports`."""

    def command(self, number: int, commands: list[Command]) -> None:
        """Send a message, without waiting for it."""

    async def ask(self, question: str, argument: Any = "") -> Answer:
        """See `EngineActor.ask`."""

    def kill(self) -> None:
        """End the process at once."""


class Replica:
    """A handle, the last report, and the groups that were sent there."""

    def __init__(self, name: str, generation: int, handle: Handle):
        self.name = name
        self.generation = generation
        self.handle = handle
        self.status = ReplicaStatus.STARTING
        self.facts: Facts | None = None
        self.load: InstanceLoad | None = None  # in the front's clock
        self.blocks: dict[str, int] = {}
        self.counts: dict[str, int] = {}  # of its metrics, as reported last
        self.routes: dict[int, Route] = {}  # by ticket
        self.trouble: str | None = None  # why its engine is unhealthy, as reported last
        self.is_given_up = False  # killed because of it
        self.gone_s: float | None = None  # when its machine is taken away, in the front's clock
        self.seen: dict[str, Link] = {}  # to other replicas, by transfers that were made
        self._link: Link | None = None  # between it and the front, once that was measured
        self.quiet_checks = 0  # of the keeper's, since the last report
        self._offset_s = 0.0  # its clock minus the front's
        self._outbox: list[Command] = []
        self._sent = 0

    async def start(self) -> Facts:
        """Wait until its engine is ready.

        Raises:
            Exception: what it failed with.
        """
        self.facts = await self.handle.start()
        if abs(self.facts.clock_s - time.monotonic()) > 1.0:  # another machine's; a reply takes milliseconds
            self._offset_s = self.facts.clock_s - time.monotonic()
        return self.facts

    async def link(self) -> Link:
        """Between it and the front.

        Raises:
            Exception: it has died.
        """
        self._link = self._link or await measured(self.handle)
        return self._link

    async def link_to(self, target: "Replica") -> Link:
        """To another replica, through the front; by the last transfer there, if there was one."""
        return self.seen.get(target.name) or (await self.link()).then(await target.link())

    def note(self, report: Report) -> None:
        """Keep the load. What the replica has not confirmed is not in it, so it is no newer than that."""
        self.quiet_checks = 0
        self.trouble, self.counts = report.trouble, report.counts
        if report.lasts_s is not None and self.gone_s is None:
            self.gone_s = time.monotonic() + report.lasts_s
        if report.load is None:
            return
        time_s = report.load.time_s - self._offset_s
        for route in self.routes.values():
            if not route.is_confirmed:
                time_s = min(time_s, route.sent_s)
        self.load = dataclasses.replace(report.load, instance=self.name, time_s=time_s)
        self.blocks = report.blocks

    def send(self, command: Command) -> None:
        """Send, together with what else is sent from this turn of the event loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(command)

    def _flush(self) -> None:
        commands, self._outbox = self._outbox, []
        if self.status is not ReplicaStatus.GONE:
            self.handle.command(self._sent, commands)
            self._sent += 1
