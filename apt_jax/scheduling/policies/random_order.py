"""Random order, a baseline for other policies. Admissions and victims are drawn at random.

Source: the baseline of Apt-Serve's ablation (arXiv 2504.07494, section 6).
"""

import random

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.state import SchedulerState


class RandomOrder:
    """A fresh shuffle at every iteration; the same seed gives the same plans."""

    def __init__(self, context: PolicyContext | None = None):
        self._rng = random.Random((context or PolicyContext()).seed)

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Prefill first, then decode, both in shuffled order."""
        waiting, running = list(state.waiting), list(state.running)
        self._rng.shuffle(waiting)
        self._rng.shuffle(running)
        return serve_in_order(state, waiting, running)

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""
