"""Routing by scheduler state: which instances can meet this request's SLO, and which of them has most room.

1. An instance can meet the SLO if the first token is predicted in time (seconds of the prompts queued there, by
   the cost model, and of this one) and if the prompt fits into the blocks that are left when the waiting requests have
   theirs, or that running requests are predicted to give back in a tenth of the remaining time. Among these the one
   with the smallest share of its blocks taken or waited for gets the request; blocks, not requests, are what runs out.
2. If none can, the request is late wherever it goes. Spread evenly, such requests would make every instance late: all
   queues grow, and with them the wait of every later request. So they go to one instance, the fullest, and the others
   meet their SLOs. It is the paper's fallback (late requests must not drag others down), one level higher. That
   instance serves its queue to the end and takes part again as soon as its memory suffices.
"""

import random
from collections.abc import Sequence

from apt_jax.routing.instance import InstanceLoad
from apt_jax.routing.interface import RouteRequest, check_loads
from apt_jax.routing.sent import Sent, Since

WAIT_SHARE = 0.1  # of the time left that a request may wait for blocks; when they come is not known well


class PendingTime:
    """The least occupied instance that can meet the SLO; if none can, the fullest. Ties are broken at random."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)
        self._sent = Sent()

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """The router that attains most SLOs."""
        check_loads(loads)
        kept: list[tuple[float, int]] = []
        shares: list[tuple[float, int]] = []
        for index, load in enumerate(loads):
            since = self._sent.since(load)
            share = occupancy(request, load, since)
            shares.append((share, index))
            if first_token_s(request, load, since) <= request.left_s and has_room(request, load, share):
                kept.append((share, index))
        best = min(kept)[0] if kept else max(shares)[0]
        index = self._random.choice([index for share, index in kept or shares if share == best])
        self._sent.add(loads[index], request)
        return index


def occupancy(request: RouteRequest, load: InstanceLoad, since: Since) -> float:
    """Share of the blocks held or waited for, `request` included; above 1 some request must wait for blocks."""
    return (load.taken_blocks + since.blocks + load.blocks_for(request.prompt_tokens)) / load.total_blocks


def has_room(request: RouteRequest, load: InstanceLoad, share: float) -> bool:
    """Whether the blocks it needs are there, or predicted to be given back in a fraction of the time that is left."""
    lacking = (share - 1) * load.total_blocks
    if lacking <= 0:
        return True
    freed = load.freed_blocks_per_s or 0.0
    return lacking <= freed * WAIT_SHARE * min(request.left_s, request.slo.ttft_s)


def first_token_s(request: RouteRequest, load: InstanceLoad, since: Since) -> float:
    """Predicted seconds until the first token if blocks suffice; 0 where there is no cost model."""
    if load.backlog_s is None or load.token_s is None:
        return 0.0
    return load.backlog_s + (since.prompt_tokens + request.prompt_tokens) * load.token_s
