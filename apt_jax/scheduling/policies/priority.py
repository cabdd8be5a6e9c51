"""Priority classes: a lower `priority` is served earlier and may take the memory of a higher one.

Source: vLLM's `--scheduling-policy priority`, whose numbers mean the same.
"""

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.state import SchedulerState


class Priority:
    """Order by class, then by arrival."""

    def __init__(self, context: PolicyContext | None = None):
        """It needs nothing but the state."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Prefill first, then decode; the highest numbers are preempted first."""

        def key(request: Request) -> int:
            return request.priority

        return serve_in_order(
            state,
            sorted(state.waiting, key=key),
            sorted(state.running, key=key),
            may_preempt=lambda waiting, running: waiting.priority < running.priority,
        )

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
