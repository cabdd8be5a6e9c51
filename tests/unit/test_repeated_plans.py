"""Plans that stay: a policy that says so is asked less often, and every plan, time and figure is the same."""

import math
from dataclasses import replace

import pytest

from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.plan_log import plan_dict
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext, Repeat, Repeating
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.simulator import simulate
from apt_jax.simulation.workload import load_lengths, make_arrivals

POLICIES = ("fcfs", "sarathi", "vllm-v0", "vllm-v1", "apt", "apt:prediction=off", "apt:fallback=constant", "apt-paper")
ARRIVALS = make_arrivals(load_lengths("sharegpt"), rate=8.0, num_requests=40, cv=2.0, seed=3, duration_s=1.0)
COST = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], "one-pass")


class Asked:
    """A policy that counts how often it is asked, and says nothing about how long its plans stay."""

    def __init__(self, policy):
        self.policy, self.count = policy, 0

    def schedule(self, state, now):
        self.count += 1
        return self.policy.schedule(state, now)

    def finished(self, request, now):
        self.policy.finished(request, now)


class Says(Asked):
    """The same, with one answer to how long a plan stays; keeps when it was asked."""

    def __init__(self, policy, answer):
        super().__init__(policy)
        self.answer, self.asked_s, self.repeated_s = answer, [], []

    def schedule(self, state, now):
        self.asked_s.append(now)
        return super().schedule(state, now)

    def repeat(self, state, plan, now):
        return self.answer

    def repeated(self, now):
        self.repeated_s.append(now)


class AskedRepeating(Asked):
    """A policy that counts how often it is asked, and passes on what it says."""

    def repeat(self, state, plan, now):
        return self.policy.repeat(state, plan, now)

    def repeated(self, now):
        self.policy.repeated(now)


def outcome(policy, *, mode="hybrid", num_blocks=700, slo=None, arrivals=ARRIVALS):
    """All plans with their times, and what became of the requests and the iterations."""
    plans = []
    found = simulate(
        arrivals, policy, cost_model=COST, num_blocks=num_blocks, limits=Limits(64, 1024, mode, num_blocks // 100),
        slo=slo, on_plan=lambda plan, now: plans.append({**plan_dict(0, now, plan)}),
    )  # fmt: skip
    requests = [(r.gaps_s, r.num_late_gaps, r.num_stalls, r.longest_gap_s, r.ended_s) for r in found.requests]
    return plans, requests, found.samples, found.makespan_s


@pytest.mark.parametrize(
    ("mode", "num_blocks", "slo"),
    [
        ("kv", 700, Slo()),
        ("hybrid", 700, Slo(0.5, 0.03)),  # gaps are late
        ("hybrid", 3000, Slo(2.0, 0.1, 0.04)),  # and stalls
        ("hidden", 400, Slo()),
    ],
)
@pytest.mark.parametrize("name", POLICIES)
def test_nothing_changes_but_how_often_a_policy_is_asked(name, mode, num_blocks, slo):
    often, seldom = (kind(make_policy(name, PolicyContext(COST, seed=1))) for kind in (Asked, AskedRepeating))
    assert isinstance(seldom, Repeating) and not isinstance(often, Repeating)
    asked = outcome(often, mode=mode, num_blocks=num_blocks, slo=slo)
    assert asked == outcome(seldom, mode=mode, num_blocks=num_blocks, slo=slo)
    assert often.count == len(asked[0]) and seldom.count < often.count


@pytest.mark.parametrize("name", POLICIES)
def test_with_headroom_a_policy_is_asked_when_someone_comes_or_ends(name):
    policy = AskedRepeating(make_policy(name, PolicyContext(COST, seed=1)))
    plans, *_ = outcome(policy, mode="kv", num_blocks=6000)
    assert policy.count < 4 * len(ARRIVALS) < len(plans) / 2


def lone_run(answer):
    """fcfs with one request of 40 tokens, and how its policy was asked."""
    lone = [replace(ARRIVALS[0], arrival_s=0.0, prompt_tokens=10, output_tokens=40)]
    policy = Says(make_policy("fcfs"), answer)
    plans, *_ = outcome(policy, arrivals=lone)
    return policy, [plan["now_s"] for plan in plans]


def test_a_policy_is_not_asked_after_what_it_said():
    """One prompt and 39 decodes, of which the first is planned."""
    assert lone_run(None)[0].count == 40
    assert lone_run(Repeat())[0].count == 2
    for number in (1, 2, 3, 37, 38, 39):
        policy, times = lone_run(Repeat(iterations=number))
        assert policy.count == 1 + math.ceil(39 / (1 + number))
        assert policy.asked_s == [times[0], *times[1 :: 1 + number]]
    _, times = lone_run(None)
    assert lone_run(Repeat(until_s=times[20]))[0].asked_s == [*times[:2], *times[20:]]
    assert lone_run(Repeat(longest_gap_s=1e-9))[0].count == 40
    assert lone_run(Repeat())[0].repeated_s[-1] == times[-1], "told of the last one, as it will be asked with times"


def test_who_arrives_or_ends_is_planned_for():
    arrivals = [replace(ARRIVALS[0], arrival_s=s, prompt_tokens=10, output_tokens=n) for s, n in ((0.0, 60), (0.5, 9))]
    policy = Says(make_policy("fcfs"), Repeat())
    plans, *_ = outcome(policy, arrivals=arrivals)
    sizes = [len(plan["scheduled"]) for plan in plans]
    assert sizes.count(2) == 8 and policy.count == 5, "a prompt and its decodes, both twice, and the one that is left"
    through = Says(make_policy("fcfs"), Repeat(through_ends=True))
    assert outcome(through, arrivals=arrivals)[0] == plans and through.count == 4


def test_who_may_be_abandoned_is_looked_at_in_every_iteration():
    """The policy inside says how long its own plan stays, which is not for how long nobody is overdue."""
    assert not isinstance(make_policy("fcfs", PolicyContext(COST, abandon_after_s=5.0)), Repeating)
