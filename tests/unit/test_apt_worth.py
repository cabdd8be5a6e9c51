"""Whom `apt` gives up, takes back and prefers, worked out by hand: blocks of 4 tokens, 2 a KV page.

A request that `run` puts there has its last token at time 0, so it arrives before that; one that arrived more than a
second before its first token has missed its SLO.
"""

import numpy as np
import pytest

from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.plan import Plan, Preempted, Reason
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.eviction import choose_victims
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from tests.support.apt_plans import Foretold, decide
from tests.support.scheduling_loop import TINY, make_state
from tests.support.tiny_states import lines, run, wait

PATIENT = Slo(60.0, 60.0)


# -- victims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "seats", "chosen", "in_order"),
    [
        (0, 1, (), ()), (1, 1, (0,), (2,)), (2, 1, (0,), (2,)), (3, 1, (1,), (2,)), (5, 1, (2,), (2,)),
        (9, 1, (2,), (2,)),
        (10, 1, (2, 0), (2, 1)), (11, 1, (2, 0), (2, 1)), (12, 1, (2, 1), (2, 1)), (13, 1, (2, 1), (2, 1)),
        (14, 1, (2, 1, 0), (2, 1, 0)), (15, 1, (2, 1, 0), (2, 1, 0)), (16, 1, None, None),
        (0, 0, (0,), (2,)), (3, 0, (1,), (2,)), (0, -1, (0, 1), (2, 1)), (0, -3, None, None),
    ],
)  # fmt: skip
def test_the_smallest_victim_that_gives_enough(short, seats, chosen, in_order):
    """Three give 2, 4 and 9 blocks."""
    none = np.zeros(3, np.bool_)
    draft = Draft(none, none, True, np.array([2, 4, 9]), 0, seats)
    assert choose_victims(draft, [0, 1, 2], short, seats) == chosen
    assert choose_victims(draft, [2, 1, 0], short, seats, fit=False) == in_order


@pytest.mark.parametrize(("options", "victims"), [("", ["middle"]), (":fit_victims=off", ["large"])])
def test_the_smallest_late_one_that_gives_enough_makes_room(options, victims):
    """10 blocks wanted and 2 free: 8 of `middle`."""
    state = make_state(24)
    for name, prompt in (("small", 7), ("large", 19), ("middle", 15)):  # 4, 10 and 8 blocks
        run(state, name, prompt, arrival_s=-5.0)
    wait(state, "fresh", 20, arrival_s=1.0)
    plan = decide(state, 1.1, f"apt:prediction=off{options}")
    assert [line.split()[1] for line in plan if line.startswith("preempt")] == victims


# -- given up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "reason"), [(768, "ADMITTED_KV"), (769, "ADMITTED_LATE")])
def test_a_prompt_that_takes_longer_than_what_is_left_is_given_up(prompt, reason):
    """1,024 tokens a second, and 0.75 of 1 s are left."""
    model = type("Toy", (CostModel,), {"token_s": 1 / 1024})(MODELS["opt-125m"], HARDWARE["h200"])
    state = make_state(4000, tokens=2048)
    wait(state, "essay", prompt, arrival_s=0.25)
    plan = decide(state, 0.5, model=model)
    assert plan[0].split()[::4] == ["run", reason]


@pytest.mark.parametrize(
    ("options", "first_s", "preempted"),
    [
        ("apt", 0.75, True),  # 98 tokens to come: its gap of 0.75 s cannot be forgiven
        ("apt", 0.5, False),  # was in time
        ("apt:fallback=constant", 0.75, False),  # asks anew
    ],
)
def test_what_is_given_up_stays_so_when_more_tokens_are_predicted(options, first_s, preempted):
    """With 99 or more to come there are 100 gaps, so one may be long: 500 are predicted the second time."""
    state, lengths = make_state(4), Foretold(98.0)
    run(state, "talker", 4, 2, slo=Slo(1.0, 0.5, 9.0))
    policy = make_policy(options, PolicyContext(TINY, predictor=lengths))
    policy.schedule(state, first_s)
    lengths._remaining = 500.0
    wait(state, "fresh", 8, arrival_s=0.75)
    assert ("preempt talker PREEMPTED_LATE" in lines(policy.schedule(state, 0.8))) is preempted


# -- taken back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arrival_s", "now", "first"),
    [
        ("", 0.0, 0.5, "back"),
        (":readmit_first=off", 0.0, 0.5, "new"),  # 0.4 of 1 s are more than 0.5 of 60 s
        ("", -70.0, 8.0, "new"),  # its first token was late: 8 s of a second's gap do not count
    ],
)
def test_one_that_was_preempted_goes_before_newcomers_while_it_can_be_kept(options, arrival_s, now, first):
    state = make_state(4)
    slo = PATIENT if arrival_s == 0.0 else Slo(60.0, 1.0, 60.0)
    back = run(state, "back", 7, slo=slo, arrival_s=arrival_s)
    state.apply(Plan((), preempted=(Preempted(back, Reason.PREEMPTED_NO_BLOCKS),)), 0.0)
    wait(state, "new", 8, arrival_s=now - 0.4)
    plan = decide(state, now, f"apt:prediction=off:patience_s=99{options}")
    assert plan[0].split()[:2] == ["run", first]


# -- priority ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pending_s", "priority", "options", "first"),
    [
        (0.8, 0, "", "plain"), (0.11, -1, "", "other"), (0.09, -1, "", "plain"),
        (0.8, 1, "", "plain"), (0.8, -1, "", "other"), (0.8, -1, ":priorities=off", "plain"),
        (0.014, -2, "", "other"), (0.010, -2, "", "plain"),
    ],
)  # fmt: skip
def test_a_level_of_priority_counts_eightfold(pending_s, priority, options, first):
    """`plain` has waited for 0.8 s; a millisecond is added to both. One fits."""
    state = make_state(4)
    wait(state, "plain", 8, arrival_s=0.1)
    wait(state, "other", 8, arrival_s=0.9 - pending_s, priority=priority)
    assert decide(state, 0.9, f"apt:prediction=off{options}")[0].split()[:2] == ["run", first]


@pytest.mark.parametrize(("priority", "victim"), [(0, "patient"), (-1, "patient"), (-2, "urgent")])
def test_priority_counts_where_memory_runs_out(priority, victim):
    """0.5 of 60 s are 60 times less than 0.5 of 1 s: two levels, 64, make up for it."""
    state = make_state(11)
    run(state, "patient", 8, slo=PATIENT, priority=priority)
    run(state, "urgent", 8)
    assert decide(state, 0.5)[0] == f"preempt {victim} PREEMPTED_LEAST_VALUE"


def test_priority_counts_among_the_late_ones_too():
    for priority, first in ((0, "a"), (1, "a"), (-1, "b")):
        state = make_state(4)
        wait(state, "a", 8, arrival_s=-5.0)
        wait(state, "b", 8, arrival_s=-4.9, priority=priority)
        assert decide(state, 0.5)[0] == f"run {first} 8 kv ADMITTED_LATE"


def test_a_late_one_of_high_priority_still_comes_after_those_in_time():
    """Four levels count for 4,096 and being late for a ten-thousandth, times 5.5 s and 0.5 s waited."""
    for priority, first in ((-2, "fresh"), (-4, "late")):
        state = make_state(4)
        wait(state, "late", 8, arrival_s=-5.0, priority=priority)
        wait(state, "fresh", 8, arrival_s=0.0)
        assert decide(state, 0.5)[0].split()[1] == first


@pytest.mark.parametrize(("older", "newer"), [(-10, -11), (11, 10), (99, 10), (-10, -99)])
def test_priorities_beyond_ten_count_like_ten(older, newer):
    state = make_state(4)
    wait(state, "older", 8, arrival_s=0.0, priority=older)
    wait(state, "newer", 8, arrival_s=0.1, priority=newer)
    assert decide(state, 0.5)[0].split()[1] == "older"
