"""Which running requests give up their memory: those worth least when it runs out, and late ones for others."""

from collections.abc import Sequence

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.knapsack.greedy import solve_greedy
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Ints, Problem


def start_draft(view: View, decodes: Bools, prefills: Bools, *, mixes: bool) -> Draft:
    """A draft with blocks set aside for the growth of those that decode.

    If the blocks do not last, the running requests worth least per block are preempted; those in the lane only if it
    outgrows the pool by itself, the newest first.
    """
    pool, seats = view.state.pool, view.state.limits.max_num_seqs - len(view.running)
    need = np.where(decodes, view.need_r, view.held_r)
    growth, claims = int((need - view.held_r).sum()), need - view.shared_r
    if growth <= pool.num_free:
        return Draft(decodes, prefills, mixes, claims, pool.num_free - growth, seats)
    capacity = pool.num_blocks - (0 if view.state.prefixes is None else view.state.prefixes.num_shared)
    sent_back = _outgrowing(view, claims, capacity)
    dropped = np.concatenate([_least_valuable(view, claims, capacity), sent_back])
    reasons = dict.fromkeys(dropped.tolist(), Reason.PREEMPTED_LEAST_VALUE)
    return Draft(
        decodes, prefills, mixes, claims,
        free_blocks=capacity - int(claims.sum()) + int(claims[dropped].sum()),
        seats=seats + len(dropped),
        preempted=reasons | dict.fromkeys(sent_back.tolist(), Reason.PREEMPTED_FOR_LONGEST_LATE),
    )  # fmt: skip


def _outgrowing(view: View, claims: Ints, capacity: int) -> Ints:
    """Indices of the newest in the lane without which the others of it find room in `capacity` blocks."""
    lane = np.flatnonzero(view.lane_r)
    return lane[np.cumsum(claims[lane]) > capacity]


def _least_valuable(view: View, claims: Ints, capacity: int) -> Ints:
    """Indices of the running requests that the solver leaves out if each takes `claims` of `capacity` blocks."""
    capacity = max(capacity - int(claims[view.lane_r].sum()), 0)
    claims = np.maximum(claims, view.running.blocks_per_page)  # also where everything is shared
    rest = np.flatnonzero(~view.lane_r)
    as_kv = view.running.kind[rest] == CacheKind.KV.index
    problem = Problem(
        pending_s=view.values_r[rest],
        kv_blocks=claims[rest] // view.running.blocks_per_page[rest] * CacheKind.KV.blocks_per_page,
        may_be_kv=as_kv,
        may_be_hidden=~as_kv,
        capacity_blocks=capacity,
        num_requests=view.num_counted,
        rho_s=0.0,  # each has its kind already
    )
    return rest[~solve_greedy(problem).is_scheduled]


def late_victims(view: View, draft: Draft) -> Ints:
    """Indices of the late running requests outside the lane, which make room for those in time.

    The smallest first; without `fit_victims` the largest.
    """
    victims = np.flatnonzero(view.late_r & ~view.lane_r & draft.stays)
    claims = draft.claims[victims]
    return victims[np.argsort(claims if view.options.fit_victims else -claims, kind="stable")]


def choose_victims(
    draft: Draft, victims: Sequence[int], short_blocks: int, seats: int, *, fit: bool = True
) -> tuple[int, ...] | None:
    """Which of `victims`, from `late_victims`, are preempted for one request: as little as possible is computed twice.

    Args:
        draft: says what each gives back.
        victims: indices of running requests.
        short_blocks: blocks that the request lacks.
        seats: requests that may still be admitted.
        fit: as `fit_victims` of the options; otherwise they are taken in order.

    Returns: the smallest one that gives enough, after the largest ones where none does; None if all are too few.
    """
    left, chosen = list(victims), []
    while short_blocks > 0 or seats <= 0:
        if not left:
            return None
        enough = (k for k, victim in enumerate(left) if draft.claims[victim] >= short_blocks)
        chosen.append(left.pop(next(enough, len(left) - 1) if fit else 0))
        short_blocks -= int(draft.claims[chosen[-1]])
        seats += 1
    return tuple(chosen)
