"""Tokens of an iteration, whose turn it is, and conversions of `apt`, worked out by hand: blocks of 4 tokens.

A request that `run` puts there has its last token at time 0, so it arrives before that; one that arrived more than a
second before its first token has missed its SLO. Nothing is predicted.
"""

from dataclasses import replace

import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import OFFLINE_SLO, Slo
from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.step_load import StepLoad
from tests.support.apt_plans import decide
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import run, wait

PATIENT = Slo(60.0, 60.0)
TURNS = "apt:prediction=off:mixed=off"


class Toy(CostModel):
    """1/1,024 s a token, besides those that are free; hidden as fast as KV. What it is asked is written down."""

    token_s, attention_s = 1 / 1024, (1 / 1024, 1 / 1024)
    free_tokens, decode, both = 0, 0.0, 0.0
    asked = ()

    def step_s(self, load):
        type(self).asked = (*self.asked, load)
        if load.prefill_tokens:
            return self.both if load.decode_requests else 0.5
        return self.decode


def toy(scales=None, **figures):
    model = type("Figures", (Toy,), figures)(MODELS["opt-125m"], HARDWARE["h200"])
    return model if scales is None else replace(model, scales=scales)


# -- the budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "figures", "tokens"),
    [
        # a quarter of 0.5 s is 128 tokens
        (None, {}, 128),
        (None, {"free_tokens": 1}, 128),  # both decodes take the free one
        (None, {"free_tokens": 42}, 128 + 40),
        (None, {"decode": 0.0625}, 64),
        (Scales(compute=2.0), {}, 64),
        (Scales(dense=4.0), {}, 32),
        # as long again as a step that takes a quarter itself, but no more than half of what is left of the promise
        (None, {"decode": 0.125}, 128), (None, {"decode": 0.25}, 128), (None, {"decode": 0.375}, 64),
        (None, {"decode": 0.5}, 16), (None, {"decode": 0.5, "free_tokens": 19}, 17),
    ],
)  # fmt: skip
def test_tokens_that_the_tightest_gap_pays_for(scales, figures, tokens):
    """The essay takes 1.76 s of products, or more, of 1.3 times as much: half of that is not enough."""
    scales = scales or Scales()
    first_s = 1.3 * 1800 / 1024 * scales.compute * scales.dense
    state = make_state(4000, tokens=2048)
    run(state, "loose", 7, slo=PATIENT)
    run(state, "tight", 7, slo=Slo(1.0, 0.5))
    wait(state, "essay", 1800, arrival_s=0.04, slo=Slo(first_s, 60.0))
    assert decide(state, 0.05, model=toy(scales, **figures))[-1] == f"run essay {tokens} kv ADMITTED_KV"


@pytest.mark.parametrize(("gap_s", "stall_s", "tokens"), [(0.5, 4.0, 128), (4.0, 0.5, 128), (4.0, 0.25, 64)])
def test_a_stall_limit_below_the_gap_limit_is_the_tighter_promise(gap_s, stall_s, tokens):
    """No gap may be longer than it, so a quarter of it is what an iteration may last."""
    state = make_state(4000, tokens=2048)
    run(state, "tight", 7, slo=Slo(60.0, gap_s, stall_s))
    wait(state, "essay", 1800, arrival_s=0.04, slo=Slo(1.3 * 1800 / 1024, 60.0))
    assert decide(state, 0.05, model=toy())[-1] == f"run essay {tokens} kv ADMITTED_KV"


@pytest.mark.parametrize(("watched", "expected"), [(False, 1800), (True, 16)])
def test_prompts_come_first_while_nobody_waits_for_the_next_token(watched, expected):
    """Offline work: few decodes would read the weights as often as many. Behind somebody who waits it is paced."""
    state = make_state(4000, tokens=2048)
    run(state, "batch", 7, slo=OFFLINE_SLO)
    if watched:
        run(state, "chat", 7, slo=Slo(1.0, 1.0))
    wait(state, "essay", 1800, arrival_s=0.04, slo=OFFLINE_SLO)
    assert decide(state, 0.05, model=toy())[-1] == f"run essay {expected} kv ADMITTED_KV"


def test_a_prompt_alone_has_a_quarter_of_the_first_token_s_promise_whatever_its_gaps():
    """A quarter of 4 s, and 0.5 s is what an iteration takes anyway."""
    state = make_state(4000, tokens=2048)
    wait(state, "essay", 1800, arrival_s=0.04, slo=Slo(4.0, 0.001))
    assert decide(state, 0.05, model=toy()) == ["run essay 512 kv ADMITTED_KV"]
    assert decide(state, 0.05, model=toy(free_tokens=100)) == ["run essay 612 kv ADMITTED_KV"]
    assert decide(state, 0.05, "apt:prediction=off:paced=off", toy()) == ["run essay 1800 kv ADMITTED_KV"]


@pytest.mark.parametrize("model", [toy(), None])
def test_one_token_is_for_the_decode(model):
    state = make_state(tokens=1)
    run(state, "talker", 7)
    run(state, "half", 10, computed=1, arrival_s=-30.0)  # in the lane
    assert decide(state, 0.5, model=model) == ["run talker 1 kv DECODES"]


def test_a_prompt_under_way_uses_the_tokens_up():
    """7 tokens: 1 decodes, 6 finish a prompt; one more reaches the newcomer."""
    for tokens, last in ((7, "wait new WAITS_FOR_BLOCKS"), (8, "run new 1 kv ADMITTED_KV")):
        state = make_state(64, tokens=tokens)
        run(state, "talker", 7)
        run(state, "half", 10, computed=4)
        wait(state, "new", 8, arrival_s=0.2)
        assert decide(state, 0.5) == ["run talker 1 kv DECODES", "run half 6 kv CONTINUES_PREFILL", last]


def test_only_the_last_admission_is_not_reached():
    state = make_state(64, tokens=10)
    for k, name in enumerate("abcd"):
        wait(state, name, 4, arrival_s=k / 16)
    assert decide(state, 0.5) == [
        "run a 4 kv ADMITTED_KV", "run b 4 kv ADMITTED_KV", "run c 2 kv ADMITTED_KV", "wait d WAITS_FOR_BLOCKS",
    ]  # fmt: skip


# -- together or in turns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("both", "options", "plan"),
    [
        (0.75, "apt:prediction=off", ["run talker 1 kv DECODES", "run new 4 kv ADMITTED_KV"]),
        (0.76, "apt:prediction=off", ["run talker 1 kv DECODES", "wait new WAITS_FOR_DECODE"]),
        (0.75, TURNS, ["run talker 1 kv DECODES", "wait new WAITS_FOR_DECODE"]),
    ],
)
def test_together_if_that_takes_no_longer(both, options, plan):
    """A prompt takes 0.5 s and a decode 0.25 s."""
    state = make_state(64)
    run(state, "talker", 7, slo=PATIENT)
    wait(state, "new", 4, arrival_s=0.4)
    assert decide(state, 0.5, options, toy(both=both, decode=0.25)) == plan


def test_without_a_cost_model_they_take_turns():
    state = make_state(64)
    run(state, "talker", 7, slo=PATIENT)
    wait(state, "new", 4, arrival_s=0.4)
    assert decide(state, 0.5, model=None) == ["run talker 1 kv DECODES", "wait new WAITS_FOR_DECODE"]


@pytest.mark.parametrize(
    ("limit", "free", "tokens"),
    # 4 of the newcomer and 6 of a prompt under way, within the limit and what is free beside two decodes
    [(64, 99, 10), (64, 12, 10), (64, 8, 6), (9, 99, 7), (3, 99, 1), (2, 99, 1), (64, 0, 1)],
)
def test_what_the_cost_model_is_asked_about(limit, free, tokens):
    state, model = make_state(64, tokens=limit), toy(free_tokens=free)
    run(state, "a", 7, slo=PATIENT)
    run(state, "b", 7, slo=PATIENT)
    run(state, "half", 10, computed=4)
    wait(state, "new", 4, arrival_s=0.4)
    decide(state, 0.5, model=model)
    wanted = {
        StepLoad(tokens, samples=1), StepLoad(decode_requests=2, samples=2),
        StepLoad(tokens, decode_requests=2, samples=3),
    }  # fmt: skip
    assert {load for load in type(model).asked if load.samples} == wanted


def turns(state, now=0.5):
    return decide(state, now, TURNS)


def test_what_the_iteration_itself_takes_counts_on_both_sides():
    """A millisecond each: 0.501 s against 0.4995."""
    state = make_state(64)
    run(state, "talker", 7)
    wait(state, "new", 4, arrival_s=0.0015)
    assert turns(state) == ["run talker 1 kv DECODES", "wait new WAITS_FOR_DECODE"]


def test_prompts_under_way_have_their_turn_without_a_newcomer():
    state = make_state(64)
    run(state, "talker", 7)
    run(state, "half", 10, computed=4, arrival_s=-0.4)
    assert turns(state) == ["run half 6 kv CONTINUES_PREFILL", "wait talker WAITS_FOR_PREFILL"]


def test_a_late_decode_s_time_does_not_count():
    state = make_state(64)
    run(state, "gone", 7, arrival_s=-5.0)
    wait(state, "new", 4, arrival_s=0.4)
    assert turns(state) == ["run new 4 kv ADMITTED_KV", "wait gone WAITS_FOR_PREFILL"]


def test_a_late_prompt_s_time_does_not_count():
    state = make_state(64)
    run(state, "talker", 7)
    run(state, "half", 10, computed=4, arrival_s=-5.0)
    assert turns(state) == ["run talker 1 kv DECODES"]


def test_a_prompt_that_does_not_fit_leaves_its_turn_to_the_decodes():
    state = make_state(20)
    run(state, "talker", 7, slo=PATIENT)
    wait(state, "new", 40, arrival_s=-0.4)
    assert turns(state) == ["run talker 1 kv DECODES", "wait new WAITS_FOR_DECODE"]


def test_those_of_the_lane_run_in_every_turn():
    state = make_state(64)
    run(state, "old", 7, arrival_s=-30.0)
    run(state, "talker", 7)
    wait(state, "new", 4, arrival_s=-0.4)
    assert turns(state) == ["run old 1 kv DECODES", "run new 4 kv ADMITTED_KV"]
    state = make_state(64)
    run(state, "talker", 7)
    run(state, "old", 10, computed=4, arrival_s=-30.0)
    run(state, "half", 10, computed=4, arrival_s=0.4)
    wait(state, "new", 4, arrival_s=0.4)
    assert turns(state) == [
        "run talker 1 kv DECODES", "run old 6 kv CONTINUES_PREFILL", "wait new WAITS_FOR_DECODE",
    ]  # fmt: skip
    state = make_state(64)
    run(state, "talker", 7)
    wait(state, "old", 10, arrival_s=-30.0)
    wait(state, "new", 4, arrival_s=0.4)
    assert turns(state) == [
        "run talker 1 kv DECODES", "run old 10 kv ADMITTED_LONGEST_LATE", "wait new WAITS_FOR_BLOCKS",
    ]  # fmt: skip


def test_where_nobody_decodes_prompts_have_the_turn():
    """Its time does not count, but nobody else wants the iteration."""
    state = make_state(64)
    wait(state, "late", 4, arrival_s=-5.0)
    assert turns(state) == ["run late 4 kv ADMITTED_LATE"]


# -- who has to go -------------------------------------------------------------------------------------------------


def test_the_seat_of_one_evicted_for_growth_goes_to_a_newcomer():
    state = make_state(11, max_num_seqs=2)
    run(state, "patient", 8, slo=PATIENT)
    run(state, "urgent", 8)
    wait(state, "new", 8, arrival_s=0.4)
    assert decide(state, 0.5) == [
        "preempt patient PREEMPTED_LEAST_VALUE", "run urgent 1 kv DECODES", "run new 8 kv ADMITTED_KV",
    ]  # fmt: skip


def test_what_the_lane_s_victim_leaves_over_goes_to_a_newcomer():
    """6 blocks free and 6 of `fine`: 8 for `old`, 4 for `new`; and one of two seats."""
    state = make_state(12, max_num_seqs=2)
    run(state, "fine", 11, slo=PATIENT)
    wait(state, "old", 16, arrival_s=-30.0)
    wait(state, "new", 8, arrival_s=0.4)
    assert decide(state, 0.5) == [
        "preempt fine PREEMPTED_FOR_LONGEST_LATE", "run old 16 kv ADMITTED_LONGEST_LATE", "run new 8 kv ADMITTED_KV",
    ]  # fmt: skip


def test_the_lane_evicts_until_both_a_seat_and_the_blocks_are_there():
    """12 blocks for `old`: 2 are free and 6 of each; one seat is free, or none."""
    for seats in (2, 3):
        state = make_state(14, max_num_seqs=seats)
        run(state, "a", 11, slo=PATIENT)
        run(state, "b", 11, slo=PATIENT)
        wait(state, "old", 24, arrival_s=-30.0)
        assert [line.split()[0] for line in decide(state, 0.5)] == ["preempt", "preempt", "run"]


def test_the_lane_evicts_one_that_gives_enough_or_the_one_with_most_time():
    """`large` alone gives the 16 blocks. Either gives a hidden one: `two` may stall for 2 s, `one` for 1 s."""
    state = make_state(20)
    run(state, "small", 3, slo=PATIENT)
    run(state, "large", 31, slo=PATIENT)
    wait(state, "old", 32, arrival_s=-30.0)
    assert decide(state, 0.5)[0] == "preempt large PREEMPTED_FOR_LONGEST_LATE"
    state = make_state(3, mode="hidden")
    run(state, "one", 3, kind=CacheKind.HIDDEN, slo=Slo(1.0, 1.0))
    run(state, "two", 7, kind=CacheKind.HIDDEN, slo=Slo(1.0, 0.75, 2.0))
    wait(state, "old", 4, arrival_s=-30.0)
    assert decide(state, 0.5)[0] == "preempt two PREEMPTED_FOR_LONGEST_LATE"


# -- conversions ---------------------------------------------------------------------------------------------------


def test_a_hidden_cache_as_fast_as_kv_is_converted():
    for hidden_s, converts in ((1 / 1024, True), (1 / 1024 - 1e-9, False)):
        state = make_state(32, mode="hybrid")
        run(state, "hidden", 7, kind=CacheKind.HIDDEN)
        plan = decide(state, 0.5, model=toy(attention_s=(1 / 1024, hidden_s)))
        assert ("convert hidden CONVERTED_MEMORY_FREE" in plan) is converts


@pytest.mark.parametrize(("blocks", "converted"), [(12, ""), (13, "a"), (14, "a"), (16, "ab")])
def test_conversions_share_the_room(blocks, converted):
    """4 blocks held, a quarter in reserve and 4 for growth; 2 for each."""
    state = make_state(blocks, mode="hybrid")
    for name in "ab":
        run(state, name, 7, kind=CacheKind.HIDDEN)
    plan = decide(state, 0.5, model=toy())
    assert [line.split()[1] for line in plan if line.startswith("convert")] == [*converted]
