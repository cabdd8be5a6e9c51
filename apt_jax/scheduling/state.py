"""What a policy sees and a plan changes: queues, block pool, limits. The engine and the simulator share it."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from apt_jax.cache import KINDS, MODE_KINDS, BlockPool, BlockTable, CacheKind, CacheMode, blocks_for
from apt_jax.request import FinishReason, Request, Status
from apt_jax.scheduling.plan import Plan, Scheduled
from apt_jax.scheduling.plan_log import PlanLog
from apt_jax.scheduling.progress import Progress, progress_of


@dataclass(frozen=True)
class Limits:
    """What an iteration may use.

    `watermark_blocks` stay free when a request is admitted, so that those running can grow for a while.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    cache_mode: CacheMode = "hybrid"
    watermark_blocks: int = 0

    @property
    def kinds(self) -> tuple[CacheKind, ...]:
        """Cache kinds that a request may be admitted with, the preferred one first."""
        return MODE_KINDS[self.cache_mode]


class Span(NamedTuple):
    """A scheduled entry with what the device must do: compute tokens `start .. start+num_tokens` of the request.

    `samples` says whether the token after them is to be sampled.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool


class SchedulerState:
    """Waiting and running requests, in order of arrival, and the blocks they hold."""

    def __init__(self, pool: BlockPool, limits: Limits):
        self.pool = pool
        self.limits = limits
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.plans = PlanLog()
        self._next_order = 0

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self.waiting) + len(self.running)

    def blocks_needed(self, request: Request, kind: CacheKind, extra_tokens: int = 0) -> int:
        """Blocks that all its known tokens (and `extra_tokens`) take as `kind`."""
        return blocks_for(request.num_tokens + extra_tokens, kind, self.pool.block_size)

    def blocks_to_grow(self, request: Request) -> int:
        """Blocks that a running request lacks to compute all its known tokens."""
        table = request.table
        assert table is not None
        pages = -(-request.num_tokens // self.pool.block_size) - table.num_pages
        return pages * table.kind.blocks_per_page if pages > 0 else 0

    def fits_alone(self, total_tokens: int) -> bool:
        """Whether a request of `total_tokens` fits in the whole pool, in some kind that the mode allows."""
        return any(
            blocks_for(total_tokens, kind, self.pool.block_size) <= self.pool.num_blocks for kind in self.limits.kinds
        )

    def add(self, request: Request) -> None:
        """Put a new request at the end of the waiting queue."""
        assert request.status is Status.WAITING and request.order < 0
        request.order = self._next_order
        self._next_order += 1
        self.waiting.append(request)

    def running_progress(self) -> Progress:
        """Columns of the running requests, in their order."""
        return progress_of(self.running)

    def apply(self, plan: Plan, now: float) -> list[Span]:
        """Carry out a plan: queues, blocks and token counts change; returns the device's work in plan order.

        Raises:
            OutOfBlocks: the policy planned past the pool.
        """
        self._clear(plan, now)
        return [self._start(entry, now) for entry in plan.scheduled]

    def commit(self, request: Request, token_id: int, now: float) -> FinishReason | None:
        """Record a sampled token that the host has read; finishes the request if it is its last.

        Tokens of a request that has finished meanwhile are dropped. Stop strings are the engine's to judge.
        """
        if request.status is Status.FINISHED:
            return request.finish_reason
        request.num_inflight_tokens -= 1
        output, params, last_token_s = request.output_token_ids, request.params, request.last_token_s
        output.append(token_id)
        if last_token_s is None:
            request.first_token_s = now
        else:
            gap_s = now - last_token_s
            request.gaps_s.append(gap_s)
            if gap_s > request.slo.tbt_s:
                request.num_late_gaps += 1
            if gap_s > request.slo.stall_limit_s:
                request.num_stalls += 1
        request.last_token_s = now
        generated = len(output)
        if generated >= params.min_tokens:
            if params.stop_token_ids and token_id in params.stop_token_ids:
                request.stop_reason = token_id
                self.finish(request, FinishReason.STOP)
                return request.finish_reason
            if token_id in request.eos_token_ids and not params.ignore_eos:
                self.finish(request, FinishReason.STOP)
                return request.finish_reason
        if generated >= request.max_new_tokens:
            self.finish(request, FinishReason.LENGTH)
        return request.finish_reason

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request for any reason and give its blocks back at once; doing it again changes nothing."""
        if request.status is Status.FINISHED:
            return
        _remove(self.running if request.status is Status.RUNNING else self.waiting, request)
        self._release(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.num_inflight_tokens = 0

    def blocks_by_kind(self) -> dict[str, int]:
        """Blocks held as each kind, by its name, and those "free"."""
        held = {kind.spec.name: self.pool.num_held(kind) for kind in KINDS}
        return {**held, "free": self.pool.num_free}

    def check(self) -> None:
        """Assert that no block is lost or shared and that queues and statuses agree."""
        self.pool.check(self._tables(self.running))
        assert all(r.status is Status.RUNNING and r.table is not None for r in self.running)
        assert all(r.status is Status.WAITING and r.table is None for r in self.waiting)
        for queue in (self.running, self.waiting):
            orders = [r.order for r in queue]
            assert orders == sorted(set(orders)), "a queue is out of order or holds a request twice"

    def _clear(self, plan: Plan, now: float) -> None:
        """Carry out all of a plan but what it schedules."""
        self.plans.record(plan, now)
        for abandoned in plan.abandoned:
            self.finish(abandoned.request, FinishReason.ABANDONED)
        for preempted in plan.preempted:
            self._preempt(preempted.request)
        for converted in plan.converted:
            table = converted.request.table
            assert table is not None
            self.pool.convert(table)
            converted.request.num_conversions += 1
            converted.request.cache_history.append(table.kind)

    def _start(self, entry: Scheduled, now: float) -> Span:
        request, num_tokens, kind, _ = entry
        prompt_tokens = len(request.prompt_token_ids)
        generated = len(request.output_token_ids) + request.num_inflight_tokens
        start, known_tokens, table = request.num_computed_tokens, prompt_tokens + generated, request.table
        end = start + num_tokens
        assert start < end <= known_tokens, (request.request_id, num_tokens)
        if table is None:
            self._admit(request, kind, known_tokens, now)
        else:
            assert table.kind is kind
            if known_tokens > table.num_pages * self.pool.block_size:
                self.pool.grow(table, known_tokens)
        request.num_computed_tokens = end
        samples = end == known_tokens
        if samples:
            assert generated < request.max_new_tokens, f"{request.request_id} has all its {generated} tokens"
            request.num_inflight_tokens += 1
        return Span(request, start, num_tokens, samples)

    def _admit(self, request: Request, kind: CacheKind, tokens: int, now: float) -> None:
        assert request.status is Status.WAITING
        request.table = BlockTable(kind)
        self.pool.grow(request.table, tokens)
        request.cache_history.append(kind)
        _remove(self.waiting, request)
        insort(self.running, request, key=_order)
        request.status = Status.RUNNING
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now

    def _preempt(self, request: Request) -> None:
        assert request.status is Status.RUNNING
        _remove(self.running, request)
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = Status.WAITING
        insort(self.waiting, request, key=_order)

    def _release(self, request: Request) -> None:
        if request.table is not None:
            self.pool.release(request.table)
            request.table = None

    @staticmethod
    def _tables(requests: Iterable[Request]) -> list[BlockTable]:
        return [r.table for r in requests if r.table is not None]


def _order(request: Request) -> int:
    return request.order


def _remove(queue: list[Request], request: Request) -> None:
    index = bisect_left(queue, request.order, key=_order)
    assert index < len(queue) and queue[index] is request, f"{request.request_id} is not in its queue"
    del queue[index]
