"""ALISE: whoever is expected to be done soonest goes first, by the predicted length of its output.

A request's remaining time is that of its prompt, if it is to be computed, and of its predicted tokens, each as long as
a step with its context. Queues have borders at powers of two of that time, and within one the earliest goes first;
waiting lifts a request by a queue for every `age_s`, until it ends (aging). A waiting request takes the memory of
running ones of lower queues, those expected to wait longest for their turn first; with host memory their pages move.

Lengths are found by retrieval among finished prompts (`length_by_retrieval.py`) from when the model has computed a
prompt, before that by the history of lengths; in the simulator, whose prompts have no words, by `--known-lengths` or
the history. Source: arXiv 2410.23537, sections 3 and 4.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apt_jax.cache import CacheKind, per_kind
from apt_jax.ranges import check_finite
from apt_jax.request import Request
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import serve_in_order
from apt_jax.scheduling.policies.papers.length_by_retrieval import RetrievalPredictor
from apt_jax.scheduling.policies.swap_in import SwapIn
from apt_jax.scheduling.state import SchedulerState

LEAST_S = 0.125  # remaining time below which all are in the first queue
FAR = 1024  # tokens of context, at which its cost is measured
UNKNOWN_TOKEN_S = 0.03  # of an output token, and of 100 prompt tokens, without a cost model


@dataclass(frozen=True)
class AliseOptions:
    """Options of `alise`.

    Attributes:
        age_s: seconds of waiting that lift a request by one queue.
        retrieval: ask similar prompts for lengths.
        fetch: pages come back from host memory beside an iteration, after which their request goes on.
    """

    age_s: float = 5.0
    retrieval: bool = True
    fetch: bool = True

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.age_s > 0:
            raise ValueError(f"age_s={self.age_s} must be greater than 0")


class Alise:
    """Order by expected remaining time with aging."""

    Options = AliseOptions
    uses_cost_model = True

    def __init__(self, context: PolicyContext | None = None, options: AliseOptions | None = None):
        self._context, self._options = context or PolicyContext(), options or AliseOptions()
        self._predictor = self._context.predictor
        self.uses_prompt_states = self._options.retrieval and type(self._predictor) is LengthPredictor
        if self.uses_prompt_states:
            self._predictor = RetrievalPredictor(self._predictor)
        self._swap_in = SwapIn(self._options.fetch)
        self._lifts: dict[int, float] = {}  # queues by which each has been lifted, by arrival number
        self._known: dict[int, tuple[int, tuple[float, float, float, float]]] = {}  # of waiting ones, by arrival number

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """Prefill first, then decode; those with most left are preempted first."""
        queue = self._queues(state, now)
        self._swap_in.begin(state, now)

        def key(request: Request) -> tuple[int, int]:
            return queue[request.order], request.order

        return serve_in_order(
            state,
            sorted(state.waiting, key=key),
            sorted(state.running, key=key),
            lambda waiting, running: queue[waiting.order] < queue[running.order],
            swap_in=self._swap_in,
        )

    def finished(self, request: Request, now: float) -> None:
        """Learn its length, and forget it."""
        self._predictor.learn(request)
        self._swap_in.finished(request)
        self._known.pop(request.order, None)
        self._lifts.pop(request.order, None)

    def saw_prompt(self, request: Request, state: NDArray[np.float32]) -> None:
        """The model has computed its prompt: look for prompts like it."""
        assert isinstance(self._predictor, RetrievalPredictor)
        self._predictor.saw_prompt(request, state)

    def _queues(self, state: SchedulerState, now: float) -> dict[int, int]:
        """The queue of each by arrival number: by remaining time, lifted by what it has waited; 0 goes first."""
        waiting, running, progress = state.waiting, state.running, state.running_progress()
        requests = [*waiting, *running]
        seen = np.array([self._seen(r) for r in waiting], np.float64).reshape(-1, 4)
        ran = np.column_stack([progress.prompt_tokens, progress.generated, progress.tokens - progress.computed])
        prompt, generated, uncomputed = np.concatenate([seen[:, :3], ran]).T
        uncomputed[len(waiting) :][progress.is_decoding] = 0
        remaining = self._predictor.remaining_of(requests, prompt, generated)
        prompt_token_s, token_s, context_s = self._times()
        left_s = uncomputed * prompt_token_s + remaining * (token_s + context_s * (prompt + generated + remaining / 2))
        places = np.ceil(np.log2(np.maximum(left_s, LEAST_S) / LEAST_S))
        lifts = ((now - seen[:, 3]) // self._options.age_s).tolist()
        for request, lift in zip(waiting, lifts, strict=True):
            if lift > self._lifts.get(request.order, 0.0):
                self._lifts[request.order] = lift
        if self._lifts:  # also while it runs, or it would give its memory to the next that has waited
            places -= [self._lifts.get(request.order, 0.0) for request in requests]
        return dict(zip((r.order for r in requests), places.astype(np.int64).tolist(), strict=True))

    def _seen(self, request: Request) -> tuple[float, float, float, float]:
        """Prompt, generated and uncomputed tokens of a waiting request, and since when it waits; none of it changes."""
        key, known = request.order, self._known.get(request.order)
        if known is None or known[0] != request.num_preemptions:
            since_s = request.arrival_s if request.last_token_s is None else request.last_token_s
            counts = request.num_prompt_tokens, request.num_generated_tokens, request.num_uncomputed_tokens, since_s
            known = self._known[key] = request.num_preemptions, counts
        return known[1]

    def _times(self) -> tuple[float, float, float]:
        """Seconds of a prompt token, of an output token alone, and of each token of its context (as hidden vectors)."""
        model = self._context.cost_model
        if model is None:
            return UNKNOWN_TOKEN_S / 100, UNKNOWN_TOKEN_S, 0.0

        def decode_s(context: int) -> float:
            contexts = per_kind(lambda kind: context * (kind is CacheKind.HIDDEN))
            counts = per_kind(lambda kind: int(kind is CacheKind.HIDDEN))
            return model.step_s(StepLoad(decode_requests=1, samples=1, context_tokens=contexts, decodes=counts))

        token_s = decode_s(0)
        return model.prompt_token_s, token_s, (decode_s(FAR) - token_s) / FAR
