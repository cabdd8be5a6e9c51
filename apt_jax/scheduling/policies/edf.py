"""Earliest deadline first: the request with the least slack to its SLO goes first; those past it go last.

Source: Liu and Layland, "Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment" (1973). Under
overload plain EDF serves the ones already lost and makes the next ones late too, hence the last clause.
"""

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.state import SchedulerState


class EarliestDeadlineFirst:
    """Order by deadline of the next token; ties by arrival."""

    def __init__(self, context: PolicyContext | None = None):
        """It needs nothing but the state."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Prefill first, then decode; the latest deadlines are preempted first."""

        def key(request: Request) -> tuple[bool, float]:
            promise_s = request.slo.ttft_s if request.last_token_s is None else request.slo.tbt_s
            slack_s = promise_s - request.pending_s(now)
            return slack_s < 0, slack_s

        return serve_in_order(state, sorted(state.waiting, key=key), sorted(state.running, key=key))

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
