"""First come, first served, as vLLM's first scheduler: prefill first, watermark, preemption by recompute.

An iteration either prefills or decodes. Prefill goes in order of arrival, within the token budget, and stops at
the first request that does not fit. Decode runs every request; when blocks run out, the latest arrival is
preempted. In hybrid mode a request is admitted with the hidden cache when KV does not fit; when nothing waits and
memory is free, the oldest hidden request is converted to KV. Source: vLLM `core/scheduler.py` (v0).
"""

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext, Repeat
from apt_jax.scheduling.policies.packing import may_convert, serve_in_order
from apt_jax.scheduling.state import SchedulerState


class Fcfs:
    """Prefill first, then decode all that runs; both in order of arrival."""

    def __init__(self, context: PolicyContext | None = None):
        """It needs nothing but the state."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """A prefill iteration if one fits, else a decode iteration."""
        return serve_in_order(state, state.waiting, state.running)

    def repeat(self, state: SchedulerState, plan: Plan, now: float) -> Repeat:
        """Until somebody comes or ends: nobody who waits fits into fewer free blocks."""
        return Repeat(through_ends=not state.waiting and not may_convert(state))

    def repeated(self, now: float) -> None:
        """Nothing to learn."""

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
