"""Share of the requests that ended lately which kept their promise: what the autoscaler is told."""

from collections import deque

WINDOW_S = 30.0


class RecentAttainment:
    """Endings of the last `WINDOW_S` seconds. Times are of any clock that goes on.

    Args:
        enough: fewer endings than this tell nothing.
    """

    def __init__(self, enough: int):
        self._enough = enough
        self._ended: deque[tuple[float, bool]] = deque()  # when, and whether the promise was kept

    def add(self, time_s: float, attained: bool) -> None:
        """A request ended at `time_s`, not earlier than those before it."""
        self._ended.append((time_s, attained))

    def share(self, now: float) -> float | None:
        """Between 0 and 1; None where too few ended to tell. Forgets what is too old."""
        while self._ended and self._ended[0][0] < now - WINDOW_S:
            self._ended.popleft()
        count = len(self._ended)
        return sum(kept for _, kept in self._ended) / count if count and count >= self._enough else None
