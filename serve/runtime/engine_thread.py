"""The engine in its thread, and its communication with an asyncio loop.

The engine is synchronous and belongs to one thread. Requests and aborts reach it through an inbox that it empties
between steps; the outputs of a step go back with one `call_soon_threadsafe` per step, however many requests it serves.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from apt_jax.engine.interface import ServingEngine
from apt_jax.output import DeviceLost, Output, PolicyFailed
from apt_jax.request import OFFLINE_SLO, FinishReason, SamplingParams
from apt_jax.routing.instance import InstanceLoad
from apt_jax.serve.errors import EngineFailure, NotReady
from apt_jax.serve.runtime.admission import Admission
from apt_jax.serve.runtime.entrance import SEE_LOG, Entrance
from apt_jax.serve.runtime.group import (
    Abort,
    Active,
    Call,
    Command,
    End,
    Entry,
    Group,
    Mail,
    Message,
    Prepared,
)
from apt_jax.serve.runtime.observer import Observer, Stepped
from apt_jax.serve.runtime.samples import Sample, as_sent, has_broken_slo
from apt_jax.serve.runtime.status import EngineStatus, Watchdog, WatchLimits

logger = logging.getLogger("apt_jax.serve")

STOPPING = "the server is stopping"
REPORT_S = 1.0  # between two looks at the engine's health, for the log
PROBE_S = 10.0  # between two probes of an unhealthy engine that has nothing to do
PROBE = Sample("probe", 0, (0,), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True), OFFLINE_SLO)


class EngineThread:
    """Makes, warms and steps an engine in a daemon thread.

    Args:
        make_engine: loads the engine; runs in the thread.
        on_ready: called on the loop once requests are taken, with the seconds that the start took.
        on_failure: called on the loop if the engine cannot be made or does not recover from a failure.
    """

    def __init__(
        self,
        make_engine: Callable[[], ServingEngine],
        on_ready: Callable[[float], None] = lambda seconds: None,
        on_failure: Callable[[Exception], None] = lambda error: None,
    ):
        self.status = EngineStatus.LOADING
        self.observers: list[Observer] = []
        self.engine: ServingEngine | None = None
        self.watchdog = Watchdog()
        self.compile_s = 0.0  # that warming the engine took to compile
        self._make_engine = make_engine
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._gate = threading.Lock()  # no request enters the inbox once the status says that nobody reads it
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._active: dict[str, Active] = {}
        self._cancelled: dict[str, Active] = {}  # until the engine has ended them
        self._stopping = False
        self._failed_steps = 0  # of the engine's own, as counted last
        self._mail = Mail()
        self._entering = Entrance(self._inbox.put, self._mail, self._active)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def refuse_late(self) -> None:
        """From now on refuse what would miss its SLO. Before `start`."""
        self._entering.admission = Admission()
        self.observers.append(self._entering.admission)

    @property
    def admission(self) -> Admission | None:
        """What refuses."""
        return self._entering.admission

    def watch(self, limits: WatchLimits) -> None:
        """When the engine counts as unhealthy."""
        self.watchdog.limits = limits

    def start(self) -> None:
        """Begin; call it on the loop that outputs are to go to."""
        self._mail.connect(asyncio.get_running_loop())
        self._thread.start()
        self._report_health()

    @property
    def trouble(self) -> str | None:
        """Why the engine does not serve now, though it may again; None if it does, or has not begun to."""
        if self.status is EngineStatus.FAILED:
            return f"the engine has failed for good; {SEE_LOG}"
        return self.watchdog.trouble

    @property
    def num_waiting_running(self) -> tuple[int, int]:
        """Requests that wait and that hold cache."""
        return (0, 0) if self.engine is None else (self.engine.num_waiting, self.engine.num_running)

    def load(self, now: float) -> InstanceLoad:
        """The report to a router at `now`; call it in the engine's thread, as observers are."""
        assert self.engine is not None
        return self.engine.load(now)

    def submit(self, samples: Sequence[Sample]) -> Group:
        """Hand samples to the engine, all or none; call it on the loop, then await `Group.accepted`.

        Raises:
            NotReady: the engine is not (or no longer) ready.
        """
        group = Group(samples, on_close=self.abort)
        self.enter(group)
        return group

    def enter(self, message: Group | Call) -> None:
        """`submit` for a caller that has made the group, or the call.

        Raises:
            NotReady: the engine is not (or no longer) ready, or stuck in a step.
        """
        if (stuck := self.watchdog.stuck) is not None:
            raise NotReady(f"the engine does not answer: {stuck}; try another server, or this one again later")
        with self._gate:
            self.ready_engine()
            self._inbox.put(message)

    def abort(self, group: Group) -> None:
        """End what is unfinished of a group; nothing more comes for it."""
        self._inbox.put(Abort(group))

    def end(self, group: Group) -> None:
        """End what is unfinished of a group, with finish reason abort."""
        self._inbox.put(End(group))

    def ready_engine(self) -> ServingEngine:
        """The engine, for its configuration and tokenizer.

        Raises:
            NotReady: it is not (or no longer) ready.
        """
        if self.engine is None or self.status is not EngineStatus.READY:
            raise NotReady(f"the server is not ready: the engine is {self.status.value}; try again soon")
        return self.engine

    def abort_all(self) -> None:
        """End every request, with finish reason abort."""
        self._inbox.put(Command.ABORT_ALL)

    def call[T](self, work: Callable[[ServingEngine], T]) -> Future[T]:
        """Have `work` done in the engine's thread between two steps, in the order of groups; raises as `enter`."""
        call = Call(work)
        self.enter(call)
        return call.answer

    def stop(self, timeout_s: float) -> bool:
        """End every request and the thread; False if it is still busy (compiling) after `timeout_s`."""
        self._inbox.put(Command.STOP)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            began = time.monotonic()
            engine = self._make_engine()
            self.status = EngineStatus.WARMING
            logger.info("model loaded after %.1f s, preparing its programs", time.monotonic() - began)
            engine.warm_up(progress=True)
            self.engine = engine
            figures = engine.figures()
            self.compile_s = figures.compile_s
            for observer in self.observers:
                observer.ready(figures)
            self.watchdog.watch(lambda: engine.longest_step_s)
            self.status = EngineStatus.READY
            self._mail.add(partial(self._on_ready, time.monotonic() - began))
            self._mail.post()
            self._serve(engine)
            self._end(EngineStatus.STOPPED, NotReady(STOPPING))
        except Exception as error:
            self._end(EngineStatus.FAILED, EngineFailure(f"the engine has failed; {SEE_LOG}"))
            self._mail.add(partial(self._on_failure, error))
        self._mail.post()

    def _serve(self, engine: ServingEngine) -> None:
        while not (self._stopping and not engine.has_unfinished):
            self._read_inbox(engine)
            self._mail.post()  # who was accepted or refused need not wait for the step
            if engine.has_unfinished:
                with self.watchdog.working():
                    self._step(engine)
                self._mail.post()

    def _step(self, engine: ServingEngine) -> None:
        began = time.monotonic()
        try:
            outputs = engine.step()
        except Exception as error:
            self._failed_steps = engine.figures().num_failed_steps
            self.watchdog.judge((), failed=True)
            self._recover(engine, error)
        else:
            self._deliver(outputs, began)
            figures = engine.figures()
            self.watchdog.judge(outputs, failed=figures.num_failed_steps > self._failed_steps)
            self._failed_steps = figures.num_failed_steps
            shown = [output for output in outputs if output.request.request_id != PROBE.request_id]
            for observer in self.observers:
                observer.stepped(figures, Stepped(shown, (), began))
        if not engine.has_unfinished:
            self._check_idle(engine)

    def _check_idle(self, engine: ServingEngine) -> None:
        """Whenever nothing is left to do, every block must be free."""
        figures = engine.figures()
        lost = figures.num_held_blocks
        if lost:
            logger.error("the engine is idle but %d blocks are not free; this is a bug, please report it", lost)
        for observer in self.observers:
            observer.idle(figures, lost)

    def _read_inbox(self, engine: ServingEngine) -> None:
        """Process the inbox; waits for a message when idle, and after a failed step for a while before the next.

        An idle engine that is unhealthy is probed: a load balancer that sees it so sends no request that could show
        that it works again.
        """
        until = time.monotonic() + self.watchdog.pause_s
        block = not (engine.has_unfinished or self._entering)
        while True:
            left_s = 0.0 if self._stopping else max(until - time.monotonic(), engine.idle_s, engine.spare_s)
            if left_s > 0:
                self._mail.post()
            idle_s = PROBE_S if self.watchdog.is_exhausted and not self._stopping else None
            try:
                command = self._inbox.get(block or left_s > 0, idle_s if block else max(left_s, 0.0))
            except queue.Empty:
                if block:
                    self._entering.begin(engine, Entry(Group([PROBE], on_close=lambda probe: None)))
                break
            block = False
            with self.watchdog.working():
                self._obey(engine, command)
        with self.watchdog.working():
            self._entering.admit_next(engine)

    def _obey(self, engine: ServingEngine, command: Message) -> None:
        match command:
            case Group():
                self._entering.begin(engine, Entry(command))
            case Prepared(entry):
                if self._entering.prepared(engine, entry):
                    self._obey(engine, End(entry.group))
            case Abort():
                self._entering.drop(command.group)
                for sample in command.group.samples:
                    active = self._active.pop(sample.request_id, None)
                    if active is not None:
                        self._cancelled[sample.request_id] = active
                        engine.abort(sample.request_id)
            case End(group):
                self._entering.hurry(engine, group)
                for sample in group.samples:
                    engine.abort(sample.request_id)  # the next step reports it
            case Call():
                command.make(engine)
            case Command.ABORT_ALL | Command.STOP:
                self._stopping |= command is Command.STOP
                self._entering.hurry_all(engine, NotReady(STOPPING))
                for request_id in self._active:
                    engine.abort(request_id)  # the next step reports it

    def _deliver(self, outputs: Sequence[Output], began_s: float) -> None:
        delivered: list[tuple[Active, Output]] = []
        unwanted: list[tuple[Active | None, Output]] = []
        for output in outputs:
            request_id = output.request.request_id
            active = self._active.get(request_id)
            if active is None:
                if request_id != PROBE.request_id:
                    unwanted.append((self._cancelled.pop(request_id, None), output))
                continue
            if output.finish_reason is not None:
                del self._active[request_id]
            if output.finish_reason is FinishReason.ERROR and not output.is_contradictory:
                logger.error("request %s ended with an error: %s", request_id, output.error)
            if (shown := active.hold(output)) is not None:
                delivered.append((active, shown))
        if outputs:
            self._mail.add(partial(self._hand_out, delivered, unwanted, began_s))

    def _hand_out(
        self, delivered: list[tuple[Active, Output]], unwanted: list[tuple[Active | None, Output]], began_s: float
    ) -> None:
        """On the loop: outputs are ready to be sent, and those that nobody wants any more are over."""
        now, outputs, cancelled = time.monotonic(), [], set()
        for active, output in delivered:
            if active.sample is PROBE:  # no client's
                continue
            outputs.append(as_sent(active.record, output, now))
            active.group.receive(active.sample, outputs[-1])
        for left, output in unwanted:
            outputs.append(output if left is None else as_sent(left.record, output, now))
            left_s = None if left is None else left.group.left_s
            if left is None or left_s is None or not has_broken_slo(left.record, left_s):
                cancelled.add(output.request.request_id)
        stepped = Stepped(outputs, cancelled, began_s)
        for observer in self.observers:
            observer.brought(stepped)

    def _recover(self, engine: ServingEngine, error: Exception) -> None:
        """A step raised: end the requests that the engine holds, and go on without them.

        Where only the policy raised nothing is lost yet: they wait for the next attempt, until too many have failed.

        Raises:
            EngineFailure: the requests cannot be ended either, or there are none and the engine is to stop.
        """
        if isinstance(error, DeviceLost):
            raise error
        if self._stopping and not self._active:
            raise EngineFailure("a step failed while the engine stopped") from error
        is_first = self.watchdog.num_failed == 1
        samples = [active.sample for active in self._active.values() if active.sample is not PROBE]
        goes_on = isinstance(error, PolicyFailed) and not self.watchdog.is_exhausted
        if goes_on:
            if is_first:  # once in a row, not for every attempt
                logger.error("a step failed, its %d requests wait", len(samples), exc_info=error)
        elif samples or is_first:
            logger.error("a step failed; ending its %d requests", len(samples), exc_info=error)
            for observer in self.observers:
                observer.lost(samples)
        for observer in self.observers:
            observer.failed(engine.figures())
        if not goes_on:
            self._give_up(engine, error)

    def _give_up(self, engine: ServingEngine, error: Exception) -> None:
        """End the requests of a step that raised."""
        self._fail_groups(EngineFailure(f"the engine failed while it worked on this request; {SEE_LOG}"))
        for request_id in list(self._active):
            del self._active[request_id]
            engine.abort(request_id)
        if engine.num_waiting or engine.num_running:
            raise EngineFailure("the engine holds requests that it cannot end") from error
        if isinstance(error, PolicyFailed):
            engine.renew_policy()

    def _report_health(self) -> None:
        """On the loop, again and again until the thread ends: it cannot report its own standstill."""
        if self.status not in (EngineStatus.FAILED, EngineStatus.STOPPED):
            self.watchdog.report()
            asyncio.get_running_loop().call_later(REPORT_S, self._report_health)

    def _end(self, status: EngineStatus, error: Exception) -> None:
        """Take no more requests and fail those that still wait for an answer."""
        with self._gate:
            self.status = status
        self._fail_groups(error)
        self._entering.close(error)
        if self.engine is not None and self.engine.tokenizer is not None:
            self.engine.tokenizer.grammars.close()
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Group | Call):
                self._mail.add(partial(command.fail, error))

    def _fail_groups(self, error: Exception) -> None:
        groups = [*(active.group for active in self._active.values()), *self._entering.take_ready()]
        for group in {id(group): group for group in groups}.values():
            self._mail.add(partial(group.fail, error))
