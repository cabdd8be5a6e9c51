"""Plan -> fixed-shape padded arrays. Host side numpy only; the device sees exactly these arrays each iteration.

Every running request sits in a slot `0 .. max_num_seqs-1`. What rarely changes (sampling parameters, block tables)
is kept per slot and copied out by slot number, so that an iteration costs the host little more than fancy indexing.
Shape letters: T token slots of the bucket, R row slots, W pages per table.
"""

from collections.abc import Sequence

import numpy as np

from apt_jax.batching.arrays import NUM_TABLES, Batch, Known, Rows, Tokens
from apt_jax.batching.buckets import Buckets
from apt_jax.batching.sampling_rows import Sampling, empty_sampling, write_sampling
from apt_jax.cache import BlockTable, CacheKind, pages_for
from apt_jax.request import Request
from apt_jax.scheduling.state import Span


class BatchBuilder:
    """Packs spans into arrays of a bucket's shape. Keeps per-slot mirrors of tables and sampling parameters."""

    def __init__(self, buckets: Buckets, *, num_slots: int, table_pages: int):
        self.buckets = buckets
        self.num_slots = num_slots
        self._slots: list[Request | None] = [None] * num_slots
        self._slot_of: dict[int, int] = {}
        self._kinds: list[CacheKind | None] = [None] * num_slots
        self._seated: list[BlockTable | None] = [None] * num_slots
        self._pages = [0] * num_slots
        # one row more than there are slots: the padding row
        self._tables = [np.zeros((num_slots + 1, table_pages), np.int32) for _ in range(NUM_TABLES)]
        self._sampling = empty_sampling(num_slots + 1)

    def build(self, spans: Sequence[Span], *, prefill: bool = False) -> Batch:
        """Arrays for one iteration. Rows that sample come first. `prefill` forbids the shapes of mere decoding.

        Raises:
            ValueError: the spans exceed the largest bucket (the policy went past its limits).
        """
        spans = sorted(spans, key=_order)
        num_tokens = sum(span.num_tokens for span in spans)
        bucket = self.buckets.choose(num_tokens, len(spans), decode_only=num_tokens == len(spans) and not prefill)
        T, R = bucket.tokens, bucket.rows
        ids, on_device = np.zeros(T, np.int32), np.zeros(T, bool)
        row, position = np.full(T, R, np.int32), np.zeros(T, np.int32)
        slot = np.full(R, self.num_slots, np.int32)
        start, length, prompt, last, wanted = (np.zeros(R, np.int32) for _ in range(5))
        kind = np.zeros(R, np.int32)
        given: list[Known] = []
        at = 0
        for r, span in enumerate(spans):
            request, n = span.request, span.num_tokens
            is_new = request.table is not self._seated[self._slot_of.get(id(request), 0)]
            slot[r] = self._seat(request)
            if is_new and span.start and request.params.has_penalties:
                given.append(Known(int(slot[r]), known_tokens(request, 0, span.start)))
            start[r], length[r], last[r], wanted[r] = span.start, n, at + n - 1, span.samples
            prompt[r] = min(max(request.num_prompt_tokens - span.start, 0), n)
            kind[r] = request.table.kind.index  # type: ignore[union-attr]
            row[at : at + n] = r
            position[at : at + n] = range(span.start, span.start + n)
            known = known_tokens(request, span.start, n)
            ids[at : at + len(known)] = known
            on_device[at + len(known) : at + n] = True
            at += n
        requests = tuple(span.request for span in spans if span.samples)
        sample_rows = self.buckets.choose_sample_rows(len(requests))
        sample_slot = np.full(sample_rows, self.num_slots, np.int32)
        sample_slot[: len(requests)] = slot[: len(requests)]
        sample_length = np.zeros(sample_rows, np.int32)
        sample_length[: len(requests)] = (start + length)[: len(requests)]
        return Batch(
            bucket=bucket,
            tokens=Tokens(ids, on_device, row, position),
            rows=Rows(slot, start, length, prompt, last, wanted, kind, tuple(table[slot] for table in self._tables)),
            sampling=Sampling(*(array[sample_slot] for array in self._sampling)),
            sample_slot=sample_slot,
            sample_length=sample_length,
            requests=requests,
            spans=tuple(spans),
            known=tuple(given),
        )

    def _seat(self, request: Request) -> int:
        """The request's slot, its table brought up to date; takes a slot of a request that left if it has none."""
        slot = self._slot_of.get(id(request))
        if slot is None:
            slot = self._take_slot()
            self._slots[slot] = request
            self._slot_of[id(request)] = slot
            write_sampling(self._sampling, slot, request)
        table = request.table
        assert table is not None
        if self._seated[slot] is not table or self._kinds[slot] is not table.kind:  # admitted anew, or converted
            self._seated[slot], self._kinds[slot], self._pages[slot] = table, table.kind, 0
        done, pages = self._pages[slot], table.num_pages
        if done < pages:
            for array, blocks in zip(self._tables, table.blocks, strict=False):
                array[slot, done:pages] = blocks[done:]
            self._pages[slot] = pages
        return slot

    def _take_slot(self) -> int:
        for slot, request in enumerate(self._slots):
            if request is None:
                return slot
            if request.table is None:  # finished or preempted: it holds nothing any more
                del self._slot_of[id(request)]
                return slot
        raise AssertionError(f"more than max_num_seqs={self.num_slots} requests hold blocks")


def table_pages(max_model_len: int, block_size: int, multiple: int) -> int:
    """Pages of a request's table, rounded up to a multiple of some number."""
    pages = pages_for(max_model_len, block_size)
    return -(-pages // multiple) * multiple


def _order(span: Span) -> tuple[bool, int, int]:
    """Rows that sample first; then neighbours alike, because attention takes them in groups (`attention/xla.py`)."""
    return not span.samples, span.request.table.kind.index, -span.start  # type: ignore[union-attr]


def known_tokens(request: Request, start: int, count: int) -> list[int]:
    """Token ids `start .. start+count` of prompt and output, without those still in flight (at most the last)."""
    prompt = request.num_prompt_tokens
    known = list(request.prompt_token_ids[start : start + count]) if start < prompt else []
    if start + count > prompt:
        known += request.output_token_ids[max(start - prompt, 0) : start + count - prompt]
    assert len(known) >= count - 1, "only the newest token may be in flight"
    return known
