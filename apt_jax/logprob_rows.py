"""Log-probabilities of many tokens, packed: one bytes object per token.

A `TokenLogprobs` with twenty likely tokens is two dozen objects. An answer of 64,000 tokens would be 1.4 million, which
Python's garbage collector looks at again and again with the interpreter's lock held: others' streams waited for 0.2 s.
Bytes are nothing to it, and take an eighth of the memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from struct import Struct
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from apt_jax.output import TokenLogprobs


class LogprobRows(Sequence[TokenLogprobs]):
    """A list of `TokenLogprobs`, each made when it is read; append to it or extend it."""

    __slots__ = ("_rows",)

    def __init__(self, entries: Iterable[TokenLogprobs] = ()):
        self._rows: list[bytes] = []
        self.extend(entries)

    def append(self, entry: TokenLogprobs) -> None:
        """Add one at the end."""
        packed = _row(len(entry.top)).pack(entry.token_id, entry.rank, entry.logprob, *chain.from_iterable(entry.top))
        self._rows.append(packed)

    def extend(self, entries: Iterable[TokenLogprobs]) -> None:
        """Add several at the end."""
        if isinstance(entries, LogprobRows):
            self._rows += entries._rows
        else:
            for entry in entries:
                self.append(entry)

    def extend_from_arrays(
        self,
        token_ids: ArrayLike,
        ranks: ArrayLike,
        logprobs: ArrayLike,
        top_ids: ArrayLike,
        top_logprobs: ArrayLike,
    ) -> None:
        """Add what a device has found: vectors `[R]`, and `[R, K]` of the K most likely tokens."""
        num_rows, num_top = np.shape(top_ids)
        top = np.dtype([("id", "<i4"), ("logprob", "<f8")])
        packed = np.empty(
            num_rows, [("token_id", "<i4"), ("rank", "<i4"), ("logprob", "<f8"), ("top", top, (num_top,))]
        )
        packed["token_id"], packed["rank"], packed["logprob"] = token_ids, ranks, logprobs
        packed["top"]["id"], packed["top"]["logprob"] = top_ids, top_logprobs
        data, size = packed.tobytes(), packed.dtype.itemsize
        self._rows += [data[at : at + size] for at in range(0, len(data), size)]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[TokenLogprobs]:
        return map(_entry, self._rows)

    @overload
    def __getitem__(self, at: int) -> TokenLogprobs: ...

    @overload
    def __getitem__(self, at: slice) -> "LogprobRows": ...

    def __getitem__(self, at: int | slice) -> "TokenLogprobs | LogprobRows":
        if isinstance(at, slice):
            part = LogprobRows()
            part._rows = self._rows[at]
            return part
        return _entry(self._rows[at])

    def __eq__(self, other: object) -> bool:
        """Also a list or tuple with the same entries is equal."""
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"LogprobRows({[*self]})"


@cache
def _row(num_top: int) -> Struct:
    """Token, rank and log-probability, then id and log-probability of each likely token."""
    return Struct("<iid" + "id" * num_top)


def _entry(row: bytes) -> TokenLogprobs:
    token_id, rank, logprob, *top = _row((len(row) - 16) // 12).unpack(row)
    return TokenLogprobs(token_id, logprob, rank, tuple(zip(top[::2], top[1::2], strict=True)))
