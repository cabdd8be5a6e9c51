"""Simulated requests whose counters lie in arrays, so that a token of every running request is a few numpy calls."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apt_jax.request import FinishReason, Request
from apt_jax.scheduling.progress import Floats, Ints, Progress
from apt_jax.simulation.requests.classes import DEFAULT_CLASS

_INTS = ("prompt", "generated", "inflight", "computed", "max_new", "target", "pages", "kind", "late", "stalls")
_FLOATS = ("tbt_s", "stall_s", "first_s", "last_s", "longest_s")


class Columns:
    """Counters of one instance's requests by arrival number, and the times of all their tokens.

    `target` is the length at which a request's output ends, which no policy sees; `pages` and `kind` are those of
    its block table while it runs.
    """

    def __init__(self, capacity: int = 256):
        self._ints = np.zeros((len(_INTS), capacity), np.int64)
        self._floats = np.zeros((len(_FLOATS), capacity))
        self.requests: list[SimulatedRequest] = []
        self._sampled: list[Ints] = []  # arrival numbers that got a token, by iteration
        self._ends_s: list[float] = []  # of these iterations
        self._times: tuple[Ints, Floats] | None = None
        self.gaps_now_s: Floats = np.zeros(0)  # before the newest tokens
        self._name()

    def _name(self) -> None:
        self.prompt, self.generated, self.inflight, self.computed, self.max_new = self._ints[:5]
        self.target, self.pages, self.kind, self.late, self.stalls = self._ints[5:]
        self.tbt_s, self.stall_s, self.first_s, self.last_s, self.longest_s = self._floats

    def add(self, request: "SimulatedRequest", output_tokens: int) -> None:
        """The next arrival, `request.order`, which ends after `output_tokens`."""
        order = len(self.requests)
        assert request.order == order
        if order == self._ints.shape[1]:
            self._ints = np.pad(self._ints, ((0, 0), (0, order)))
            self._floats = np.pad(self._floats, ((0, 0), (0, order)))
            self._name()
        self.requests.append(request)
        prompt = len(request.prompt_token_ids)
        self._ints[:, order] = prompt, 0, 0, 0, request.max_new_tokens, output_tokens, 0, 0, 0, 0
        self._floats[:, order] = request.slo.tbt_s, request.slo.stall_limit_s, np.nan, np.nan, 0.0
        request.columns = self

    def progress(self, orders: Ints) -> Progress:
        """Columns of the requests with these arrival numbers."""
        prompt, generated, _, computed, max_new, _, pages, kind, late, stalls = self._ints[:, orders]
        _, _, first_s, last_s, _ = self._floats[:, orders]
        return Progress(prompt, generated, computed, max_new, pages, kind, first_s, last_s, late, stalls)

    def commit(self, orders: Ints, now: float) -> NDArray[np.bool_]:
        """One token at `now` for each of `orders`; which of them have their last one."""
        gaps = now - self.last_s[orders]  # NaN before a first token, which compares as false
        self.late[orders] += gaps > self.tbt_s[orders]
        self.stalls[orders] += gaps > self.stall_s[orders]
        self.longest_s[orders] = np.fmax(self.longest_s[orders], gaps)
        if np.isnan(gaps).any():
            self.first_s[orders[np.isnan(gaps)]] = now
        self.last_s[orders] = now
        self.inflight[orders] = 0
        self._sampled.append(orders)
        self._ends_s.append(now)
        self.gaps_now_s = gaps
        self._times = None
        return self.generated[orders] >= self.target[orders]

    def commit_often(self, orders: Ints, starts_s: Sequence[float], ends_s: Sequence[float]) -> None:
        """A token of each of `orders` at every one of `ends_s`, from their last ones at the first of `starts_s` on."""
        gaps = np.array(ends_s) - np.array(starts_s)
        longest_s = float(gaps.max())
        tbt_s, stall_s = self.tbt_s[orders], self.stall_s[orders]
        if longest_s > min(tbt_s.min(), stall_s.min()):
            self.late[orders] += (gaps > tbt_s[:, None]).sum(axis=1)
            self.stalls[orders] += (gaps > stall_s[:, None]).sum(axis=1)
        self.longest_s[orders] = np.fmax(self.longest_s[orders], longest_s)
        self.last_s[orders] = ends_s[-1]
        self.generated[orders] += len(ends_s)
        self._sampled += [orders] * len(ends_s)
        self._ends_s += ends_s
        self._times = None

    def times_s(self, order: int) -> Floats:
        """When each token of one request came."""
        if self._times is None:
            self._times = self._gather()
        first, times = self._times
        return times[first[order] : first[order + 1]]

    def gaps_s(self, order: int) -> Floats:
        """Gaps between the tokens of one request."""
        return np.diff(self.times_s(order))

    def _gather(self) -> tuple[Ints, Floats]:
        """All tokens' times by request and then by time, and `[n + 1]` where each request's begin."""
        orders = np.concatenate([np.zeros(0, np.int64), *self._sampled])
        times = np.repeat(self._ends_s, [len(s) for s in self._sampled])
        first = np.concatenate([[0], np.cumsum(np.bincount(orders, minlength=len(self.requests)))])
        return first, times[np.argsort(orders, kind="stable")]


def _counter(name: str) -> Any:
    """An attribute that lies in the column `name`; a value set before there are columns is a field's default."""

    def get(request: "SimulatedRequest") -> int:
        return int(getattr(request.columns, name).item(request.order))

    def put(request: "SimulatedRequest", value: int) -> None:
        if request.columns is not None:
            getattr(request.columns, name)[request.order] = value

    return property(get, put)


def _time(name: str) -> Any:
    """The same of a time, which is None before it has come."""

    def get(request: "SimulatedRequest") -> float | None:
        value = float(getattr(request.columns, name).item(request.order))
        return None if value != value else value

    return property(get, _counter(name).fset)


class SimulatedRequest(Request):
    """A request of the simulator: what changes with every token is read from columns, once `Columns.add` set them."""

    columns: Columns | None = None
    ended_s: float | None = None  # when it had its last token, was refused or was abandoned
    class_name: str = DEFAULT_CLASS
    target_tokens: int = 0  # length of its output, which no policy reads
    first_output_id: int = 0  # number of its output's first token

    num_computed_tokens = _counter("computed")
    num_late_gaps = _counter("late")
    num_stalls = _counter("stalls")
    first_token_s = _time("first_s")
    last_token_s = _time("last_s")

    @property
    def num_inflight_tokens(self) -> int:
        """Tokens that the iteration under way computes."""
        assert self.columns is not None
        return self.columns.inflight.item(self.order)

    @num_inflight_tokens.setter
    def num_inflight_tokens(self, value: int) -> None:
        if self.columns is not None:
            self.columns.generated[self.order] += value - self.num_inflight_tokens
            self.columns.inflight[self.order] = value

    @property  # type: ignore[override]
    def output_token_ids(self) -> Sequence[int]:
        """As many as were generated, numbered on after the prompt; they mean nothing."""
        assert self.columns is not None
        first = self.first_output_id
        return range(first, first + self.num_generated_tokens - self.num_inflight_tokens)

    @output_token_ids.setter
    def output_token_ids(self, value: Sequence[int]) -> None:
        assert not value

    @property
    def gaps_s(self) -> list[float]:
        """Gaps between its tokens, collected from the times of all iterations."""
        assert self.columns is not None
        return self.columns.gaps_s(self.order).tolist()

    @gaps_s.setter
    def gaps_s(self, value: list[float]) -> None:
        assert not value

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated, those in flight included."""
        assert self.columns is not None
        return self.columns.generated.item(self.order)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_token_ids) + self.num_generated_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to be run through the model."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        generated = self.num_generated_tokens
        return generated > 0 and len(self.prompt_token_ids) + generated - self.num_computed_tokens == 1

    @property
    def is_exhausted(self) -> bool:
        """Whether every token it may generate is generated or in flight."""
        return self.num_generated_tokens >= self.max_new_tokens

    def tokens_until(self, time_s: float) -> int:
        """Tokens that had come by `time_s`."""
        assert self.columns is not None
        return int(np.searchsorted(self.columns.times_s(self.order), time_s, side="right"))

    @property
    def longest_gap_s(self) -> float:
        """The longest gap between its tokens; 0 without a gap."""
        assert self.columns is not None
        return self.columns.longest_s.item(self.order)

    @property
    def attained(self) -> bool:
        """As `Request.attained`, from the number of late gaps: the 99th percentile is one unless few enough are."""
        if self.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) or self.ttft_s is None:
            return False
        num_gaps = max(self.num_generated_tokens - 1, 0)
        forgiven = num_gaps - math.ceil(0.99 * num_gaps)
        return self.ttft_s <= self.slo.ttft_s and self.num_late_gaps <= forgiven
