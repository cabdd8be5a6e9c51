"""Figures of the last minute for the dashboard: attainment, latencies, batch sizes."""

import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from apt_jax.engine.interface import EngineFigures
from apt_jax.request import OFFLINE_SLO, FinishReason
from apt_jax.serve.runtime.observer import Observer, Stepped
from apt_jax.serve.runtime.samples import Sample

WINDOW_S = 60.0
MOST = 20_000  # latencies of each kind that percentiles are of, the newest ones; sums count everything
TICK_S = 0.02  # what happens within one is summed in one entry


class _Sums:
    """Sums over the last `WINDOW_S` seconds of as many figures as each entry has, in bounded memory.

    `join` makes one of two figures that are at least 0: their sum, unless it is another function.
    """

    def __init__(self, width: int, join: Callable[[float, float], float] = operator.add) -> None:
        self._entries: deque[tuple[float, list[float]]] = deque()  # since when, sums
        self._zero, self._join = (0,) * width, join

    def add(self, now: float, *amounts: float) -> None:
        """Count at the time `now`, which never goes back."""
        self._forget(now)
        if not self._entries or now >= self._entries[-1][0] + TICK_S:
            self._entries.append((now, list(self._zero)))
        sums = self._entries[-1][1]
        for number, amount in enumerate(amounts):
            sums[number] = self._join(sums[number], amount)

    def of(self, now: float) -> tuple[float, ...]:
        """The sums at the time `now`."""
        self._forget(now)
        columns = zip(self._zero, *(sums for _, sums in self._entries), strict=True)
        return tuple(reduce(self._join, column) for column in columns)

    def _forget(self, now: float) -> None:
        while self._entries and self._entries[0][0] < now - WINDOW_S:
            self._entries.popleft()


class Recent(Observer):
    """Keeps what happened in the last `WINDOW_S` seconds. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # requests; of them, those that attained their SLO strictly, as the paper reads it, refused or abandoned ones
        self._ended = _Sums(4)
        self._tokens = _Sums(2)  # generated, and those of requests that ended and were kept strictly
        self._longest_gap = _Sums(1, max)
        self._batches = _Sums(2)  # steps, requests in them
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=MOST)
        self._gaps: deque[tuple[float, float]] = deque(maxlen=MOST)

    def stepped(self, figures: EngineFigures, step: Stepped) -> None:
        """Take in a step's plan."""
        with self._lock:
            self._batches.add(time.monotonic(), 1, len(figures.plan.scheduled))

    def brought(self, step: Stepped) -> None:
        """Take in a step's outputs."""
        now = time.monotonic()
        tokens = kept_tokens = 0
        longest_gap_s = 0.0
        with self._lock:
            for output in step.outputs:
                request = output.request
                tokens += len(output.token_ids)
                if output.token_ids and request.gaps_s:
                    self._gaps.append((now, request.gaps_s[-1]))
                    longest_gap_s = max(longest_gap_s, request.gaps_s[-1])
                elif output.token_ids and request.ttft_s is not None:
                    self._ttfts.append((now, request.ttft_s))
                if step.counts(output) and request.slo != OFFLINE_SLO:  # else nobody was promised anything
                    is_kept = request.attained_strictly
                    abandoned = output.finish_reason is FinishReason.ABANDONED
                    self._ended.add(now, 1, is_kept, request.attained, abandoned)
                    kept_tokens += len(request.output_token_ids) if is_kept else 0
            if tokens or kept_tokens:
                self._tokens.add(now, tokens, kept_tokens)
            if longest_gap_s:
                self._longest_gap.add(now, longest_gap_s)

    def lost(self, samples: Sequence[Sample]) -> None:
        """They missed their SLO."""
        with self._lock:
            self._ended.add(time.monotonic(), len(samples), 0, 0, 0)

    def refused(self) -> None:
        """A request was refused for lack of room or time."""
        with self._lock:
            self._ended.add(time.monotonic(), 1, 0, 0, 1)

    def figures(self) -> dict[str, Any]:
        """The window's figures; None where nothing happened."""
        now = time.monotonic()
        with self._lock:
            ended, strictly, attained, turned_away = self._ended.of(now)
            tokens, kept_tokens = self._tokens.of(now)
            (longest_gap_s,) = self._longest_gap.of(now)
            steps, in_steps = self._batches.of(now)
            ttfts, gaps = (
                [value for at, value in entries if at >= now - WINDOW_S] for entries in (self._ttfts, self._gaps)
            )
        return {
            "window_s": WINDOW_S,
            "requests": ended,
            "strict_attainment": strictly / ended if ended else None,
            "attainment": attained / ended if ended else None,
            "turned_away": turned_away / ended if ended else None,
            "longest_gap_ms": round(1000 * longest_gap_s, 3) if gaps else None,
            "tokens_per_s": tokens / WINDOW_S,
            "kept_tokens_per_s": kept_tokens / WINDOW_S,
            "ttft_ms": _percentiles(ttfts),
            "tbt_ms": _percentiles(gaps),
            "batch_requests": in_steps / steps if steps else None,
        }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ranked = sorted(seconds)
    return {f"p{p}": round(1000 * ranked[len(ranked) * p // 100], 3) for p in (50, 90, 99)}
