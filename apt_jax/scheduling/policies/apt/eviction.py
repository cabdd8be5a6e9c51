"""Which running requests give up their memory: those worth least when it runs out, and late ones for others."""

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.knapsack.greedy import solve_greedy
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Ints, Problem


def start_draft(view: View, decodes: Bools, prefills: Bools, *, mixes: bool) -> Draft:
    """A draft with blocks set aside for the growth of those that decode.

    If the blocks do not last, the running requests worth least per block are preempted; those in the lane never.
    """
    pool, seats = view.state.pool, view.state.limits.max_num_seqs - len(view.running)
    need = np.where(decodes, view.need_r, view.held_r)
    growth = int((need - view.held_r).sum())
    if growth <= pool.num_free:
        return Draft(decodes, prefills, mixes, need, pool.num_free - growth, seats)
    dropped = _least_valuable(view, need)
    return Draft(
        decodes, prefills, mixes, need,
        free_blocks=pool.num_blocks - int(need.sum()) + int(need[dropped].sum()),
        seats=seats + len(dropped),
        preempted=dict.fromkeys(dropped.tolist(), Reason.PREEMPTED_LEAST_VALUE),
    )  # fmt: skip


def _least_valuable(view: View, need: Ints) -> Ints:
    """Indices of the running requests that the solver leaves out if each takes `need` blocks of the whole pool."""
    capacity = view.state.pool.num_blocks - int(need[view.lane_r].sum())
    rest = np.flatnonzero(~view.lane_r)
    as_kv = view.running.kind[rest] == CacheKind.KV.index
    problem = Problem(
        pending_s=view.values_r[rest],
        kv_blocks=need[rest] // view.running.blocks_per_page[rest] * CacheKind.KV.blocks_per_page,
        may_be_kv=as_kv,
        may_be_hidden=~as_kv,
        capacity_blocks=capacity,
        num_requests=view.num_counted,
        rho_s=0.0,  # each has its kind already
    )
    return rest[~solve_greedy(problem).is_scheduled]


def late_victims(view: View, draft: Draft) -> Ints:
    """Indices of the late running requests outside the lane, which make room for those in time; the largest first."""
    victims = np.flatnonzero(view.late_r & ~view.lane_r & draft.stays)
    return victims[np.argsort(-draft.claims[victims], kind="stable")]
