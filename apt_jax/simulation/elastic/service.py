"""Instances that prefill together and decode apart, under a virtual clock: LoongServe's four steps.

They are taken each time an instance is free:

1. Dispatch: waiting prompts, first come first served, as many as the free memory holds.
2. Instances: those that are idle, and those of decodes whose wait costs less than the prompts gain.
3. Batches: `best_batches`.
4. Scale-down: a prefill leaves its keys and values on the fewest of its instances that hold them and the answer,
   without moving any. Scale-up: a request whose instances are full puts further tokens on another one.

Requests that share an instance decode in one iteration, over all instances that any of them is on. A request for which
no memory is left gives its own back and is computed again.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from apt_jax.simulation.elastic.batching import best_batches, pays_to_take
from apt_jax.simulation.elastic.costs import ElasticCosts
from apt_jax.simulation.workload import Arrival

MOST_PROMPTS = 16  # dispatched at once: the dynamic programming takes n^2 u^2 steps
DECODES_AT_ONCE = 4  # iterations of a group between two looks at the queue


@dataclass(eq=False)
class Served:
    """A request: how far it is, where its tokens are, and when it had its first and its last."""

    arrival: Arrival
    generated: int = 0
    tokens_on: dict[int, int] = field(default_factory=dict)
    first_s: float | None = None
    ended_s: float | None = None

    @property
    def known(self) -> int:
        """Tokens whose keys and values are needed."""
        return self.arrival.prompt_tokens + self.generated

    @property
    def whole(self) -> int:
        """Tokens that it will have in the end."""
        return self.arrival.prompt_tokens + self.arrival.output_tokens


class ElasticService:
    """`instances` of `capacity` tokens each; with `elastic` False a prefill never has more than one instance."""

    def __init__(
        self, costs: ElasticCosts, instances: int, capacity: int, *, elastic: bool = True, mean_output: float = 200.0,
    ):  # fmt: skip
        self._costs, self._elastic, self._mean_output = costs, elastic, mean_output
        self._free = [capacity] * instances
        self._capacity = capacity
        self._busy_s = [0.0] * instances
        self._prefilling = [False] * instances
        self._pending: list[Served] = []
        self._running: list[Served] = []
        self._events: list[tuple[float, int, str, object]] = []
        self._numbers = itertools.count()
        self._now = 0.0
        self.degrees: list[int] = []  # of the prefills
        self.most_decode_instances = 0
        self.num_preempted = self.num_taken = self.num_scaled_up = 0

    def run(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Serve all of them to the end.

        Raises:
            ValueError: one does not fit in all the memory.
        """
        served = [Served(arrival) for arrival in arrivals]
        most = (len(self._free) if self._elastic else 1) * self._capacity
        for each in served:
            if each.whole > most:
                raise ValueError(f"a request of {each.whole} tokens does not fit in {most}; take more instances")
            self._at(each.arrival.arrival_s, "arrive", each)
        while self._events:
            self._now, _, kind, what = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(what)
            if not self._events or self._events[0][0] > self._now:
                self._schedule()
        assert all(each.ended_s is not None for each in served)
        return served

    def _at(self, time_s: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), kind, what))

    def _arrive(self, request: Served) -> None:
        self._pending.append(request)

    def _schedule(self) -> None:
        if self._pending:
            self._prefill()
        self._decode()

    def _prefill(self) -> None:
        """Steps 1 to 4. What is taken from a decode is there when the iteration under way has ended."""
        groups = self._groups()
        decoding = {i for _, instances in groups for i in instances}
        others = [i for i, prefilling in enumerate(self._prefilling) if not prefilling]
        mine = [i for i in others if i not in decoding]
        takable = sorted((i for i in others if i in decoding), key=lambda i: -self._free[i])
        wanted = self._dispatch([*mine, *takable])
        if not wanted:
            return
        lengths = [request.known for request in wanted]
        while takable:
            more = takable.pop(0)
            members = next(len(requests) for requests, instances in groups if more in instances)
            with_s = self._costs.prefill_s(lengths, len(mine) + 1 if self._elastic else 1)
            short = not self._holds(wanted, mine)
            alone_s = self._costs.prefill_s(lengths, len(mine)) if mine and not short else self._wait_s(groups) + with_s
            if not pays_to_take(alone_s, with_s, lengths, members, self._mean_output):
                break
            mine.append(more)
            self.num_taken += 1
            if not self._elastic and self._holds(wanted, mine):
                break
        wanted = self._dispatch(mine)
        if not mine or not wanted:
            return
        limit = len(mine) if self._elastic else 1
        batches = best_batches(
            [request.known for request in wanted], len(mine),
            lambda part, u: self._costs.prefill_s(part, min(u, limit)),
            lambda part, u: u <= limit and self._room(sum(part), mine, u),
        )  # fmt: skip
        by_room = sorted(mine, key=lambda i: -self._free[i])
        for places, count in sorted(batches, key=lambda batch: -sum(wanted[i].known for i in batch[0])):
            taken, by_room = by_room[:count], by_room[count:]
            self._start(([wanted[i] for i in places]), taken)

    def _dispatch(self, instances: Sequence[int]) -> list[Served]:
        """Waiting requests, in order, whose tokens the free memory of these instances holds with their answers."""
        free = sorted((self._free[i] for i in instances), reverse=True)
        room, largest, found = sum(free), free[0] if free else 0, list[Served]()
        for request in self._pending[:MOST_PROMPTS]:
            if request.whole > (room if self._elastic else min(room, largest)):
                break
            room -= request.whole
            found.append(request)
        return found

    def _holds(self, requests: Sequence[Served], instances: Sequence[int]) -> bool:
        return sum(r.whole for r in requests) <= sum(self._free[i] for i in instances)

    def _room(self, tokens: int, instances: Sequence[int], count: int) -> bool:
        return tokens <= sum(sorted((self._free[i] for i in instances), reverse=True)[:count])

    def _wait_s(self, groups: list[tuple[list[Served], set[int]]]) -> float:
        """Seconds until a decode ends by itself, roughly: its shortest rest."""
        rests = []
        for requests, instances in groups:
            step_s = self._step_s(requests, instances)
            rests.append(step_s * min(r.arrival.output_tokens / 2 for r in requests))
        return min(rests, default=0.0)

    def _start(self, requests: list[Served], instances: list[int]) -> None:
        """Step 4: compute prompts, and keep what decodes on the fewest instances."""
        wanted = sum(request.whole for request in requests)
        kept: list[int] = []
        for instance in sorted(instances, key=lambda i: -self._free[i]):
            kept.append(instance)
            if sum(self._free[i] for i in kept) >= wanted:
                break
        for request in requests:
            self._pending.remove(request)
            self._put(request, request.known, kept)
        begin_s = max(self._now, *(self._busy_s[i] for i in instances))
        end_s = begin_s + self._costs.prefill_s([request.known for request in requests], len(instances))
        for instance in instances:
            self._busy_s[instance], self._prefilling[instance] = end_s, True
        self.degrees.append(len(instances))
        self._at(end_s, "prefilled", (requests, instances))

    def _put(self, request: Served, tokens: int, instances: Sequence[int]) -> None:
        """Place tokens: on the first instances that have room."""
        for instance in instances:
            here = min(tokens, self._free[instance])
            if here:
                request.tokens_on[instance] = request.tokens_on.get(instance, 0) + here
                self._free[instance] -= here
                tokens -= here
        assert not tokens

    def _prefilled(self, prefill: tuple[list[Served], list[int]]) -> None:
        requests, instances = prefill
        for instance in instances:
            self._prefilling[instance] = False
        for request in requests:
            request.first_s = request.first_s or self._now
            request.generated += 1
            self._running.append(request)
        self._end(requests)

    def _end(self, requests: Sequence[Served]) -> None:
        for request in requests:
            if request.generated >= request.arrival.output_tokens:
                request.ended_s = self._now
                self._running.remove(request)
                self._give_back(request)

    def _give_back(self, request: Served) -> None:
        for instance, tokens in request.tokens_on.items():
            self._free[instance] += tokens
        request.tokens_on.clear()

    def _groups(self) -> list[tuple[list[Served], set[int]]]:
        """Requests that decode together, since they share instances, and these."""
        groups: list[tuple[list[Served], set[int]]] = []
        for request in self._running:
            mine, own, others = [request], set(request.tokens_on), []
            for requests, instances in groups:
                if instances & own:
                    mine, own = requests + mine, instances | own
                else:
                    others.append((requests, instances))
            groups = [*others, (mine, own)]
        return groups

    def _step_s(self, requests: Sequence[Served], instances: set[int]) -> float:
        on = [sum(request.tokens_on.get(i, 0) for request in requests) for i in instances]
        return self._costs.decode_s(on, len(requests), len(instances))

    def _decode(self) -> None:
        """Start iterations of all groups whose instances have nothing else to do."""
        for requests, instances in self._groups():
            if any(self._busy_s[i] > self._now for i in instances):
                continue
            count = min(DECODES_AT_ONCE, *(r.arrival.output_tokens - r.generated for r in requests))
            grown = [request for request in requests if self._grow(request, count)]
            if not grown:
                continue
            used = {i for request in grown for i in request.tokens_on}
            if any(self._busy_s[i] > self._now for i in used - instances):
                used = instances  # the other one's iteration goes on; tokens are sent when it has ended
            end_s = self._now + count * self._step_s(grown, used)
            self.most_decode_instances = max(self.most_decode_instances, len(used))
            for instance in used:
                self._busy_s[instance] = end_s
            self._at(end_s, "decoded", (grown, count))

    def _grow(self, request: Served, tokens: int) -> bool:
        """Room for further tokens, where it is or on another instance; else it gives its own back, and waits."""
        here = sorted(request.tokens_on, key=lambda i: -self._free[i])
        elsewhere = sorted((i for i in range(len(self._free)) if i not in here), key=lambda i: -self._free[i])
        if sum(self._free[i] for i in here) < tokens and self._elastic:
            here += elsewhere[:1]
            self.num_scaled_up += 1
        if sum(self._free[i] for i in here) < tokens:
            self._running.remove(request)
            self._give_back(request)
            self._pending.insert(0, request)
            self.num_preempted += 1
            return False
        self._put(request, tokens, here)
        return True

    def _decoded(self, iteration: tuple[list[Served], int]) -> None:
        requests, count = iteration
        for request in requests:
            request.generated += count
        self._end(requests)
