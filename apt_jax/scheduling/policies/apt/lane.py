"""Admits late requests whose turn in the lane has come, whatever it takes (who is in it: `facts/lateness.py`)."""

from dataclasses import replace

import numpy as np

from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.apt.draft import Admission, Draft
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.price import lane_kind


def admit_lane(view: View, draft: Draft) -> Draft:
    """`draft` with the waiting requests of the lane admitted, in their smallest kind, the oldest first."""
    for i in np.flatnonzero(view.lane_w).tolist():
        kind = lane_kind(view, int(view.pages_w[i]))
        need = int(view.pages_w[i]) * kind.blocks_per_page
        victims = _victims(view, draft, need)
        if victims is None:
            continue
        draft = replace(
            draft,
            preempted={**draft.preempted, **dict.fromkeys(victims, Reason.PREEMPTED_FOR_LONGEST_LATE)},
            admitted=(*draft.admitted, Admission(i, kind, Reason.ADMITTED_LONGEST_LATE, need, victims)),
            free_blocks=draft.free_blocks - need + int(draft.claims[list(victims)].sum()),
            seats=draft.seats - 1 + len(victims),
        )
    return draft


def _victims(view: View, draft: Draft, need: int) -> tuple[int, ...] | None:
    """Whom to preempt, outside the lane, so that a seat and `need` blocks are free; None if that cannot be had.

    Late ones first, then those with most time left, of these the smallest: the first that gives enough, or as many as
    it takes.
    """
    short, seats = need - draft.free_blocks, draft.seats
    if seats > 0 and short <= 0:
        return ()
    outside = np.flatnonzero(~view.lane_r & draft.stays)
    ordered = outside[np.lexsort((draft.claims[outside], -view.slack_r[outside]))].tolist()
    alone = next((victim for victim in ordered if draft.claims[victim] >= short and seats >= 0), None)
    if alone is not None:
        return (alone,)
    for count, given in enumerate(np.cumsum(draft.claims[ordered]).tolist(), 1):
        if given >= short and seats + count > 0:
            return tuple(ordered[:count])
    return None
