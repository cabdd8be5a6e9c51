"""What `apt` knows before it decides - needs, expected blocks, values, lane - in figures worked out by hand.

Blocks are of 4 tokens, 2 a KV page. A request that `run` puts there has its last token at time 0.
"""

import math

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason, Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.policies.apt import policy
from apt_jax.scheduling.policies.apt.facts.forecast import HORIZONS, expected_blocks
from apt_jax.scheduling.policies.apt.facts.lateness import is_overdue
from apt_jax.scheduling.policies.apt.facts.ledger import Ledger
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.options import AptOptions, PaperOptions
from apt_jax.scheduling.policies.interface import PolicyContext
from tests.support.apt_plans import view_of
from tests.support.scheduling_loop import TINY, make_state
from tests.support.tiny_states import generate, run, wait

PATIENT = Slo(60.0, 60.0)


def three_of_each():
    """Running: a decode at a page's end, a prompt under way, a hidden decode. Two wait, one of them late."""
    state = make_state(64, mode="hybrid")
    run(state, "edge", 8, slo=PATIENT)  # 9 tokens, 2 pages held
    run(state, "half", 10, computed=5, slo=PATIENT)  # the pages of its whole prompt are held
    run(state, "hidden", 5, 2, kind=CacheKind.HIDDEN, arrival_s=-5.0)  # 7 tokens; its first was 5 s late
    wait(state, "new", 9, slo=Slo(2.0, 0.5), arrival_s=0.5)
    wait(state, "old", 1, arrival_s=-3.0)
    return state


# -- needs ---------------------------------------------------------------------------------------------------------


def test_pages_blocks_and_who_computes():
    view = view_of(three_of_each(), 1.0)
    assert view.pages_r.tolist() == [3, 3, 2] and view.pages_w.tolist() == [3, 1]
    assert view.held_r.tolist() == [4, 6, 2] and view.need_r.tolist() == [6, 6, 2]
    assert view.decodes_r.tolist() == [True, False, True] and view.prefills_r.tolist() == [False, True, False]
    assert view.running.uncomputed.tolist() == [1, 5, 1] and view.waiting.uncomputed.tolist() == [9, 1]
    assert view.running.generated.tolist() == [1, 0, 2] and view.block_size == 4


def test_a_prompt_of_which_one_token_is_left_is_no_decode():
    state = make_state()
    run(state, "half", 10, computed=9)
    view = view_of(state, 1.0)
    assert not view.decodes_r.any() and view.prefills_r.all()


def test_the_last_token_is_not_computed_for_one_more():
    """Its output is limited to 3: with the third one out or under way there is nothing to sample."""
    for generated, may in ((2, True), (3, False)):
        state = make_state()
        request = run(state, "a", 4, output=9)
        generate(state, request, generated - 1)
        request.max_new_tokens = 3
        assert view_of(state, 1.0).decodes_r.tolist() == [may]


@pytest.mark.parametrize(("mode", "is_hybrid", "least"), [("kv", False, 2), ("hidden", False, 1), ("hybrid", True, 1)])
def test_kinds(mode, is_hybrid, least):
    view = view_of(make_state(mode=mode), 0.0)
    assert (view.is_hybrid, view.least_blocks_per_page) == (is_hybrid, least)


def test_seconds_of_the_decodes():
    """As many as decode, and their context by kind: 9 + 9 tokens as KV, 7 as hidden."""
    told = []

    class Told(CostModel):
        def step_s(self, load):
            told.append((load.decode_requests, load.context_tokens, load.prefill_tokens))
            return 0.25

    state = three_of_each()
    run(state, "other", 8)
    view = view_of(state, 1.0, model=Told(MODELS["opt-125m"], HARDWARE["h200"]))
    assert view.decode_s(np.array([0, 2, 3])) == 0.25 and told == [(3, (18, 7), 0)]


# -- lateness and the count of those that matter -------------------------------------------------------------------


def test_requests_in_time_are_counted_and_at_least_one():
    view = view_of(three_of_each(), 1.0, prediction=False)
    assert view.late_w.tolist() == [False, True] and view.late_r.tolist() == [False, False, True]
    assert view.num_counted == 3
    state = make_state()
    wait(state, "old", 4, arrival_s=-3.0)
    assert view_of(state, 1.0).num_counted == 1
    assert view_of(three_of_each(), 1.0, fallback="none").num_counted == 5


def test_the_constant_fallback_forgets_a_missed_first_token_unless_lengths_are_predicted():
    options = {"fallback": "constant", "prediction": False}
    assert view_of(three_of_each(), 1.0, **options).late_r.tolist() == [False, False, False]
    assert view_of(three_of_each(), 1.5, **options).late_r.tolist() == [False, False, True], "its gap is 1.5 s now"
    assert view_of(three_of_each(), 1.0, fallback="constant").late_r.tolist() == [False, False, True]
    assert view_of(three_of_each(), 1.0, prediction=False).late_r.tolist() == [False, False, True]


def test_a_gap_as_long_as_the_slo_is_in_time():
    state = make_state()
    for name, slo_s in (("a", 0.5), ("b", 0.499), ("c", 0.501)):
        run(state, name, 4, slo=Slo(1.0, slo_s))
        wait(state, name.upper(), 4, slo=Slo(slo_s, 9.0))
    view = view_of(state, 0.5)
    assert is_overdue(view.running, np.full(3, 0.5)).tolist() == [False, True, False]
    assert is_overdue(view.waiting, np.full(3, 0.5)).tolist() == [False, True, False]


def test_predicted_tokens_forgive_a_late_gap():
    """It has generated 2 and its gap is too long; with 100 to come there will be 101 gaps."""
    for remaining, late in ((98.0, True), (99.0, False)):
        state = make_state()
        run(state, "a", 4, 2, slo=Slo(1.0, 0.5))
        assert view_of(state, 0.75, remaining=remaining).late_r.tolist() == [late]
        assert view_of(state, 0.75, remaining=remaining, prediction=False).late_r.tolist() == [True]


# -- values --------------------------------------------------------------------------------------------------------


def valued():
    """Waiting for 1.5 of 2 s; last token 2 s ago, of 60 s; late: waits for 5 s of 1 s."""
    state = make_state(mode="hybrid")
    run(state, "running", 8, slo=PATIENT)
    wait(state, "new", 9, slo=Slo(2.0, 0.5), arrival_s=0.5)
    wait(state, "old", 4, arrival_s=-3.0)
    return state


@pytest.mark.parametrize(
    ("value", "running", "new", "old"),
    [
        ("pending", 2.25 / 60, 1.75 / 2, 5.25),
        ("absolute", 2.25, 1.75, 5.25),
        ("slack", 1 / 57.75, 1 / 0.25, 1 / 0.01),  # never less than a hundredth of a second
        ("longest", 3 * 2.25 / 60, 3 * 1.75 / 2, 1 * 5.25),
        # context / (mean context of what is to come x its length): 9, 9 and 4 tokens now, 100 to come
        ("footprint", 2.25 / 60 * 9 / (59 * 100), 1.75 / 2 * 9 / (59 * 100), 5.25 * 4 / (54 * 100)),
    ],
)
def test_values(value, running, new, old):
    """An iteration of 0.25 s is added to what has passed; a late one's value is a ten-thousandth."""
    view = view_of(valued(), 2.0, value=value, tick_s=0.25, remaining=100.0)
    assert view.values_r.tolist() == pytest.approx([running])
    assert view.values_w.tolist() == pytest.approx([new, old * 1e-4])
    if value == "footprint":  # without a prediction it is what is pending
        view = view_of(valued(), 2.0, value=value, tick_s=0.25, prediction=False)
        assert view.values_w.tolist() == pytest.approx([1.75 / 2, 5.25e-4])


def test_the_last_iteration_says_how_long_the_next_will_take(monkeypatch):
    """Between a thousandth and a quarter of a second; nothing is known of the first."""
    ticks_s = []
    monkeypatch.setattr(policy, "View", lambda *args: ticks_s.append(args[-1]) or View(*args))
    state, apt = make_state(), policy.Apt()
    wait(state, "a", 4, arrival_s=9.0)
    for now in (10.0, 10.0001, 10.1001, 15.0):
        apt.schedule(state, now)
    assert ticks_s == pytest.approx([0.001, 0.001, 0.1, 0.25])


def test_a_request_that_ended_teaches_its_length_and_the_device_is_measured_at_start_up():
    state, context = make_state(), PolicyContext()
    ended = run(state, "a", 4, 3)
    state.finish(ended, FinishReason.STOP)
    policy.Apt(context).finished(ended, 1.0)
    assert context.predictor.num_finished == 1
    assert policy.Apt.uses_cost_model and policy.AptPaper.uses_cost_model


# -- expected blocks -----------------------------------------------------------------------------------------------


def test_expected_blocks_at_every_horizon():
    """10 tokens are 3 pages now; after h more, (10 + h) / 4 and half a page, if it still runs: exp(-h / 64)."""
    assert HORIZONS.tolist() == [0, 16, 32, 64, 128, 256, 512]
    found = expected_blocks(np.array([10, 8]), np.array([2, 1]), np.array([64.0, 1e-3]), 4)
    pages = [3, 7, 11, 19, 35, 67, 131]
    assert found[0].tolist() == pytest.approx([2 * p * math.exp(-h / 64) for p, h in zip(pages, HORIZONS, strict=True)])
    assert found[1].tolist() == [2.0, 0, 0, 0, 0, 0, 0]


def test_expected_blocks_of_both_queues():
    view = view_of(three_of_each(), 1.0, remaining=1e-3)
    assert view.expected_r(np.array([0, 2]))[:, 0].tolist() == [6.0, 2.0]
    assert view.expected_w(np.array([0, 1]), np.array([2, 1]))[:, 0].tolist() == [6.0, 1.0]


# -- the lane ------------------------------------------------------------------------------------------------------


def lanes(state, now, **options):
    view = view_of(state, now, **options)
    return [r.request_id for r, there in zip(view.waiting.requests, view.lane_w, strict=True) if there], [
        r.request_id for r, there in zip(view.running.requests, view.lane_r, strict=True) if there
    ]


def test_the_lane_holds_the_oldest_of_both_queues_up_to_its_share():
    """Blocks in the smallest kind: 2, 2 (KV, it runs), 1 and 1 of the share. There are seats enough."""
    state = make_state(60, mode="hybrid", max_num_seqs=400)
    wait(state, "w1", 8, arrival_s=-40.0)
    run(state, "r1", 3, arrival_s=-40.0)
    wait(state, "w2", 4, arrival_s=-40.0)
    run(state, "fine", 3, slo=Slo(1e3, 1e3), arrival_s=-40.0)  # not late
    wait(state, "w3", 4, arrival_s=-40.0)
    found = [lanes(state, 1.0, lane_share=share / 60) for share in (0, 2.5, 4.5, 5.5, 6.5)]
    assert found == [
        (["w1"], []), (["w1"], []), (["w1"], ["r1"]), (["w1", "w2"], ["r1"]), (["w1", "w2", "w3"], ["r1"]),
    ]  # fmt: skip
    assert lanes(state, 1.0, lane_share=1.0, fallback="constant") == ([], [])


def test_the_lane_begins_after_its_patience():
    state = make_state(60)
    wait(state, "w", 8, arrival_s=-4.0)
    run(state, "r", 3, arrival_s=-4.0)
    assert lanes(state, 1.0, patience_s=5.0, lane_share=1.0) == ([], [])
    assert lanes(state, 1.0, patience_s=4.9, lane_share=1.0) == (["w"], ["r"])


def test_the_first_running_one_of_the_lane_may_exceed_its_share():
    state = make_state(60)
    run(state, "r1", 20, arrival_s=-40.0)
    run(state, "r2", 3, arrival_s=-40.0)
    wait(state, "w", 3, arrival_s=-40.0)
    assert lanes(state, 1.0, lane_share=0.01) == ([], ["r1"])


def test_the_lane_has_a_share_of_the_seats_too():
    """10% of 99 are 9; at least one."""
    state = make_state(4000, max_num_seqs=99)
    for k in range(20):
        run(state, f"r{k}", 3, arrival_s=-40.0)
        wait(state, f"w{k}", 3, arrival_s=-40.0)
    assert [len(names) for names in lanes(state, 1.0, lane_share=0.1)] == [4, 5]
    assert [len(names) for names in lanes(state, 1.0, lane_share=0.0)] == [0, 1]


def test_who_has_entered_the_lane_stays_in_it():
    """Its share has room for one of 2 blocks. An older one that becomes late waits until the younger one has ended."""
    state, ledger = make_state(40), Ledger()
    wait(state, "older", 3, arrival_s=-40.0, slo=Slo(60.0, 60.0))
    younger = run(state, "younger", 3, arrival_s=-39.0)
    options = AptOptions(prediction=False, lane_share=0.05)
    ledger.update(state)
    ledger.enter_lane([younger])
    view = View(PolicyContext(TINY), options, state, *ledger.update(state), 50.0, 0.0)
    assert (view.lane_w.tolist(), view.lane_r.tolist()) == ([False], [True])
    assert view.late_w.tolist() == [True]


# -- options -------------------------------------------------------------------------------------------------------


def test_defaults_of_both():
    assert AptOptions() == AptOptions(
        value="pending", fallback="aging", mixed=True, prediction=True, convert=True, sustained=True, margin=1.0,
        late_margin=2.0, readmit_first=True, paced=True, fit_victims=True, priorities=True, patience_s=20.0,
        lane_share=0.05,
    )  # fmt: skip
    assert PaperOptions() == PaperOptions(
        value="absolute", fallback="constant", mixed=False, prediction=False, convert=False, sustained=False,
        readmit_first=False, paced=False, fit_victims=False, priorities=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("patience_s", (0.0,), (-0.1, math.inf)),
        ("lane_share", (0, 1), (-0.1, 1.1)),
        ("margin", (0, 9.0), (-0.1, math.inf)),
        ("late_margin", (0, 9.0), (-0.1, math.inf)),
    ],
)
def test_ranges_of_options(name, good, bad):
    for value in good:
        assert getattr(AptOptions(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError, match=name):
            AptOptions(**{name: value})
