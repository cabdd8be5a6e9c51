"""vLLM's first scheduler (V0), for comparison: prefill first, whole prompts, a watermark, preemption by recompute.

As `fcfs`, except that a prompt is never split: one that does not fit into what is left of the token budget waits for
the next iteration. Source: docs/scheduling/vllm-v0.md.
"""

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext, Repeat
from apt_jax.scheduling.policies.packing import may_convert, serve_in_order
from apt_jax.scheduling.state import SchedulerState


class VllmV0:
    """Prefill first, then decode all that runs; both in order of arrival."""

    def __init__(self, context: PolicyContext | None = None):
        """It needs nothing but the state."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """A prefill iteration if a prompt fits, else a decode iteration."""
        return serve_in_order(state, state.waiting, state.running, whole_prompts=True)

    def repeat(self, state: SchedulerState, plan: Plan, now: float) -> Repeat:
        """Until somebody comes or ends: nobody who waits fits into fewer free blocks."""
        return Repeat(through_ends=not state.waiting and not may_convert(state))

    def repeated(self, now: float) -> None:
        """Nothing to learn."""

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
