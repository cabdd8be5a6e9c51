"""Whom `apt` evicts and admits in states of a few requests, worked out by hand: blocks of 4 tokens, 2 a KV page.

A request that `run` puts there has its last token at time 0, so it arrives before that; one that arrived more than a
second before its first token has missed its SLO. Without prediction only what is known now counts.
"""

from dataclasses import replace

import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from tests.support.apt_plans import decide
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import run, wait

A100 = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], "one-pass")
FASTER = A100.with_scales(Scales(per_request_s=(0.0, 0.0)))  # also for short ones
SLOW_HIDDEN = replace(A100, hidden_mode="recompute")
PATIENT = Slo(60.0, 60.0)


# -- victims: only for somebody who comes ------------------------------------------------------------------------


def test_nobody_is_evicted_for_a_request_that_the_forecast_refuses():
    """The newcomer (10 blocks) would fit in place of the late one, but not beside the other one's growth: each of
    both is expected to hold more than 50 of the 60 blocks in 256 tokens' time."""
    state = make_state(60)
    run(state, "late", 40, arrival_s=-5.0)  # 20 blocks and 2 of growth; its first token came after 5 s
    run(state, "fine", 60, slo=PATIENT)  # 30 and 2
    wait(state, "fresh", 20, arrival_s=1.0)
    assert decide(state, 1.1, "apt") == [
        "run late 1 kv DECODES", "run fine 1 kv DECODES", "wait fresh WAITS_FOR_BLOCKS",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "plan"),
    [
        # `small` needs no room; `large` needs the late one's blocks, and no token is left for it
        (4, ["run late 1 kv DECODES", "run small 3 kv ADMITTED_KV", "wait large WAITS_FOR_BLOCKS"]),
        (5, ["preempt late PREEMPTED_LATE", "run small 4 kv ADMITTED_KV", "run large 1 kv ADMITTED_KV"]),
        (64, ["preempt late PREEMPTED_LATE", "run small 4 kv ADMITTED_KV", "run large 8 kv ADMITTED_KV"]),
    ],
)
def test_nobody_is_evicted_for_a_request_that_the_token_budget_does_not_reach(tokens, plan):
    state = make_state(24, tokens=tokens)
    run(state, "late", 40, arrival_s=-5.0)  # 20 blocks and 2 of growth: 2 are free
    wait(state, "small", 4, arrival_s=1.0)  # 2 blocks
    wait(state, "large", 8, arrival_s=1.0)  # 4 blocks
    assert decide(state, 1.1) == plan


def test_a_spared_victim_takes_its_token_back_and_so_another_may_be_left_out():
    """5 tokens: `a` takes 4, `b` 1, `c` none, so its victim stays and decodes; now `b` is not reached either."""
    state = make_state(26, tokens=5)
    run(state, "one", 40, arrival_s=-5.0)  # 20 blocks and 2 of growth: 4 are free
    wait(state, "a", 4, arrival_s=1.0)  # 2
    wait(state, "b", 4, arrival_s=1.1)  # 2
    wait(state, "c", 8, arrival_s=1.2)  # 4: in place of `one`
    assert decide(state, 1.3) == [
        "run one 1 kv DECODES", "run a 4 kv ADMITTED_KV", "wait b WAITS_FOR_BLOCKS", "wait c WAITS_FOR_BLOCKS",
    ]  # fmt: skip


def test_the_largest_late_one_makes_room_and_no_more_than_are_needed():
    state = make_state(26)
    run(state, "small", 7, arrival_s=-5.0)  # 4 blocks
    run(state, "large", 31, arrival_s=-5.0)  # 16
    run(state, "last", 7, arrival_s=-5.0)  # 4; 2 are free
    wait(state, "fresh", 16, arrival_s=1.0)  # 8
    assert decide(state, 1.1) == [
        "preempt large PREEMPTED_LATE", "run small 1 kv DECODES", "run last 1 kv DECODES",
        "run fresh 16 kv ADMITTED_KV",
    ]  # fmt: skip


def test_a_seat_counts_like_memory():
    state = make_state(400, max_num_seqs=1)
    run(state, "late", 7, arrival_s=-5.0)
    wait(state, "fresh", 8, arrival_s=1.0)
    assert decide(state, 1.1) == ["preempt late PREEMPTED_LATE", "run fresh 8 kv ADMITTED_KV"]
    state = make_state(400, max_num_seqs=1)
    run(state, "fine", 7, slo=PATIENT)
    wait(state, "fresh", 8, arrival_s=1.0)
    assert decide(state, 1.1) == ["run fine 1 kv DECODES", "wait fresh WAITS_FOR_BLOCKS"]


def test_a_late_request_takes_what_is_left_over_and_evicts_nobody():
    state = make_state(26)
    run(state, "late", 31, arrival_s=-5.0)  # 16 blocks; 10 are free
    wait(state, "large", 24, arrival_s=-5.0)  # 12
    wait(state, "small", 8, arrival_s=-5.0)  # 4
    assert decide(state, 0.5) == ["run late 1 kv DECODES", "run small 8 kv ADMITTED_LATE", "wait large WAITS_LATE"]


def test_a_better_offer_that_does_not_fit_is_passed_over():
    """`large` is worth more per block, but late: it evicts nobody, and 10 blocks are free."""
    state = make_state(26)
    run(state, "late", 31, arrival_s=-5.0)
    wait(state, "large", 24, arrival_s=-5.0, slo=Slo(0.1, 0.1))
    wait(state, "small", 8, arrival_s=-5.0)
    assert decide(state, 0.5) == ["run late 1 kv DECODES", "run small 8 kv ADMITTED_LATE", "wait large WAITS_LATE"]


@pytest.mark.parametrize(("seats", "admitted"), [(1, ""), (2, "a"), (3, "ab")])
def test_no_more_are_admitted_than_there_are_seats(seats, admitted):
    state = make_state(64, max_num_seqs=seats)
    run(state, "fine", 7, slo=PATIENT)
    for name in "ab":
        wait(state, name, 8, arrival_s=0.4)
    assert [line.split()[1] for line in decide(state, 0.5) if line.startswith("run")] == ["fine", *admitted]


# -- growth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "arrival_s", "plan"),
    [
        (12, 0.0, ["run patient 1 kv DECODES", "run urgent 1 kv DECODES"]),  # just enough
        (11, 0.0, ["preempt patient PREEMPTED_LEAST_VALUE", "run urgent 1 kv DECODES"]),
        (11, -99.0, ["preempt urgent PREEMPTED_LEAST_VALUE", "run patient 1 kv DECODES"]),  # it is in the lane
    ],
)
def test_when_blocks_run_out_the_one_worth_least_per_block_goes(blocks, arrival_s, plan):
    """Both hold 4 blocks and need 6 for their ninth token."""
    state = make_state(blocks)
    run(state, "patient", 8, slo=PATIENT, arrival_s=arrival_s)
    run(state, "urgent", 8, slo=Slo(1.0, 1.0))
    assert decide(state, 0.5) == plan


def test_what_is_left_after_an_eviction_goes_to_a_newcomer():
    """11 blocks: 6 for `urgent`, 5 are left."""
    for prompt, last in ((8, "run new 8 kv ADMITTED_KV"), (12, "wait new WAITS_FOR_BLOCKS")):
        state = make_state(11)
        run(state, "patient", 8, slo=PATIENT)
        run(state, "urgent", 8)
        wait(state, "new", prompt, arrival_s=0.4)
        assert decide(state, 0.5) == ["preempt patient PREEMPTED_LEAST_VALUE", "run urgent 1 kv DECODES", last]


def test_each_kind_counts_with_its_own_blocks_when_memory_runs_out():
    """Held 4 + 3, needed 6 + 4 of 9: equal values, so the KV one is worth less per block."""
    state = make_state(9, mode="hybrid")
    run(state, "kv", 8, slo=PATIENT)
    run(state, "hidden", 12, kind=CacheKind.HIDDEN, slo=PATIENT)
    assert decide(state, 0.5) == ["preempt kv PREEMPTED_LEAST_VALUE", "run hidden 1 hidden DECODES"]


# -- admission: whom, as which kind -------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "is_admitted"), [(16, True), (17, False)])
def test_the_watermark_stays_free_beside_others(prompt, is_admitted):
    """18 blocks, 8 held, a watermark of 2: 8 for the newcomer. Alone it may have all."""
    state = make_state(18, watermark=2)
    run(state, "fine", 15, slo=PATIENT)
    wait(state, "fresh", prompt, arrival_s=0.4)
    assert (f"run fresh {prompt} kv ADMITTED_KV" in decide(state, 0.5)) is is_admitted
    state = make_state(10, watermark=2)
    wait(state, "alone", 20)
    assert decide(state, 0.5) == ["run alone 20 kv ADMITTED_KV"]


@pytest.mark.parametrize(
    ("mode", "model", "reason"),
    [
        ("kv", A100, "kv ADMITTED_KV"),
        ("hidden", SLOW_HIDDEN, "hidden ADMITTED_HIDDEN"),
        ("hybrid", A100, "hidden ADMITTED_HIDDEN_FASTER"),  # a short one is slower, but not worth both kinds
        ("hybrid", FASTER, "hidden ADMITTED_HIDDEN_FASTER"),
        ("hybrid", SLOW_HIDDEN, "kv ADMITTED_KV"),
        ("hybrid", None, "kv ADMITTED_KV"),
    ],
)
def test_the_kind_and_its_reason(mode, model, reason):
    state = make_state(64, mode=mode)
    wait(state, "new", 8)
    assert decide(state, 0.5, model=model) == [f"run new 8 {reason}"]


def test_halves_serve_more_where_memory_is_short_even_without_a_cost_model():
    """12 blocks for two prompts of 4 pages: 8 as KV and 4 as hidden."""
    state = make_state(12, mode="hybrid")
    wait(state, "a", 16)
    wait(state, "b", 16, arrival_s=0.1)
    kinds = {line.split()[1]: line.split()[3] for line in decide(state, 0.5, model=None)}
    assert kinds == {"a": "kv", "b": "hidden"}


@pytest.mark.parametrize(
    ("value", "chosen"), [("pending", "tight"), ("absolute", "loose"), ("slack", "tight"), ("longest", "tight")]
)
def test_the_value_decides_who_gets_the_last_blocks(value, chosen):
    """One fits. `loose` has waited 2 of 60 s (0.03, slack 58), `tight` 0.5 of 1 s (0.5, slack 0.5)."""
    state = make_state(4)
    wait(state, "loose", 8, slo=PATIENT, arrival_s=0.0)
    wait(state, "tight", 8, slo=Slo(1.0, 1.0), arrival_s=1.5)
    assert decide(state, 2.0, f"apt:prediction=off:value={value}")[0] == f"run {chosen} 8 kv ADMITTED_KV"


def test_slack_counts_seconds_and_pending_shares():
    """`a` has waited 9 of 10 s (1 s left), `b` 0.25 of 0.5 s (0.25 s left)."""
    for value, chosen in (("pending", "a"), ("slack", "b")):
        state = make_state(4)
        wait(state, "a", 8, slo=Slo(10.0, 10.0), arrival_s=0.0)
        wait(state, "b", 8, slo=Slo(0.5, 0.5), arrival_s=8.75)
        assert decide(state, 9.0, f"apt:prediction=off:value={value}")[0].split()[1] == chosen


def test_longest_ignores_memory_and_footprint_counts_the_future():
    for value, chosen in (("pending", "short"), ("longest", "long")):
        state = make_state(16)
        wait(state, "long", 32, slo=PATIENT)
        wait(state, "short", 8, slo=PATIENT)
        assert decide(state, 1.0, f"apt:prediction=off:value={value}")[0].split()[1] == chosen
    for value, chosen in (("pending", "talker"), ("footprint", "brief")):
        state = make_state(4)
        wait(state, "talker", 8, slo=PATIENT)
        wait(state, "brief", 7, slo=PATIENT, arrival_s=0.1)
        remaining = {8: 500, 7: 20}
        assert decide(state, 1.0, f"apt:value={value}", remaining=remaining)[0].split()[1] == chosen


# -- the forecast -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "blocks"),
    [(0, 110), (0.5, 149), (1, 187), (2, 272)],  # 109.8, and 76.4 for each deviation; for two more at 512 tokens
)
def test_the_forecast_refuses_what_would_not_fit_later(margin, blocks):
    """256 tokens to come: after 256 more both still run with probability 1/e, and would hold (317 / 4 + 1/2) 2 = 159.5
    and (276 / 4 + 1/2) 2 = 139 blocks: 109.8 expected. The deviation of the running one is sqrt((1 - 1/e) / e) 158.5.

    After 512 more: 75.1 expected of both, and a deviation of 98.0.
    """
    for late, option in ((False, "margin"), (True, "late_margin")):
        for there in (blocks, blocks - 1):
            state = make_state(there)
            run(state, "fine", 60, slo=PATIENT)
            wait(state, "fresh", 20, arrival_s=-1.0 if late else 1.0)
            line = f"run fresh 20 kv ADMITTED_{'LATE' if late else 'KV'}"
            assert (line in decide(state, 1.1, f"apt:{option}={margin}")) is (there == blocks)
            assert line in decide(state, 1.1)


def test_a_late_request_leaves_twice_as_much_free_as_one_in_time():
    for blocks, admitted in ((186, []), (187, ["fresh"]), (271, ["fresh"]), (272, ["fresh", "late"])):
        for name in ("fresh", "late"):
            state = make_state(blocks)
            run(state, "fine", 60, slo=PATIENT)
            wait(state, name, 20, arrival_s=-1.0 if name == "late" else 1.0)
            assert (decide(state, 1.1, "apt")[-1].split()[0] == "run") is (name in admitted)


def test_the_forecast_counts_those_admitted_before_it_and_lets_the_first_pass():
    """Nothing runs: the first is admitted whatever it becomes; a second like it would need 2 x 51.1 of 60 blocks."""
    state = make_state(60)
    wait(state, "first", 20)
    wait(state, "second", 20, arrival_s=0.1)
    assert decide(state, 0.5, "apt") == ["run first 20 kv ADMITTED_KV", "wait second WAITS_FOR_BLOCKS"]


@pytest.mark.parametrize(("watermark", "is_admitted"), [(1, True), (2, False)])
def test_the_forecast_keeps_the_watermark_free(watermark, is_admitted):
    """188 blocks for the 186.2 of the case above."""
    state = make_state(188, watermark=watermark)
    run(state, "fine", 60, slo=PATIENT)
    wait(state, "fresh", 20, arrival_s=1.0)
    assert ("run fresh 20 kv ADMITTED_KV" in decide(state, 1.1, "apt")) is is_admitted


@pytest.mark.parametrize(("blocks", "is_admitted"), [(103, True), (102, False)])
def test_the_forecast_counts_those_of_the_lane(blocks, is_admitted):
    """Two like the newcomer: 2 x 51.135 blocks in 256 tokens' time."""
    state = make_state(blocks)
    wait(state, "old", 20, arrival_s=-30.0)
    wait(state, "fresh", 20, arrival_s=1.0)
    plan = decide(state, 1.1, "apt")
    assert plan[0] == "run old 20 kv ADMITTED_LONGEST_LATE"
    assert ("run fresh 20 kv ADMITTED_KV" in plan) is is_admitted


@pytest.mark.parametrize(("blocks", "first"), [(162, "preempt late PREEMPTED_LATE"), (161, "run late 1 kv DECODES")])
def test_a_victims_future_is_free_for_the_one_it_makes_room_for(blocks, first):
    """Without the late one 48.0 and 51.1 blocks are expected and the deviation is 62.4, all in 256 tokens' time.

    With it 249 more: 100.5 expected, and a deviation of 148.
    """
    state = make_state(blocks)
    run(state, "late", 300, arrival_s=-5.0)  # 150 blocks and 2 of growth
    run(state, "tiny", 2, slo=PATIENT)  # 2 blocks; later (259 / 4 + 1/2) 2 / e, or 0.482 x 129.5 more
    wait(state, "fresh", 20, arrival_s=1.0)  # 10 blocks
    assert decide(state, 1.1, "apt")[0] == first
