"""Shortest predicted job first: the request with the fewest tokens expected to come goes first.

Lengths are learned from finished requests (`length.py`), not given. A request's predicted work shrinks by a second's
worth of tokens for every second it waits, so that long ones are served eventually.
Source: ALISE (Zhao et al., arXiv 2410.23537) and learning to rank (Fu et al., arXiv 2408.15792).
"""

import numpy as np

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.state import SchedulerState

TOKENS_PER_WAITED_S = 30.0


class ShortestJobFirst:
    """Order by predicted remaining prompt and output tokens, less an aging credit."""

    def __init__(self, context: PolicyContext | None = None):
        self._context = context or PolicyContext()

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Prefill first, then decode; the longest predicted are preempted first."""
        return serve_in_order(state, self._ordered(state.waiting, now), self._ordered(state.running, now))

    def finished(self, request: Request, now: float) -> None:
        """Learn its length."""
        self._context.predictor.learn(request)

    def _ordered(self, requests: list[Request], now: float) -> list[Request]:
        prompt = np.array([r.num_prompt_tokens for r in requests], np.float64)
        generated = np.array([r.num_generated_tokens for r in requests], np.float64)
        uncomputed = np.array([r.num_uncomputed_tokens for r in requests], np.float64)
        waited_s = np.array([r.pending_s(now) for r in requests], np.float64)
        work = uncomputed + self._context.predictor.remaining_of(requests, prompt, generated)
        return [requests[i] for i in np.argsort(work - TOKENS_PER_WAITED_S * waited_s, kind="stable")]
