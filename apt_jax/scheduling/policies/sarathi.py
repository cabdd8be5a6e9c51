"""Chunked prefill mixed with decode under a token budget: no decode ever waits for a prompt.

Every iteration decodes all running requests and spends the rest of its token budget on prompt chunks in order of
arrival. Source: Sarathi-Serve (Agrawal et al., arXiv 2403.02310).
"""

from dataclasses import dataclass

from apt_jax.ranges import check_at_least
from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext, Repeat
from apt_jax.scheduling.policies.packing import may_convert, plan_mixed
from apt_jax.scheduling.state import SchedulerState


@dataclass(frozen=True)
class SarathiOptions:
    """`token_budget`: tokens of one iteration, decodes included; the engine's own limit applies too."""

    token_budget: int = 512

    def __post_init__(self) -> None:
        check_at_least(self, 1, ("token_budget",))


class Sarathi:
    """Decode everything, fill up with prefill."""

    Options = SarathiOptions

    def __init__(self, context: PolicyContext | None = None, options: SarathiOptions | None = None):
        self._options = options or SarathiOptions()

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Decodes and prompt chunks together."""
        return plan_mixed(state, self._options.token_budget, least_tokens=1)

    def repeat(self, state: SchedulerState, plan: Plan, now: float) -> Repeat:
        """Until somebody comes or ends: nobody who waits fits into fewer free blocks."""
        return Repeat(through_ends=not state.waiting and not may_convert(state))

    def repeated(self, now: float) -> None:
        """Nothing to learn."""

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
