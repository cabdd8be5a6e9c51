"""Arrays over the unfinished requests, kept up to date from plan to plan instead of gathered again.

A waiting request does not change, so per plan only new arrivals and running requests are read; the rest is numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from apt_jax.cache import KINDS, per_kind
from apt_jax.request import Request, Status
from apt_jax.scheduling.plan import Reason, Scheduled
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints
from apt_jax.scheduling.progress import Progress, progress_of
from apt_jax.scheduling.state import SchedulerState

_BLOCKS_PER_PAGE = np.array(per_kind(lambda kind: kind.blocks_per_page), np.int64)


_LATE, _IN_LANE = 1, 2  # standings


@dataclass(frozen=True)
class Queue:
    """Columns of one queue in order of arrival; arrays are `[n]`, times in seconds.

    `since_s` is the last token or arrival; `tokens` are all known tokens; `uncomputed` those not cached yet;
    `late_gaps` counts gaps over the SLO; `started` says that the first token is out, `missed` that it was late or that
    a gap was longer than the stall limit; `given_up` that it was late once, which does not turn back; `in_lane` that it
    has entered the lane; `kind` is the `CacheKind.index`; this, `pages_held` and `blocks_per_page` are 0 for a waiting
    request; `decodes` are the entries with which running ones decode.
    """

    requests: Sequence[Request]
    since_s: Floats
    arrival_s: Floats
    ttft_slo_s: Floats
    tbt_slo_s: Floats
    stall_slo_s: Floats
    prompt_tokens: Ints
    max_new_tokens: Ints
    tokens: Ints
    uncomputed: Ints
    late_gaps: Ints
    started: Bools
    missed: Bools
    given_up: Bools
    in_lane: Bools
    priority: Ints
    pages_held: Ints
    kind: Ints
    blocks_per_page: Ints
    decodes: Sequence[Scheduled] = ()

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def generated(self) -> Ints:
        """Tokens generated so far."""
        return self.tokens - self.prompt_tokens

    @property
    def decoding(self) -> Bools:
        """Whether only the newest token is left to compute."""
        return (self.generated > 0) & (self.uncomputed == 1)

    @property
    def may_sample(self) -> Bools:
        """Whether it may generate more than what is generated or in flight."""
        return self.generated < self.max_new_tokens

    def pages(self, block_size: int) -> Ints:
        """Pages that all known tokens take."""
        return -(-self.tokens // block_size)

    @property
    def limit_s(self) -> Floats:
        """Seconds since the last token or arrival within which the next token is due: first token, or stall limit."""
        return np.where(self.started, self.stall_slo_s, self.ttft_slo_s)

    def slo_s(self) -> Floats:
        """The SLO of the next token: time to first token, or gap."""
        return np.where(self.started, self.tbt_slo_s, self.ttft_slo_s)


class Ledger:
    """Columns by arrival number. Those of finished requests are dropped when the table is full."""

    def __init__(self, capacity: int = 1024):
        self._base = 0  # arrival number of column 0
        self._next = 0  # first arrival number never seen
        # of each request, and, as far as it changes, what it looked like when it last ran
        self._times = np.zeros((5, capacity))  # arrival, the three SLOs, since
        # prompt, most new tokens, priority, standing (0 in time), tokens, uncomputed tokens, late gaps, started, missed
        self._counts = np.zeros((9, capacity), np.int64)
        self._ran: list[Request] = []
        self._ran_orders = self._waiting_orders = np.zeros(0, np.int64)
        self._ran_kind = np.zeros(0, np.int64)
        self._decodes: list[Scheduled] = []
        self._waiting = self._waiting_queue([])

    def update(self, state: SchedulerState) -> tuple[Queue, Queue]:
        """Columns of the waiting and of the running requests."""
        waiting, running = state.waiting, state.running
        newest = max((q[-1].order for q in (waiting, running) if q), default=-1)
        if newest - self._base >= self._times.shape[1]:
            self._make_room(min(q[0].order for q in (waiting, running) if q), newest)
        fresh = [r for q in (waiting, running) for r in _newer(q, self._next)]
        self._next = max(self._next, newest + 1)
        if fresh:
            column = _orders(fresh) - self._base
            slos = [(r.arrival_s, r.slo.ttft_s, r.slo.tbt_s, r.slo.stall_limit_s) for r in fresh]
            self._times[:4, column] = np.array(slos).T
            counts = [(len(r.prompt_token_ids), r.max_new_tokens, r.priority, 0) for r in fresh]
            self._counts[:4, column] = np.array(counts).T
        came = [r for r in (*self._ran, *fresh) if r.table is None and r.status is Status.WAITING]
        if came:
            column = _orders(came) - self._base
            arrival_s, ttft_slo_s = self._times[:2, column]
            now = progress_of(came)
            started = ~np.isnan(now.first_token_s)
            self._times[4, column] = np.where(started, now.last_token_s, arrival_s)
            missed = _missed(now, arrival_s, ttft_slo_s)
            self._counts[4:, column] = now.tokens, now.tokens - now.computed, now.late_gaps, started, missed
        admitted = np.zeros(0, np.int64)
        if running != self._ran:
            orders = _orders(running)
            admitted = np.setdiff1d(orders, self._ran_orders, assume_unique=True)
            self._ran, self._ran_orders = list(running), orders
            self._ran_kind, self._decodes = np.zeros(0, np.int64), []
        if came or len(admitted) or len(waiting) != len(self._waiting):
            self._waiting_orders = _moved(self._waiting_orders, waiting, came, admitted)
            self._waiting = self._waiting_queue(list(waiting))
        standing = self._counts[3, self._waiting_orders - self._base]
        self._waiting = replace(self._waiting, given_up=standing >= _LATE, in_lane=standing == _IN_LANE)
        return self._waiting, self._running_queue(state.running_progress())

    def give_up(self, waiting: Bools, running: Bools) -> None:
        """Remember those of the last update's queues that are marked as late for good."""
        for orders, late in ((self._waiting_orders, waiting), (self._ran_orders, running)):
            column = orders[late] - self._base
            self._counts[3, column] = np.maximum(self._counts[3, column], _LATE)

    def enter_lane(self, requests: Sequence[Request]) -> None:
        """Remember these of the last update's queues as in the lane until they end."""
        self._counts[3, _orders(requests) - self._base] = _IN_LANE

    def _waiting_queue(self, requests: list[Request]) -> Queue:
        column = self._waiting_orders - self._base
        arrival_s, ttft_slo_s, tbt_slo_s, stall_slo_s, since_s = self._times[:, column]
        prompt, most_new, priority, standing, *changing = self._counts[:, column]
        tokens, uncomputed, late_gaps, started, missed = changing
        nothing = np.zeros_like(tokens)
        return Queue(
            requests, since_s, arrival_s, ttft_slo_s, tbt_slo_s, stall_slo_s, prompt, most_new, tokens, uncomputed,
            late_gaps, started > 0, missed > 0, standing >= _LATE, standing == _IN_LANE, priority, nothing, nothing,
            nothing,
        )  # fmt: skip

    def _running_queue(self, progress: Progress) -> Queue:
        column = self._ran_orders - self._base
        arrival_s, ttft_slo_s, tbt_slo_s, stall_slo_s, _ = self._times[:, column]
        priority, standing = self._counts[2:4, column]
        started = ~np.isnan(progress.first_token_s)
        tokens, kind = progress.tokens, progress.kind
        if len(self._ran_kind) != len(self._ran) or (kind != self._ran_kind).any():
            kinds = [KINDS[k] for k in kind.tolist()]
            self._decodes = [Scheduled(r, 1, k, Reason.DECODES) for r, k in zip(self._ran, kinds, strict=True)]
            self._ran_kind = kind
        return Queue(
            self._ran, np.where(started, progress.last_token_s, arrival_s), arrival_s, ttft_slo_s, tbt_slo_s,
            stall_slo_s, progress.prompt_tokens, progress.max_new_tokens, tokens, tokens - progress.computed,
            progress.late_gaps, started, _missed(progress, arrival_s, ttft_slo_s), standing >= _LATE,
            standing == _IN_LANE, priority, progress.pages, kind, _BLOCKS_PER_PAGE[kind], self._decodes,
        )  # fmt: skip

    def _make_room(self, oldest: int, newest: int) -> None:
        size = max(self._times.shape[1], 2 * (newest - oldest + 1))
        for name in ("_times", "_counts"):
            old = getattr(self, name)[:, oldest - self._base :][:, :size]
            table = np.zeros((len(old), size), old.dtype)
            table[:, : old.shape[1]] = old
            setattr(self, name, table)
        self._base = oldest


def _missed(progress: Progress, arrival_s: Floats, ttft_slo_s: Floats) -> Bools:
    """Whether the first token was late, which NaN, before it, is not, or a gap was longer than the stall limit."""
    return np.asarray((progress.first_token_s - arrival_s > ttft_slo_s) | (progress.stalls > 0))


def _newer(queue: list[Request], order: int) -> list[Request]:
    """Requests from the end of `queue` that arrived as number `order` or later."""
    found = []
    for request in reversed(queue):
        if request.order < order:
            break
        found.append(request)
    return found


def _orders(requests: Sequence[Request]) -> Ints:
    return np.array([r.order for r in requests], np.int64)


def _moved(orders: Ints, waiting: list[Request], came: list[Request], admitted: Ints) -> Ints:
    """Arrival numbers of `waiting`, from those before, those that came and those that left to run."""
    if len(admitted):
        orders = orders[~np.isin(orders, admitted, assume_unique=True)]
    if came:
        new = np.sort(_orders(came))
        orders = np.insert(orders, np.searchsorted(orders, new), new)
    # every one that came is known, so a difference in number means that some ended while they waited
    return orders if len(orders) == len(waiting) else _orders(waiting)
