"""Figures of the last minute for the dashboard: attainment, latencies, batch sizes."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from apt_jax.engine.interface import EngineFigures
from apt_jax.serve.runtime.observer import Observer, Stepped

WINDOW_S = 60.0
MOST = 20_000  # entries of each kind


class Recent(Observer):
    """Keeps what happened in the last `WINDOW_S` seconds. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended: deque[tuple[float, bool]] = deque(maxlen=MOST)  # when, attained
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=MOST)
        self._gaps: deque[tuple[float, float]] = deque(maxlen=MOST)
        self._batches: deque[tuple[float, int]] = deque(maxlen=MOST)

    def stepped(self, figures: EngineFigures, step: Stepped) -> None:
        """Take in a step's plan."""
        with self._lock:
            self._batches.append((time.monotonic(), len(figures.plan.scheduled)))

    def brought(self, step: Stepped) -> None:
        """Take in a step's outputs."""
        now = time.monotonic()
        with self._lock:
            for output in step.outputs:
                request = output.request
                if output.token_ids and request.gaps_s:
                    self._gaps.append((now, request.gaps_s[-1]))
                elif output.token_ids and request.ttft_s is not None:
                    self._ttfts.append((now, request.ttft_s))
                if step.counts(output):
                    self._ended.append((now, request.attained))

    def refused(self) -> None:
        """A request was refused for lack of room or time."""
        with self._lock:
            self._ended.append((time.monotonic(), False))

    def figures(self) -> dict[str, Any]:
        """The window's figures; None where nothing happened."""
        since = time.monotonic() - WINDOW_S
        with self._lock:
            ended, ttfts, gaps, batches = (
                [value for at, value in entries if at >= since]
                for entries in (self._ended, self._ttfts, self._gaps, self._batches)
            )
        return {
            "window_s": WINDOW_S,
            "requests": len(ended),
            "attainment": sum(ended) / len(ended) if ended else None,
            "tokens_per_s": (len(ttfts) + len(gaps)) / WINDOW_S,
            "ttft_ms": _percentiles(ttfts),
            "tbt_ms": _percentiles(gaps),
            "batch_requests": sum(batches) / len(batches) if batches else None,
        }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ranked = sorted(seconds)
    return {f"p{p}": round(1000 * ranked[len(ranked) * p // 100], 3) for p in (50, 90, 99)}
