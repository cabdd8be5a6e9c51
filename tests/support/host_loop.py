"""The engine's loop without a device: schedule, apply, and commit a made-up token for each row that samples."""

import itertools
from collections import deque
from collections.abc import Callable, Sequence

from apt_jax.cache import BlockPool
from apt_jax.request import FinishReason, Request, SamplingParams
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.state import Limits, SchedulerState, Span, Written

EOS, STOP_ID, WORD = 2, 7, 11  # tokens that end a request, and one that does not
MODES = ("kv", "hidden", "hybrid")

_ids = itertools.count()


def make_request(prompt_tokens: int = 4, max_new_tokens: int = 8, *, arrival_s: float = 0.0, **params) -> Request:
    """A waiting request whose prompt ids are all different, starting at 100."""
    return Request(
        request_id=f"r{next(_ids)}",
        prompt_token_ids=list(range(100, 100 + prompt_tokens)),
        params=SamplingParams(**{"stop_token_ids": [STOP_ID], "max_tokens": max_new_tokens, **params}),
        arrival_s=arrival_s,
        max_new_tokens=max_new_tokens,
        eos_token_ids=frozenset({EOS}),
    )


def make_state(
    num_blocks: int,
    *,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    cache_mode: str = "hybrid",
    watermark_blocks: int = 0,
    pool: type[BlockPool] = BlockPool,
) -> SchedulerState:
    limits = Limits(max_num_seqs, max_num_batched_tokens, cache_mode, watermark_blocks)  # type: ignore[arg-type]
    return SchedulerState(pool(num_blocks, block_size), limits)


def fits(state: SchedulerState, request: Request) -> bool:
    """The engine's test on admission: the last token is never cached."""
    return state.fits_alone(request.num_prompt_tokens + request.max_new_tokens - 1)


class HostLoop:
    """Runs a policy over a state; with `depth` 1 an iteration is committed after the next one was planned."""

    def __init__(
        self,
        state: SchedulerState,
        policy: str = "fcfs",
        *,
        depth: int = 0,
        next_token: Callable[[Request], int] = lambda request: WORD,
        started: Callable[[Plan, list[Span]], None] = lambda plan, spans: None,
    ):
        self.state = state
        self.policy = make_policy(policy)
        self.depth = depth
        self.next_token = next_token
        self.started = started  # called with every plan that was applied, before anything is committed
        self.now = 0.0
        self._inflight: deque[tuple[list[Request], Sequence[Written]]] = deque()

    @property
    def is_idle(self) -> bool:
        return not self._inflight and self.state.num_unfinished == 0

    def step(self) -> Plan:
        plan = self.policy.schedule(self.state, self.now)
        self.run(plan)
        return plan

    def run(self, plan: Plan) -> None:
        spans = self.state.apply(plan, self.now)
        self.started(plan, spans)
        if spans:
            self._inflight.append(([span.request for span in spans if span.samples], self.state.written(spans)))
        while len(self._inflight) > (self.depth if plan.scheduled else 0):
            self.commit()

    def commit(self) -> None:
        """Read the oldest iteration in flight, if any."""
        if not self._inflight:
            return
        self.now += 0.25
        sampled, written = self._inflight.popleft()
        self.state.keep(written)
        for request in sampled:
            token = self.next_token(request)
            reason = self.state.commit(request, token, self.now)
            assert reason is request.finish_reason

    def drain(self, limit: int = 5000) -> list[Plan]:
        """Step until nothing is left; a loop that does not end, or a step that does nothing, fails."""
        plans = []
        while not self.is_idle:
            waits_for_device = bool(self._inflight)
            plans.append(self.step())
            assert plans[-1].scheduled or plans[-1].preempted or waits_for_device, "an empty plan while requests wait"
            assert len(plans) < limit, f"{self.state.num_unfinished} requests unfinished after {limit} iterations"
        return plans


def finish_any(state: SchedulerState, request: Request, reason: FinishReason = FinishReason.ABORT) -> None:
    """Finish, and check that the request holds nothing and that doing it again changes nothing."""
    first = request.finish_reason or reason
    state.finish(request, reason)
    ended = (request.finish_reason, request.status, request.table, state.pool.num_free)
    state.finish(request, FinishReason.ERROR)
    assert ended == (first, request.status, None, state.pool.num_free)
    assert request.finish_reason is first and request.num_inflight_tokens == 0
