"""A group: the samples of one client request, seen from the asyncio loop that waits for them.

And what the engine's thread is told of groups, and keeps of them.
"""

import asyncio
import enum
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apt_jax.engine.interface import ServingEngine
from apt_jax.output import Output, joined
from apt_jax.request import Request
from apt_jax.serve.errors import NotReady
from apt_jax.serve.runtime.samples import Sample

if TYPE_CHECKING:
    from apt_jax.tokenization.restriction import Restriction

logger = logging.getLogger("apt_jax.serve")

SAMPLES_AT_ONCE = 64  # of a larger group enter before a step: a few milliseconds, so that no stream waits for all


class Group:
    """Outputs as they come.

    Iterating yields lists of (sample, output), each list everything since the last, until every sample has
    ended or the group is closed. `accept`, `fail` and `receive` are for the engine's side; all run on the loop.
    """

    def __init__(self, samples: Sequence[Sample], on_close: Callable[["Group"], None]):
        self.samples = samples
        self.closed = False
        self.left_s: float | None = None  # when the client disconnected, on the engine's clock
        self._on_close = on_close
        self._unfinished = len(samples)
        self._accepted = False
        self._pending: list[tuple[Sample, Output]] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    @property
    def is_wanted(self) -> bool:
        """Whether a client still waits for the accepted samples and the engine has not stopped."""
        return self._accepted and self.left_s is None and isinstance(self._error, NotReady | None)

    async def accepted(self) -> None:
        """Wait until the engine has queued every sample, or the group is closed.

        Raises:
            ValueError, QueueFull: the engine refused one; none is queued.
            NotReady, EngineFailure: it stopped or failed before.
        """
        while not (self._accepted or self.closed):
            await self._change()

    async def begun(self) -> list[Output]:
        """Wait for the first outputs, which stay to be iterated over; none if the group is closed.

        Raises:
            NotReady, EngineFailure, RequestTimeout: nothing will come.
        """
        while not (self._pending or self.closed):
            await self._change()
        return [output for _, output in self._pending]

    async def __aiter__(self) -> AsyncIterator[list[tuple[Sample, Output]]]:
        """Raises NotReady or EngineFailure when the engine stops or fails."""
        while not self.closed:
            if self._pending:
                pending, self._pending = self._pending, []
                self._unfinished -= sum(output.finish_reason is not None for _, output in pending)
                yield pending
            elif self._unfinished <= 0:
                return
            else:
                await self._change()

    def close(self) -> None:
        """Abort what is unfinished and end the iteration; doing it again changes nothing."""
        if not self.closed:
            self.closed = True
            self._changed.set()
            self._on_close(self)

    def abandon(self) -> None:
        """The client has disconnected: the rest is not wanted."""
        self.left_s = time.monotonic()
        self.close()

    def expire(self, error: Exception) -> None:
        """Abort what is unfinished and fail."""
        self.fail(error)
        self._on_close(self)

    def take_pending(self) -> list[tuple[Sample, Output]]:
        """Outputs that arrived and were not iterated over."""
        pending, self._pending = self._pending, []
        return pending

    def put_back(self, pairs: list[tuple[Sample, Output]]) -> None:
        """Outputs that were iterated over and not processed, for `take_pending`."""
        self._pending[:0] = pairs

    def accept(self) -> None:
        """Every sample is queued."""
        self._accepted = True
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Nothing more will come, because of `error`."""
        self._error = error
        self._changed.set()

    def receive(self, sample: Sample, output: Output) -> None:
        """A step brought `output`."""
        self._pending.append((sample, output))
        self._changed.set()

    async def _change(self) -> None:
        if self._error is not None:
            raise self._error
        await self._changed.wait()
        self._changed.clear()


@dataclass(frozen=True)
class Abort:
    """Nobody wants the rest of a group any more."""

    group: Group


@dataclass(frozen=True)
class End:
    """A group is to end with what it has, finish reason abort."""

    group: Group


class Command(enum.Enum):
    """What concerns all groups."""

    ABORT_ALL = enum.auto()
    STOP = enum.auto()


@dataclass(frozen=True)
class Call[T]:
    """Something to be done to the engine between two steps; `answer` is what it returns or raises."""

    work: Callable[[ServingEngine], T]
    answer: Future[T] = field(default_factory=Future)

    def make(self, engine: ServingEngine) -> None:
        """Do it, unless the answer has been cancelled."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self.work(engine))
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """It failed, or nobody will do it, because of `error`."""
        if not self.answer.cancelled():
            self.answer.set_exception(error)


@dataclass
class Entry:
    """A group on its way into the engine."""

    group: Group
    added: list[str] = field(default_factory=list)  # ids of the samples that the engine has been given
    restrictions: "Sequence[Restriction | None]" = ()  # of all samples, where they were prepared
    error: Exception | None = None  # why they cannot be
    is_to_end: bool = False  # as soon as the engine has it

    @property
    def left(self) -> Sequence[Sample]:
        """Those that it has not."""
        return self.group.samples[len(self.added) :]

    @property
    def next_restriction(self) -> "Restriction | None":
        """That of the first that is left."""
        return self.restrictions[len(self.added)] if self.restrictions else None


@dataclass(frozen=True)
class Prepared:
    """What the samples of a group restrict is known."""

    entry: Entry


type Message = Group | Prepared | Abort | End | Call[Any] | Command


@dataclass
class Active:
    """A sample that the engine works on, and its record, which only the loop changes."""

    group: Group
    sample: Sample
    record: Request
    has_begun: bool = False
    held: list[Output] = field(default_factory=list)

    def hold(self, output: Output) -> Output | None:
        """What is to be delivered now: nothing until there are as many tokens as the sample's client wants at once.

        The first token and the end are never held back.
        """
        if self.sample.tokens_at_once == 1:
            return output
        self.held.append(output)
        count = sum(len(held.token_ids) for held in self.held)
        if self.has_begun and output.finish_reason is None and count < self.sample.tokens_at_once:
            return None
        self.has_begun, held, self.held = True, self.held, []
        return joined(held)


class Mail:
    """What the engine's thread tells the asyncio loop: everything since the last time with one call, in order."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def connect(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that the calls are for."""
        self._loop = loop

    def add(self, call: Callable[[], None]) -> None:
        """To be called on the loop, once it is posted."""
        self._calls.append(call)

    def post(self) -> None:
        """Have the loop make the calls that were added."""
        if not self._calls:
            return
        calls, self._calls = self._calls, []
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_make, calls)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.debug("the event loop is closed; %d messages dropped", len(calls))


def _make(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
