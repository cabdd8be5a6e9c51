"""Which requests are ended because their next token is overdue: the rule at its limits, and around every policy."""

import random

import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason, Slo
from apt_jax.scheduling.abandonment import Abandoning, give_up, overdue_s
from apt_jax.scheduling.plan import Abandoned, Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from apt_jax.scheduling.policies.interface import PolicyContext
from tests.support.scheduling_loop import TINY, make_state, request
from tests.support.tiny_states import generate, run, wait

KV = CacheKind.KV
SLO = Slo(1.0, 0.25, stall_s=0.5)
LATE = Reason.ABANDONED_LATE


def test_a_token_is_overdue_past_the_first_limit_and_later_past_the_stall_limit():
    state = make_state(40)
    waiting = wait(state, "a", slo=SLO, arrival_s=10.0)
    assert [overdue_s(waiting, now) for now in (10.0, 11.0, 13.5)] == [-1.0, 0.0, 2.5]
    waiting.first_token_s = waiting.last_token_s = 13.5
    assert [overdue_s(waiting, now) for now in (13.5, 14.0, 15.0)] == [-0.5, 0.0, 1.0]


@pytest.mark.parametrize(("now", "gone"), [(3.0, ""), (3.125, "ab"), (4.125, "abc")])
def test_what_waits_longer_than_its_promise_and_the_extra_time_is_given_up(now, gone):
    state = make_state(40)
    for name, arrival_s in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        wait(state, name, slo=SLO, arrival_s=arrival_s)
    plan = give_up(Plan(waited=(Waited(tuple(state.waiting), Reason.WAITS_BEHIND),)), state, now, after_s=2.0)
    assert [(entry.request.request_id, entry.reason) for entry in plan.abandoned] == [(name, LATE) for name in gone]
    left = [r.request_id for entry in plan.waited for r in entry.requests]
    assert left == [name for name in "abc" if name not in gone]


def test_what_is_served_now_or_has_a_token_in_flight_is_kept_however_late():
    state = make_state(40)
    served, flying, idle = run(state, "a"), run(state, "b"), run(state, "c")
    waiting, admitted = wait(state, "d"), wait(state, "e")
    state.apply(Plan((Scheduled(flying, 1, KV, Reason.DECODES),)), 0.0)
    entries = (Scheduled(served, 1, KV, Reason.DECODES), Scheduled(admitted, 4, KV, Reason.ADMITTED_KV))
    plan = give_up(Plan(entries), state, 1e6, after_s=0.0)
    assert [entry.request for entry in plan.abandoned] == [waiting, idle]
    assert plan.scheduled == entries


def test_a_request_is_given_up_instead_of_preempted_and_a_policy_s_own_choice_stands():
    state = make_state(40)
    late, fresh, own = run(state, "a"), run(state, "b"), run(state, "c")
    generate(state, fresh, 1, now=99.0)
    preempted = tuple(Preempted(r, Reason.PREEMPTED_NO_BLOCKS) for r in (late, fresh))
    chosen = Abandoned(own, Reason.ABANDONED_LATE)
    plan = give_up(Plan(preempted=preempted, abandoned=(chosen,)), state, 99.5, after_s=50.0)
    assert [entry.request for entry in plan.preempted] == [fresh]
    assert {entry.request.request_id for entry in plan.abandoned} == {"a", "c"} and len(plan.abandoned) == 2
    state.apply(plan, 99.5)
    state.check()
    assert [r.request_id for r in state.waiting] == ["b"] and not state.running


def test_a_plan_without_anything_overdue_is_the_policy_s_own():
    state = make_state(40)
    wait(state, "a")
    plan = Plan(waited=(Waited(tuple(state.waiting), Reason.WAITS_BEHIND),))
    assert give_up(plan, state, 0.5, after_s=0.0) is plan


def test_policies_are_wrapped_only_where_the_operator_asks_for_it():
    assert not isinstance(make_policy("apt", PolicyContext(TINY)), Abandoning)
    made = make_policy("apt", PolicyContext(TINY, abandon_after_s=1.0))
    assert isinstance(made, Abandoning) and made.uses_cost_model
    assert not getattr(make_policy("fcfs", PolicyContext(abandon_after_s=1.0)), "uses_cost_model", False)


@pytest.mark.parametrize("name", policy_names())
def test_under_overload_every_policy_s_late_requests_end_and_nothing_is_lost(name):
    generator = random.Random(3)
    policy = make_policy(name, PolicyContext(TINY, abandon_after_s=0.25))
    state, now, coming = make_state(24, max_num_seqs=4, tokens=32, mode="hybrid"), 0.0, []
    for number in range(80):
        coming.append(
            request(generator.randint(1, 24), generator.randint(1, 24), number * 0.05, SLO, name=f"r{number}")
        )
    everything, ended = list(coming), []
    for _ in range(3000):
        while coming and coming[0].arrival_s <= now:
            state.add(coming.pop(0))
        if not coming and not state.num_unfinished:
            break
        plan = policy.schedule(state, now) if state.num_unfinished else Plan()
        for entry in plan.abandoned:
            assert overdue_s(entry.request, now) > 0.25
        served = {id(entry.request) for entry in plan.scheduled}
        spans = state.apply(plan, now)
        state.check()
        assert all(overdue_s(r, now) <= 0.25 or id(r) in served for r in (*state.waiting, *state.running))
        now += 0.05
        for entry in plan.abandoned:
            policy.finished(entry.request, now)
            ended.append(entry.request)
        for span in spans:
            if span.samples and state.commit(span.request, 5, now) is not None:
                policy.finished(span.request, now)
    assert not state.num_unfinished and state.pool.num_free == state.pool.num_blocks
    reasons = {r.finish_reason for r in everything}
    assert reasons == {FinishReason.LENGTH, FinishReason.ABANDONED} and 5 < len(ended) < 75
    assert not any(r.attained for r in ended)
