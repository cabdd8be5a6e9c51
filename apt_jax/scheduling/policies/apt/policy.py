"""Adaptive scheduling: a knapsack over cache blocks, solved greedily in every iteration.

Each iteration: (1) if blocks run short for the running requests, those worth least per block are preempted; (2) the
waiting requests worth most per block are admitted into what is free, as KV or hidden, whichever the greedy solver
chooses; (3) decode and prefill run together where the cost model says that is faster, else the side with the larger
cumulative pending time runs; (4) hidden requests are converted to KV where memory stays free and KV is faster.
Requests that can no longer keep their SLO are demoted, with a bound on their wait (`facts/lateness.py`).

`facts/` holds what is known: `queue.py` and `ledger.py` the queues as columns, `view.py` what follows from them,
`values.py` what serving each is worth, `lateness.py` who can no longer keep its SLO and the lane, `forecast.py` the
blocks expected to be held later. `draft.py` is what one attempt has decided; `eviction.py`, `lane.py`, `admission.py`
and `price.py` decide who gives up memory, who is admitted, as what kind; `turns.py` says which attempt is carried out;
`budget.py` and `chunks.py` how many prompt tokens, and whose; `plan.py` makes the plan, conversions to KV included;
`repetition.py` says how long it stays. `knapsack/` is the problem as data and its solvers.
`apt-paper` is the original without what is added here. Source: Apt-Serve, arXiv 2504.07494, sections 4 and 5.
"""

from dataclasses import replace
from itertools import compress

from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan, Reason
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.ledger import Ledger
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.options import AptOptions, PaperOptions
from apt_jax.scheduling.policies.apt.plan import build_plan
from apt_jax.scheduling.policies.apt.repetition import repeat_of
from apt_jax.scheduling.policies.apt.turns import choose_draft
from apt_jax.scheduling.policies.interface import PolicyContext, Repeat
from apt_jax.scheduling.policies.swap_in import SwapIn
from apt_jax.scheduling.state import SchedulerState

LEAST_TICK_S, MOST_TICK_S = 1e-3, 0.25


class Apt:
    """The adaptive policy."""

    uses_cost_model = True
    Options = AptOptions

    def __init__(self, context: PolicyContext | None = None, options: AptOptions | None = None):
        self._context = context or PolicyContext()
        self._options = options or self.Options()
        self._ledger = Ledger()
        self._last_s: float | None = None
        self._decided: tuple[View, Draft] | None = None  # last
        self._swap_in = SwapIn(self._options.fetch)

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """The next iteration."""
        if not state.num_unfinished:
            return Plan()
        # what a request will have waited once this iteration is over, were it as long as the last one
        tick_s = LEAST_TICK_S if self._last_s is None else min(max(now - self._last_s, LEAST_TICK_S), MOST_TICK_S)
        self._last_s = now
        waiting, running = self._ledger.update(state)
        view = View(self._context, self._options, state, waiting, running, now, tick_s)
        draft, asked = choose_draft(view)
        self._swap_in.begin(state, now)
        plan = self._put_off(state, build_plan(view, draft, asked))
        self._decided = view, draft
        if self._options.fallback == "aging":
            self._ledger.give_up(view.late_w, view.late_r)
            entered = []
            if view.lane_r.any():
                stays = draft.stays
                entered = list(compress(running.requests, (view.lane_r & stays).tolist()))
                self._ledger.leave_lane(list(compress(running.requests, (view.lane_r & ~stays).tolist())))
            if view.lane_w.any():
                entered += [s.request for s in plan.scheduled if s.reason is Reason.ADMITTED_LONGEST_LATE]
            self._ledger.enter_lane(entered)
        return plan

    def repeat(self, state: SchedulerState, plan: Plan, now: float) -> Repeat | None:
        """As far as `repetition.py` can tell."""
        return None if self._decided is None else repeat_of(*self._decided)

    def repeated(self, now: float) -> None:
        """An iteration was as long as it took since the last one."""
        self._last_s = now

    def finished(self, request: Request, now: float) -> None:
        """Learn its length."""
        self._swap_in.finished(request)
        self._context.predictor.learn(request)

    def _put_off(self, state: SchedulerState, plan: Plan) -> Plan:
        """`plan`, with those whose pages are in host memory put off if others run meanwhile, but for the lane's."""
        lane = [entry for entry in plan.scheduled if entry.reason is Reason.ADMITTED_LONGEST_LATE]
        rest = [entry for entry in plan.scheduled if entry.reason is not Reason.ADMITTED_LONGEST_LATE]
        now, fetched = self._swap_in.put_off(state, rest, others=len(state.running) - len(plan.preempted))
        scheduled = (*now, *lane)
        return replace(plan, scheduled=scheduled, fetched=fetched) if fetched and scheduled else plan


class AptPaper(Apt):
    """Apt-Serve as published, the faults of its released code left out."""

    Options = PaperOptions
