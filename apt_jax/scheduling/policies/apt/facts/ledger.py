"""Arrays over the unfinished requests, kept up to date from plan to plan instead of gathered again.

A waiting request does not change, so per plan only new arrivals and running requests are read; the rest is numpy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apt_jax.cache import KINDS, per_kind
from apt_jax.request import Request, Status
from apt_jax.scheduling.plan import Reason, Scheduled
from apt_jax.scheduling.policies.apt.facts.queue import Queue
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints
from apt_jax.scheduling.progress import Progress, progress_of
from apt_jax.scheduling.state import SchedulerState

_BLOCKS_PER_PAGE = np.array(per_kind(lambda kind: kind.blocks_per_page), np.int64)


_LATE, _IN_LANE = 1, 2  # standings


class _Lasting(NamedTuple):
    """Columns of the running requests that change only when one comes, ends or gets another standing."""

    arrival_s: Floats
    ttft_slo_s: Floats
    tbt_slo_s: Floats
    stall_slo_s: Floats
    priority: Ints
    given_up: Bools
    in_lane: Bools


class Ledger:
    """Columns by arrival number. Those of finished requests are dropped when the table is full."""

    def __init__(self, capacity: int = 1024):
        self._base = 0  # arrival number of column 0
        self._next = 0  # first arrival number never seen
        # of each request, and, as far as it changes, what it looked like when it last ran
        self._times = np.zeros((5, capacity))  # arrival, the three SLOs, since
        # prompt, most new tokens, priority, standing (0 in time), tokens, uncomputed tokens, late gaps, started, missed
        self._counts = np.zeros((9, capacity), np.int64)
        self._has_new_standings = False  # since the queues' columns were gathered
        self._ran: list[Request] = []
        self._ran_orders = self._waiting_orders = np.zeros(0, np.int64)
        self._ran_kind = np.zeros(0, np.int64)
        self._decodes: list[Scheduled] = []
        self._waiting = self._waiting_queue([])
        self._lasting = self._lasting_of(self._ran_orders)
        self._running = self._running_queue(progress_of([]))

    def update(self, state: SchedulerState) -> tuple[Queue, Queue]:
        """Columns of the waiting and of the running requests."""
        waiting, running = state.waiting, state.running
        newest = max((q[-1].order for q in (waiting, running) if q), default=-1)
        if newest - self._base >= self._times.shape[1]:
            self._make_room(min(q[0].order for q in (waiting, running) if q), newest)
        fresh = [r for q in (waiting, running) for r in _newer(q, self._next)] if newest >= self._next else []
        self._next = max(self._next, newest + 1)
        if fresh:
            self._enter(fresh)
        has_changed = running != self._ran
        stopped = [*self._ran, *fresh] if has_changed else fresh
        came = [r for r in stopped if r.table is None and r.status is Status.WAITING]
        if came:
            self._note_waiting(came)
        admitted = np.zeros(0, np.int64)
        if has_changed:
            orders = _orders(running)
            admitted = np.setdiff1d(orders, self._ran_orders, assume_unique=True)
            self._ran, self._ran_orders = list(running), orders
            self._ran_kind, self._decodes = np.zeros(0, np.int64), []
        if came or len(admitted) or len(waiting) != len(self._waiting):
            self._waiting_orders = _moved(self._waiting_orders, waiting, came, admitted)
            self._waiting = self._waiting_queue(list(waiting))
        elif self._has_new_standings:
            self._waiting = self._waiting_queue(self._waiting.requests)
        if has_changed or self._has_new_standings:
            self._lasting = self._lasting_of(self._ran_orders)
        self._has_new_standings = False
        self._running = self._running_queue(state.running_progress())
        return self._waiting, self._running

    def give_up(self, waiting: Bools, running: Bools) -> None:
        """Remember those of the last update's queues that are marked as late for good."""
        both = (self._waiting_orders, self._waiting, waiting), (self._ran_orders, self._running, running)
        for orders, queue, late in both:
            new = late & ~queue.given_up
            if new.any():
                self._counts[3, orders[new] - self._base] = _LATE
                self._has_new_standings = True

    def enter_lane(self, requests: Sequence[Request]) -> None:
        """Remember these of the last update's queues as in the lane, until they end or leave it."""
        if requests:
            column = _orders(requests) - self._base
            self._has_new_standings |= bool((self._counts[3, column] != _IN_LANE).any())
            self._counts[3, column] = _IN_LANE

    def leave_lane(self, requests: Sequence[Request]) -> None:
        """Remember these of the last update's queues as late only: they queue for the lane again."""
        if requests:
            self._counts[3, _orders(requests) - self._base] = _LATE
            self._has_new_standings = True

    def _enter(self, fresh: list[Request]) -> None:
        """Columns of requests that were never seen: what does not change."""
        column = _orders(fresh) - self._base
        slos = [(r.arrival_s, r.slo.ttft_s, r.slo.tbt_s, r.slo.stall_limit_s) for r in fresh]
        self._times[:4, column] = np.array(slos).T
        counts = [(len(r.prompt_token_ids), r.max_new_tokens, r.priority, 0) for r in fresh]
        self._counts[:4, column] = np.array(counts).T

    def _note_waiting(self, came: list[Request]) -> None:
        """Columns of requests that wait since the last update: what they looked like when they last ran."""
        column = _orders(came) - self._base
        arrival_s, ttft_slo_s = self._times[:2, column]
        now = progress_of(came)
        started = ~np.isnan(now.first_token_s)
        self._times[4, column] = np.where(started, now.last_token_s, arrival_s)
        missed = _missed(now, arrival_s, ttft_slo_s)
        self._counts[4:, column] = now.tokens, now.tokens - now.computed, now.late_gaps, started, missed

    def _waiting_queue(self, requests: Sequence[Request]) -> Queue:
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

    def _lasting_of(self, orders: Ints) -> _Lasting:
        column = orders - self._base
        arrival_s, ttft_slo_s, tbt_slo_s, stall_slo_s, _ = self._times[:, column]
        priority, standing = self._counts[2:4, column]
        return _Lasting(
            arrival_s, ttft_slo_s, tbt_slo_s, stall_slo_s, priority, standing >= _LATE, standing == _IN_LANE
        )

    def _running_queue(self, progress: Progress) -> Queue:
        arrival_s, ttft_slo_s, tbt_slo_s, stall_slo_s, priority, given_up, in_lane = self._lasting
        started = ~np.isnan(progress.first_token_s)
        tokens, kind = progress.tokens, progress.kind
        if len(self._ran_kind) != len(self._ran) or (kind != self._ran_kind).any():
            kinds = [KINDS[k] for k in kind.tolist()]
            self._decodes = [Scheduled(r, 1, k, Reason.DECODES) for r, k in zip(self._ran, kinds, strict=True)]
            self._ran_kind = kind
        return Queue(
            self._ran, np.where(started, progress.last_token_s, arrival_s), arrival_s, ttft_slo_s, tbt_slo_s,
            stall_slo_s, progress.prompt_tokens, progress.max_new_tokens, tokens, tokens - progress.computed,
            progress.late_gaps, started, _missed(progress, arrival_s, ttft_slo_s), given_up, in_lane, priority,
            progress.pages, kind, _BLOCKS_PER_PAGE[kind], self._decodes,
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
