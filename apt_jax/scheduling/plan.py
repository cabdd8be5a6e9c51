"""A Plan: what one iteration does, and why. Frozen data; policies make it, `SchedulerState.apply` carries it out."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from apt_jax.cache import CacheKind
from apt_jax.request import Request


class Reason(enum.Enum):
    """Why a request ran, waited, was preempted or converted in one iteration."""

    CONTINUES_PREFILL = "continues its prefill"
    ADMITTED_KV = "admitted with KV cache"
    ADMITTED_HIDDEN = "admitted with hidden cache"
    ADMITTED_HIDDEN_KV_DOES_NOT_FIT = "admitted with hidden cache because KV does not fit"
    ADMITTED_HIDDEN_SERVES_MORE = "admitted with hidden cache because its half of the memory serves others"
    ADMITTED_HIDDEN_FASTER = "admitted with hidden cache because hidden attention is faster here"
    ADMITTED_HIDDEN_CACHED = "admitted with hidden cache because more of its prompt is cached so"
    ADMITTED_LATE = "admitted although past its SLO because memory was left over"
    ADMITTED_LONGEST_LATE = "admitted because it has waited longest of those past their SLO"
    DECODES = "decodes its next token"
    FETCHED_BESIDE = "its pages are copied back beside this iteration, after which it goes on"
    FETCHED_AHEAD = "its pages are copied back ahead of its turn, into blocks that are free"
    CONVERTED_MEMORY_FREE = "converted to KV because memory is free"
    PREEMPTED_NO_BLOCKS = "preempted because no block is free for a request ahead of it"
    PREEMPTED_AHEAD = "preempted ahead of need, so that blocks stay free"
    PREEMPTED_LEAST_VALUE = "preempted because memory ran out and it was worth least per block"
    PREEMPTED_FOR_EARLIER = "preempted for a waiting request that goes before it"
    PREEMPTED_LATE = "preempted because it is past its SLO and others can still meet theirs"
    PREEMPTED_FOR_LONGEST_LATE = "preempted for the one that has waited longest past its SLO"
    WAITS_FOR_BLOCKS = "waits for free blocks"
    WAITS_FOR_SEQUENCES = "waits because max_num_seqs requests are running"
    WAITS_FOR_TOKENS = "waits because the token budget of this iteration is spent"
    WAITS_FOR_PREFILL = "waits because this iteration prefills"
    WAITS_FOR_DECODE = "waits because this iteration decodes"
    WAITS_FOR_COPIES = "waits because pages of requests ahead of it are copied back first"
    WAITS_LATE = "waits because it is past its SLO and was demoted"
    WAITS_BEHIND = "waits behind an earlier request"
    ABANDONED_LATE = "abandoned because its SLO can no longer be kept"


class Scheduled(NamedTuple):
    """Run `num_tokens` of the request's uncomputed tokens; the last one's successor is sampled if none remain.

    `kind` is the cache kind to admit a waiting request with; for a running request it is the kind it has.
    """

    request: Request
    num_tokens: int
    kind: CacheKind
    reason: Reason


class Fetched(NamedTuple):
    """Copy pages of a waiting request back from host memory beside the iteration, at most `num_blocks` blocks.

    They take free blocks once everybody else of the plan has theirs, and count as free all the same: the request finds
    them when it is admitted as `kind`, unless somebody needed the blocks before. With 0 blocks those that are there
    are evicted last. Nothing has to be given back: it may end, or never be admitted.
    """

    request: Request
    kind: CacheKind
    num_blocks: int
    reason: Reason


@dataclass(frozen=True)
class Preempted:
    """Take all blocks from a running request and let it wait; its tokens are computed again later."""

    request: Request
    reason: Reason


@dataclass(frozen=True)
class Converted:
    """Turn a running request's blocks into the kind that theirs converts to, before this iteration's tokens run."""

    request: Request
    reason: Reason

    @property
    def kind(self) -> CacheKind:
        """The kind it gets; asked before the plan is applied."""
        kind = self.request.cache_kind
        assert kind is not None and kind.converts_to is not None
        return kind.converts_to


@dataclass(frozen=True)
class Waited:
    """Requests that do nothing in this iteration, for one and the same reason."""

    requests: tuple[Request, ...]
    reason: Reason


@dataclass(frozen=True)
class Abandoned:
    """End a waiting or running request for good, before anything else of the plan; it counts as missed."""

    request: Request
    reason: Reason


@dataclass(frozen=True)
class Plan:
    """One iteration. Applied in the order: abandoned, preempted, converted, scheduled, fetched.

    Only a plan that schedules somebody fetches: copies run beside what is computed.

    An empty plan of a policy that waits on purpose has `wake_at_s`, when to plan anew if nobody comes or leaves before
    (`idling.py`).
    """

    scheduled: tuple[Scheduled, ...] = ()
    preempted: tuple[Preempted, ...] = ()
    converted: tuple[Converted, ...] = ()
    waited: tuple[Waited, ...] = ()
    abandoned: tuple[Abandoned, ...] = ()
    fetched: tuple[Fetched, ...] = ()
    wake_at_s: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing; pages alone that are fetched advance nobody."""
        return not (self.scheduled or self.preempted or self.converted or self.abandoned)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model runs."""
        return sum(entry.num_tokens for entry in self.scheduled)

    def decisions(self) -> Iterator[tuple[str, Request, Reason]]:
        """What was decided about each request, in the order it is applied, then those that wait."""
        for abandoned in self.abandoned:
            yield "abandoned", abandoned.request, abandoned.reason
        for preempted in self.preempted:
            yield "preempted", preempted.request, preempted.reason
        for converted in self.converted:
            yield "converted", converted.request, converted.reason
        for scheduled in self.scheduled:
            yield "scheduled", scheduled.request, scheduled.reason
        for fetched in self.fetched:
            yield "fetched", fetched.request, fetched.reason
        for waited in self.waited:
            for request in waited.requests:
                yield "waited", request, waited.reason
