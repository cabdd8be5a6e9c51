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
        self._paused = np.zeros((capacity, 6))  # what a waiting request looked like when it last ran
        self._ran: list[Request] = []

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
            self._paused[[r.order - self._base for r in paused]] = np.array(_dynamic(paused)).T
        self._ran = list(running)
        self._next = max(self._next, newest + 1)
        index_w, index_r = self._index(waiting), self._index(running)
        tables = [r.table for r in running]
        held = np.array([len(t.first) for t in tables], np.int64)  # type: ignore[union-attr]
        per_page = np.array([2 if t.second else 1 for t in tables], np.int64)  # type: ignore[union-attr]
        none = np.zeros(len(waiting), np.int64)
        return (
            self._queue(waiting, self._static[index_w], self._paused[index_w].T, none, none),
            self._queue(running, self._static[index_r], np.array(_dynamic(running)), held, per_page),
        )

    def _queue(self, requests: list[Request], static: Floats, dynamic: Floats, held: Ints, per_page: Ints) -> Queue:
        whole = dynamic[1:].astype(np.int64)
        prompt, new = static[:, 3:].astype(np.int64).T
        return Queue(
            requests, dynamic[0], static[:, 0], static[:, 1], static[:, 2], prompt, new, whole[0], whole[1], whole[2],
            whole[3] > 0, whole[4] > 0, held, per_page,
        )  # fmt: skip

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


def _newer(queue: list[Request], order: int) -> list[Request]:
    """Requests from the end of `queue` that arrived as number `order` or later."""
    found = []
    for request in reversed(queue):
        if request.order < order:
            break
        found.append(request)
    return found


def _dynamic(requests: list[Request]) -> list[list[float]]:
    """Six columns: since, tokens, uncomputed, late gaps, started, missed first token."""
    tokens: list[float] = [len(r.prompt_token_ids) + len(r.output_token_ids) + r.num_inflight_tokens for r in requests]
    return [
        [r.arrival_s if r.last_token_s is None else r.last_token_s for r in requests],
        tokens,
        [t - r.num_computed_tokens for t, r in zip(tokens, requests, strict=True)],
        [r.num_late_gaps for r in requests],
        [r.first_token_s is not None for r in requests],
        [r.first_token_s is not None and r.first_token_s - r.arrival_s > r.slo.ttft_s for r in requests],
    ]


def kind_of(blocks_per_page: int) -> CacheKind:
    """The kind with that many blocks per page."""
    return CacheKind.KV if blocks_per_page == 2 else CacheKind.HIDDEN
