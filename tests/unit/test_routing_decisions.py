"""What an instance reports, whom a router chooses and how many instances there should be, worked out by hand."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import Slo
from apt_jax.routing.attainment import RecentAttainment
from apt_jax.routing.autoscaler import Autoscaler, AutoscalerOptions
from apt_jax.routing.catalogue import make_router
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.routing.interface import RouteRequest
from apt_jax.routing.pending_time import first_token_s, has_room, occupancy
from apt_jax.routing.sent import Sent, Since
from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.plan import Plan, Preempted, Reason
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import generate, run, wait

EMPTY = InstanceLoad("a", 0.0, 0, 0, 0.0, 100, 100, 0, 16, 2, 0, 0.25, 0.125)


class Digits(CostModel):
    """Seconds in which every figure of a load has digits of its own."""

    def step_s(self, load):
        figures = (load.prefill_tokens, load.decode_requests, *load.context_tokens, load.samples)
        return sum(figure * 1000.0**power for power, figure in enumerate(figures))


class Lengths:
    """Remaining tokens by the prompt's length and what was generated."""

    def remaining_tokens(self, prompt, generated):
        return np.array(
            [{(6, 2): 10.0, (4, 1): 20.0, (20, 0): 5.0}[pair] for pair in zip(prompt, generated, strict=True)]
        )


DIGITS = Digits(MODELS["opt-125m"], HARDWARE["h200"], scales=Scales(dense=2.0, compute=3.0))


def busy_state():
    """Pages of 4: `a` holds 8 tokens as KV, `h` 5 as hidden, `c` is in the middle of 20 as KV, two wait."""
    state = make_state(100, tokens=16, mode="hybrid")
    back = run(state, "preempted", 6, arrival_s=0.5)
    generate(state, run(state, "a", 6, arrival_s=1.0), 1, now=3.0)
    run(state, "h", 4, kind=CacheKind.HIDDEN)
    run(state, "c", 20, computed=8, arrival_s=2.0)
    wait(state, "w", 9, arrival_s=2.5)
    state.apply(Plan(preempted=(Preempted(back, Reason.PREEMPTED_NO_BLOCKS),)), 0.0)
    return state


def test_a_report_of_a_busy_instance():
    model = DIGITS
    load = instance_load(busy_state(), model, 4.0, instance="x", predictor=Lengths())
    assert (load.instance, load.time_s, load.num_waiting, load.num_running, load.num_requests) == ("x", 4.0, 2, 3, 5)
    # a since 3, h since its token at 0, c since its arrival at 2, w since 2.5, the preempted one since its token at 0
    assert load.pending_s == pytest.approx(1 + 4 + 2 + 1.5 + 4)
    assert (load.total_blocks, load.free_blocks, load.needed_blocks) == (100, 100 - 4 - 1 - 10, 3 + 2)
    assert (load.block_size, load.blocks_per_page, load.taken_blocks) == (4, 1, 20)
    assert load.queued_tokens == 9 + 7 + 12
    # 13 of 16 tokens are left beside three decodes: three iterations of 10 tokens
    assert load.backlog_s == 3 * (10 + 3e3 + 28e6 + 5e9 + 3e12)
    assert load.token_s == pytest.approx(6 * model.token_s)
    freed = 4 / 10 + 1 / 20 + 10 / 5 - (2 + 1 + 2) / 4
    assert load.freed_blocks_per_s == pytest.approx(freed / (3e3 + 28e6 + 5e9))


def test_an_instance_full_of_decodes_still_computes_a_token_at_a_time():
    state = make_state(100, tokens=2)
    run(state, "a")
    run(state, "b")
    wait(state, "w", 4)
    assert instance_load(state, DIGITS, 0.0).backlog_s == 4 * (1 + 2e3 + 10e6 + 2e12)
    assert instance_load(make_state(100), DIGITS, 0.0).backlog_s == 0.0  # one iteration of nothing


def test_a_token_left_of_a_prompt_is_decoded_and_no_queue():
    state = make_state(100)
    run(state, "a", 9, computed=8)
    run(state, "b", 9, computed=7)
    load = instance_load(state, None, 0.0)
    assert load.queued_tokens == 2 and (load.backlog_s, load.token_s, load.freed_blocks_per_s) == (None, None, None)


@pytest.mark.parametrize(("mode", "blocks"), [("kv", 6), ("hidden", 3), ("hybrid", 3)])
def test_blocks_are_of_the_smallest_kind(mode, blocks):
    load = instance_load(make_state(100, mode=mode), None, 0.0)
    assert load.blocks_for(9) == load.blocks_for(12) == blocks


def loads_with(*changes):
    return [replace(EMPTY, instance=str(i), **change) for i, change in enumerate(changes)]


def test_the_time_left_for_a_first_token():
    assert RouteRequest(1, 9.0, Slo(2.0, 1.0), waited_s=0.5).left_s == 1.5
    assert RouteRequest(1, 9.0, Slo(2.0, 1.0), waited_s=3.0).left_s == -1.0
    assert RouteRequest(1, 9.0, Slo(2.0, 1.0), waited_s=3.0, has_started=True).left_s == math.inf
    assert RouteRequest(1, 9.0).left_s == 1.0


def test_round_robin_goes_on_from_the_last_whatever_their_number():
    router = make_router("round-robin")
    chosen = [router.choose(RouteRequest(1, 0.0), [EMPTY] * count) for count in (3, 3, 3, 3, 2, 2, 5, 1)]
    assert chosen == [0, 1, 2, 0, 1, 0, 1, 0]


def test_random_draws_any_by_its_seed():
    router, drawn = make_router("random", 5), random.Random(5)
    expected = [drawn.randrange(4) for _ in range(20)]
    assert [router.choose(RouteRequest(1, 0.0), [EMPTY] * 4) for _ in range(20)] == expected
    assert set(expected) == {0, 1, 2, 3}


def test_least_requests_breaks_ties_by_lot_and_remembers_what_it_sent():
    loads = loads_with({"num_running": 1}, {"num_waiting": 1}, {"num_running": 2, "num_waiting": 1})
    firsts = Counter(make_router("least-requests", seed).choose(RouteRequest(1, 1.0), loads) for seed in range(40))
    assert set(firsts) == {0, 1}
    router = make_router("least-requests")
    assert sorted(router.choose(RouteRequest(1, 1.0), loads) for _ in range(5)) == [0, 0, 1, 1, 2]


def test_power_of_two_takes_the_better_of_its_pair_by_requests_and_what_it_sent():
    loads = loads_with({"num_running": 3}, {"num_running": 1, "num_waiting": 1})
    router = make_router("power-of-two")
    assert router.choose(RouteRequest(1, 1.0), loads) == 1
    assert sorted(router.choose(RouteRequest(1, 1.0), loads) for _ in range(2)) == [0, 1]
    assert router.choose(RouteRequest(1, 1.0), loads[:1]) == 0
    many = loads_with(*[{"num_running": k} for k in range(5)])
    for seed in range(10):
        assert make_router("power-of-two", seed).choose(RouteRequest(1, 1.0), many) == min(
            random.Random(seed).sample(range(5), 2)
        )


def test_occupancy_counts_what_is_held_waited_for_sent_and_asked_for():
    load = replace(EMPTY, free_blocks=70, needed_blocks=12)
    assert occupancy(RouteRequest(17, 0.0), load, Since(2, 40, 6.0)) == pytest.approx((30 + 12 + 6 + 4) / 100)


def test_a_first_token_takes_the_backlog_and_the_prompts_before_and_its_own():
    assert first_token_s(RouteRequest(8, 0.0), EMPTY, Since(1, 24, 4.0)) == 0.25 + (24 + 8) * 0.125
    assert first_token_s(RouteRequest(8, 0.0), replace(EMPTY, token_s=None), Since()) == 0.0
    assert first_token_s(RouteRequest(8, 0.0), replace(EMPTY, backlog_s=None), Since()) == 0.0


@pytest.mark.parametrize(
    ("share", "freed", "waited_s", "ttft_s", "room"),
    [
        (1.0, None, 0.0, 1.0, True), (1.01, None, 0.0, 1.0, False), (1.01, -5.0, 0.0, 1.0, False),
        # 8 blocks lack: 80 a second give them in a tenth of the second that is left
        (1.08, 80.5, 0.0, 1.0, True), (1.08, 79.0, 0.0, 1.0, False), (1.08, 80.5, 0.5, 1.0, False),
        (1.08, 161.0, 0.5, 1.0, True), (1.08, 41.0, 0.0, 2.0, True), (1.08, 39.0, 0.0, 2.0, False),
    ],
)  # fmt: skip
def test_room_is_what_is_free_or_given_back_in_a_tenth_of_the_time_left(share, freed, waited_s, ttft_s, room):
    request = RouteRequest(1, 0.0, Slo(ttft_s, 1.0), waited_s=waited_s)
    assert has_room(request, replace(EMPTY, freed_blocks_per_s=freed), share) is room


def test_a_request_that_has_started_waits_for_blocks_no_longer_than_a_tenth_of_its_promise():
    started = RouteRequest(1, 0.0, Slo(1.0, 1.0), waited_s=9.0, has_started=True)
    assert has_room(started, replace(EMPTY, freed_blocks_per_s=80.5), 1.08)
    assert not has_room(started, replace(EMPTY, freed_blocks_per_s=79.0), 1.08)


@pytest.mark.parametrize(("tokens", "chosen"), [(6, 0), (7, 1)])
def test_a_promise_predicted_to_the_last_moment_is_kept(tokens, chosen):
    """0.25 s of queue and 6 x 0.125 s of prompt is the second that was promised."""
    loads = loads_with({"free_blocks": 90}, {"free_blocks": 50, "token_s": 0.0})
    assert make_router("pending-time").choose(RouteRequest(tokens, 1.0), loads) == chosen


def test_pending_time_breaks_ties_by_lot():
    loads = loads_with({}, {}, {"free_blocks": 99})
    assert {make_router("pending-time", s).choose(RouteRequest(1, 1.0), loads) for s in range(20)} == {0, 1}


def test_what_was_sent_counts_until_a_report_is_newer():
    sent = Sent()
    for time_s, tokens in ((1.0, 16), (2.0, 17), (3.0, 40)):
        sent.add(EMPTY, RouteRequest(tokens, time_s))
    sent.add(replace(EMPTY, instance="other"), RouteRequest(5, 9.0))
    assert sent.since(replace(EMPTY, time_s=2.0)) == Since(2, 57, 4.0 + 6.0), (
        "sent at the time of the report is not in it"
    )
    assert sent.since(replace(EMPTY, time_s=2.5)) == Since(1, 40, 6.0)
    assert sent.since(replace(EMPTY, time_s=3.5)) == Since(0, 0, 0.0)
    assert sent.since(replace(EMPTY, instance="other", time_s=9.0)) == Since(1, 5, 2.0)
    assert sent.since(replace(EMPTY, instance="unknown")) == Since()


def test_recent_attainment_at_the_edges_of_its_window():
    recent = RecentAttainment(enough=2)
    recent.add(10.0, True)
    assert recent.share(10.0) is None and recent.per_s(10.0) == 1.0, "no rate over less than a second"
    recent.add(12.0, False)
    assert recent.share(12.0) == 0.5 and recent.per_s(12.0) == 1.0
    assert recent.per_s(14.0) == 0.5
    assert recent.share(40.0) == 0.5 and recent.per_s(40.0) == 2 / 30
    assert recent.share(40.25) is None and recent.per_s(40.25) == 1 / 30
    recent.add(41.0, True)
    other = RecentAttainment(enough=1)
    other.add(10.0, True)
    assert other.per_s(40.25) == 0.0, "the rate forgets too"
    recent.clear()
    recent.add(41.5, True)
    assert recent.share(41.5) is None, "only one of them is judged"
    recent.add(41.75, False)
    assert recent.share(41.75) == 0.5 and recent.per_s(41.75) == 4 / 30


def occupied(count, *shares):
    """Reports of `count` instances with this mean share of the blocks taken, waited for where it is above 1."""
    loads = [replace(EMPTY, free_blocks=100 - min(s, 100), needed_blocks=max(s - 100, 0)) for s in shares]
    return loads * (count // len(loads))


def desired(loads, num_instances, *, at=(0.0, 0.0), attainment=None, ended_per_s=0.0, **options):
    """Its answers at these times."""
    scaler = Autoscaler(AutoscalerOptions(**{"max_instances": 9, "up_delay_s": 0.0, "down_delay_s": 0.0, **options}))
    return [scaler.desired(loads, num_instances, now, attainment, ended_per_s) for now in at]


@pytest.mark.parametrize(
    ("loads", "num_instances", "answer"),
    [
        (occupied(1, 80), 1, 1), (occupied(1, 81), 1, 2), (occupied(1, 160), 1, 2), (occupied(1, 161), 1, 3),
        (occupied(2, 100, 60), 2, 2), (occupied(2, 100, 61), 2, 3),
        # fewer: the rest would be below 0.6
        (occupied(2, 30), 2, 2), (occupied(2, 29), 2, 1), (occupied(4, 45), 4, 4), (occupied(4, 44), 4, 3),
        (occupied(4, 0), 4, 3), (occupied(1, 0), 1, 1), ([], 3, 3),
    ],
)  # fmt: skip
def test_how_many_instances_memory_asks_for(loads, num_instances, answer):
    assert desired(loads, num_instances) == [answer, answer]


@pytest.mark.parametrize(
    ("attainment", "num_instances", "answer"), [(0.95, 2, 2), (0.94, 2, 3), (None, 2, 2), (0.94, 3, 3), (0.94, 9, 9)]
)
def test_missed_promises_ask_for_one_more_unless_one_is_coming(attainment, num_instances, answer):
    loads = occupied(9 if num_instances == 9 else 2, 70)
    assert desired(loads, num_instances, attainment=attainment)[0] == answer


def test_memory_may_ask_for_more_than_missed_promises():
    assert desired(occupied(2, 160), 2, attainment=0.5)[0] == 4


@pytest.mark.parametrize(
    ("share", "delay", "answers"), [(100, "up_delay_s", [1, 1, 2]), (0, "down_delay_s", [2, 2, 1])]
)
def test_a_delay_is_over_when_its_time_has_passed(share, delay, answers):
    num_instances = answers[0]
    assert desired(occupied(num_instances, share), num_instances, at=(7.0, 16.75, 17.0), **{delay: 10.0}) == answers


@pytest.mark.parametrize(
    ("options", "answer"),
    [({"min_instances": 2}, 2), ({"min_instances": 1}, 1), ({"min_instances": 2, "max_instances": 2}, 2)],
)
def test_never_fewer_than_the_least(options, answer):
    assert desired(occupied(2, 0), 2, **options)[0] == answer


def too_much(loads, num_instances, ended_per_s, later_s):
    """One instance broke promises at 8 requests a second; later there are two, and little memory is taken."""
    scaler = Autoscaler(AutoscalerOptions(1, 9, up_delay_s=0.0, down_delay_s=1.0))
    assert scaler.desired(occupied(1, 50), 1, 100.0, 0.5, 8.0) == 2
    return [scaler.desired(loads, num_instances, 100.0 + s, 1.0, ended_per_s) for s in (later_s, later_s + 1.0)][1]


@pytest.mark.parametrize(
    ("num_instances", "ended_per_s", "later_s", "answer"),
    [
        # the one that would be left may have 0.75 of the 8 a second
        (2, 5.75, 2.0, 1), (2, 6.25, 2.0, 2), (3, 11.5, 2.0, 2), (3, 12.5, 2.0, 3),
        (2, 20.0, 8.5, 2),  # remembered for ten delays
        (2, 20.0, 10.5, 1),
    ],
)  # fmt: skip
def test_which_load_broke_promises_is_remembered_for_a_while(num_instances, ended_per_s, later_s, answer):
    assert too_much(occupied(num_instances, 10), num_instances, ended_per_s, later_s) == answer


def test_a_slow_load_that_broke_promises_is_remembered_too():
    scaler = Autoscaler(AutoscalerOptions(1, 9, up_delay_s=0.0, down_delay_s=1.0))
    assert scaler.desired(occupied(1, 50), 1, 100.0, 0.5, 0.5) == 2
    assert [scaler.desired(occupied(2, 10), 2, now, 1.0, 1.0) for now in (101.0, 102.0, 103.0)] == [2, 2, 2]


def test_a_shortage_of_memory_alone_is_not_remembered():
    scaler = Autoscaler(AutoscalerOptions(1, 9, up_delay_s=0.0, down_delay_s=1.0))
    assert scaler.desired(occupied(1, 90), 1, 0.0, 1.0, 8.0) == 2
    assert [scaler.desired(occupied(2, 10), 2, now, 1.0, 8.0) for now in (1.0, 2.0)] == [2, 1]


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"min_instances": 0}, True), ({"min_instances": 2, "max_instances": 2}, False), ({"low_occupancy": 0.0}, True),
        ({"low_occupancy": 0.8}, True), ({"low_occupancy": 0.79}, False), ({"target_attainment": 1.0}, False),
        ({"target_attainment": 0.0}, False), ({"target_attainment": 1.01}, True), ({"target_attainment": -0.1}, True),
        ({"up_delay_s": 0.0, "down_delay_s": 0.0}, False), ({"down_delay_s": -1.0}, True),
    ],
)  # fmt: skip
def test_limits_of_the_options(options, refused):
    if refused:
        with pytest.raises(ValueError, match="must"):
            AutoscalerOptions(**options)
    else:
        AutoscalerOptions(**options)


def test_what_the_options_are_where_nothing_is_said():
    assert AutoscalerOptions() == AutoscalerOptions(1, 1, 0.95, 0.8, 0.6, 5.0, 60.0) == Autoscaler().options
