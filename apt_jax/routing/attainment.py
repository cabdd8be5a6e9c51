"""How many requests ended lately, and how many kept their promise: what the autoscaler is told."""

from collections import deque

WINDOW_S = 30.0


class RecentAttainment:
    """Endings of the last `WINDOW_S` seconds. Times are of any clock that goes on.

    Args:
        enough: fewer endings than this, which is at least 1, tell nothing.
    """

    def __init__(self, enough: int):
        self._enough = enough
        self._ended: deque[tuple[float, bool]] = deque()  # when, and whether the promise was kept

    def add(self, time_s: float, attained: bool) -> None:
        """A request ended at `time_s`, not earlier than those before it."""
        self._ended.append((time_s, attained))

    def share(self, now: float) -> float | None:
        """Those that kept their promise, between 0 and 1; None where too few ended to tell."""
        self._forget(now)
        return sum(kept for _, kept in self._ended) / len(self._ended) if len(self._ended) >= self._enough else None

    def per_s(self, now: float) -> float:
        """Requests that ended, per second; 0 where too few ended to tell."""
        self._forget(now)
        if len(self._ended) < self._enough:
            return 0.0
        return len(self._ended) / max(now - self._ended[0][0], 1.0)

    def clear(self) -> None:
        """Forget all endings: the service is another one now."""
        self._ended.clear()

    def _forget(self, now: float) -> None:
        while self._ended and self._ended[0][0] < now - WINDOW_S:
            self._ended.popleft()
