"""Effective throughput: the highest offered rate whose attainment is at least the target; searched, or interpolated."""

from collections.abc import Callable, Sequence
from itertools import pairwise

START_RATE = 1.0
LOWEST_RATE = 1 / 64
RELATIVE_TOLERANCE = 0.03
MAX_RATE = 4096.0


def effective_throughput(
    reaches: Callable[[float, float], bool],
    targets: Sequence[float],
    *,
    start: float = START_RATE,
    lowest: float = LOWEST_RATE,
    tolerance: float = RELATIVE_TOLERANCE,
) -> dict[float, float]:
    """The rate for each target, within `tolerance`; 0.0 where even `lowest` requests per second miss it.

    Args:
        reaches: `(rate, target)` -> whether attainment at `rate` is at least `target`. It may stop early.
        targets: shares in 0..1. Higher ones are searched first; their rate is a floor for the lower ones.
        start: where to begin; raised or halved until the answer is bracketed, then bisected geometrically.
        lowest: where to give up.
        tolerance: a share of the rate.

    Attainment is taken to fall with the rate, as it does on one arrival pattern stretched in time; where it wobbles,
    the answer is one crossing.
    """
    found: dict[float, float] = {}
    floor = 0.0
    for target in sorted(set(targets), reverse=True):
        low, high = floor, 0.0
        rate = max(start, floor * 1.25)
        while not high:
            if reaches(rate, target):
                low = rate
                rate *= 1.6
                if rate > MAX_RATE:
                    high = low
            else:
                high = rate
        rate = high
        while low == 0.0 and rate > lowest:
            rate /= 2
            if reaches(rate, target):
                low = rate
            else:
                high = rate
        while low and high / low > 1 + tolerance:
            middle = (low * high) ** 0.5
            if reaches(middle, target):
                low = middle
            else:
                high = middle
        found[target] = floor = low
    return found


def interpolated_throughput(points: Sequence[tuple[float, float]], target: float) -> float:
    """The rate at which attainment falls below `target`, linear between those measured; 0.0 if the lowest misses it.

    Args:
        points: rates and their attainment, in order of rate. Where the last still reaches the target, it is the answer.
        target: share in 0..1.
    """
    if not points or points[0][1] < target:
        return 0.0
    for (before, attained), (rate, share) in pairwise(points):
        if share < target:
            return before + (rate - before) * (attained - target) / (attained - share)
    return points[-1][0]
