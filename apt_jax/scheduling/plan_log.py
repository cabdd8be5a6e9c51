"""The last plans with their reasons, which answer "why was my request not scheduled"."""

from collections import deque
from typing import Any

from apt_jax.scheduling.plan import Plan


class PlanLog:
    """A ring buffer of the newest plans. Recording is cheap; reading builds plain dicts."""

    def __init__(self, capacity: int = 64):
        self._entries: deque[tuple[int, float, Plan]] = deque(maxlen=capacity)
        self._count = 0

    @property
    def num_recorded(self) -> int:
        """Plans recorded since the start, those forgotten included."""
        return self._count

    def record(self, plan: Plan, now: float) -> None:
        """Keep `plan`, made at `now` seconds; the oldest is forgotten when the buffer is full."""
        self._entries.append((self._count, now, plan))
        self._count += 1

    def as_dicts(self) -> list[dict[str, Any]]:
        """The plans kept, oldest first, as JSON-ready dicts."""
        return [plan_dict(number, now, plan) for number, now, plan in list(self._entries)]

    def of_request(self, request_id: str) -> list[dict[str, Any]]:
        """What each plan kept did with one request: `{number, now_s, action, reason}`, oldest first."""
        return [
            {"number": number, "now_s": now, "action": action, "reason": reason.value}
            for number, now, plan in list(self._entries)
            for action, request, reason in plan.decisions()
            if request.request_id == request_id
        ]


def plan_dict(number: int, now: float, plan: Plan) -> dict[str, Any]:
    """One plan as plain data."""
    return {
        "number": number,
        "now_s": now,
        "scheduled": [
            {"request": s.request.request_id, "tokens": s.num_tokens, "cache": s.kind.value, "reason": s.reason.value}
            for s in plan.scheduled
        ],
        "preempted": [{"request": p.request.request_id, "reason": p.reason.value} for p in plan.preempted],
        "converted": [{"request": c.request.request_id, "reason": c.reason.value} for c in plan.converted],
        "abandoned": [{"request": a.request.request_id, "reason": a.reason.value} for a in plan.abandoned],
        "waited": [
            {"requests": [request.request_id for request in w.requests], "reason": w.reason.value} for w in plan.waited
        ],
    }
