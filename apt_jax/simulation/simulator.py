"""A virtual clock around the real scheduler: the same policy, queues and block pool as the engine.

Only two things differ from serving: the clock jumps by the cost model's time for each iteration, and tokens carry no
meaning. One iteration is planned after the last one is committed (the engine without asynchronous scheduling).
Policies cannot see a request's output length: it ends with an end-of-sequence token when its length is reached.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from apt_jax.cache import BlockPool
from apt_jax.request import Request, SamplingParams, Slo
from apt_jax.scheduling.cost_model import CostModel
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policy import Policy
from apt_jax.scheduling.state import Limits, SchedulerState
from apt_jax.scheduling.step_load import step_load
from apt_jax.simulation.workload import Arrival

_EOS, _TOKEN = 2, 5
_PARAMS = SamplingParams(max_tokens=None)
_EOS_IDS = frozenset({_EOS})


class Stalled(RuntimeError):
    """The policy did nothing although requests are unfinished and nothing else will happen."""


@dataclass(frozen=True)
class Sample:
    """The state after one iteration: `[start, end)` seconds, running and waiting requests, blocks by kind."""

    start_s: float
    end_s: float
    scheduled: int
    running: int
    waiting: int
    kv_blocks: int
    hidden_blocks: int


@dataclass
class Outcome:
    """A finished simulation: its requests, one sample per iteration, and the backlog when arrivals ended."""

    requests: list[Request]
    samples: list[Sample] = field(default_factory=list)
    backlog: int = 0
    makespan_s: float = 0.0


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
    on_plan: Callable[[Plan, float], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    is_decided: Callable[[int, int], bool] | None = None,
) -> Outcome:
    """Serve `arrivals` to the end.

    Args:
        arrivals: in order of time.
        policy: a fresh one; it learns while it runs.
        cost_model: gives each iteration's time.
        num_blocks: size of the cache pool.
        limits: of an iteration.
        slo: promise of every request; default 1 s and 1 s.
        block_size: tokens per block.
        max_model_len: longest context.
        on_plan: told of every plan and the time it was made.
        on_progress: told the number of requests that finished, now and then.
        is_decided: told how many requests missed and how many are left; True ends the simulation early.

    Raises:
        Stalled: the policy planned nothing while requests wait and none is still to arrive.
        ValueError: a request can never fit in the pool.
    """
    state = SchedulerState(BlockPool(num_blocks, block_size), limits)
    requests = [_request(i, a, slo or Slo(), max_model_len) for i, a in enumerate(arrivals)]
    for request, arrival in zip(requests, arrivals, strict=True):
        if not state.fits_alone(arrival.prompt_tokens + arrival.output_tokens):
            raise ValueError(f"{request.request_id} of {arrival} does not fit in {num_blocks} blocks of {block_size}")
    outcome = Outcome(requests)
    now, arrived, missed, finished = 0.0, 0, 0, 0
    while arrived < len(requests) or state.num_unfinished:
        while arrived < len(requests) and requests[arrived].arrival_s <= now:
            state.add(requests[arrived])
            arrived += 1
            if arrived == len(requests):
                outcome.backlog = state.num_unfinished
        plan = policy.schedule(state, now) if state.num_unfinished else Plan()
        if plan.is_empty:
            if arrived == len(requests):
                raise Stalled(f"nothing scheduled at {now:.3f} s, {state.num_unfinished} requests unfinished")
            now = max(now, requests[arrived].arrival_s)
            continue
        if on_plan is not None:
            on_plan(plan, now)
        spans = state.apply(plan, now)
        start, now = now, now + cost_model.step_s(step_load(plan, spans))
        for span in spans:
            if not span.samples:
                continue
            request = span.request
            is_last = len(request.output_token_ids) + 1 >= arrivals[request.order].output_tokens
            if state.commit(request, _EOS if is_last else _TOKEN, now) is not None:
                policy.finished(request, now)
                missed += not request.attained
                finished += 1
                if on_progress is not None and finished % 50 == 0:
                    on_progress(finished)
        by_kind = state.blocks_by_kind()
        outcome.samples.append(
            Sample(start, now, len(spans), len(state.running), len(state.waiting), by_kind["kv"], by_kind["hidden"])
        )
        if is_decided is not None and is_decided(missed, len(requests) - finished):
            break
    outcome.makespan_s = now
    return outcome


def _request(index: int, arrival: Arrival, slo: Slo, max_model_len: int) -> Request:
    assert arrival.prompt_tokens + arrival.output_tokens <= max_model_len
    return Request(
        request_id=f"r{index}",
        prompt_token_ids=range(arrival.prompt_tokens),
        params=_PARAMS,
        arrival_s=arrival.arrival_s,
        max_new_tokens=max_model_len - arrival.prompt_tokens,
        eos_token_ids=_EOS_IDS,
        slo=slo,
    )
