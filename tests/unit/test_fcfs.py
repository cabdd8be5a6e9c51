"""The fcfs policy: who runs, waits, is preempted and converted, and why; and that everything always finishes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_jax.cache import CacheKind
from apt_jax.request import Status
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from tests.support.host_loop import EOS, MODES, WORD, HostLoop, fits, make_request, make_state

PREFILL_REASONS = {
    Reason.CONTINUES_PREFILL,
    Reason.ADMITTED_KV,
    Reason.ADMITTED_HIDDEN,
    Reason.ADMITTED_HIDDEN_KV_DOES_NOT_FIT,
}


def loop_with(*requests, **sizes):
    """A loop over a state to which the requests have been added."""
    loop = HostLoop(make_state(**sizes))
    for request in requests:
        loop.state.add(request)
    return loop


def ran(plan):
    return [(entry.request, entry.num_tokens, entry.reason) for entry in plan.scheduled]


def waits(plan):
    return {request: group.reason for group in plan.waited for request in group.requests}


def test_a_new_prompt_goes_before_those_that_decode():
    old, new = make_request(4), make_request(6)
    loop = loop_with(old, num_blocks=100)
    assert ran(loop.step()) == [(old, 4, Reason.ADMITTED_KV)]
    assert ran(loop.step()) == [(old, 1, Reason.DECODES)]
    loop.state.add(new)
    plan = loop.step()
    assert ran(plan) == [(new, 6, Reason.ADMITTED_KV)]
    assert waits(plan) == {old: Reason.WAITS_FOR_PREFILL}
    assert ran(loop.step()) == [(old, 1, Reason.DECODES), (new, 1, Reason.DECODES)]


def test_prompts_go_in_order_of_arrival_and_are_cut_at_the_token_budget():
    first, second, third, fourth = requests = [make_request(10) for _ in range(4)]
    loop = loop_with(*requests, num_blocks=100, max_num_batched_tokens=16)
    plan = loop.step()
    assert ran(plan) == [(first, 10, Reason.ADMITTED_KV), (second, 6, Reason.ADMITTED_KV)]
    assert waits(plan) == {third: Reason.WAITS_FOR_TOKENS, fourth: Reason.WAITS_BEHIND}
    plan = loop.step()
    assert ran(plan) == [
        (second, 4, Reason.CONTINUES_PREFILL),
        (third, 10, Reason.ADMITTED_KV),
        (fourth, 2, Reason.ADMITTED_KV),
    ]
    assert waits(plan) == {first: Reason.WAITS_FOR_PREFILL}
    assert [len(r.output_token_ids) for r in requests] == [1, 1, 1, 0], "a token comes only after the whole prompt"


def test_a_prompt_longer_than_the_budget_takes_several_iterations():
    loop = loop_with(make_request(50), num_blocks=100, max_num_batched_tokens=16)
    assert [loop.step().num_tokens for _ in range(5)] == [16, 16, 16, 2, 1]


def test_no_more_run_than_may():
    first, second, third, fourth = requests = [make_request(4) for _ in range(4)]
    loop = loop_with(*requests, num_blocks=100, max_num_seqs=2)
    plan = loop.step()
    assert [entry.request for entry in plan.scheduled] == [first, second]
    assert waits(plan) == {third: Reason.WAITS_FOR_SEQUENCES, fourth: Reason.WAITS_BEHIND}


def test_nobody_overtakes_a_prompt_that_does_not_fit():
    big, small = make_request(30), make_request(4)
    loop = loop_with(make_request(24), big, small, num_blocks=20, cache_mode="kv")
    plan = loop.step()
    assert len(plan.scheduled) == 1
    assert waits(plan) == {big: Reason.WAITS_FOR_BLOCKS, small: Reason.WAITS_BEHIND}


@pytest.mark.parametrize(("watermark", "admitted"), [(0, 2), (2, 2), (3, 1)])
def test_admission_leaves_the_watermark_free(watermark, admitted):
    # 2 pages each of 2 blocks leave 2 of 10
    loop = loop_with(make_request(8), make_request(8), num_blocks=10, cache_mode="kv", watermark_blocks=watermark)
    assert len(loop.step().scheduled) == admitted


def test_a_request_that_runs_alone_may_use_the_last_block():
    request = make_request(20)
    loop = loop_with(request, num_blocks=10, cache_mode="kv", watermark_blocks=4)
    assert ran(loop.step()) == [(request, 20, Reason.ADMITTED_KV)]
    assert loop.state.pool.num_free == 0


def test_the_latest_is_preempted_and_comes_back_before_later_ones():
    first, second = make_request(8), make_request(8)
    loop = loop_with(first, second, num_blocks=8, cache_mode="kv")
    assert len(loop.step().scheduled) == 2
    later = make_request(4)
    loop.state.add(later)
    plan = loop.step()
    assert [(entry.request, entry.reason) for entry in plan.preempted] == [(second, Reason.PREEMPTED_NO_BLOCKS)]
    assert ran(plan) == [(first, 1, Reason.DECODES)]
    assert waits(plan) == {later: Reason.WAITS_FOR_BLOCKS}
    assert (second.status, second.num_preemptions, second.num_computed_tokens) == (Status.WAITING, 1, 0)
    assert loop.state.waiting == [second, later]
    plans = loop.drain()
    again = next(entry for plan in plans for entry in plan.scheduled if entry.request is second)
    assert (again.num_tokens, again.reason) == (9, Reason.ADMITTED_KV), "its prompt and its token are computed again"
    assert [len(r.output_token_ids) for r in (first, second, later)] == [8, 8, 8]


def test_one_that_finds_no_victim_behind_it_is_preempted_itself():
    first, second = make_request(9, 3), make_request(8, 8)
    loop = loop_with(first, second, num_blocks=10, cache_mode="kv")
    loop.step()
    plan = loop.step()
    assert ran(plan) == [(first, 1, Reason.DECODES)]
    assert [entry.request for entry in plan.preempted] == [second]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("kv", [Reason.ADMITTED_KV]),
        ("hidden", [Reason.ADMITTED_HIDDEN, Reason.ADMITTED_HIDDEN]),
        ("hybrid", [Reason.ADMITTED_KV, Reason.ADMITTED_HIDDEN_KV_DOES_NOT_FIT]),
    ],
)
def test_cache_modes_when_only_one_fits_as_kv(mode, expected):
    loop = loop_with(make_request(16), make_request(16), num_blocks=12, cache_mode=mode)
    plan = loop.step()
    assert [entry.reason for entry in plan.scheduled] == expected
    for entry in plan.scheduled:
        assert (entry.kind is CacheKind.KV) == (entry.reason is Reason.ADMITTED_KV)
        assert entry.request.cache_kind is entry.kind
    if mode == "kv":
        assert list(waits(plan).values()) == [Reason.WAITS_FOR_BLOCKS]


def two_hidden(num_blocks, **sizes):
    """Two requests of four hidden pages each, whose next token starts a fifth."""
    early, late = requests = [make_request(16, 24) for _ in range(2)]
    loop = loop_with(*requests, num_blocks=num_blocks, max_num_seqs=2, **sizes)
    loop.run(Plan(tuple(Scheduled(r, 16, CacheKind.HIDDEN, Reason.ADMITTED_HIDDEN) for r in requests)))
    return loop, early, late


# 8 are held; as KV the older takes 6 more than now, the other grows by 1, and 2 for each of the two stay free
@pytest.mark.parametrize(
    ("num_blocks", "watermark", "converts"), [(19, 0, True), (18, 0, False), (19, 1, False), (20, 1, True)]
)
def test_the_oldest_hidden_request_becomes_kv_when_all_can_still_grow(num_blocks, watermark, converts):
    loop, early, late = two_hidden(num_blocks, watermark_blocks=watermark)
    plan = loop.step()
    assert ran(plan) == [(early, 1, Reason.DECODES), (late, 1, Reason.DECODES)]
    expected = [(early, Reason.CONVERTED_MEMORY_FREE)] if converts else []
    assert [(entry.request, entry.reason) for entry in plan.converted] == expected
    assert early.cache_history == [CacheKind.HIDDEN] + [CacheKind.KV] * converts
    assert late.cache_history == [CacheKind.HIDDEN]


def test_one_conversion_per_iteration_until_all_are_kv():
    loop, early, late = two_hidden(100)
    assert [[entry.request for entry in loop.step().converted] for _ in range(3)] == [[early], [late], []]
    loop.drain()
    assert len(early.output_token_ids) == len(late.output_token_ids) == 24


def test_nothing_is_converted_while_requests_wait_nor_in_hidden_mode():
    loop, *_ = two_hidden(100)
    loop.state.add(make_request(4))
    assert loop.step().converted == (), "memory belongs to those who wait"
    loop, *_ = two_hidden(100, cache_mode="hidden")
    assert loop.step().converted == ()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_whose_last_token_is_in_flight_does_not_run_again(depth):
    loop = HostLoop(make_state(100), depth=depth)
    request = make_request(4, 2)
    loop.state.add(request)
    plans = loop.drain()
    assert [plan.num_tokens for plan in plans if plan.scheduled] == [4, 1]
    assert len(request.output_token_ids) == 2


def test_policies_are_found_by_name():
    assert "fcfs" in policy_names()
    with pytest.raises(ValueError, match=r"unknown scheduling_policy='nope'; known: .*fcfs"):
        make_policy("nope")


def snapshot(state):
    """What a policy could change."""
    requests = [
        (r.order, r.status, r.num_computed_tokens, r.num_tokens, r.num_preemptions, r.num_conversions,
         r.table and (r.table.kind, *map(tuple, r.table.blocks)))
        for r in (*state.waiting, *state.running)
    ]  # fmt: skip
    return requests, len(state.waiting), state.pool.num_free


def check_plan(state, plan):
    """What every fcfs plan must keep, said from the outside; `state` is the one before it is applied."""
    limits, running, waiting = state.limits, list(state.running), list(state.waiting)
    entries = [entry.request for entry in plan.scheduled]
    preempted = [entry.request for entry in plan.preempted]
    converted = [entry.request for entry in plan.converted]
    waited = [request for group in plan.waited for request in group.requests]
    for group in (plan.scheduled, plan.preempted, plan.converted, plan.waited):
        assert all(isinstance(entry.reason, Reason) for entry in group)
    told = entries + preempted + waited
    assert len(told) == len(set(told)), "a request has two fates"
    silent = [r for r in running + waiting if r not in told]
    assert all(r.is_exhausted for r in silent), "a request without a reason"
    assert set(converted) <= set(entries)

    admitted = [r for r in entries if r.status is Status.WAITING]
    assert admitted == waiting[: len(admitted)], "not in order of arrival"
    assert len(running) - len(preempted) + len(admitted) <= limits.max_num_seqs
    assert sorted(preempted, key=lambda r: r.order) == running[len(running) - len(preempted) :], "not the latest"
    reasons = {entry.reason for entry in plan.scheduled}
    if reasons & PREFILL_REASONS:
        assert reasons <= PREFILL_REASONS and not preempted and not converted
        assert plan.num_tokens <= limits.max_num_batched_tokens
        cut = [e for e in plan.scheduled if e.num_tokens < e.request.num_uncomputed_tokens]
        assert len(cut) <= 1 and (not cut or plan.num_tokens == limits.max_num_batched_tokens)
        need = sum(state.blocks_needed(e.request, e.kind) for e in plan.scheduled if e.request in admitted)
        if admitted and (running or len(admitted) > 1):
            assert state.pool.num_free - need >= limits.watermark_blocks
    else:
        assert all(entry.num_tokens == 1 for entry in plan.scheduled)
    assert len(converted) <= (limits.cache_mode == "hybrid" and not waiting and not preempted)


arrivals = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=10)
sizes = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(6, 60),
        "block_size": st.sampled_from([1, 4, 8]),
        "max_num_seqs": st.integers(1, 5),
        "max_num_batched_tokens": st.integers(1, 40),
        "watermark_blocks": st.integers(0, 3),
        "cache_mode": st.sampled_from(MODES),
    }
)


@given(arrivals, sizes, st.integers(0, 1), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_every_plan_keeps_the_rules_and_everything_finishes(arrivals, sizes, depth, eos_every):
    sampled = 0

    def next_token(request):
        nonlocal sampled
        sampled += 1
        return EOS if sampled % (7 * eos_every) == 0 else WORD

    state = make_state(**sizes)
    loop = HostLoop(state, depth=depth, next_token=next_token)
    todo = sorted(((at, make_request(*lengths)) for at, *lengths in arrivals), key=lambda item: item[0])
    requests = [request for _, request in todo if fits(state, request)]
    todo = [item for item in todo if item[1] in requests]
    iterations = 0
    while todo or not loop.is_idle:
        while todo and todo[0][0] <= iterations:
            state.add(todo.pop(0)[1])
        before = snapshot(state)
        plan = loop.policy.schedule(state, loop.now)
        assert snapshot(state) == before, "schedule changed the state"
        assert plan == loop.policy.schedule(state, loop.now), "the same state gave another plan"
        check_plan(state, plan)
        loop.run(plan)
        state.check()
        iterations += 1
        assert iterations < 4000, "no progress"
    assert all(r.status is Status.FINISHED for r in requests)
    for r in requests:
        assert len(r.output_token_ids) == r.max_new_tokens or r.output_token_ids[-1] == EOS
    assert state.pool.num_free == state.pool.num_blocks
