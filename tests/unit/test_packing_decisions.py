"""Who is admitted, cut, preempted and converted by the building blocks of simple policies. Pages hold 4 tokens."""

import pytest

from apt_jax.cache import CacheKind
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.packing import plan_prefill
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import generate, lines, run, wait

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN


def fcfs(state):
    return lines(make_policy("fcfs").schedule(state, 0.0))


def test_prompts_fill_the_budget_and_the_rest_waits_for_what_is_short():
    state = make_state(100, tokens=16)
    for name, prompt in (("a", 10), ("b", 6), ("c", 1), ("d", 1)):
        wait(state, name, prompt)
    assert fcfs(state) == [
        "run a 10 kv ADMITTED_KV", "run b 6 kv ADMITTED_KV", "wait c WAITS_FOR_TOKENS", "wait d WAITS_BEHIND",
    ]  # fmt: skip


def test_chunks_of_those_that_run_come_first_and_share_the_budget():
    state = make_state(100, tokens=16)
    run(state, "a", 30, computed=18)
    run(state, "b", 30, computed=20)
    wait(state, "c", 2)
    assert fcfs(state) == [
        "run a 12 kv CONTINUES_PREFILL", "run b 4 kv CONTINUES_PREFILL", "wait c WAITS_FOR_TOKENS",
    ]  # fmt: skip


def test_a_chunk_that_takes_the_whole_budget_leaves_the_next_one_out():
    state = make_state(100, tokens=16)
    run(state, "a", 40, computed=8)
    run(state, "b", 40, computed=8)
    run(state, "c")
    assert fcfs(state) == ["run a 16 kv CONTINUES_PREFILL", "wait c WAITS_FOR_PREFILL"]


def test_seats_are_counted_with_those_that_run():
    state = make_state(100, max_num_seqs=3)
    run(state, "a")
    for name in "bcd":
        wait(state, name)
    assert fcfs(state) == [
        "run b 4 kv ADMITTED_KV", "run c 4 kv ADMITTED_KV", "wait d WAITS_FOR_SEQUENCES", "wait a WAITS_FOR_PREFILL",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_blocks", "watermark", "plan"),
    [
        # alone the first may use everything, but then the watermark holds
        (2, 2, ["run a 4 kv ADMITTED_KV", "wait b WAITS_FOR_BLOCKS"]),
        (5, 2, ["run a 4 kv ADMITTED_KV", "wait b WAITS_FOR_BLOCKS"]),
        (6, 2, ["run a 4 kv ADMITTED_KV", "run b 4 kv ADMITTED_KV"]),
    ],
)
def test_the_watermark_holds_for_all_but_one_alone(num_blocks, watermark, plan):
    state = make_state(num_blocks, watermark=watermark)
    wait(state, "a")
    wait(state, "b")
    assert fcfs(state) == plan


@pytest.mark.parametrize(("num_blocks", "admitted"), [(5, False), (6, True)])
def test_the_watermark_holds_where_somebody_runs(num_blocks, admitted):
    state = make_state(num_blocks, watermark=2)
    run(state, "a", computed=2)  # 2 blocks
    wait(state, "b")
    second = "run b 4 kv ADMITTED_KV" if admitted else "wait b WAITS_FOR_BLOCKS"
    assert fcfs(state) == ["run a 2 kv CONTINUES_PREFILL", second]


def test_blocks_and_budget_that_others_of_the_iteration_take_are_left_alone():
    state = make_state(8)
    for name in "abc":
        wait(state, name)
    scheduled, preempted, waited = plan_prefill(state, state.waiting, (), budget=9, claimed_blocks=4)
    assert lines(Plan(tuple(scheduled), tuple(preempted), (), waited)) == [
        "run a 4 kv ADMITTED_KV", "run b 4 kv ADMITTED_KV", "wait c WAITS_FOR_BLOCKS",
    ]  # fmt: skip
    scheduled, _, _ = plan_prefill(state, state.waiting, (), claimed_blocks=3)
    assert [entry.num_tokens for entry in scheduled] == [4, 4]
    assert len(plan_prefill(state, state.waiting, (), claimed_blocks=5)[0]) == 1
    assert [entry.num_tokens for entry in plan_prefill(state, state.waiting, (), budget=6)[0]] == [4, 2]


@pytest.mark.parametrize(
    ("num_blocks", "mode", "first"),
    [
        (8, "hybrid", "run a 13 kv ADMITTED_KV"), (7, "hybrid", "run a 13 hidden ADMITTED_HIDDEN_KV_DOES_NOT_FIT"),
        (4, "hybrid", "run a 13 hidden ADMITTED_HIDDEN_KV_DOES_NOT_FIT"), (3, "hybrid", "wait a WAITS_FOR_BLOCKS"),
        (8, "hidden", "run a 13 hidden ADMITTED_HIDDEN"), (3, "hidden", "wait a WAITS_FOR_BLOCKS"),
        (8, "kv", "run a 13 kv ADMITTED_KV"), (7, "kv", "wait a WAITS_FOR_BLOCKS"),
    ],
)  # fmt: skip
def test_the_first_kind_that_fits_is_taken(num_blocks, mode, first):
    state = make_state(num_blocks, mode=mode)
    wait(state, "a", 13)
    assert fcfs(state) == [first]


def test_a_victim_frees_all_its_blocks_and_as_few_go_as_needed():
    """The first three need a page of 2 blocks each and none is free; the fourth gives 4, the third itself 2."""
    state = make_state(2 * 3 + 4)
    for name in "abc":
        run(state, name)
    run(state, "d", 8)
    assert fcfs(state) == [
        "preempt d PREEMPTED_NO_BLOCKS", "preempt c PREEMPTED_NO_BLOCKS", "run a 1 kv DECODES", "run b 1 kv DECODES",
    ]  # fmt: skip


def test_as_many_victims_go_as_one_needs():
    """`a` needs two blocks for a page; each of the others gives back one."""
    state = make_state(4, mode="hybrid")
    run(state, "a")
    run(state, "b", kind=HIDDEN)
    run(state, "c", kind=HIDDEN)
    assert fcfs(state) == ["preempt c PREEMPTED_NO_BLOCKS", "preempt b PREEMPTED_NO_BLOCKS", "run a 1 kv DECODES"]


def test_nobody_is_preempted_for_one_that_gets_no_token_of_the_budget():
    state = make_state(100, tokens=16, max_num_seqs=2)
    run(state, "long", 40, computed=8)
    run(state, "low", priority=5)
    wait(state, "high", priority=-1)
    assert lines(make_policy("priority").schedule(state, 0.0)) == [
        "run long 16 kv CONTINUES_PREFILL", "wait high WAITS_FOR_TOKENS", "wait low WAITS_FOR_PREFILL",
    ]  # fmt: skip


def test_nobody_is_preempted_for_one_that_does_not_fit_even_so():
    """2 of 12 blocks are free and 4 could be taken from `low`, but `high` needs 8; `long` goes on in the meantime."""
    state = make_state(12)
    run(state, "long", 12, computed=4)
    run(state, "low", 8, priority=5)
    policy = make_policy("priority")
    wait(state, "high", 16, priority=-1)
    assert lines(policy.schedule(state, 0.0)) == [
        "run long 8 kv CONTINUES_PREFILL", "wait high WAITS_FOR_BLOCKS", "wait low WAITS_FOR_PREFILL",
    ]  # fmt: skip


def test_one_that_is_cut_short_in_its_prompt_is_a_victim_too_and_does_not_decode():
    state = make_state(4)
    run(state, "a")
    chunked = run(state, "b", 4, computed=2)
    assert fcfs(state) == ["run b 2 kv CONTINUES_PREFILL", "wait a WAITS_FOR_PREFILL"]
    plan = lines(make_policy("sarathi").schedule(state, 0.0))
    assert plan == ["preempt b PREEMPTED_NO_BLOCKS", "run a 1 kv DECODES"] and chunked.cache_kind is KV


def test_an_exhausted_request_neither_decodes_nor_waits():
    state = make_state(20)
    last = run(state, "last", output=2)
    run(state, "other")
    state.apply(Plan((Scheduled(last, 1, KV, Reason.DECODES),)), 0.0)  # its last token is in flight
    assert fcfs(state) == ["run other 1 kv DECODES"]
    wait(state, "new")
    assert fcfs(state) == ["run new 4 kv ADMITTED_KV", "wait other WAITS_FOR_PREFILL"]


@pytest.mark.parametrize(
    ("num_blocks", "watermark", "converts"),
    [(6, 0, True), (5, 0, False), (7, 1, True), (6, 1, False), (7, 2, False)],
)
def test_a_hidden_request_is_converted_where_a_page_for_everyone_is_left(num_blocks, watermark, converts):
    """Its two pages take 2 blocks more as KV; then 2 must be free for each that runs, and the watermark."""
    state = make_state(num_blocks, mode="hybrid", watermark=watermark)
    run(state, "a", 5, kind=HIDDEN)
    assert fcfs(state) == (
        ["convert a CONVERTED_MEMORY_FREE", "run a 1 kv DECODES"] if converts else ["run a 1 hidden DECODES"]
    )


@pytest.mark.parametrize(("num_blocks", "converts"), [(8, True), (7, False)])
def test_a_page_that_the_converted_request_begins_is_counted_once(num_blocks, converts):
    """Its ninth token begins a third page: 6 blocks as KV, that page's included, and 2 for it to grow again."""
    state = make_state(num_blocks, mode="hybrid")
    run(state, "a", 8, kind=HIDDEN)
    assert fcfs(state)[0] == ("convert a CONVERTED_MEMORY_FREE" if converts else "run a 1 hidden DECODES")


def test_the_oldest_hidden_one_that_decodes_is_converted_and_the_others_keep_their_kind():
    state = make_state(60, mode="hybrid")
    run(state, "kv")
    run(state, "chunked", 9, computed=4, kind=HIDDEN)
    run(state, "old", kind=HIDDEN)
    run(state, "young", kind=HIDDEN)
    plan = lines(make_policy("sarathi").schedule(state, 0.0))
    assert plan[:3] == ["convert old CONVERTED_MEMORY_FREE", "run kv 1 kv DECODES", "run old 1 kv DECODES"]
    assert plan[3:] == ["run young 1 hidden DECODES", "run chunked 5 hidden CONTINUES_PREFILL"]


def test_nothing_is_converted_while_blocks_are_short():
    """The oldest hidden one has no room; a younger and smaller one is not taken in its place."""
    state = make_state(22, mode="hybrid")
    run(state, "large", 45, kind=HIDDEN)  # 12 more as KV
    run(state, "small", 1, kind=HIDDEN)
    assert fcfs(state) == ["run large 1 hidden DECODES", "run small 1 hidden DECODES"]
    generate(state, state.running[1], 1)
    assert not [line for line in fcfs(state) if line.startswith("convert")]
