"""Plan -> fixed-shape padded arrays. Host side numpy only; the device sees exactly these arrays each iteration.

Every running request sits in a slot `0 .. max_num_seqs-1`. What rarely changes (sampling parameters, block tables)
is kept per slot and copied out by slot number, so that an iteration costs the host little more than fancy indexing.
Shape letters: T token slots of the bucket, R row slots, W pages per table.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from apt_jax.batching.buckets import Bucket, Buckets
from apt_jax.cache import CacheKind, pages_for
from apt_jax.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, Request
from apt_jax.scheduling.state import Span

MAX_END_IDS = MAX_STOP_TOKEN_IDS + 8  # stop ids of the request and end-of-sequence ids of the model
NO_TOKEN = np.int32(2**31 - 1)  # padding in lists of token ids: out of range of any vocabulary, so updates drop it


type Array = Any  # numpy on the host, jax inside a compiled step


class Tokens(NamedTuple):
    """Tokens that run in this iteration, packed; a padding token has row R."""

    ids: Array  # int32 [T]
    on_device: Array  # bool [T]: the id is in the device's history, not in `ids`
    row: Array  # int32 [T]
    position: Array  # int32 [T]


class Rows(NamedTuple):
    """The requests of this iteration; a padding row has slot max_num_seqs and length 0."""

    slot: Array  # int32 [R]
    start: Array  # int32 [R]: tokens already cached
    length: Array  # int32 [R]: tokens that run now
    last: Array  # int32 [R]: index in Tokens of the row's last token
    wanted: Array  # int32 [R]: of its tokens, the last ones after which hidden states are wanted
    is_hidden: Array  # bool [R]
    first_blocks: Array  # int32 [R, W]: keys, or hidden vectors
    second_blocks: Array  # int32 [R, W]: values


class Sampling(NamedTuple):
    """How each row's next token is chosen."""

    temperature: Array  # float32 [R]; 0 is greedy
    top_k: Array  # int32 [R]; 0 keeps all
    top_p: Array  # float32 [R]
    min_p: Array  # float32 [R]
    repetition_penalty: Array  # float32 [R]
    presence_penalty: Array  # float32 [R]
    frequency_penalty: Array  # float32 [R]
    seed: Array  # uint32 [R, 2]
    prompt_tokens: Array  # int32 [R]
    min_tokens: Array  # int32 [R]
    end_ids: Array  # int32 [R, MAX_END_IDS]: not allowed before min_tokens; padding NO_TOKEN
    bias_ids: Array  # int32 [R, MAX_LOGIT_BIAS]; padding NO_TOKEN
    bias_values: Array  # float32 [R, MAX_LOGIT_BIAS]
    wants_logprobs: Array  # bool [R]


class ScoreChunk(NamedTuple):
    """Prompt positions after which the log-probability of the token that followed is wanted."""

    index: Array  # int32 [C]: index in Tokens; padding 0
    target: Array  # int32 [C]: the token that followed; padding 0
    requests: tuple[Request, ...]  # whose positions these are, without padding


class Batch(NamedTuple):
    """One iteration's device input, and which request each row that samples is; these rows come first."""

    bucket: Bucket
    tokens: Tokens
    rows: Rows
    sampling: Sampling  # of sample_rows rows
    sample_slot: Array  # int32 [sample_rows]: padding is max_num_seqs
    sample_length: Array  # int32 [sample_rows]: tokens before the one to sample
    requests: tuple[Request, ...]
    spans: tuple[Span, ...]  # row by row
    chunks: tuple[ScoreChunk, ...] = ()


class BatchBuilder:
    """Packs spans into arrays of a bucket's shape. Keeps per-slot mirrors of tables and sampling parameters."""

    def __init__(self, buckets: Buckets, *, num_slots: int, table_pages: int):
        self.buckets = buckets
        self.num_slots = num_slots
        self._slots: list[Request | None] = [None] * num_slots
        self._slot_of: dict[int, int] = {}
        self._kinds: list[CacheKind | None] = [None] * num_slots
        self._pages = [0] * num_slots
        # one row more than there are slots: the padding row
        self._first = np.zeros((num_slots + 1, table_pages), np.int32)
        self._second = np.zeros((num_slots + 1, table_pages), np.int32)
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
        start, length, last, wanted = (np.zeros(R, np.int32) for _ in range(4))
        is_hidden = np.zeros(R, bool)
        at = 0
        for r, span in enumerate(spans):
            request, n = span.request, span.num_tokens
            slot[r] = self._seat(request, restart=span.start == 0)
            start[r], length[r], last[r], wanted[r] = span.start, n, at + n - 1, span.samples
            is_hidden[r] = request.cache_kind is CacheKind.HIDDEN
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
            rows=Rows(slot, start, length, last, wanted, is_hidden, self._first[slot], self._second[slot]),
            sampling=Sampling(*(array[sample_slot] for array in self._sampling)),
            sample_slot=sample_slot,
            sample_length=sample_length,
            requests=requests,
            spans=tuple(spans),
        )

    def _seat(self, request: Request, *, restart: bool) -> int:
        """The request's slot, its table brought up to date; takes a slot of a request that left if it has none."""
        slot = self._slot_of.get(id(request))
        if slot is None:
            slot = self._take_slot()
            self._slots[slot] = request
            self._slot_of[id(request)] = slot
            write_sampling(self._sampling, slot, request)
            restart = True
        table = request.table
        assert table is not None
        if restart or self._kinds[slot] is not table.kind:
            self._kinds[slot], self._pages[slot] = table.kind, 0
        done, pages = self._pages[slot], table.num_pages
        if done < pages:
            self._first[slot, done:pages] = table.blocks[0][done:]
            if len(table.blocks) > 1:
                self._second[slot, done:pages] = table.blocks[1][done:]
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


def _order(span: Span) -> tuple[bool, bool, int]:
    """Rows that sample first; then neighbours alike, because attention takes them in groups (`xla_attention.py`)."""
    return not span.samples, span.request.cache_kind is CacheKind.HIDDEN, -span.start


def known_tokens(request: Request, start: int, count: int) -> list[int]:
    """Token ids `start .. start+count` of prompt and output, without those still in flight (at most the last)."""
    prompt = request.num_prompt_tokens
    known = list(request.prompt_token_ids[start : start + count]) if start < prompt else []
    if start + count > prompt:
        known += request.output_token_ids[max(start - prompt, 0) : start + count - prompt]
    assert len(known) >= count - 1, "only the newest token may be in flight"
    return known


def empty_sampling(rows: int) -> Sampling:
    """Greedy sampling without any option, for `rows` rows."""
    return Sampling(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        repetition_penalty=np.ones(rows, np.float32),
        presence_penalty=np.zeros(rows, np.float32),
        frequency_penalty=np.zeros(rows, np.float32),
        seed=np.zeros((rows, 2), np.uint32),
        prompt_tokens=np.zeros(rows, np.int32),
        min_tokens=np.zeros(rows, np.int32),
        end_ids=np.full((rows, MAX_END_IDS), NO_TOKEN, np.int32),
        bias_ids=np.full((rows, MAX_LOGIT_BIAS), NO_TOKEN, np.int32),
        bias_values=np.zeros((rows, MAX_LOGIT_BIAS), np.float32),
        wants_logprobs=np.zeros(rows, bool),
    )


def write_sampling(arrays: Sampling, row: int, request: Request) -> None:
    """Write a request's sampling parameters into row `row` of `arrays`."""
    params = request.params
    for name in ("temperature", "top_k", "top_p", "min_p", "min_tokens"):
        getattr(arrays, name)[row] = min(getattr(params, name), 2**31 - 1)
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        getattr(arrays, name)[row] = getattr(params, name)
    seed = int(params.seed or 0) % 2**64  # int: a numpy integer cannot take the modulus
    arrays.seed[row] = seed >> 32, seed & 0xFFFFFFFF
    arrays.prompt_tokens[row] = request.num_prompt_tokens
    arrays.wants_logprobs[row] = params.logprobs is not None
    ends = [*(params.stop_token_ids or ()), *(() if params.ignore_eos else sorted(request.eos_token_ids))]
    arrays.end_ids[row] = NO_TOKEN
    arrays.end_ids[row, : len(ends)] = ends
    arrays.bias_ids[row] = NO_TOKEN
    arrays.bias_values[row] = 0
    if params.logit_bias:
        arrays.bias_ids[row, : len(params.logit_bias)] = list(params.logit_bias)
        arrays.bias_values[row, : len(params.logit_bias)] = list(params.logit_bias.values())
