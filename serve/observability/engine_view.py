"""A view of a working engine: metrics, histories of requests, plans. In front of replicas, of all of them."""

from pathlib import Path
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool

from apt_jax.serve.observability.history import History
from apt_jax.serve.observability.metrics import Metrics
from apt_jax.serve.observability.profile import record
from apt_jax.serve.observability.request_metrics import RequestMetrics
from apt_jax.serve.runtime.engine_thread import EngineThread


class View(Protocol):
    """Asked by the routes, on the event loop."""

    @property
    def metrics(self) -> RequestMetrics:
        """For what the routes themselves count."""

    async def metrics_text(self) -> bytes:
        """For Prometheus."""

    async def story(self, request_id: str) -> list[dict[str, Any]]:
        """The history of the request with this id, or of the samples of the completion with this id."""

    async def requests(self) -> list[dict[str, Any]]:
        """The newest requests in short: those under way, then those that have ended."""

    async def plans(self) -> list[dict[str, Any]]:
        """The newest plans, oldest first."""

    async def levels(self) -> dict[str, Any]:
        """`running`, `waiting`, `blocks` by kind, and `counts` since the start; empty before the engine is there."""

    async def record(self, base: Path, seconds: float) -> Path:
        """Record what the devices do; returns the folder."""

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache before the next step."""


class EngineView:
    """The view of one engine in its thread."""

    def __init__(self, thread: EngineThread, model_name: str):
        self.metrics = Metrics(model_name)
        self.history = History()
        self._thread = thread
        self.metrics.watch(lambda: thread.trouble is None)
        thread.observers += [self.metrics, self.history]

    async def metrics_text(self) -> bytes:
        """For Prometheus."""
        return await run_in_threadpool(self.metrics.text)

    async def story(self, request_id: str) -> list[dict[str, Any]]:
        """From the history."""
        return await run_in_threadpool(self.history.of, request_id)

    async def requests(self) -> list[dict[str, Any]]:
        """From the history."""
        return await run_in_threadpool(self.history.newest)

    async def plans(self) -> list[dict[str, Any]]:
        """From the scheduler's log."""
        engine = self._thread.engine
        return [] if engine is None else await run_in_threadpool(engine.recent_plans)

    async def levels(self) -> dict[str, Any]:
        """From the scheduler's state and the metrics."""
        waiting, running = self._thread.num_waiting_running
        if self._thread.engine is None:
            return {}
        blocks, counts = self.metrics.last_blocks, self.metrics.counts
        return {"running": running, "waiting": waiting, "blocks": blocks, "counts": dict(counts)}

    async def record(self, base: Path, seconds: float) -> Path:
        """With jax.profiler."""
        return await run_in_threadpool(record, base, seconds)

    async def reset_prefix_cache(self) -> None:
        """By a message to the thread."""
        self._thread.call(lambda engine: engine.reset_prefix_cache())
