"""Replicas without Ray: real actors, relays, fleet and keeper in one event loop, around fake or real engines."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from apt_jax.engine.interface import ServingEngine
from apt_jax.engine_config import EngineConfig
from apt_jax.routing.autoscaler import AutoscalerOptions
from apt_jax.routing.catalogue import make_router
from apt_jax.serve.options import LoadOptions
from apt_jax.serve.replicas.actor import EngineActor
from apt_jax.serve.replicas.fleet import Fleet
from apt_jax.serve.replicas.keeper import Keeper
from apt_jax.serve.replicas.messages import Answer, Command, EngineSpec, Facts, Report
from tests.support.fake_engine import FakeEngine

SPEC = EngineSpec(None, LoadOptions(), EngineConfig(), "tiny")


class LocalHandle:
    """An actor of this loop. Once killed it is silent, as a process that is gone."""

    def __init__(self, name: str, engine: ServingEngine | FakeEngine):
        self.name = name
        self.engine = engine
        self._actor = EngineActor(name, SPEC, lambda: engine)  # type: ignore[arg-type, return-value]
        self._killed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Facts:
        return await self._actor.start()

    async def reports(self) -> AsyncIterator[Report]:
        reports = self._actor.reports()
        killed = asyncio.create_task(self._killed.wait())
        try:
            while True:
                report = asyncio.ensure_future(anext(reports))  # type: ignore[arg-type]
                await asyncio.wait({report, killed}, return_when=asyncio.FIRST_COMPLETED)
                if self._killed.is_set():
                    report.cancel()
                    raise ConnectionError("the process is gone")
                yield report.result()
        finally:
            killed.cancel()

    def command(self, number: int, commands: list[Command]) -> None:
        if not self._killed.is_set():
            task = asyncio.create_task(self._actor.command(number, commands))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def ask(self, question: str, argument: str = "") -> Answer:
        return await self._actor.ask(question, argument)

    def kill(self) -> None:
        self._killed.set()
        self.let_run()
        self._tasks.add(asyncio.create_task(self._actor.stop()))

    def let_run(self) -> None:
        """Let a paced engine go on by itself."""
        if isinstance(self.engine, FakeEngine) and self.engine.is_paced:
            self.engine.allow_step(1000)

    @property
    def is_killed(self) -> bool:
        return self._killed.is_set()


class Replicas:
    """A fleet with its keeper; `handles` by name, `make_engine` makes the next one's engine (or raises)."""

    def __init__(self, router: str = "round-robin", make_engine: Callable[[], Any] = FakeEngine, **options):
        self.fleet = Fleet(make_router(router, 0), 0)
        options.setdefault("max_instances", options.get("min_instances", 1))
        self.handles: dict[str, LocalHandle] = {}
        self.make_engine = make_engine
        self.failures: list[Exception] = []
        self.keeper = Keeper(
            self.fleet, self._launch, AutoscalerOptions(**options), at_once=True, on_failure=self.failures.append
        )

    def _launch(self, name: str) -> LocalHandle:
        self.handles[name] = LocalHandle(name, self.make_engine())
        return self.handles[name]


@asynccontextmanager
async def keeping(replicas: Replicas, wait_s: float = 10) -> AsyncIterator[Replicas]:
    """Run the keeper; wait for as many replicas as there should be."""
    task = asyncio.create_task(replicas.keeper.run())
    try:
        async with asyncio.timeout(wait_s):
            while len(replicas.fleet.ready()) < replicas.keeper.target and not replicas.failures:
                await asyncio.sleep(0.002)
        yield replicas
    finally:
        task.cancel()
        replicas.keeper.stop()
        for handle in replicas.handles.values():
            handle.let_run()
        await asyncio.sleep(0.01)
