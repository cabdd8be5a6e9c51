"""FastServe: a multi-level feedback queue in time, which new requests join where their prompt fits.

Level p has a quantum of `first_quantum_ms` * 2^p. A request joins the first level whose quantum covers its prompt's
time by the cost model (skip-join: a long prompt would use up a small quantum at once), sinks by a level once it has
been served for its level's quantum, and rises to the top if it was not served for `promote_s`, looked for every
`PROMOTE_EVERY` iterations. Higher levels take the memory of lower ones.

Proactive swapping: where there is host memory, some blocks are kept free by preempting from the lowest level before
they are needed, and newcomers wait while what was preempted fills the host. What is preempted keeps its pages on the
device until they are overwritten; it is copied out only then (`host_tier.py`). Who is next is copied back beside an
iteration, into blocks beyond those kept free, so that nobody has to go for it (`swap_in.py`). Source: arXiv 2305.05920,
sections 4, 5.
"""

from dataclasses import dataclass, replace

from apt_jax.ranges import check_finite
from apt_jax.request import Request
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.plan import Plan, Preempted, Reason
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.policies.swap_in import SwapIn
from apt_jax.scheduling.state import SchedulerState

PROMOTE_EVERY = 1000  # iterations
LEAST_HOST_SHARE = 0.1  # of the host's blocks: newcomers wait while fewer are free
UNKNOWN_TOKEN_S = 2e-4  # of a prompt token, without a cost model


@dataclass(frozen=True)
class FastServeOptions:
    """Options of `fastserve`.

    Attributes:
        first_quantum_ms: of the top level.
        levels: their number; the lowest has no end.
        promote_s: without service, after which a request rises to the top.
        free_share: of the pool's blocks, kept free where there is host memory; at least one for each running request.
        fetch: those that are next are copied back ahead of their turn.
    """

    first_quantum_ms: float = 10.0
    levels: int = 12
    promote_s: float = 3.0
    free_share: float = 0.02
    fetch: bool = True

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.first_quantum_ms > 0 or not self.promote_s > 0:
            raise ValueError(
                f"first_quantum_ms={self.first_quantum_ms} and promote_s={self.promote_s} must be greater than 0"
            )
        if not 1 <= self.levels <= 64:
            raise ValueError(f"levels={self.levels} must be in 1..64")
        if not 0 <= self.free_share <= 0.5:
            raise ValueError(f"free_share={self.free_share} must be in 0..0.5")


@dataclass
class _Standing:
    """Where a request stands: its level, the seconds that it was served there, and when it was last served."""

    level: int
    served_s: float
    last_s: float


class FastServe:
    """Order by level, then by arrival."""

    Options = FastServeOptions
    uses_cost_model = True

    def __init__(self, context: PolicyContext | None = None, options: FastServeOptions | None = None):
        self._context, self._options = context or PolicyContext(), options or FastServeOptions()
        self._standings: dict[int, _Standing] = {}
        self._served: list[int] = []  # in the last iteration, which began at `_last_s`
        self._last_s: float | None = None
        self._iterations = 0
        self._swap_in = SwapIn(self._options.fetch)

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Prefill first, then decode; the lowest levels are preempted first."""
        self._take_in(state, now)
        self._swap_in.begin(state, now)

        def key(request: Request) -> int:
            return self._standings[request.order].level

        waiting, running = sorted(state.waiting, key=key), sorted(state.running, key=key)
        if _host_is_full(state):
            waiting = [request for request in waiting if request.num_preemptions] or waiting[: not running]
        wanted = self._wanted_blocks(state)
        plan = serve_in_order(
            state, waiting, running, lambda new, old: key(new) < key(old),
            watermark_blocks=max(wanted, state.limits.watermark_blocks), swap_in=self._swap_in,
        )  # fmt: skip
        plan = self._with_room(plan, state, running, wanted)
        plan = self._with_next(plan, state, waiting, wanted)
        self._served = [entry.request.order for entry in plan.scheduled]
        self._last_s = now
        return plan

    def finished(self, request: Request, now: float) -> None:
        """Forget it."""
        self._swap_in.finished(request)
        self._standings.pop(request.order, None)

    def _take_in(self, state: SchedulerState, now: float) -> None:
        """Newcomers join, and those that were served in the last iteration may sink."""
        unfinished = (*state.waiting, *state.running)
        for request in unfinished:
            if request.order not in self._standings:
                self._standings[request.order] = _Standing(self._level_of(request), 0.0, now)
        took_s = 0.0 if self._last_s is None else now - self._last_s
        for order in self._served:
            standing = self._standings.get(order)
            if standing is None:
                continue
            standing.served_s, standing.last_s = standing.served_s + took_s, now
            if standing.served_s > self._quantum_s(standing.level) and standing.level < self._options.levels - 1:
                standing.level, standing.served_s = standing.level + 1, 0.0
        self._iterations += 1
        if self._iterations % PROMOTE_EVERY == 0:
            for request in unfinished:
                standing = self._standings[request.order]
                if now - standing.last_s > self._options.promote_s:
                    standing.level, standing.served_s = 0, 0.0

    def _quantum_s(self, level: int) -> float:
        return self._options.first_quantum_ms / 1e3 * 2**level

    def _level_of(self, request: Request) -> int:
        """The first level whose quantum covers the time of its prompt."""
        tokens, model = request.num_tokens, self._context.cost_model
        prompt_s = tokens * UNKNOWN_TOKEN_S
        if model is not None:
            prompt_s = model.step_s(StepLoad(tokens, prefill_pairs=tokens * (tokens + 1) // 2, samples=1))
        last = self._options.levels - 1
        return next((level for level in range(last) if prompt_s <= self._quantum_s(level)), last)

    def _wanted_blocks(self, state: SchedulerState) -> int:
        """Blocks to keep free; 0 without host memory."""
        if state.prefixes is None or state.prefixes.host is None:
            return 0
        return max(len(state.running), int(self._options.free_share * state.pool.num_blocks))

    def _with_room(self, plan: Plan, state: SchedulerState, running: list[Request], wanted: int) -> Plan:
        """`plan`, with those of the lowest levels preempted that would keep fewer than `wanted` blocks free."""
        if not wanted or not plan.scheduled or plan.preempted or plan.converted:
            return plan
        free, gone, released = _free_after(plan, state), list[Request](), dict[int, int]()
        # somebody else must be served, and nobody of the top level goes
        victims = [request for request in running if self._standings[request.order].level > 0]
        while free < wanted and victims and len(gone) + 1 < len(plan.scheduled):
            victim = victims.pop()
            gone.append(victim)
            free += state.blocks_given_back(victim, released)
        if not gone:
            return plan
        orders = {victim.order for victim in gone}
        waited = [
            replace(entry, requests=tuple(r for r in entry.requests if r.order not in orders)) for entry in plan.waited
        ]
        return replace(
            plan,
            scheduled=tuple(entry for entry in plan.scheduled if entry.request.order not in orders),
            preempted=tuple(Preempted(victim, Reason.PREEMPTED_AHEAD) for victim in gone),
            waited=tuple(entry for entry in waited if entry.requests),
        )

    def _with_next(self, plan: Plan, state: SchedulerState, waiting: list[Request], wanted: int) -> Plan:
        """`plan`, with those copied back that are next, into blocks beyond the `wanted` ones."""
        if not wanted or not plan.scheduled or plan.preempted or plan.converted:
            return plan
        taken = {e.request.order for e in plan.scheduled} | {e.request.order for e in plan.fetched}
        room = _free_after(plan, state) - wanted
        room -= sum(state.blocks_to_admit(entry.request, entry.kind) for entry in plan.fetched)
        ahead = self._swap_in.ahead(state, (r for r in waiting if r.order not in taken), room)
        return replace(plan, fetched=(*plan.fetched, *ahead)) if ahead else plan


def _free_after(plan: Plan, state: SchedulerState) -> int:
    """Blocks that stay free when everybody of a plan that preempts nobody has what it computes."""
    return state.pool.num_free - sum(
        state.blocks_to_admit(request, kind) if request.table is None else state.blocks_to_grow(request)
        for request, _, kind, _ in plan.scheduled
    )


def _host_is_full(state: SchedulerState) -> bool:
    """Whether less than a tenth of the host's blocks are free of the pages of preempted requests."""
    host = None if state.prefixes is None else state.prefixes.host
    if host is None:
        return False
    kind = state.limits.kinds[0]
    held = sum(state.blocks_needed(r, r.cache_history[-1] if r.cache_history else kind) for r in state.waiting
               if r.num_preemptions)  # fmt: skip
    return held > (1 - LEAST_HOST_SHARE) * host.num_slots
