"""First come, first served, as vLLM's first scheduler: prefill first, watermark, preemption by recompute.

An iteration either prefills or decodes. Prefill goes in order of arrival, within the token budget, and stops at
the first request that does not fit. Decode runs every request; when blocks run out, the latest arrival is
preempted. In hybrid mode a request is admitted with the hidden cache when KV does not fit; when nothing waits and
memory is free, the oldest hidden request is converted to KV. Source: vLLM `core/scheduler.py` (v0).
"""

from apt_jax.cache import CacheKind
from apt_jax.request import Request
from apt_jax.scheduling.plan import Converted, Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.scheduling.policy import PolicyContext, register
from apt_jax.scheduling.state import SchedulerState


@register("fcfs")
class Fcfs:
    """Prefill first, then decode all that runs; both in order of arrival."""

    def __init__(self, context: PolicyContext | None = None):
        """It needs nothing but the state."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """A prefill iteration if one fits, else a decode iteration."""
        prefills, waited = plan_prefill(state)
        if prefills:
            decoding = tuple(r for r in state.running if r.is_decoding and not r.is_exhausted)
            resting = (Waited(decoding, Reason.WAITS_FOR_PREFILL),) if decoding else ()
            return Plan(scheduled=tuple(prefills), waited=(*waited, *resting))
        return plan_decode(state, waited)

    def finished(self, request: Request, now: float) -> None:
        """Nothing to learn."""


def plan_prefill(state: SchedulerState) -> tuple[list[Scheduled], tuple[Waited, ...]]:
    """Prefills in order of arrival within the token budget, sequence limit and free blocks above the watermark."""
    budget = state.limits.max_num_batched_tokens
    scheduled = []
    for request in state.running:
        if not request.is_decoding and request.num_uncomputed_tokens > 0 and budget > 0:
            assert request.cache_kind is not None
            tokens = min(request.num_uncomputed_tokens, budget)
            scheduled.append(Scheduled(request, tokens, request.cache_kind, Reason.CONTINUES_PREFILL))
            budget -= tokens
    free, seats = state.pool.num_free, state.limits.max_num_seqs - len(state.running)
    # A request that runs alone may use the last block: nobody else grows.
    spare = state.limits.watermark_blocks if state.running else 0
    blocked: Reason | None = None
    admitted = 0
    for request in state.waiting:
        if budget <= 0:
            blocked = Reason.WAITS_FOR_TOKENS
        elif seats <= 0:
            blocked = Reason.WAITS_FOR_SEQUENCES
        else:
            choice = choose_kind(state, request, free - spare)
            if choice is None:
                blocked = Reason.WAITS_FOR_BLOCKS
            else:
                kind, reason = choice
                tokens = min(request.num_uncomputed_tokens, budget)
                scheduled.append(Scheduled(request, tokens, kind, reason))
                free -= state.blocks_needed(request, kind)
                budget -= tokens
                seats -= 1
                admitted += 1
                spare = state.limits.watermark_blocks
        if blocked:
            break
    if blocked is None:
        return scheduled, ()
    first, behind = state.waiting[admitted], tuple(state.waiting[admitted + 1 :])
    waited = (Waited((first,), blocked), *((Waited(behind, Reason.WAITS_BEHIND),) if behind else ()))
    return scheduled, waited


def choose_kind(state: SchedulerState, request: Request, free_blocks: int) -> tuple[CacheKind, Reason] | None:
    """The first kind of the cache mode in which the request's known tokens fit; None if none does."""
    kinds = state.limits.kinds
    for kind in kinds:
        if state.blocks_needed(request, kind) <= free_blocks:
            if kind is CacheKind.KV:
                return kind, Reason.ADMITTED_KV
            return kind, Reason.ADMITTED_HIDDEN if len(kinds) == 1 else Reason.ADMITTED_HIDDEN_KV_DOES_NOT_FIT
    return None


def plan_decode(state: SchedulerState, waited: tuple[Waited, ...]) -> Plan:
    """One token for every decoding request; the latest arrivals are preempted while blocks are short."""
    queue = [r for r in state.running if r.is_decoding and not r.is_exhausted]
    victims = list(state.running)  # also those still prefilling hold blocks
    free = state.pool.num_free
    scheduled: list[Scheduled] = []
    preempted: list[Preempted] = []
    gone: set[int] = set()
    for request in queue:
        if request.order in gone:
            continue
        need = state.blocks_to_grow(request)
        while need > free:
            victim = victims.pop()
            assert victim.table is not None
            preempted.append(Preempted(victim, Reason.PREEMPTED_NO_BLOCKS))
            gone.add(victim.order)
            free += victim.table.num_blocks
            if victim is request:
                break
        if request.order not in gone:
            assert request.cache_kind is not None
            free -= need
            scheduled.append(Scheduled(request, 1, request.cache_kind, Reason.DECODES))
    converted = () if state.waiting or preempted else plan_conversion(state, free)
    kinds = {entry.request.order: CacheKind.KV for entry in converted}
    entries = tuple(
        Scheduled(s.request, 1, kinds.get(s.request.order, s.kind), s.reason) if kinds else s for s in scheduled
    )
    return Plan(scheduled=entries, preempted=tuple(preempted), converted=converted, waited=waited)


def plan_conversion(state: SchedulerState, free: int) -> tuple[Converted, ...]:
    """The oldest hidden request, if after its conversion every running request can still grow by a page."""
    if state.limits.cache_mode != "hybrid":
        return ()
    for request in state.running:
        if request.cache_kind is CacheKind.HIDDEN and request.is_decoding and not request.is_exhausted:
            assert request.table is not None
            # the new page that this step may add costs one block more as KV than counted in `free`
            extra = state.blocks_needed(request, CacheKind.KV) - request.table.num_blocks
            if free - extra >= state.limits.watermark_blocks + 2 * len(state.running):
                return (Converted(request, Reason.CONVERTED_MEMORY_FREE),)
            return ()
    return ()
