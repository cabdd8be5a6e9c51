"""One simulated instance: the engine's queues, block pool and policy, and the iteration that runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from apt_jax.cache import BlockPool, per_kind
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.host_times import HostTime
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import Policy
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.requests.columns import SimulatedRequest
from apt_jax.simulation.requests.state import SimulatedState


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
        self.state = SimulatedState(BlockPool(num_blocks, block_size), limits)
        self.samples: list[Sample] = []
        self.is_busy = False
        self._policy, self._cost_model, self._on_plan = policy, cost_model, on_plan
        self._host_time = host_time
        self._num_scheduled = 0
        self._abandoned: list[SimulatedRequest] = []
        self._start_s = self._end_s = 0.0
        self._report: InstanceLoad | None = None

    def add(self, request: SimulatedRequest, output_tokens: int) -> None:
        """Queue a request, which will end after `output_tokens`."""
        self._report = None
        self.state.submit(request, output_tokens)

    def begin(self, now: float) -> float | None:
        """Plan and start an iteration; when it ends. None if the policy has nothing to do."""
        host_s = self._host_time.seconds(self.state.num_unfinished)
        plan = self._policy.schedule(self.state, now) if self.state.num_unfinished else Plan()
        if plan.is_empty:
            return None
        if self._on_plan is not None:
            self._on_plan(plan, now)
        self._report = None
        load = self.state.advance(plan, now)
        self._num_scheduled = len(plan.scheduled)
        self._abandoned = [cast(SimulatedRequest, abandoned.request) for abandoned in plan.abandoned]
        self._start_s, self._end_s = now, now + host_s + self._cost_model.step_s(load)
        self.is_busy = True
        return self._end_s

    def end(self) -> list[SimulatedRequest]:
        """Commit the iteration's tokens; the requests that finished, those that its plan abandoned included."""
        state, now = self.state, self._end_s
        finished = [*self._abandoned, *state.complete(now)]
        for request in finished:
            self._policy.finished(request, now)
        held_blocks = per_kind(state.pool.num_held)
        running, waiting = len(state.running), len(state.waiting)
        sample = Sample(self._start_s, now, self._num_scheduled, running, waiting, held_blocks)
        self.samples.append(sample)
        self._report, self.is_busy = None, False
        return finished

    def load(self, now: float, predictor: LengthPredictor) -> InstanceLoad:
        """The report for a router; the last one if nothing changed since."""
        if self._report is None:
            self._report = instance_load(self.state, self._cost_model, now, instance=self.name, predictor=predictor)
        return self._report
