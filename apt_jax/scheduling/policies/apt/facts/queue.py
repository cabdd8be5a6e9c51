"""The unfinished requests of one queue as columns: what a decision reads of each of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from apt_jax.request import Request
from apt_jax.scheduling.plan import Scheduled
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints


@dataclass(frozen=True)
class Queue:
    """Columns of one queue in order of arrival; arrays are `[n]`, times in seconds.

    `since_s` is the last token or arrival; `tokens` are all known tokens; `uncomputed` those not cached yet;
    `late_gaps` counts gaps over the SLO; `started` says that the first token is out, `missed` that it was late or that
    a gap was longer than the stall limit; `given_up` that it was late once, which does not turn back; `in_lane` that it
    has entered the lane; `kind` is the `CacheKind.index`; this, `pages_held` and `blocks_per_page` are 0 for a waiting
    request; `decodes` are the entries with which running ones decode.
    """

    requests: Sequence[Request]
    since_s: Floats
    arrival_s: Floats
    ttft_slo_s: Floats
    tbt_slo_s: Floats
    stall_slo_s: Floats
    prompt_tokens: Ints
    max_new_tokens: Ints
    tokens: Ints
    uncomputed: Ints
    late_gaps: Ints
    started: Bools
    missed: Bools
    given_up: Bools
    in_lane: Bools
    priority: Ints
    pages_held: Ints
    kind: Ints
    blocks_per_page: Ints
    decodes: Sequence[Scheduled] = ()

    def __len__(self) -> int:
        return len(self.requests)

    @cached_property
    def generated(self) -> Ints:
        """Tokens generated so far."""
        return self.tokens - self.prompt_tokens

    @cached_property
    def decoding(self) -> Bools:
        """Whether only the newest token is left to compute."""
        return (self.generated > 0) & (self.uncomputed == 1)

    @cached_property
    def may_sample(self) -> Bools:
        """Whether it may generate more than what is generated or in flight."""
        return self.generated < self.max_new_tokens

    def pages(self, block_size: int) -> Ints:
        """Pages that all known tokens take."""
        return -(-self.tokens // block_size)

    @cached_property
    def limit_s(self) -> Floats:
        """Seconds since the last token or arrival within which the next token is due: first token, or stall limit."""
        return np.where(self.started, self.stall_slo_s, self.ttft_slo_s)

    @cached_property
    def slo_s(self) -> Floats:
        """The SLO of the next token: time to first token, or gap."""
        return np.where(self.started, self.tbt_slo_s, self.ttft_slo_s)
