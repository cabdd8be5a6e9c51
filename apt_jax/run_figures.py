"""Figures of a run of requests beside its attainment, defined once for benchmark, simulator and replay.

Attainment alone hides who pays. A policy can park its misses until arrivals stop, so a rate counts only if the
unfinished requests do not grow (`is_sustained`), and a total can hide a class that keeps nothing (`by_quartile`).
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SUSTAINED_S = 900.0  # of arrivals, without which nobody can say whether a rate lasts
MOST_GROWTH = 0.01  # of unfinished requests, as a share of the offered rate
SHORTEST_SHARE = 0.9  # of SUSTAINED_S, that the last arrival may come after
PARTS = 10  # of the second half, through whose means the slope is fitted
T_95 = 1.86  # 95% of Student's t with PARTS - 2 degrees of freedom lie below


def unfinished_at(times_s: Sequence[float], arrivals_s: Sequence[float], ends_s: Sequence[float]) -> list[int]:
    """Requests that have arrived and not ended at each of `times_s`. Pure.

    `ends_s` has an entry for each request, whatever it ended with: its last token, a refusal, an error; infinity if it
    never did. What arrives or ends at the very moment has.
    """
    arrived = np.searchsorted(np.sort(arrivals_s), times_s, side="right")
    ended = np.searchsorted(np.sort(ends_s), times_s, side="right")
    return [int(count) for count in arrived - ended]


def backlog_by_quarter(arrivals_s: Sequence[float], ends_s: Sequence[float], window_s: float) -> list[int]:
    """Unfinished requests after each quarter of the `window_s` seconds in which requests arrive. Pure."""
    return unfinished_at([window_s * quarter / 4 for quarter in (1, 2, 3, 4)], arrivals_s, ends_s)


def backlog_growth(arrivals_s: Sequence[float], ends_s: Sequence[float], window_s: float) -> tuple[float, float]:
    """Requests per second by which unfinished ones grow over the window's second half, and the standard error. Pure.

    Least squares through the means of ten equal parts of that half. A part is long against the time that a request
    stays, so what is left over after the line is nearly independent from part to part, and its size says how far
    chance moves the slope; neighbouring counts of single moments are not independent and would not.
    """
    edges = np.linspace(window_s / 2, window_s, PARTS + 1)
    starts, ends = np.asarray(arrivals_s, np.float64), np.asarray(ends_s, np.float64)
    spent = [
        np.clip(np.minimum(ends, last) - np.maximum(starts, first), 0, None).sum() for first, last in pairwise(edges)
    ]
    means, times = np.array(spent) / np.diff(edges), (edges[:-1] + edges[1:]) / 2
    centred = times - times.mean()
    slope = float((centred * means).sum() / (centred**2).sum())
    left = means - means.mean() - slope * centred
    return slope, float(np.sqrt((left**2).sum() / (PARTS - 2) / (centred**2).sum()))


def is_sustained(arrivals_s: Sequence[float], ends_s: Sequence[float], window_s: float) -> bool | None:
    """Whether the unfinished requests grow by less than 1% of the rate; None if the window is too short. Pure.

    A rate does not last if they grow by more with 95% confidence: a flat backlog that wavers is no growth. The last
    arrival of `SUSTAINED_S` seconds of random arrivals may come a little before their end.
    """
    if window_s < SHORTEST_SHARE * SUSTAINED_S or not arrivals_s:
        return None
    slope, error = backlog_growth(arrivals_s, ends_s, window_s)
    return slope - T_95 * error < MOST_GROWTH * len(arrivals_s) / window_s


def by_quartile(lengths: Sequence[int], strictly: Sequence[bool], kept: Sequence[bool]) -> list[dict[str, float]]:
    """Attainment of the requests of each quartile of `lengths`, shortest first. Pure.

    Each entry has its shortest and longest length, the number of requests, and the shares that attained their SLO
    strictly and as the paper reads it. Equal lengths are in one quartile, so some may be missing.
    """
    of = np.asarray(lengths)
    if not len(of):
        return []
    limits = np.quantile(of, [0.25, 0.5, 0.75], method="lower")
    numbers = np.searchsorted(limits, of, side="left")
    found = []
    for number in range(4):
        members = np.flatnonzero(numbers == number)
        if len(members):
            found.append(
                {
                    "from_tokens": int(of[members].min()),
                    "to_tokens": int(of[members].max()),
                    "requests": len(members),
                    "strict_attainment": float(np.asarray(strictly)[members].mean()),
                    "attainment": float(np.asarray(kept)[members].mean()),
                }
            )
    return found
