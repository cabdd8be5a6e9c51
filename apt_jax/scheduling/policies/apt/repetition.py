"""For how many iterations a plan in which all running requests decode is made again, so that nobody need make it.

Between two arrivals or ends little changes: those that run grow, and time passes. A plan stays until someone becomes
late or may enter the lane, or until the forecast would let a waiting request in. What is said is certain; where it
cannot be, nothing is.
"""

import numpy as np

from apt_jax.scheduling.policies.apt.admission import ROUNDING_BLOCKS, may_fit
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.eviction import late_victims
from apt_jax.scheduling.policies.apt.facts.forecast import moments_of_blocks
from apt_jax.scheduling.policies.apt.facts.queue import Queue
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints
from apt_jax.scheduling.policies.interface import Repeat

ROUNDING_S = 1e-6
LOOK_AHEAD = 8  # iterations, while someone waits


def repeat_of(view: View, draft: Draft) -> Repeat | None:
    """How long the plan of `draft`, a token for every running request, would be made again."""
    through_ends = not len(view.waiting) and not _may_convert(view)
    if view.options.fallback != "aging":  # nothing is remembered of who is late
        return None if len(view.waiting) else Repeat(through_ends=through_ends)
    running, late = view.running, view.late_r
    if (running.late_gaps.astype(np.bool_) & ~late).any():
        return None  # fewer tokens may be expected after one more, and then that gap is not forgiven
    gap_s = min(running.tbt_slo_s.min(initial=np.inf), running.stall_slo_s.min(initial=np.inf))
    until_s = min(_patient_until_s(view, running, late & ~view.lane_r), _patient_until_s(
        view, view.waiting, view.late_w & ~view.lane_w))  # fmt: skip
    if not len(view.waiting):
        return Repeat(until_s, gap_s, through_ends=through_ends and not late.any())
    if draft.preempted or view.lane_w.any() or view.remaining_r is None or not view.options.mixed:
        return None
    iterations = _nobody_fits_for(view, draft)
    return Repeat(min(until_s, _in_time_until_s(view)), gap_s, iterations) if iterations else None


def _may_convert(view: View) -> bool:
    """Whether a running request could be converted to KV, if memory became free."""
    hidden = view.hidden_kind
    if not view.is_hybrid or view.rho_s < 0 or not view.options.convert or hidden is None:
        return False
    return bool((view.running.kind == hidden.index).any())


def _patient_until_s(view: View, queue: Queue, outside: Bools) -> float:
    """When the first of those late ones outside the lane has been patient; those that had been are shut out by it."""
    times_s = queue.arrival_s[outside] + view.options.patience_s - ROUNDING_S
    return float(times_s[times_s >= view.now - 2 * ROUNDING_S].min(initial=np.inf))


def _in_time_until_s(view: View) -> float:
    """When the first waiting request becomes late, or is without a token for longer than its gap SLO."""
    waiting, in_time = view.waiting, ~view.late_w
    due_s = (waiting.since_s + waiting.limit_s - view.prefill_s(waiting))[in_time]
    gap_s = (waiting.since_s + waiting.tbt_slo_s)[in_time & waiting.started]
    return float(min(due_s.min(initial=np.inf), gap_s[gap_s > view.now].min(initial=np.inf))) - ROUNDING_S


def _nobody_fits_for(view: View, draft: Draft) -> int:
    """Further iterations in which no waiting request is admitted, whatever the order, for want of blocks to come.

    Free blocks only shrink meanwhile, so those that lack them now go on lacking them.
    """
    if view.state.prefixes is not None and view.state.prefixes.num_shared:
        return 0  # `_rooms` counts shared pages for each request
    victims = late_victims(view, draft)
    index = np.flatnonzero(may_fit(view, draft, view.state.limits.watermark_blocks, victims))
    if not len(index):
        return LOOK_AHEAD
    if len(victims) == len(view.running):
        return 0  # one that is alone need not fit for long
    expected = view.expected_w(index, np.full(len(index), view.least_blocks_per_page))
    for_late, in_time = _rooms(view, victims)
    rooms = np.where(view.late_w[index, None], for_late[:, None], in_time[:, None])
    fits = (expected <= rooms + ROUNDING_BLOCKS).all(axis=2).any(axis=1)
    return int(np.argmax(fits)) if fits.any() else LOOK_AHEAD


def _rooms(view: View, victims: Ints) -> tuple[Floats, Floats]:
    """`[iterations, horizons]` blocks that a late request may be expected to hold, and one in time, if it came next.

    Of the next iterations, in each of which all running requests have one more token; in time with all victims gone.
    """
    running, n = view.running, len(view.running)
    ahead = np.repeat(np.arange(1, LOOK_AHEAD + 1), n)
    prompt, generated = np.tile(running.prompt_tokens, LOOK_AHEAD), np.tile(running.generated, LOOK_AHEAD) + ahead
    remaining = view.context.predictor.remaining_of(list(running.requests) * LOOK_AHEAD, prompt, generated)
    per_page = np.tile(running.blocks_per_page, LOOK_AHEAD)
    moments = moments_of_blocks(prompt + generated, per_page, remaining, view.block_size)
    expected, variance = (each.reshape(LOOK_AHEAD, n, -1) for each in moments)
    blocks = view.state.pool.num_blocks - view.state.limits.watermark_blocks
    for_late = blocks - expected.sum(axis=1) - view.options.late_margin * np.sqrt(variance.sum(axis=1))
    if len(victims):
        expected, variance = np.delete(expected, victims, axis=1), np.delete(variance, victims, axis=1)
    return for_late, blocks - expected.sum(axis=1) - view.options.margin * np.sqrt(variance.sum(axis=1))
