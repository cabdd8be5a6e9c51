"""How far requests have come, as columns: what a policy reads of all running requests at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apt_jax.request import Request

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Progress(NamedTuple):
    """Columns `[n]` of n requests that hold blocks; times in seconds.

    Attributes:
        prompt_tokens: of the prompt.
        generated: tokens generated, those in flight included.
        computed: tokens whose keys and values, or hidden vectors, are cached.
        max_new_tokens: most tokens that may be generated.
        pages: pages held.
        kind: `CacheKind.index` of the blocks held.
        first_token_s: when the first token came; NaN before it.
        last_token_s: when the newest token came; NaN before the first.
        late_gaps: gaps longer than the SLO's.
        stalls: gaps longer than the SLO's stall limit.
    """

    prompt_tokens: Ints
    generated: Ints
    computed: Ints
    max_new_tokens: Ints
    pages: Ints
    kind: Ints
    first_token_s: Floats
    last_token_s: Floats
    late_gaps: Ints
    stalls: Ints

    @property
    def tokens(self) -> Ints:
        """Prompt and generated tokens."""
        return self.prompt_tokens + self.generated

    @property
    def is_decoding(self) -> NDArray[np.bool_]:
        """Whether only the newest token is left to compute."""
        return (self.generated > 0) & (self.tokens - self.computed == 1)


def progress_of(requests: Sequence[Request]) -> Progress:
    """Columns gathered from `requests`; pages and kind are 0 of those without blocks."""
    tables = [r.table for r in requests]
    return Progress(
        _ints([len(r.prompt_token_ids) for r in requests]),
        _ints([len(r.output_token_ids) + r.num_inflight_tokens for r in requests]),
        _ints([r.num_computed_tokens for r in requests]),
        _ints([r.max_new_tokens for r in requests]),
        _ints([0 if table is None else table.num_pages for table in tables]),
        _ints([0 if table is None else table.kind.index for table in tables]),
        np.array([r.first_token_s for r in requests], np.float64),  # None becomes NaN
        np.array([r.last_token_s for r in requests], np.float64),
        _ints([r.num_late_gaps for r in requests]),
        _ints([r.num_stalls for r in requests]),
    )


def _ints(values: list[int]) -> Ints:
    return np.array(values, np.int64)
