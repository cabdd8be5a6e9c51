"""A virtual clock around the real scheduler: the same policies, queues and block pools as the engine's.

Only two things differ from serving: the clock jumps by the cost model's time for each iteration, and tokens carry no
meaning. Policies cannot see a request's output length: it ends as if by an end-of-sequence token when its length is
reached. One loop of events serves one instance and many: the next arrival, or the end of the next iteration.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from apt_jax.request import FinishReason, SamplingParams, Slo, Status
from apt_jax.run_figures import is_sustained
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import Policy
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.fleet import Fleet
from apt_jax.simulation.instance import Instance, Sample
from apt_jax.simulation.requests.classes import Terms
from apt_jax.simulation.requests.columns import Columns, SimulatedRequest
from apt_jax.simulation.workload import Arrival

_PARAMS = SamplingParams(max_tokens=None)


class Stalled(RuntimeError):
    """The policy did nothing although requests are unfinished and nothing else will happen."""


class Standing(NamedTuple):
    """How many requests of a simulation have missed their SLO so far, in both readings, and how many can still.

    `unfinished` are all that have not ended, `to_come` those of them that have not arrived, of `total` requests.
    """

    missed_strictly: int
    missed: int
    unfinished: int
    to_come: int
    total: int


NOBODY = Standing(0, 0, 0, 0, 0)


@dataclass
class Outcome:
    """A finished simulation.

    Attributes:
        requests: those that arrived, in that order.
        window_s: when the last one arrived that does not follow another; all that were planned before have by then.
        samples_by_instance: one for each iteration.
        backlog: unfinished requests when the last one arrived.
        makespan_s: when the last iteration ended.
        instance_s: seconds of all instances together, from the time each was asked for until it ended.
        by_instance: requests that each instance was given; one number for one instance.
        moved_bytes: of the cache, copied between device and host memory in both directions.
        standing: at the end.
    """

    requests: list[SimulatedRequest]
    window_s: float
    samples_by_instance: list[list[Sample]] = field(default_factory=list)
    backlog: int = 0
    makespan_s: float = 0.0
    instance_s: float = 0.0
    by_instance: list[int] = field(default_factory=list)
    moved_bytes: float = 0.0
    standing: Standing = NOBODY

    @property
    def is_complete(self) -> bool:
        """Whether every request arrived and ended."""
        return not self.standing.unfinished

    @property
    def ends_s(self) -> list[float]:
        """When each request ended, however it did; infinity of those that the simulation left."""
        return [math.inf if r.ended_s is None else r.ended_s for r in self.requests]

    def is_sustained(self) -> bool | None:
        """Whether the rate lasts; None if arrivals were too short to say (`run_figures`)."""
        inside = [r for r in self.requests if r.arrival_s <= self.window_s]
        return is_sustained([r.arrival_s for r in inside], self.ends_s[: len(inside)], self.window_s)

    @property
    def samples(self) -> list[Sample]:
        """Those of all instances, one instance after the other."""
        return [sample for samples in self.samples_by_instance for sample in samples]


def simulate(
    arrivals: Sequence[Arrival],
    policy: Policy,
    *,
    cost_model: CostModel,
    num_blocks: int,
    limits: Limits,
    slo: Slo | None = None,
    block_size: int = 16,
    max_model_len: int = 2048,
    prefix_caching: bool = False,
    on_plan: Callable[[Plan, float], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    is_decided: Callable[[Standing], bool] | None = None,
    max_num_queued_reqs: int | None = None,
) -> Outcome:
    """Serve `arrivals` to the end on one instance.

    Args:
        arrivals: in order of time.
        policy: a fresh one; it learns while it runs.
        cost_model: gives each iteration's time.
        num_blocks: size of the cache pool.
        limits: of an iteration.
        slo: SLO of every request; default 1 s and 1 s.
        block_size: tokens per block.
        max_model_len: longest context.
        prefix_caching: keep full pages and share them, as the engine does.
        on_plan: called with every plan and the time it was made.
        on_progress: called now and then with the number of finished requests.
        is_decided: called after every iteration; True ends the simulation early.
        max_num_queued_reqs: arrivals beyond so many waiting requests are refused, as by the server; None refuses none.

    Raises:
        Stalled: the policy planned nothing while requests wait and none is still to arrive.
        ValueError: a request can never fit in the pool.
    """

    def start(name: str) -> Instance:
        return Instance(
            policy, cost_model, num_blocks=num_blocks, limits=limits, block_size=block_size, name=name,
            prefix_caching=prefix_caching, on_plan=on_plan,
        )  # fmt: skip

    return simulate_fleet(
        arrivals, Fleet(start), slo=slo, max_model_len=max_model_len, on_progress=on_progress, is_decided=is_decided,
        max_num_queued_reqs=max_num_queued_reqs,
    )  # fmt: skip


def simulate_fleet(
    arrivals: Sequence[Arrival],
    fleet: Fleet,
    *,
    slo: Slo | None = None,
    max_model_len: int = 2048,
    on_progress: Callable[[int], None] | None = None,
    is_decided: Callable[[Standing], bool] | None = None,
    max_num_queued_reqs: int | None = None,
) -> Outcome:
    """Serve `arrivals` to the end on a fresh `fleet`; arguments and errors as `simulate`."""
    state = fleet.instances[0].state
    planned = [turn for arrival in arrivals for turn in arrival.turns]
    for turn in planned:
        if not state.fits_alone(turn.prompt_tokens + turn.output_tokens):
            raise ValueError(
                f"a request of {turn.prompt_tokens} + {turn.output_tokens} tokens does not fit in "
                f"{state.pool.num_blocks} blocks of {state.pool.block_size} tokens; raise --num-blocks"
            )
    requests: list[SimulatedRequest] = []
    outcome = Outcome(requests, arrivals[-1].arrival_s)
    coming = [(arrival.arrival_s, i, arrival) for i, arrival in enumerate(arrivals)]  # a heap, since in order of time
    num_planned = len(planned)  # requests; later turns join `coming` when the ones before have ended
    follow: dict[str, Arrival] = {}  # the next turn of each request, by its id
    events: list[tuple[float, int]] = []  # when an instance's iteration ends; an idle one wakes to begin one
    awake: set[int] = set()  # instances with an event
    refused = Columns()
    now, finished, backlog = 0.0, 0, None
    missed = missed_strictly = 0

    def standing() -> Standing:
        return Standing(missed_strictly, missed, num_planned - finished, num_planned - len(requests), num_planned)

    def go_on(ended: SimulatedRequest) -> None:
        """The next turn comes, whatever became of this one."""
        turn = follow.pop(ended.request_id, None)
        if turn is not None:
            heapq.heappush(coming, (now + turn.arrival_s, len(arrivals) + finished, turn))

    while coming or events:
        if coming and (not events or coming[0][0] <= events[0][0]):
            arrival_s, _, arrival = heapq.heappop(coming)
            now = max(now, arrival_s)
            request = _request(len(requests), arrival, arrival_s, slo or Slo(), max_model_len)
            requests.append(request)
            if arrival.then is not None:
                follow[request.request_id] = arrival.then
            number = fleet.route(request, now)
            instance = fleet.instances[number]
            if max_num_queued_reqs is not None and len(instance.state.waiting) >= max_num_queued_reqs:
                _refuse(request, refused, now)
                finished, missed, missed_strictly = finished + 1, missed + 1, missed_strictly + 1
                go_on(request)
                continue
            if instance.is_idling:  # it plans at once, and not when it meant to
                events[:] = [event for event in events if event[1] != number]
                heapq.heapify(events)
                awake.discard(number)
            instance.add(request, arrival.output_tokens)
            if number not in awake:  # it plans when all that arrive now are there
                awake.add(number)
                heapq.heappush(events, (now, number))
            continue
        now, number = events[0]
        instance = fleet.instances[number]
        if instance.is_busy:
            for ended in fleet.end(number, now):
                ended.ended_s = now
                missed += not ended.attained
                missed_strictly += not ended.attained_strictly
                finished += 1
                go_on(ended)
                if on_progress is not None and finished % 50 == 0:
                    on_progress(finished)
            if is_decided is not None and is_decided(standing()):
                break
        if backlog is None and len(requests) == num_planned:
            backlog = num_planned - finished
        # without a router nothing happens before the next arrival that anybody else sees
        coming_s = coming[0][0] if coming else math.inf
        end_s = instance.begin(now, -math.inf if fleet.is_routed else coming_s)
        if end_s is None:
            heapq.heappop(events)
            awake.discard(number)
        else:
            heapq.heapreplace(events, (end_s, number))
    else:
        if finished < num_planned:
            raise Stalled(f"nothing scheduled at {now:.3f} s, {num_planned - finished} requests unfinished")
    outcome.makespan_s, outcome.backlog, outcome.standing = now, backlog or 0, standing()
    outcome.samples_by_instance = [instance.samples for instance in fleet.instances]
    outcome.moved_bytes = sum(instance.moved_bytes for instance in fleet.instances)
    outcome.instance_s = fleet.instance_s(now)
    outcome.by_instance = [member.num_requests for member in fleet.members]
    return outcome


def _refuse(request: SimulatedRequest, refused: Columns, now: float) -> None:
    """End a request at its arrival, as the server does whose queue is full."""
    request.order = len(refused.requests)
    refused.add(request, 0)
    request.status, request.finish_reason, request.ended_s = Status.FINISHED, FinishReason.ERROR, now


def _request(index: int, arrival: Arrival, arrival_s: float, slo: Slo, max_model_len: int) -> SimulatedRequest:
    assert arrival.prompt_tokens + arrival.output_tokens <= max_model_len
    terms = arrival.terms or Terms(slo)
    prompt, first_output_id = arrival.token_ids(index, max_model_len)
    request = SimulatedRequest(
        request_id=f"r{index}",
        prompt_token_ids=prompt,
        params=_PARAMS,
        arrival_s=arrival_s,
        max_new_tokens=max_model_len - arrival.prompt_tokens,
        slo=terms.slo,
        priority=terms.priority,
        user=terms.user,
    )
    request.class_name, request.target_tokens = terms.name, arrival.output_tokens
    request.first_output_id = first_output_id
    return request
