"""`Backend` over replicas: a fleet and its keeper, on the server's event loop, in one session of Ray."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence

from apt_jax.engine.interface import EngineFacts
from apt_jax.routing.catalogue import make_router
from apt_jax.serve.errors import NotReady
from apt_jax.serve.replicas.fleet import Fleet
from apt_jax.serve.replicas.fleet_view import FleetView
from apt_jax.serve.replicas.keeper import Keeper
from apt_jax.serve.replicas.messages import EngineSpec
from apt_jax.serve.replicas.options import RayOptions, ReplicaOptions, ray_arguments
from apt_jax.serve.replicas.ray_session import RayHandle, connect, disconnect
from apt_jax.serve.replicas.replica import Handle
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.observer import Observer
from apt_jax.serve.runtime.samples import Sample
from apt_jax.serve.runtime.status import EngineStatus, WatchLimits

logger = logging.getLogger("apt_jax.serve")


class ReplicaBackend:
    """Engines of `spec` in processes started by Ray; see `Backend`.

    `on_ready` and `on_failure` are called as by `EngineThread`.
    """

    def __init__(
        self,
        spec: EngineSpec,
        options: ReplicaOptions,
        ray: RayOptions,
        on_ready: Callable[[float], None] = lambda seconds: None,
        on_failure: Callable[[Exception], None] = lambda error: None,
    ):
        self.spec = spec
        self.fleet = Fleet(make_router(options.router, spec.config.seed), spec.config.seed)
        self._ray = ray
        self._on_failure = on_failure
        self.keeper = Keeper(
            self.fleet,
            self._launch,
            options.autoscaler(),
            at_once=ray.ray_address is not None,
            on_ready=on_ready,
            on_failure=on_failure,
        )
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def observers(self) -> list[Observer]:
        """Notified of the replicas' outputs."""
        return self.fleet.observers

    @property
    def status(self) -> EngineStatus:
        """READY while one replica is."""
        return self.fleet.status

    @property
    def trouble(self) -> str | None:
        """Only if none could be started: a replica in trouble is replaced."""
        return "no replica could be started; the log has the error" if self.fleet.failed else None

    @property
    def engine(self) -> EngineFacts | None:
        """As reported by the newest replica."""
        return self.fleet.facts

    @property
    def num_engines(self) -> int:
        """Replicas that accept requests."""
        return max(len(self.fleet.ready()), 1)

    @property
    def num_waiting_running(self) -> tuple[int, int]:
        """Of all replicas."""
        return self.fleet.num_waiting_running

    def view(self, model_name: str) -> FleetView:
        """A view of all replicas, for the routes."""
        return FleetView(self.fleet, self.keeper, model_name)

    def refuse_late(self) -> None:
        """See `Backend`."""
        self.spec = dataclasses.replace(self.spec, refuses_late=True)

    def watch(self, limits: WatchLimits) -> None:
        """See `Backend`."""
        self.spec = dataclasses.replace(self.spec, limits=limits)

    def start(self) -> None:
        """Connect to Ray and start keeping replicas."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    def submit(self, samples: Sequence[Sample]) -> Group:
        """See `Backend`."""
        return self.fleet.submit(samples)

    def ready_engine(self) -> EngineFacts:
        """See `Backend`."""
        if self.fleet.facts is None or self.status is not EngineStatus.READY:
            raise NotReady(f"the server is not ready: its replicas are {self.status.value}; try again soon")
        return self.fleet.facts

    def update(self) -> None:
        """Replace every replica without dropping a request. From any thread, and from a signal's handler."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.keeper.update)

    def end(self, group: Group) -> None:
        """See `Backend`."""
        self.fleet.end_group(group)

    def abort_all(self) -> None:
        """End every request, with finish reason abort."""
        self.fleet.abort_all()

    def stop(self, timeout_s: float) -> bool:
        """End every request, every replica and the session."""
        if not self.fleet.stopped:
            self.fleet.stopped = True
            if self._loop is not None and self._loop.is_running():
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        disconnect()
        return True

    async def _run(self) -> None:
        try:
            await asyncio.to_thread(connect, self._ray.ray_address)
            await self.keeper.run()
        except Exception as error:
            logger.debug("the keeper ended", exc_info=error)
            self.fleet.failed = True
            self._on_failure(error)

    async def _end(self) -> None:
        self.fleet.end(NotReady("the server is stopping"))
        self.keeper.stop()
        if self._task is not None:
            self._task.cancel()

    def _launch(self, name: str) -> Handle:
        return RayHandle(name, self.spec, ray_arguments(self._ray.replica_resources))
