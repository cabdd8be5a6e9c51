"""Turns the chosen draft into a `Plan`: what each request computes, and why the others wait."""

from itertools import compress

import numpy as np

from apt_jax.request import Request
from apt_jax.scheduling.plan import Converted, Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.scheduling.policies.apt.chunks import share_out
from apt_jax.scheduling.policies.apt.conversion import conversions
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.ledger import Queue
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools


def build_plan(view: View, draft: Draft) -> Plan:
    """The plan that carries `draft` out, as far as the prefill budget reaches."""
    running = view.running.requests
    converted = conversions(view, draft)
    chunks: list[Scheduled] = []
    if draft.admitted or draft.prefills.any():
        draft, chunks = share_out(view, draft)
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
