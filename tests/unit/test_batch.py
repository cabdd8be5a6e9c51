"""BatchBuilder against a device that is only numpy: what it reads must be what each request really holds."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_jax.batching.buckets import Buckets
from apt_jax.batching.builder import BatchBuilder, known_tokens, table_pages
from apt_jax.batching.sampling_rows import MAX_END_IDS, NO_TOKEN, empty_sampling, write_sampling
from apt_jax.cache import CacheKind, pages_for
from apt_jax.request import Status
from apt_jax.scheduling.plan import Plan, Preempted, Reason, Scheduled
from tests.support.host_loop import EOS, MODES, HostLoop, finish_any, fits, make_request, make_state

MAX_MODEL_LEN = 64
KEY, VALUE, HIDDEN = 1_000_000, 2_000_000, 3_000_000  # what a vector in the pool is, plus its token


def request_number(number: int, prompt_tokens: int, max_new_tokens: int, **params):
    """A request whose token ids say whose they are: number * 1000 + position."""
    request = make_request(prompt_tokens, max_new_tokens, seed=number, temperature=number / 7, **params)
    return dataclasses.replace(request, prompt_token_ids=[number * 1000 + i for i in range(prompt_tokens)])


def true_token(number: int, position: int) -> int:
    return EOS if (number + position) % 17 == 0 else number * 1000 + position


class NumpyDevice:
    """Carries out batches on a token history and a pool, and checks everything that a step would read."""

    def __init__(self, state, builder, pages):
        self.state, self.builder, self.table_pages = state, builder, pages
        pool = state.pool
        self.history = np.full((builder.num_slots, MAX_MODEL_LEN), -1)
        self.pool = np.full((pool.num_blocks, pool.block_size), -1)
        self.batches = []

    def start(self, plan, spans):
        for entry in plan.converted:
            table = entry.request.table
            tokens = self.pool[table.blocks[0]] - HIDDEN
            self.pool[table.blocks[0]], self.pool[table.blocks[1]] = tokens + KEY, tokens + VALUE
        if spans:
            batch = self.builder.build(spans)
            self.batches.append(batch)
            self.check_shapes(batch, spans)
            self.run(batch)
            self.check_rows(batch, spans)
            self.sample(batch)

    def check_shapes(self, batch, spans):
        T, R, slots = batch.bucket.tokens, batch.bucket.rows, self.builder.num_slots
        assert all(array.shape == (T,) for array in batch.tokens)
        assert all(
            array.shape == (R, self.table_pages)[: array.ndim] for array in (*batch.rows[:-1], *batch.rows.tables)
        )
        assert all(len(array) == len(batch.sample_slot) for array in (*batch.sampling, batch.sample_length))
        assert batch.bucket in self.builder.buckets.all
        assert len(batch.sample_slot) in self.builder.buckets.sample_rows
        used = sum(span.num_tokens for span in spans)
        assert (batch.tokens.row < R).sum() == used and (batch.tokens.row[used:] == R).all(), "not packed"
        assert batch.bucket.decode_only == all(span.num_tokens == 1 for span in spans)
        if batch.bucket.decode_only:
            assert (batch.tokens.row[:used] == np.arange(used)).all()
        assert (batch.rows.slot[len(spans) :] == slots).all() and not batch.rows.length[len(spans) :].any()
        assert len(set(batch.rows.slot[: len(spans)])) == len(spans), "two rows share a slot"

    def run(self, batch):
        size = self.state.pool.block_size
        rows, tokens = batch.rows, batch.tokens
        for t in np.flatnonzero(tokens.row < batch.bucket.rows):
            row, position = tokens.row[t], tokens.position[t]
            slot, page, offset = rows.slot[row], position // size, position % size
            token = self.history[slot, position] if tokens.on_device[t] else tokens.ids[t]
            self.history[slot, position] = token
            is_hidden = rows.of_kind(CacheKind.HIDDEN)[row]
            self.pool[rows.tables[0][row, page], offset] = token + (HIDDEN if is_hidden else KEY)
            if not is_hidden:
                self.pool[rows.tables[1][row, page], offset] = token + VALUE

    def check_rows(self, batch, spans):
        """Each row is one span, and all its context is found through its slot and its table."""
        rows, left = batch.rows, {span.request.params.seed: span for span in spans}
        pages = np.arange(MAX_MODEL_LEN) // self.state.pool.block_size
        offsets = np.arange(MAX_MODEL_LEN) % self.state.pool.block_size
        for row in range(len(spans)):
            start, length = rows.start[row], rows.length[row]
            span = left.pop(self.history[rows.slot[row], 0] // 1000)
            request, context = span.request, start + length
            assert (start, length, start + length) == (span.start, span.num_tokens, request.num_computed_tokens)
            assert (batch.tokens.row[rows.last[row]], batch.tokens.position[rows.last[row]]) == (row, context - 1)
            number, prompt = request.params.seed, request.num_prompt_tokens
            expected = np.array([number * 1000 + i if i < prompt else true_token(number, i) for i in range(context)])
            assert (self.history[rows.slot[row], :context] == expected).all()
            first = self.pool[rows.tables[0][row, pages], offsets][:context]
            is_hidden = rows.of_kind(CacheKind.HIDDEN)[row]
            assert is_hidden == (request.cache_kind is CacheKind.HIDDEN)
            assert (first - expected == (HIDDEN if is_hidden else KEY)).all()
            if not is_hidden:
                assert (self.pool[rows.tables[1][row, pages], offsets][:context] - expected == VALUE).all()
            assert (request in batch.requests) == span.samples
        assert not left

    def sample(self, batch):
        for r, request in enumerate(batch.requests):
            slot, length = batch.sample_slot[r], batch.sample_length[r]
            number = request.params.seed
            assert self.history[slot, 0] // 1000 == number, "the sampled row is another request's"
            assert batch.rows.slot[r] == slot and length == request.num_computed_tokens
            assert batch.sampling.seed[r].tolist() == [0, number]
            assert batch.sampling.temperature[r] == np.float32(number / 7)
            assert batch.sampling.prompt_tokens[r] == request.num_prompt_tokens
            self.history[slot, length] = true_token(number, length)
        assert (batch.sample_slot[len(batch.requests) :] == self.builder.num_slots).all()


def make_loop(depth=0, pages_multiple=4, **sizes):
    """A loop whose every plan is built and run on a NumpyDevice."""
    state = make_state(**sizes)
    limits = state.limits
    pages = table_pages(MAX_MODEL_LEN, state.pool.block_size, pages_multiple)
    builder = BatchBuilder(
        Buckets(max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens),
        num_slots=limits.max_num_seqs,
        table_pages=pages,
    )
    device = NumpyDevice(state, builder, pages)
    return HostLoop(
        state,
        depth=depth,
        next_token=lambda r: true_token(r.params.seed, r.num_prompt_tokens + len(r.output_token_ids)),
        started=device.start,
    ), device


sizes = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(12, 60),
        "block_size": st.sampled_from([2, 4]),
        "max_num_seqs": st.integers(1, 5),
        "max_num_batched_tokens": st.integers(3, 30),
        "cache_mode": st.sampled_from(MODES),
        "depth": st.integers(0, 1),
    }
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 20)),
        st.tuples(st.just("step"), st.integers(1, 8)),
        st.tuples(st.sampled_from(["abort", "preempt"]), st.integers(0, 9)),
    ),
    min_size=3,
    max_size=25,
)


@given(sizes, actions)
@settings(max_examples=40, deadline=None)
def test_whatever_happens_the_device_finds_every_token_where_the_batch_says(sizes, actions):
    loop, _ = make_loop(**sizes)
    requests = []
    for action, *numbers in actions:
        match action:
            case "add":
                request = request_number(len(requests) + 1, *numbers)
                if fits(loop.state, request):
                    requests.append(request)
                    loop.state.add(request)
            case "step":
                for _ in range(numbers[0]):
                    loop.step()
            case "abort" if requests:
                finish_any(loop.state, requests[numbers[0] % len(requests)])
            case "preempt" if loop.state.running:
                victim = loop.state.running[numbers[0] % len(loop.state.running)]
                loop.run(Plan(preempted=(Preempted(victim, Reason.PREEMPTED_NO_BLOCKS),)))
    loop.drain()
    for request in requests:
        assert request.status is Status.FINISHED
        number, prompt = request.params.seed, request.num_prompt_tokens
        assert request.output_token_ids == [
            true_token(number, prompt + i) for i in range(len(request.output_token_ids))
        ]


def test_the_run_above_can_meet_preemption_conversion_and_slots_used_again():
    """The same device under load that is known to hold all of it."""
    loop, device = make_loop(num_blocks=26, max_num_seqs=3, max_num_batched_tokens=16, depth=1)
    requests = [request_number(n, 6 + 5 * (n % 4), 18, ignore_eos=True) for n in range(1, 13)]
    for request in requests:
        loop.state.add(request)
    loop.drain()
    assert sum(r.num_preemptions for r in requests) > 0 and sum(r.num_conversions for r in requests) > 0
    slots = Counter(slot for batch in device.batches for slot in {*batch.rows.slot.tolist()} - {3})
    assert set(slots) == {0, 1, 2}
    assert any(batch.tokens.on_device.any() for batch in device.batches)
    shapes = {batch.bucket.decode_only for batch in device.batches}
    assert shapes == {True, False}


def held(state, request, kind=CacheKind.KV):
    """Run the request's whole prompt, so that it holds blocks and its first token is in flight."""
    state.add(request)
    reason = Reason.ADMITTED_KV
    (span,) = state.apply(Plan((Scheduled(request, request.num_prompt_tokens, kind, reason),)), 0.0)
    return span


def builder_for(state, **changes):
    limits = state.limits
    buckets = Buckets(max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens)
    sizes = {"num_slots": limits.max_num_seqs, "table_pages": table_pages(MAX_MODEL_LEN, 4, 1)}
    return BatchBuilder(buckets, **{**sizes, **changes})


@pytest.mark.parametrize(("max_model_len", "multiple", "pages"), [(64, 1, 16), (65, 1, 17), (65, 8, 24), (4, 8, 8)])
def test_tables_are_as_wide_as_the_context_rounded_up(max_model_len, multiple, pages):
    assert table_pages(max_model_len, 4, multiple) == pages >= pages_for(max_model_len, 4)


def test_rows_that_sample_come_first_and_chunks_are_packed_without_gaps():
    state = make_state(100)
    chunk, whole = request_number(1, 20, 5), request_number(2, 3, 5)
    state.add(chunk)
    state.add(whole)
    entries = tuple(Scheduled(r, n, CacheKind.KV, Reason.ADMITTED_KV) for r, n in ((chunk, 10), (whole, 3)))
    batch = builder_for(state).build(state.apply(Plan(entries), 0.0))
    assert batch.requests == (whole,)
    assert batch.bucket.tokens == 16 and not batch.bucket.decode_only
    assert batch.rows.length[:3].tolist() == [3, 10, 0] and batch.rows.last[:2].tolist() == [2, 12]
    assert batch.tokens.ids.tolist() == [*range(2000, 2003), *range(1000, 1010), 0, 0, 0]
    assert batch.tokens.position.tolist() == [*range(3), *range(10), 0, 0, 0]
    assert batch.tokens.row.tolist() == [0] * 3 + [1] * 10 + [batch.bucket.rows] * 3
    assert batch.sample_length[0] == 3 and not batch.tokens.on_device.any()


def test_the_slot_of_one_that_ended_is_used_again_with_the_new_one_s_parameters():
    state = make_state(100, max_num_seqs=1)
    builder = builder_for(state)
    old = request_number(1, 4, 5, logit_bias={3: 1.0}, stop_token_ids=[9, 8])
    assert builder.build([held(state, old)]).sample_slot.tolist() == [0]
    finish_any(state, old)
    new = request_number(2, 9, 5)
    batch = builder.build([held(state, new)])
    assert batch.sample_slot.tolist() == [0]
    assert batch.sampling.temperature[0] == np.float32(2 / 7)
    assert (batch.sampling.bias_ids[0] == NO_TOKEN).all() and not batch.sampling.bias_values[0].any()
    assert set(batch.sampling.end_ids[0].tolist()) == {7, EOS, int(NO_TOKEN)}
    assert batch.rows.tables[0][0, :3].tolist() == new.table.blocks[0]


def test_a_preempted_request_gives_up_its_slot_and_takes_a_free_one_when_it_comes_back():
    state = make_state(100, max_num_seqs=2)
    builder = builder_for(state)
    early, late, new = (request_number(n, 4, 5) for n in (1, 2, 3))
    assert builder.build([held(state, early), held(state, late)]).sample_slot[:2].tolist() == [0, 1]
    state.apply(Plan(preempted=(Preempted(early, Reason.PREEMPTED_NO_BLOCKS),)), 0.0)
    assert builder.build([held(state, new)]).sample_slot[0] == 0
    state.commit(early, true_token(1, 4), 0.0)
    finish_any(state, late)
    again = builder.build(state.apply(Plan((Scheduled(early, 5, CacheKind.HIDDEN, Reason.ADMITTED_HIDDEN),)), 0.0))
    assert again.sample_slot[0] == 1 and again.sampling.seed[0].tolist() == [0, 1]
    assert again.rows.of_kind(CacheKind.HIDDEN)[0] and again.rows.tables[0][0, :2].tolist() == early.table.blocks[0]
    (span,) = state.apply(Plan((Scheduled(new, 1, CacheKind.KV, Reason.DECODES),)), 0.0)
    assert builder.build([span]).sample_slot[0] == 0


def test_more_requests_than_slots_is_a_bug_of_the_policy():
    state = make_state(100, max_num_seqs=2)
    builder = builder_for(state, num_slots=1)
    builder.build([held(state, request_number(1, 4, 5))])
    with pytest.raises(AssertionError, match="max_num_seqs=1"):
        builder.build([held(state, request_number(2, 4, 5))])


def test_a_batch_past_the_token_budget_is_refused():
    state = make_state(100, max_num_batched_tokens=16)
    with pytest.raises(ValueError, match="num_tokens=20 in num_rows=1 exceed"):
        builder_for(state).build([held(state, request_number(1, 20, 5))])


def test_known_tokens_over_the_border_of_prompt_and_output_and_with_the_newest_in_flight():
    request = request_number(1, 4, 9)
    request.output_token_ids = [50, 51, 52]
    request.num_inflight_tokens = 1
    assert known_tokens(request, 0, 3) == [1000, 1001, 1002]
    assert known_tokens(request, 2, 4) == [1002, 1003, 50, 51]
    assert known_tokens(request, 5, 2) == [51, 52]
    assert known_tokens(request, 5, 3) == [51, 52], "the one in flight is on the device only"
    assert known_tokens(request, 7, 1) == []
    with pytest.raises(AssertionError, match="newest token"):
        known_tokens(request, 6, 3)


def test_sampling_parameters_are_written_whole_and_leave_nothing_of_the_last_request():
    arrays = empty_sampling(2)
    full = make_request(
        5, 9, temperature=0.7, top_k=2**40, top_p=0.9, min_p=0.1, repetition_penalty=1.5, presence_penalty=-0.5,
        frequency_penalty=0.25, logit_bias={4: -100, 9: 3.5}, seed=-1, min_tokens=3, stop_token_ids=[8, 6], logprobs=0,
    )  # fmt: skip
    write_sampling(arrays, 1, full)
    got = {name: getattr(arrays, name)[1].tolist() for name in arrays._fields}
    assert got["temperature"] == pytest.approx(0.7) and got["top_k"] == 2**31 - 1
    assert (got["top_p"], got["min_p"]) == (pytest.approx(0.9), pytest.approx(0.1))
    penalties = got["repetition_penalty"], got["presence_penalty"], got["frequency_penalty"]
    assert penalties == (1.5, -0.5, 0.25)
    assert got["seed"] == [2**32 - 1, 2**32 - 1]
    assert (got["prompt_tokens"], got["min_tokens"], got["wants_logprobs"]) == (5, 3, True)
    assert got["end_ids"] == [8, 6, EOS] + [int(NO_TOKEN)] * (MAX_END_IDS - 3)
    assert got["bias_ids"][:3] == [4, 9, NO_TOKEN] and got["bias_values"][:3] == [-100, 3.5, 0]

    plain = make_request(2, 9, temperature=0.0, seed=np.int64(2**40 + 5), ignore_eos=True, stop_token_ids=[])
    write_sampling(arrays, 1, plain)
    expected = empty_sampling(1)
    expected.seed[0], expected.prompt_tokens[0] = (2**8, 5), 2
    for name in arrays._fields:
        assert (getattr(arrays, name)[1] == getattr(expected, name)[0]).all(), name
    assert all((a[0] == e[0]).all() for a, e in zip(arrays, empty_sampling(1), strict=True)), "another row changed"
