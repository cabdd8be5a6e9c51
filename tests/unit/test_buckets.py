"""The padded shapes: the smallest that fits, few of them, and little padding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.batching.buckets import Buckets, ladder


def num_programs(buckets: Buckets) -> int:
    """Steps, samplers and the conversion, as `Runner.compile_all` makes them."""
    return len(buckets.all) + len(buckets.sample_rows) + 1


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(64, 512), (256, 2048)])
def test_the_defaults_need_at_most_32_programs(max_num_seqs, max_num_batched_tokens):
    assert num_programs(Buckets(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)) <= 32


def test_the_ladder_doubles_and_halves_the_steps_from_8_on():
    assert ladder(1, 64) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    assert ladder(16, 100) == [16, 24, 32, 48, 64, 96, 100]
    assert ladder(5, 5) == [5]
    assert ladder(1, 1) == [1]


limits = st.tuples(st.integers(1, 300), st.integers(1, 3000))


@given(limits, st.data())
def test_the_smallest_shape_that_fits_is_chosen(limits, data):
    max_num_seqs, max_tokens = limits
    buckets = Buckets(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens)
    rows = data.draw(st.integers(1, max_num_seqs))
    decode = buckets.choose(rows, rows, decode_only=True)
    assert decode.decode_only and decode.tokens == decode.rows >= rows
    assert not [b for b in buckets.decode if rows <= b.rows < decode.rows]

    tokens = data.draw(st.integers(1, max_tokens))
    rows = data.draw(st.integers(1, min(tokens, max_num_seqs)))
    prefill = buckets.choose(tokens, rows, decode_only=False)
    assert not prefill.decode_only and prefill.tokens >= tokens and prefill.rows >= rows
    assert not [b for b in buckets.prefill if tokens <= b.tokens < prefill.tokens]

    samples = data.draw(st.integers(0, max_num_seqs))
    size = buckets.choose_sample_rows(samples)
    assert size == min(s for s in buckets.sample_rows if s >= samples)


@given(limits)
def test_shapes_are_distinct_sorted_and_reach_the_limits(limits):
    max_num_seqs, max_tokens = limits
    buckets = Buckets(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens)
    assert buckets.decode == sorted(set(buckets.decode)) and buckets.decode[-1].rows == max_num_seqs
    assert buckets.prefill == sorted(set(buckets.prefill)) and buckets.prefill[-1].tokens == max_tokens
    assert buckets.sample_rows == sorted(set(buckets.sample_rows)) and buckets.sample_rows[-1] == max_num_seqs
    assert buckets.sample_rows[0] >= 1 and len(buckets.sample_rows) <= 3
    assert all(b.rows <= min(b.tokens, max_num_seqs) for b in buckets.all)
    assert len(buckets.all) == len(buckets.decode) + len(buckets.prefill)
    for few, many in zip(buckets.prefill, buckets.prefill[1:], strict=False):
        assert many.tokens <= 1.5 * few.tokens, "a step this large wastes more than a third"


def test_the_largest_shapes_hold_every_batch():
    all_shapes = Buckets(max_num_seqs=64, max_num_batched_tokens=512)
    largest = all_shapes.largest()
    assert largest.all == [all_shapes.prefill[-1], all_shapes.decode[-1]]
    assert largest.choose(1, 1, decode_only=True) == largest.choose(64, 64, decode_only=True) == all_shapes.decode[-1]
    assert largest.choose(3, 1, decode_only=False).tokens == 512 and len(all_shapes.all) > 2
    assert largest.sample_rows == all_shapes.sample_rows


@pytest.mark.parametrize(("tokens", "rows", "decode_only"), [(65, 65, True), (513, 1, False), (100, 65, False)])
def test_a_batch_past_the_limits_is_refused_with_its_size(tokens, rows, decode_only):
    buckets = Buckets(max_num_seqs=64, max_num_batched_tokens=512)
    with pytest.raises(ValueError, match=rf"num_tokens={tokens} in num_rows={rows} exceed the largest shape"):
        buckets.choose(tokens, rows, decode_only=decode_only)


def test_few_shapes_hold_the_same_batches_with_more_padding():
    """Those asked for and the largest; every batch within the limits still fits."""
    buckets = Buckets(max_num_seqs=64, max_num_batched_tokens=512)
    few = buckets.few([8], [128, 100])
    assert [b.tokens for b in few.decode] == [8, 64] and [b.tokens for b in few.prefill] == [128, 512]
    assert few.sample_rows == [64] and len(buckets.decode) > 2, "the others are unchanged"
    assert few.choose(9, 9, decode_only=True).tokens == 64 and few.choose(100, 3, decode_only=False).tokens == 128
