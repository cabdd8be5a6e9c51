"""FastSwitch: fair shares for users and classes of requests, by priorities that change while they run.

An account, of one `user`, of one `priority` (a class) or of a user in a class (`by`), is owed service in proportion to
the weight 2^-priority of its requests. Service is counted as in VTC (a prompt token once, an output token twice), and
an account that was idle begins level with the least served. Every `update_every` iterations requests are put in order
anew: the account that has had least for its weight, then the request that has had least; those ahead take the memory
of those behind. So contexts are switched often, which
is cheap only where their pages move to host memory and back in large copies instead of being computed again, and where
the host keeps its copy, so that only new pages move (`host_tier.py`). Source: arXiv 2411.18424, sections 3 to 5; the
counters are those of VTC (arXiv 2401.00588).
"""

from dataclasses import dataclass

from apt_jax.ranges import check_at_least
from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.policies.swap_in import SwapIn
from apt_jax.scheduling.state import SchedulerState

OUTPUT_WEIGHT = 2.0  # of an output token, against a prompt token
MOST_PRIORITY = 30  # priorities beyond it, in either direction, weigh like it
MOST_GONE = 1024  # accounts without requests that are remembered, those served most
BY = ("both", "class", "user")

Account = tuple[int, str | None]  # priority and user; 0 and None where they do not count


@dataclass(frozen=True)
class FastSwitchOptions:
    """Options of `fastswitch`.

    Attributes:
        by: what has an account of its own. class: all requests of one `priority`. user: all of one `user`, whatever
            their priorities; those without one share one. both: those of a user in a class.
        update_every: iterations between two changes of priorities; FastSwitch's paper varies this.
        fetch: pages come back from host memory beside an iteration, after which their request goes on.
    """

    by: str = "both"
    update_every: int = 25
    fetch: bool = True

    def __post_init__(self) -> None:
        check_at_least(self, 1, ("update_every",))
        if self.by not in BY:
            raise ValueError(f"by={self.by!r} must be one of {', '.join(BY)}")


class FastSwitch:
    """Order by what each account and each request have had."""

    Options = FastSwitchOptions

    def __init__(self, context: PolicyContext | None = None, options: FastSwitchOptions | None = None):
        self._options = options or FastSwitchOptions()
        self._served: dict[Account, float] = {}  # service for its weight
        self._active: set[Account] = set()  # accounts with unfinished requests
        self._had: dict[int, float] = {}  # service of each request, by arrival number
        self._rank: dict[int, tuple[float, float]] = {}  # of each request, at the last update
        self._scheduled: list[tuple[Request, int, int]] = []  # of the last plan: tokens, generated before
        self._iterations = 0
        self._swap_in = SwapIn(self._options.fetch)

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Prefill first, then decode; priorities take memory only in an iteration that updates them."""
        self._count()
        self._swap_in.begin(state, now)
        unfinished = (*state.waiting, *state.running)
        self._admit_accounts(unfinished)
        updates = self._iterations % self._options.update_every == 0
        self._iterations += 1
        for request in unfinished:
            if updates or request.order not in self._rank:
                had = self._had.setdefault(request.order, 0.0)
                self._rank[request.order] = (self._served[self._account(request)], had)

        def key(request: Request) -> tuple[float, float, int]:
            return (*self._rank[request.order], request.order)

        def goes_before(new: Request, old: Request) -> bool:
            return (updates or self._swap_in.joins(new)) and self._rank[new.order] < self._rank[old.order]

        plan = serve_in_order(
            state,
            sorted(state.waiting, key=key),
            sorted(state.running, key=key),
            goes_before,
            swap_in=self._swap_in,
        )
        self._scheduled = [(e.request, e.num_tokens, e.request.num_generated_tokens) for e in plan.scheduled]
        return plan

    def finished(self, request: Request, now: float) -> None:
        """Forget it, after its last token has been counted."""
        self._count()
        self._swap_in.finished(request)
        self._had.pop(request.order, None)
        self._rank.pop(request.order, None)

    def _count(self) -> None:
        """Count what the last plan has served."""
        for request, tokens, before in self._scheduled:
            service = OUTPUT_WEIGHT if before else float(tokens)
            priority = max(-MOST_PRIORITY, min(request.priority, MOST_PRIORITY))
            account = self._account(request)
            self._served[account] = self._served.get(account, 0.0) + service * 2.0**priority
            if request.order in self._had:
                self._had[request.order] += service
        self._scheduled = []

    def _account(self, request: Request) -> Account:
        """Whose service a request's is."""
        by = self._options.by
        return (0 if by == "user" else request.priority), (None if by == "class" else request.user)

    def _admit_accounts(self, unfinished: tuple[Request, ...]) -> None:
        """One that comes back is lifted to the least served of those that are there: idling earns no credit."""
        accounts = {self._account(request) for request in unfinished}
        there = [self._served[each] for each in accounts & self._active]
        least = min(there or self._served.values(), default=0.0)
        for each in accounts - self._active:
            self._served[each] = max(self._served.get(each, 0.0), least)
        self._active = accounts
        if len(self._served) > len(accounts) + 2 * MOST_GONE:
            self._forget_gone(least)

    def _forget_gone(self, least: float) -> None:
        """Of those that are not there keep the ones served most; who was served least is lifted anyway."""
        gone = [(served, each) for each, served in self._served.items() if each not in self._active]
        owing = sorted((entry for entry in gone if entry[0] > least), key=lambda entry: entry[0])[-MOST_GONE:]
        kept = {each for _, each in owing} | self._active
        self._served = {each: served for each, served in self._served.items() if each in kept}
