"""What `apt` decides in states of a few requests, worked out by hand: blocks of 4 tokens, two of them a KV page."""

from apt_jax.request import Slo
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from tests.support.scheduling_loop import TINY, make_state
from tests.support.tiny_states import lines, run, wait


def test_nobody_is_evicted_for_a_request_that_the_forecast_refuses():
    """The newcomer (10 blocks) would fit in place of the late one, but not beside the other one's growth: each of
    both is expected to hold more than 50 of the 60 blocks in 256 tokens' time."""
    state, policy = make_state(60), make_policy("apt", PolicyContext(TINY))
    run(state, "late", 40, arrival_s=-5.0)  # 20 blocks and 2 of growth; its first token came after 5 s
    run(state, "fine", 60, slo=Slo(60.0, 60.0))  # 30 and 2
    wait(state, "fresh", 20, arrival_s=1.0)
    assert lines(policy.schedule(state, 1.1)) == [
        "run late 1 kv DECODES", "run fine 1 kv DECODES", "wait fresh WAITS_FOR_BLOCKS",
    ]  # fmt: skip


def test_nobody_is_evicted_for_a_request_that_the_token_budget_does_not_reach():
    """`small` needs no room and uses the 4 tokens up; `large` would need the late one's blocks, but gets no token."""
    state, policy = make_state(24, tokens=4), make_policy("apt:prediction=off", PolicyContext(TINY))
    run(state, "late", 40, arrival_s=-5.0)  # 20 blocks and 2 of growth: 2 are free
    wait(state, "small", 4, arrival_s=1.0)  # 2 blocks
    wait(state, "large", 8, arrival_s=1.0)  # 4 blocks
    assert lines(policy.schedule(state, 1.1)) == [
        "run late 1 kv DECODES", "run small 3 kv ADMITTED_KV", "wait large WAITS_FOR_BLOCKS",
    ]  # fmt: skip


def test_a_late_request_is_evicted_for_one_that_is_admitted():
    """The same state with tokens for both."""
    state, policy = make_state(24, tokens=64), make_policy("apt:prediction=off", PolicyContext(TINY))
    run(state, "late", 40, arrival_s=-5.0)
    wait(state, "small", 4, arrival_s=1.0)
    wait(state, "large", 8, arrival_s=1.0)
    assert lines(policy.schedule(state, 1.1)) == [
        "preempt late PREEMPTED_LATE", "run small 4 kv ADMITTED_KV", "run large 8 kv ADMITTED_KV",
    ]  # fmt: skip
