"""Arrays over the unfinished requests, kept up to date from plan to plan instead of gathered anew.

A waiting request does not change, so per plan only new arrivals and running requests are read; the rest is numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.request import Request
from apt_jax.scheduling.problem import Bools, Floats, Ints
from apt_jax.scheduling.state import SchedulerState


@dataclass(frozen=True)
class Queue:
    """Columns of one queue in order of arrival; arrays are `[n]`, times in seconds.

    `since_s` is the last token or arrival; `tokens` are all known tokens; `uncomputed` those not cached yet;
    `late_gaps` counts gaps over the SLO; `started` says that the first token is out, `missed_first` that it was late;
    `pages_held` and `blocks_per_page` are 0 for a waiting request.
    """

    requests: Sequence[Request]
    since_s: Floats
    arrival_s: Floats
    ttft_slo_s: Floats
    tbt_slo_s: Floats
    prompt_tokens: Ints
    max_new_tokens: Ints
    tokens: Ints
    uncomputed: Ints
    late_gaps: Ints
    started: Bools
    missed_first: Bools
    pages_held: Ints
    blocks_per_page: Ints

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

    def slo_s(self) -> Floats:
        """The promise for the next token: time to first token, or gap."""
        return np.where(self.started, self.tbt_slo_s, self.ttft_slo_s)


class Ledger:
    """Rows by arrival number. Rows of finished requests are dropped when the table is full."""

    def __init__(self, capacity: int = 1024):
        self._base = 0  # arrival number of row 0
        self._next = 0  # first arrival number never seen
        self._static = np.zeros((capacity, 5))  # arrival, both SLOs, prompt, most new tokens
        self._paused = np.zeros((capacity, 8))  # what a waiting request looked like when it last ran
        self._ran: list[Request] = []
        self._static_r = np.zeros((0, 5))
        self._waiting = _queue([], self._static_r, np.zeros((0, 8)))

    def update(self, state: SchedulerState) -> tuple[Queue, Queue]:
        """Columns of the waiting and of the running requests."""
        waiting, running = state.waiting, state.running
        newest = max((q[-1].order for q in (waiting, running) if q), default=-1)
        if newest - self._base >= len(self._static):
            self._make_room(min(q[0].order for q in (waiting, running) if q), newest)
        fresh = [r for q in (waiting, running) for r in _newer(q, self._next)]
        paused = [r for r in (*self._ran, *fresh) if r.table is None and r.order >= self._base]
        if fresh:
            self._static[[r.order - self._base for r in fresh]] = [
                (r.arrival_s, r.slo.ttft_s, r.slo.tbt_s, len(r.prompt_token_ids), r.max_new_tokens) for r in fresh
            ]
        if paused:
            self._paused[[r.order - self._base for r in paused]] = _rows(paused)
        self._next = max(self._next, newest + 1)
        if fresh or paused or waiting != self._waiting.requests:
            index = self._index(waiting)
            self._waiting = _queue(list(waiting), self._static[index], self._paused[index])
        if running != self._ran:
            self._ran, self._static_r = list(running), self._static[self._index(running)]
        rows = np.array(_rows(running), np.float64).reshape(-1, 8)
        return self._waiting, _queue(self._ran, self._static_r, rows)

    def _index(self, requests: list[Request]) -> Ints:
        return np.array([r.order for r in requests], np.int64) - self._base

    def _make_room(self, oldest: int, newest: int) -> None:
        size = max(len(self._static), 2 * (newest - oldest + 1))
        for name in ("_static", "_paused"):
            old = getattr(self, name)[oldest - self._base :]
            table = np.zeros((size, old.shape[1]))
            table[: len(old)] = old[:size]
            setattr(self, name, table)
        self._base = oldest


def _queue(requests: list[Request], static: Floats, rows: Floats) -> Queue:
    """Columns from the fixed `[n, 5]` and the changing `[n, 8]` table."""
    whole = rows[:, 1:].T.astype(np.int64)
    prompt, new = static[:, 3:].T.astype(np.int64)
    return Queue(
        requests, rows[:, 0], static[:, 0], static[:, 1], static[:, 2], prompt, new, whole[0], whole[1], whole[2],
        whole[3] > 0, whole[4] > 0, whole[5], whole[6],
    )  # fmt: skip


def _newer(queue: list[Request], order: int) -> list[Request]:
    """Requests from the end of `queue` that arrived as number `order` or later."""
    found = []
    for request in reversed(queue):
        if request.order < order:
            break
        found.append(request)
    return found


def _rows(requests: list[Request]) -> list[tuple[float, ...]]:
    """A row per request: since, tokens, uncomputed, late gaps, started, missed first token, pages, blocks per page."""
    rows: list[tuple[float, ...]] = []
    add = rows.append
    for r in requests:
        tokens = len(r.prompt_token_ids) + len(r.output_token_ids) + r.num_inflight_tokens
        first_s, table = r.first_token_s, r.table
        pages, per_page = (0, 0) if table is None else (len(table.first), 2 if table.second else 1)
        uncomputed = tokens - r.num_computed_tokens
        if first_s is None:
            add((r.arrival_s, tokens, uncomputed, r.num_late_gaps, 0, 0, pages, per_page))
        else:
            missed = first_s - r.arrival_s > r.slo.ttft_s
            add((r.last_token_s, tokens, uncomputed, r.num_late_gaps, 1, missed, pages, per_page))  # type: ignore[arg-type]
    return rows


def kind_of(blocks_per_page: int) -> CacheKind:
    """The kind with that many blocks per page."""
    return CacheKind.KV if blocks_per_page == 2 else CacheKind.HIDDEN
