"""The scheduling problem of one iteration as data: which requests get cache blocks, and of which kind.

Request i has waited `pending_s[i]`, and all its tokens take `kv_blocks[i]` blocks as KV, half as hidden vectors.
Each hidden request slows the whole iteration down by `rho_s` per KV block, which delays all `num_requests` others:

    maximise    sum_i x_i (pending_s[i] - y_i * num_requests * rho_s * kv_blocks[i])
    subject to  sum_i x_i (1 - y_i / 2) * kv_blocks[i] <= capacity_blocks,   x, y in {0, 1}

It is NP-hard (with y = 0 it is the 0/1 knapsack problem). Source: Apt-Serve, arXiv 2504.07494, equations 5 to 7.
Beyond the paper: `rho_s` may be negative (hidden attention can be faster than KV), and `may_be_kv` and
`may_be_hidden` say which kinds a request can have now.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apt_jax.cache import CacheKind

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

KV_PER_HIDDEN = CacheKind.KV.blocks_per_page // CacheKind.HIDDEN.blocks_per_page  # blocks of the same tokens


@dataclass(frozen=True)
class Problem:
    """One instance over n requests; of equal ones the first is taken first. Arrays are `[n]`.

    Attributes:
        pending_s: value of serving the request now, in seconds; at least 0.
        kv_blocks: blocks that it takes as KV; whole pages, at least one.
        may_be_kv: whether it can hold KV blocks.
        may_be_hidden: whether it can hold hidden blocks (`hidden_blocks`, half as many).
        capacity_blocks: blocks to hand out.
        num_requests: requests that a slower iteration delays (U of the paper).
        rho_s: extra seconds of an iteration per KV block held as hidden instead; may be negative.

    Raises:
        ValueError: lengths differ, a value is out of range, or blocks are not whole pages.
    """

    pending_s: Floats
    kv_blocks: Ints
    may_be_kv: Bools
    may_be_hidden: Bools
    capacity_blocks: int
    num_requests: int
    rho_s: float

    def __post_init__(self) -> None:
        n = len(self.pending_s)
        for name in ("kv_blocks", "may_be_kv", "may_be_hidden"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, pending_s has {n}")
        if n and (self.kv_blocks.min() < KV_PER_HIDDEN or (self.hidden_blocks * KV_PER_HIDDEN != self.kv_blocks).any()):
            raise ValueError(f"kv_blocks must be positive and evenly divisible by {KV_PER_HIDDEN}")
        if n and not self.pending_s.min() >= 0:
            raise ValueError(f"pending_s has {self.pending_s.min()}, every value must be at least 0")

    @property
    def size(self) -> int:
        """Requests, n."""
        return len(self.pending_s)

    @cached_property
    def hidden_blocks(self) -> Ints:
        """`[n]` blocks that each takes as hidden vectors."""
        return self.kv_blocks // KV_PER_HIDDEN

    @cached_property
    def penalty_s(self) -> Floats:
        """`[n]` seconds of delay that the request causes to all requests together when it is hidden."""
        return np.asarray(self.kv_blocks * (self.num_requests * self.rho_s), np.float64)

    @property
    def is_guaranteed(self) -> bool:
        """Whether each request fits alone in every kind it may have: the premise of the factor-2 guarantee."""
        as_kv = bool((self.kv_blocks[self.may_be_kv] <= self.capacity_blocks).all())
        as_hidden = bool((self.hidden_blocks[self.may_be_hidden] <= self.capacity_blocks).all())
        return as_kv and as_hidden

    def value_s(self, solution: "Solution") -> float:
        """The objective at `solution`, in seconds."""
        return float(
            self.pending_s[solution.is_scheduled].sum()
            - self.penalty_s[solution.is_scheduled & solution.is_hidden].sum()
        )

    def blocks(self, solution: "Solution") -> int:
        """Blocks that `solution` hands out."""
        as_kv = self.kv_blocks[solution.is_scheduled & ~solution.is_hidden].sum()
        return int(as_kv + self.hidden_blocks[solution.is_scheduled & solution.is_hidden].sum())


@dataclass(frozen=True)
class Solution:
    """Who is scheduled (x) and with hidden cache (y; meaningless where x is false). Arrays are `[n]`.

    `order` lists the scheduled requests as indices, the most valuable per block first.
    """

    is_scheduled: Bools
    is_hidden: Bools
    order: Ints
