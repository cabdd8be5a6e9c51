"""One iteration of the adaptive policy: who keeps memory, who is admitted, and what runs."""

from collections.abc import Iterator
from functools import cached_property
from itertools import compress, repeat
from typing import TYPE_CHECKING

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.request import Request
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.plan import Converted, Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.scheduling.policies.apt.forecast import expected_blocks
from apt_jax.scheduling.policies.apt.greedy import solve_greedy
from apt_jax.scheduling.policies.apt.lateness import DEMOTED_VALUE, is_late, is_overdue, lane
from apt_jax.scheduling.policies.apt.ledger import Queue, kind_of
from apt_jax.scheduling.policies.apt.problem import Bools, Floats, Ints, Problem
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import SchedulerState

if TYPE_CHECKING:
    from apt_jax.scheduling.policies.apt.policy import AptOptions

UNKNOWN_RHO_S = 1e-9  # without a cost model KV is taken to be faster by next to nothing: first choice while it fits
STEP_SHARE = 0.25  # of the tightest gap promise that one iteration may last
MIN_PREFILL_TOKENS = 16
OFFERS = 64  # waiting requests looked at in one go


class Iteration:
    """Scratch of one `schedule` call. Indices run over the waiting (w) or the running (r) queue."""

    def __init__(
        self, context: PolicyContext, options: "AptOptions", state: SchedulerState, waiting: Queue, running: Queue,
        now: float, tick_s: float,
    ):  # fmt: skip
        self.context, self.options, self.state = context, options, state
        self.waiting, self.running, self.now, self.tick_s = waiting, running, now, tick_s
        self.block_size = state.pool.block_size
        self.kinds = state.limits.kinds
        self.pages_w, self.pages_r = waiting.pages(self.block_size), running.pages(self.block_size)
        self.blocks_r = running.pages_held * running.blocks_per_page
        self.need_r = np.maximum(self.blocks_r, self.pages_r * running.blocks_per_page)
        self.claims_r = self.blocks_r  # what preempting gives back: `_shed` adds the growth that it has set aside
        self.preempted: dict[int, Reason] = {}
        self.admitted: list[tuple[int, CacheKind, Reason]] = []
        self.free = state.pool.num_free
        self.mixes = options.mixed and context.cost_model is not None

    def plan(self) -> Plan:
        """Decide."""
        decodes = self.running.decoding & self.running.may_sample
        prefills = self.running.uncomputed > 0
        prefills &= ~self.running.decoding
        if self.mixes:
            self._shed(decodes)
            self._admit()
            self.mixes = self._gains_by_mixing(decodes, prefills)
        if not self.mixes:
            decodes, prefills = self._alternate(decodes, prefills)
        return self._build(decodes, prefills)

    # Read only when someone waits or memory is short: cached, so that a quiet iteration costs little.

    @cached_property
    def remaining_w(self) -> Floats | None:
        """`[waiting]` predicted tokens to come."""
        return self._remaining(self.waiting)

    @cached_property
    def remaining_r(self) -> Floats | None:
        """`[running]` predicted tokens to come."""
        return self._remaining(self.running)

    @cached_property
    def late_w(self) -> Bools:
        """`[waiting]` whether the SLO is lost."""
        return self._late(self.waiting, self.remaining_w)

    @cached_property
    def late_r(self) -> Bools:
        """`[running]` whether the SLO is lost."""
        return self._late(self.running, self.remaining_r)

    @cached_property
    def num_counted(self) -> int:
        """U of the formulation: those whose delay counts."""
        return max(1, len(self.waiting) + len(self.running) - int(self.late_w.sum()) - int(self.late_r.sum()))

    @property
    def lane_w(self) -> Bools:
        """`[waiting]` whether it is in the lane of `lateness.py`."""
        return self._lanes[0]

    @property
    def lane_r(self) -> Bools:
        """`[running]` whether it is in the lane of `lateness.py`."""
        return self._lanes[1]

    @cached_property
    def _lanes(self) -> tuple[Bools, Bools]:
        return self._lane()

    # -- values -------------------------------------------------------------------------------------------------

    def _remaining(self, queue: Queue) -> Floats | None:
        if not self.options.prediction:
            return None
        return self.context.predictor.remaining_tokens(queue.prompt_tokens, queue.generated)

    def _late(self, queue: Queue, remaining: Floats | None) -> Bools:
        pending_s = self.now - queue.since_s
        if self.options.fallback == "none":
            return np.zeros(len(queue), np.bool_)
        if self.options.fallback == "constant" and not self.options.prediction:
            return is_overdue(queue, pending_s)
        return is_late(queue, pending_s, remaining)

    def _values(self, queue: Queue, late: Bools, remaining: Floats | None) -> Floats:
        """`[n]` seconds of value, greater than 0."""
        pending_s = self.now + self.tick_s - queue.since_s
        slo_s = queue.slo_s()
        if self.options.value == "slack":
            value = 1.0 / np.maximum(slo_s - pending_s, 0.01)
        elif self.options.value == "absolute":
            value = pending_s
        else:
            value = pending_s / slo_s
        if self.options.value == "footprint" and remaining is not None:
            # mean context over the rest of its life, times that life, against the context now
            value = value * queue.tokens / ((queue.tokens + remaining / 2) * remaining)
        elif self.options.value == "longest":
            value = value * queue.pages(self.block_size)  # the solver divides by blocks
        return np.where(late, value * DEMOTED_VALUE, value)

    def _lane(self) -> tuple[Bools, Bools]:
        if self.options.fallback != "aging":
            return np.zeros(len(self.waiting), np.bool_), np.zeros(len(self.running), np.bool_)
        smallest = min(kind.blocks_per_page for kind in self.kinds)
        return lane(
            self.waiting, self.running, self.late_w, self.late_r, now=self.now, patience_s=self.options.patience_s,
            blocks_waiting=self.pages_w * smallest, blocks_running=self.need_r,
            share_blocks=int(self.options.lane_share * self.state.pool.num_blocks),
        )  # fmt: skip

    # -- memory -------------------------------------------------------------------------------------------------

    def _shed(self, decodes: Bools) -> None:
        """Preempt the running requests worth least per block if the blocks do not last for this iteration."""
        self.claims_r = need = np.where(decodes, self.need_r, self.blocks_r)
        growth = int((need - self.blocks_r).sum())
        if growth <= self.free:
            self.free -= growth
            return
        capacity = self.state.pool.num_blocks - int(need[self.lane_r].sum())
        rest = np.flatnonzero(~self.lane_r)
        as_kv = self.running.blocks_per_page[rest] == 2
        problem = Problem(
            pending_s=self._values(self.running, self.late_r, self.remaining_r)[rest],
            kv_blocks=np.where(as_kv, need[rest], 2 * need[rest]),
            may_be_kv=as_kv,
            may_be_hidden=~as_kv,
            capacity_blocks=capacity,
            num_requests=self.num_counted,
            rho_s=0.0,  # they hold their kind already
        )
        dropped = rest[~solve_greedy(problem).is_scheduled]
        self.preempted.update((int(i), Reason.PREEMPTED_LEAST_VALUE) for i in dropped)
        self.free = self.state.pool.num_blocks - int(need.sum()) + int(need[dropped].sum())

    def _admit(self) -> None:
        """Choose waiting requests, those of the lane first, then by value per block."""
        if not len(self.waiting):
            return
        seats = self._admit_lane()
        spare = self.state.limits.watermark_blocks if len(self.running) > len(self.preempted) or self.admitted else 0
        evictable = self._evictable()
        held = int(self.claims_r[evictable].sum())
        room = self.free - spare
        if room + held < min(kind.blocks_per_page for kind in self.kinds):
            return
        order, hidden = self._solve(room + held)
        self._take(order, hidden, seats, room, evictable)

    def _admit_lane(self) -> int:
        """Admit those of the lane; returns how many more requests may run."""
        seats = self.state.limits.max_num_seqs - len(self.running) + len(self.preempted)
        for i in np.flatnonzero(self.lane_w).tolist():
            seats += self._make_room_for_lane(i, seats)
            if seats > 0 and self._fits_lane(i):
                self.admitted.append((i, self.kinds[-1], Reason.ADMITTED_LONGEST_LATE))
                self.free -= int(self.pages_w[i]) * self.kinds[-1].blocks_per_page
                seats -= 1
        return seats

    def _solve(self, capacity: int) -> tuple[Ints, Bools]:
        """Waiting requests to admit into `capacity` blocks, best first, and whether as hidden."""
        candidates = np.flatnonzero(~self.lane_w)
        n = len(candidates)
        hybrid = len(self.kinds) == 2
        rho_s = self.context.rho_s or UNKNOWN_RHO_S
        problem = Problem(
            pending_s=self._values(self.waiting, self.late_w, self.remaining_w)[candidates],
            kv_blocks=2 * self.pages_w[candidates],
            may_be_kv=np.full(n, CacheKind.KV in self.kinds),
            may_be_hidden=self._may_be_hidden(candidates),
            capacity_blocks=max(0, capacity),
            num_requests=self.num_counted,
            rho_s=rho_s * self.block_size / 2 if hybrid else 0.0,  # per KV block; no choice, no penalty
        )
        solution = solve_greedy(problem)
        return candidates[solution.order], solution.is_hidden[solution.order]

    def _may_be_hidden(self, candidates: Ints) -> Bools:
        """Whether each may be hidden: where hidden is slower than KV, only if the batch gains from one more like it.

        The formulation counts a hidden request's delay for one iteration, but it lasts as long as the request. R
        requests in T seconds become R + 1 in T + d: more tokens per second only if R d < T.
        """
        model = self.context.cost_model
        allowed = np.full(len(candidates), CacheKind.HIDDEN in self.kinds)
        if len(self.kinds) < 2 or model is None or model.rho_s <= 0 or not self.options.sustained:
            return allowed
        running = np.flatnonzero(self.running.decoding)
        tokens = self.waiting.tokens[candidates].astype(np.float64)
        if self.remaining_w is not None:
            tokens = tokens + self.remaining_w[candidates] / 2
        return allowed & (
            len(running) * model.attention_s[CacheKind.HIDDEN.index] * tokens <= self._decode_s(model, running)
        )

    def _decode_s(self, model: CostModel, index: Ints) -> float:
        """Seconds of an iteration that decodes these running requests and no more."""
        tokens, as_kv = self.running.tokens[index], self.running.blocks_per_page[index] == 2
        load = StepLoad(
            decode_requests=len(index), context_tokens=(int(tokens[as_kv].sum()), int(tokens[~as_kv].sum()))
        )
        return model.step_s(load)

    def _take(self, order: Ints, hidden: Bools, seats: int, room: int, evictable: Ints) -> None:
        """Admit in order while seats, blocks and the forecast allow; late running requests make room."""
        forecast = self._forecast()
        victims = list(evictable[np.argsort(-self.claims_r[evictable], kind="stable")])
        for i, is_hidden, need, least, late, any_may_evict, expected in self._offers(order, hidden):
            if (seats <= 0 or room < least) and not (victims and any_may_evict):
                break
            kind = CacheKind.HIDDEN if is_hidden else CacheKind.KV
            while (need > room or seats <= 0) and victims and not late:
                victim = int(victims.pop(0))
                self.preempted[victim] = Reason.PREEMPTED_LATE
                room += int(self.claims_r[victim])
                self.free += int(self.claims_r[victim])
                seats += 1
                if forecast is not None:
                    forecast += self._expected_r(np.array([victim]))[0]
            if need > room or seats <= 0:
                continue
            if forecast is not None and expected is not None:
                overflows = (forecast < expected).any()
                if overflows and (self.admitted or len(self.running) > len(self.preempted)):
                    continue
                forecast -= expected
            room -= need
            self.free -= need
            seats -= 1
            self.admitted.append((i, kind, self._admission_reason(kind, late)))

    def _offers(self, order: Ints, hidden: Bools) -> Iterator[tuple[int, bool, int, int, bool, bool, Floats | None]]:
        """What `_take` must know of each waiting request, in slices: it seldom comes far.

        Index, whether hidden, blocks, fewest blocks of it and all that follow, whether it is late, whether it or any
        that follows is not, and its `[horizons]` expected blocks (None without prediction).
        """
        per_page = np.where(hidden, 1, 2)
        needs, late = self.pages_w[order] * per_page, self.late_w[order]
        least = np.minimum.accumulate(needs[::-1])[::-1]
        any_in_time = np.logical_or.accumulate(~late[::-1])[::-1]
        for first in range(0, len(order), OFFERS):
            part = slice(first, first + OFFERS)
            columns = [column[part].tolist() for column in (order, hidden, needs, least, late, any_in_time)]
            predicted = self.remaining_w is not None
            expected = self._expected_w(order[part], per_page[part]) if predicted else repeat(None)
            yield from zip(*columns, expected, strict=False)

    def _evictable(self) -> Ints:
        """Late running requests outside the lane that hold memory."""
        return np.flatnonzero(self.late_r & ~self.lane_r & self._stays())

    def _stays(self) -> Bools:
        """`[running]` whether it has not been preempted in this iteration so far."""
        stays = np.ones(len(self.running), np.bool_)
        stays[list(self.preempted)] = False
        return stays

    def _fits_lane(self, i: int) -> bool:
        return int(self.pages_w[i]) * self.kinds[-1].blocks_per_page <= self.free

    def _make_room_for_lane(self, i: int, seats: int) -> int:
        """Preempt, the least value per block first, until waiting request i fits and has a seat; the seats gained."""
        gained = 0
        if self._fits_lane(i) and seats > 0:
            return 0
        value = self._values(self.running, self.late_r, self.remaining_r) / np.maximum(self.need_r, 1)
        for victim in np.argsort(value, kind="stable").tolist():
            if victim in self.preempted or self.lane_r[victim]:
                continue
            self.preempted[victim] = Reason.PREEMPTED_FOR_LONGEST_LATE
            self.free += int(self.claims_r[victim])
            gained += 1
            if self._fits_lane(i) and seats + gained > 0:
                break
        return gained

    def _forecast(self) -> Floats | None:
        """`[horizons]` blocks expected to be free, the watermark kept; None without prediction."""
        if self.remaining_r is None:
            return None
        expected = self._expected_r(np.flatnonzero(self._stays())).sum(axis=0)
        if self.admitted:
            index = np.array([i for i, _, _ in self.admitted])
            per_page = np.array([kind.blocks_per_page for _, kind, _ in self.admitted])
            expected = expected + self._expected_w(index, per_page).sum(axis=0)
        return np.asarray(self.state.pool.num_blocks - self.state.limits.watermark_blocks - expected)

    def _expected_r(self, index: Ints) -> Floats:
        assert self.remaining_r is not None
        return expected_blocks(
            self.running.tokens[index], self.running.blocks_per_page[index], self.remaining_r[index], self.block_size
        )

    def _expected_w(self, index: Ints, blocks_per_page: Ints) -> Floats:
        assert self.remaining_w is not None
        return expected_blocks(self.waiting.tokens[index], blocks_per_page, self.remaining_w[index], self.block_size)

    def _admission_reason(self, kind: CacheKind, late: bool) -> Reason:
        if late:
            return Reason.ADMITTED_LATE
        if kind is CacheKind.KV:
            return Reason.ADMITTED_KV
        if len(self.kinds) == 1:
            return Reason.ADMITTED_HIDDEN
        return Reason.ADMITTED_HIDDEN_FASTER if self.context.rho_s < 0 else Reason.ADMITTED_HIDDEN_SERVES_MORE

    # -- iteration type -----------------------------------------------------------------------------------------

    def _gains_by_mixing(self, decodes: Bools, prefills: Bools) -> bool:
        """Whether decodes and prompt chunks take no longer together than one after the other.

        Together the weights are read once, but the tokens are padded to another program's size. Attention costs the
        same.
        """
        model = self.context.cost_model
        assert model is not None
        stays = self._stays()
        index = np.flatnonzero(decodes & stays)
        wanted = int(self.running.uncomputed[prefills & stays].sum())
        wanted += int(self.waiting.uncomputed[[i for i, _, _ in self.admitted]].sum())
        if not len(index) or not wanted:
            return True
        tokens = min(wanted, max(self._prefill_budget(index), 1))
        decode, prefill = StepLoad(decode_requests=len(index), samples=len(index)), StepLoad(tokens, samples=1)
        both = StepLoad(tokens, decode_requests=len(index), samples=len(index) + 1)
        return model.step_s(both) <= model.step_s(decode) + model.step_s(prefill)

    def _alternate(self, decodes: Bools, prefills: Bools) -> tuple[Bools, Bools]:
        """Prefill or decode, by cumulative pending time; returns who decodes and who goes on with its prefill.

        Those in the lane run in either case, so that its bound holds. Forgets what was decided before.
        """
        self._forget()
        pending_w = (self.now + self.tick_s - self.waiting.since_s)[~self.late_w]
        pending_r = self.now + self.tick_s - self.running.since_s
        urgent_w = float(pending_w.sum()) + float(pending_r[prefills & ~self.late_r].sum())
        urgent_r = float(pending_r[decodes & ~self.late_r].sum())
        if urgent_w >= urgent_r or not decodes.any():
            in_lane = decodes & self.lane_r
            self._shed(in_lane)
            self._admit()
            if self.admitted or prefills.any():
                return in_lane, prefills
            self._forget()
        self._shed(decodes)
        self._admit_lane()
        return decodes, prefills & self.lane_r

    def _forget(self) -> None:
        self.preempted.clear()
        self.admitted.clear()
        self.free = self.state.pool.num_free
        self.claims_r = self.blocks_r

    # -- the plan -----------------------------------------------------------------------------------------------

    def _build(self, decodes: Bools, prefills: Bools) -> Plan:
        stays = self._stays()
        decode_index = np.flatnonzero(decodes & stays)
        scheduled: list[Scheduled] = []
        converted = self._conversions(decode_index)
        as_kv = self.running.blocks_per_page == 2
        as_kv[converted] = True
        kinds = [CacheKind.KV if kv else CacheKind.HIDDEN for kv in as_kv[decode_index].tolist()]
        decoding = compress(self.running.requests, (decodes & stays).tolist())
        scheduled += map(Scheduled._make, zip(decoding, repeat(1), kinds, repeat(Reason.DECODES)))
        if prefills.any() or self.admitted:
            budget = self._prefill_budget(decode_index)
            for i in np.flatnonzero(prefills & stays).tolist():
                tokens = min(int(self.running.uncomputed[i]), budget)
                if tokens > 0:
                    kind = kind_of(int(self.running.blocks_per_page[i]))
                    scheduled.append(Scheduled(self.running.requests[i], tokens, kind, Reason.CONTINUES_PREFILL))
                    budget -= tokens
            for k, (i, kind, reason) in enumerate(self.admitted):
                if budget <= 0:
                    del self.admitted[k:]
                    break
                tokens = min(int(self.waiting.uncomputed[i]), budget)
                scheduled.append(Scheduled(self.waiting.requests[i], tokens, kind, reason))
                budget -= tokens
        return Plan(
            scheduled=tuple(scheduled),
            preempted=tuple(Preempted(self.running.requests[i], reason) for i, reason in self.preempted.items()),
            converted=tuple(Converted(self.running.requests[i], Reason.CONVERTED_MEMORY_FREE) for i in converted),
            waited=self._waited(decodes, stays),
        )

    def _prefill_budget(self, decode_index: Ints) -> int:
        """Prompt tokens that this iteration may compute: the token limit, and no gap promise put at risk."""
        budget = self.state.limits.max_num_batched_tokens - len(decode_index)
        model = self.context.cost_model
        if model is None or not len(decode_index):
            return max(budget, 0)
        limit_s = STEP_SHARE * float(self.running.tbt_slo_s[decode_index].min())
        decode_s = self._decode_s(model, decode_index)
        per_token_s = max(model.token_s * model.scales.compute * model.scales.dense, 1e-12)
        free = max(0, model.free_tokens - len(decode_index))
        affordable = free + int(max(0.0, limit_s - decode_s) / per_token_s)
        return max(min(budget, max(affordable, MIN_PREFILL_TOKENS)), 0)

    def _conversions(self, decode_index: Ints) -> list[int]:
        """Hidden requests to turn into KV: KV is faster, and the blocks stay free for everyone's growth."""
        options, rho_s = self.options, self.context.rho_s
        if not options.convert or len(self.kinds) < 2 or rho_s < 0 or self.preempted:
            return []
        if len(self.waiting) > len(self.admitted):
            return []
        reserve = max(self.state.limits.watermark_blocks, self.state.pool.num_blocks // 4) + 2 * len(self.running)
        room = self.free - reserve
        budget = self.state.limits.max_num_batched_tokens  # projected tokens, like prefill
        chosen = []
        for i in decode_index[self.running.blocks_per_page[decode_index] == 1]:
            pages, tokens = int(self.pages_r[i]), int(self.running.tokens[i])
            if pages <= room and tokens <= budget:
                chosen.append(int(i))
                room -= pages
                budget -= tokens
        return chosen

    def _waited(self, decodes: Bools, stays: Bools) -> tuple[Waited, ...]:
        found = []
        if len(self.waiting) > len(self.admitted):
            left = np.ones(len(self.waiting), np.bool_)
            left[[i for i, _, _ in self.admitted]] = False
            decode_only = not self.admitted and not self.mixes
            in_time = Reason.WAITS_FOR_DECODE if decode_only else Reason.WAITS_FOR_BLOCKS
            groups = ((left & self.late_w, Reason.WAITS_LATE), (left & ~self.late_w, in_time))
            found += [Waited(_pick(self.waiting, mask), reason) for mask, reason in groups if mask.any()]
        if not decodes.any() and (resting := self.running.decoding & stays).any():
            found.append(Waited(_pick(self.running, resting), Reason.WAITS_FOR_PREFILL))
        return tuple(found)


def _pick(queue: Queue, mask: Bools) -> tuple[Request, ...]:
    return tuple(compress(queue.requests, mask.tolist()))
