"""Whom `apt` admits at each limit, and what hidden caches may cost, by hand: blocks of 4 tokens, 2 a KV page.

A request that `run` puts there has its last token at time 0, so it arrives before that; one that arrived more than a
second before its first token has missed its SLO. Without prediction only what is known now counts.
"""

import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from tests.support.apt_plans import decide
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import run, wait

PATIENT = Slo(60.0, 60.0)


class Slower(CostModel):
    """A hidden token costs 1/1,024 s more than one in KV. Decodes take 0.25 s as KV, `hidden_s` with a hidden one."""

    attention_s, request_s = (1 / 1024, 1 / 512), (0.0, 0.0)
    hidden_s = 0.499  # less than twice as long, for twice the requests: a pool full of hidden ones brings more

    def step_s(self, load):
        if not load.decode_requests or load.prefill_tokens:
            return 0.0
        return self.hidden_s if load.context_tokens[CacheKind.HIDDEN.index] else 0.25


class TooSlow(Slower):
    hidden_s = 0.5


class AsFast(TooSlow):
    attention_s = (1 / 512, 1 / 512)


class Faster(TooSlow):
    """A hidden token costs less than one in KV, as where memory bounds attention, and a hidden request costs more."""

    attention_s, request_s = (1 / 512, 1 / 1024), (0.0, 1.0)


def model(kind):
    return kind(MODELS["opt-125m"], HARDWARE["h200"])


# -- a hidden cache where memory is short --------------------------------------------------------------------------


def short(pending_s=0.5):
    """Two decode; 20 blocks are free for a prompt of 64 tokens: 16 hidden ones are enough, 32 for KV are too many."""
    state = make_state(32, mode="hybrid")
    run(state, "a", 9, slo=PATIENT)  # 6 blocks
    run(state, "b", 9, slo=PATIENT)
    wait(state, "new", 64, arrival_s=1.0 - pending_s)
    return state


def test_a_prompt_that_fits_as_hidden_only_is_admitted_where_hidden_tokens_cost_less():
    """It has waited a hundredth of a second; what its hidden blocks save is more: 64 tokens, 1/1,024 s each."""
    state = make_state(20, mode="hybrid")
    wait(state, "new", 64, arrival_s=0.99)
    assert decide(state, 1.0, model=model(Faster)) == ["run new 64 hidden ADMITTED_HIDDEN_FASTER"]


SERVED = "run new 62 hidden ADMITTED_HIDDEN_SERVES_MORE"


@pytest.mark.parametrize(
    ("options", "kind", "is_served"),
    [
        ("apt", Slower, True),
        ("apt", TooSlow, False),
        ("apt:prediction=off", Slower, True),
        ("apt:prediction=off", TooSlow, False),
        ("apt:sustained=off", TooSlow, True),
        ("apt", AsFast, True),  # costs nothing more than KV
    ],
)
def test_hidden_serves_more_if_a_pool_full_of_it_brings_more(options, kind, is_served):
    found = decide(short(), 1.0, options, model(kind), {9: 1.0, 64: 128.0})
    assert (SERVED in found) is is_served


@pytest.mark.parametrize(("prompt", "kind"), [(28, "kv"), (29, "hidden")])
def test_kv_costs_nothing_while_half_of_the_pool_stays_free(prompt, kind):
    """Half of 40 blocks is 20; 6 are held, and 14 are 7 pages. A token more makes 8."""
    state = make_state(40, mode="hybrid")
    run(state, "a", 9, slo=PATIENT)
    wait(state, "new", prompt, arrival_s=0.5)
    assert decide(state, 1.0, model=model(Slower))[-1].split()[3] == kind


@pytest.mark.parametrize(("remaining", "kind"), [(1.0, "kv"), (64.0, "hidden")])
def test_growth_counts_for_the_half(remaining, kind):
    """10 blocks of 20 as KV; 32 tokens later it is there with e^-0.5 and holds 25.5: 15 are expected."""
    state = make_state(20, mode="hybrid")
    wait(state, "new", 17, arrival_s=0.5)
    assert decide(state, 1.0, "apt", model(Slower), remaining)[-1].split()[3] == kind


@pytest.mark.parametrize("slo", [Slo(60.0, 60.0), Slo(60.0, 1e-9), Slo(1e-9, 1e-9)])
def test_one_that_can_only_be_hidden_does_not_wait_where_nothing_runs(slo):
    """As KV its 16 blocks would be more than half of the pool; it has just come, and is worth next to nothing."""
    state = make_state(20, mode="hybrid")
    wait(state, "new", 30, slo=slo, arrival_s=1.0)
    assert decide(state, 1.0, "apt", model(Slower))[-1].split()[:4] == ["run", "new", "30", "hidden"]


class Apart(Slower):
    """An iteration with both kinds takes `both_s` longer."""

    def mixing_s(self, load):
        return self.both_s if all(load.decodes[kind.index] for kind in (CacheKind.KV, CacheKind.HIDDEN)) else 0.0


@pytest.mark.parametrize(("both_s", "chosen"), [(8 / 1024, "kv"), (9 / 1024, "hidden")])
def test_kv_is_not_worth_an_iteration_with_both_kinds(both_s, chosen):
    """For each of two that decode KV saves 4 tokens x 1/1,024 s. Plenty is free."""
    state = make_state(64, mode="hybrid")
    run(state, "a", 3, slo=PATIENT)
    run(state, "b", 3, slo=PATIENT)
    wait(state, "new", 4, arrival_s=0.5)
    costs = model(type("Apart", (Apart,), {"both_s": both_s}))
    assert decide(state, 1.0, model=costs)[-1].split()[3] == chosen


def test_newcomers_before_it_count_as_kv():
    """Half of 40 blocks is 20: 10 for each of two, and the third would be beyond."""
    state = make_state(40, mode="hybrid")
    for k in range(3):
        wait(state, f"new{k}", 20, arrival_s=k / 8)
    found = decide(state, 0.5, model=model(Slower))
    assert [line.split()[3] for line in found] == ["kv", "kv", "hidden"]


def test_what_is_too_large_for_kv_is_hidden_whatever_it_costs():
    """64 tokens are 32 blocks as KV; the pool has 31."""
    for arrival_s in (0.5, -30.0):  # by value, and in the lane
        state = make_state(31, mode="hybrid")
        wait(state, "new", 64, arrival_s=arrival_s)
        assert decide(state, 1.0, model=model(TooSlow))[0].split()[3] == "hidden"


@pytest.mark.parametrize(("kind", "chosen"), [(Slower, "hidden"), (TooSlow, "kv")])
def test_the_lane_s_kind_is_the_smallest_if_that_pays(kind, chosen):
    state = make_state(64, mode="hybrid")
    wait(state, "old", 16, arrival_s=-30.0)
    assert decide(state, 0.5, model=model(kind)) == [f"run old 16 {chosen} ADMITTED_LONGEST_LATE"]


@pytest.mark.parametrize(("pending_s", "is_served"), [(0.19, True), (0.18, False)])
def test_a_hidden_cache_must_be_worth_the_delay_of_everyone(pending_s, is_served):
    """16 pages of 4 tokens, 1/1,024 s each, for three requests: 0.1875 s. A millisecond is added to what has passed."""
    assert (SERVED in decide(short(pending_s), 1.0, model=model(Slower))) is is_served


def test_a_late_request_s_delay_does_not_count():
    """Two requests instead of three: 0.125 s; `late` gives its memory, but then the newcomer may have KV."""
    for pending_s, is_served in ((0.13, True), (0.12, False)):
        state = make_state(32, mode="hybrid", max_num_seqs=8)
        run(state, "a", 9, slo=PATIENT)
        wait(state, "gone", 64, arrival_s=-5.0)
        wait(state, "new", 64, arrival_s=1.0 - pending_s)
        found = decide(state, 1.0, model=model(Slower))
        assert ("run new 63 hidden ADMITTED_HIDDEN_SERVES_MORE" in found) is is_served


# -- the watermark -------------------------------------------------------------------------------------------------


def test_the_watermark_is_no_room_for_the_solver():
    """10 blocks are free and 2 of them stay: `big` (10) is worth more, but only `small` fits."""
    state = make_state(18, watermark=2)
    run(state, "fine", 15, slo=PATIENT)
    wait(state, "big", 20, arrival_s=0.0)
    wait(state, "small", 8, arrival_s=0.4, slo=PATIENT)
    assert decide(state, 0.5) == ["run fine 1 kv DECODES", "run small 8 kv ADMITTED_KV", "wait big WAITS_FOR_BLOCKS"]


@pytest.mark.parametrize(("watermark", "first"), [(2, "preempt late PREEMPTED_LATE"), (0, "run fine 1 kv DECODES")])
def test_somebody_is_evicted_for_the_watermark_too(watermark, first):
    state = make_state(22, watermark=watermark)
    run(state, "late", 7, arrival_s=-5.0)  # 4 blocks
    run(state, "fine", 15, slo=PATIENT)  # 8; 10 are free
    wait(state, "fresh", 20, arrival_s=1.0)  # 10
    plan = decide(state, 1.1)
    assert "run fresh 20 kv ADMITTED_KV" in plan and (plan[0] == first) is (watermark > 0)


@pytest.mark.parametrize(("free", "is_admitted"), [(2, True), (1, False)])
def test_the_last_page_is_given_out(free, is_admitted):
    state = make_state(8 + free)
    run(state, "fine", 15, slo=PATIENT)
    wait(state, "fresh", 4, arrival_s=0.4)
    assert ("run fresh 4 kv ADMITTED_KV" in decide(state, 0.5)) is is_admitted


@pytest.mark.parametrize(("blocks", "watermark", "converts"), [(18, 0, True), (18, 4, True), (17, 0, False)])
def test_what_an_admission_leaves_may_be_used_for_a_conversion(blocks, watermark, converts):
    """5 held and 2 for the newcomer; a quarter (4) and 2 for growth stay free; 5 are to be converted."""
    state = make_state(blocks, mode="hybrid", watermark=watermark)
    run(state, "hidden", 19, kind=CacheKind.HIDDEN, slo=PATIENT)
    wait(state, "new", 4, arrival_s=0.1)
    found = decide(state, 0.9, model=model(Slower))
    assert "run new 4 kv ADMITTED_KV" in found
    assert ("convert hidden CONVERTED_MEMORY_FREE" in found) is converts


# -- seats and victims ---------------------------------------------------------------------------------------------


def test_nobody_is_evicted_while_a_seat_and_the_blocks_are_free():
    state = make_state(64, max_num_seqs=2)
    run(state, "late", 7, arrival_s=-5.0)
    wait(state, "fresh", 8, arrival_s=1.0)
    assert decide(state, 1.1) == ["run late 1 kv DECODES", "run fresh 8 kv ADMITTED_KV"]


def test_one_seat_costs_one_victim():
    state = make_state(64, max_num_seqs=2)
    run(state, "small", 3, arrival_s=-5.0)
    run(state, "large", 7, arrival_s=-5.0)
    wait(state, "fresh", 8, arrival_s=1.0)
    assert decide(state, 1.1) == [
        "preempt small PREEMPTED_LATE", "run large 1 kv DECODES", "run fresh 8 kv ADMITTED_KV",
    ]  # fmt: skip


def test_a_late_offer_ahead_gets_no_seat_and_evicts_nobody():
    """Now `fresh` has waited for a 60,000th of its SLO; even a ten-thousandth of the late one's is more."""
    state = make_state(64, max_num_seqs=1)
    run(state, "late", 7, arrival_s=-5.0)
    wait(state, "old", 8, arrival_s=-5.0)
    wait(state, "fresh", 8, arrival_s=1.0, slo=PATIENT)
    assert decide(state, 1.0) == ["preempt late PREEMPTED_LATE", "run fresh 8 kv ADMITTED_KV", "wait old WAITS_LATE"]


def test_a_hidden_newcomer_lacks_one_block():
    """3 blocks are free and 4 are needed: the late one's makes up for it. With 4 nobody has to go."""
    for blocks, first in ((4, "preempt late PREEMPTED_LATE"), (5, "run late 1 hidden DECODES")):
        state = make_state(blocks, mode="hidden")
        run(state, "late", 2, kind=CacheKind.HIDDEN, arrival_s=-5.0)  # one block
        wait(state, "fresh", 16, arrival_s=1.0)
        assert decide(state, 1.1)[0] == first


def test_the_room_that_one_took_is_gone_for_the_next():
    """4 blocks are free: `a` has them, `b` needs the late one's."""
    state = make_state(8)
    run(state, "late", 7, arrival_s=-5.0)
    wait(state, "a", 8, arrival_s=1.0)
    wait(state, "b", 8, arrival_s=1.05)
    assert decide(state, 1.1) == [
        "preempt late PREEMPTED_LATE", "run a 8 kv ADMITTED_KV", "run b 8 kv ADMITTED_KV",
    ]  # fmt: skip


# -- the forecast --------------------------------------------------------------------------------------------------


def test_the_forecast_is_not_asked_where_only_a_victim_ran():
    """The newcomer alone will want more than the 60 blocks, but then there is nobody to share them with."""
    state = make_state(60)
    run(state, "late", 40, arrival_s=-5.0)
    wait(state, "fresh", 100, arrival_s=1.0)
    assert decide(state, 1.1, "apt")[0] == "preempt late PREEMPTED_LATE"


def test_what_is_expected_may_fill_the_cache_to_the_last_block():
    """All end within the next 16 tokens: what counts is 8 blocks held and 12 wanted."""
    for blocks, is_admitted in ((20, True), (19, False)):
        state = make_state(blocks)
        run(state, "fine", 15, slo=PATIENT)
        wait(state, "fresh", 24, arrival_s=0.4)
        assert ("run fresh 24 kv ADMITTED_KV" in decide(state, 0.5, "apt", remaining=1e-3)) is is_admitted
