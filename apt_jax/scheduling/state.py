"""What a policy sees and a plan changes: queues, block pool, limits. The engine and the simulator share it."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from apt_jax.cache import KINDS, MODE_KINDS, BlockPool, BlockTable, CacheKind, CacheMode, OutOfBlocks, blocks_for
from apt_jax.request import FinishReason, Request, Status
from apt_jax.scheduling.cached_prefixes import CachedPrefixes
from apt_jax.scheduling.host_tier import HostPage, Moves
from apt_jax.scheduling.plan import Fetched, Plan, Scheduled
from apt_jax.scheduling.plan_log import PlanLog
from apt_jax.scheduling.progress import Progress, progress_of

MOST_FETCHED_BLOCKS = 64  # beside one iteration: the device keeps a second copy of each until the iteration has ended


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


class Written(NamedTuple):
    """Pages that an iteration fills: the first `num_pages` of `table`, which is what `request` held then."""

    request: Request
    table: BlockTable
    num_pages: int


class SchedulerState(CachedPrefixes):
    """Waiting and running requests, in order of arrival, and the blocks they hold."""

    def __init__(self, pool: BlockPool, limits: Limits):
        super().__init__(pool)
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

    def kinds_to_admit(self, request: Request) -> Sequence[CacheKind]:
        """Kinds of the cache mode, those first as which more of a waiting request is cached, else in their order."""
        kinds = self.limits.kinds
        if self.prefixes is None or len(kinds) == 1:
            return kinds
        return sorted(kinds, key=lambda kind: -self.cached_tokens(request, kind))

    def tokens_to_compute(self, request: Request, kind: CacheKind) -> int:
        """Tokens still to be run through the model; of a waiting request, if it is admitted as `kind`."""
        if self.prefixes is None or request.table is not None:
            return request.num_uncomputed_tokens
        return request.num_uncomputed_tokens - self.cached_tokens(request, kind)

    def blocks_to_admit(self, request: Request, kind: CacheKind, *, preempts: bool = False) -> int:
        """Free blocks that admitting a waiting request as `kind` takes.

        Cached pages that others hold cost nothing, idle ones do, since they count as free. In a plan that `preempts`
        all pages count: those held may be given back just before.
        """
        blocks = self.blocks_needed(request, kind)
        if self.prefixes is None or preempts:
            return blocks
        return blocks - self.held_pages(request, kind) * kind.blocks_per_page

    def blocks_given_back(self, request: Request, gone: dict[int, int]) -> int:
        """Blocks that preempting a running request frees, after those of one plan that `gone`, empty at first, counts.

        A shared block is free once its last holder is preempted.
        """
        assert request.table is not None
        return request.table.num_blocks if self.prefixes is None else self.prefixes.given_back(request.table, gone)

    def shared_blocks(self, request: Request) -> int:
        """Blocks of a running request that others hold too; if it is converted, it needs as many more."""
        assert request.table is not None
        return 0 if self.prefixes is None else self.prefixes.shared_blocks(request.table)

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
        spans = [self._start(entry, now) for entry in plan.scheduled]
        self._fetch(plan.fetched)
        return spans

    def take_moves(self) -> Moves:
        """Copies between device and host memory of the plan just applied: before anything else of it, and beside it."""
        host = None if self.prefixes is None else self.prefixes.host
        return Moves() if host is None else host.take_moves()

    def forget_saved(self, moves: Moves) -> None:
        """Copies to host memory were not made: their pages are lost."""
        assert self.prefixes is not None
        self.prefixes.forget_slots([slot for _, slot in moves.saved])

    def forget_restored(self, moves: Moves, spans: Sequence[Span]) -> list[Span]:
        """Copies from host memory were not made: who was to begin with them waits again and computes them.

        Returns:
            What is left of `spans`, of the plan just applied.
        """
        assert self.prefixes is not None
        lost, kept = {block for _, block in moves.restored}, []
        for span in spans:
            table = span.request.table
            assert table is not None
            if lost.isdisjoint(block for blocks in table.blocks for block in blocks):
                kept.append(span)
                continue
            span.request.num_inflight_tokens -= span.samples
            self.prefixes.forget(table)
            self._preempt(span.request)
        return kept

    def forget_fetched(self, moves: Moves) -> None:
        """Copies beside the iteration were not made: their pages are lost."""
        assert self.prefixes is not None
        self.prefixes.lose(block for _, block in moves.fetched)

    def written(self, spans: Sequence[Span]) -> tuple[Written, ...]:
        """What `keep` is to be given once the iteration of `spans`, just applied, has been committed."""
        if self.prefixes is None:
            return ()
        size, found = self.pool.block_size, []
        for request, start, num_tokens, _ in spans:
            table, pages = request.table, (start + num_tokens) // size
            assert table is not None
            if pages > table.num_listed and self._may_keep(request):
                found.append(Written(request, table, pages))
        return tuple(found)

    def keep(self, written: Sequence[Written]) -> None:
        """Enter pages of a committed iteration in the prefix cache. Before `commit`, which may give them back.

        Those of requests that no longer hold them are lost.
        """
        if self.prefixes is None:
            return
        for request, table, pages in written:
            if request.table is table and self._may_keep(request):
                self.prefixes.keep(request, pages)

    def forget_prefixes(self, request: Request | None = None) -> None:
        """Empty the prefix cache, or take the pages of one request out of it. Requests keep what they hold."""
        if self.prefixes is None:
            return
        if request is None:
            self.prefixes.clear()
        elif request.table is not None:
            self.prefixes.forget(request.table)

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
        if request.status is Status.RUNNING:
            _remove(self.running, request)
        else:
            self._leave_queue(request)
        self._release(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.num_inflight_tokens = 0
        request.page_keys.clear()
        request.page_hash = None

    def blocks_by_kind(self) -> dict[str, int]:
        """Blocks held as each kind, by its name, and those "free"."""
        held = {kind.spec.name: self.pool.num_held(kind) for kind in KINDS}
        return {**held, "free": self.pool.num_free}

    def host_figures(self) -> dict[str, int]:
        """Blocks in host memory, and copied there and back since the start; nothing without host memory."""
        host = None if self.prefixes is None else self.prefixes.host
        if host is None:
            return {}
        return {"host_blocks": host.num_used, "host_saved": host.num_saved, "host_restored": host.num_restored}

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
        self.projections, self.num_projected_tokens = [], 0
        self.plans.record(plan, now)
        for abandoned in plan.abandoned:
            self.finish(abandoned.request, FinishReason.ABANDONED)
        for preempted in plan.preempted:
            self._preempt(preempted.request)
        if self.prefixes is not None:  # before anything takes blocks: what was found must still be there
            newcomers = [entry for entry in plan.scheduled if entry.request.table is None]
            requests = [entry.request for entry in newcomers]
            held = self._hold_pages_to_project(requests, [entry.kind for entry in newcomers])
            try:
                for entry in newcomers:
                    self._admit(entry.request, entry.kind, 0, now)
                self._project(requests, held)
            finally:
                self._let_go(held)
        for converted in plan.converted:
            table = converted.request.table
            assert table is not None
            self.projections.append(self.pool.convert(table))
            converted.request.num_conversions += 1
            converted.request.cache_history.append(table.kind)

    def _fetch(self, entries: Sequence[Fetched]) -> None:
        """Bring pages of waiting requests back into what the plan just applied leaves free."""
        if self.prefixes is None or not entries:
            return
        left, room = MOST_FETCHED_BLOCKS, self.pool.num_free
        for request, kind, _, _ in reversed(entries):  # what is there of them is not evicted for the rest
            assert request.status is Status.WAITING, f"{request.request_id} is fetched but does not wait"
            there = self._cached_pages(request, kind)
            self.prefixes.fetch(there, 0)
            room -= self.prefixes.idle_blocks(there)
        for request, kind, num_blocks, _ in entries:
            pages = self._cached_pages(request, kind)
            most = max(min(num_blocks, left, room), 0) // kind.blocks_per_page
            taken = min(most, sum(isinstance(page, HostPage) for page in pages)) * kind.blocks_per_page
            self.prefixes.fetch(pages, most)
            left, room = left - taken, room - taken

    def _start(self, entry: Scheduled, now: float) -> Span:
        request, num_tokens, kind, _ = entry
        prompt_tokens = len(request.prompt_token_ids)
        generated = len(request.output_token_ids) + request.num_inflight_tokens
        start, known_tokens, table = request.num_computed_tokens, prompt_tokens + generated, request.table
        end = start + num_tokens
        if self.prefixes is not None:
            end = min(end, known_tokens)  # a policy may not know that some are cached
            num_tokens = end - start
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
        try:
            if self.prefixes is not None:
                self._begin_with_cached(request)
            self.pool.grow(request.table, tokens)
        except OutOfBlocks:  # it waits on, without blocks
            self._release(request)
            request.num_computed_tokens = 0
            raise
        request.cache_history.append(kind)
        self._leave_queue(request)
        insort(self.running, request, key=_order)
        request.status = Status.RUNNING
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now

    def _leave_queue(self, request: Request) -> None:
        _remove(self.waiting, request)
        if self.prefixes is not None:
            self.prefixes.left(request)

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
