"""What a plan and a token change: queues and their order, blocks, counts and times, each figure worked out by hand."""

import re

import pytest

from apt_jax.cache import CacheKind, OutOfBlocks
from apt_jax.request import FinishReason, Request, SamplingParams, Slo, Status
from apt_jax.scheduling.plan import Abandoned, Converted, Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.scheduling.plan_log import SEVERAL, PlanLog, summary
from apt_jax.scheduling.state import Limits
from tests.support.scheduling_loop import make_state, request
from tests.support.tiny_states import generate, run, wait

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN


def preempt(state, *requests):
    state.apply(Plan(preempted=tuple(Preempted(r, Reason.PREEMPTED_NO_BLOCKS) for r in requests)), 0.0)


def admit(state, waiting, now=0.0, kind=KV):
    return state.apply(Plan((Scheduled(waiting, waiting.num_uncomputed_tokens, kind, Reason.ADMITTED_KV),)), now)


def names(queue):
    return [r.request_id for r in queue]


def test_limits_where_nothing_is_said():
    assert Limits(3, 9) == Limits(3, 9, "hybrid", 0)
    assert Limits(3, 9).kinds == (KV, HIDDEN)
    assert (Limits(3, 9, "kv").kinds, Limits(3, 9, "hidden").kinds) == ((KV,), (HIDDEN,))


@pytest.mark.parametrize(
    ("mode", "tokens", "fits"),
    [("kv", 8, True), ("kv", 9, False), ("hidden", 20, True), ("hidden", 21, False), ("hybrid", 20, True),
     ("hybrid", 21, False)],
)  # fmt: skip
def test_what_fits_in_five_blocks_of_four_alone(mode, tokens, fits):
    assert make_state(5, mode=mode).fits_alone(tokens) is fits


def test_blocks_that_a_request_needs_and_lacks():
    state = make_state(40, mode="hybrid")
    waiting = wait(state, "w", 5)
    assert [state.blocks_needed(waiting, kind) for kind in (KV, HIDDEN)] == [4, 2]
    assert [state.blocks_needed(waiting, KV, extra) for extra in (3, 4, 7, 8)] == [4, 6, 6, 8]
    kv, hidden = run(state, "k", 4), run(state, "h", 4, kind=HIDDEN)
    assert (state.blocks_to_grow(kv), state.blocks_to_grow(hidden)) == (2, 1)  # the fifth token begins a page
    generate(state, kv, 3)
    assert state.blocks_to_grow(kv) == 0  # eight tokens in two pages
    generate(state, kv, 1)
    assert state.blocks_to_grow(kv) == 2
    assert state.blocks_by_kind() == {"kv": 4, "hidden": 1, "free": 35}
    second = run(state, "k2", 9)
    assert state.blocks_by_kind() == {"kv": 10, "hidden": 1, "free": 29} and second.table.num_pages == 3


def test_a_growing_request_takes_blocks_only_at_the_edge_of_a_page():
    state = make_state(40)
    running = run(state, "a", 4)
    held = []
    for _ in range(6):
        held.append(running.table.num_blocks)
        generate(state, running, 1)
    assert held == [2, 4, 4, 4, 4, 6]


def test_queues_stay_in_order_of_arrival_whatever_comes_and_goes():
    state = make_state(100)
    a, b, c, d = (wait(state, name) for name in "abcd")
    assert [r.order for r in (a, b, c, d)] == [0, 1, 2, 3] and state.num_unfinished == 4
    for waiting in (c, a, d):
        admit(state, waiting)
    assert (names(state.running), names(state.waiting)) == (["a", "c", "d"], ["b"])
    preempt(state, d, a)
    assert (names(state.running), names(state.waiting)) == (["c"], ["a", "b", "d"])
    assert state.num_unfinished == 4
    state.finish(b, FinishReason.ABORT)
    state.finish(c, FinishReason.STOP)
    assert (names(state.running), names(state.waiting), state.num_unfinished) == ([], ["a", "d"], 2)
    assert (b.status, c.status, b.finish_reason, c.finish_reason) == (
        Status.FINISHED, Status.FINISHED, FinishReason.ABORT, FinishReason.STOP,
    )  # fmt: skip
    assert state.pool.num_free == 100 and wait(state, "e").order == 4


def test_a_preempted_request_keeps_its_tokens_and_times_and_loses_its_cache():
    state = make_state(100)
    running = wait(state, "a", 6)
    admit(state, running, now=2.0)
    generate(state, running, 3, prompt_done=True, now=3.0)
    before = (running.output_token_ids[:], running.gaps_s[:], running.first_token_s, running.last_token_s)
    preempt(state, running)
    assert (running.status, running.table, running.cache_kind) == (Status.WAITING, None, None)
    assert (running.num_computed_tokens, running.num_preemptions, running.num_uncomputed_tokens) == (0, 1, 9)
    assert not running.is_decoding and state.pool.num_free == 100
    (span,) = admit(state, running, now=5.0, kind=HIDDEN)
    assert (span.start, span.num_tokens, span.samples) == (0, 9, True)
    assert before == (running.output_token_ids, running.gaps_s, running.first_token_s, running.last_token_s)
    assert running.first_scheduled_s == 2.0, "when it was first scheduled, not when it came back"
    assert running.cache_history == [KV, HIDDEN] and running.table.num_blocks == 3


def test_a_conversion_counts_and_takes_a_block_for_each_page():
    state = make_state(20, mode="hybrid")
    running = run(state, "a", 9, kind=HIDDEN)
    entry = Scheduled(running, 1, KV, Reason.DECODES)
    state.apply(Plan((entry,), converted=(Converted(running, Reason.CONVERTED_MEMORY_FREE),)), 0.0)
    assert (running.num_conversions, running.cache_history, running.cache_kind) == (1, [HIDDEN, KV], KV)
    assert state.pool.num_free == 20 - 6 and running.num_preemptions == 0


def test_only_the_last_chunk_of_a_prompt_samples():
    state = make_state(40)
    waiting = wait(state, "a", 9)
    spans = []
    for tokens in (4, 4, 1):
        spans += state.apply(Plan((Scheduled(waiting, tokens, KV, Reason.CONTINUES_PREFILL),)), 0.0)
    assert [(s.start, s.num_tokens, s.samples) for s in spans] == [(0, 4, False), (4, 4, False), (8, 1, True)]
    assert (waiting.num_inflight_tokens, waiting.num_computed_tokens) == (1, 9)
    assert waiting.table.num_pages == 3, "the whole prompt's blocks are taken at once"


@pytest.mark.parametrize("tokens", [0, 6])
def test_a_plan_for_no_token_or_more_than_there_are_is_a_bug(tokens):
    state = make_state(40)
    with pytest.raises(AssertionError):
        state.apply(Plan((Scheduled(wait(state, "a", 5), tokens, KV, Reason.ADMITTED_KV),)), 0.0)


def test_gaps_longer_than_the_promise_are_counted_and_the_limit_is_kept():
    state = make_state(40)
    running = wait(state, "a", slo=Slo(1.0, 0.5, stall_s=0.75))
    admit(state, running)
    for now in (1.0, 1.5, 2.25, 2.5, 3.5):  # gaps of 0.5, 0.75, 0.25 and 1.0
        generate(state, running, 1, prompt_done=now == 1.0, now=now)
    assert running.gaps_s == [0.5, 0.75, 0.25, 1.0] and running.num_late_gaps == 2
    assert (running.longest_gap_s, running.num_stalls) == (1.0, 1)
    assert (running.first_token_s, running.last_token_s, running.ttft_s) == (1.0, 3.5, 1.0)
    assert running.pending_s(4.0) == 0.5


@pytest.mark.parametrize(
    ("params", "limit", "tokens", "reason", "stop_reason"),
    [
        ({"min_tokens": 1}, 9, [2], FinishReason.STOP, None),
        ({"min_tokens": 2}, 9, [2, 2], FinishReason.STOP, None),
        ({"min_tokens": 2}, 2, [7, 5], FinishReason.LENGTH, None),
        ({"stop_token_ids": [2]}, 9, [2], FinishReason.STOP, 2),  # told as a stop token, not as the end of text
        ({"stop_token_ids": [2], "ignore_eos": True}, 9, [5, 2], FinishReason.STOP, 2),
        ({}, 1, [5], FinishReason.LENGTH, None),
        ({}, 3, [5, 5, 5], FinishReason.LENGTH, None),
        ({}, 3, [5, 5, 2], FinishReason.STOP, None),  # at the last token both would end it
    ],
)
def test_the_token_that_ends_a_request_and_why(params, limit, tokens, reason, stop_reason):
    state = make_state(40)
    params = SamplingParams(**{"max_tokens": None, "stop_token_ids": [7], **params})
    added = Request("a", range(4), params, 0.0, limit, frozenset({2, 3}))
    state.add(added)
    admit(state, added)
    found = []
    for token in tokens:
        found.append(state.commit(added, token, 1.0))
        if found[-1] is None:
            state.apply(Plan((Scheduled(added, 1, KV, Reason.DECODES),)), 1.0)
    assert found == [None] * (len(tokens) - 1) + [reason] and added.stop_reason == stop_reason
    assert added.output_token_ids == tokens and added.num_inflight_tokens == 0


def test_a_request_with_all_its_tokens_in_flight_is_exhausted_and_planning_another_is_a_bug():
    state = make_state(40)
    running = run(state, "a", output=2)
    assert not running.is_exhausted
    state.apply(Plan((Scheduled(running, 1, KV, Reason.DECODES),)), 0.0)
    assert running.is_exhausted and running.num_generated_tokens == 2 and running.num_tokens == 6
    with pytest.raises(AssertionError, match="has all its 2 tokens"):
        state.apply(Plan((Scheduled(running, 1, KV, Reason.DECODES),)), 0.0)


@pytest.mark.parametrize(
    ("ttft_s", "gaps_s", "attained"),
    [
        (1.0, [], True), (1.0, [0.5] * 9, True), (1.001, [], False), (0.5, [0.501], False),
        (0.5, [0.1] * 99 + [9.0], True), (0.5, [0.1] * 98 + [9.0], False), (0.5, [0.1] * 198 + [9.0] * 2, True),
        (0.5, [0.1] * 197 + [9.0] * 2, False), (0.5, [0.1] * 198 + [9.0] * 3, False),
    ],
)  # fmt: skip
def test_a_promise_of_1_and_half_a_second_is_kept_at_its_limits(ttft_s, gaps_s, attained):
    done = request(slo=Slo(1.0, 0.5), arrival_s=3.0)
    done.finish_reason, done.first_token_s, done.gaps_s = FinishReason.STOP, 3.0 + ttft_s, gaps_s
    assert done.attained is attained


def test_the_promise_is_a_second_each_where_nothing_is_said():
    assert Slo() == Slo(ttft_s=1.0, tbt_s=1.0, stall_s=None) and Slo().stall_limit_s == 1.0


@pytest.mark.parametrize(
    ("slo", "limit_s"),
    [
        (Slo(0.5, 0.05), 0.5), (Slo(30.0, 0.05), 1.0), (Slo(0.5, 0.75), 0.75), (Slo(30.0, 5.0), 5.0),
        (Slo(30.0, 5.0, stall_s=0.25), 0.25), (Slo(0.5, 0.05, 60.0), 60.0),
    ],
)  # fmt: skip
def test_the_longest_gap_that_the_strict_reading_allows(slo, limit_s):
    assert slo.stall_limit_s == limit_s
    gaps_s = [0.01] * 200 + [limit_s]
    assert slo.is_kept_strictly(slo.ttft_s, gaps_s) and not slo.is_kept_strictly(slo.ttft_s + 0.001, gaps_s)
    assert slo.is_kept_strictly(0.0, [])
    gaps_s[50] = limit_s + 0.001
    assert slo.is_kept(slo.ttft_s, gaps_s) and not slo.is_kept_strictly(slo.ttft_s, gaps_s)


def test_a_stall_limit_above_the_gap_promise_does_not_loosen_it():
    slo = Slo(1.0, 0.5, stall_s=2.0)
    assert slo.is_kept_strictly(1.0, [0.1] * 99 + [2.0]) and not slo.is_kept_strictly(1.0, [0.1] * 98 + [2.0])


@pytest.mark.parametrize("reason", FinishReason)
def test_only_what_ended_by_itself_attains(reason):
    done = request(slo=Slo(1.0, 0.5))
    done.finish_reason, done.first_token_s, done.gaps_s = reason, 1.0, [0.1] * 100
    by_itself = reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert (done.attained, done.attained_strictly) == (by_itself, by_itself)
    done.gaps_s[3] = 60.0
    assert (done.attained, done.attained_strictly, done.longest_gap_s) == (by_itself, False, 60.0)


def test_an_abandoned_request_ends_before_the_rest_of_the_plan_and_its_blocks_serve_that():
    state = make_state(4)
    running, waiting, other = run(state, "a", 8), wait(state, "b", 5), wait(state, "c", 5)
    entry = Scheduled(waiting, 5, KV, Reason.ADMITTED_KV)
    given_up = tuple(Abandoned(r, Reason.ABANDONED_LATE) for r in (running, other))
    plan = Plan((entry,), abandoned=given_up)
    state.apply(plan, 2.0)  # its four blocks are all there are
    state.check()
    for request_ in (running, other):
        assert (request_.status, request_.finish_reason) == (Status.FINISHED, FinishReason.ABANDONED)
        assert request_.table is None and not request_.attained
    assert names(state.running) == ["b"] and not state.waiting and state.pool.num_free == 0
    assert [(action, r.request_id) for action, r, _ in plan.decisions()] == [
        ("abandoned", "a"), ("abandoned", "c"), ("scheduled", "b"),
    ]  # fmt: skip
    assert not Plan(abandoned=given_up).is_empty
    assert state.plans.as_dicts()[-1]["abandoned"] == [
        {"request": name, "reason": "abandoned because its SLO can no longer be kept"} for name in "ac"
    ]


def test_a_token_in_flight_of_an_abandoned_request_is_dropped():
    state = make_state(40)
    running = run(state, "a")
    (span,) = state.apply(Plan((Scheduled(running, 1, KV, Reason.DECODES),)), 0.0)
    state.apply(Plan(abandoned=(Abandoned(running, Reason.ABANDONED_LATE),)), 0.1)
    assert state.commit(span.request, 7, 0.2) is FinishReason.ABANDONED
    assert running.output_token_ids == [5] and running.num_inflight_tokens == 0


def test_the_plan_log_keeps_the_newest_64_and_their_numbers():
    log, plans = PlanLog(), [Plan(waited=(Waited((request(name=str(k)),), Reason.WAITS_LATE),)) for k in range(70)]
    for k, plan in enumerate(plans):
        log.record(plan, float(k))
    kept = log.as_dicts()
    assert log.num_recorded == 70 and [entry["number"] for entry in kept] == list(range(6, 70))
    assert kept[0]["now_s"] == 6.0 and kept[0]["waited"][0]["requests"] == ["6"]
    assert log.of_request("5") == [] and log.of_request("69")[0]["reason"] == Reason.WAITS_LATE.value


def test_what_is_said_of_several_requests_is_said_in_the_plural():
    """In the order in which it is applied, as `decisions`."""
    many = tuple(request(name=str(i)) for i in range(5))
    plan = Plan(
        tuple(Scheduled(r, 1, KV, Reason.DECODES) for r in many[:2]), (Preempted(many[2], Reason.PREEMPTED_LATE),),
        waited=(Waited(many[3:], Reason.WAITS_LATE), Waited(many[:1], Reason.WAITS_FOR_BLOCKS)),
    )  # fmt: skip
    assert summary(plan) == [
        "1 request preempted because it is past its SLO and others can still meet theirs",
        "2 requests decode their next token",
        "2 requests wait because they are past their SLO and were demoted",
        "1 request waits for free blocks",
    ]
    assert summary(Plan()) == []


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_says_nothing_of_one_where_there_are_several(reason):
    said = SEVERAL.get(reason, reason.value)
    one = {"its", "it", "waits", "decodes", "continues", "was", "has", "request"}
    of_others = r"this iteration (prefills|decodes)|memory was left over|the one that has waited longest past its SLO"
    assert not one & set(re.sub(of_others, "", said).split())


def test_a_plan_s_totals_and_decisions():
    a, b, c, d = (request(name=name) for name in "abcd")
    plan = Plan(
        (Scheduled(a, 3, KV, Reason.ADMITTED_KV), Scheduled(b, 1, HIDDEN, Reason.DECODES)),
        (Preempted(c, Reason.PREEMPTED_LATE),), (Converted(b, Reason.CONVERTED_MEMORY_FREE),),
        (Waited((d, c), Reason.WAITS_LATE),),
    )  # fmt: skip
    assert plan.num_tokens == 4 and not plan.is_empty
    assert [(action, r.request_id) for action, r, _ in plan.decisions()] == [
        ("preempted", "c"), ("converted", "b"), ("scheduled", "a"), ("scheduled", "b"),
        ("waited", "d"), ("waited", "c"),
    ]  # fmt: skip
    assert Plan(waited=plan.waited).is_empty and not Plan(preempted=plan.preempted).is_empty
    assert not Plan(converted=plan.converted).is_empty and not Plan(plan.scheduled).is_empty


def test_a_plan_past_the_pool_leaves_whom_it_would_admit_waiting_without_blocks():
    state = make_state(5)
    first, second = wait(state, "a", 8), wait(state, "b", 9)
    with pytest.raises(OutOfBlocks, match="6 blocks wanted, 1 of 5 free"):
        state.apply(Plan(tuple(Scheduled(r, r.num_tokens, KV, Reason.ADMITTED_KV) for r in (first, second))), 0.0)
    state.check()
    assert (names(state.running), names(state.waiting)) == (["a"], ["b"])
    state.finish(first, FinishReason.ERROR)
    admit(state, wait(state, "c", 4))
    state.finish(state.running[0], FinishReason.STOP)
    admit(state, second, kind=HIDDEN)
    assert (names(state.running), state.blocks_by_kind()) == (["b"], {"kv": 0, "hidden": 3, "free": 2})
