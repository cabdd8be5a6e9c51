"""Building blocks for policies that put requests in an order and serve them in it.

`serve_in_order` prefills in the given order while requests fit, else decodes; where memory runs out, the last of the
running order are preempted. `fcfs`, `random`, `sjf`, `edf`, `priority` and `mlfq` differ in the order only.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import compress

import numpy as np

from apt_jax.cache import CacheKind, per_kind
from apt_jax.request import Request
from apt_jax.scheduling.plan import Converted, Fetched, Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.scheduling.policies.swap_in import SwapIn
from apt_jax.scheduling.state import SchedulerState

BLOCKS_PER_PAGE = np.array(per_kind(lambda kind: kind.blocks_per_page), np.int64)  # by `CacheKind.index`

MayPreempt = Callable[[Request, Request], bool]


def serve_in_order(
    state: SchedulerState,
    waiting: Sequence[Request],
    running: Sequence[Request],
    may_preempt: MayPreempt | None = None,
    *,
    watermark_blocks: int | None = None,
    whole_prompts: bool = False,
    swap_in: SwapIn | None = None,
) -> Plan:
    """A prefill iteration if one fits, else a decode iteration.

    Args:
        state: read only.
        waiting: `state.waiting` in the order to admit.
        running: `state.running`, those to keep longest first.
        may_preempt: `(waiting, running)` -> whether the first may take the second's memory; None is never.
        watermark_blocks, whole_prompts: as in `plan_prefill`.
        swap_in: puts admissions off whose pages are in host memory, if others run meanwhile.
    """
    swap_in = swap_in if running else None

    def prefill(swap_in: SwapIn | None) -> tuple[list[Scheduled], list[Preempted], tuple[Waited, ...]]:
        return plan_prefill(
            state, waiting, running, may_preempt, watermark_blocks=watermark_blocks, whole_prompts=whole_prompts,
            swap_in=swap_in,
        )  # fmt: skip

    scheduled, preempted, waited = prefill(swap_in)
    if not scheduled:
        return plan_decode(state, running, waited)
    gone, fetched = {entry.request.order for entry in preempted}, tuple[Fetched, ...]()
    if swap_in is not None:
        now, fetched = swap_in.put_off(state, scheduled, others=len(state.running) - len(gone))
        if fetched and not now:
            decode = plan_decode(state, [r for r in running if r.order not in gone], waited, preempted)
            if decode.scheduled:
                return replace(decode, fetched=fetched)
            now, preempted, waited = prefill(None)
            gone, fetched = {entry.request.order for entry in preempted}, ()
        scheduled = now
    resting = tuple(r for r in state.running if r.is_decoding and not r.is_exhausted and r.order not in gone)
    if resting:
        waited = (*waited, Waited(resting, Reason.WAITS_FOR_PREFILL))
    return Plan(scheduled=tuple(scheduled), preempted=tuple(preempted), waited=waited, fetched=fetched)


def plan_prefill(
    state: SchedulerState,
    waiting: Sequence[Request],
    running: Sequence[Request],
    may_preempt: MayPreempt | None = None,
    budget: int | None = None,
    claimed_blocks: int = 0,
    *,
    watermark_blocks: int | None = None,
    whole_prompts: bool = False,
    swap_in: SwapIn | None = None,
) -> tuple[list[Scheduled], list[Preempted], tuple[Waited, ...]]:
    """Prefills in order within the token budget, sequence limit and free blocks above the watermark.

    Stops at the first request that does not fit. `claimed_blocks` are free ones that others of this iteration take;
    `watermark_blocks` replaces the limits' own. With `whole_prompts` one that exceeds what is left of the budget waits,
    unless it is the first and would exceed any. `swap_in` has who begins with pages in host memory wait for the link.
    """
    budget = state.limits.max_num_batched_tokens if budget is None else budget
    scheduled: list[Scheduled] = []
    preempted: list[Preempted] = []
    victims = list(running)
    released: dict[int, int] = {}
    prefilling = _prefilling(state)
    for request in running if prefilling else ():
        if request.order in prefilling and budget > 0:
            assert request.cache_kind is not None
            tokens = min(request.num_uncomputed_tokens, budget)
            scheduled.append(Scheduled(request, tokens, request.cache_kind, Reason.CONTINUES_PREFILL))
            victims.remove(request)
            budget -= tokens
    free, seats = state.pool.num_free - claimed_blocks, state.limits.max_num_seqs - len(state.running)
    watermark = state.limits.watermark_blocks if watermark_blocks is None else watermark_blocks
    # a request that runs alone may use the last block: nobody else grows
    spare = watermark if state.running else 0
    for position, request in enumerate(waiting):
        blocked: Reason | None = None
        choice: tuple[CacheKind, Reason] | None = None
        taken: list[Preempted] = []  # for this request: they keep their blocks if even those are too few
        while budget > 0:
            choice = choose_kind(state, request, free - spare, preempts=may_preempt is not None) if seats > 0 else None
            if choice or not (victims and may_preempt and may_preempt(request, victims[-1])):
                break
            victim = victims.pop()
            taken.append(Preempted(victim, Reason.PREEMPTED_FOR_EARLIER))
            free, seats = free + state.blocks_given_back(victim, released), seats + 1
        tokens = state.tokens_to_compute(request, choice[0]) if choice else request.num_uncomputed_tokens
        if budget <= 0 or (whole_prompts and scheduled and tokens > budget):
            blocked = Reason.WAITS_FOR_TOKENS
        elif seats <= 0:
            blocked = Reason.WAITS_FOR_SEQUENCES
        elif choice is None:
            blocked = Reason.WAITS_FOR_BLOCKS
        elif swap_in is not None and not swap_in.has_room_for(state, request, choice[0], len(victims) + len(taken)):
            blocked = Reason.WAITS_FOR_COPIES
        if blocked or choice is None:
            behind = tuple(waiting[position + 1 :])
            first = Waited((request,), blocked or Reason.WAITS_FOR_BLOCKS)
            return scheduled, preempted, (first, *((Waited(behind, Reason.WAITS_BEHIND),) if behind else ()))
        kind, reason = choice
        preempted += taken
        tokens = min(tokens, budget)
        scheduled.append(Scheduled(request, tokens, kind, reason))
        free -= state.blocks_to_admit(request, kind, preempts=may_preempt is not None)
        budget -= tokens
        seats -= 1
        spare = watermark
    return scheduled, preempted, ()


def _prefilling(state: SchedulerState) -> set[int]:
    """Arrival numbers of the running requests in the middle of their prefill."""
    progress = state.running_progress()
    unfinished = (progress.tokens > progress.computed) & ~progress.is_decoding
    return set(compress((r.order for r in state.running), unfinished.tolist())) if unfinished.any() else set()


def plan_mixed(
    state: SchedulerState, token_budget: int, *, least_tokens: int = 0, watermark_blocks: int | None = None,
    waiting: Sequence[Request] | None = None, running: Sequence[Request] | None = None,
) -> Plan:  # fmt: skip
    """Decode everything, and spend what is left of the token budget on prompts in order of arrival.

    `least_tokens` of prompts are computed whatever the decodes take; the watermark is the limits' unless given.
    `waiting` and `running` are those that may take part, in their order; None: all.
    """
    decode = plan_decode(state, state.running if running is None else running, ())
    budget = min(token_budget, state.limits.max_num_batched_tokens) - len(decode.scheduled)
    gone = {entry.request.order for entry in decode.preempted}
    prefill, _, waited = plan_prefill(
        state,
        # after a preemption nobody is admitted: the blocks are needed by those that run
        () if gone or decode.converted else state.waiting if waiting is None else waiting,
        [r for r in (state.running if running is None else running) if r.order not in gone],
        budget=max(budget, least_tokens),
        claimed_blocks=sum(state.blocks_to_grow(entry.request) for entry in decode.scheduled),
        watermark_blocks=watermark_blocks,
    )
    return Plan(
        scheduled=(*decode.scheduled, *prefill), preempted=decode.preempted, converted=decode.converted, waited=waited
    )


def choose_kind(
    state: SchedulerState, request: Request, free_blocks: int, *, preempts: bool = False
) -> tuple[CacheKind, Reason] | None:
    """The first kind of the cache mode in which the request's known tokens fit; None if none does.

    Kinds as which more of it is cached go first. `preempts` as in `SchedulerState.blocks_to_admit`.
    """
    kinds, order = state.limits.kinds, state.kinds_to_admit(request)
    for kind in order:
        if state.blocks_to_admit(request, kind, preempts=preempts) <= free_blocks:
            if not kind.is_projected:
                return kind, Reason.ADMITTED_KV
            if kind is order[0] and kind is not kinds[0]:
                return kind, Reason.ADMITTED_HIDDEN_CACHED
            return kind, Reason.ADMITTED_HIDDEN if kind is kinds[0] else Reason.ADMITTED_HIDDEN_KV_DOES_NOT_FIT
    return None


def plan_decode(
    state: SchedulerState, running: Sequence[Request], waited: tuple[Waited, ...], preempted: Sequence[Preempted] = ()
) -> Plan:
    """One token for every decoding request; the last of `running` are preempted while blocks are short.

    `preempted` are others, which the same plan preempts before.
    """
    released: dict[int, int] = {}
    freed = sum(state.blocks_given_back(entry.request, released) for entry in preempted)
    free, scheduled = _decode_all(state, running, freed, {entry.request.order for entry in preempted})
    if free >= 0 and not preempted:
        return _with_conversion(state, free, scheduled, [], waited)
    victims = list(running)  # also those still prefilling hold blocks
    if free >= 0:
        return Plan(scheduled=tuple(scheduled), preempted=tuple(preempted), waited=waited)
    free, scheduled = state.pool.num_free + freed, []
    preempted, gone = [*preempted], set[int]()
    for request in running:
        if request.order in gone or not request.is_decoding or request.is_exhausted:
            continue
        need = state.blocks_to_grow(request)
        while need > free:
            victim = victims.pop()
            preempted.append(Preempted(victim, Reason.PREEMPTED_NO_BLOCKS))
            gone.add(victim.order)
            free += state.blocks_given_back(victim, released)
            if victim is request:
                break
        if request.order not in gone:
            assert request.table is not None
            free -= need
            scheduled.append(Scheduled(request, 1, request.table.kind, Reason.DECODES))
    return _with_conversion(state, free, scheduled, preempted, waited)


def _decode_all(
    state: SchedulerState, running: Sequence[Request], freed_blocks: int, gone: Collection[int]
) -> tuple[int, list[Scheduled]]:
    """Blocks left free if all that can decode do but those `gone`, negative if they are too few; and their entries."""
    progress = state.running_progress()
    decodes = progress.is_decoding & (progress.generated < progress.max_new_tokens)
    if gone:
        decodes &= np.array([r.order not in gone for r in state.running])
    pages = np.maximum(-(-progress.tokens // state.pool.block_size) - progress.pages, 0)
    free = state.pool.num_free + freed_blocks - int((pages * BLOCKS_PER_PAGE[progress.kind])[decodes].sum())
    if free < 0:
        return free, []
    if not decodes.all():
        able = set(compress((r.order for r in state.running), decodes.tolist()))
        running = [r for r in running if r.order in able]
    return free, [Scheduled(r, 1, r.table.kind, Reason.DECODES) for r in running]  # type: ignore[union-attr]


def _with_conversion(
    state: SchedulerState, free: int, scheduled: list[Scheduled], preempted: list[Preempted],
    waited: tuple[Waited, ...],
) -> Plan:  # fmt: skip
    converted = () if state.waiting or preempted else plan_conversion(state, free)
    kinds = {entry.request.order: entry.kind for entry in converted}
    entries = [Scheduled(s.request, 1, kinds.get(s.request.order, s.kind), s.reason) for s in scheduled if kinds]
    return Plan(scheduled=tuple(entries or scheduled), preempted=tuple(preempted), converted=converted, waited=waited)


def may_convert(state: SchedulerState) -> bool:
    """Whether the cache mode has a kind that converts to another of it."""
    return any(kind.converts_to in state.limits.kinds for kind in state.limits.kinds)


def plan_conversion(state: SchedulerState, free: int) -> tuple[Converted, ...]:
    """The oldest request that can be converted, if every running one can then still grow by a page of the new kind.

    `free` are blocks that nobody holds and nobody who decodes takes in this iteration.
    """
    if not may_convert(state):
        return ()
    for request in state.running:
        assert request.table is not None
        kind = request.table.kind.converts_to
        if kind is not None and request.is_decoding and not request.is_exhausted:
            # a page that this step adds is no longer in `free`, as one of the old kind
            extra = state.blocks_needed(request, kind) - request.table.num_blocks - state.blocks_to_grow(request)
            extra += state.shared_blocks(request)  # which stay with the others
            if free - extra >= state.limits.watermark_blocks + kind.blocks_per_page * len(state.running):
                return (Converted(request, Reason.CONVERTED_MEMORY_FREE),)
            return ()
    return ()
