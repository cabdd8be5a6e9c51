"""vLLM's scheduler since V1, for comparison: decodes and prompt chunks in one iteration under a token budget.

Running requests come first, in order of arrival: a token for each that decodes, then what the budget leaves for a
prompt under way. Where blocks run out the last of them is preempted, and then nobody is admitted. Otherwise waiting
requests are admitted in order while the whole of their known tokens fits into free blocks: there is no watermark.
Source: docs/scheduling/vllm-v1.md.
"""

from dataclasses import dataclass

from apt_jax.ranges import check_at_least
from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext, Repeat
from apt_jax.scheduling.policies.packing import may_convert, plan_mixed
from apt_jax.scheduling.state import SchedulerState


@dataclass(frozen=True)
class VllmV1Options:
    """`token_budget`: tokens of one iteration, decodes included; None: the engine's limit, which always applies."""

    token_budget: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self, 1, ("token_budget",))


class VllmV1:
    """Decode everything, fill up with prefill."""

    Options = VllmV1Options

    def __init__(self, context: PolicyContext | None = None, options: VllmV1Options | None = None):
        self._options = options or VllmV1Options()

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Decodes and prompt chunks together."""
        budget = self._options.token_budget
        return plan_mixed(state, state.limits.max_num_batched_tokens if budget is None else budget, watermark_blocks=0)

    def repeat(self, state: SchedulerState, plan: Plan, now: float) -> Repeat:
        """Until somebody comes or ends: nobody who waits fits into fewer free blocks."""
        return Repeat(through_ends=not state.waiting and not may_convert(state))

    def repeated(self, now: float) -> None:
        """Nothing to learn."""

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
