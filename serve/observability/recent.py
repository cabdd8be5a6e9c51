"""Figures of the last minute for the dashboard: attainment, latencies, batch sizes."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from apt_jax.engine.interface import EngineFigures
from apt_jax.serve.runtime.observer import Observer, Stepped

WINDOW_S = 60.0
MOST = 20_000  # latencies of each kind that percentiles are of, the newest ones; sums count everything
TICK_S = 0.02  # what happens within one is summed in one entry


class _Sums:
    """Sums over the last `WINDOW_S` seconds of as many figures as each entry has, in bounded memory."""

    def __init__(self, width: int) -> None:
        self._entries: deque[tuple[float, list[int]]] = deque()  # since when, sums
        self._zero = (0,) * width

    def add(self, now: float, *amounts: int) -> None:
        """Count at the time `now`, which never goes back."""
        self._forget(now)
        if not self._entries or now >= self._entries[-1][0] + TICK_S:
            self._entries.append((now, list(self._zero)))
        sums = self._entries[-1][1]
        for number, amount in enumerate(amounts):
            sums[number] += amount

    def of(self, now: float) -> tuple[int, ...]:
        """The sums at the time `now`."""
        self._forget(now)
        return tuple(map(sum, zip(self._zero, *(sums for _, sums in self._entries), strict=True)))

    def _forget(self, now: float) -> None:
        while self._entries and self._entries[0][0] < now - WINDOW_S:
            self._entries.popleft()


class Recent(Observer):
    """Keeps what happened in the last `WINDOW_S` seconds. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = _Sums(3)  # requests, those that attained their SLO strictly, and as the paper reads it
        self._tokens = _Sums(1)
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
        tokens = 0
        with self._lock:
            for output in step.outputs:
                request = output.request
                tokens += len(output.token_ids)
                if output.token_ids and request.gaps_s:
                    self._gaps.append((now, request.gaps_s[-1]))
                elif output.token_ids and request.ttft_s is not None:
                    self._ttfts.append((now, request.ttft_s))
                if step.counts(output):
                    self._ended.add(now, 1, request.attained_strictly, request.attained)
            if tokens:
                self._tokens.add(now, tokens)

    def refused(self) -> None:
        """A request was refused for lack of room or time."""
        with self._lock:
            self._ended.add(time.monotonic(), 1, 0, 0)

    def figures(self) -> dict[str, Any]:
        """The window's figures; None where nothing happened."""
        now = time.monotonic()
        with self._lock:
            ended, strictly, attained = self._ended.of(now)
            (tokens,) = self._tokens.of(now)
            steps, in_steps = self._batches.of(now)
            ttfts, gaps = (
                [value for at, value in entries if at >= now - WINDOW_S] for entries in (self._ttfts, self._gaps)
            )
        return {
            "window_s": WINDOW_S,
            "requests": ended,
            "strict_attainment": strictly / ended if ended else None,
            "attainment": attained / ended if ended else None,
            "tokens_per_s": tokens / WINDOW_S,
            "ttft_ms": _percentiles(ttfts),
            "tbt_ms": _percentiles(gaps),
            "batch_requests": in_steps / steps if steps else None,
        }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ranked = sorted(seconds)
    return {f"p{p}": round(1000 * ranked[len(ranked) * p // 100], 3) for p in (50, 90, 99)}
