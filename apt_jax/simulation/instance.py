"""One simulated instance: the engine's queues, block pool and policy, and the iteration that runs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from apt_jax.cache import per_kind
from apt_jax.request import Status
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.scheduling.costs.cost_model import CostModel, block_bytes
from apt_jax.scheduling.costs.host_copies import CopyForm, worth_restoring
from apt_jax.scheduling.costs.host_times import HostTime
from apt_jax.scheduling.costs.projection import least_projected_tokens
from apt_jax.scheduling.host_tier import HostTier
from apt_jax.scheduling.idling import Idling
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.plan import Plan, Reason
from apt_jax.scheduling.policies.interface import Policy, Repeat, Repeating
from apt_jax.scheduling.prefix_pool import make_pool
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.requests.columns import SimulatedRequest
from apt_jax.simulation.requests.state import SimulatedState

MOST_AT_ONCE = 128  # iterations


@dataclass(frozen=True, slots=True)
class Sample:
    """The state after one iteration: `[start, end)` seconds, running and waiting requests, blocks by kind."""

    start_s: float
    end_s: float
    scheduled: int
    running: int
    waiting: int
    held_blocks: tuple[int, ...]  # by `CacheKind.index`
    copied_s: float = 0.0  # by which copies from and to host memory made it longer


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
        prefix_caching: bool = False,
        host_slots: int = 0,
        host_time: HostTime = HostTime(),  # noqa: B008  # frozen; none, unless it is known
        copies: CopyForm = CopyForm(),  # noqa: B008  # frozen; the engine's
        on_plan: Callable[[Plan, float], None] | None = None,
    ):
        self.name = name
        self.moved_bytes = 0.0
        self._copies, self._moved_bytes = copies, block_bytes(cost_model, block_size) * copies.share
        link_bytes_per_s = cost_model.hardware.host_bytes_per_s * cost_model.devices
        self._copy_s = copies.calls_s + self._moved_bytes / link_bytes_per_s
        restores = worth_restoring(cost_model, block_size, self._copy_s)
        host = HostTier(host_slots, restores, retains=copies.retains, block_s=self._copy_s) if host_slots else None
        pool = make_pool(num_blocks, block_size, prefix_caching=prefix_caching, host=host)
        self.state = SimulatedState(pool, limits)
        self.state.least_projected_tokens = least_projected_tokens(cost_model) if prefix_caching else None
        self.samples: list[Sample] = []
        self.is_busy, self._idling = False, Idling()
        self._policy, self._cost_model, self._on_plan = policy, cost_model, on_plan
        self._repeating = policy if isinstance(policy, Repeating) else None
        self._host_time = host_time
        self._num_scheduled = 0
        self._abandoned: list[SimulatedRequest] = []
        self._start_s = self._end_s = self._copied_s = 0.0
        self._report: InstanceLoad | None = None
        self._plan = Plan()
        self._repeat: Repeat | None = None  # of the plan; None if it has to be made anew

    def add(self, request: SimulatedRequest, output_tokens: int) -> None:
        """Queue a request, which will end after `output_tokens`."""
        self._report = self._repeat = None
        self._idling.end()
        self.state.submit(request, output_tokens)

    @property
    def is_idling(self) -> bool:
        """Whether the policy lets everybody wait until a certain time."""
        return self._idling.until_s is not None

    def begin(self, now: float, horizon_s: float = -math.inf) -> float | None:
        """Plan and start an iteration; when it ends, or, if the policy waits on purpose, when to plan again.

        None if it has nothing to do.

        Iterations before it that end before `horizon_s`, and in which nothing happens but that all decode, are run at
        once where the policy says how long its plan stays.
        """
        candidates = self.state.num_unfinished
        host_s = self._host_time.seconds(candidates) + self._cost_model.host_s(candidates)
        if self._repeat is not None:
            now = self._run_ahead(self._repeat, now, host_s, horizon_s)
        if self._repeat is None:
            self._plan = self._policy.schedule(self.state, now) if candidates else Plan()
            self._repeat = self._repeat_of(self._plan, now)
        plan = self._plan
        if plan.is_empty:
            return plan.wake_at_s if candidates and self._idling.accepts(plan, now) else None
        self._idling.end()
        if self._on_plan is not None:
            self._on_plan(plan, now)
        self._report = None
        load = self.state.advance(plan, now)
        self._num_scheduled = len(plan.scheduled)
        self._abandoned = [cast(SimulatedRequest, abandoned.request) for abandoned in plan.abandoned]
        moves, work_s = self.state.take_moves(), self._cost_model.step_s(load)
        counts = len(moves.saved), len(moves.restored), len(moves.fetched)
        self.moved_bytes += sum(counts) * self._moved_bytes
        step_s = self._copies.seconds(work_s, *(count * self._copy_s for count in counts))
        self._start_s, self._end_s, self._copied_s = now, now + host_s + step_s, step_s - work_s
        self.is_busy = True
        return self._end_s

    def _repeat_of(self, plan: Plan, now: float) -> Repeat | None:
        """How long the policy would make this plan again; None if it is of another form, or the policy does not say."""
        if self._repeating is None or len(plan.scheduled) != len(self.state.running):
            return None
        if plan.preempted or plan.converted or plan.abandoned or plan.fetched or not plan.scheduled:
            return None
        decodes = Reason.DECODES
        if plan.scheduled[-1].reason is not decodes or any(entry.reason is not decodes for entry in plan.scheduled):
            return None  # chunks come last
        return self._repeating.repeat(self.state, plan, now)

    def _run_ahead(self, repeat: Repeat, now: float, host_s: float, horizon_s: float) -> float:
        """Run iterations with the last plan; when the next one begins, with that plan if there still is `_repeat`."""
        state, plan = self.state, self._plan
        ahead, free, held = state.ahead(), state.pool.num_free, per_kind(state.pool.num_held)
        running, waiting = len(state.running), len(state.waiting)
        at_once = min(ahead.most, MOST_AT_ONCE)
        seconds = self._cost_model.decodes_s(ahead.load, at_once).tolist()
        starts_s: list[float] = []
        ends_s: list[float] = []
        while True:
            k = len(ends_s)
            if now >= repeat.until_s or k >= repeat.iterations or ahead.blocks[k] > free:
                self._repeat = None
                break
            end_s = now + host_s + seconds[k]
            if k == at_once - 1 or end_s >= horizon_s:
                break
            if self._on_plan is not None:
                self._on_plan(plan, now)
            held_blocks = tuple(blocks + grown[k] for blocks, grown in zip(held, ahead.grown, strict=True))
            self.samples.append(Sample(now, end_s, running, running, waiting, held_blocks))
            starts_s.append(now)
            ends_s.append(end_s)
            gap_s, now = end_s - now, end_s
            if gap_s > repeat.longest_gap_s:
                self._repeat = None
                break
        if ends_s:
            state.repeat(plan, starts_s, ends_s)
        if self._repeat is not None:
            self._repeat = repeat._replace(iterations=repeat.iterations - len(ends_s) - 1)
        assert self._repeating is not None
        last_s = now if self._repeat is not None else starts_s[-1] if starts_s else None
        if last_s is not None:
            self._repeating.repeated(last_s)
        return now

    def end(self) -> list[SimulatedRequest]:
        """Commit the iteration's tokens; the requests that finished, those that its plan abandoned included."""
        state, now = self.state, self._end_s
        finished = [*self._abandoned, *state.complete(now)]
        if self._repeat is not None:
            self._repeat = self._still(self._repeat, finished)
        for request in finished:
            self._policy.finished(request, now)
        held_blocks = per_kind(state.pool.num_held)
        running, waiting = len(state.running), len(state.waiting)
        sample = Sample(self._start_s, now, self._num_scheduled, running, waiting, held_blocks, self._copied_s)
        self.samples.append(sample)
        self._report, self.is_busy = None, False
        return finished

    def _still(self, repeat: Repeat, finished: list[SimulatedRequest]) -> Repeat | None:
        """`repeat` after an iteration, if its plan stays: without those that finished in it."""
        if not self.state.columns.gaps_now_s.max() <= repeat.longest_gap_s:
            return None
        if finished:
            if not repeat.through_ends or not self.state.running:
                return None
            left = tuple(entry for entry in self._plan.scheduled if entry.request.status is Status.RUNNING)
            self._plan = Plan(left)
        return repeat

    def load(self, now: float, predictor: LengthPredictor) -> InstanceLoad:
        """The report for a router; the last one if nothing changed since."""
        if self._report is None:
            self._report = instance_load(self.state, self._cost_model, now, instance=self.name, predictor=predictor)
        return self._report
