"""Lane, lateness, turns, budget and conversion of `apt`, worked out by hand: blocks of 4 tokens, 2 a KV page.

A request that `run` puts there has its last token at time 0, so it arrives before that; one that arrived more than a
second before its first token has missed its SLO. Without prediction only what is known now counts.
"""

from dataclasses import replace

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.policies.apt.facts.lateness import is_late, is_overdue
from apt_jax.scheduling.policies.apt.facts.queue import Queue
from tests.support.apt_plans import decide
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import run, wait

A100 = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], "one-pass")
SLOW_HIDDEN = replace(A100, hidden_mode="recompute")
PATIENT = Slo(60.0, 60.0)


# -- the lane -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "plan"),
    [
        (0.0, ["run fine 1 kv DECODES", "wait old WAITS_LATE"]),  # waits for 20 s, not longer
        (0.5, ["preempt fine PREEMPTED_FOR_LONGEST_LATE", "run old 16 kv ADMITTED_LONGEST_LATE"]),
    ],
)
def test_after_its_patience_a_late_request_takes_what_it_needs(now, plan):
    state = make_state(12)
    run(state, "fine", 11, slo=PATIENT)  # 6 blocks
    wait(state, "old", 16, arrival_s=-20.0)  # 8
    assert decide(state, now) == plan


def test_the_lane_is_as_wide_as_its_share_and_takes_the_oldest():
    """Half of 16 blocks: the two oldest, not the third. `fine` keeps its 8 blocks."""
    state = make_state(16)
    run(state, "fine", 15, slo=PATIENT)
    for name, prompt in (("old1", 8), ("old2", 8), ("old3", 4)):
        wait(state, name, prompt, arrival_s=-30.0)
    assert decide(state, 0.5, "apt:prediction=off:lane_share=0.5") == [
        "run fine 1 kv DECODES", "run old1 8 kv ADMITTED_LONGEST_LATE", "run old2 8 kv ADMITTED_LONGEST_LATE",
        "wait old3 WAITS_LATE",
    ]  # fmt: skip
    assert decide(state, 0.5, "apt:prediction=off:lane_share=0.45")[2] != "run old2 8 kv ADMITTED_LONGEST_LATE"


def test_the_lane_evicts_who_has_most_time_and_only_as_much_as_it_needs():
    """8 blocks wanted, 2 free: `cheap` (6 blocks, 0.5 of 60 s) goes, `dear` (6 blocks, 0.5 of 1 s) stays."""
    state = make_state(14)
    run(state, "dear", 11)
    run(state, "cheap", 11, slo=PATIENT)
    wait(state, "old", 16, arrival_s=-30.0)
    assert decide(state, 0.5) == [
        "preempt cheap PREEMPTED_FOR_LONGEST_LATE", "run dear 1 kv DECODES", "run old 16 kv ADMITTED_LONGEST_LATE",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seats", "plan"),
    [
        (1, ["preempt fine PREEMPTED_FOR_LONGEST_LATE", "run old1", "wait old2"]),
        (2, ["preempt fine PREEMPTED_FOR_LONGEST_LATE", "run old1", "run old2"]),
        (3, ["run fine", "run old1", "run old2"]),
    ],
)
def test_the_lane_takes_seats_and_evicts_for_them_if_that_helps(seats, plan):
    state = make_state(64, max_num_seqs=seats)
    run(state, "fine", 7, slo=PATIENT)
    for name in ("old1", "old2"):
        wait(state, name, 8, arrival_s=-30.0)
    found = decide(state, 0.5, "apt:prediction=off:lane_share=1")
    assert [line if line.startswith("preempt") else " ".join(line.split()[:2]) for line in found] == plan


def test_the_lane_uses_the_smallest_kind():
    state = make_state(64, mode="hybrid")
    wait(state, "old", 16, arrival_s=-30.0)
    assert decide(state, 0.5, model=SLOW_HIDDEN) == ["run old 16 hidden ADMITTED_LONGEST_LATE"]


def test_without_aging_there_is_no_lane_and_without_a_fallback_nobody_is_late():
    for fallback, first in (("aging", "old"), ("constant", "fresh"), ("none", "old")):
        state = make_state(8)
        wait(state, "old", 16, arrival_s=-30.0)
        wait(state, "fresh", 16, arrival_s=0.4)
        assert decide(state, 0.5, f"apt:prediction=off:fallback={fallback}")[0].split()[1] == first


# -- lateness -----------------------------------------------------------------------------------------------------


def queue(generated, late_gaps=0, started=True, missed=False, given_up=False):
    """First token due after 2 s, gaps of 1 s, stall limit 4 s."""
    n = len(generated)
    tokens, zeros, no = np.array(generated, np.int64) + 10, np.zeros(n, np.int64), np.zeros(n, np.bool_)
    return Queue(
        [None] * n, since_s=np.zeros(n), arrival_s=np.zeros(n), ttft_slo_s=np.full(n, 2.0), tbt_slo_s=np.full(n, 1.0),
        stall_slo_s=np.full(n, 4.0), prompt_tokens=np.full(n, 10), max_new_tokens=np.full(n, 999), tokens=tokens,
        uncomputed=zeros, late_gaps=np.full(n, late_gaps), started=no | started, missed=no | missed,
        given_up=no | given_up, in_lane=no, priority=zeros, pages_held=zeros, kind=zeros, blocks_per_page=zeros,
    )  # fmt: skip


def late(queue, pending_s, remaining=None, prefill_s=0.0):
    n = len(queue)
    remaining = None if remaining is None else np.array(remaining)
    return is_late(queue, np.zeros(n) + pending_s, lambda: remaining, np.zeros(n) + prefill_s).tolist()


def test_one_gap_in_a_hundred_is_forgiven():
    """1 late gap: forgiven from 101 tokens on (100 gaps); a second one that is running from 201 tokens on."""
    assert late(queue([100, 101, 150], 1), 0.0) == [True, False, False]
    assert late(queue([150, 200, 201], 1), 1.5) == [True, True, False]
    assert late(queue([50, 50, 50], 1), 0.0, [49.0, 50.0, 51.0]) == [True, True, False]
    assert late(queue([5, 5, 5]), np.array([0.9, 1.0, 1.1])) == [False, False, True]


def test_no_gap_beyond_the_stall_limit_is_forgiven():
    assert late(queue([900] * 3), np.array([3.9, 4.0, 4.1])) == [False, False, True]


def test_a_first_token_is_late_after_its_own_slo_and_what_is_missed_is_never_made_up():
    assert late(queue([0, 0, 0], started=False), np.array([1.9, 2.0, 2.1])) == [False, False, True]
    assert late(queue([900], missed=True), 0.0) == late(queue([900], given_up=True), 0.0) == [True]
    assert not is_overdue(queue([900], missed=True, given_up=True), np.zeros(1)).any(), "the paper forgets it"


def test_a_prompt_that_takes_longer_than_what_is_left_is_late_already():
    """A first token after 2 s, or the next one after a preemption within the stall limit of 4 s."""
    assert late(queue([0, 0], started=False), 0.5, prefill_s=np.array([1.5, 1.51])) == [False, True]
    assert late(queue([900, 900]), 0.5, prefill_s=np.array([3.5, 3.51])) == [False, True]


# -- iteration type and budget ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrival_s", "plan"),
    [
        (0.0, ["run new 4 kv ADMITTED_KV", "wait talker WAITS_FOR_PREFILL"]),  # both wait since 0
        (0.1, ["run talker 1 kv DECODES", "wait new WAITS_FOR_DECODE"]),
        (-5.0, ["run talker 1 kv DECODES", "wait new WAITS_LATE"]),  # a late one's time does not count
    ],
)
def test_taking_turns_by_cumulative_pending_time(arrival_s, plan):
    state = make_state(64)
    run(state, "talker", 7)
    wait(state, "new", 4, arrival_s=arrival_s)
    assert decide(state, 0.5, "apt:prediction=off:mixed=off") == plan


@pytest.mark.parametrize(
    ("arrival_s", "plan"),
    [
        # the talker has waited for 0.5 s; the prompt under way for 0.3 and the newcomer for 0.25, or only 0.1
        (0.25, ["run half 6 kv CONTINUES_PREFILL", "run new 4 kv ADMITTED_KV", "wait talker WAITS_FOR_PREFILL"]),
        (0.4, ["run talker 1 kv DECODES", "wait new WAITS_FOR_DECODE"]),
    ],
)
def test_prompts_under_way_count_for_the_prefill_side(arrival_s, plan):
    state = make_state(64)
    run(state, "talker", 7)
    run(state, "half", 10, computed=4, arrival_s=0.2)
    wait(state, "new", 4, arrival_s=arrival_s)
    assert decide(state, 0.5, "apt:prediction=off:mixed=off") == plan


def test_prompts_under_way_come_first_and_all_share_the_token_limit():
    """12 tokens: 1 decodes, 6 finish a prompt, 5 are left for the newcomer."""
    state = make_state(64, tokens=12)
    run(state, "talker", 7)
    run(state, "half", 10, computed=4)
    wait(state, "new", 8, arrival_s=0.2)
    assert decide(state, 0.5) == [
        "run talker 1 kv DECODES", "run half 6 kv CONTINUES_PREFILL", "run new 5 kv ADMITTED_KV",
    ]  # fmt: skip


def test_the_tightest_gap_promise_limits_the_chunk():
    """A quarter of 0.3 s less the decodes, in tokens, beside what hides behind reading the weights."""
    state = make_state(4000, tokens=2048)
    run(state, "loose", 7, slo=PATIENT)
    run(state, "tight", 7, slo=Slo(1.0, 0.3))
    wait(state, "essay", 1800, arrival_s=0.04, slo=Slo(0.4, 60.0))  # takes 0.25 s, and half of its limit is 0.2 s
    decode_s = A100.step_s(StepLoad(decode_requests=2, context_tokens=(16, 0), decodes=(2, 0)))
    tokens = A100.free_tokens - 2 + int((0.075 - decode_s) / A100.token_s)
    assert 300 < tokens < 900
    assert decide(state, 0.05, model=A100)[2] == f"run essay {tokens} kv ADMITTED_KV"


def test_a_prompt_always_gets_a_few_tokens():
    state = make_state(4000, tokens=2048)
    run(state, "tight", 7, slo=Slo(1.0, 0.001))
    wait(state, "essay", 1800, slo=Slo(1000.0, 60.0))
    slow = A100.with_scales(Scales(compute=1000.0))
    assert decide(state, 0.0005, model=slow)[-1] == "run essay 16 kv ADMITTED_KV"


# -- conversion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tokens", "watermark", "converts"),
    [
        (19, 64, 0, True),  # 16 blocks: 5 held, 4 in reserve, 2 for growth, 5 to convert
        (20, 64, 0, False),  # 6 held and 6 wanted
        (19, 20, 0, True),  # 20 tokens to project, as many as an iteration computes
        (19, 19, 0, False),
        (19, 64, 4, True),  # the reserve is the larger of the two
        (19, 64, 5, False),
    ],
)
def test_a_hidden_request_becomes_kv_while_a_quarter_and_a_page_for_each_stay_free(prompt, tokens, watermark, converts):
    state = make_state(16, tokens=tokens, mode="hybrid", watermark=watermark)
    run(state, "hidden", prompt, kind=CacheKind.HIDDEN)
    kept, converted = (
        ["run hidden 1 hidden DECODES"],
        ["convert hidden CONVERTED_MEMORY_FREE", "run hidden 1 kv DECODES"],
    )
    assert decide(state, 0.5, model=SLOW_HIDDEN) == (converted if converts else kept)
    assert decide(state, 0.5, model=A100) == kept
    assert decide(state, 0.5, "apt:prediction=off:convert=off", SLOW_HIDDEN) == kept


def test_nothing_is_converted_while_somebody_waits_and_two_share_the_room():
    state = make_state(64, max_num_seqs=1, mode="hybrid")
    run(state, "hidden", 7, kind=CacheKind.HIDDEN)
    wait(state, "new", 8, arrival_s=0.4)
    assert "convert hidden CONVERTED_MEMORY_FREE" not in decide(state, 0.5, model=SLOW_HIDDEN)
    state = make_state(24, tokens=20, mode="hybrid")
    for name in ("a", "b", "c"):  # 2 blocks each: 18 free, 6 + 6 in reserve, 6 to convert, but 20 tokens only
        run(state, name, 7, kind=CacheKind.HIDDEN)
    converted = [line.split()[1] for line in decide(state, 0.5, model=SLOW_HIDDEN) if line.startswith("convert")]
    assert converted == ["a", "b"]


@pytest.mark.parametrize(("prompt", "converts"), [(23, True), (27, False)])
def test_the_reserve_is_a_quarter(prompt, converts):
    """20 blocks, 5 in reserve, 2 for growth: 6 pages leave 14 - 7 for 6 more, 7 pages 13 - 7 for 7 more."""
    state = make_state(20, mode="hybrid")
    run(state, "hidden", prompt, kind=CacheKind.HIDDEN)
    assert ("convert hidden CONVERTED_MEMORY_FREE" in decide(state, 0.5, model=SLOW_HIDDEN)) is converts
