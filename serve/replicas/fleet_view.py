"""A view of all replicas: their metrics together with the front's, histories and plans from each."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from apt_jax.routing.interface import Remembers
from apt_jax.serve.observability.history import newest_first
from apt_jax.serve.observability.request_metrics import RequestMetrics
from apt_jax.serve.replicas.fleet import Fleet
from apt_jax.serve.replicas.keeper import Keeper
from apt_jax.serve.replicas.messages import Answer
from apt_jax.serve.replicas.replica import Replica, ReplicaStatus

ANSWER_S = 2.0  # that a replica gets for a question

logger = logging.getLogger("apt_jax.serve")


class FleetMetrics(RequestMetrics):
    """Metrics of requests as clients see them, and of replicas as the front sees them."""

    def __init__(self, model_name: str):
        super().__init__(model_name)
        self.replicas = self._gauge("apt:replicas", "Engines, by how far they are.", "status")
        self.wanted = self._gauge("apt:replicas_wanted", "Engines that there should be.")
        self.moved = self._counter("apt:requests_moved", "Requests that went on elsewhere after a replica was lost.")
        self.failures = self._counter("apt:replica_failures", "Replicas that were lost, or could not be started.")
        self._num_moved = self._num_failures = 0  # as counted last

    def show(self, fleet: Fleet, keeper: Keeper) -> None:
        """Set the levels."""
        for status in (ReplicaStatus.STARTING, ReplicaStatus.READY, ReplicaStatus.DRAINING):
            count = sum(replica.status is status for replica in fleet.replicas)
            self.replicas.labels(**self._labels, status=status.value).set(count)
        self.wanted.set(keeper.target)
        self.moved.inc(fleet.num_moved - self._num_moved)
        self.failures.inc(keeper.num_failures - self._num_failures)
        self._num_moved, self._num_failures = fleet.num_moved, keeper.num_failures


class FleetView:
    """Asks every replica; one that does not answer in time is left out."""

    def __init__(self, fleet: Fleet, keeper: Keeper, model_name: str):
        self.metrics = FleetMetrics(model_name)
        self._fleet = fleet
        self._keeper = keeper
        fleet.observers.append(self.metrics)

    async def metrics_text(self) -> bytes:
        """The front's, and each replica's with its name as label."""
        self.metrics.show(self._fleet, self._keeper)
        found = await self._ask("metrics")
        return await asyncio.to_thread(merged, [self.metrics.text(), *(text for _, text in found)])

    async def story(self, request_id: str) -> list[dict[str, Any]]:
        """From every replica that knows the request: several, if it moved."""
        return [{**story, "replica": r.name} for r, found in await self._ask("story", request_id) for story in found]

    async def requests(self) -> list[dict[str, Any]]:
        """Of all replicas, with their names."""
        answers = await self._ask("requests")
        return newest_first({**story, "replica": r.name} for r, found in answers for story in found)

    async def plans(self) -> list[dict[str, Any]]:
        """Of each replica, with its name."""
        return [{**plan, "replica": r.name} for r, plans in await self._ask("plans") for plan in plans]

    async def levels(self) -> dict[str, Any]:
        """Sums over the replicas' last reports."""
        waiting, running = self._fleet.num_waiting_running
        blocks, counts = Counter[str](), Counter[str]()
        for replica in self._fleet.replicas:
            blocks.update(replica.blocks)
            counts.update(replica.counts)
        sums = {"running": running, "waiting": waiting, "blocks": dict(blocks), "counts": dict(counts)}
        return {**sums, "replicas": self.replicas()}

    async def record(self, base: Path, seconds: float) -> Path:
        """In every replica; each writes below `base` on its own machine."""
        await self._ask("record", f"{seconds} {base.absolute()}", ANSWER_S + seconds + 30)
        return base

    async def reset_prefix_cache(self) -> None:
        """In every replica, and in what the router remembers of them."""
        await self._ask("reset_prefix_cache")
        if isinstance(self._fleet.router, Remembers):
            self._fleet.router.forget()

    def replicas(self) -> list[dict[str, Any]]:
        """One entry each."""
        return [
            {
                "name": replica.name,
                "status": replica.status.value,
                "generation": replica.generation,
                "process_id": None if replica.facts is None else replica.facts.process_id,
                "requests": len(replica.routes),
                "free_blocks": None if replica.load is None else replica.load.free_blocks,
            }
            for replica in self._fleet.replicas
        ]

    async def _ask(self, question: str, argument: str = "", limit_s: float = ANSWER_S) -> list[tuple[Replica, Answer]]:
        asked = [r for r in self._fleet.replicas if r.status is not ReplicaStatus.STARTING]
        answers = await asyncio.gather(*(_answer(r, question, argument, limit_s) for r in asked))
        return [(replica, answer) for replica, answer in zip(asked, answers, strict=True) if answer is not None]


async def _answer(replica: Replica, question: str, argument: str, limit_s: float) -> Answer:
    try:
        async with asyncio.timeout(limit_s):
            return await replica.handle.ask(question, argument)
    except Exception as error:
        logger.warning("replica %s does not tell its %s: %r", replica.name, question, error)
        return None


class _Families(Collector):
    def __init__(self, texts: Iterable[bytes]):
        self._texts = texts

    def collect(self) -> Iterator[Any]:
        """Families of the same name as one."""
        families: dict[str, Any] = {}
        for text in self._texts:
            for family in text_string_to_metric_families(text.decode()):
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        yield from families.values()


def merged(texts: Iterable[bytes]) -> bytes:
    """Several expositions in Prometheus' text format as one."""
    registry = CollectorRegistry()
    registry.register(_Families(list(texts)))
    return generate_latest(registry)
