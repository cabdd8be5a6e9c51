"""The backend of replicas: routes groups to them, and continues a lost replica's groups on other replicas.

Nothing is answered twice: a replica's outputs count only under the ticket of the current attempt, and the front keeps
every token that it has delivered. A group continues from there, with the seed that it began with.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from apt_jax.engine.interface import EngineFacts
from apt_jax.output import Output, QueueFull
from apt_jax.routing.interface import Router
from apt_jax.serve.errors import EngineFailure, NotReady
from apt_jax.serve.replicas.leaving.hand_over import LATEST_S, Leaving, Pages
from apt_jax.serve.replicas.messages import Abort, Accepted, Brought, Event, Refused, Report
from apt_jax.serve.replicas.replica import Replica, ReplicaStatus
from apt_jax.serve.replicas.route import Route
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.observer import Observer, Stepped
from apt_jax.serve.runtime.samples import Sample, has_broken_slo
from apt_jax.serve.runtime.status import EngineStatus

MOST_MOVES = 3  # of a group, after replicas were lost under it: it may be what breaks them

logger = logging.getLogger("apt_jax.serve")


class Fleet:
    """Replicas that accept requests, and where each group is. Everything runs on one event loop."""

    def __init__(self, router: Router, seed: int, clock: Callable[[], float] = time.monotonic):
        self.observers: list[Observer] = []
        self.replicas: list[Replica] = []
        self.facts: EngineFacts | None = None
        self.failed = self.stopped = False
        self.num_moved = 0  # groups that went on elsewhere
        self.moved_tokens = 0  # of these, whose cached pages went with them
        self.router = router
        self._seeds = np.random.default_rng(seed)
        self._clock = clock
        self._routes: dict[int, Route] = {}  # by ticket
        self._by_group: dict[int, Route] = {}  # by the group's identity
        self._parked: list[Route] = []  # nowhere, until a replica takes them
        self._tickets = 0

    @property
    def status(self) -> EngineStatus:
        """READY while one replica is."""
        if self.stopped or self.failed:
            return EngineStatus.STOPPED if self.stopped else EngineStatus.FAILED
        return EngineStatus.READY if self.ready() else EngineStatus.LOADING

    @property
    def num_waiting_running(self) -> tuple[int, int]:
        """Of all replicas, as they reported last; groups without a replica count as waiting."""
        loads = [replica.load for replica in self.replicas if replica.load is not None]
        waiting = len(self._parked) + sum(load.num_waiting for load in loads)
        return waiting, sum(load.num_running for load in loads)

    def ready(self) -> list[Replica]:
        """Replicas that accept requests."""
        ready = (r for r in self.replicas if r.status is ReplicaStatus.READY and r.load is not None)
        return [r for r in ready if r.trouble is None]

    def submit(self, samples: Sequence[Sample]) -> Group:
        """Send samples to a replica, all to the same one.

        Raises:
            NotReady: no replica accepts requests.
        """
        if self.status is not EngineStatus.READY or self.facts is None:
            raise NotReady(f"the server is not ready: its replicas are {self.status.value}; try again soon")
        group = Group(samples, on_close=self._abandon)
        route = Route.of(group, samples, self.facts, self._seeds, self._clock())
        self._by_group[id(group)] = route
        self._place(route)
        return group

    def take(self, replica: Replica, report: Report) -> None:
        """Process a replica's report."""
        replica.note(report)
        now, outputs = self._clock(), []
        for event in report.events:
            route = self._routes.get(event.ticket)
            if route is not None:  # else it was given up, or moved
                outputs += self._take(route, event, now)
        if outputs:
            stepped = Stepped(outputs, (), now)
            for observer in self.observers:
                observer.brought(stepped)

    def lost(self, replica: Replica) -> None:
        """A replica has died: its groups continue on other replicas."""
        routes = list(replica.routes.values())
        for route in routes:
            self._leave(route)
            route.num_moves += 1
            if route.num_moves > MOST_MOVES:
                self._fail(route, EngineFailure(f"{route.num_moves} replicas were lost while they worked on it"))
                continue
            self.num_moved += 1
            route.refused_by.clear()
            self._place(route)
        if routes:
            logger.warning("%d requests of replica %s go on elsewhere", len(routes), replica.name)

    def move_unbegun(self, replica: Replica) -> None:
        """Groups without a token yet begin elsewhere instead of on a replica that will be taken away."""
        for route in [*replica.routes.values()]:
            if not any(progress.request.output_token_ids for progress in route.unfinished.values()):
                if self._choice(route) is None:
                    return
                replica.send(Abort(route.ticket))
                self._leave(route)
                self.num_moved += 1
                self._place(route)

    async def hand_over(self, replica: Replica) -> None:
        """All groups of a replica that will be taken away go on elsewhere, one after the other."""
        routes = [*replica.routes.values()]
        if routes:
            logger.warning("%d requests of replica %s go on elsewhere before it is gone", len(routes), replica.name)
        for route in routes:
            if route.replica is replica:  # else it has ended meanwhile
                self.num_moved += 1
                await self._hand_over(route, replica)

    async def _hand_over(self, route: Route, replica: Replica) -> None:
        target = self._choice(route)
        left_s = (replica.gone_s or 0.0) - LATEST_S - time.monotonic()
        if target is None or left_s <= 0 or not route.is_confirmed:
            replica.send(Abort(route.ticket))
            self._leave(route)
            self._place(route)
            return
        ticket, samples = route.ticket, tuple(progress.remainder() for progress in route.unfinished.values())
        self._leave(route)
        try:
            async with asyncio.timeout(left_s):
                link = await replica.link_to(target)
                began = time.monotonic()
                pages: list[Pages] = await replica.handle.ask("leave", Leaving(ticket, samples, link))
                if pages:
                    self.moved_tokens += await target.handle.ask("enter", pages)
                    num_bytes = sum(each.num_bytes for each in pages)
                    replica.seen[target.name] = link.as_seen(num_bytes, time.monotonic() - began)
        except Exception as error:  # its tokens are here
            logger.warning("no pages came from replica %s: %r", replica.name, error)
            replica.send(Abort(ticket))
        if self._by_group.get(id(route.group)) is route:  # else nobody wants it any more
            self._place(route, preferred=target)

    def place_parked(self) -> None:
        """Try again to place groups without a replica."""
        parked, self._parked = self._parked, []
        for route in parked:
            route.refused_by.clear()
            self._place(route)

    def abort_all(self) -> None:
        """End every request, with finish reason abort."""
        for route in [*self._by_group.values()]:
            self.end_group(route.group)

    def end_group(self, group: Group) -> None:
        """End what is unfinished of a group, with finish reason abort."""
        route = self._by_group.get(id(group))
        if route is None:
            return
        self._forget(route)
        outputs = self._aborted(route)
        for output, progress in zip(outputs, route.unfinished.values(), strict=True):
            group.receive(progress.sample, output)
        self._tell(outputs, set())
        if not route.is_accepted:
            group.accept()

    def end(self, error: Exception) -> None:
        """Nothing will be served any more: every request fails."""
        for route in [*self._by_group.values()]:
            self._fail(route, error)

    def _take(self, route: Route, event: Event, now: float) -> list[Output]:
        match event:
            case Accepted():
                route.is_confirmed = True
                if not route.is_accepted:
                    route.is_accepted = True
                    route.group.accept()
            case Refused(error=error):
                self._refused(route, error)
            case Brought():
                progress = route.unfinished[event.index]
                output = progress.take(event, now)
                if event.ending is not None:
                    del route.unfinished[event.index]
                    if event.ending.error is not None:
                        logger.error("request %s ended with an error: %s", progress.sample.request_id, output.error)
                    if not route.unfinished:
                        self._forget(route, abort=False)
                route.group.receive(progress.sample, output)
                return [output]
        return []

    def _refused(self, route: Route, error: Exception) -> None:
        replica = route.replica
        assert replica is not None
        self._leave(route)
        if isinstance(error, QueueFull | NotReady):
            route.refused_by.add(replica.name)
            self._place(route, error)
        else:
            self._fail(route, error)

    def _choice(self, route: Route) -> Replica | None:
        """The replica that the router chooses; None if none accepts it now."""
        candidates = [replica for replica in self.ready() if replica.name not in route.refused_by]
        if not candidates:
            return None
        loads = [replica.load for replica in candidates if replica.load is not None]
        return candidates[self.router.choose(route.asked(self._clock()), loads)]

    def _place(self, route: Route, error: Exception | None = None, preferred: Replica | None = None) -> None:
        """Send a group to a replica; if none accepts it now, it waits, or fails with `error` if it is new."""
        replica = preferred if preferred in self.ready() else self._choice(route)
        if replica is None:
            if error is not None and not route.is_accepted:
                self._fail(route, error)
            else:
                self._parked.append(route)
            return
        now = self._clock()
        self._tickets += 1
        route.ticket, route.replica, route.sent_s, route.is_confirmed = self._tickets, replica, now, False
        self._routes[route.ticket] = replica.routes[route.ticket] = route
        replica.send(route.submission(now))

    def _leave(self, route: Route) -> None:
        """Take the group from its replica."""
        self._routes.pop(route.ticket, None)
        if route.replica is not None:
            route.replica.routes.pop(route.ticket, None)
        route.replica = None

    def _forget(self, route: Route, abort: bool = True) -> None:
        """No more outputs of the group are expected."""
        if abort and route.replica is not None:
            route.replica.send(Abort(route.ticket))
        if route in self._parked:
            self._parked.remove(route)
        self._leave(route)
        self._by_group.pop(id(route.group), None)

    def _fail(self, route: Route, error: Exception) -> None:
        self._forget(route)
        if isinstance(error, EngineFailure):
            for observer in self.observers:
                observer.lost([progress.sample for progress in route.unfinished.values()])
        route.group.fail(error)

    def _abandon(self, group: Group) -> None:
        route = self._by_group.get(id(group))
        if route is None:
            return
        self._forget(route)
        outputs, now = self._aborted(route), self._clock()
        broken = group.left_s is not None
        records = [output.request for output in outputs]
        self._tell(outputs, {r.request_id for r in records if not (broken and has_broken_slo(r, now))})

    def _aborted(self, route: Route) -> list[Output]:
        return [progress.aborted() for progress in route.unfinished.values()]

    def _tell(self, outputs: list[Output], cancelled: set[str]) -> None:
        stepped = Stepped(outputs, cancelled, self._clock())
        for observer in self.observers:
            observer.brought(stepped)
