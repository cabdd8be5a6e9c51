"""Will the cache overflow later if a request is admitted now? Expected blocks at a few points of the future.

Each running request is taken to go on with probability exp(-h / r) for h more tokens, r being its predicted
remaining output, and holds its context and those h tokens as long as it does. Requests that arrive later are not
counted: they are admitted under the same test.
Source: the test itself is Gong et al., "Past-Future Scheduler" (ASPLOS 2025), which takes one sample per length.
"""

import numpy as np
from numpy.typing import NDArray

from apt_jax.scheduling.policies.apt.knapsack.problem import Floats, Ints

HORIZONS = np.array([0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0])  # tokens


def expected_blocks(tokens: Ints, blocks_per_page: Ints, remaining: Floats, block_size: int) -> NDArray[np.float64]:
    """`[n, horizons]` expected blocks of each request, half a page of rounding included."""
    survives = np.exp(-HORIZONS / remaining[:, None])
    pages = (tokens[:, None] + HORIZONS) / block_size + 0.5
    pages[:, 0] = -(-tokens // block_size)
    return np.asarray(survives * pages * blocks_per_page[:, None])
