"""Output length by the outputs of similar prompts: nearest neighbours among finished requests, brute force.

A prompt is its last hidden state in the served model, which the engine hands over when it has computed the prompt
(`PromptReader` in `policies/interface.py`), at length 1; near is a small angle. Requests whose prompt is not computed
yet, or was computed elsewhere, and all of them while few have finished, have the history of lengths. Source: ALISE
(arXiv 2410.23537), which takes the embeddings of a text encoder, and a small network where nothing is near.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apt_jax.request import Request
from apt_jax.scheduling.length import Counts, LengthPredictor, has_answer

MOST_KEPT = 1024  # finished requests, the newest
LEAST_KEPT = 32  # before so many have finished neighbours are no choice
NEIGHBOURS = 8
ENOUGH = 2  # neighbours with longer outputs
TINY = 1e-30


class RetrievalPredictor(LengthPredictor):
    """Asks the neighbours in the model's embedding space first, and `history` where there are none."""

    def __init__(self, history: LengthPredictor):
        super().__init__()
        self._history = history
        self._kept = np.zeros((0, 0), np.float32)  # states of finished requests, at length 1
        self._lengths = np.zeros(MOST_KEPT)  # of their outputs
        self._count = 0
        self._states: dict[int, NDArray[np.float32]] = {}  # of unfinished requests, by arrival number
        self._near: dict[int, NDArray[np.float64]] = {}  # lengths near each of them

    def saw_prompt(self, request: Request, state: NDArray[np.float32]) -> None:
        """Take in the hidden state `[E]` after a request's prompt, which is copied, and find its neighbours."""
        self._states[request.order] = state = state / max(float(np.linalg.norm(state)), TINY)
        kept = min(self._count, MOST_KEPT)
        if kept >= LEAST_KEPT:
            similarity = self._kept[:kept] @ state
            self._near[request.order] = self._lengths[np.argpartition(-similarity, NEIGHBOURS)[:NEIGHBOURS]]

    def learn(self, request: Request) -> None:
        """Take in a finished request; it is a neighbour for others if its prompt's state is known."""
        state = self._states.pop(request.order, None)
        self._near.pop(request.order, None)
        self._history.learn(request)
        if state is None or not has_answer(request):
            return
        if not self._count:
            self._kept = np.zeros((MOST_KEPT, len(state)), np.float32)
        place = self._count % MOST_KEPT
        self._kept[place], self._lengths[place] = state, len(request.output_token_ids)
        self._count += 1

    def remaining_of(
        self, requests: Sequence[Request], prompt_tokens: Counts, generated_tokens: Counts
    ) -> NDArray[np.float64]:
        """`[n]` expected tokens still to come, at least 1: the mean of longer outputs among the neighbours'."""
        answer = np.array(self._history.remaining_of(requests, prompt_tokens, generated_tokens), np.float64)
        if not self._near:
            return answer
        for i, request in enumerate(requests):
            near = self._near.get(request.order)
            if near is not None and len(longer := near[near > generated_tokens[i]]) >= ENOUGH:
                answer[i] = max(float(longer.mean()) - float(generated_tokens[i]), 1.0)
        return answer
