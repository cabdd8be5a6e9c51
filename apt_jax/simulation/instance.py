"""One simulated instance: the engine's queues, block pool and policy, and the iteration that runs."""

from collections.abc import Callable
from dataclasses import dataclass

from apt_jax.cache import BlockPool, per_kind
from apt_jax.request import Request
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.host_times import HostTime
from apt_jax.scheduling.costs.step_load import step_load
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import Policy
from apt_jax.scheduling.state import Limits, SchedulerState, Span

EOS, TOKEN = 2, 5


@dataclass(frozen=True, slots=True)
class Sample:
    """The state after one iteration: `[start, end)` seconds, running and waiting requests, blocks by kind."""

    start_s: float
    end_s: float
    scheduled: int
    running: int
    waiting: int
    held_blocks: tuple[int, ...]  # by `CacheKind.index`


class Instance:
    """Serves the requests it is given. Time is the caller's: `begin` says when the iteration ends, `end` ends it.

    One iteration is planned after the last one is committed (the engine without asynchronous scheduling).
    """

    def __init__(
        self,
        policy: Policy,
        cost_model: CostModel,
        *,
        num_blocks: int,
        limits: Limits,
        block_size: int = 16,
        name: str = "0",
        host_time: HostTime = HostTime(),  # noqa: B008  # frozen; none, unless it is known
        on_plan: Callable[[Plan, float], None] | None = None,
    ):
        self.name = name
        self.state = SchedulerState(BlockPool(num_blocks, block_size), limits)
        self.samples: list[Sample] = []
        self.is_busy = False
        self._policy, self._cost_model, self._on_plan = policy, cost_model, on_plan
        self._host_time = host_time
        self._output_tokens: list[int] = []  # by arrival number; the policy never sees it
        self._spans: list[Span] = []
        self._abandoned: list[Request] = []
        self._start_s = self._end_s = 0.0
        self._report: InstanceLoad | None = None

    def add(self, request: Request, output_tokens: int) -> None:
        """Queue a request, which will end after `output_tokens`."""
        self._report = None
        self.state.add(request)
        self._output_tokens.append(output_tokens)

    def begin(self, now: float) -> float | None:
        """Plan and start an iteration; when it ends. None if the policy has nothing to do."""
        host_s = self._host_time.seconds(self.state.num_unfinished)
        plan = self._policy.schedule(self.state, now) if self.state.num_unfinished else Plan()
        if plan.is_empty:
            return None
        if self._on_plan is not None:
            self._on_plan(plan, now)
        self._report = None
        self._spans = self.state.apply(plan, now)
        self._abandoned = [abandoned.request for abandoned in plan.abandoned]
        self._start_s, self._end_s = now, now + host_s + self._cost_model.step_s(step_load(plan, self._spans))
        self.is_busy = True
        return self._end_s

    def end(self) -> list[Request]:
        """Commit the iteration's tokens; the requests that finished, those that its plan abandoned included."""
        state, now, finished = self.state, self._end_s, self._abandoned
        for request in finished:
            self._policy.finished(request, now)
        for span in self._spans:
            if not span.samples:
                continue
            request = span.request
            is_last = len(request.output_token_ids) + 1 >= self._output_tokens[request.order]
            if state.commit(request, EOS if is_last else TOKEN, now) is not None:
                self._policy.finished(request, now)
                finished.append(request)
        held_blocks = per_kind(state.pool.num_held)
        running, waiting = len(state.running), len(state.waiting)
        sample = Sample(self._start_s, now, len(self._spans), running, waiting, held_blocks)
        self.samples.append(sample)
        self._report, self.is_busy = None, False
        return finished

    def load(self, now: float, predictor: LengthPredictor) -> InstanceLoad:
        """The report for a router; the last one if nothing changed since."""
        if self._report is None:
            self._report = instance_load(self.state, self._cost_model, now, instance=self.name, predictor=predictor)
        return self._report
