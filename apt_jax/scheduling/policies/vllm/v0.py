"""vLLM's first scheduler (V0), for comparison: prefill first, whole prompts, a watermark, preemption by recompute.

As `fcfs`, except that a prompt is never split: one that does not fit into what is left of the token budget waits for
the next iteration. Source: docs/scheduling/vllm-v0.md.
"""

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.state import SchedulerState


class VllmV0:
    """Prefill first, then decode all that runs; both in order of arrival."""

    def __init__(self, context: PolicyContext | None = None):
        """It needs nothing but the state."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """A prefill iteration if a prompt fits, else a decode iteration."""
        return serve_in_order(state, state.waiting, state.running, whole_prompts=True)

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
