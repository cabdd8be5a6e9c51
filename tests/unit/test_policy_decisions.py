"""The plan that is right for tiny states, worked out by hand, for every policy but apt. Pages hold 4 tokens."""

import random

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason, Slo
from apt_jax.scheduling.plan import Plan, Preempted, Reason
from apt_jax.scheduling.policies.catalogue import PolicyContext, make_policy
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import generate, lines, order, run, wait


@pytest.mark.parametrize(
    ("requests", "first_to_last"),
    [
        # arrival, TTFT promise: at 10 s the slack is promise - (10 - arrival)
        ({"loose": (9.5, 1.0), "tight": (9.75, 0.5), "due now": (9.0, 1.0)}, ["due now", "tight", "loose"]),
        ({"lost": (8.0, 1.5), "tight": (9.75, 0.5), "loose": (0.0, 90.0)}, ["tight", "loose", "lost"]),
        ({"lost": (8.0, 1.5), "longer lost": (7.0, 1.5)}, ["longer lost", "lost"]),
        ({"first": (9.5, 1.0), "second": (9.5, 1.0)}, ["first", "second"]),
    ],
)
def test_edf_admits_by_slack_and_the_lost_ones_last(requests, first_to_last):
    state = make_state(100)
    for name, (arrival_s, ttft_s) in requests.items():
        wait(state, name, arrival_s=arrival_s, slo=Slo(ttft_s, 100.0))
    assert order(make_policy("edf").schedule(state, 10.0)) == first_to_last


def test_edf_counts_the_promise_for_gaps_once_a_token_is_out():
    state = make_state(100)
    slow = run(state, "slow", arrival_s=0.0, slo=Slo(100.0, 4.0))
    quick = run(state, "quick", arrival_s=0.0, slo=Slo(100.0, 0.5))
    for running in (slow, quick):
        generate(state, running, 1, now=9.75)
    assert order(make_policy("edf").schedule(state, 10.0)) == ["quick", "slow"]  # slack 0.25 and 3.75
    assert order(make_policy("edf").schedule(state, 10.25)) == ["quick", "slow"]  # 0 is not lost yet
    assert order(make_policy("edf").schedule(state, 10.5)) == ["slow", "quick"]


def test_edf_preempts_the_loosest():
    state = make_state(8)  # two requests of two pages, and no block for a third page
    for name, tbt_s in (("loose", 9.0), ("tight", 1.0)):
        run(state, name, 8, slo=Slo(1.0, tbt_s))
    plan = make_policy("edf").schedule(state, 0.5)
    assert lines(plan) == ["preempt loose PREEMPTED_NO_BLOCKS", "run tight 1 kv DECODES"]


@pytest.mark.parametrize(("prompt", "passed"), [(100 - 31, True), (100 - 30, False), (100 - 29, False)])
def test_sjf_credits_thirty_tokens_for_a_second_waited(prompt, passed):
    """Before anything is learned the outputs of both are thought equal; the second came a second later."""
    state = make_state(100, tokens=400)
    wait(state, "first", 100, arrival_s=0.0)
    wait(state, "second", prompt, arrival_s=1.0)
    assert order(make_policy("sjf").schedule(state, 2.0)) == (["second", "first"] if passed else ["first", "second"])


class Lengths:
    """Predicts 10 tokens for each of the prompt's, less those generated; remembers what it was taught."""

    def __init__(self):
        self.learned = []

    def remaining_tokens(self, prompt, generated):
        return 10.0 * np.asarray(prompt) - np.asarray(generated)

    def remaining_of(self, requests, prompt, generated):
        return self.remaining_tokens(prompt, generated)

    def learn(self, request):
        self.learned.append(request.request_id)


def test_sjf_decodes_by_what_is_left_and_preempts_the_longest():
    state = make_state(12)
    policy = make_policy("sjf", PolicyContext(predictor=Lengths()))
    run(state, "long", 8, 1)  # 80 - 1 to come, and 1 to compute
    run(state, "short", 4, 1)  # 40 - 1
    run(state, "shorter", 4, 3)  # 40 - 3
    assert state.pool.num_free == 12 - 4 - 2 - 4
    assert lines(policy.schedule(state, 0.0)) == [
        "preempt long PREEMPTED_NO_BLOCKS", "run shorter 1 kv DECODES", "run short 1 kv DECODES",
    ]  # fmt: skip


def test_sjf_and_apt_learn_from_what_finished_and_the_others_need_not():
    for name in ("sjf", "apt"):
        lengths = Lengths()
        done = run(make_state(100), "done")
        make_policy(name, PolicyContext(predictor=lengths)).finished(done, 1.0)
        assert lengths.learned == ["done"]


@pytest.mark.parametrize(
    ("first", "second", "passed"),
    [
        (128, 4, False), (129, 4, True),  # the first level covers 4 x 32 tokens of prompt
        (256, 129, False), (257, 129, True), (512, 257, False), (513, 257, True),
        (1025, 1024, True), (2049, 2048, True), (2049, 4096, False), (2049, 9999, False), (9999, 4097, False),
    ],
)  # fmt: skip
def test_mlfq_joins_the_first_level_that_covers_the_prompt(first, second, passed):
    state = make_state(30_000, tokens=30_000)
    for name, prompt in (("first", first), ("second", second)):
        wait(state, name, prompt)
    assert order(make_policy("mlfq").schedule(state, 0.0))[0] == ("second" if passed else "first")


@pytest.mark.parametrize(
    ("generated", "passed_by"),
    [(31, []), (32, ["fresh"]), (32 + 63, ["fresh"]), (32 + 64, ["fresh", "long prompt"])],
)
def test_mlfq_sinks_a_request_that_has_used_up_its_quantum(generated, passed_by):
    """Quanta are 32 and 64 tokens, each counted from when a level is joined."""
    state, policy = make_state(1000, tokens=1000), make_policy("mlfq")
    old, fresh, prompt = wait(state, "old"), wait(state, "fresh"), wait(state, "long prompt", 129)
    state.apply(policy.schedule(state, 0.0), 0.0)  # it sees each with nothing generated
    for running in (old, fresh, prompt):
        state.commit(running, 5, 0.0)
    for _ in range(2, generated + 1):
        generate(state, old, 1)
        plan = policy.schedule(state, 0.0)
    others = ["fresh", "long prompt"]
    kept = [name for name in others if name not in passed_by]
    assert order(plan) == [*passed_by, "old", *kept]


def test_mlfq_sinks_no_further_than_its_last_level():
    """A request at the bottom stays before later ones there, however much it generates."""
    state, policy = make_state(9000, tokens=9000), make_policy("mlfq")
    old = run(state, "old", 2049, output=5000)  # the last level; its quantum is 1,024
    run(state, "later", 2049)
    policy.schedule(state, 0.0)
    generate(state, old, 1100)
    policy.schedule(state, 0.0)
    assert order(policy.schedule(state, 0.0)) == ["old", "later"]


@pytest.mark.parametrize(("now", "promoted"), [(5.0, False), (5.25, True)])
def test_mlfq_promotes_after_five_seconds_without_a_token(now, promoted):
    state, policy = make_state(1000, tokens=1000), make_policy("mlfq")
    wait(state, "long prompt", 300, arrival_s=0.0)
    wait(state, "fresh", 4, arrival_s=now)
    policy.schedule(state, 0.0)
    assert order(policy.schedule(state, now))[0] == ("long prompt" if promoted else "fresh")


def test_mlfq_promotes_only_those_that_wait():
    state, policy = make_state(1000, tokens=1000), make_policy("mlfq")
    run(state, "long prompt", 300)
    run(state, "fresh", 4)
    policy.schedule(state, 0.0)
    assert order(policy.schedule(state, 9.0)) == ["fresh", "long prompt"]


def test_mlfq_counts_a_new_quantum_from_the_promotion():
    """Promoted with 40 tokens out, it stays up until it has 72."""
    state, policy = make_state(1000, tokens=1000), make_policy("mlfq")
    old, fresh = wait(state, "old"), wait(state, "fresh")
    state.apply(policy.schedule(state, 0.0), 0.0)
    state.commit(old, 5, 0.0)
    state.commit(fresh, 5, 0.0)
    generate(state, old, 39)
    assert order(policy.schedule(state, 0.0)) == ["fresh", "old"]
    state.apply(Plan(preempted=(Preempted(old, Reason.PREEMPTED_NO_BLOCKS),)), 0.0)
    state.apply(policy.schedule(state, 5.25), 5.25)
    state.commit(old, 5, 5.25)
    assert order(policy.schedule(state, 5.25)) == ["old", "fresh"]
    generate(state, old, 30)
    assert order(policy.schedule(state, 5.25)) == ["old", "fresh"]
    generate(state, old, 1)
    assert order(policy.schedule(state, 5.25)) == ["fresh", "old"]


@pytest.mark.parametrize(("prompt", "preempts"), [(128, True), (129, False)])
def test_mlfq_lets_a_higher_level_take_memory_but_not_an_equal_one(prompt, preempts):
    state, policy = make_state(80, tokens=1000), make_policy("mlfq")
    run(state, "deep", 130)  # 66 of 80 blocks, second level
    wait(state, "new", prompt)
    plan = policy.schedule(state, 0.0)
    if preempts:
        assert lines(plan) == ["preempt deep PREEMPTED_FOR_EARLIER", f"run new {prompt} kv ADMITTED_KV"]
    else:
        assert lines(plan) == ["run deep 1 kv DECODES", "wait new WAITS_FOR_BLOCKS"]


def test_mlfq_forgets_what_finished():
    state, policy = make_state(100), make_policy("mlfq")
    done = run(state, "done")
    policy.schedule(state, 0.0)
    state.finish(done, FinishReason.ABORT)
    policy.finished(done, 0.0)
    assert not any(kept for kept in vars(policy).values() if isinstance(kept, dict))


def test_priority_serves_by_class_then_arrival():
    state = make_state(100)
    for name, priority in (("c", 2), ("a", -1), ("d", 2), ("b", 0)):
        wait(state, name, priority=priority)
    assert order(make_policy("priority").schedule(state, 0.0)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("priority", "prompt", "plan"),
    [
        (0, 8, ["preempt y PREEMPTED_FOR_EARLIER", "run new 8 kv ADMITTED_KV", "wait x WAITS_FOR_PREFILL"]),
        (0, 16, ["preempt y PREEMPTED_FOR_EARLIER", "preempt x PREEMPTED_FOR_EARLIER", "run new 16 kv ADMITTED_KV"]),
        (3, 8, ["preempt y PREEMPTED_FOR_EARLIER", "run new 8 kv ADMITTED_KV", "wait x WAITS_FOR_PREFILL"]),
        # an equal class takes nothing, and a class that does not get enough takes nothing either
        (4, 8, ["preempt y PREEMPTED_NO_BLOCKS", "run x 1 kv DECODES", "wait new WAITS_FOR_BLOCKS"]),
        (3, 16, ["preempt y PREEMPTED_NO_BLOCKS", "run x 1 kv DECODES", "wait new WAITS_FOR_BLOCKS"]),
    ],
)
def test_priority_takes_the_memory_of_higher_numbers_as_far_as_needed(priority, prompt, plan):
    state = make_state(8)
    run(state, "x", 8, priority=3)
    run(state, "y", 8, priority=4)
    wait(state, "new", prompt, priority=priority)
    assert lines(make_policy("priority").schedule(state, 0.0)) == plan


def test_priority_takes_a_seat_where_seats_are_short():
    state = make_state(100, max_num_seqs=2)
    run(state, "x", priority=3)
    run(state, "y", priority=4)
    wait(state, "new", priority=0)
    wait(state, "other", priority=5)
    assert lines(make_policy("priority").schedule(state, 0.0)) == [
        "preempt y PREEMPTED_FOR_EARLIER", "run new 4 kv ADMITTED_KV",
        "wait other WAITS_FOR_SEQUENCES", "wait x WAITS_FOR_PREFILL",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_shuffles_those_that_wait_and_then_those_that_run(seed):
    state = make_state(4 * 3 * 2)  # those that run fill it but for what one needs
    for name in "abc":
        run(state, name, 8, kind=CacheKind.KV)
    for name in "uvwxyz":
        wait(state, name, 40)
    waiting, running = list("uvwxyz"), list("abc")
    policy, rng = make_policy("random", PolicyContext(seed=seed)), random.Random(seed)
    for _ in range(3):
        rng.shuffle(waiting)
        rng.shuffle(running)
        plan = policy.schedule(state, 0.0)
        assert order(plan) == running
        assert [r.request_id for w in plan.waited for r in w.requests] == waiting
        waiting, running = list("uvwxyz"), list("abc")


@pytest.mark.parametrize(
    ("budget", "limit", "chunk"),
    [(16, 64, 14), (64, 16, 14), (3, 64, 1), (2, 64, 1), (1, 64, 1), (64, 64, 40)],
)
def test_sarathi_fills_up_the_budget_that_decodes_leave_with_a_chunk(budget, limit, chunk):
    state = make_state(100, tokens=limit)
    run(state, "a")
    run(state, "b")
    wait(state, "essay", 40)
    assert lines(make_policy(f"sarathi:token_budget={budget}").schedule(state, 0.0)) == [
        "run a 1 kv DECODES", "run b 1 kv DECODES", f"run essay {chunk} kv ADMITTED_KV",
    ]  # fmt: skip


def test_sarathi_takes_512_tokens_where_nothing_is_said():
    state = make_state(1000, tokens=2048)
    wait(state, "essay", 1000)
    assert lines(make_policy("sarathi").schedule(state, 0.0)) == ["run essay 512 kv ADMITTED_KV"]


@pytest.mark.parametrize(("num_blocks", "admitted"), [(6, True), (5, False)])
def test_sarathi_leaves_the_blocks_that_decodes_take(num_blocks, admitted):
    """`a` holds one page and needs the next: 4 blocks; 2 are left for a new page, or not."""
    state = make_state(num_blocks)
    run(state, "a")
    wait(state, "new", 3)
    plan = lines(make_policy("sarathi").schedule(state, 0.0))
    assert plan == ["run a 1 kv DECODES", "run new 3 kv ADMITTED_KV" if admitted else "wait new WAITS_FOR_BLOCKS"]


def test_sarathi_admits_nobody_when_it_preempts_and_goes_on_with_chunks():
    state = make_state(10)
    run(state, "a", 8)
    run(state, "chunked", 4, computed=2)
    run(state, "last", 8, output=9)
    wait(state, "new", 1)
    plan = make_policy("sarathi").schedule(state, 0.0)
    assert lines(plan) == [
        "preempt last PREEMPTED_NO_BLOCKS", "run a 1 kv DECODES", "run chunked 2 kv CONTINUES_PREFILL",
    ]  # fmt: skip


def test_sarathi_converts_only_when_nobody_waits():
    state = make_state(40, mode="hybrid")
    run(state, "a", kind=CacheKind.HIDDEN)
    policy = make_policy("sarathi")
    assert lines(policy.schedule(state, 0.0)) == ["convert a CONVERTED_MEMORY_FREE", "run a 1 kv DECODES"]
    wait(state, "new", 3)
    assert lines(policy.schedule(state, 0.0)) == ["run a 1 hidden DECODES", "run new 3 kv ADMITTED_KV"]
