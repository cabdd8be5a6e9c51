"""What the length predictor answers, against figures worked out by hand."""

import numpy as np
import pytest

from apt_jax.request import FinishReason, SamplingParams
from apt_jax.sampling.params import PoolingParams
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.papers.length_by_retrieval import RetrievalPredictor
from tests.support.host_loop import make_request


def taught(lengths, prior=256.0, prompt=20):
    """A predictor that saw outputs of these lengths, all after prompts of one class."""
    predictor = LengthPredictor(prior)
    for length in lengths:
        predictor.learn_length(prompt, length)
    return predictor


def remaining(predictor, prompt, generated):
    return float(predictor.remaining_tokens(prompt, generated))


def test_before_anything_has_finished_the_prior_answers():
    assert [remaining(LengthPredictor(), 20, n) for n in (0, 1, 500)] == [256.0] * 3
    assert remaining(LengthPredictor(40.0), 20, 5) == 40.0


@pytest.mark.parametrize("params", [PoolingParams(), SamplingParams(max_tokens=0, prompt_logprobs=1)])
def test_prompts_that_are_embedded_or_scored_say_nothing_about_lengths(params):
    predictor, near = LengthPredictor(), RetrievalPredictor(LengthPredictor())
    waits = make_policy("nested-wait")
    for k in range(40):
        ended = make_request(20, 1)
        ended.params, ended.finish_reason, ended.output_token_ids = params, FinishReason.LENGTH, [5]
        ended.order = k
        predictor.learn(ended)
        near.saw_prompt(ended, np.ones(4, np.float32))
        near.learn(ended)
        waits.finished(ended, 0.0)
    assert predictor.num_finished == 0 and remaining(predictor, 20, 0) == 256.0
    assert near._count == 0 and not waits._lengths
    ended.params = SamplingParams()
    predictor.learn(ended)
    assert predictor.num_finished == 1


def test_the_mean_of_what_is_left_leans_on_the_prior_by_four_samples():
    """At first the guess is the prior; later it is half of what was generated, at most the prior."""
    predictor = taught([11, 31], prior=100.0)
    assert remaining(predictor, 20, 0) == remaining(predictor, 20, 1) == pytest.approx((10 + 30 + 4 * 100) / 6)
    assert remaining(predictor, 20, 2) == pytest.approx((9 + 29 + 4 * 1) / 6)
    assert remaining(predictor, 20, 8) == pytest.approx((3 + 23 + 4 * 4) / 6)
    assert remaining(predictor, 20, 16) == pytest.approx((15 + 4 * 8) / 5)  # only one was longer than 16
    assert remaining(predictor, 20, 64) == 32.0  # none was: half of it again
    assert remaining(predictor, 20, 1024) == 100.0  # but no more than the prior
    assert remaining(predictor, 20, 10**9) == 100.0
    assert remaining(taught([11], prior=1e6), 20, 10**9) == 2**16 / 2, "the table ends at 65,536 tokens"
    assert remaining(taught([2] * 100, prior=1.0), 20, 1) == 1.0, "at least one token is to come"


def test_an_output_as_long_as_what_was_generated_is_not_beyond_it():
    assert remaining(taught([16, 16]), 20, 16) == 8.0
    assert remaining(taught([17, 17]), 20, 16) == pytest.approx((1 + 1 + 4 * 8) / 6)


def test_the_grid_has_four_points_an_octave_and_takes_the_one_below():
    """2, 2.38, 2.83, 3.36, 4: three tokens are looked up at 2.83."""
    predictor = taught([100] * 48)
    point = 2**1.5
    expected = (48 * (100 - point) + 4 * point / 2) / 52
    assert remaining(predictor, 20, 3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("same", "other"),
    [((1, 15), 16), ((16, 63), 64), ((64, 255), 256), ((256, 1023), 1024), ((1024, 4095), 4096)],
)
def test_prompts_fall_into_classes_by_powers_of_four(same, other):
    """With 30 samples a class answers for itself; the other class has as many of its own."""
    predictor = LengthPredictor()
    for _ in range(30):
        predictor.learn_length(same[0], 10)
        predictor.learn_length(other, 500)
    for _ in range(20):  # some more, so that the last news are in the table
        predictor.learn_length(other, 500)
    short = remaining(predictor, same[0], 1)
    assert short == pytest.approx((30 * 9 + 4 * 256) / 34)
    assert remaining(predictor, same[1], 1) == short
    assert remaining(predictor, other, 1) > 10 * short
    assert remaining(predictor, 10**6, 1) == remaining(predictor, 4096, 1)


def test_the_last_class_has_no_upper_end_and_the_first_no_lower_one():
    predictor = taught([10] * 40, prompt=5000)
    assert remaining(predictor, 10**9, 1) == remaining(predictor, 4096, 1)
    predictor = taught([10] * 40, prompt=1)
    assert remaining(predictor, 0, 1) == remaining(predictor, 15, 1)


@pytest.mark.parametrize(("count", "own"), [(29, False), (30, True)])
def test_a_class_with_few_samples_is_answered_for_by_all_together(count, own):
    predictor = taught([100] * 30, prompt=2000)
    for _ in range(count):
        predictor.learn_length(20, 10)
    while predictor.num_finished < 82:  # the 82nd makes a new table
        predictor.learn_length(2000, 100)
    alone = (count * 9 + 4 * 256) / (count + 4)
    together = (count * 9 + (82 - count) * 99 + 4 * 256) / (82 + 4)
    assert remaining(predictor, 20, 1) == pytest.approx(alone if own else together)


def test_news_are_taken_in_by_a_twentieth_of_what_is_known():
    """The first outputs count at once; of 100 known, the sixth after the last table makes a new one."""
    predictor = LengthPredictor(100.0)
    for count in range(1, 20):
        predictor.learn_length(20, 11)
        assert remaining(predictor, 20, 1) == pytest.approx((10 * count + 400) / (count + 4)), count
    predictor = taught([11] * 100, 100.0)
    changes = []
    before = remaining(predictor, 20, 1)
    for _ in range(18):
        predictor.learn_length(20, 11)
        changes.append(remaining(predictor, 20, 1) != before)
        before = remaining(predictor, 20, 1)
    first = changes.index(True)
    assert [k - first for k, changed in enumerate(changes) if changed] == [0, 6, 12]


def test_the_newest_thousand_of_a_class_count():
    predictor = taught([500] * 1000 + [10] * 1060)
    assert remaining(predictor, 20, 1) == pytest.approx((1000 * 9 + 4 * 256) / 1004)
    assert predictor.num_finished == 1000


def test_each_of_an_array_gets_its_own_answer():
    predictor = LengthPredictor()
    for _ in range(60):
        predictor.learn_length(20, 10)
        predictor.learn_length(2000, 500)
    answers = predictor.remaining_tokens([20, 2000, 20], [1, 1, 64])
    assert answers.tolist() == [remaining(predictor, 20, 1), remaining(predictor, 2000, 1), 32.0]


@pytest.mark.parametrize(
    ("reason", "learned"),
    [(FinishReason.STOP, 1), (FinishReason.LENGTH, 1), (FinishReason.ABORT, 0), (FinishReason.ERROR, 0), (None, 0)],
)
def test_only_answers_that_ended_by_themselves_teach(reason, learned):
    predictor, request = LengthPredictor(100.0), make_request(20)
    request.output_token_ids, request.finish_reason = [5] * 11, reason
    predictor.learn(request)
    assert predictor.num_finished == learned
    assert remaining(predictor, 20, 1) == (pytest.approx((10 + 400) / 5) if learned else 100.0)
