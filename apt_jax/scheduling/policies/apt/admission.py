"""Which waiting requests get memory, and as which cache kind: those of the lane first, then by value per block."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from operator import ge
from typing import NamedTuple

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.apt.draft import Admission, Draft
from apt_jax.scheduling.policies.apt.eviction import choose_victims, late_victims
from apt_jax.scheduling.policies.apt.facts.forecast import Forecast
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.knapsack.greedy import solve_greedy
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Ints, Problem
from apt_jax.scheduling.policies.apt.lane import admit_lane
from apt_jax.scheduling.policies.apt.price import allowed_kinds

UNKNOWN_RHO_S = 1e-9  # without a cost model KV is taken to be faster by next to nothing: first choice while it fits
ROUNDING_BLOCKS = 1e-6  # of sums of expected blocks in another order
OFFERS = 64  # waiting requests looked at in one go


def admit(view: View, draft: Draft) -> Draft:
    """`draft` with waiting requests admitted; late running ones make room for those that can be served in time."""
    if not len(view.waiting):
        return draft
    draft = admit_lane(view, draft)
    spare = view.state.limits.watermark_blocks if draft.runs_any else 0
    victims = late_victims(view, draft)
    capacity = draft.free_blocks - spare + int(draft.claims[victims].sum())
    if capacity < view.least_blocks_per_page:
        return draft
    forecast = _forecast(view, draft)
    if not _may_admit(view, draft, forecast, spare, victims):
        return draft
    order, is_hidden = _solve(view, draft, capacity, preempts=bool(draft.preempted or len(victims)))
    return _take(view, draft, order, is_hidden, spare, victims, forecast)


def may_fit(view: View, draft: Draft, spare: int, victims: Ints) -> Bools:
    """`[waiting]` whether there would be blocks and a seat for each alone, one in time with all victims gone."""
    room = draft.free_blocks - spare
    most = room + int(draft.claims[victims].sum())
    for_late, in_time = room if draft.seats > 0 else -1, most if draft.seats + len(victims) > 0 else -1
    pages_w = _pages_to_admit(view, preempts=bool(draft.preempted or len(victims)))
    fits = pages_w * view.least_blocks_per_page <= np.where(view.late_w, for_late, in_time)
    return fits & ~view.lane_w


def _may_admit(view: View, draft: Draft, forecast: Forecast | None, spare: int, victims: Ints) -> bool:
    """Whether anyone might be admitted, in whatever order they are offered; False is certain, True is not.

    Each waiting request is tried alone, in its smallest kind; one in time with all victims gone.
    """
    late, fits = view.late_w, may_fit(view, draft, spare, victims)
    if not fits.any():
        return False
    if forecast is None or not (draft.admitted or len(view.running) > len(draft.preempted) + len(victims)):
        return True
    roomy = forecast
    if len(victims):
        roomy = forecast.without(view.expected_r(victims).sum(axis=0), view.variance_r(victims).sum(axis=0))
    index = np.flatnonzero(fits)
    expected = view.expected_w(index, np.full(len(index), view.least_blocks_per_page))
    rooms = np.where(late[index, None], forecast.rooms()[1], roomy.rooms()[0])
    return bool((expected <= rooms + ROUNDING_BLOCKS).all(axis=1).any())


def _pages_to_admit(view: View, *, preempts: bool) -> Ints:
    """`[waiting]` pages that each takes of what is free.

    Cached pages that running requests hold cost nothing, unless the plan `preempts` and so may give them back.
    """
    return view.pages_w if preempts else view.pages_w - view.held_pages_w


def _solve(view: View, draft: Draft, capacity: int, *, preempts: bool) -> tuple[Ints, Bools]:
    """Waiting requests to admit into `capacity` blocks, best first, and whether as hidden.

    Of those with the same value per block the ones with more of their prompt in the cache, then the earlier ones.
    """
    candidates = np.flatnonzero(~view.lane_w)
    if view.cached_w.any():
        candidates = candidates[np.argsort(-view.cached_w[candidates], kind="stable")]
    kv_block_s = (view.rho_s or UNKNOWN_RHO_S) * view.block_size / CacheKind.KV.blocks_per_page
    kv_blocks = CacheKind.KV.blocks_per_page * _pages_to_admit(view, preempts=preempts)[candidates]
    may_be_kv, may_be_hidden = allowed_kinds(view, draft, candidates)
    values = view.values_w[candidates]
    if view.is_hybrid and not draft.runs_any:  # one that can only be hidden delays nobody: it must not wait for value
        values = values + np.where(may_be_kv, 0.0, view.num_counted * kv_block_s * kv_blocks)
        values = np.maximum(values, 0.0)  # the solver adds what hidden tokens save, where they cost less than in KV
    problem = Problem(
        pending_s=values,
        kv_blocks=kv_blocks,
        may_be_kv=may_be_kv,
        may_be_hidden=may_be_hidden,
        capacity_blocks=capacity,
        num_requests=view.num_counted,
        rho_s=kv_block_s if view.is_hybrid else 0.0,  # no choice, no penalty
    )
    solution = solve_greedy(problem)
    return candidates[solution.order], solution.is_hidden[solution.order]


class _Offer(NamedTuple):
    """A waiting request that the solver would admit.

    `least_blocks` is the fewest that it or any later offer needs, `any_in_time` whether one of them is not late;
    `expected` are its `[horizons]` expected blocks, None without prediction.
    """

    position: int
    is_hidden: bool
    blocks: int
    least_blocks: int
    is_late: bool
    any_in_time: bool
    expected: list[float] | None


def _take(
    view: View, draft: Draft, order: Ints, is_hidden: Bools, spare: int, late_running: Ints, forecast: Forecast | None
) -> Draft:
    """Admit in order while seats, blocks and the forecast allow; late running requests make room if it is used."""
    rooms = None if forecast is None else forecast.rooms()
    victims = late_running.tolist()
    preempted, admitted = dict(draft.preempted), list(draft.admitted)
    room, seats, fit = draft.free_blocks - spare, draft.seats, view.options.fit_victims
    for offer in _offers(view, order, is_hidden, preempts=bool(preempted or victims)):
        if (seats <= 0 or room < offer.least_blocks) and not (victims and offer.any_in_time):
            break
        chosen: tuple[int, ...] | None = ()  # victims that this one needs
        if offer.blocks > room or seats <= 0:
            chosen = None if offer.is_late else choose_victims(draft, victims, offer.blocks - room, seats, fit=fit)
        if chosen is None:
            continue
        if forecast is not None and rooms is not None and offer.expected is not None:
            later, left = forecast, rooms
            if chosen:
                gone = np.array(chosen)
                later = forecast.without(view.expected_r(gone).sum(axis=0), view.variance_r(gone).sum(axis=0))
                left = later.rooms()
            others = bool(admitted) or len(view.running) > len(preempted) + len(chosen)
            if others and not all(map(ge, left[offer.is_late], offer.expected)):
                continue
            forecast = later.after(np.array(offer.expected))
            rooms = forecast.rooms()
        victims = [victim for victim in victims if victim not in chosen]
        preempted.update(dict.fromkeys(chosen, Reason.PREEMPTED_LATE))
        room += sum(int(draft.claims[victim]) for victim in chosen) - offer.blocks
        seats += len(chosen) - 1
        kind = view.hidden_kind if offer.is_hidden else view.kv_kind
        assert kind is not None
        admitted.append(Admission(offer.position, kind, _reason(view, kind, offer.is_late), offer.blocks, chosen))
    return replace(draft, preempted=preempted, admitted=tuple(admitted), free_blocks=room + spare, seats=seats)


def _offers(view: View, order: Ints, is_hidden: Bools, *, preempts: bool) -> Iterator[_Offer]:
    """What `_take` must know of each waiting request, computed in slices: it seldom gets far."""
    per_page = np.where(is_hidden, CacheKind.HIDDEN.blocks_per_page, CacheKind.KV.blocks_per_page)
    blocks, late = _pages_to_admit(view, preempts=preempts)[order] * per_page, view.late_w[order]
    least = np.minimum.accumulate(blocks[::-1])[::-1]
    any_in_time = np.logical_or.accumulate(~late[::-1])[::-1]
    for first in range(0, len(order), OFFERS):
        part = slice(first, first + OFFERS)
        columns = [column[part].tolist() for column in (order, is_hidden, blocks, least, late, any_in_time)]
        predicted = view.remaining_w is not None
        expected = view.expected_w(order[part], per_page[part]).tolist() if predicted else repeat(None)
        yield from map(_Offer._make, zip(*columns, expected, strict=False))


def _forecast(view: View, draft: Draft) -> Forecast | None:
    """With the requests that stay and the lane's; None without prediction."""
    if view.remaining_r is None:
        return None
    staying = np.flatnonzero(draft.stays)
    expected = view.expected_r(staying).sum(axis=0)
    expected = expected - view.repeated_r(staying, expected)
    if draft.admitted:
        index = np.array([entry.position for entry in draft.admitted])
        per_page = np.array([entry.kind.blocks_per_page for entry in draft.admitted])
        expected = expected + view.expected_w(index, per_page).sum(axis=0)
    free = view.state.pool.num_blocks - view.state.limits.watermark_blocks - expected
    return Forecast(free, view.variance_r(staying).sum(axis=0), view.options.margin, view.options.late_margin)


def _reason(view: View, kind: CacheKind, late: bool) -> Reason:
    if late:
        return Reason.ADMITTED_LATE
    if not kind.is_projected:
        return Reason.ADMITTED_KV
    if not view.is_hybrid:
        return Reason.ADMITTED_HIDDEN
    return Reason.ADMITTED_HIDDEN_FASTER if view.rho_s < 0 else Reason.ADMITTED_HIDDEN_SERVES_MORE
