"""What the engine takes, at each limit and one past it, and what it fills in. Nothing runs on the device."""

from dataclasses import replace

import pytest

from apt_jax.output import QueueFull
from apt_jax.request import SamplingParams, Slo
from tests.model.test_engine import CONFIG
from tests.support.checkpoint_folders import random_model
from tests.support.engines import GREEDY, make_engine


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=0)


def new_engine(model, **options):
    """A context of 64 tokens, blocks of 8."""
    return make_engine(model, CONFIG, **options)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "allowed"),
    [(10, None, 54), (10, 60, 54), (10, 54, 54), (10, 53, 53), (10, 1, 1), (63, 9, 1)],
)
def test_an_answer_is_cut_to_the_context(model, prompt, max_tokens, allowed):
    request = new_engine(model).add([5] * prompt, replace(GREEDY, max_tokens=max_tokens), request_id="r")
    assert request.max_new_tokens == allowed and request.params.max_tokens == max_tokens


@pytest.mark.parametrize(("mode", "max_tokens"), [("hidden", 47), ("hybrid", 47), ("kv", 15)])
def test_prompt_and_answer_must_fit_into_the_pool_but_for_the_last_token(model, mode, max_tokens):
    """Seven blocks of 8 hold 56 tokens as hidden vectors and 24 as KV; the last token is never cached."""
    engine = new_engine(model, num_blocks=7, cache_mode=mode)
    engine.add([5] * 10, replace(GREEDY, max_tokens=max_tokens), request_id="fits")
    with pytest.raises(ValueError, match=rf"up to {10 + max_tokens} tokens do not fit in the cache of 7 blocks"):
        engine.add([5] * 10, replace(GREEDY, max_tokens=max_tokens + 1), request_id="large")


def seeds_of(engine, count=4):
    return [engine.add([5], SamplingParams(), request_id=f"seedless-{k}").params.seed for k in range(count)]


def test_requests_without_a_seed_get_one_of_the_engine_s(model):
    first = seeds_of(new_engine(model, seed=3))
    assert len(set(first)) == 4 and all(0 <= seed < 2**63 for seed in first)
    assert first == seeds_of(new_engine(model, seed=3)) and not set(first) & set(seeds_of(new_engine(model, seed=4)))
    engine = new_engine(model, seed=3)
    assert engine.add([5], SamplingParams(seed=0), request_id="given").params.seed == 0
    assert seeds_of(engine) == first, "a seed that was given takes none of the engine's"


def test_what_a_request_does_not_say_is_filled_in(model):
    engine = new_engine(model, ttft_slo_ms=2500.0, tbt_slo_ms=125.0, stall_slo_ms=750.0)
    plain = engine.add([5], GREEDY, request_id="plain")
    assert (plain.slo, plain.priority, plain.output_token_ids) == (Slo(2.5, 0.125, 0.75), 0, [])
    own = engine.add(
        [5, 6], GREEDY, request_id="own", slo=Slo(9.0, 8.0), priority=-4, arrival_s=3.5, output_token_ids=[7, 8]
    )
    assert (own.slo, own.priority, own.arrival_s, own.output_token_ids) == (Slo(9.0, 8.0), -4, 3.5, [7, 8])
    assert (own.num_tokens, own.num_generated_tokens) == (4, 2) and own.eos_token_ids == {2}


@pytest.mark.parametrize(("given", "refused"), [(4, False), (5, True), (6, True)])
def test_an_answer_that_is_gone_on_with_must_lack_a_token(model, given, refused):
    engine, params = new_engine(model), replace(GREEDY, max_tokens=5)
    if refused:
        with pytest.raises(ValueError, match="output_token_ids has all 5 tokens"):
            engine.add([5], params, request_id="r", output_token_ids=[6] * given)
        assert not engine.has_unfinished
    else:
        assert engine.add([5], params, request_id="r", output_token_ids=[6] * given).num_generated_tokens == given


def test_as_many_wait_as_may(model):
    engine = new_engine(model, max_num_queued_reqs=3)
    for number in range(3):
        engine.add([5], GREEDY, request_id=str(number))
    with pytest.raises(QueueFull, match="3 requests are waiting, max_num_queued_reqs=3"):
        engine.add([5], GREEDY, request_id="one too many")
