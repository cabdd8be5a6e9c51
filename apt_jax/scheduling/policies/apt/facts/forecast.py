"""Will the cache overflow later if a request is admitted now? Expected blocks at a few points of the future.

Each running request is taken to go on with probability exp(-h / r) for h more tokens, r being its predicted
remaining output, and holds its context and those h tokens as long as it does. Requests that arrive later are not
counted: they are admitted under the same test. Since lengths are random, some standard deviations of the sum are kept
free: fewer for requests in time than for late ones, whose admission can wait.
Source: the test itself is Gong et al., "Past-Future Scheduler" (ASPLOS 2025), which takes one sample per length.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apt_jax.scheduling.policies.apt.knapsack.problem import Floats, Ints

HORIZONS = np.array([0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0])  # tokens


def expected_blocks(tokens: Ints, blocks_per_page: Ints, remaining: Floats, block_size: int) -> NDArray[np.float64]:
    """`[n, horizons]` expected blocks of each request, half a page of rounding included. Pure."""
    survives = np.exp(-HORIZONS / remaining[:, None])
    pages = (tokens[:, None] + HORIZONS) / block_size + 0.5
    pages[:, 0] = -(-tokens // block_size)
    return np.asarray(survives * pages * blocks_per_page[:, None])


def moments_of_blocks(
    tokens: Ints, blocks_per_page: Ints, remaining: Floats, block_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`[n, horizons]` expected blocks of each request, as `expected_blocks`, and their variance. Pure."""
    survives = np.exp(-HORIZONS / remaining[:, None])
    exact = (tokens[:, None] + HORIZONS) / block_size
    pages = exact + 0.5
    pages[:, 0] = -(-tokens // block_size)
    per_page = blocks_per_page[:, None]
    return survives * pages * per_page, survives * (1 - survives) * (exact * per_page) ** 2


class Forecast(NamedTuple):
    """`[horizons]` blocks expected to be free, and the variance of what those that run now will hold.

    `margin` and `late_margin` are the standard deviations that stay free when requests in time and late ones come in.
    """

    free: Floats
    variance: Floats
    margin: float
    late_margin: float

    def without(self, expected: Floats, variance: Floats) -> "Forecast":
        """The forecast once running requests that were to hold `expected` blocks have given them back."""
        return self._replace(free=self.free + expected, variance=np.maximum(self.variance - variance, 0.0))

    def rooms(self) -> tuple[list[float], list[float]]:
        """`[horizons]` blocks that one more request may be expected to hold: one in time, and a late one."""
        deviation = np.sqrt(self.variance)
        return (self.free - self.margin * deviation).tolist(), (self.free - self.late_margin * deviation).tolist()

    def after(self, expected: Floats) -> "Forecast":
        """The forecast with that request admitted."""
        return self._replace(free=self.free - expected)
