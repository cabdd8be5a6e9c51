"""The padded shapes. Every jitted step has one of these shapes, and nothing else ever compiles.

The sampling program has its own few shapes: it runs over the rows that finish their tokens in this iteration.
A decode bucket has as many token slots as row slots. A prefill bucket packs chunks of several requests (and, in a
mixed iteration, single decode tokens) into its token slots. Steps of 1.33x to 1.5x keep the padding small.
"""

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape: token slots, row slots, and whether every row has exactly one token."""

    tokens: int
    rows: int
    decode_only: bool


class Buckets:
    """All shapes for given limits, smallest first."""

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int):
        self.decode = [Bucket(size, size, True) for size in ladder(1, max_num_seqs)]
        smallest = min(max(16, max_num_batched_tokens // 64), max_num_batched_tokens)
        self.prefill = [
            Bucket(size, min(size, max_num_seqs), False) for size in ladder(smallest, max_num_batched_tokens)
        ]
        self.max_rows = max_num_seqs
        self.sample_rows = sorted({max(max_num_seqs // part, 1) for part in (16, 4, 1)})
        self.score_rows = min(max(max_num_seqs // 4, 16), max_num_batched_tokens)  # prompt positions in one program

    def choose_sample_rows(self, num_samples: int) -> int:
        """The smallest shape of the sampling program that holds `num_samples` rows."""
        return self.sample_rows[bisect_left(self.sample_rows, num_samples)]

    def few(self, decode_rows: Sequence[int], prefill_tokens: Sequence[int]) -> "Buckets":
        """Those of these sizes and the largest of each: less to compile, more padding."""
        found = copy(self)
        found.decode = [b for b in self.decode if b.tokens in decode_rows or b == self.decode[-1]]
        found.prefill = [b for b in self.prefill if b.tokens in prefill_tokens or b == self.prefill[-1]]
        found.sample_rows = self.sample_rows[-1:]
        return found

    def largest(self) -> "Buckets":
        """One shape for decodes and one for all else: enough where padding takes no time."""
        found = copy(self)
        found.decode, found.prefill = self.decode[-1:], self.prefill[-1:]
        return found

    @property
    def all(self) -> list[Bucket]:
        """Every bucket, largest first (so that a lack of memory shows at once)."""
        return [*reversed(self.prefill), *reversed(self.decode)]

    def choose(self, num_tokens: int, num_rows: int, *, decode_only: bool) -> Bucket:
        """The smallest bucket that holds the batch.

        Raises:
            ValueError: none does.
        """
        buckets = self.decode if decode_only else self.prefill
        index = bisect_left(buckets, num_tokens, key=lambda bucket: bucket.tokens)
        if index == len(buckets) or num_rows > buckets[index].rows:
            raise ValueError(f"{num_tokens=} in {num_rows=} exceed the largest shape {buckets[-1]}")
        return buckets[index]


def ladder(smallest: int, largest: int) -> list[int]:
    """Sizes from `smallest` to `largest`: powers of two and, from 8 on, the steps halfway between them."""
    sizes = {largest}
    size = 1
    while size < largest:
        sizes.add(size)
        if size >= 8:
            sizes.add(size + size // 2)
        size *= 2
    return sorted(size for size in sizes if smallest <= size <= largest)
