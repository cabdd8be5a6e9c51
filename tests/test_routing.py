"""Routers, what they are told, and the number of instances."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest

from apt_jax.cache import BlockPool
from apt_jax.request import Request, SamplingParams
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.routing.router import RouteRequest, make_router, router_names
from apt_jax.scheduling.cost_model import CostModel
from apt_jax.scheduling.hardware import HARDWARE, MODELS
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.policy import PolicyContext, make_policy
from apt_jax.scheduling.state import Limits, SchedulerState

MODEL = CostModel(MODELS["opt-125m"], HARDWARE["a100-40gb"])
EMPTY = InstanceLoad("a", 0.0, 0, 0, 0.0, 100, 100, 0, 16, 2, 0, 0.01, 1e-4)


def a_request(name, prompt_tokens, arrival_s=0.0):
    params = SamplingParams(max_tokens=None)
    return Request(name, range(prompt_tokens), params, arrival_s=arrival_s, max_new_tokens=50)


def served_state(mode="hybrid"):
    """One request that decodes (its second token in flight), one that waits."""
    state = SchedulerState(BlockPool(20, 16), Limits(4, 64, mode))
    policy = make_policy("fcfs", PolicyContext(MODEL))
    state.add(a_request("first", 40))
    for now in (1.0, 2.0):
        for span in state.apply(policy.schedule(state, now), now):
            state.commit(span.request, 5, now + 0.5)
    state.add(a_request("second", 33, arrival_s=2.0))
    return state


def test_a_report_counts_the_schedulers_state():
    load = instance_load(served_state("kv"), MODEL, 4.0, instance="x")
    assert (load.num_running, load.num_waiting, load.num_requests, load.queued_tokens) == (1, 1, 2, 33)
    assert load.pending_s == pytest.approx((4.0 - 2.5) + (4.0 - 2.0))
    assert (load.total_blocks, load.free_blocks, load.needed_blocks) == (20, 20 - 2 * 3, 2 * 3)
    assert load.freed_blocks_per_s is None and load.remaining_tokens is None
    assert load.token_s == pytest.approx(MODEL.token_s)
    assert InstanceLoad(**json.loads(json.dumps(asdict(load)))) == load


def test_hidden_blocks_are_what_waiting_requests_need_at_least():
    load = instance_load(served_state("hybrid"), None, 4.0)
    assert load.needed_blocks == 3 and load.blocks_for(17) == 2 and load.backlog_s is None


def test_predictions_grow_with_the_queue_and_fall_with_the_lengths_expected():
    state, short, long = served_state("kv"), LengthPredictor(10), LengthPredictor(1000)
    before = instance_load(state, MODEL, 4.0, predictor=short)
    assert before.freed_blocks_per_s > 10 * instance_load(state, MODEL, 4.0, predictor=long).freed_blocks_per_s
    state.add(a_request("third", 500))  # eight iterations of 64 tokens more
    after = instance_load(state, MODEL, 4.0, predictor=short)
    assert after.backlog_s > 5 * before.backlog_s > 0
    assert after.remaining_tokens == pytest.approx(before.remaining_tokens + 10)


def test_an_empty_instance_can_report():
    state = SchedulerState(BlockPool(20, 16), Limits(4, 64))
    load = instance_load(state, MODEL, 1.0, predictor=LengthPredictor())
    assert load.num_requests == 0 and load.freed_blocks_per_s == 0 and load.free_blocks == 20


@pytest.mark.parametrize("name", router_names())
def test_every_router_is_deterministic_and_takes_a_changing_set(name):
    def answers(seed):
        router = make_router(name, seed)
        found = []
        for k in range(40):
            loads = [replace(EMPTY, instance=str(i), time_s=k / 20) for i in range(1 + k % 4)]
            found.append(router.choose(RouteRequest(100, k / 10), loads))
            assert 0 <= found[-1] < len(loads)
        return found

    assert answers(3) == answers(3)
    with pytest.raises(ValueError, match="no instance"):
        make_router(name).choose(RouteRequest(1, 0.0), [])


@pytest.mark.parametrize("name", sorted({*router_names()} - {"random", "power-of-two"}))
def test_requests_between_two_reports_are_spread(name):
    router, loads = make_router(name), [replace(EMPTY, instance=str(i)) for i in range(4)]
    counts = Counter(router.choose(RouteRequest(100, 1.0 + k / 100), loads) for k in range(40))
    assert set(counts.values()) == {10}


def test_an_unknown_router_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="known: least-requests, pending-time"):
        make_router("fastest")
