"""Admits late requests whose turn in the lane has come, whatever it takes (who is in it: `facts/lateness.py`)."""

from dataclasses import replace

import numpy as np

from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.apt.draft import Admission, Draft
from apt_jax.scheduling.policies.apt.facts.view import View


def admit_lane(view: View, draft: Draft) -> Draft:
    """`draft` with the waiting requests of the lane admitted, in their smallest kind, the oldest first."""
    kind = view.kinds[-1]
    for i in np.flatnonzero(view.lane_w).tolist():
        need = int(view.pages_w[i]) * kind.blocks_per_page
        draft = _make_room(view, draft, need)
        if draft.seats > 0 and need <= draft.free_blocks:
            draft = replace(
                draft,
                admitted=(*draft.admitted, Admission(i, kind, Reason.ADMITTED_LONGEST_LATE)),
                free_blocks=draft.free_blocks - need,
                seats=draft.seats - 1,
            )
    return draft


def _make_room(view: View, draft: Draft, need: int) -> Draft:
    """Preempt running requests outside the lane, the least value per block first, until a seat and `need` are free."""
    if draft.seats > 0 and need <= draft.free_blocks:
        return draft
    free, seats, preempted = draft.free_blocks, draft.seats, dict(draft.preempted)
    for victim in np.argsort(view.values_r / np.maximum(view.need_r, 1), kind="stable").tolist():
        if victim in preempted or view.lane_r[victim]:
            continue
        preempted[victim] = Reason.PREEMPTED_FOR_LONGEST_LATE
        free += int(draft.claims[victim])
        seats += 1
        if seats > 0 and need <= free:
            break
    return replace(draft, preempted=preempted, free_blocks=free, seats=seats)
