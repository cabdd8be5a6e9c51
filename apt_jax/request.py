"""A request: its input (prompt, SLO; `sampling/` has how tokens are chosen) and its progress."""

import enum
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

from apt_jax.cache import BlockTable, CacheKind
from apt_jax.sampling.params import SamplingParams

MAX_USER_CHARS = 256  # of a request's user
DEFAULT_STALL_S = 1.0  # the longest gap that a request with tight promises may have, unless it says so itself


@dataclass(frozen=True)
class Slo:
    """Latency SLO of one request, in seconds.

    Attributes:
        ttft_s: limit of the time from arrival to the first token.
        tbt_s: limit of the 99th percentile of the gaps between tokens.
        stall_s: limit of every single gap, for the strict reading; None: see `stall_limit_s`.
    """

    ttft_s: float = 1.0
    tbt_s: float = 1.0
    stall_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tbt_s", "stall_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"slo {name}={value} must be > 0 seconds")

    @cached_property
    def stall_limit_s(self) -> float:
        """Longest gap that strict attainment allows: `stall_s`, else `tbt_s` or, if larger, `ttft_s` up to 1 s."""
        if self.stall_s is not None:
            return self.stall_s
        return max(self.tbt_s, min(self.ttft_s, DEFAULT_STALL_S))

    def with_parts(
        self, ttft_s: float | None = None, tbt_s: float | None = None, stall_s: float | None = None
    ) -> "Slo":
        """This one with the parts that are given: what a request, or a class of them, asks for over the default.

        A stall limit that neither gives follows from the other two as they then are (`stall_limit_s`).
        """
        given = {"ttft_s": ttft_s, "tbt_s": tbt_s, "stall_s": stall_s}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def is_kept(self, ttft_s: float, gaps_s: Sequence[float]) -> bool:
        """Whether a request with this first-token time and these gaps attains it as the paper reads it.

        The paper's reading forgives one gap in a hundred, however long.
        """
        return ttft_s <= self.ttft_s and p99_gap_s(gaps_s) <= self.tbt_s

    def is_kept_strictly(self, ttft_s: float, gaps_s: Sequence[float]) -> bool:
        """Whether it attains it with no gap longer than `stall_limit_s`."""
        return self.is_kept(ttft_s, gaps_s) and max(gaps_s, default=0.0) <= self.stall_limit_s


# Offline nobody waits for single tokens: a day, so that only the throughput counts and order still does.
OFFLINE_SLO = Slo(86_400.0, 86_400.0)


def p99_gap_s(gaps_s: Sequence[float]) -> float:
    """99th percentile of a request's gaps (nearest rank above); 0 without a gap."""
    if not gaps_s:
        return 0.0
    ranked = sorted(gaps_s)
    return ranked[min(len(ranked) - 1, math.ceil(0.99 * len(ranked)) - 1)]


class Status(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    ABANDONED = "abandoned"  # ended by the policy, since its SLO could no longer be kept


@dataclass(eq=False)
class Request:
    """One sample of one prompt, and its progress. Mutated only by `SchedulerState`.

    Times are in seconds of the caller's clock. `max_new_tokens` is `max_tokens` cut to the context length.
    `num_inflight_tokens` counts tokens that the device is producing and the host has not read yet;
    `num_computed_tokens` counts tokens whose keys and values, or hidden vectors, are (or are being) cached.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    arrival_s: float
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    slo: Slo = Slo()
    priority: int = 0
    user: str | None = None  # whose it is, for policies that share fairly between users
    cache_salt: str | None = None  # only requests with the same one share cached prefixes
    restriction: Any = None  # which tokens it may not go on with, see `tokenization/restriction.py`
    order: int = -1  # arrival number, given by SchedulerState.add; ties are broken by it

    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_inflight_tokens: int = 0
    num_computed_tokens: int = 0
    table: BlockTable | None = None
    cache_history: list[CacheKind] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)  # of its first pages, as far as they were asked for
    page_hash: Any = None  # of the tokens up to the last of them
    num_cached_tokens: int | None = None  # of its tokens, taken from the prefix cache at its first admission
    num_preemptions: int = 0
    num_conversions: int = 0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    num_late_gaps: int = 0  # those longer than the SLO's
    num_stalls: int = 0  # those longer than the SLO's stall limit

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated, those in flight included."""
        return len(self.output_token_ids) + self.num_inflight_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens: the context that the cache must hold."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_inflight_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to be run through the model: 1 when decoding, more while prefilling."""
        known = len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_inflight_tokens
        return known - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        generated = len(self.output_token_ids) + self.num_inflight_tokens
        return generated > 0 and len(self.prompt_token_ids) + generated - self.num_computed_tokens == 1

    @property
    def is_exhausted(self) -> bool:
        """Whether every token it may generate is generated or in flight."""
        return len(self.output_token_ids) + self.num_inflight_tokens >= self.max_new_tokens

    @property
    def cache_kind(self) -> CacheKind | None:
        """The kind of the blocks it holds; None when it holds none."""
        return self.table.kind if self.table is not None else None

    def extend_page_keys(self, pages: int, block_size: int, secret: bytes) -> None:
        """Give it the `page_keys` of its first `pages` pages, whose tokens the host must know, with a pool's secret."""
        keys = self.page_keys
        if len(keys) >= pages:
            return
        start, stop, prompt = len(keys) * block_size, pages * block_size, len(self.prompt_token_ids)
        tokens = array("i", self.prompt_token_ids[start:stop])
        if stop > prompt:
            tokens.extend(self.output_token_ids[max(start - prompt, 0) : stop - prompt])
        assert len(tokens) == stop - start, (self.request_id, pages)
        if not keys:
            salt = self.cache_salt  # none differs from every one
            own = b"" if salt is None else b"\0" + salt.encode("utf-8", "surrogatepass")
            self.page_hash = sha256(sha256(secret + own).digest())
        data, step = tokens.tobytes(), block_size * tokens.itemsize
        for at in range(0, len(data), step):
            self.page_hash.update(data[at : at + step])
            keys.append(self.page_hash.digest())

    def pending_s(self, now: float) -> float:
        """Seconds since its last token, or since arrival (p_i of the paper's formulation)."""
        return now - (self.arrival_s if self.last_token_s is None else self.last_token_s)

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token; None before the first."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def p99_gap_s(self) -> float:
        """99th percentile of the gaps between its tokens (nearest rank above); 0 without a gap."""
        return p99_gap_s(self.gaps_s)

    @property
    def longest_gap_s(self) -> float:
        """The longest gap between its tokens; 0 without a gap."""
        return max(self.gaps_s, default=0.0)

    @property
    def attained(self) -> bool:
        """Whether it finished within its SLO as the paper reads it, without an error or abort."""
        if self.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) or self.ttft_s is None:
            return False
        return self.slo.is_kept(self.ttft_s, self.gaps_s)

    @property
    def attained_strictly(self) -> bool:
        """Whether it attained its SLO and no gap was longer than the stall limit."""
        return self.attained and self.longest_gap_s <= self.slo.stall_limit_s
