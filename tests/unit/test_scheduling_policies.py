"""What every policy owes: progress, conserved blocks, limits kept, the same plans for the same trace."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_jax.scheduling.host_tier import HostTier
from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.prefix_pool import PrefixPool
from tests.support.scheduling_loop import TINY, make_state, request, serve, step

ALL = policy_names()
VARIANTS = [*ALL, "apt:mixed=off", "apt:value=footprint", "apt:value=slack:fallback=none", "apt:prediction=off"]
VARIANTS += ["apt-paper:fetch=on", "fastswitch:fetch=off"]

traces = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 20), st.floats(0, 3, width=32), st.integers(-2, 2)),
    min_size=1, max_size=14,
)  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@given(
    mode=st.sampled_from(["hybrid", "kv", "hidden"]), trace=traces, with_model=st.booleans(),
    num_blocks=st.integers(32, 60), seconds=st.sampled_from([0.01, 0.4]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_everything_is_served_and_no_block_is_lost(name, mode, trace, with_model, num_blocks, seconds):
    policy = make_policy(name, PolicyContext(TINY if with_model else None))
    state = make_state(num_blocks, 4, 6, 32, mode, watermark=1)
    requests = [request(p, o, a, priority=c) for p, o, a, c in trace]
    serve(state, policy, requests, seconds)
    assert all(len(r.output_token_ids) == o for r, (_, o, _, _) in zip(requests, trace, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
@given(
    mode=st.sampled_from(["hybrid", "kv", "hidden"]), trace=traces, num_blocks=st.integers(32, 60),
    slots=st.sampled_from([3, 20, 200]), block_s=st.sampled_from([None, 1e-4, 0.02]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_it_is_also_with_host_memory(name, mode, trace, num_blocks, slots, block_s):
    """Prompts begin alike, so that pages are shared, moved and copied back, by some policies ahead of need."""
    state = make_state(
        num_blocks, 4, 6, 32, mode, watermark=1,
        pool=lambda blocks, size: PrefixPool(blocks, size, host=HostTier(slots, block_s=block_s)),
    )  # fmt: skip
    requests = [request(p, o, a, priority=c) for p, o, a, c in trace]
    serve(state, make_policy(name, PolicyContext(TINY)), requests, 0.03)
    assert all(len(r.output_token_ids) == o for r, (_, o, _, _) in zip(requests, trace, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_same_trace_same_plans(name):
    def run():
        policy = make_policy(name, PolicyContext(TINY, seed=3))
        state = make_state(24, 4, 6, 32, "hybrid")
        serve(state, policy, [request(5 + 7 * k % 23, 3 + 5 * k % 17, 0.05 * k) for k in range(25)], 0.05)
        return state.plans.as_dicts()

    assert run() == run()


def test_names_and_options():
    assert {"apt", "apt-paper", "fcfs", "random", "sarathi", "mlfq", "sjf", "edf", "priority"} <= set(ALL)
    with pytest.raises(ValueError, match="known: alise"):
        make_policy("lifo")
    with pytest.raises(ValueError, match="fallback=aging"):
        make_policy("apt:fallbck=none")
    with pytest.raises(ValueError, match="on or off"):
        make_policy("apt:mixed=maybe")
    with pytest.raises(ValueError, match="one of aging"):
        make_policy("apt:fallback=never")
    with pytest.raises(ValueError, match="takes no options"):
        make_policy("fcfs:mixed=on")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("wait:force_after_s=0", "force_after_s=0.0 must be greater than 0"),
        ("wait:occupancy=7", "occupancy=7.0 must be greater than 0 and at most 1"),
        ("fastserve:levels=99", "levels=99 must be in 1..64"),
        ("fastserve:free_share=2", "free_share=2.0 must be in 0..0.5"),
        ("semi-pd:share=2", "share=2.0 must be in 0.05..0.95"),
        ("semi-pd:window_s=-1", "window_s=-1.0 must be greater than 0"),
    ],
)
def test_only_the_option_that_is_wrong_is_named(option, sentence):
    with pytest.raises(ValueError, match=f"{re.escape(sentence)}$"):
        make_policy(option)


def names(entries):
    return [entry.request.request_id for entry in entries]


def test_fcfs_prefills_in_order_then_decodes_all():
    state, policy = make_state(40, tokens=20), make_policy("fcfs")
    for name, prompt in (("a", 12), ("b", 12), ("c", 4)):
        state.add(request(prompt, 3, name=name))
    first = step(state, policy, 0.0)
    assert [(s.request.request_id, s.num_tokens) for s in first.scheduled] == [("a", 12), ("b", 8)]
    assert [(w.requests[0].request_id, w.reason) for w in first.waited] == [("c", Reason.WAITS_FOR_TOKENS)]
    second = step(state, policy, 0.1)
    assert [(s.request.request_id, s.num_tokens) for s in second.scheduled] == [("b", 4), ("c", 4)]
    third = step(state, policy, 0.2)
    assert names(third.scheduled) == ["a", "b", "c"] and {s.reason for s in third.scheduled} == {Reason.DECODES}


def test_fcfs_does_not_let_a_small_request_pass_a_large_one_that_does_not_fit():
    state, policy = make_state(12), make_policy("fcfs")
    for name, prompt in (("a", 12), ("big", 20), ("small", 2)):
        state.add(request(prompt, 3, name=name))
    plan = step(state, policy, 0.0)
    assert names(plan.scheduled) == ["a"]
    assert [w.reason for w in plan.waited] == [Reason.WAITS_FOR_BLOCKS, Reason.WAITS_BEHIND]


def test_fcfs_keeps_the_watermark_free_except_for_a_request_alone():
    state, policy = make_state(8, watermark=4), make_policy("fcfs")
    state.add(request(16, 1, name="alone"))
    assert names(step(state, policy, 0.0).scheduled) == ["alone"]
    state.add(request(8, 3, name="a"))
    state.add(request(4, 3, name="b"))
    assert names(step(state, policy, 0.1).scheduled) == ["a"]


def test_fcfs_preempts_the_latest_arrival_and_recomputes_it():
    state, policy = make_state(8), make_policy("fcfs")
    a, b = request(8, 8, name="a"), request(8, 8, name="b")
    state.add(a)
    state.add(b)
    step(state, policy, 0.0)
    plan = step(state, policy, 0.1)
    assert names(plan.preempted) == ["b"] and names(plan.scheduled) == ["a"]
    assert b.num_preemptions == 1 and b.num_computed_tokens == 0 and len(b.output_token_ids) == 1


def test_fcfs_hybrid_takes_hidden_when_kv_does_not_fit_and_converts_later():
    state, policy = make_state(17, mode="hybrid"), make_policy("fcfs")
    a, b = request(20, 2, name="a"), request(16, 6, name="b")
    state.add(a)
    state.add(b)
    plan = step(state, policy, 0.0)
    assert [s.reason for s in plan.scheduled] == [Reason.ADMITTED_KV, Reason.ADMITTED_HIDDEN_KV_DOES_NOT_FIT]
    step(state, policy, 0.1)
    plan = step(state, policy, 0.2)
    assert names(plan.converted) == ["b"] and b.num_conversions == 1


def test_sarathi_never_pauses_decoding_for_a_prompt():
    state, policy = make_state(80), make_policy("sarathi:token_budget=16")
    state.add(request(4, 20, name="talker"))
    step(state, policy, 0.0)
    state.add(request(50, 2, name="essay"))
    for k in range(4):
        plan = step(state, policy, 0.1 * (k + 1))
        assert names(plan.scheduled) == ["talker", "essay"] and plan.num_tokens <= 16


def test_mlfq_sinks_long_answers_and_skips_levels_for_long_prompts():
    state, policy = make_state(200, max_num_seqs=1, tokens=600), make_policy("mlfq")
    state.add(request(8, 100, name="long answer"))
    step(state, policy, 0.0)
    state.add(request(8, 5, name="short"))
    state.add(request(300, 5, name="long prompt"))
    seen = []
    now = 0.1
    while state.num_unfinished and len(seen) < 300:
        plan = step(state, policy, now)
        seen += names(plan.scheduled)[:1]
        now += 0.01
    # the long answer ran its quantum of 32, then the short one passed it; the long prompt joined further down
    assert seen.index("short") < 40 < seen.index("long prompt")


def test_edf_serves_the_tightest_slack_and_leaves_lost_ones_for_last():
    from apt_jax.request import Slo

    state, policy = make_state(200, tokens=8), make_policy("edf")
    for name, ttft in (("lost", 0.1), ("loose", 9.0), ("tight", 1.0)):
        state.add(request(8, 1, name=name, slo=Slo(ttft, 1.0)))
    order = [names(step(state, policy, 0.5 + 0.01 * k).scheduled)[0] for k in range(3)]
    assert order == ["tight", "loose", "lost"]


def test_sjf_learns_that_long_prompts_get_short_answers():
    policy = make_policy("sjf")
    for k in range(200):
        for prompt, output in ((30, 900), (300, 20)):
            done = request(prompt, output, name=f"{k}")
            done.output_token_ids = [1] * output
            from apt_jax.request import FinishReason

            done.finish_reason = FinishReason.LENGTH
            policy.finished(done, 0.0)
    state = make_state(400, tokens=300)
    state.add(request(30, 4, name="chatty"))
    state.add(request(300, 4, name="terse"))
    assert names(step(state, policy, 0.0).scheduled)[0] == "terse"


def test_priority_preempts_a_higher_number():
    state, policy = make_state(8), make_policy("priority")
    low, high = request(12, 4, name="low", priority=5), request(12, 4, name="high", priority=0)
    state.add(low)
    step(state, policy, 0.0)
    state.add(high)
    plan = step(state, policy, 0.1)
    assert names(plan.preempted) == ["low"] and names(plan.scheduled) == ["high"]
    assert plan.preempted[0].reason is Reason.PREEMPTED_FOR_EARLIER


def test_random_depends_on_the_seed_only():
    def order(seed):
        state, policy = make_state(200, tokens=8), make_policy("random", PolicyContext(seed=seed))
        for k in range(8):
            state.add(request(8, 1, name=str(k)))
        return [names(step(state, policy, 0.1 * k).scheduled)[0] for k in range(8)]

    assert order(1) == order(1) != order(2)


def test_plan_log_keeps_the_newest_and_tells_why():
    state, policy = make_state(12), make_policy("fcfs")
    for name, prompt in (("a", 12), ("big", 20)):
        state.add(request(prompt, 3, name=name))
    serve(state, policy, [])
    assert state.plans.num_recorded == len(state.plans.as_dicts())
    assert state.plans.of_request("big")[0] == {
        "number": 0, "now_s": 0.0, "action": "waited", "reason": "waits for free blocks",
    }  # fmt: skip
    assert state.plans.as_dicts()[0]["scheduled"] == [
        {"request": "a", "tokens": 12, "cache": "kv", "reason": "admitted with KV cache"}
    ]


def test_every_policy_has_a_page():
    """`docs/scheduling` explains each; apt-paper shares apt's page."""
    folder = Path(__file__).parents[2] / "docs" / "scheduling"
    index = (folder / "README.md").read_text("utf-8")
    for name in policy_names():
        page = folder / f"{name.removesuffix('-paper')}.md"
        assert page.read_text("utf-8").startswith(f"# {name.removesuffix('-paper')}"), page
        assert f"[{name}](" in index
