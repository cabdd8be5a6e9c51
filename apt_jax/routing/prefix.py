"""Routing to where a request's first tokens are cached already, as far as an instance can meet the SLO and has room.

The router remembers the prompts that it sent to each instance, in chunks of 64 tokens; what an instance has evicted
since it does not know. A prompt that goes on from the end of an earlier one is the next turn of a conversation: of the
instances that can meet the SLO (`pending_time.py`) and are not much fuller than the emptiest, the one with most of it
cached gets it. An answer is not remembered, but is where the prompt before it is. A prompt that leaves an earlier one
in its middle shares a beginning such as a system prompt, which will soon be cached everywhere: as any new one it goes
to the least occupied, so that conversations are spread.

Source: the approximate prefix tree of SGLang's cache-aware router (sgl-project/sglang, sgl-router/README.md); the
bound on imbalance is one on memory here, since memory is what runs out.
"""

import random
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from apt_jax.routing.instance import InstanceLoad
from apt_jax.routing.interface import RouteRequest, check_loads
from apt_jax.routing.pending_time import first_token_s, has_room, occupancy
from apt_jax.routing.sent import Sent

CHUNK_TOKENS = 64
MOST_CHUNKS = 200_000  # remembered, about 13 million tokens; those used longest ago are forgotten
FULLER = 0.2  # share of its blocks by which an instance may be fuller than the emptiest that can meet the SLO


@dataclass
class _Chunk:
    """The instances that were sent a prompt up to here, and whether any such prompt had a further chunk."""

    instances: set[str] = field(default_factory=set)
    goes_on: bool = False


_NOWHERE = _Chunk()


class Prefix:
    """The least occupied for new prompts, the longest cached prefix for next turns; the fullest for late ones."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)
        self._sent = Sent()
        self._chunks: OrderedDict[Hashable, _Chunk] = OrderedDict()  # by key, used longest ago first

    def choose(self, request: RouteRequest, loads: Sequence[InstanceLoad]) -> int:
        """By what is cached, then by occupancy; ties are broken at random."""
        check_loads(loads)
        keys = chunk_keys(request)
        kept: list[tuple[float, int, int]] = []  # share, tokens not cached, index
        every: list[tuple[float, int, int]] = []
        for index, load in enumerate(loads):
            uncached = self._uncached(request, keys, load)
            since = self._sent.since(load)
            share = occupancy(uncached, load, since)
            every.append((share, uncached.prompt_tokens, index))
            if first_token_s(uncached, load, since) <= request.left_s and has_room(uncached, load, share):
                kept.append(every[-1])
        if kept and self._goes_on(keys):
            limit = min(kept)[0] + FULLER
            rank = min((tokens, share) for share, tokens, _ in kept if share <= limit)
            best = [index for share, tokens, index in kept if (tokens, share) == rank]
        elif kept:
            best = [index for *rank, index in kept if rank == [*min(kept)[:2]]]
        else:
            fullest = max(share for share, _, _ in every)
            best = [index for share, _, index in every if share == fullest]
        index = self._random.choice(best)
        self._sent.add(loads[index], self._uncached(request, keys, loads[index]))
        self._remember(keys, loads[index].instance)
        return index

    def forget(self) -> None:
        """Every instance has forgotten what it was sent."""
        self._chunks.clear()

    def _uncached(self, request: RouteRequest, keys: list[Hashable], load: InstanceLoad) -> RouteRequest:
        """`request` with those prompt tokens only that the instance of `load` was not sent before."""
        chunks = 0
        while chunks < len(keys) and load.instance in self._chunks.get(keys[chunks], _NOWHERE).instances:
            chunks += 1
        return replace(request, prompt_tokens=max(request.prompt_tokens - chunks * CHUNK_TOKENS, 1))

    def _goes_on(self, keys: list[Hashable]) -> bool:
        """Whether an earlier prompt was this one's beginning, up to a part of a chunk."""
        known = 0
        while known < len(keys) and keys[known] in self._chunks:
            known += 1
        return known > 0 and (known == len(keys) or not self._chunks[keys[known - 1]].goes_on)

    def _remember(self, keys: list[Hashable], instance: str) -> None:
        for number, key in enumerate(keys, start=1):
            chunk = self._chunks.setdefault(key, _Chunk())
            chunk.instances.add(instance)
            chunk.goes_on |= number < len(keys)
            self._chunks.move_to_end(key)
        while len(self._chunks) > MOST_CHUNKS:
            self._chunks.popitem(last=False)


def chunk_keys(request: RouteRequest) -> list[Hashable]:
    """A key for each whole chunk of a prompt, of all tokens up to its end and the salt; seldom equal by chance."""
    keys: list[Hashable] = []
    key: Hashable = request.cache_salt
    for at in range(CHUNK_TOKENS, len(request.token_ids) + 1, CHUNK_TOKENS):
        key = hash((key, *request.token_ids[at - CHUNK_TOKENS : at]))
        keys.append(key)
    return keys
