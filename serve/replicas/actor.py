"""A replica: one engine in its thread, in a process of its own. Ray makes it an actor; without Ray it is plain asyncio.

The front numbers its messages, because Ray does not guarantee the order of calls to an asynchronous actor.
"""

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from apt_jax.engine.interface import ServingEngine
from apt_jax.serve.errors import NotReady
from apt_jax.serve.logs import set_up_logs
from apt_jax.serve.observability.engine_metrics import EngineMetrics
from apt_jax.serve.observability.history import History
from apt_jax.serve.observability.profile import record
from apt_jax.serve.replicas.leaving.hand_over import Leaving, Pages, enter_pages, take_pages
from apt_jax.serve.replicas.leaving.notice import PreemptionNotice, PreemptionWatch
from apt_jax.serve.replicas.messages import Abort, Answer, Command, EngineSpec, Facts, Refused, Report, Submit
from apt_jax.serve.replicas.relay import LoadReporter, Relay, RelayedGroup
from apt_jax.serve.runtime.engine_thread import EngineThread
from apt_jax.serve.runtime.group import Call

SHOWN_PLANS = 64

logger = logging.getLogger("apt_jax.serve")


class EngineActor:
    """The engine of `spec` and its messages; `make_engine` replaces loading it (in tests)."""

    def __init__(self, name: str, spec: EngineSpec, make_engine: Callable[[], ServingEngine] | None = None):
        if make_engine is None:
            set_up_logs(spec.log_format, spec.log_level)
        self._spec = spec
        self._name = name
        self._watch: PreemptionWatch | None = None
        self._gone_s: float | None = None  # when the machine is taken away, once that is known
        self._history = History()
        self._metrics = EngineMetrics(spec.model_name, replica=name)
        self._make_engine = make_engine or self._build
        self._thread: EngineThread | None = None
        self._relay: Relay | None = None
        self._ready: asyncio.Future[float] | None = None
        self._groups: dict[int, RelayedGroup] = {}
        self._next = 0  # number of the next message
        self._early: dict[int, list[Command]] = {}  # messages that came before it

    async def start(self) -> Facts:
        """Load and compile; requests are accepted when this returns.

        Raises:
            Exception: what it failed with.
        """
        self._ready = asyncio.get_running_loop().create_future()
        self._thread = thread = EngineThread(self._make_engine, self._ready.set_result, self._fail)
        thread.watch(self._spec.limits)
        loads = LoadReporter(thread.load)
        self._relay = Relay(loads)
        self._metrics.watch(lambda: thread.trouble is None)
        thread.observers += [self._metrics, self._history, loads]
        if self._spec.refuses_late:
            thread.refuse_late()
        thread.start()
        start_s = await self._ready
        self._watch_notices()
        engine = thread.ready_engine()
        return Facts(
            *(engine.config, engine.tokenizer, engine.max_model_len, time.monotonic(), os.getpid()),
            sampling_defaults=engine.sampling_defaults,
            start_s=start_s,
            fingerprint=engine.fingerprint,
        )

    async def reports(self) -> AsyncIterator[Report]:
        """Reports to the front, until the engine stops.

        Raises:
            Exception: the error by which the engine was lost.
        """
        assert self._relay is not None and self._thread is not None
        while True:
            report = await self._relay.report()
            lasts_s = None if self._gone_s is None else self._gone_s - time.monotonic()
            counts = dict(self._metrics.counts)
            yield dataclasses.replace(report, trouble=self._thread.trouble, lasts_s=lasts_s, counts=counts)

    async def command(self, number: int, commands: list[Command]) -> None:
        """Process a message, after all earlier ones."""
        self._early[number] = commands
        while self._next in self._early:
            for command in self._early.pop(self._next):
                match command:
                    case Submit():
                        self._submit(command)
                    case Abort(ticket):
                        group = self._groups.pop(ticket, None)
                        if group is not None:
                            group.close()
            self._next += 1

    async def ask(self, question: str, argument: Any = "") -> Answer:
        """Answer a question.

        Those are "metrics", "requests", "story" (of a request id), "plans", "record" (SECONDS FOLDER), and
        "reset_prefix_cache"; when a machine is taken away "echo" (bytes), "leave" (`Leaving`) or "enter" (a list of
        `Pages`).
        """
        match question:
            case "echo":
                return argument
            case "leave":
                return await self._leave(argument)
            case "enter":
                return await self._do(Call(lambda engine: enter_pages(engine, argument)))
            case "metrics":
                return await asyncio.to_thread(self._metrics.text)
            case "story":
                return await asyncio.to_thread(self._history.of, argument)
            case "requests":
                return await asyncio.to_thread(self._history.newest)
            case "reset_prefix_cache":
                assert self._thread is not None
                self._thread.call(lambda engine: engine.reset_prefix_cache())
                return None
            case "plans":
                engine = None if self._thread is None else self._thread.engine
                return [] if engine is None else (await asyncio.to_thread(engine.recent_plans))[-SHOWN_PLANS:]
            case "record":
                seconds, _, folder = argument.partition(" ")
                return str(await asyncio.to_thread(record, Path(folder), float(seconds)))
        raise ValueError(f"unknown question {question!r}")

    async def stop(self) -> None:
        """End the engine's thread."""
        if self._watch is not None:
            self._watch.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.stop, 5.0)

    def _submit(self, command: Submit) -> None:
        thread, relay, now = self._thread, self._relay, time.monotonic()
        assert thread is not None and relay is not None
        samples = [
            dataclasses.replace(sample, arrival_s=now - waited_s)
            for sample, waited_s in zip(command.samples, command.waited_s, strict=True)
        ]
        group = RelayedGroup(samples, thread.abort, command.ticket, relay, self._forget)
        try:
            thread.enter(group)
        except NotReady as error:
            relay.add(Refused(command.ticket, error))
        else:
            self._groups[command.ticket] = group

    async def _leave(self, leaving: Leaving) -> list[Pages]:
        """End a group that goes on elsewhere; its pages, as far as they are worth moving."""
        group = self._groups.pop(leaving.ticket, None)
        if group is not None:
            group.close()  # before the call, in the same inbox
        return await self._do(Call(lambda engine: take_pages(engine, leaving.samples, leaving.link)))

    async def _do[T](self, call: Call[T]) -> T:
        """Have something done to the engine between two steps."""
        assert self._thread is not None
        self._thread.enter(call)
        return await asyncio.wrap_future(call.answer)

    def _watch_notices(self) -> None:
        text, loop = self._spec.preemption_notice, asyncio.get_running_loop()
        notice = None if text is None else PreemptionNotice.parse(text).of_replica(self._name)
        if notice is not None:
            self._watch = PreemptionWatch(notice, partial(call_on, loop, self._noticed))
            self._watch.start()

    def _noticed(self, why: str) -> None:
        lasts_s = self._spec.preemption_grace
        logger.warning("the machine will be taken away in %g s: %s", lasts_s, why)
        self._gone_s = time.monotonic() + lasts_s
        assert self._relay is not None
        self._relay.hurry()

    def _forget(self, ticket: int) -> None:
        self._groups.pop(ticket, None)

    def _fail(self, error: Exception) -> None:
        assert self._ready is not None and self._relay is not None
        if not self._ready.done():
            self._ready.set_exception(error)
        self._relay.fail(error)

    def _build(self) -> ServingEngine:
        from apt_jax.serve.runtime.build import build_engine  # imports jax, which takes seconds

        spec = self._spec
        moves_pages = spec.preemption_notice is not None  # to replicas that stay
        return build_engine(
            spec.model, engine_config=spec.config, moves_pages=moves_pages, **dataclasses.asdict(spec.load)
        )


def call_on(loop: asyncio.AbstractEventLoop, act: Callable[[str], None], text: str) -> None:
    """Have `act` called on the loop, from any thread."""
    loop.call_soon_threadsafe(act, text)
