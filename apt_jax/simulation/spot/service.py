"""A service on machines that come and go, under a virtual clock: groups are the simulator's instances.

Reactions to a machine that is taken away:

* `move` (SpotServe): on the notice a formation for the machines that stay is chosen, and what has to move is matched so
  that it is least. The groups go on until the grace period minus the move is over, then hand over weights and cache:
  requests go on where they were. `unmatched` is the same without the matching; `tokens` moves no cache.
* `restart`: once machines are gone or have come, the best formation starts from storage; requests compute again.
* `reroute`: groups of one degree. One that loses a machine is gone, and its requests compute again in others; its other
  machines wait until there are enough for a group, which loads from storage.

Everywhere the front has every token that was sent, so none is generated twice.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from apt_jax.cache import BlockTable, CacheKind
from apt_jax.request import SamplingParams, Slo
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.prefix_pool import PrefixPool
from apt_jax.simulation.instance import Instance
from apt_jax.simulation.requests.columns import SimulatedRequest
from apt_jax.simulation.spot.placement import Formation, Move, inherit, least_movement
from apt_jax.simulation.spot.shapes import BLOCK_SIZE, Model, Shape
from apt_jax.simulation.spot.trace import GRACE_S, Trace
from apt_jax.simulation.workload import Arrival

Reaction = Literal["move", "unmatched", "tokens", "restart", "reroute"]
_PARAMS = SamplingParams(max_tokens=None)
_MAX_LEN = 2048
_SLO = Slo(1.0, 1.0)


@dataclass
class Record:
    """A request as its client sees it."""

    arrival: Arrival
    first_id: int
    count: int = 0  # tokens that came before it was entered where it is now
    last_s: float | None = None  # when the last of these came
    parts: list[SimulatedRequest] = field(default_factory=list)  # what it was entered as, one group after the other

    @property
    def left(self) -> int:
        """Tokens to come, of those that were to come when it was entered."""
        return self.arrival.output_tokens - self.count

    def take(self) -> None:
        """Note the tokens that came since it was entered."""
        request = self.parts[-1]
        self.count += request.num_generated_tokens - request.num_inflight_tokens
        self.last_s = request.last_token_s or self.last_s

    def times_s(self) -> list[float]:
        """When each of its tokens came."""
        found: list[float] = []
        for request in self.parts:
            assert request.columns is not None
            found += request.columns.times_s(request.order).tolist()
        return found


@dataclass
class Group:
    """An instance on machines, which serves from `ready_s` on."""

    instance: Instance
    machines: tuple[int, ...]
    ready_s: float
    records: dict[str, Record] = field(default_factory=dict)  # unfinished, by the id of the request
    ends_s: float = 0.0  # when the iteration under way ends


class Service:
    """Serves arrivals over a trace; `run` gives the records."""

    def __init__(
        self, model: Model, trace: Trace, reaction: Reaction, rate: float, *, policy: str = "sarathi", degree: int = 4,
        grace_s: float = GRACE_S,
    ):  # fmt: skip
        self._model, self._trace, self._reaction, self._rate = model, trace, reaction, rate
        self._policy, self._degree, self._grace_s = policy, degree, grace_s
        self._events: list[tuple[float, int, str, object]] = []
        self._calls: list[float] = []  # times of events that are no group's own
        self._numbers = itertools.count()
        self._machines: list[int] = []  # that are there
        self._leaving: set[int] = set()  # of these, that have notice
        self._groups: list[Group] = []
        self._waiting: list[Record] = []  # without a group
        self._names = itertools.count()
        self._due_s: float | None = None  # when the groups are to stop, to form anew
        self._now = 0.0
        self.moved_bytes = self.paused_s = 0.0
        self.num_formed = 0
        self.recomputed_tokens = 0

    def run(self, arrivals: Sequence[Arrival]) -> list[Record]:
        """Serve all of them."""
        records = [Record(arrival, (1 + i) * _MAX_LEN) for i, arrival in enumerate(arrivals)]
        for record in records:
            self._at(record.arrival.arrival_s, "arrive", record)
        for change in self._trace.changes:
            self._at(change.time_s, "change", change)
            if change.gone and self._reaction in ("move", "unmatched", "tokens"):
                self._at(max(change.time_s - self._grace_s, 0.0), "notice", change)
        while self._events:
            self._now, _, kind, what = heapq.heappop(self._events)
            if kind != "step":
                heapq.heappop(self._calls)
            getattr(self, f"_{kind}")(what)
        assert all(not record.left for record in records), "machines were left without anybody to serve"
        return records

    def _at(self, time_s: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), kind, what))
        if kind != "step":  # iterations of a group concern nobody else
            heapq.heappush(self._calls, time_s)

    def _arrive(self, record: Record) -> None:
        is_stopping = self._due_s is not None and self._now >= self._due_s
        if is_stopping or not self._groups:
            self._waiting.append(record)
            return
        ready = [group for group in self._groups if group.ready_s <= self._now] or self._groups
        self._enter(record, min(ready, key=lambda group: group.instance.state.num_unfinished))

    def _enter(self, record: Record, group: Group, cached: bool = False) -> None:
        """Queue what is left of a request; with `cached` its pages are there, as far as blocks are free."""
        known = record.arrival.prompt_tokens + record.count
        request = SimulatedRequest(
            request_id=f"{record.first_id}-{next(self._numbers)}",
            prompt_token_ids=range(record.first_id, record.first_id + known),
            params=_PARAMS,
            arrival_s=record.arrival.arrival_s if record.last_s is None else record.last_s,
            max_new_tokens=_MAX_LEN - known,
            slo=_SLO,
        )
        request.target_tokens, request.first_output_id = record.left, record.first_id + known
        record.parts.append(request)
        pages = self._restore(request, group, known) if cached else 0
        if record.count:
            self.recomputed_tokens += known - pages * BLOCK_SIZE
        group.records[request.request_id] = record
        group.instance.add(request, record.left)
        if not group.instance.is_busy:
            self._at(max(self._now, group.ready_s), "step", group)

    @staticmethod
    def _restore(request: SimulatedRequest, group: Group, known: int) -> int:
        """Put pages of a request that moves into the pool, as a server does with those that were handed over."""
        pool = group.instance.state.pool
        assert isinstance(pool, PrefixPool)
        pages = min((known - 1) // BLOCK_SIZE, (pool.num_free - pool.num_idle) // CacheKind.KV.blocks_per_page)
        if pages <= 0:
            return 0
        request.table = table = BlockTable(CacheKind.KV)
        pool.grow(table, pages * BLOCK_SIZE)
        pool.keep(request, pages)
        pool.release(table)
        request.table = None
        return pages

    def _step(self, group: Group) -> None:
        """An iteration of a group ends, or may begin."""
        if not any(group is each for each in self._groups) or self._now < group.ready_s:
            return
        instance = group.instance
        if instance.is_busy:
            if self._now < group.ends_s:  # two requests came at once
                return
            for ended in instance.end():
                group.records.pop(ended.request_id).take()
        if self._due_s is not None and self._now >= self._due_s:
            self._form_anew()
            return
        end_s = instance.begin(self._now, self._calls[0] if self._calls else math.inf)
        if end_s is not None and instance.is_busy:
            group.ends_s = end_s
            self._at(end_s, "step", group)

    def _notice(self, change: object) -> None:
        """Some machines will be gone: choose for the others, and stop in time to move."""
        self._leaving |= set(change.gone)  # type: ignore[attr-defined]
        left_s = change.time_s - self._now  # type: ignore[attr-defined]
        move = self._planned()
        seconds = 0.0 if move is None else max(self._seconds(move))
        self._stop_at(self._now + max(left_s - seconds - 0.5, 0.0))  # an iteration may have to end first

    def _change(self, change: object) -> None:
        come, gone = change.come, set(change.gone)  # type: ignore[attr-defined]
        self._machines = [machine for machine in [*self._machines, *come] if machine not in gone]
        self._leaving -= gone
        lost = [group for group in self._groups if gone & set(group.machines)]
        match self._reaction:
            case "reroute":
                self._reroute(lost)
            case "restart":
                self._lose(lost)
                if self._shape() != self._formed() or lost:
                    self._stop_at(self._now)
            case _:
                self._lose(lost)  # none, if there was time
                if self._shape() != self._formed() or lost:
                    self._stop_at(self._now)

    def _lose(self, groups: Sequence[Group]) -> None:
        """Machines are gone, and with them what they computed."""
        self._groups = [group for group in self._groups if not any(group is one for one in groups)]
        for group in groups:
            self._waiting += self._unfinished(group)

    def _unfinished(self, group: Group) -> list[Record]:
        """Take the requests out of a group; an iteration under way counts for nothing."""
        records = list(group.records.values())
        for record in records:
            record.take()
        group.records.clear()
        return records

    def _reroute(self, lost: Sequence[Group]) -> None:
        self._lose(lost)
        used = {machine for group in self._groups for machine in group.machines}
        spare = [machine for machine in self._machines if machine not in used]
        while len(spare) >= self._degree:
            machines, spare = tuple(spare[: self._degree]), spare[self._degree :]
            load_s = self._model.weight_bytes / self._degree / self._model.machine.storage_bytes_per_s
            self._groups.append(self._start(machines, self._degree, self._now + (load_s if self._now else 0.0)))
            self.num_formed += 1
        self._place_waiting()

    def _place_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for record in sorted(waiting, key=lambda record: record.arrival.arrival_s):
            self._arrive(record)

    def _shape(self) -> Shape | None:
        return self._model.choose(len(self._machines) - len(self._leaving), self._rate)

    def _formed(self) -> Shape | None:
        return Shape(len(self._groups), len(self._groups[0].machines)) if self._groups else None

    def _stop_at(self, time_s: float) -> None:
        """Have all groups stop after the iteration that runs at a time, and then form anew."""
        self._due_s = time_s if self._due_s is None else min(self._due_s, time_s)
        self._at(self._due_s, "due", None)

    def _due(self, nothing: object) -> None:
        if self._due_s is not None and self._now >= self._due_s:
            self._form_anew()

    def _form_anew(self) -> None:
        """Once no iteration runs."""
        if any(group.instance.is_busy and group.ready_s <= self._now for group in self._groups):
            return
        move = self._planned()
        old = self._groups
        self._groups, self._due_s = [], None
        records = [self._unfinished(group) for group in old]
        if move is None:
            self._waiting += [record for each in records for record in each]
            return
        seconds = self._seconds(move) if self._now else [0.0] * len(move.formation.groups)
        takes = self._takes(move.formation, [self._cached_bytes(group) for group in old])
        self._groups = [
            self._start(machines, move.formation.degree, self._now + own_s)
            for machines, own_s in zip(move.formation.groups, seconds, strict=True)
        ]
        self.num_formed += len(self._groups)
        self.paused_s += sum(seconds) / len(seconds)
        self.moved_bytes += sum(move.received_bytes.values()) if self._now else 0.0
        for group, taken in zip(self._groups, takes, strict=True):
            for record in sorted((r for g in taken for r in records[g]), key=lambda r: r.arrival.arrival_s):
                self._enter(record, group, cached=self._reaction in ("move", "unmatched"))
        self._place_waiting()

    def _cached_bytes(self, group: Group) -> float:
        if self._reaction not in ("move", "unmatched"):
            return 0.0
        running = group.instance.state.running
        return sum(request.num_computed_tokens for request in running) * self._model.token_bytes

    def _takes(self, formation: Formation, cache_bytes: Sequence[float]) -> list[list[int]]:
        return inherit(cache_bytes, len(formation.groups))

    def _planned(self) -> Move | None:
        """The move to the best formation of the machines that stay; None if they are too few."""
        shape = self._shape()
        if shape is None:
            return None
        staying = [machine for machine in self._machines if machine not in self._leaving]
        cache_bytes = [self._cached_bytes(group) for group in self._groups]
        held = {} if self._reaction == "restart" else Formation(tuple(g.machines for g in self._groups)).held()
        return least_movement(
            held, staying, inherit(cache_bytes, shape.groups), shape.degree, weight_bytes=self._model.weight_bytes,
            cache_bytes=cache_bytes, assigns=self._reaction != "unmatched",
        )  # fmt: skip

    def _seconds(self, move: Move) -> list[float]:
        machine = self._model.machine
        return move.seconds(machine.hardware.link_bytes_per_s, machine.storage_bytes_per_s)

    def _start(self, machines: tuple[int, ...], degree: int, ready_s: float) -> Group:
        name, cost_model = str(next(self._names)), self._model.cost_model(degree)
        instance = Instance(
            make_policy(self._policy, PolicyContext(cost_model)), cost_model, num_blocks=self._model.num_blocks(degree),
            limits=self._model.limits(degree), block_size=BLOCK_SIZE, name=name, prefix_caching=True,
        )  # fmt: skip
        return Group(instance, machines, ready_s)
