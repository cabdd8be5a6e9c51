"""Multi-level feedback queue with skip-join: short jobs overtake long ones without knowing lengths.

A request joins the first level whose quantum covers its prompt (skip-join: a long prompt would use up a small quantum
at once), sinks a level whenever it has generated its level's quantum of tokens, and rises to the top after waiting
`PROMOTE_S`. Higher levels may take the memory of lower ones. Source: FastServe (Wu et al., arXiv 2305.05920).
"""

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.state import SchedulerState

LEVELS = 6
FIRST_QUANTUM_TOKENS = 32  # of outputs; each level doubles it
PROMPT_TOKENS_PER_QUANTUM = 4  # prompt tokens are computed many at a time
PROMOTE_S = 5.0


class MultiLevelFeedbackQueue:
    """Order by level, then by arrival."""

    def __init__(self, context: PolicyContext | None = None):
        self._level: dict[int, int] = {}
        self._joined_tokens: dict[int, int] = {}  # tokens it had generated when it joined its level

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Prefill first, then decode; the lowest levels are preempted first."""
        for request in (*state.waiting, *state.running):
            self._update(request, now)

        def key(request: Request) -> int:
            return self._level[request.order]

        return serve_in_order(
            state,
            sorted(state.waiting, key=key),
            sorted(state.running, key=key),
            may_preempt=lambda waiting, running: key(waiting) < key(running),
        )

    def finished(self, request: Request, now: float) -> None:
        """Forget it."""
        self._level.pop(request.order, None)
        self._joined_tokens.pop(request.order, None)

    def _update(self, request: Request, now: float) -> None:
        order, generated = request.order, request.num_generated_tokens
        level = self._level.get(order)
        if level is None:
            level = next((k for k in range(LEVELS) if request.num_prompt_tokens <= _prompt_quantum(k)), LEVELS - 1)
            self._join(order, level, generated)
        elif request.table is None and level > 0 and request.pending_s(now) > PROMOTE_S:
            self._join(order, 0, generated)
        elif generated - self._joined_tokens[order] >= FIRST_QUANTUM_TOKENS << level and level < LEVELS - 1:
            self._join(order, level + 1, generated)

    def _join(self, order: int, level: int, generated: int) -> None:
        self._level[order], self._joined_tokens[order] = level, generated


def _prompt_quantum(level: int) -> int:
    return (FIRST_QUANTUM_TOKENS << level) * PROMPT_TOKENS_PER_QUANTUM
