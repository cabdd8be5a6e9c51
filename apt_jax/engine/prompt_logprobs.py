"""Log-probabilities of prompts: the positions requested from the device, chunk by chunk, and the results.

The hidden state after prompt token p gives the distribution of token p + 1, so a prompt of P tokens has P - 1 of them.
A prompt may be prefilled in several iterations, lose its cache in between and be run again: each position is asked for
once. Iterations in which no request wants any cost nothing.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from apt_jax.batching.arrays import Batch, ScoreChunk
from apt_jax.execution.sampling import Scored
from apt_jax.logprob_rows import LogprobRows
from apt_jax.request import Request, Status
from apt_jax.scheduling.state import Span


class PromptLogprobs:
    """Prompt log-probabilities of all unfinished requests that want them, in chunks of `rows` positions."""

    def __init__(self, rows: int):
        self._rows = rows
        self._asked: dict[str, int] = {}  # positions that the device has been asked for
        self._found: dict[str, LogprobRows] = {}

    def add(self, request: Request) -> None:
        """A request has come."""
        if request.params.prompt_logprobs is not None:
            self._asked[request.request_id] = 0
            self._found[request.request_id] = LogprobRows()

    def wanted(self, spans: Sequence[Span]) -> bool:
        """Whether any of these spans covers a position that is wanted and was not asked for."""
        return bool(self._asked) and any(len(self._positions(span)) > 0 for span in spans)

    def ask(self, batch: Batch) -> Batch:
        """The batch with chunks of all wanted positions, which count as asked for from now on."""
        index: list[int] = []
        target: list[int] = []
        owner: list[Request] = []
        first = batch.rows.last - batch.rows.length + 1
        wanted = batch.rows.wanted.copy()
        for row, span in enumerate(batch.spans):
            positions = self._positions(span)
            if not positions:
                continue
            wanted[row] = span.num_tokens
            request, offset = span.request, int(first[row]) - span.start
            index += [offset + position for position in positions]
            target += request.prompt_token_ids[positions.start + 1 : positions.stop + 1]
            owner += [request] * len(positions)
            self._asked[request.request_id] = positions.stop
        chunks = tuple(
            ScoreChunk(
                _padded(index[at : at + self._rows], self._rows),
                _padded(target[at : at + self._rows], self._rows),
                tuple(owner[at : at + self._rows]),
            )
            for at in range(0, len(index), self._rows)
        )
        return batch._replace(chunks=chunks, rows=batch.rows._replace(wanted=wanted))

    def take(self, chunks: Sequence[ScoreChunk], scores: Sequence[Scored]) -> list[Request]:
        """Keep what the device has found for `chunks`; returns the requests for which a result is NaN."""
        bad: dict[int, Request] = {}
        for chunk, scored in zip(chunks, scores, strict=True):
            start = 0
            for request_id, group in groupby(chunk.requests, key=lambda request: request.request_id):
                request, *others = group
                rows = slice(start, start + 1 + len(others))
                start = rows.stop
                if request.status is Status.FINISHED:
                    continue
                if np.isnan(scored.logprob[rows]).any():
                    bad[id(request)] = request
                    continue
                count = request.params.prompt_logprobs
                top_ids, top_logprobs = scored.top_ids[rows, :count], scored.top_logprobs[rows, :count]
                self._found[request_id].extend_from_arrays(
                    chunk.target[rows], scored.rank[rows], scored.logprob[rows], top_ids, top_logprobs
                )
        return list(bad.values())

    def pop(self, request: Request) -> LogprobRows | None:
        """All results of a request, once; None if it wants none or has had them. Its prompt must have been run."""
        if request.request_id not in self._asked:
            return None
        found = self._found[request.request_id]
        assert len(found) == request.num_prompt_tokens - 1, (request.request_id, len(found))
        self.forget(request.request_id)
        return found

    def forget(self, request_id: str) -> None:
        """A request has ended; unknown ids change nothing."""
        self._asked.pop(request_id, None)
        self._found.pop(request_id, None)

    def rewind(self) -> None:
        """Results in flight are lost: request them again when those prompts are run again."""
        for request_id, found in self._found.items():
            self._asked[request_id] = len(found)

    def _positions(self, span: Span) -> range:
        """Positions of a span that are wanted and were not asked for."""
        asked = self._asked.get(span.request.request_id)
        if asked is None:
            return range(0)
        stop = min(span.start + span.num_tokens, span.request.num_prompt_tokens - 1)
        return range(max(span.start, asked), max(span.start, asked, stop))


def _padded(values: list[int], rows: int) -> np.ndarray:
    array = np.zeros(rows, np.int32)
    array[: len(values)] = values
    return array
