"""Machines that come and go: what moves least, which formation is chosen, and that no token is lost or made twice."""

from dataclasses import replace

import numpy as np
import pytest

from apt_jax.simulation.spot.placement import Formation, Held, Move, inherit, least_movement
from apt_jax.simulation.spot.service import Service
from apt_jax.simulation.spot.shapes import Machine, Model, Shape
from apt_jax.simulation.spot.trace import TRACES, Change, Trace, steady
from apt_jax.simulation.workload import Lengths, make_arrivals
from experiments.systems.spot import CASES, ON_DEMAND, on_demand, run, table

SMALL = Model(lengths=Lengths("small", np.array([200]), np.array([40])))
FALLING = Trace("falling", (Change(0, tuple(range(8))), Change(40, gone=(1, 5)), Change(50, gone=(3,))), 60.0)
MOVES = ("move", "unmatched", "tokens")


def test_slices_overlap_by_what_they_share():
    assert Held(0, 2, 0).overlap(4, 0) == Held(0, 2, 0).overlap(4, 1) == 0.25
    assert Held(0, 2, 0).overlap(4, 2) == 0 and Held(0, 2, 1).overlap(2, 1) == 0.5
    assert Held(0, 4, 3).overlap(2, 1) == 0.25 and Held(0, 4, 3).overlap(2, 0) == 0


def test_machines_stay_where_their_slices_are():
    """Two groups of two lose a machine each: the two that stay form one group, and nothing moves but the cache."""
    held = Formation(((0, 1), (2, 3))).held()
    move = least_movement(held, [3, 0], [[0, 1]], 2, weight_bytes=100.0, cache_bytes=[10.0, 6.0])
    assert move.formation.groups == ((0, 3),)
    assert move.received_bytes == {0: 3.0, 3: 5.0}, "half of the other group's cache"
    in_order = least_movement(held, [3, 0], [[0, 1]], 2, weight_bytes=100.0, cache_bytes=[10.0, 6.0], assigns=False)
    assert in_order.formation.groups == ((3, 0),) and sum(in_order.received_bytes.values()) == 116.0
    assert move.seconds(10.0, 1.0) == [0.5] and move.cold_bytes == {0: 0.0, 3: 0.0}


def test_a_larger_degree_keeps_a_part_of_each_slice():
    held = Formation(((0, 1), (2, 3))).held()
    move = least_movement(held, [0, 1, 2, 3], [[0, 1]], 4, weight_bytes=100.0, cache_bytes=[0.0, 0.0])
    assert sorted(move.received_bytes.values()) == [0.0] * 4, "each quarter is in a half that somebody has"
    group = move.formation.groups[0]
    assert set(group[:2]) == {0, 2} and set(group[2:]) == {1, 3}


def test_what_nobody_has_comes_from_storage():
    held = {0: Held(0, 2, 0)}
    move = least_movement(held, [0, 7], [[0]], 2, weight_bytes=100.0, cache_bytes=[0.0])
    assert move.formation.groups == ((0, 7),) and move.cold_bytes == {0: 0.0, 7: 50.0}
    assert move.seconds(1000.0, 10.0) == [5.0] and Move(Formation(())).seconds(1.0, 1.0) == []


def test_requests_of_old_groups_are_spread_by_their_cache():
    assert inherit([5.0, 9.0, 3.0], 2) == [[1], [0, 2]] and inherit([], 2) == [[], []]


def test_few_machines_are_cut_for_throughput_and_many_for_latency():
    model = Model()
    assert model.choose(1, 1.0) is None, "the weights need two"
    assert model.choose(8, 1.0).degree > model.choose(8, 8.0).degree == 2
    assert model.choose(8, 100.0) == Shape(4, 2), "the most that there is"
    assert model.latency_s(Shape(2, 4), 2.0) < model.latency_s(Shape(4, 2), 2.0)
    assert model.bound(Shape(4, 2)) > model.bound(Shape(2, 4))


@pytest.mark.parametrize("reaction", [*MOVES, "restart", "reroute"])
def test_every_token_comes_once_and_in_order(reaction):
    arrivals = [a for a in make_arrivals(SMALL.lengths, rate=4, num_requests=1, cv=1.0, seed=1, duration_s=60.0)]
    service = Service(SMALL, FALLING, reaction, 4.0, degree=2)
    for record in service.run(arrivals):
        times = record.times_s()
        assert len(times) == 40 and times == sorted(times) and times[0] > record.arrival.arrival_s
    assert service.num_formed > 1
    assert (service.moved_bytes > 0) == (reaction != "reroute")


def figures(reaction, **fields):
    model = replace(SMALL, **fields)
    return run(model, FALLING, str(reaction), reaction, 2, 4.0, 1)


def test_moving_the_cache_saves_computing_it_and_the_notice_saves_the_restart():
    move, tokens, restart = (figures(reaction) for reaction in ("move", "tokens", "restart"))
    assert move["recomputed_tokens"] < tokens["recomputed_tokens"] / 4, "only what does not fill a page"
    assert move["paused_s"] < restart["paused_s"] / 2 and move["p99_latency_s"] < restart["p99_latency_s"]


def test_without_a_grace_period_moving_is_no_better_than_losing():
    arrivals = make_arrivals(SMALL.lengths, rate=4, num_requests=1, cv=1.0, seed=1, duration_s=60.0)
    warned, surprised = (Service(SMALL, FALLING, "move", 4.0, grace_s=grace_s) for grace_s in (30.0, 0.0))
    for service in (warned, surprised):
        service.run(arrivals)
    assert surprised.recomputed_tokens > 4 * warned.recomputed_tokens


def test_the_traces_are_those_that_were_published():
    assert [(t.name, t.most(), t.end_s) for t in TRACES] == [
        ("0203", 10, 720.0),
        ("0304", 10, 1320.0),
        ("0506", 10, 1020.0),
    ]
    for trace in TRACES:
        there = set()
        for change in trace.changes:
            assert set(change.gone) <= there and not set(change.come) & there
            there = (there | set(change.come)) - set(change.gone)
    assert FALLING.machine_s() == 8 * 60 - 2 * 20 - 10 and steady(3, 10.0).machine_s() == 30


def test_the_study_prices_machines_by_their_hours():
    model = replace(SMALL, machine=Machine(on_demand_price=4.0, spot_price=1.0))
    assert on_demand(model, 1.0, 10) == 2
    spot, fixed = (run(model, FALLING, label, "move", 0, 1.0, 0) for label in (CASES[0][0], ON_DEMAND))
    assert fixed["machine_s"] == 120 and spot["machine_s"] == 430
    tokens = 40 * spot["requests"]
    assert spot["price_per_1000_tokens"] == pytest.approx(430 / 3600 / tokens * 1000)
    assert fixed["price_per_1000_tokens"] == pytest.approx(4 * 120 / 3600 / tokens * 1000)
    assert f"| {spot['price_per_1000_tokens'] / fixed['price_per_1000_tokens']:.2f} |" in table([spot, fixed])
