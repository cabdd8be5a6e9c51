"""Output length by the outputs of similar prompts: nearest neighbours among finished requests, brute force.

A prompt becomes a vector: the sum over its tokens of pseudo-random directions, one for each token id, rarer tokens
weighing more, at length 1. So the product of two vectors is close to the share of their weighted tokens that they have
in common. Where no finished prompt is near, the history of lengths answers. Source: ALISE (arXiv 2410.23537), which
takes the embeddings of a text encoder and a small network in place of the history.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apt_jax.request import FinishReason, Request
from apt_jax.scheduling.length import Counts, LengthPredictor

WIDTH = 128  # of a vector
DIRECTIONS = 8191  # those of token ids, scattered over them
SCATTER = 2_654_435_761
MOST_PROMPTS = 4096  # kept, the newest
MOST_TOKENS = 512  # of a prompt that are looked at: its last ones, where the question is
NEIGHBOURS = 8
LEAST_SIMILARITY = 0.5  # of a neighbour, in -1..1
ENOUGH = 2  # neighbours


class RetrievalPredictor(LengthPredictor):
    """Asks similar prompts first, and `history` where there is none."""

    def __init__(self, history: LengthPredictor):
        super().__init__()
        self._history = history
        self._vectors = np.zeros((MOST_PROMPTS, WIDTH), np.float32)
        self._lengths = np.zeros(MOST_PROMPTS)
        self._count = 0
        self._seen = np.zeros(DIRECTIONS)  # prompts with each token
        self._own: dict[int, NDArray[np.float64]] = {}  # lengths near each unfinished request, by arrival number
        self._alone: set[int] = set()  # those that have too few
        signs = np.random.default_rng(0).integers(0, 2, (DIRECTIONS, WIDTH)) * 2 - 1
        self._directions = (signs / np.sqrt(WIDTH)).astype(np.float32)

    def learn(self, request: Request) -> None:
        """Take in a finished request."""
        self._own.pop(request.order, None)
        self._alone.discard(request.order)
        self._history.learn(request)
        if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        vector, slots = self._vector(request)
        self._seen[slots] += 1
        place = self._count % MOST_PROMPTS
        self._vectors[place], self._lengths[place] = vector, len(request.output_token_ids)
        self._count += 1

    def remaining_of(
        self, requests: Sequence[Request], prompt_tokens: Counts, generated_tokens: Counts
    ) -> NDArray[np.float64]:
        """`[n]` expected tokens still to come, at least 1: the mean of longer outputs among the neighbours'."""
        answer = np.array(self._history.remaining_of(requests, prompt_tokens, generated_tokens), np.float64)
        for i, request in enumerate(requests):
            if request.order in self._alone:
                continue
            near = self._own.get(request.order)
            if near is None:
                near = self._near(request)
                if len(near) < ENOUGH:
                    self._alone.add(request.order)
                    continue
                self._own[request.order] = near
            if len(longer := near[near > generated_tokens[i]]) >= ENOUGH:
                answer[i] = max(float(longer.mean()) - float(generated_tokens[i]), 1.0)
        return answer

    def _near(self, request: Request) -> NDArray[np.float64]:
        """Output lengths of the most similar finished prompts."""
        kept = min(self._count, MOST_PROMPTS)
        if not kept:
            return np.zeros(0)
        similarity = self._vectors[:kept] @ self._vector(request)[0]
        best = np.argsort(-similarity, kind="stable")[:NEIGHBOURS]
        return self._lengths[best[similarity[best] >= LEAST_SIMILARITY]]

    def _vector(self, request: Request) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """`[WIDTH]` of length 1, and which directions it has."""
        tokens = np.array(request.prompt_token_ids[-MOST_TOKENS:], np.int64)
        slots, counts = np.unique(tokens * SCATTER % DIRECTIONS, return_counts=True)
        weights = np.log1p(counts) * np.log((1 + self._count) / (1 + self._seen[slots]) + 1)
        total = weights.astype(np.float32) @ self._directions[slots]
        length = float(np.linalg.norm(total))
        return total / length if length else total, slots
