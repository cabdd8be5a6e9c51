"""Effective throughput in the simulator: searched on a grid of rates, so that the answer does not depend on the start.

Rates are powers of 1.03, to four digits. Where attainment falls with the rate, as it does on one arrival pattern
stretched in time, a search finds the highest rate of the grid that passes, wherever it began; where it wobbles, one
crossing, the same for the same start.
"""

import math
from collections.abc import Generator

RATIO = 1.03
LOWEST, HIGHEST = -140, 281  # numbers of 1/63 and 4,051 requests per second


def rate_of(number: int) -> float:
    """Requests per second of a grid point."""
    return float(f"{RATIO**number:.4g}")


def nearest(rate: float) -> int:
    """The grid point closest to `rate`, within the grid."""
    return min(max(round(math.log(rate) / math.log(RATIO)), LOWEST), HIGHEST) if rate > 0 else LOWEST


def highest(start: int, step: int = 4) -> Generator[int, bool, int | None]:
    """Ask for grid points, be sent whether each passes; the highest that does, None if even the lowest does not.

    Args:
        start: the first one asked for; from it in steps that double, then between the last two by halving.
        step: the first.
    """
    low: int | None = None
    high: int | None = None
    number = min(max(start, LOWEST), HIGHEST)
    while low is None or high is None:
        if (yield number):
            low = number
            if low == HIGHEST:
                return low
            number = min(low + step, HIGHEST)
        else:
            high = number
            if high == LOWEST:
                return None
            number = max(high - step, LOWEST)
        step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if (yield middle):
            low = middle
        else:
            high = middle
    return low
