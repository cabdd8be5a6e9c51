"""semi-PD in space: one stream of prompts and one of decodes, each in iterations of its own, on one pool.

Prompts are computed whole and first come first served, together up to `max_tokens`; a prompt is taken when its tokens
fit. A decode that finds no block takes the newest request's, which is computed again (vLLM's rule).
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from apt_jax.request import Slo
from apt_jax.scheduling.policies.papers.semi_pd import SemiPdOptions, Shares
from apt_jax.simulation.spatial.costs import ShareCosts
from apt_jax.simulation.workload import Arrival


@dataclass(eq=False)
class Shared:
    """A request: its SLO, and when its tokens came."""

    arrival: Arrival
    slo: Slo
    times_s: list[float] = field(default_factory=list)
    pages: int = 0
    num_preemptions: int = 0
    full_s: float = 0.0  # before its first token, with the pool full

    @property
    def known(self) -> int:
        """Prompt and generated tokens."""
        return self.arrival.prompt_tokens + len(self.times_s)


class SpatialService:
    """One chip. `pages` are those of its pool, each of `block_size` tokens; `adapts`: whether shares change.

    `counts_memory`: whether the loop takes seconds in which no prompt found room for part of the first tokens' latency,
    as the paper does; no share of the processors changes them.
    """

    def __init__(
        self, costs: ShareCosts, pages: int, *, block_size: int = 16, max_tokens: int = 2048, max_seqs: int = 256,
        options: SemiPdOptions | None = None, adapts: bool = True, counts_memory: bool = True,
    ):  # fmt: skip
        self._costs, self._free, self._size = costs, pages, block_size
        self._max_tokens, self._max_seqs, self._adapts = max_tokens, max_seqs, adapts
        self._counts_memory = counts_memory
        self._full_s = 0.0  # seconds so far in which the first prompt found no room
        self._full_since_s: float | None = None
        self.shares = Shares(options or SemiPdOptions())
        self._waiting: deque[Shared] = deque()
        self._running: list[Shared] = []
        self._prefilling: list[Shared] = []
        self._prefill_s = 0.0  # of the iteration under way
        self._decoding: list[Shared] = []
        self._now = 0.0
        self._events: list[tuple[float, int, str]] = []
        self.num_preemptions = 0
        self.seen_shares: list[float] = []

    def run(self, arrivals: Sequence[Arrival], slo: Slo) -> list[Shared]:
        """Serve all of them to the end."""
        served = [Shared(a, slo if a.terms is None else a.terms.slo) for a in arrivals]
        coming = deque(served)
        while coming or self._events or self._waiting or self._running:
            if coming and (not self._events or coming[0].arrival.arrival_s <= self._events[0][0]):
                self._now = max(self._now, coming[0].arrival.arrival_s)
                self._waiting.append(coming.popleft())
                self._waiting[-1].full_s = -self._full_until_now()
            else:
                self._now, _, kind = heapq.heappop(self._events)
                self._prefilled() if kind == "prefill" else self._decoded()
            self._begin()
        return served

    def _begin(self) -> None:
        share = self.shares.at(self._now) if self._adapts else self.shares.share
        if not self._prefilling:
            self._prefill(share)
        if not self._decoding:
            self._decode(1 - share)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._size)

    def _prefill(self, share: float) -> None:
        tokens, pairs = 0, 0.0
        while self._waiting and len(self._running) + len(self._prefilling) < self._max_seqs:
            request = self._waiting[0]
            pages = self._pages(request.known + 1)
            self._note_full(pages > self._free)
            if pages > self._free or (self._prefilling and tokens + request.known > self._max_tokens):
                break
            self._waiting.popleft()
            self._free -= pages
            request.pages = pages
            self._prefilling.append(request)
            tokens, pairs = tokens + request.known, pairs + request.known * (request.known + 1) / 2
        if not self._prefilling:
            return
        self.seen_shares.append(share)
        count = len(self._prefilling)
        self._prefill_s = self._costs.prefill_s(tokens, pairs, count, share)
        self.shares.computed(self._costs.prefill_s(tokens, pairs, count, 1.0))
        heapq.heappush(self._events, (self._now + self._prefill_s, 0, "prefill"))

    def _full_until_now(self) -> float:
        return self._full_s + (0.0 if self._full_since_s is None else self._now - self._full_since_s)

    def _note_full(self, is_full: bool) -> None:
        self._full_s = self._full_until_now()
        self._full_since_s = self._now if is_full else None

    def _prefilled(self) -> None:
        done, self._prefilling, self._prefill_s = self._prefilling, [], 0.0
        self._running += done
        self._token(done)

    def _decode(self, share: float) -> None:
        for request in list(self._running):
            if request in self._running and self._pages(request.known + 1) > request.pages:
                while not self._free and self._running[-1] is not request:
                    self._preempt(self._running[-1])
                if not self._free:
                    self._preempt(request)
                else:
                    self._free, request.pages = self._free - 1, request.pages + 1
        self._decoding = list(self._running)
        if self._decoding:
            context = sum(request.known for request in self._decoding)
            seconds = self._costs.decode_s(len(self._decoding), context, share, self._prefill_s)
            heapq.heappush(self._events, (self._now + seconds, 1, "decode"))

    def _decoded(self) -> None:
        done, self._decoding = self._decoding, []
        self._token(done)

    def _preempt(self, request: Shared) -> None:
        self._running.remove(request)
        self._free, request.pages = self._free + request.pages, 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.appendleft(request)

    def _token(self, requests: Sequence[Shared]) -> None:
        for request in requests:
            if not request.times_s:
                request.full_s += self._full_until_now()
            request.times_s.append(self._now)
            if len(request.times_s) >= request.arrival.output_tokens:
                self._running.remove(request)
                self._free, request.pages = self._free + request.pages, 0
                first_s = request.times_s[0] - request.arrival.arrival_s
                tpot_s = (self._now - request.times_s[0]) / max(len(request.times_s) - 1, 1)
                counted_s = first_s if self._counts_memory else first_s - request.full_s
                self.shares.ended(counted_s / request.slo.ttft_s, tpot_s / request.slo.tbt_s)
