"""What one iteration knows before it decides: queues, needs, lateness and values. Read only.

Columns that end in `_w` are `[waiting]`, those in `_r` `[running]`, both in order of arrival. What is needed only when
someone waits or memory is short is computed when it is first read, so that a quiet iteration costs little.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from apt_jax.cache import KINDS, CacheKind
from apt_jax.request import Request
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.policies.apt.facts.forecast import expected_blocks, moments_of_blocks
from apt_jax.scheduling.policies.apt.facts.lateness import Remaining, is_late, is_overdue, lane
from apt_jax.scheduling.policies.apt.facts.queue import Queue
from apt_jax.scheduling.policies.apt.facts.values import values
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints
from apt_jax.scheduling.policies.apt.options import AptOptions
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import SchedulerState


@dataclass(frozen=True)
class View:
    """One iteration at `now`; `tick_s` is what it is expected to last. Both in seconds."""

    context: PolicyContext
    options: AptOptions
    state: SchedulerState
    waiting: Queue
    running: Queue
    now: float
    tick_s: float

    @property
    def kinds(self) -> tuple[CacheKind, ...]:
        """Cache kinds that a request may be admitted with, the preferred one first."""
        return self.state.limits.kinds

    @cached_property
    def kv_kind(self) -> CacheKind | None:
        """The first of them that is read as it is stored: KV in the formulation, at whole cost in blocks."""
        return next((kind for kind in self.kinds if not kind.is_projected), None)

    @cached_property
    def hidden_kind(self) -> CacheKind | None:
        """The first of them that has to be projected: hidden in the formulation, at half the cost in blocks."""
        return next((kind for kind in self.kinds if kind.is_projected), None)

    @property
    def is_hybrid(self) -> bool:
        """Whether a request may be admitted as KV or as hidden."""
        return self.kv_kind is not None and self.hidden_kind is not None

    @cached_property
    def rho_s(self) -> float:
        """Seconds of an iteration per token as `hidden_kind` against `kv_kind`; 0 without a choice or a cost model."""
        model, kv, hidden = self.context.cost_model, self.kv_kind, self.hidden_kind
        if model is None or kv is None or hidden is None:
            return 0.0
        return model.attention_s[hidden.index] - model.attention_s[kv.index]

    @property
    def least_blocks_per_page(self) -> int:
        """Blocks of a page in the smallest kind."""
        return min(kind.blocks_per_page for kind in self.kinds)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.state.pool.block_size

    # -- who may compute ----------------------------------------------------------------------------------------

    @cached_property
    def decodes_r(self) -> Bools:
        """Whether it could compute its newest token and sample the next."""
        return self.running.decoding & self.running.may_sample

    @cached_property
    def prefills_r(self) -> Bools:
        """Whether it is in the middle of its prefill."""
        return (self.running.uncomputed > 0) & ~self.running.decoding

    # -- blocks -------------------------------------------------------------------------------------------------

    @cached_property
    def pages_w(self) -> Ints:
        """Pages that all known tokens take."""
        return self.waiting.pages(self.block_size)

    @cached_property
    def pages_r(self) -> Ints:
        """Pages that all known tokens take."""
        return self.running.pages(self.block_size)

    @cached_property
    def held_r(self) -> Ints:
        """Blocks held."""
        return self.running.pages_held * self.running.blocks_per_page

    @cached_property
    def need_r(self) -> Ints:
        """Blocks held once all known tokens are computed."""
        return np.maximum(self.held_r, self.pages_r * self.running.blocks_per_page)

    @cached_property
    def shared_r(self) -> Ints:
        """Blocks held that others hold too: preempting does not give them back."""
        state = self.state
        if state.prefixes is None or not state.prefixes.num_shared:
            return np.zeros(len(self.running), np.int64)
        return np.array([state.shared_blocks(request) for request in self.running.requests], np.int64)

    @cached_property
    def held_pages_w(self) -> Ints:
        """Pages that running requests hold already, whichever kind it is admitted as."""
        return self._cached(self.state.held_pages, min)

    @cached_property
    def cached_w(self) -> Ints:
        """Tokens that are cached in the kind that has most of them."""
        return self._cached(self.state.cached_tokens, max)

    def cached_of(self, kind: CacheKind) -> Ints:
        """`[waiting]` tokens that are cached, if each is admitted as `kind`."""
        if self.state.prefixes is None or not self.cached_w.any():
            return np.zeros(len(self.waiting), np.int64)
        return self._cached(lambda request, _: self.state.cached_tokens(request, kind), max)

    @cached_property
    def _hot_w(self) -> list[int]:
        """Positions of the waiting requests of which anything is cached."""
        prefixes = self.state.prefixes
        if prefixes is None:
            return []
        cold, requests = prefixes.cold, self.waiting.requests
        return [i for i, r in enumerate(requests) if r.order not in cold and not prefixes.is_cold(r)]

    def _cached(self, count: Callable[[Request, CacheKind], int], among: Callable[[Iterable[int]], int]) -> Ints:
        found = np.zeros(len(self.waiting), np.int64)
        for i in self._hot_w:
            found[i] = among(count(self.waiting.requests[i], kind) for kind in self.kinds)
        return found

    def expected_w(self, index: Ints, blocks_per_page: Ints) -> Floats:
        """`[len(index), horizons]` blocks that these waiting requests are expected to add; needs prediction.

        Cached pages that running requests hold are theirs already, as long as the newcomer is expected to be there.
        """
        assert self.remaining_w is not None
        expected = expected_blocks(
            self.waiting.tokens[index], blocks_per_page, self.remaining_w[index], self.block_size
        )
        if self.state.prefixes is None or not (held := self.held_pages_w[index]).any():
            return expected
        there = np.minimum(expected / (self.pages_w[index] * blocks_per_page)[:, None], 1.0)
        return expected - there * (held * blocks_per_page)[:, None]

    def expected_r(self, index: Ints) -> Floats:
        """`[len(index), horizons]` blocks that these running requests are expected to hold; needs prediction."""
        return self._moments_r[0][index]

    def repeated_r(self, index: Ints, expected: Floats) -> Floats:
        """`[horizons]` of the `expected` blocks of these running requests, all together, those counted more than once.

        The blocks of a shared page are counted for each request that holds it; fewer do as requests end.
        """
        prefixes = self.state.prefixes
        if prefixes is None or not prefixes.num_shared or len(index) < len(self.running):
            return np.zeros_like(expected)
        return prefixes.num_repeated * np.minimum(expected / max(int(self.held_r.sum()), 1), 1.0)

    def variance_r(self, index: Ints) -> Floats:
        """`[len(index), horizons]` variance of what these running requests hold; needs prediction."""
        return self._moments_r[1][index]

    @cached_property
    def _moments_r(self) -> tuple[Floats, Floats]:
        """`[running, horizons]` expected blocks and their variance."""
        assert self.remaining_r is not None
        running = self.running
        return moments_of_blocks(running.tokens, running.blocks_per_page, self.remaining_r, self.block_size)

    # -- time ---------------------------------------------------------------------------------------------------

    @cached_property
    def remaining_w(self) -> Floats | None:
        """Predicted tokens to come; None without prediction."""
        return self._remaining(self.waiting)

    @cached_property
    def remaining_r(self) -> Floats | None:
        """Predicted tokens to come; None without prediction."""
        return self._remaining(self.running)

    @cached_property
    def late_w(self) -> Bools:
        """Whether it can no longer keep its SLO."""
        return self._late(self.waiting, lambda: self.remaining_w, self.cached_w)

    @cached_property
    def late_r(self) -> Bools:
        """Whether it can no longer keep its SLO."""
        return self._late(self.running, lambda: self.remaining_r)

    @property
    def lane_w(self) -> Bools:
        """Whether it is in the lane (`lateness.py`)."""
        return self._lanes[0]

    @property
    def lane_r(self) -> Bools:
        """Whether it is in the lane (`lateness.py`)."""
        return self._lanes[1]

    # -- limits -------------------------------------------------------------------------------------------------

    @cached_property
    def slack_w(self) -> Floats:
        """Seconds left of the limit of its next token; infinite for a late one."""
        return self._slack(self.waiting, self.late_w)

    @cached_property
    def slack_r(self) -> Floats:
        """Seconds left of the limit of its next token; infinite for a late one."""
        return self._slack(self.running, self.late_r)

    def _slack(self, queue: Queue, late: Bools) -> Floats:
        return np.where(late, np.inf, queue.limit_s + queue.since_s - self.now)

    def tightest_s(self, decode_index: Ints) -> float:
        """Seconds of the tightest promise: the gap of these that decode, or the first token of anyone unfinished.

        Of those in time, if there are any: what is late already would otherwise take time from what can be kept.
        """
        waiting, running = self.waiting, self.running
        counts_w, counts_r = ~self.late_w, ~self.late_r
        if not (counts_w.any() or counts_r.any()):
            counts_w, counts_r = self.late_w, self.late_r
        decoding = decode_index[counts_r[decode_index]]
        limits_s = (
            running.tbt_slo_s[decoding], running.stall_slo_s[decoding], running.ttft_slo_s[counts_r],
            waiting.ttft_slo_s[counts_w],
        )  # fmt: skip
        return float(min(limit_s.min(initial=np.inf) for limit_s in limits_s))

    @cached_property
    def num_counted(self) -> int:
        """U of the formulation: requests whose delay counts."""
        return max(1, len(self.waiting) + len(self.running) - int(self.late_w.sum()) - int(self.late_r.sum()))

    @cached_property
    def values_w(self) -> Floats:
        """Seconds of value of serving it now, greater than 0."""
        return self._values(self.waiting, self.late_w, self.remaining_w)

    @cached_property
    def values_r(self) -> Floats:
        """Seconds of value of serving it now, greater than 0."""
        return self._values(self.running, self.late_r, self.remaining_r)

    def decode_s(self, index: Ints) -> float:
        """Seconds of an iteration in which these running requests decode and nothing else runs; needs a cost model."""
        assert self.context.cost_model is not None
        tokens, kind = self.running.tokens[index], self.running.kind[index]
        of_kind = [kind == k.index for k in KINDS]
        context_tokens = tuple(int(tokens[mine].sum()) for mine in of_kind)
        decodes = tuple(int(mine.sum()) for mine in of_kind)
        load = StepLoad(decode_requests=len(index), context_tokens=context_tokens, decodes=decodes)
        return self.context.cost_model.step_s(load)

    def _remaining(self, queue: Queue) -> Floats | None:
        if not self.options.prediction:
            return None
        return self.context.predictor.remaining_of(queue.requests, queue.prompt_tokens, queue.generated)

    def _late(self, queue: Queue, remaining: Remaining, cached: Ints | int = 0) -> Bools:
        pending_s = self.now - queue.since_s
        if self.options.fallback == "none":
            return np.zeros(len(queue), np.bool_)
        if self.options.fallback == "constant" and not self.options.prediction:
            return is_overdue(queue, pending_s)
        return is_late(queue, pending_s, remaining, self.prefill_s(queue, cached))

    def prefill_s(self, queue: Queue, cached: Ints | int = 0) -> Floats | float:
        """`[n]` least seconds until the first token, or the next one after a preemption, is computed; 0 of nobody's.

        `cached` of the tokens not computed yet need not be.
        """
        model = self.context.cost_model
        if model is None or queue.decoding.all():
            return 0.0
        return np.where(queue.decoding, 0.0, (queue.uncomputed - cached) * model.prompt_token_s)

    @cached_property
    def _lanes(self) -> tuple[Bools, Bools]:
        if self.options.fallback != "aging" or not (
            self._may_be_in_lane(self.waiting, self.late_w) or self._may_be_in_lane(self.running, self.late_r)
        ):
            return np.zeros(len(self.waiting), np.bool_), np.zeros(len(self.running), np.bool_)
        late_running = self.late_r & (self.need_r <= self.state.pool.num_blocks)  # as KV it may outgrow the pool
        return lane(
            self.waiting, self.running, self.late_w, late_running, now=self.now, patience_s=self.options.patience_s,
            blocks_waiting=self.pages_w * self.least_blocks_per_page, blocks_running=self.need_r,
            share_blocks=int(self.options.lane_share * self.state.pool.num_blocks),
            share_seats=max(1, int(self.options.lane_share * self.state.limits.max_num_seqs)),
        )  # fmt: skip

    def _may_be_in_lane(self, queue: Queue, late: Bools) -> bool:
        """Whether any of them is in the lane or has been patient."""
        return bool(
            late.any() and (late & (queue.in_lane | (self.now - queue.arrival_s > self.options.patience_s))).any()
        )

    def _values(self, queue: Queue, late: Bools, remaining: Floats | None) -> Floats:
        return values(self.options, queue, late, remaining, self.now + self.tick_s, self.block_size)
