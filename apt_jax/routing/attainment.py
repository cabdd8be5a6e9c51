"""Recently ended requests, and the share of them that attained their SLO strictly: input of the autoscaler."""

import math
from collections import deque

WINDOW_S = 30.0


class RecentAttainment:
    """Endings of the last `WINDOW_S` seconds. Times are of any monotonic clock.

    Args:
        enough: with fewer endings than this (at least 1) there is no share.
    """

    def __init__(self, enough: int):
        self._enough = enough
        self._ended: deque[tuple[float, bool | None]] = deque()  # when, and whether the SLO was attained if that counts
        self._first_s = math.inf

    def add(self, time_s: float, attained: bool) -> None:
        """A request ended at `time_s`, not earlier than those before it."""
        self._ended.append((time_s, attained))
        self._first_s = min(self._first_s, time_s)

    def share(self, now: float) -> float | None:
        """Share that attained their SLO, between 0 and 1; None if too few ended."""
        self._forget(now)
        judged = [kept for _, kept in self._ended if kept is not None]
        return sum(judged) / len(judged) if len(judged) >= self._enough else None

    def per_s(self, now: float) -> float:
        """Requests that ended, per second."""
        self._forget(now)
        return len(self._ended) / max(1.0, min(WINDOW_S, now - self._first_s))

    def clear(self) -> None:
        """Judge only what ends from now on: there are more instances. The rate stays what it is."""
        self._ended = deque((time_s, None) for time_s, _ in self._ended)

    def _forget(self, now: float) -> None:
        while self._ended and self._ended[0][0] < now - WINDOW_S:
            self._ended.popleft()
