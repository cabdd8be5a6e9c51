"""The interface between HTTP and generation: one engine in a thread of this process, or several behind a router."""

from collections.abc import Sequence
from typing import Protocol

from apt_jax.engine.interface import EngineFacts
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.observer import Observer
from apt_jax.serve.runtime.samples import Sample
from apt_jax.serve.runtime.status import EngineStatus, WatchLimits


class Backend(Protocol):
    """Takes samples and delivers their outputs. All but `stop` belong to the asyncio loop on which it was started."""

    @property
    def observers(self) -> list[Observer]:
        """Notified of its work; add to the list."""

    @property
    def status(self) -> EngineStatus:
        """State of the engine or engines."""

    @property
    def trouble(self) -> str | None:
        """Why it does not serve now, though it should; None if it does, or has not begun to."""

    @property
    def engine(self) -> EngineFacts | None:
        """None until it has been ready once."""

    @property
    def num_waiting_running(self) -> tuple[int, int]:
        """Requests that wait and that hold cache."""

    def refuse_late(self) -> None:
        """From now on refuse requests that would miss their SLO. Call it before `start`."""

    def watch(self, limits: WatchLimits) -> None:
        """When an engine counts as unhealthy. Call it before `start`."""

    def start(self) -> None:
        """Begin."""

    def submit(self, samples: Sequence[Sample]) -> Group:
        """Take samples, all or none; await `Group.accepted` of what it returns.

        Raises:
            NotReady: no requests are accepted now.
        """

    def ready_engine(self) -> EngineFacts:
        """The facts.

        Raises:
            NotReady: no requests are accepted now.
        """

    def end(self, group: Group) -> None:
        """End what is unfinished of a group, with finish reason abort; its client gets what there is."""

    def abort_all(self) -> None:
        """End every request, with finish reason abort."""

    def stop(self, timeout_s: float) -> bool:
        """End every request and the engine; False if it is still busy after `timeout_s`. From any thread."""
