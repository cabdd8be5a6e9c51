"""The mechanisms of FastSwitch: each test fails without the one it names."""

import pytest

from apt_jax.scheduling.policies.catalogue import make_policy as made
from tests.support.scheduling_loop import make_state, request, step


def names(entries):
    return [entry.request.request_id for entry in entries]


@pytest.mark.parametrize(("priority", "share"), [(0, 0.5), (1, 1 / 3), (-1, 2 / 3)])
def test_fastswitch_gives_each_class_service_by_its_weight(priority, share):
    """A class with one request at a time beside one of class 0 (`priority` 5 floods), on one seat."""
    state, policy = make_state(400, 4, max_num_seqs=1), made("fastswitch:update_every=2")
    few = request(4, 400, priority=priority, name="few")
    state.add(few)
    for k in range(6):
        state.add(request(4, 400, priority=0 if priority else 7, name=f"flood {k}"))
    served = {"few": 0, "flood": 0}
    for k in range(300):
        for name in names(step(state, policy, 0.03 * k).scheduled):
            served[name.split()[0]] += 1
    weight = 2.0**-priority
    expected = weight / (weight + (1.0 if priority else 2.0**-7))
    assert served["few"] / 300 == pytest.approx(expected, abs=0.08)
    if priority:
        assert expected == pytest.approx(share)


def test_fastswitch_changes_priorities_only_now_and_then():
    state, policy = make_state(400, 4, max_num_seqs=1), made("fastswitch:update_every=10")
    for k in range(3):
        state.add(request(4, 200, name=str(k)))
    switches = [k for k in range(60) if step(state, policy, 0.03 * k).preempted]
    assert switches and {k % 10 for k in switches} == {0}


def test_fastswitch_gives_no_credit_for_idling():
    state, policy = make_state(400, 4, max_num_seqs=1), made("fastswitch:update_every=1")
    state.add(request(4, 300, priority=0, name="always"))
    for k in range(100):
        step(state, policy, 0.03 * k)
    state.add(request(4, 300, priority=1, name="late"))
    served = [names(step(state, policy, 3 + 0.03 * k).scheduled)[0] for k in range(90)]
    assert 0.2 < served.count("late") / 90 < 0.5, "a third, and not all until it has caught up"


def test_fastswitch_lifts_a_class_that_comes_back_to_the_least_served_of_those_there():
    state, policy = make_state(400, 4, max_num_seqs=1), made("fastswitch:update_every=1")
    early = request(4, 3, priority=2, name="early")
    for each in (early, request(4, 400, priority=0, name="always"), request(4, 400, priority=1, name="half")):
        state.add(each)
    for k in range(100):
        step(state, policy, 0.03 * k)
    assert early.finish_reason is not None
    before = {priority: served for (priority, _), served in policy._served.items()}
    state.add(request(4, 300, priority=2, name="again"))
    step(state, policy, 3.0)
    assert before[2] < policy._served[2, None] == pytest.approx(min(before[0], before[1]), abs=8.0)
    assert abs(before[0] - before[1]) <= 8.0, "shares by weight"


@pytest.mark.parametrize("priority", [0, 2])
def test_fastswitch_counts_a_prompt_token_once_and_an_output_token_twice(priority):
    state, policy = make_state(400, 4, max_num_seqs=2), made("fastswitch")
    state.add(request(6, 4, priority=priority))
    for k in range(4):
        step(state, policy, 0.03 * k)
    assert policy._served == {(priority, None): (6 + 3 * 2) * 2**priority} and not policy._had and not policy._rank


def shares(policy, state, steps=300):
    """Tokens by the first word of a request's name."""
    served = {}
    for k in range(steps):
        for name in names(step(state, policy, 0.03 * k).scheduled):
            served[name.split()[0]] = served.get(name.split()[0], 0) + 1
    return served


@pytest.mark.parametrize(("by", "share"), [("user", 1 / 2), ("both", 1 / 2), ("class", 1 / 7)])
def test_fastswitch_shares_evenly_between_users_however_much_they_ask_for(by, share):
    """One request of one user beside six of another, in one class, on one seat."""
    state, policy = make_state(400, 4, max_num_seqs=1), made(f"fastswitch:update_every=2:by={by}")
    state.add(request(4, 400, user="few", name="few"))
    for k in range(6):
        state.add(request(4, 400, user="flood", name=f"flood {k}"))
    assert shares(policy, state)["few"] / 300 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize(("by", "share"), [("user", 3 / 5), ("both", 2 / 5)])
def test_fastswitch_by_user_gives_nobody_a_share_for_each_class(by, share):
    """A user in class 0 beside one in classes 0 and 1.

    A token in class 1 counts double. By user the second has half of what counts, in tokens a third less than the
    first, since its two requests get as many each; by both there are accounts of weight 1, 1 and a half.
    """
    state, policy = make_state(400, 4, max_num_seqs=1), made(f"fastswitch:update_every=2:by={by}")
    state.add(request(4, 600, user="one", name="one"))
    for priority in (0, 1):
        state.add(request(4, 600, user="two", priority=priority, name=f"two {priority}"))
    assert shares(policy, state, 500)["one"] / 500 == pytest.approx(share, abs=0.06)


def test_fastswitch_remembers_who_had_much_and_forgets_most_of_those_that_are_gone():
    state, policy = make_state(4000, 4, max_num_seqs=8), made("fastswitch:update_every=1")
    state.add(request(4, 900, user="always", name="always"))
    for k in range(20):
        step(state, policy, 0.03 * k)
    for k in range(4000):
        policy._served[0, f"gone {k}"] = float(k % 2) * 1e6 + k
    step(state, policy, 9.0)
    assert len(policy._served) == 1024 + 1 and (0, "always") in policy._served
    state.add(request(4, 9, user="gone 3999", name="owes"))
    state.add(request(4, 9, user="gone 2", name="owes nothing"))
    step(state, policy, 9.1)
    level = policy._served[0, "gone 2"]
    assert policy._served[0, "gone 3999"] == 1e6 + 3999 > level >= 40.0, "at the level of who is there"


def test_fastswitch_knows_what_has_an_account():
    with pytest.raises(ValueError, match="by='owner' must be one of both, class, user"):
        made("fastswitch:by=owner")
