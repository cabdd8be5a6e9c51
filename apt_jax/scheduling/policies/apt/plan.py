"""Turns the chosen draft into a `Plan`: what each request computes, which caches become KV, and why the others wait."""

from itertools import compress

import numpy as np

from apt_jax.request import Request
from apt_jax.scheduling.plan import Converted, Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.scheduling.policies.apt.budget import Asked
from apt_jax.scheduling.policies.apt.chunks import share_out
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.queue import Queue
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools

RESERVE_SHARE = 4  # a quarter of the pool stays free for the growth of all when a hidden request is converted to KV


def build_plan(view: View, draft: Draft, asked: Asked | None = None) -> Plan:
    """The plan that carries `draft` out, as far as the prefill budget reaches; `asked` is of `draft`, if known."""
    running = view.running.requests
    converted = _conversions(view, draft)
    chunks: list[Scheduled] = []
    if draft.admitted or draft.prefills.any():
        draft, chunks = share_out(view, draft, asked)
    scheduled = (*_decodes(view, draft, converted), *chunks)
    return Plan(
        scheduled=scheduled,
        preempted=tuple(Preempted(running[i], reason) for i, reason in draft.preempted.items()),
        converted=tuple(Converted(running[i], Reason.CONVERTED_MEMORY_FREE) for i in converted),
        waited=_waited(view, draft),
    )


def _decodes(view: View, draft: Draft, converted: list[int]) -> list[Scheduled]:
    entries, computes = list(view.running.decodes), draft.decodes & draft.stays
    for i in converted:
        assert view.kv_kind is not None
        entries[i] = entries[i]._replace(kind=view.kv_kind)
    return entries if computes.all() else list(compress(entries, computes.tolist()))


def _conversions(view: View, draft: Draft) -> list[int]:
    """Indices of decoding requests to convert, the oldest first; none while anyone waits or has been preempted."""
    limits, pool, kv, hidden = view.state.limits, view.state.pool, view.kv_kind, view.hidden_kind
    if kv is None or hidden is None or hidden.converts_to is not kv or view.rho_s < 0:
        return []
    if not view.options.convert or draft.preempted or len(view.waiting) > len(draft.admitted):
        return []
    if draft.admitted and view.state.prefixes is not None:
        return []  # a newcomer may share pages of one that would be converted
    reserve = max(limits.watermark_blocks, pool.num_blocks // RESERVE_SHARE) + kv.blocks_per_page * len(view.running)
    room = draft.free_blocks - reserve
    if room <= 0:
        return []
    added_per_page = kv.blocks_per_page - hidden.blocks_per_page
    budget = limits.max_num_batched_tokens  # projected tokens, like prefill
    chosen = []
    for i in draft.decode_index[view.running.kind[draft.decode_index] == hidden.index].tolist():
        blocks, tokens = int(view.pages_r[i]) * added_per_page + int(view.shared_r[i]), int(view.running.tokens[i])
        if blocks <= room and tokens <= budget:
            chosen.append(i)
            room -= blocks
            budget -= tokens
    return chosen


def _waited(view: View, draft: Draft) -> tuple[Waited, ...]:
    found, admitted = [], draft.admitted
    if len(view.waiting) > len(admitted):
        left = np.ones(len(view.waiting), np.bool_)
        left[[entry.position for entry in admitted]] = False
        in_time = Reason.WAITS_FOR_BLOCKS if admitted or draft.mixes else Reason.WAITS_FOR_DECODE
        groups = ((left & view.late_w, Reason.WAITS_LATE), (left & ~view.late_w, in_time))
        found += [Waited(_pick(view.waiting, mask), reason) for mask, reason in groups if mask.any()]
    if not draft.decodes.any() and (resting := view.running.decoding & draft.stays).any():
        found.append(Waited(_pick(view.running, resting), Reason.WAITS_FOR_PREFILL))
    return tuple(found)


def _pick(queue: Queue, mask: Bools) -> tuple[Request, ...]:
    return tuple(compress(queue.requests, mask.tolist()))
