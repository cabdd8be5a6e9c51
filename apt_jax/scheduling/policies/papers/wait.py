"""WAIT and Nested WAIT: run an iteration only once enough requests have gathered for it, so that batches stay full.

In equilibrium a batch of L requests holds, of each type with rate lambda_j and output length l_j, as many at each of
its l_j + 1 stages (the prompt, then every output token) as arrive during an iteration: n_j = L lambda_j / sum lambda
(l + 1). An iteration takes n_j prompts of a type and one token of all that decode, and waits until they are there.
Where that is less than one, an arrival pays for several iterations. Source: arXiv 2504.11320, sections 4 and 5.

Rates, lengths and L are measured here instead of given. `force_after_s` seconds after the last iteration the next one
runs whatever is there.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apt_jax.ranges import check_finite
from apt_jax.request import Request
from apt_jax.scheduling.length import has_answer
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.packing import plan_mixed
from apt_jax.scheduling.state import SchedulerState

WINDOW_S = 60.0  # of arrivals, from which rates are measured
SEGMENTS = 8  # of Nested WAIT, at powers of two of the output length


@dataclass(frozen=True)
class WaitOptions:
    """`force_after_s`: longest time without an iteration. `occupancy`: L as a share of what fits into the pool."""

    force_after_s: float = 1.0
    occupancy: float = 0.9

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.force_after_s > 0:
            raise ValueError(f"force_after_s={self.force_after_s} must be greater than 0")
        if not 0 < self.occupancy <= 1:
            raise ValueError(f"occupancy={self.occupancy} must be greater than 0 and at most 1")


class _Arrivals:
    """What came within the last `WINDOW_S` seconds: times, prompt lengths and types."""

    def __init__(self) -> None:
        self._next = 0  # first arrival number not seen
        self._recent: deque[tuple[float, int, int]] = deque()
        self._counts: Counter[int] = Counter()
        self._prompt_tokens = 0

    def new(self, state: SchedulerState) -> list[Request]:
        """Waiting requests that were not there before."""
        found = []
        for request in reversed(state.waiting):
            if request.order < self._next:
                break
            found.append(request)
        if found:
            self._next = found[0].order + 1
        return found[::-1]

    def add(self, request: Request, kind: int, now: float) -> None:
        """One of type `kind`."""
        self._recent.append((now, request.num_prompt_tokens, kind))
        self._counts[kind] += 1
        self._prompt_tokens += request.num_prompt_tokens

    def forget_old(self, now: float) -> None:
        """Drop those that came too long ago."""
        while len(self._recent) > 1 and self._recent[0][0] < now - WINDOW_S:
            _, tokens, kind = self._recent.popleft()
            self._counts[kind] -= 1
            self._prompt_tokens -= tokens

    def shares(self) -> dict[int, float]:
        """Share of each type in the arrivals; the rates of all types are in proportion to them."""
        return {kind: count / len(self._recent) for kind, count in self._counts.items() if count}

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length."""
        return self._prompt_tokens / max(len(self._recent), 1)


class _Gathering:
    """How much of its threshold each type, or segment, has gathered beyond whole requests."""

    def __init__(self) -> None:
        self._paid: dict[int, float] = {}  # iterations' worth, in requests, of those that were taken before

    def holds(self, key: int, there: int, threshold: float, room: float) -> bool:
        """Whether `there` requests are enough for an iteration, at most `room` being able to take part."""
        return there + self._paid.get(key, 0.0) >= min(threshold, room) - 1e-9

    def take(self, key: int, there: int, threshold: float) -> int:
        """Use up one iteration's threshold; how many of those `there` enter."""
        paid = self._paid.get(key, 0.0)
        used = min(threshold, there + paid)
        entering = min(there, math.ceil(used - paid - 1e-9))
        self._paid[key] = max(paid + entering - used, 0.0)
        return max(entering, 0)

    def take_all(self, key: int, there: int, threshold: float) -> None:
        """Use up one iteration's threshold while all those `there` enter; what they pay beyond it is kept."""
        self._paid[key] = max(self._paid.get(key, 0.0) + there - threshold, 0.0)


class _Waiting:
    """What both policies share: when the last iteration ran, and how large a full batch is."""

    Options = WaitOptions

    def __init__(self, context: PolicyContext | None = None, options: WaitOptions | None = None):
        self._context, self._options = context or PolicyContext(), options or WaitOptions()
        self._arrivals, self._gathering = _Arrivals(), _Gathering()
        self._ran_s: float | None = None

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """An iteration, or an empty plan until one is due."""
        for request in self._arrivals.new(state):
            self._arrivals.add(request, self._type_of(request), now)
        self._arrivals.forget_old(now)
        if self._ran_s is None:
            self._ran_s = now
        due_s = self._ran_s + self._options.force_after_s
        chosen: tuple[Sequence[Request], Sequence[Request]] | None = (state.waiting, state.running)
        if any(not request.is_decoding for request in state.running):  # prompts in the middle of their chunks
            chosen = (), state.running
        elif now < due_s:
            chosen = self._gathered(state)
        if chosen is None:
            return Plan(wake_at_s=due_s)
        waiting, running = chosen
        tokens = state.limits.max_num_batched_tokens
        plan = plan_mixed(state, tokens, least_tokens=1, waiting=waiting, running=running)
        if plan.is_empty:
            plan = plan_mixed(state, tokens, least_tokens=1)
        self._ran_s = now
        return plan

    def finished(self, request: Request, now: float) -> None:
        """Learn its length."""
        self._context.predictor.learn(request)

    def _type_of(self, request: Request) -> int:
        """The type of a new request."""
        raise NotImplementedError

    def _gathered(self, state: SchedulerState) -> tuple[Sequence[Request], Sequence[Request]] | None:
        """Who takes part in an iteration now; None: not enough have gathered."""
        raise NotImplementedError

    def _predicted(self, request: Request) -> float:
        """Output tokens that are expected of a new request."""
        prompt = np.array([request.num_prompt_tokens])
        return float(self._context.predictor.remaining_of([request], prompt, np.zeros(1, np.int64))[0])

    def _full_batch(self, state: SchedulerState, mean_output: float) -> float:
        """L: requests that a full batch has."""
        kind, pool = state.limits.kinds[-1], state.pool
        tokens = pool.num_blocks // kind.blocks_per_page * pool.block_size
        each = self._arrivals.mean_prompt + mean_output / 2
        return max(1.0, min(state.limits.max_num_seqs, self._options.occupancy * tokens / max(each, 1.0)))

    def _room(self, state: SchedulerState) -> int:
        """Requests of mean prompt length that might still be admitted."""
        least = min(kind.blocks_per_page for kind in state.limits.kinds)
        pages = max(1, math.ceil(self._arrivals.mean_prompt / state.pool.block_size))
        blocks = state.pool.num_free - state.limits.watermark_blocks
        return max(0, min(state.limits.max_num_seqs - len(state.running), blocks // (pages * least)))


class Wait(_Waiting):
    """WAIT: types by predicted output length, in powers of two."""

    def __init__(self, context: PolicyContext | None = None, options: WaitOptions | None = None):
        super().__init__(context, options)
        self._type: dict[int, int] = {}

    def finished(self, request: Request, now: float) -> None:
        """Learn its length, and forget it."""
        super().finished(request, now)
        self._type.pop(request.order, None)

    def _type_of(self, request: Request) -> int:
        found = self._type[request.order] = int(math.log2(max(self._predicted(request), 1.0)))
        return found

    def _gathered(self, state: SchedulerState) -> tuple[Sequence[Request], Sequence[Request]] | None:
        there: dict[int, list[Request]] = {}
        for request in state.waiting:
            there.setdefault(self._type[request.order], []).append(request)
        shares = self._arrivals.shares()
        stages = sum(share * (_length(kind) + 1) for kind, share in shares.items())
        batch = self._full_batch(state, stages - 1)
        limits = {kind: batch * shares.get(kind, 0.0) / stages for kind in {*shares, *there}}
        room = self._room(state)
        # the paper's relaxed rule: one type is enough
        if not any(self._gathering.holds(k, len(there.get(k, ())), limit, room) for k, limit in limits.items()):
            return None
        chosen: list[Request] = []
        for kind, limit in limits.items():
            members = there.get(kind, [])
            chosen += members[: self._gathering.take(kind, len(members), limit)]
        return sorted(chosen, key=lambda request: request.order), state.running


class NestedWait(_Waiting):
    """Nested WAIT: nothing is predicted; all enter the first segment, and fewer and fewer reach the later ones."""

    def __init__(self, context: PolicyContext | None = None, options: WaitOptions | None = None):
        super().__init__(context, options)
        self._lengths: deque[int] = deque(maxlen=1000)  # of finished outputs

    def finished(self, request: Request, now: float) -> None:
        """Learn its length."""
        if has_answer(request):
            self._lengths.append(request.num_generated_tokens)

    def _type_of(self, request: Request) -> int:
        return 0

    def _gathered(self, state: SchedulerState) -> tuple[Sequence[Request], Sequence[Request]] | None:
        first = [0, *(2 ** (k + 3) for k in range(1, SEGMENTS))]  # output tokens at which each segment begins
        lengths = np.array(self._lengths) if self._lengths else np.array([256])
        alive = [max(float((lengths >= begin).mean()), 1e-3) for begin in first]
        mean = float(lengths.mean())
        stages = [end - begin for begin, end in zip(first, [*first[1:], max(first[-1] + 1, int(lengths.max()))],
                                                    strict=True)]  # fmt: skip
        weight = sum(share * count for share, count in zip(alive, stages, strict=True))
        batch = self._full_batch(state, mean)
        limits = [batch * share / weight for share in alive]
        room = self._room(state)
        if not self._gathering.holds(0, len(state.waiting), limits[0], room):
            return None
        waiting = state.waiting[: self._gathering.take(0, len(state.waiting), limits[0])]
        last = 1
        for k in range(1, SEGMENTS):
            at_gate = sum(r.num_generated_tokens == first[k] for r in state.running)
            inside = any(r.num_generated_tokens > first[k] for r in state.running)
            if not (at_gate or inside) or not self._gathering.holds(k, at_gate, limits[k], math.inf):
                break
            self._gathering.take_all(k, at_gate, limits[k])
            last = k + 1
        end = first[last] if last < SEGMENTS else math.inf
        return waiting, [r for r in state.running if r.num_generated_tokens < end]


def _length(kind: int) -> float:
    """Mean output length of a type: between 2^kind and 2^(kind + 1)."""
    return 1.5 * 2**kind
