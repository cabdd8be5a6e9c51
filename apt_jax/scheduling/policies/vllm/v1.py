"""vLLM's scheduler since V1, for comparison: decodes and prompt chunks in one iteration under a token budget.

Running requests come first, in order of arrival: a token for each that decodes, then what the budget leaves for a
prompt under way. Where blocks run out the last of them is preempted, and then nobody is admitted. Otherwise waiting
requests are admitted in order while the whole of their known tokens fits into free blocks: there is no watermark.
Source: docs/scheduling/vllm-v1.md.
"""

from dataclasses import dataclass

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import plan_decode, plan_prefill
from apt_jax.scheduling.state import SchedulerState


@dataclass(frozen=True)
class VllmV1Options:
    """`token_budget`: tokens of one iteration, decodes included; the engine's own limit applies too."""

    token_budget: int = 2048


class VllmV1:
    """Decode everything, fill up with prefill."""

    Options = VllmV1Options

    def __init__(self, context: PolicyContext | None = None, options: VllmV1Options | None = None):
        self._options = options or VllmV1Options()

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Decodes and prompt chunks together."""
        decode = plan_decode(state, state.running, ())
        budget = min(self._options.token_budget, state.limits.max_num_batched_tokens) - len(decode.scheduled)
        gone = {entry.request.order for entry in decode.preempted}
        running = [r for r in state.running if r.order not in gone]
        prefill, _, waited = plan_prefill(
            state, () if gone or decode.converted else state.waiting, running, budget=max(budget, 0),
            claimed_blocks=sum(state.blocks_to_grow(entry.request) for entry in decode.scheduled), watermark_blocks=0,
        )  # fmt: skip
        scheduled = (*decode.scheduled, *prefill)
        return Plan(scheduled=scheduled, preempted=decode.preempted, converted=decode.converted, waited=waited)

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
