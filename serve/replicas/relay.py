"""A replica's outgoing messages: outputs of its engine thread become events, gathered until the front takes them."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from apt_jax.engine.interface import EngineFigures
from apt_jax.output import Output
from apt_jax.routing.instance import InstanceLoad
from apt_jax.serve.replicas.messages import Accepted, Brought, Ending, Event, Refused, Report
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.observer import Observer, Stepped
from apt_jax.serve.runtime.samples import Sample

HEARTBEAT_S = 1.0  # a report is made at least so often
LOOK_EVERY_S = 0.1  # at the load, while no event comes
LOAD_EVERY_S = 0.01  # a load is counted at most so often


class Relay:
    """Gathers events, on the replica's event loop. A slow front gets several steps' events in one report."""

    def __init__(self, loads: "LoadReporter"):
        self._loads = loads
        self._events: list[Event] = []
        self._changed = asyncio.Event()
        self._hurries = False  # a report is wanted, whatever is in it
        self.failure: Exception | None = None  # the engine is lost

    def add(self, event: Event) -> None:
        """Tell the front."""
        self._events.append(event)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """The engine is lost: the next report is this error."""
        self.failure = error
        self._changed.set()

    def hurry(self) -> None:
        """Have a report made now."""
        self._hurries = True
        self._changed.set()

    async def report(self) -> Report:
        """Events since the last report; waits for some, but not for long.

        Raises:
            Exception: what the engine was lost by.
        """
        begun = time.monotonic()
        while not self._has_news and time.monotonic() - begun < HEARTBEAT_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._changed.wait()
        self._changed.clear()
        self._hurries = False
        if self.failure is not None:
            raise self.failure
        events, self._events = self._events, []
        return Report(events, *self._loads.take())

    @property
    def _has_news(self) -> bool:
        return bool(self._events or self.failure or self._hurries or self._loads.has_news)


class RelayedGroup(Group):
    """A group whose outputs go to the front instead of being waited for here."""

    def __init__(
        self,
        samples: Sequence[Sample],
        on_close: Callable[[Group], None],
        ticket: int,
        relay: Relay,
        on_end: Callable[[int], None],
    ):
        super().__init__(samples, on_close)
        self._ticket = ticket
        self._relay = relay
        self._on_end = on_end
        self._left = len(samples)

    def accept(self) -> None:
        """Every sample is queued."""
        self._relay.add(Accepted(self._ticket))

    def fail(self, error: Exception) -> None:
        """Nothing more will come; if the engine is lost, the front continues on another replica."""
        self._on_end(self._ticket)
        if self._relay.failure is None:
            self._relay.add(Refused(self._ticket, error))

    def receive(self, sample: Sample, output: Output) -> None:
        """A step brought `output`."""
        if self.closed:
            return
        request, reason = output.request, output.finish_reason
        ending = queued_s = None
        if output.token_ids and len(request.gaps_s) == 0 and request.first_scheduled_s is not None:
            queued_s = request.first_scheduled_s - request.arrival_s
        if reason is not None:
            kinds = tuple(kind.value for kind in request.cache_history)
            counts = request.num_preemptions, request.num_conversions, request.num_cached_tokens
            ending = Ending(reason, output.error, request.stop_reason, kinds, *counts)
            self._left -= 1
            if self._left == 0:
                self._on_end(self._ticket)
        self._relay.add(
            Brought(
                self._ticket,
                sample.index,
                output.text,
                output.token_ids,
                output.logprobs,
                output.prompt_logprobs,
                queued_s,
                ending,
                output.hidden,
            )
        )


class LoadReporter(Observer):
    """Counts the engine's load after its steps, in its thread; `load` gives it at a time."""

    def __init__(self, load: Callable[[float], InstanceLoad]):
        self._load = load
        self._newest: tuple[InstanceLoad, dict[str, int]] | None = None
        self._counted_s = 0.0

    @property
    def has_news(self) -> bool:
        """Whether there is a count that was not taken."""
        return self._newest is not None

    def ready(self, figures: EngineFigures) -> None:
        """Count the empty engine."""
        self._count(figures, time.monotonic())

    def stepped(self, figures: EngineFigures, step: Stepped) -> None:
        """Count; requests that came during the step are not in it, so it is as old as the step's start."""
        if step.began_s - self._counted_s >= LOAD_EVERY_S:
            self._count(figures, step.began_s)

    def idle(self, figures: EngineFigures, lost_blocks: int) -> None:
        """Count the empty engine."""
        self._count(figures, time.monotonic())

    def take(self) -> tuple[InstanceLoad | None, dict[str, int]]:
        """The newest count, once, and blocks by kind."""
        newest, self._newest = self._newest, None
        return (None, {}) if newest is None else newest

    def _count(self, figures: EngineFigures, now: float) -> None:
        self._counted_s = now
        self._newest = self._load(now), dict(figures.blocks)
