"""Arrays over the unfinished requests, kept up to date from plan to plan instead of gathered anew.

A waiting request does not change, so per plan only new arrivals and running requests are read; the rest is numpy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apt_jax.cache import CacheKind
from apt_jax.request import Request
from apt_jax.scheduling.problem import Bools, Floats, Ints
from apt_jax.scheduling.state import SchedulerState

_COLUMNS = (
    "since_s", "arrival_s", "ttft_slo_s", "tbt_slo_s", "tokens", "prompt_tokens", "uncomputed", "late_gaps", "started",
    "blocks_per_page",
)  # fmt: skip


@dataclass(frozen=True)
class Queue:
    """Columns of one queue in order of arrival; arrays are `[n]`, times in seconds.

    `since_s` is the last token or arrival; `tokens` are all known tokens; `uncomputed` those not cached yet;
    `late_gaps` counts gaps over the SLO; `started` is 1 once the first token is out; `blocks_per_page` is 0 for a
    waiting request.
    """

    requests: Sequence[Request]
    since_s: Floats
    arrival_s: Floats
    ttft_slo_s: Floats
    tbt_slo_s: Floats
    tokens: Ints
    prompt_tokens: Ints
    uncomputed: Ints
    late_gaps: Ints
    started: Bools
    blocks_per_page: Ints
    missed_first: Bools

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

    def pages(self, block_size: int) -> Ints:
        """Pages that all known tokens take."""
        return -(-self.tokens // block_size)

    def slo_s(self) -> Floats:
        """The promise for the next token: time to first token, or gap."""
        return np.where(self.started, self.tbt_slo_s, self.ttft_slo_s)


class Ledger:
    """Rows by arrival number. Rows of finished requests are dropped when the arrays are full."""

    def __init__(self, capacity: int = 1024):
        self._base = 0  # arrival number of row 0
        self._next = 0  # first arrival number never seen
        self._rows = np.zeros((capacity, len(_COLUMNS)))
        self._missed_first = np.zeros(capacity, np.bool_)
        self._recent: list[Request] = []

    def update(self, state: SchedulerState) -> tuple[Queue, Queue]:
        """Columns of the waiting and of the running requests."""
        waiting, running = state.waiting, state.running
        newest = max((q[-1].order for q in (waiting, running) if q), default=-1)
        if newest - self._base >= len(self._rows):
            self._make_room(min(q[0].order for q in (waiting, running) if q), newest)
        fresh: list[Request] = []
        for request in reversed(waiting):
            if request.order < self._next:
                break
            fresh.append(request)
        # a request preempted by the last plans may have had a token committed since
        self._write([*fresh, *self._recent, *running])
        self._recent = list(running)
        self._next = max(self._next, newest + 1)
        return self._queue(waiting), self._queue(running)

    def _queue(self, requests: list[Request]) -> Queue:
        index = np.fromiter([r.order for r in requests], np.int64, len(requests)) - self._base
        rows = self._rows[index]
        whole: NDArray[np.int64] = rows[:, 4:].astype(np.int64)
        return Queue(
            requests, *(rows[:, k] for k in range(4)), *(whole[:, k] for k in range(4)),
            started=whole[:, 4] > 0, blocks_per_page=whole[:, 5], missed_first=self._missed_first[index],
        )  # fmt: skip

    def _write(self, requests: Iterable[Request]) -> None:
        rows, base = self._rows, self._base
        kept = [r for r in requests if r.order >= base]
        if not kept:
            return
        index = [r.order - base for r in kept]
        rows[index] = [_row(r) for r in kept]
        self._missed_first[index] = [
            r.first_token_s is not None and r.first_token_s - r.arrival_s > r.slo.ttft_s for r in kept
        ]

    def _make_room(self, oldest: int, newest: int) -> None:
        keep = slice(oldest - self._base, None)
        size = max(len(self._rows), 2 * (newest - oldest + 1))
        rows, missed = np.zeros((size, len(_COLUMNS))), np.zeros(size, np.bool_)
        old, old_missed = self._rows[keep], self._missed_first[keep]
        rows[: len(old)], missed[: len(old)] = old, old_missed
        self._rows, self._missed_first, self._base = rows, missed, oldest


def _row(r: Request) -> tuple[float, ...]:
    since = r.arrival_s if r.last_token_s is None else r.last_token_s
    tokens = len(r.prompt_token_ids) + len(r.output_token_ids) + r.num_inflight_tokens
    per_page = 0 if r.table is None else r.table.kind.blocks_per_page
    return (
        since, r.arrival_s, r.slo.ttft_s, r.slo.tbt_s, tokens, len(r.prompt_token_ids), tokens - r.num_computed_tokens,
        r.num_late_gaps, r.first_token_s is not None, per_page,
    )  # fmt: skip


def kind_of(blocks_per_page: int) -> CacheKind:
    """The kind with that many blocks per page."""
    return CacheKind.KV if blocks_per_page == 2 else CacheKind.HIDDEN
