"""Output lengths as known in advance, which no server has: how much predicting them better could bring at most.

With an error each request's length is misjudged once and for all by a log-normal factor: a stated stand-in for a
predictor that reads prompts, since simulated ones have no words.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from apt_jax.request import Request
from apt_jax.scheduling.length import Counts, LengthPredictor
from apt_jax.simulation.requests.columns import SimulatedRequest


class KnownLengths(LengthPredictor):
    """Answers with what each simulated request will really generate, times exp(`error` x a standard normal number).

    One that outlives its estimate is expected to go on for a tenth of what it has generated.
    """

    def __init__(self, error: float = 0.0, seed: int = 0):
        super().__init__()
        self._error, self._seed = error, seed
        self._factors: dict[int, float] = {}  # by arrival number

    def remaining_of(
        self, requests: Sequence[Request], prompt_tokens: Counts, generated_tokens: Counts
    ) -> NDArray[np.float64]:
        """`[n]` tokens still to come, at least 1."""
        targets = np.array([cast(SimulatedRequest, request).target_tokens for request in requests], np.float64)
        if not self._error:
            return np.maximum(targets - generated_tokens, 1.0)
        guessed = targets * np.array([self._factor(request.order) for request in requests])
        return np.maximum(np.maximum(guessed - generated_tokens, np.asarray(generated_tokens) / 10), 1.0)

    def _factor(self, order: int) -> float:
        found = self._factors.get(order)
        if found is None:
            drawn = np.random.default_rng((self._seed, order)).standard_normal()
            found = self._factors[order] = float(np.exp(self._error * drawn))
        return found
