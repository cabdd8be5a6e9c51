"""Figures of a run of requests beside its attainment, defined once for benchmark, simulator and replay.

Attainment alone hides who pays. A policy can park its misses until arrivals stop, so a rate counts only if the
unfinished requests do not grow (`is_sustained`), and a total can hide a class that keeps nothing (`by_quartile`).
"""

from collections.abc import Sequence

import numpy as np

SUSTAINED_S = 900.0  # of arrivals, without which nobody can say whether a rate lasts
MOST_GROWTH = 0.01  # of unfinished requests, as a share of the offered rate
SAMPLES = 200  # of the second half, through which the slope is fitted


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


def backlog_growth(arrivals_s: Sequence[float], ends_s: Sequence[float], window_s: float) -> float:
    """Requests per second by which the unfinished ones grow over the window's second half (least squares). Pure."""
    times_s = np.linspace(window_s / 2, window_s, SAMPLES)
    return float(np.polyfit(times_s - window_s / 2, unfinished_at(times_s.tolist(), arrivals_s, ends_s), 1)[0])


def is_sustained(arrivals_s: Sequence[float], ends_s: Sequence[float], window_s: float) -> bool | None:
    """Whether the unfinished requests grow by less than 1% of the rate; None if the window is too short. Pure."""
    if window_s < SUSTAINED_S or not arrivals_s:
        return None
    return backlog_growth(arrivals_s, ends_s, window_s) < MOST_GROWTH * len(arrivals_s) / window_s


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
