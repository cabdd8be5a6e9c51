"""Output length learned online from finished requests, given the prompt's length and the tokens generated so far.

Prompts fall into classes by powers of 4. Each class keeps its newest finished output lengths; a query asks for the
mean and spread of the remainder, among past outputs longer than what this request has generated already. With few
samples in a class all classes answer together; before anything has finished there is a prior.

Source: the idea of scheduling by the history's distribution is Gong et al., "Past-Future Scheduler for LLM Serving
under SLA Guarantees" (ASPLOS 2025); conditioning on tokens so far is the mean residual life of survival analysis.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apt_jax.request import FinishReason, Request

WINDOW = 1000  # newest outputs kept per class
ENOUGH = 30  # samples that a class needs to answer by itself
PRIOR_TOKENS = 256.0
Counts = NDArray[np.int64] | NDArray[np.float64]
_CLASS_TOKENS = np.array([16, 64, 256, 1024, 4096])  # a class begins with each
NUM_CLASSES = len(_CLASS_TOKENS) + 1
_GRID = 2.0 ** (np.arange(0, 65) / 4)  # tokens generated so far, up to 65,536


def has_answer(request: Request) -> bool:
    """Whether its length says something of others': not if it was aborted, failed, or was to be embedded or scored."""
    return request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and not request.params.is_prompt_only


class LengthPredictor:
    """Expected remaining output tokens. Deterministic: it depends only on the order of finished requests."""

    def __init__(self, prior_tokens: float = PRIOR_TOKENS):
        self._prior = prior_tokens
        self._samples: list[deque[int]] = [deque(maxlen=WINDOW) for _ in range(NUM_CLASSES)]
        self._all: deque[int] = deque(maxlen=WINDOW)
        self._table = np.full((NUM_CLASSES, len(_GRID)), prior_tokens)
        self._stale = 0

    @property
    def num_finished(self) -> int:
        """Samples kept."""
        return len(self._all)

    def learn(self, request: Request) -> None:
        """Take in a finished request, if it `has_answer`."""
        if has_answer(request):
            self.learn_length(request.num_prompt_tokens, len(request.output_token_ids))

    def learn_length(self, prompt_tokens: int, output_tokens: int) -> None:
        """Take in one finished output."""
        self._samples[int(_classes(prompt_tokens))].append(output_tokens)
        self._all.append(output_tokens)
        self._stale += 1
        if self._stale > len(self._all) // 20:  # often at first, then every 5% of news
            self._rebuild()

    def remaining_tokens(self, prompt_tokens: ArrayLike, generated_tokens: ArrayLike) -> NDArray[np.float64]:
        """Expected tokens still to come, at least 1. Arguments and answer are arrays of one shape."""
        column = np.searchsorted(_GRID[1:], generated_tokens, side="right")  # the last point that is no more
        answer: NDArray[np.float64] = self._table[_classes(prompt_tokens), column]
        return answer

    def remaining_of(
        self, requests: Sequence[Request], prompt_tokens: Counts, generated_tokens: Counts
    ) -> NDArray[np.float64]:
        """`[n]` the same for these requests, whose counts are given."""
        return self.remaining_tokens(prompt_tokens, generated_tokens)

    def _rebuild(self) -> None:
        self._stale = 0
        everything = np.sort(np.array(self._all, np.float64))
        for row, samples in enumerate(self._samples):
            own = np.sort(np.array(samples, np.float64)) if len(samples) >= ENOUGH else everything
            self._table[row] = _residual_life(own, self._prior)


def _classes(prompt_tokens: ArrayLike) -> NDArray[np.int64]:
    """Prompt class: below 16, 64, 256, 1024, 4096 tokens, or more."""
    return np.asarray(np.searchsorted(_CLASS_TOKENS, prompt_tokens, side="right"))


def _residual_life(ordered: NDArray[np.float64], prior: float) -> NDArray[np.float64]:
    """`[grid]` mean of length - generated over `ordered` lengths beyond each grid point; few ones lean on the prior.

    Beyond the longest length seen, half of what was generated is expected to follow: long answers continue.
    """
    suffix = np.append(np.cumsum(ordered[::-1])[::-1], 0.0)
    first = np.searchsorted(ordered, _GRID, side="right")
    count = len(ordered) - first
    guess = np.minimum(prior, np.maximum(_GRID / 2, 1.0))
    weight = 4.0  # the guess counts as much as this many samples
    start = np.where(_GRID < 2, prior, guess)
    return np.asarray(np.maximum((suffix[first] - count * _GRID + weight * start) / (count + weight), 1.0))
