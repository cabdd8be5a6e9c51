"""Routers, what they are told, and the number of instances."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest

from apt_jax.cache import BlockPool
from apt_jax.request import Request, SamplingParams, Slo
from apt_jax.routing.attainment import RecentAttainment
from apt_jax.routing.autoscaler import Autoscaler, AutoscalerOptions
from apt_jax.routing.catalogue import make_router, router_names
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.routing.interface import RouteRequest
from apt_jax.routing.sent import Sent, Since
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
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
    assert load.freed_blocks_per_s is None
    assert load.token_s == pytest.approx(MODEL.token_s)
    assert InstanceLoad(**json.loads(json.dumps(asdict(load)))) == load


def test_hidden_blocks_are_what_waiting_requests_need_at_least():
    load = instance_load(served_state("hybrid"), None, 4.0)
    assert load.needed_blocks == 3 and load.blocks_for(17) == 2 and load.backlog_s is None
    assert load.taken_blocks == 20 - load.free_blocks + 3


def test_predictions_grow_with_the_queue_and_fall_with_the_lengths_expected():
    state, short, long = served_state("kv"), LengthPredictor(10), LengthPredictor(1000)
    before = instance_load(state, MODEL, 4.0, predictor=short)
    assert before.freed_blocks_per_s > 10 * instance_load(state, MODEL, 4.0, predictor=long).freed_blocks_per_s
    state.add(a_request("third", 500))  # eight iterations of 64 tokens more
    after = instance_load(state, MODEL, 4.0, predictor=short)
    assert after.backlog_s > 5 * before.backlog_s > 0
    assert after.freed_blocks_per_s == before.freed_blocks_per_s


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


def loads_with(*changes):
    return [replace(EMPTY, instance=str(i), **change) for i, change in enumerate(changes)]


def test_fewest_requests_count_waiting_and_running():
    loads = loads_with({"num_running": 5}, {"num_running": 1, "num_waiting": 2}, {"num_waiting": 4})
    assert make_router("least-requests").choose(RouteRequest(10, 1.0), loads) == 1


def test_power_of_two_never_takes_the_worst():
    loads = loads_with({"num_running": 50}, {}, {"num_running": 3})
    router = make_router("power-of-two")
    chosen = Counter(router.choose(RouteRequest(10, 1.0 + k / 100), loads) for k in range(30))
    assert chosen[0] == 0 and len(chosen) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (({"free_blocks": 20}, {"free_blocks": 60}, {"free_blocks": 40}), 1),
        # blocks that waiting requests need count as taken
        (({"free_blocks": 60, "needed_blocks": 50}, {"free_blocks": 50}, {"free_blocks": 30}), 1),
        # plenty of memory, but prompts of two seconds before this one
        (({"backlog_s": 2.0}, {"free_blocks": 50}, {"free_blocks": 30}), 1),
        # nobody can keep the promise: where it does least harm
        (({"free_blocks": 2}, {"free_blocks": 1, "needed_blocks": 30}, {"backlog_s": 2.0}), 1),
        # a large instance is fuller in blocks, but not in its share of them
        (({"total_blocks": 1000, "free_blocks": 700}, {"free_blocks": 50}, {"free_blocks": 60}), 0),
        # without a cost model memory decides
        (({"backlog_s": None, "token_s": None, "free_blocks": 90}, {"free_blocks": 50}, {"free_blocks": 30}), 0),
    ],
)
def test_pending_time_goes_where_the_promise_can_be_kept(changes, expected):
    request = RouteRequest(60, 1.0)  # 4 pages, 8 blocks
    assert make_router("pending-time").choose(request, loads_with(*changes)) == expected


def test_what_was_waited_already_counts():
    loads = loads_with({"backlog_s": 0.5}, {"free_blocks": 50})
    assert make_router("pending-time").choose(RouteRequest(60, 1.0), loads) == 0
    assert make_router("pending-time").choose(RouteRequest(60, 1.0, waited_s=0.6), loads) == 1
    assert make_router("pending-time").choose(RouteRequest(60, 1.0, slo=Slo(ttft_s=0.3)), loads) == 1
    late = [replace(load, free_blocks=load.free_blocks // 2) for load in loads]
    assert make_router("pending-time").choose(RouteRequest(60, 9.0, waited_s=8.0), late) == 1
    assert make_router("pending-time").choose(RouteRequest(60, 9.0, waited_s=8.0, has_started=True), late) == 0


def test_requests_that_are_late_anywhere_go_to_one_instance_and_spare_the_others():
    """Stale reports: the router knows what it sent, and stops before an instance is full."""
    router = make_router("pending-time")
    loads = loads_with(*[{"free_blocks": 40, "num_running": 9}] * 4)
    chosen = [router.choose(RouteRequest(60, 1.0 + k / 100), loads) for k in range(40)]
    kept, given_up = chosen[:20], chosen[20:]
    assert set(Counter(kept).values()) == {5}  # 8 of 40 blocks each
    assert len(set(given_up)) == 1
    # new reports: three have room again, one has a queue
    queue = [{"free_blocks": 40, "time_s": 9.0, "needed_blocks": 160 if i == given_up[0] else 0} for i in range(4)]
    later = [router.choose(RouteRequest(60, 10.0 + k / 100), loads_with(*queue)) for k in range(6)]
    assert given_up[0] not in later and set(Counter(later).values()) == {2}


def test_a_report_ends_what_was_remembered_of_it():
    sent = Sent()
    for k in range(3):
        sent.add(EMPTY, RouteRequest(32, float(k)))
    assert sent.since(EMPTY) == Since(3, 96, 12.0)
    assert sent.since(replace(EMPTY, time_s=1.5)) == Since(1, 32, 4.0)
    assert sent.since(replace(EMPTY, time_s=5.0)) == Since()
    assert sent.since(replace(EMPTY, instance="other")) == Since()


def test_attainment_is_that_of_the_last_half_minute_if_enough_ended():
    recent = RecentAttainment(enough=3)
    assert recent.share(0.0) is None
    for time_s, kept in ((0.0, False), (1.0, True), (20.0, True), (29.0, False)):
        recent.add(time_s, kept)
    assert recent.share(30.0) == 0.5 and recent.per_s(30.0) == 4 / 30
    assert recent.share(30.5) == pytest.approx(2 / 3)  # the first is too old
    assert recent.share(40.0) is None and recent.per_s(40.0) == 2 / 30  # two are not enough to judge
    recent.add(41.0, True)
    assert recent.share(41.0) == 2 / 3
    recent.clear()
    assert recent.share(41.0) is None and recent.per_s(41.0) == 3 / 30


AUTOSCALING = AutoscalerOptions(1, 6, up_delay_s=5, down_delay_s=60)


def occupied_loads(count, share):
    free, needed = round(100 * (1 - min(share, 1))), round(100 * max(share - 1, 0))
    return [replace(EMPTY, free_blocks=free, needed_blocks=needed)] * count


def test_more_instances_when_memory_has_been_short_for_a_while():
    scaler = Autoscaler(AUTOSCALING)
    answers = [scaler.desired(occupied_loads(2, 1.5), 2, now) for now in (0.0, 3.0, 5.0)]
    assert answers == [2, 2, 4]  # three pools' worth at four fifths each
    assert scaler.desired(occupied_loads(2, 5.0), 4, 100.0) == 4  # the delay starts anew
    assert scaler.desired(occupied_loads(2, 5.0), 4, 105.0) == 6  # and the most is the most


def test_a_moment_of_shortage_changes_nothing():
    scaler = Autoscaler(AUTOSCALING)
    for now, share in ((0.0, 1.5), (4.0, 0.7), (6.0, 1.5), (10.0, 1.5)):
        assert scaler.desired(occupied_loads(2, share), 2, now) == 2


def test_missed_promises_add_an_instance_though_memory_is_free():
    scaler = Autoscaler(AUTOSCALING)
    assert [scaler.desired(occupied_loads(2, 0.7), 2, now, attainment=0.8) for now in (0.0, 5.0)] == [2, 3]
    # until it is ready, and for what was missed before, no further one is added
    assert [scaler.desired(occupied_loads(2, 0.7), 3, now, attainment=0.5) for now in (6.0, 30.0)] == [3, 3]
    idle = Autoscaler(AUTOSCALING)
    assert [idle.desired(occupied_loads(2, 0.7), 2, now, attainment=0.99) for now in (0.0, 500.0)] == [2, 2]


def test_an_instance_that_promises_needed_stays_while_the_load_does():
    """Memory is free all the time, so that only the memory of what went wrong keeps the second one."""
    scaler, loads = Autoscaler(AUTOSCALING), occupied_loads(1, 0.1)
    assert [scaler.desired(loads, 1, now, 0.5, 8.0) for now in (0.0, 5.0)] == [1, 2]
    assert {scaler.desired(loads * 2, 2, now, 1.0, 10.0) for now in range(6, 400)} == {2}  # each could serve 8, not 10
    assert [scaler.desired(loads * 2, 2, now, 1.0, 5.0) for now in (400.0, 459.0, 460.0)] == [2, 2, 1]
    late = 5.0 + 10 * AUTOSCALING.down_delay_s + 1
    assert [scaler.desired(loads * 2, 2, now, 1.0, 10.0) for now in (late, late + 60)] == [2, 1]  # tried again


def test_fewer_instances_one_at_a_time_when_the_rest_would_do():
    scaler = Autoscaler(AUTOSCALING)
    assert [scaler.desired(occupied_loads(4, 0.1), 4, now) for now in (0.0, 59.0, 60.0, 61.0)] == [4, 4, 3, 4]
    assert [scaler.desired(occupied_loads(1, 0.0), 1, now) for now in (100.0, 200.0)] == [1, 1]


def test_it_does_not_swing():
    """After one was removed the rest stays under the line at which one is added."""
    up, down = Autoscaler(AUTOSCALING), Autoscaler(AUTOSCALING)
    for share in (0.3, 0.4, 0.44):
        assert [down.desired(occupied_loads(4, share), 4, now) for now in (0.0, 60.0)] == [4, 3]
        assert [up.desired(occupied_loads(3, share * 4 / 3), 3, now) for now in (0.0, 60.0)] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_instances": 3, "max_instances": 2}, "min <= max"), ({"low_occupancy": 0.9}, "low < high"),
     ({"up_delay_s": -1}, "must not be negative")],
)  # fmt: skip
def test_bad_autoscaling_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AutoscalerOptions(**options)


@pytest.mark.parametrize("name", sorted({*router_names()} - {"random", "power-of-two"}))
def test_requests_between_two_reports_are_spread(name):
    router, loads = make_router(name), [replace(EMPTY, instance=str(i)) for i in range(4)]
    counts = Counter(router.choose(RouteRequest(30, 1.0 + k / 100), loads) for k in range(40))
    assert set(counts.values()) == {10}


def test_an_unknown_router_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="known: least-requests, pending-time"):
        make_router("fastest")
