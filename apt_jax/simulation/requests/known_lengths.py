"""Output lengths as known in advance, which no server has: how much predicting them better could bring at most."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from apt_jax.request import Request
from apt_jax.scheduling.length import Counts, LengthPredictor
from apt_jax.simulation.requests.columns import SimulatedRequest


class KnownLengths(LengthPredictor):
    """Answers with what each simulated request will really generate."""

    def remaining_of(
        self, requests: Sequence[Request], prompt_tokens: Counts, generated_tokens: Counts
    ) -> NDArray[np.float64]:
        """`[n]` tokens still to come, at least 1."""
        targets = np.array([cast(SimulatedRequest, request).target_tokens for request in requests], np.float64)
        return np.maximum(targets - generated_tokens, 1.0)
