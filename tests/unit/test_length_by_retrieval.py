"""Lengths by the outputs of prompts that the model sees alike, and what `alise` makes of them."""

import numpy as np

from apt_jax.request import FinishReason
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext, uses_prompt_states
from apt_jax.scheduling.policies.papers.length_by_retrieval import LEAST_KEPT, MOST_KEPT, RetrievalPredictor
from apt_jax.simulation.requests.known_lengths import KnownLengths
from tests.support.scheduling_loop import make_state, request, step

A100 = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"])


def finish_with(predictor, state, length, order, reason=FinishReason.STOP):
    """A request whose prompt the model has seen as `state` ends."""
    ended = request(4, 999)
    ended.order, ended.output_token_ids, ended.finish_reason = order, [5] * length, reason
    if state is not None:
        predictor.saw_prompt(ended, state)
    predictor.learn(ended)


def asked(predictor, state, order, generated=0):
    """Expected tokens of a request to come, after `generated` ones."""
    new = request(4, 999)
    new.order = order
    if state is not None:
        predictor.saw_prompt(new, state)
    return float(predictor.remaining_of([new], np.array([4]), np.array([generated]))[0])


def topic_states(rng):
    """States of two kinds of prompts; those of the second are longer vectors, which is to mean nothing."""
    axes = np.eye(16, dtype=np.float32)[:2]
    short, long = (
        4 * axis + other + 0.3 * rng.standard_normal(16) for axis, other in zip(axes, axes[::-1], strict=True)
    )
    return np.float32(short), np.float32(long * rng.uniform(9, 18))


def test_lengths_are_those_of_prompts_whose_states_are_near():
    rng, predictor = np.random.default_rng(0), RetrievalPredictor(LengthPredictor())
    for k in range(60):
        for offset, (state, length) in enumerate(zip(topic_states(rng), (20, 1500), strict=True)):
            finish_with(predictor, state, length, 2 * k + offset)
    short, long = topic_states(rng)
    assert (asked(predictor, short, 200), asked(predictor, long, 201)) == (20, 1500)
    assert asked(predictor, long, 201, generated=100) == 1400
    assert 600 < asked(predictor, None, 202) < 900, "the mean of all, while its prompt is not computed"
    assert asked(predictor, short, 203, generated=20) == asked(predictor, None, 204, generated=20), "none was longer"
    finish_with(predictor, short, 5, 203, FinishReason.ABORT)
    finish_with(predictor, None, 5, 204)
    assert not predictor._states.keys() - {200, 201} and asked(predictor, short, 205) == 20, "neither is a neighbour"
    finish_with(predictor, short, 5, 205)
    assert 205 not in predictor._states and 205 not in predictor._near, "nothing is kept of what has ended"


def test_few_finished_requests_are_no_choice_of_neighbours_and_old_ones_are_forgotten():
    rng, predictor = np.random.default_rng(0), RetrievalPredictor(LengthPredictor())
    for order in range(LEAST_KEPT - 1):
        finish_with(predictor, topic_states(rng)[order % 2], (20, 1500)[order % 2], order)
    assert asked(predictor, topic_states(rng)[0], 5000) == asked(predictor, None, 5001)
    for order in range(LEAST_KEPT, LEAST_KEPT + MOST_KEPT):
        finish_with(predictor, topic_states(rng)[0], 40, order)
    assert asked(predictor, topic_states(rng)[0], 5002) == 40, "the newest only"


def test_alise_reads_prompts_unless_lengths_are_known_or_retrieval_is_off():
    for name, context, reads in (
        ("alise", {}, True),
        ("alise", {"abandon_after_s": 5.0}, True),
        ("alise", {"predictor": KnownLengths()}, False),
        ("alise:retrieval=off", {}, False),
        ("sjf", {}, False),
    ):
        assert uses_prompt_states(make_policy(name, PolicyContext(**context))) is reads


def test_alise_orders_by_what_was_found_near_the_prompt():
    """Of two that run, the one like long ones is preempted for a newcomer of middling length."""
    rng, policy = np.random.default_rng(0), make_policy("alise", PolicyContext(A100))
    for k in range(60):
        for offset, (state, length) in enumerate(zip(topic_states(rng), (20, 1500), strict=True)):
            finish_with(policy._predictor, state, length, 1000 + 2 * k + offset)
    for seen, preempted in ((topic_states(rng), ["b"]), (topic_states(rng)[::-1], ["a"])):
        state = make_state(200, 4, max_num_seqs=2)
        pair = [request(8, 400, name=name) for name in "ab"]
        for each, hidden in zip(pair, seen, strict=True):
            state.add(each)
            step(state, policy, 0.0)
            policy.saw_prompt(each, hidden)
        state.add(request(8, 400, name="new"))
        assert [entry.request.request_id for entry in step(state, policy, 0.03).preempted] == preempted
        for each in pair:
            policy.finished(each, 0.1)
