"""What `apt` decides in states of a few requests, worked out by hand: blocks of 4 tokens, two of them a KV page.

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
from apt_jax.scheduling.policies.apt.facts.ledger import Queue
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from tests.support.scheduling_loop import TINY, make_state
from tests.support.tiny_states import lines, run, wait

A100 = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"])
SLOW_HIDDEN = replace(A100, hidden_mode="recompute")
PATIENT = Slo(60.0, 60.0)


class Foretold:
    """A predictor that knows: `remaining` tokens for each, or by prompt length."""

    def __init__(self, remaining):
        self._remaining = remaining

    def remaining_tokens(self, prompt_tokens, generated):
        if isinstance(self._remaining, dict):
            return np.array([self._remaining[int(n)] for n in prompt_tokens], np.float64)
        return np.full(len(prompt_tokens), self._remaining, np.float64)


def decide(state, now, options="apt:prediction=off", model=TINY, remaining=256.0):
    return lines(make_policy(options, PolicyContext(model, predictor=Foretold(remaining))).schedule(state, now))


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
        ("hybrid", A100, "hidden ADMITTED_HIDDEN_FASTER"),
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


@pytest.mark.parametrize(("blocks", "is_admitted"), [(111, True), (109, False)])
def test_the_forecast_refuses_what_would_not_fit_later(blocks, is_admitted):
    """256 tokens to come: after 256 more both still run with probability 1/e, and would hold (317 / 4 + 1/2) 2 = 159.5
    and (276 / 4 + 1/2) 2 = 139 blocks: 109.8 expected, the most of all horizons."""
    state = make_state(blocks)
    run(state, "fine", 60, slo=PATIENT)
    wait(state, "fresh", 20, arrival_s=1.0)
    assert ("run fresh 20 kv ADMITTED_KV" in decide(state, 1.1, "apt")) is is_admitted
    assert "run fresh 20 kv ADMITTED_KV" in decide(state, 1.1)


def test_the_forecast_counts_those_admitted_before_it_and_lets_the_first_pass():
    """Nothing runs: the first is admitted whatever it becomes; a second like it would need 2 x 51.1 of 60 blocks."""
    state = make_state(60)
    wait(state, "first", 20)
    wait(state, "second", 20, arrival_s=0.1)
    assert decide(state, 0.5, "apt") == ["run first 20 kv ADMITTED_KV", "wait second WAITS_FOR_BLOCKS"]


@pytest.mark.parametrize(("watermark", "is_admitted"), [(1, True), (2, False)])
def test_the_forecast_keeps_the_watermark_free(watermark, is_admitted):
    """111 blocks for the 109.8 of the case above."""
    state = make_state(111, watermark=watermark)
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


def test_a_victims_future_is_free_for_the_one_it_makes_room_for():
    """The late one would hold 80 of 100 blocks later; without it the newcomer's 51 fit beside nobody else's."""
    state = make_state(100)
    run(state, "late", 180, arrival_s=-5.0)  # 90 blocks and 2 of growth
    run(state, "tiny", 2, slo=PATIENT)  # 2 blocks; later (259 / 4 + 1/2) 2 / e = 48 blocks
    wait(state, "fresh", 20, arrival_s=1.0)
    assert decide(state, 1.1, "apt")[0] == "preempt late PREEMPTED_LATE"


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


def test_the_lane_evicts_the_least_value_per_block_and_only_as_much_as_it_needs():
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


def queue(generated, late_gaps=0, started=True, missed_first=False):
    n = len(generated)
    ints, zeros = np.array(generated, np.int64) + 10, np.zeros(n, np.int64)
    return Queue(
        [None] * n, np.zeros(n), np.zeros(n), np.full(n, 2.0), np.full(n, 1.0), np.full(n, 10), np.full(n, 999), ints,
        zeros, np.full(n, late_gaps), np.full(n, started), np.full(n, missed_first), zeros, zeros, zeros,
    )  # fmt: skip


def test_one_gap_in_a_hundred_is_forgiven():
    """1 late gap: forgiven from 101 tokens on (100 gaps); a second one that is running from 201 tokens on."""
    in_time, pending = np.zeros(3), np.full(3, 1.5)
    assert list(is_late(queue([100, 101, 150], 1), in_time, None)) == [True, False, False]
    assert list(is_late(queue([150, 200, 201], 1), pending, None)) == [True, True, False]
    assert list(is_late(queue([50, 50, 50], 1), in_time, np.array([49.0, 50.0, 51.0]))) == [True, True, False]
    assert list(is_late(queue([5, 5, 5]), np.array([0.9, 1.0, 1.1]), None)) == [False, False, True]


def test_a_first_token_is_late_after_its_own_slo_and_a_missed_one_is_never_made_up():
    pending = np.array([1.9, 2.0, 2.1])
    assert list(is_late(queue([0, 0, 0], started=False), pending, None)) == [False, False, True]
    assert is_late(queue([900] * 3, missed_first=True), np.zeros(3), None).all()
    assert not is_overdue(queue([900] * 3, missed_first=True), np.zeros(3)).any(), "the paper forgets it"


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
    wait(state, "essay", 1800, arrival_s=0.04)
    decode_s = A100.step_s(StepLoad(decode_requests=2, context_tokens=(16, 0)))
    tokens = A100.free_tokens - 2 + int((0.075 - decode_s) / A100.token_s)
    assert 300 < tokens < 900
    assert decide(state, 0.05, model=A100)[2] == f"run essay {tokens} kv ADMITTED_KV"


def test_a_prompt_always_gets_a_few_tokens():
    state = make_state(4000, tokens=2048)
    run(state, "tight", 7, slo=Slo(1.0, 0.001))
    wait(state, "essay", 1800)
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
