"""Adaptive scheduling: a knapsack over cache blocks, solved greedily in every iteration.

Each iteration: (1) if blocks run short for the running requests, those worth least per block are preempted; (2) the
waiting requests worth most per block are admitted into what is free, as KV or hidden, whichever the greedy solver
chooses; (3) decode and prefill run together where the cost model says that is faster, else the side with the larger
cumulative pending time runs; (4) hidden requests are converted to KV where memory stays free and KV is faster.
Requests that can no longer keep their SLO are demoted, with a bound on their wait (`lateness.py`).

`apt-paper` is the original without what is added here. Source: Apt-Serve, arXiv 2504.07494, sections 4 and 5.
"""

from dataclasses import dataclass

import numpy as np

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.apt.iteration import Iteration
from apt_jax.scheduling.policies.apt.ledger import Ledger
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import SchedulerState

VALUES = ("pending", "absolute", "slack", "footprint", "longest")


@dataclass(frozen=True)
class AptOptions:
    """Options of `apt`.

    Attributes:
        value: of serving a request now. pending: time since its last token, in units of its SLO. absolute: the same
            in seconds (the paper's). slack: 1 / (what is left of the SLO). footprint: pending, per block and
            predicted iteration instead of per block. longest: pending, whatever the memory it takes.
        fallback: what becomes of late requests. aging: demoted, with a bounded wait. constant: demoted (the
            paper's). none: nothing.
        mixed: allow iterations that decode and prefill.
        prediction: use predicted output lengths.
        convert: turn hidden caches into KV when it pays.
        sustained: where hidden is slower than KV, use it only if the batch still gains tokens per second.
        patience_s: time in the system after which a late request queues for the lane.
        lane_share: share of the blocks that the lane may fill.
    """

    value: str = "pending"
    fallback: str = "aging"
    mixed: bool = True
    prediction: bool = True
    convert: bool = True
    sustained: bool = True
    patience_s: float = 20.0
    lane_share: float = 0.05

    def __post_init__(self) -> None:
        for name, known in (("value", VALUES), ("fallback", ("aging", "constant", "none"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if not self.patience_s >= 0 or not 0 <= self.lane_share <= 1:
            raise ValueError(f"patience_s={self.patience_s} must be >= 0 and lane_share={self.lane_share} in 0..1")


class Apt:
    """The adaptive policy."""

    uses_cost_model = True
    Options = AptOptions

    def __init__(self, context: PolicyContext | None = None, options: AptOptions | None = None):
        self._context = context or PolicyContext()
        self._options = options or self.Options()
        self._ledger = Ledger()
        self._last_s: float | None = None

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """The next iteration."""
        if not state.num_unfinished:
            return Plan()
        # what a request will have waited once this iteration is over, were it as long as the last one
        tick_s = 1e-3 if self._last_s is None else float(np.clip(now - self._last_s, 1e-3, 0.25))
        self._last_s = now
        waiting, running = self._ledger.update(state)
        return Iteration(self._context, self._options, state, waiting, running, now, tick_s).plan()

    def finished(self, request: Request, now: float) -> None:
        """Learn its length."""
        self._context.predictor.learn(request)


@dataclass(frozen=True)
class PaperOptions(AptOptions):
    """The original: pending seconds, constant fallback, alternating iterations, and none of the additions."""

    value: str = "absolute"
    fallback: str = "constant"
    mixed: bool = False
    prediction: bool = False
    convert: bool = False
    sustained: bool = False


class AptPaper(Apt):
    """Apt-Serve as published, the faults of its released code left out."""

    Options = PaperOptions
