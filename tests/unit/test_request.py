"""SamplingParams: what is refused and how it is said. Request: latencies and whether the SLO was kept."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason, SamplingParams, Slo, Status
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from tests.support.host_loop import EOS, STOP_ID, WORD, make_request, make_state

REFUSED = [
    ({"n": 0}, "n=0 must be between 1 and 128"),
    ({"n": 1.5}, "n=1.5 must be a whole number"),
    ({"n": True}, "n=True must be a whole number"),
    ({"temperature": -0.1}, "temperature=-0.1 must be between 0.0 and 10000.0"),
    ({"temperature": math.nan}, "temperature=nan must be between 0.0 and 10000.0"),
    ({"temperature": None}, "temperature=None must be a number"),
    ({"temperature": "hot"}, "temperature='hot' must be a number"),
    ({"top_k": -2}, "top_k=-2 must be at least -1"),
    ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
    ({"top_p": 0.0}, "top_p=0.0 must be greater than 0 and at most 1"),
    ({"top_p": 1.01}, "top_p=1.01 must be between 0.0 and 1.0"),
    ({"min_p": 2.0}, "min_p=2.0 must be between 0.0 and 1.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be between 0.0001 and 10000.0"),
    ({"repetition_penalty": math.inf}, "repetition_penalty=inf must be between 0.0001 and 10000.0"),
    ({"presence_penalty": 2.5}, "presence_penalty=2.5 must be between -2.0 and 2.0"),
    ({"frequency_penalty": -2.5}, "frequency_penalty=-2.5 must be between -2.0 and 2.0"),
    ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ({"max_tokens": -1, "prompt_logprobs": 0}, "max_tokens=-1 must be at least 1"),
    ({"max_tokens": 0, "prompt_logprobs": 0, "min_tokens": 1}, "min_tokens=1 is more than max_tokens=0"),
    ({"min_tokens": -1}, "min_tokens=-1 must be at least 0"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
    ({"logprobs": 21}, "logprobs=21 must be between 0 and 20"),
    ({"seed": 2**63}, f"seed={2**63} must be between {-(2**63)} and {2**63 - 1}"),
    ({"seed": 0.5}, "seed=0.5 must be a whole number"),
    ({"stop": ""}, "stop has an empty string, every one needs at least one character"),
    ({"stop": ["a", 5]}, "stop has 5, every one must be a string"),
    ({"stop_token_ids": range(65)}, "stop_token_ids has 65 entries, at most 64 are allowed"),
    ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias has 301 entries, at most 300 are allowed"),
    ({"logit_bias": {5: 101.0}}, "logit_bias of token 5 is 101.0, must be between -100 and 100"),
    ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 is nan, must be between -100 and 100"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_bad_parameters_are_refused_with_value_and_limit(fields, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (compared whole below)
        SamplingParams(**fields)
    assert str(error.value) == sentence


def test_the_edges_of_every_range_are_accepted():
    SamplingParams(
        n=128, temperature=1e4, top_k=1, top_p=1e-9, min_p=1.0, repetition_penalty=1e4, presence_penalty=2.0,
        frequency_penalty=-2.0, max_tokens=1, min_tokens=1, logprobs=20, seed=-(2**63), stop_token_ids=range(64),
        logit_bias=dict.fromkeys(range(300), -100),
    )  # fmt: skip
    SamplingParams(temperature=0, max_tokens=None, min_tokens=10**9, seed=np.int64(3), top_p=np.float32(0.5))


def test_spellings_of_nothing_and_of_one_stop():
    params = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, top_k=-1)
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.top_k) == ((), (), {}, 0)
    assert SamplingParams(stop="end").stop == ("end",)
    assert "temperature" in SamplingParams.field_names() and "best_of" not in SamplingParams.field_names()


def test_parameters_are_frozen_and_keep_no_reference_to_the_caller_s_lists():
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[2] = 1.0
    assert params.stop == ("a",) and params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize("fields", [{"logit_bias": {50: 1.0}}, {"stop_token_ids": [50]}, {"allowed_token_ids": [50]}])
def test_token_ids_outside_the_vocabulary_are_refused(fields):
    params = SamplingParams(**fields)
    (name,) = fields
    with pytest.raises(ValueError, match=rf"{name} has token id 50, the vocabulary is 0\.\.49"):
        params.check_vocabulary(50)
    SamplingParams(logit_bias={49: 1.0}, stop_token_ids=[0]).check_vocabulary(50)


@pytest.mark.parametrize("fields", [{"ttft_s": 0}, {"tbt_s": -1.0}, {"ttft_s": math.nan}])
def test_an_slo_must_be_positive(fields):
    with pytest.raises(ValueError, match=r"slo \w+=\S+ must be > 0 seconds"):
        Slo(**fields)


@given(st.sampled_from([0, 1, 2, 50, 99, 100, 101, 199, 200, 201, 300]), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_p99_is_the_smallest_gap_that_99_percent_do_not_exceed(count, seed):
    gaps = np.random.default_rng(seed).integers(0, 2 * count + 1, count).astype(float)
    request = make_request()
    request.gaps_s = gaps.tolist()
    not_above = (gaps[None, :] <= gaps[:, None]).sum(1)
    assert request.p99_gap_s == gaps[100 * not_above >= 99 * count].min(initial=math.inf if count else 0.0)


def test_p99_drops_one_of_a_hundred():
    request = make_request()
    request.gaps_s = [0.1] * 99 + [9.0]
    assert request.p99_gap_s == 0.1
    request.gaps_s = [0.1] * 98 + [9.0]
    assert request.p99_gap_s == 9.0


def finished(reason=FinishReason.LENGTH, first=1.0, gaps=(0.5, 1.0), **slo):
    request = make_request(arrival_s=10.0)
    request.slo = Slo(**{"ttft_s": 1.0, "tbt_s": 1.0, **slo})
    request.first_token_s = None if first is None else 10.0 + first
    request.gaps_s = list(gaps)
    request.finish_reason = reason
    return request


def test_attained_means_finished_by_itself_with_both_promises_kept_the_limit_included():
    assert finished().attained and finished(FinishReason.STOP).attained
    assert finished(gaps=()).attained, "no gap counts as 0"
    assert not finished(first=1.01).attained
    assert not finished(gaps=(0.5, 1.01)).attained
    assert finished(first=3.0, ttft_s=3.0, gaps=(0.1,), tbt_s=0.1).attained
    for reason in (FinishReason.ABORT, FinishReason.ERROR, None):
        assert not finished(reason).attained
    assert not finished(FinishReason.STOP, first=None).attained


def running(max_new_tokens=3, **params):
    """A request that has run its prompt, its first token in flight."""
    state = make_state(100)
    request = make_request(4, max_new_tokens, arrival_s=1.0, **params)
    state.add(request)
    state.apply(Plan((Scheduled(request, 4, CacheKind.KV, Reason.ADMITTED_KV),)), now=2.0)
    return state, request


def decode(state, request, token, now):
    state.apply(Plan((Scheduled(request, 1, CacheKind.KV, Reason.DECODES),)), now)
    return state.commit(request, token, now)


def test_counts_and_times_through_a_life():
    state, request = running()
    assert (request.num_tokens, request.num_generated_tokens, request.num_inflight_tokens) == (5, 1, 1)
    assert request.is_decoding and not request.is_exhausted
    assert (request.first_scheduled_s, request.ttft_s, request.pending_s(4.0)) == (2.0, None, 3.0)
    assert state.commit(request, WORD, 3.0) is None
    assert (request.ttft_s, request.pending_s(4.0), request.gaps_s) == (2.0, 1.0, [])
    assert decode(state, request, WORD, 3.5) is None
    assert decode(state, request, WORD, 5.5) is FinishReason.LENGTH
    assert request.gaps_s == [0.5, 2.0] and request.output_token_ids == [WORD] * 3
    assert request.is_exhausted and request.status is Status.FINISHED


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason"),
    [
        ({}, [EOS], FinishReason.STOP, None),
        ({}, [WORD, STOP_ID], FinishReason.STOP, STOP_ID),
        ({"ignore_eos": True}, [EOS, EOS, EOS], FinishReason.LENGTH, None),
        ({"ignore_eos": True}, [EOS, STOP_ID], FinishReason.STOP, STOP_ID),
        ({"min_tokens": 2}, [EOS, WORD, EOS], FinishReason.STOP, None),
        ({"min_tokens": 3}, [STOP_ID, EOS, WORD], FinishReason.LENGTH, None),
        ({}, [WORD, WORD, EOS], FinishReason.STOP, None),
    ],
)
def test_which_token_ends_a_request(params, tokens, reason, stop_reason):
    state, request = running(**params)
    seen = [state.commit(request, tokens[0], 3.0), *(decode(state, request, token, 4.0) for token in tokens[1:])]
    assert seen == [None] * (len(tokens) - 1) + [reason]
    assert (request.stop_reason, request.output_token_ids) == (stop_reason, tokens)
    assert state.pool.num_free == 100


def test_a_token_that_comes_after_the_end_is_dropped():
    state, request = running()
    state.finish(request, FinishReason.ABORT)
    assert state.commit(request, WORD, 3.0) is FinishReason.ABORT
    assert request.output_token_ids == [] and request.first_token_s is None


def test_logit_bias_takes_token_ids_as_text_too():
    assert SamplingParams(logit_bias={"5": 1.0, 7: -2}).logit_bias == {5: 1.0, 7: -2}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"logit_bias": {"x": 1.0}}, "logit_bias has the key 'x', every key must be a token id"),
        ({"logit_bias": {1.5: 1.0}}, "logit_bias has the key 1.5"),
        ({"logit_bias": {5: "1"}}, "logit_bias of token 5 is 1, must be between -100 and 100"),
        ({"logit_bias": [5]}, "must map token ids to numbers"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids has '5', every one must be a token id"),
        ({"stop_token_ids": [5, -1]}, "stop_token_ids has token id -1, every one must be at least 0"),
        ({"allowed_token_ids": [5, -1]}, "allowed_token_ids has token id -1, every one must be at least 0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has token id -1, every one must be at least 0"),
    ],
)
def test_token_ids_of_another_type_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bad_words": "abc"}, "bad_words='abc' must be a list"),
        ({"bad_words": 5}, "bad_words=5 must be a list"),
        ({"stop": 5}, "stop=5 must be a list"),
        ({"stop_token_ids": 5}, "stop_token_ids=5 must be a list"),
        ({"allowed_token_ids": 5}, "allowed_token_ids=5 must be a list"),
        ({"allowed_token_ids": "12"}, "allowed_token_ids='12' must be a list"),
        ({"ignore_eos": "no"}, "ignore_eos='no' must be True or False"),
        ({"truncate_prompt_tokens": "many"}, "truncate_prompt_tokens='many' must be a whole number"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0 must be at least 1, or -1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2 must be at least -1"),
    ],
)
def test_sampling_params_of_another_type_are_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**fields)
