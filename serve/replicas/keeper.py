"""Keeps the wanted number of replicas: starts them, replaces lost ones, autoscales, updates them one by one.

One rule does all of it. Wanted are `target` replicas of the newest generation. Missing ones are started; a surplus
replica, one of an older generation first, takes no new requests and ends once it has none. An update only starts a
new generation: the old replicas stay until as many new ones are ready.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence

from apt_jax.routing.attainment import RecentAttainment
from apt_jax.routing.autoscaler import Autoscaler, AutoscalerOptions
from apt_jax.serve.errors import EngineFailure
from apt_jax.serve.replicas.fleet import Fleet
from apt_jax.serve.replicas.leaving.hand_over import HAND_OVER_S, LATEST_S
from apt_jax.serve.replicas.replica import Handle, Replica, ReplicaStatus
from apt_jax.serve.runtime.observer import Observer, Stepped
from apt_jax.serve.runtime.samples import Sample

CHECK_S = 0.2
SCALE_S = 1.0
MOST_QUIET_CHECKS = 150  # without a report, which comes each second: 30 s of checks that were really made
LONGEST_PAUSE_S = 30.0  # between two attempts to start a replica
ENOUGH_ENDED = 10  # requests, to tell the autoscaler an attainment

logger = logging.getLogger("apt_jax.serve")


class Keeper:
    """Starts replicas with `launch`, given a name.

    Args:
        at_once: start all missing ones at once; else the first alone, which leaves its compiled programs to the others.
        on_ready: called when the first one is ready, with the seconds that it took.
        on_failure: called with the error if no replica could be started.
    """

    def __init__(
        self,
        fleet: Fleet,
        launch: Callable[[str], Handle],
        options: AutoscalerOptions,
        *,
        at_once: bool = False,
        on_ready: Callable[[float], None] = lambda seconds: None,
        on_failure: Callable[[Exception], None] = lambda error: None,
    ):
        self.target = options.min_instances
        self.generation = self._newest_generation = 0
        self.num_failures = 0  # replicas that died, or could not be started
        self._attainment = RecentAttainment(ENOUGH_ENDED)
        self._fleet = fleet
        self._launch = launch
        self._autoscaler = Autoscaler(options)
        self._at_once = at_once
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._wake = asyncio.Event()
        self._handing_over: set[str] = set()  # replicas whose requests are on their way
        self._tasks: set[asyncio.Task[None]] = set()
        self._names = 0
        self._bad_starts = 0  # in a row
        self._not_before_s = self._scaled_s = 0.0
        self._began_s = time.monotonic()
        self._was_ready = False
        fleet.observers.append(Endings(self._attainment))

    async def run(self) -> None:
        """Keep the replicas until cancelled."""
        while True:
            self._adjust()
            self._wake.clear()
            try:
                async with asyncio.timeout(CHECK_S):
                    await self._wake.wait()
            except TimeoutError:
                self._check()

    def update(self) -> None:
        """Replace every replica by one that is started now, without dropping a request."""
        self._newest_generation += 1
        self.generation = self._newest_generation
        logger.info("updating %d replicas, one after the other", len(self._of(ReplicaStatus.READY)))
        self._wake.set()

    @property
    def is_updating(self) -> bool:
        """Whether replicas of an older generation are left."""
        return any(replica.generation < self.generation for replica in self._fleet.replicas)

    def stop(self) -> None:
        """End every replica at once."""
        for task in self._tasks:
            task.cancel()
        for replica in [*self._fleet.replicas]:
            self._end(replica)

    def _of(self, *statuses: ReplicaStatus) -> list[Replica]:
        return [replica for replica in self._fleet.replicas if replica.status in statuses]

    def _adjust(self) -> None:
        """Start missing replicas, drain surplus ones, end drained ones. `_check` and every change lead here."""
        serving = self._of(ReplicaStatus.STARTING, ReplicaStatus.READY)
        current = [replica for replica in serving if replica.generation == self.generation]
        starting = sum(replica.status is ReplicaStatus.STARTING for replica in current)
        one_by_one = len(serving) > len(current) or not (self._at_once or self._was_ready)
        for _ in range(min(self.target - len(current), (1 if one_by_one else self.target) - starting)):
            if time.monotonic() >= self._not_before_s and not self._fleet.failed:  # what failed once is told once
                self._start()
        ready = self._of(ReplicaStatus.READY)
        surplus = len(ready) - self.target if starting == 0 or len(ready) > self.target else 0
        for replica in sorted(ready, key=lambda r: (r.generation, len(r.routes)))[: max(surplus, 0)]:
            logger.info("replica %s takes no new requests; %d are left", replica.name, len(replica.routes))
            replica.status = ReplicaStatus.DRAINING
        for replica in serving:
            if replica.status is ReplicaStatus.STARTING and replica.generation < self.generation:
                self._end(replica)
        for replica in self._of(ReplicaStatus.DRAINING):
            if not (replica.routes or replica.name in self._handing_over):
                self._end(replica)
                logger.info("replica %s has ended; %d are ready", replica.name, len(self._fleet.ready()))
        self._fleet.place_parked()

    def _check(self) -> None:
        """Handle what changes with time alone."""
        for replica in self._of(ReplicaStatus.READY, ReplicaStatus.DRAINING):
            replica.quiet_checks += 1
            if replica.trouble is not None and not replica.is_given_up:
                logger.error("replica %s is replaced, its engine is unhealthy: %s", replica.name, replica.trouble)
                replica.is_given_up = True
                replica.handle.kill()
            if replica.quiet_checks > MOST_QUIET_CHECKS:
                replica.handle.kill()  # its reports then end with an error
        now = time.monotonic()
        for replica in self._of(ReplicaStatus.READY, ReplicaStatus.DRAINING):
            if replica.gone_s is not None:
                self._let_go(replica, replica.gone_s - now)
        if now - self._scaled_s >= SCALE_S and not self.is_updating and self._was_ready:
            self._scaled_s = now
            self._scale(now)

    def _let_go(self, replica: Replica, lasts_s: float) -> None:
        """Its machine will be taken away: another one starts, it finishes what it can, and hands the rest over."""
        if replica.status is ReplicaStatus.READY:
            logger.warning("replica %s will be taken away in %.0f s", replica.name, max(lasts_s, 0.0))
            replica.status = ReplicaStatus.DRAINING
        self._fleet.move_unbegun(replica)
        due_s = HAND_OVER_S if self._fleet.ready() else LATEST_S  # while nobody else is there it goes on
        if lasts_s <= due_s and replica.routes and replica.name not in self._handing_over:
            self._handing_over.add(replica.name)
            self._do(self._hand_over(replica))

    async def _hand_over(self, replica: Replica) -> None:
        try:
            await self._fleet.hand_over(replica)
        finally:
            self._handing_over.discard(replica.name)
            self._wake.set()

    def _scale(self, now: float) -> None:
        loads = [replica.load for replica in self._fleet.ready() if replica.load is not None]
        attainment = self._attainment.share(now)
        wanted = self._autoscaler.desired(loads, self.target, now, attainment, self._attainment.per_s(now))
        if wanted != self.target:
            shown = "unknown" if attainment is None else f"{attainment:.0%}"
            waiting, running = self._fleet.num_waiting_running
            logger.info(
                "%d replicas instead of %d: %d requests wait, %d run, recent attainment %s",
                *(wanted, self.target, waiting, running, shown),
            )
            self.target = wanted

    def _start(self) -> None:
        self._names += 1
        replica = Replica(f"r{self._names}", self.generation, self._launch(f"r{self._names}"))
        self._fleet.replicas.append(replica)
        self._do(self._live(replica))

    def _do(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, replica: Replica) -> None:
        """Run one replica from its start to its end."""
        try:
            facts = await replica.start()
            async for report in replica.handle.reports():
                self._fleet.take(replica, report)
                if replica.status is ReplicaStatus.STARTING and replica.load is not None:
                    self._joined(replica)
                    self._fleet.facts = facts
                elif replica.status is ReplicaStatus.DRAINING and not replica.routes:
                    self._wake.set()
        except Exception as error:
            if replica.status is not ReplicaStatus.GONE:
                self._died(replica, error)

    def _joined(self, replica: Replica) -> None:
        replica.status = ReplicaStatus.READY
        facts = replica.facts
        assert facts is not None
        logger.info("replica %s is ready after %.1f s (process %d)", replica.name, facts.start_s, facts.process_id)
        self._bad_starts = 0
        self._attainment.clear()
        if not self._was_ready:
            self._was_ready = True
            self._on_ready(time.monotonic() - self._began_s)
        self._wake.set()

    def _died(self, replica: Replica, error: Exception) -> None:
        was_ready = replica.status is not ReplicaStatus.STARTING
        self.num_failures += 1
        self._end(replica)
        if was_ready:
            logger.error("replica %s was lost: %s", replica.name, _first_line(error))
            self._fleet.lost(replica)
        elif not self._was_ready:
            self._fleet.failed = True
            self._fleet.end(EngineFailure("no replica could be started"))
            self._on_failure(error)
        else:
            self._bad_start(replica, error)
        self._wake.set()

    def _bad_start(self, replica: Replica, error: Exception) -> None:
        older = [r.generation for r in self._of(ReplicaStatus.READY) if r.generation < replica.generation]
        if older and replica.generation == self.generation:
            self.generation = max(older)
            logger.error("replica %s could not be started, so the update is given up: %s", replica.name, error)
            return
        self._bad_starts += 1
        pause_s = min(2.0**self._bad_starts, LONGEST_PAUSE_S)
        self._not_before_s = time.monotonic() + pause_s
        logger.error("replica %s could not be started; again in %g s: %s", replica.name, pause_s, error)

    def _end(self, replica: Replica) -> None:
        replica.status = ReplicaStatus.GONE
        replica.handle.kill()
        self._fleet.replicas.remove(replica)


class Endings(Observer):
    """Reports ended requests to `attainment`, in the strict reading: one long freeze is a miss."""

    def __init__(self, attainment: RecentAttainment):
        self._attainment = attainment

    def brought(self, step: Stepped) -> None:
        """Take in what ended."""
        for output in step.outputs:
            if step.counts(output):
                self._attainment.add(step.began_s, output.request.attained_strictly)

    def lost(self, samples: Sequence[Sample]) -> None:
        """They missed their SLO."""
        now = time.monotonic()
        for _ in samples:
            self._attainment.add(now, False)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
