"""Routing by what the scheduler knows: the predicted wait for a first token, in seconds."""

import random
from collections.abc import Sequence

from apt_jax.routing.instance import InstanceLoad
from apt_jax.routing.router import RouteRequest, check_loads, register
from apt_jax.routing.sent import Sent, Since

NO_TOKEN_S = 1e-4  # seconds per prompt token where there is no cost model


@register("pending-time")
class PendingTime:
    """The instance where this request's first token is predicted to come first; ties by free memory, then by lot."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)
        self._sent = Sent()

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """The one with the shortest predicted wait."""
        check_loads(loads)
        scores = [self.score(request, load, self._sent.since(load)) for load in loads]
        best = min(scores)
        index = self._random.choice([i for i, score in enumerate(scores) if score == best])
        self._sent.add(loads[index], request)
        return index

    @staticmethod
    def score(request: RouteRequest, load: InstanceLoad, since: Since) -> float:
        """Seconds; smaller is better."""
        token_s = load.token_s or NO_TOKEN_S
        backlog_s = load.queued_tokens * token_s if load.backlog_s is None else load.backlog_s
        wait_s = backlog_s + (since.prompt_tokens + request.prompt_tokens) * token_s
        taken = load.total_blocks - load.free_blocks + load.needed_blocks + since.blocks
        taken += load.blocks_for(request.prompt_tokens)
        return wait_s + taken / load.total_blocks
