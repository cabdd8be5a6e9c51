"""Decode iterations that one call runs one after the other, against a call for each."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.cpu_kernels import library
from apt_jax.cpu_kernels.relay import Relay, hand_over
from apt_jax.execution.forms.iterations import FollowedIterations
from apt_jax.model_config import ModelConfig
from apt_jax.request import SamplingParams
from tests.support.checkpoint_folders import random_model
from tests.support.engines import GREEDY, Orders, make_engine
from tests.support.engines import finish as finish_all

try:
    library.register()
except library.Unavailable as error:
    pytest.skip(f"the C++ kernels cannot be had here: {error}", allow_module_level=True)

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=128,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(),
)  # fmt: skip
PROMPTS = [[5, 6, 7], [9] * 13, [11, 12, 13, 14, 15, 16, 17], [8]]
SEEDED = SamplingParams(temperature=1.0, seed=7, top_p=0.9, max_tokens=30, ignore_eos=True)
PENALISED = SamplingParams(temperature=0, max_tokens=25, frequency_penalty=1.5, min_tokens=20, logprobs=3)
BIASED = SamplingParams(temperature=0.7, seed=3, max_tokens=40, logit_bias={9: 4.0}, ignore_eos=True)
MIXED = [GREEDY, SEEDED, PENALISED, BIASED]


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, seed=0)


@pytest.fixture
def engine_of(model, monkeypatch):
    """Makes an engine, which iterates in its calls or does not. Calls wait for the host: these steps are short."""
    monkeypatch.setattr("apt_jax.execution.forms.iterations.GRACE_S", 60.0)

    def make(iterates=True, **options):
        engine = make_engine(model, CONFIG, **options)
        assert engine.runner._iterates
        engine.runner._iterates = iterates
        return engine

    return make


def finish(engine):
    """Step until nothing is unfinished; the last call does not wait for more."""
    outputs = finish_all(engine)
    engine.runner._end_iterations()
    return outputs


def run(engine, policy=None, each=MIXED):
    """Tokens and log-probabilities of every request, and the number of each iteration in its call."""
    if policy is not None:
        engine.policy = policy
    numbers, dispatch = [], engine.runner.dispatch

    def watched(batch):
        results = dispatch(batch)
        numbers.append(results.number if results.running is not None else None)
        return results

    engine.runner.dispatch = watched
    requests = [engine.add(p, s, request_id=str(i)) for i, (p, s) in enumerate(zip(PROMPTS, each, strict=True))]
    logprobs = {request.request_id: [] for request in requests}
    for output in finish(engine):
        logprobs[output.request.request_id] += [(one.rank, one.logprob) for one in output.logprobs]
    return [request.output_token_ids for request in requests], logprobs, numbers


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "int8"}, {"async_scheduling": True}])
def test_tokens_are_those_of_a_call_for_each(engine_of, options):
    kinds = {"1": CacheKind.HIDDEN, "3": CacheKind.HIDDEN}
    found, expected = (run(engine_of(iterates, **options), Orders(kinds)) for iterates in (True, False))
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for mine, other in zip(found[1].values(), expected[1].values(), strict=True):
        np.testing.assert_allclose(np.array(mine), np.array(other), rtol=1e-5)
    assert set(expected[2]) == {None}
    assert max(filter(None, found[2])) > 20, "pages were filled and requests ended, and the call went on"


def test_conversions_preemptions_and_prompts_beside_decodes_begin_another_call(engine_of):
    def policy():
        kinds = {str(i): CacheKind.HIDDEN for i in range(4)}
        return Orders(kinds, convert_at={"0": 9, "2": 14}, preempt_at={"1": 11, "3": 17}, mixed=True)

    found, expected = (run(engine_of(iterates), policy()) for iterates in (True, False))
    assert found[0] == expected[0]
    assert found[2].count(0) >= 3 and max(filter(None, found[2])) > 5


def test_more_rows_than_the_sampler_of_the_call_has_begin_another_one(engine_of):
    engine = engine_of(max_num_seqs=32)
    assert engine.runner.buckets.sample_rows == [2, 8, 32]
    first = engine.add([5, 6, 7], GREEDY, request_id="first")
    for _ in range(5):
        engine.step()
    running = engine.runner._running
    assert running.last > 1
    others = [engine.add([i, i], GREEDY, request_id=str(i)) for i in range(3)]
    finish(engine)
    alone = engine_of(False, max_num_seqs=32)
    expected = [alone.add(p, GREEDY, request_id=str(i)) for i, p in enumerate([[5, 6, 7], [0, 0], [1, 1], [2, 2]])]
    finish(alone)
    assert [r.output_token_ids for r in (first, *others)] == [r.output_token_ids for r in expected]
    assert engine.runner._running is not running


def test_requests_that_end_early_leave_nothing(engine_of):
    """By abort, by a stop token, and by a prompt that is refused a place: the iteration ahead of them is dropped."""
    stop = run(engine_of(False), each=[GREEDY] * 4)[0][0][10]
    engine = engine_of()
    stopped = engine.add(PROMPTS[0], replace(GREEDY, stop_token_ids=[stop]), request_id="stopped")
    aborted = engine.add(PROMPTS[1], GREEDY, request_id="aborted")
    for _ in range(6):
        engine.step()
    engine.abort("aborted")
    finish(engine)
    assert len(stopped.output_token_ids) <= 11 and stopped.output_token_ids[-1] == stop
    assert len(aborted.output_token_ids) < 10
    assert run(engine, each=[GREEDY] * 4)[0] == run(engine_of(False), each=[GREEDY] * 4)[0]


def test_pages_are_read_as_they_are_between_two_iterations(engine_of):
    """What takes the pool out of a call's hands ends it, and another one goes on."""
    engine, other = engine_of(enable_prefix_caching=True), engine_of(False, enable_prefix_caching=True)
    pages = []
    for one in (engine, other):
        one.add(PROMPTS[1], GREEDY, request_id="a")
        while len(one.state.running) == 0 or len(one.state.running[0].output_token_ids) < 8:
            one.step()
        table = one.state.running[0].table
        pages.append(one.runner.read_blocks([blocks[0] for blocks in table.blocks]))
        finish(one)
    for mine, expected in zip(*pages, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mine, expected)


def test_the_engine_says_how_long_the_device_is_busy(engine_of):
    engine = engine_of()
    engine.add(PROMPTS[0], GREEDY, request_id="a")
    assert engine.spare_s == 0
    for _ in range(8):
        engine.step()
    running = engine.runner._running
    running._lengths_s.extend([0.4] * 4)
    running._read_s = time.monotonic()
    assert 0.2 < engine.spare_s < 0.3, "three quarters of an iteration"
    late = engine.add(PROMPTS[1], GREEDY, request_id="b")
    engine.step()
    assert late.num_computed_tokens > 0, "it is in the next plan"
    finish(engine)
    assert engine.spare_s == 0


def test_a_call_that_fails_ends_its_requests_and_the_engine_goes_on(engine_of):
    engine = engine_of()
    expected = run(engine, each=[GREEDY] * 4)[0]

    def fail(*args):
        raise RuntimeError("out of order")

    lost = jax.jit(lambda: jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.int32)))
    (key,) = [key for key in engine.runner.programs if "Iterations" in type(key).__name__ and key.rows == 8]
    whole = engine.runner.programs._programs[key]
    engine.runner.programs._programs[key] = lambda pool, history, *rest: (pool, history, lost())
    for i, prompt in enumerate(PROMPTS):
        engine.add(prompt, GREEDY, request_id=str(i))
    outputs = finish(engine)
    assert sum(output.error is not None and "out of order" in output.error for output in outputs) == 4
    engine.runner.programs._programs[key] = whole
    assert run(engine, each=[GREEDY] * 4)[0] == expected


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_a_call_is_started_loses_its_requests_and_nothing_else(engine_of, moment):
    """As by Ctrl-C in `LLM.generate`: before the program has the pool, and after."""
    engine = engine_of()
    expected = run(engine, each=[GREEDY] * 4)[0]
    (key,) = [key for key in engine.runner.programs if "Iterations" in type(key).__name__ and key.rows == 8]
    whole = engine.runner.programs._programs[key]

    def interrupted(pool, *rest):
        if moment == "after":
            jax.tree.map(lambda array: array.delete(), pool)
        raise KeyboardInterrupt

    engine.runner.programs._programs[key] = interrupted
    for i, prompt in enumerate(PROMPTS):
        engine.add(prompt, GREEDY, request_id=str(i))
    with pytest.raises(KeyboardInterrupt):
        finish(engine)
    engine.runner.programs._programs[key] = whole
    assert {output.error for output in finish(engine)} == {"KeyboardInterrupt"}
    assert run(engine, each=[GREEDY] * 4)[0] == expected


def counting(relay, first):
    """A call that doubles what it is given, iteration by iteration."""

    def iterate(carry):
        done, _, own = carry
        follows, following = hand_over(relay, own * 2, own)
        return done + 1, follows, following

    return jax.lax.while_loop(lambda carry: carry[1], iterate, (jnp.int32(0), jnp.bool_(True), first))[0]


SHAPE = jax.ShapeDtypeStruct((3,), jnp.int32)


def test_a_call_works_on_what_it_is_given_and_ends_when_nothing_comes():
    first = np.arange(3, dtype=np.int32)
    relay = Relay(first, SHAPE)
    assert relay.give(first + 10)
    done = jax.jit(counting)(np.array([relay.number], np.int32), first)
    np.testing.assert_array_equal(relay.wait(0, 10), first * 2)
    given = 2
    while relay.give(first + given * 10):  # until the host is too late
        np.testing.assert_array_equal(relay.wait(given - 1, 10), (first + (given - 1) * 10) * 2)
        given += 1
        time.sleep(0.02 if given > 20 else 0)
    assert int(done) == given
    assert relay.wait(given, 0.01) is None and not relay.give(first)


def test_a_call_whose_host_is_gone_ends():
    first = np.arange(3, dtype=np.int32)
    relay = Relay(first, SHAPE)
    number = np.array([relay.number], np.int32)
    assert relay.give(first)
    relay.close()
    assert int(jax.jit(counting)(number, first)) == 1
    assert not relay.give(first) and relay.wait(0, 0.01) is None


@pytest.mark.parametrize("way", ["end", "close"])
def test_a_call_that_waits_for_its_host_ends_when_told(way):
    first = np.arange(3, dtype=np.int32)
    relay = Relay(first, SHAPE, grace_s=60.0)
    assert relay.give(first + 1)
    with ThreadPoolExecutor(1) as thread:  # so small a program runs in the thread that calls it
        done = thread.submit(lambda: int(jax.jit(counting)(np.array([relay.number], np.int32), first)))
        np.testing.assert_array_equal(relay.wait(1, 10), (first + 1) * 2)
        time.sleep(0.05)
        assert not done.done()
        getattr(relay, way)()
        assert done.result(10) == 2 and not relay.give(first)


def test_no_iteration_is_given_before_the_one_before_the_last_was_read(engine_of):
    engine = engine_of()
    engine.add(PROMPTS[0], GREEDY, request_id="a")
    engine.step()
    engine.step()
    running = engine.runner._running
    assert isinstance(running, FollowedIterations) and running.last == running._num_read
    running.last += 1
    assert not running.goes_on(None), "the device might write over results that nobody has read"
