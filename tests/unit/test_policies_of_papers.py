"""The mechanisms of FastServe, ALISE, WAIT and semi-PD: each test fails without the one it names."""

from collections import Counter

import numpy as np
import pytest

from apt_jax.request import FinishReason, Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.host_tier import HostTier
from apt_jax.scheduling.idling import MOST_IDLE_S, Idling
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.plan import Plan, Reason
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.prefix_pool import PrefixPool
from apt_jax.simulation.simulator import Stalled, simulate
from apt_jax.simulation.workload import Arrival
from tests.support.scheduling_loop import TINY, make_state, request, serve, step

A100 = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"])


def names(entries):
    return [entry.request.request_id for entry in entries]


def finished(prompt_tokens, length, order):
    ended = request(prompt_tokens, 999)
    ended.order, ended.output_token_ids, ended.finish_reason = order, [5] * length, FinishReason.STOP
    return ended


def made(name, model=None, **context):
    return make_policy(name, PolicyContext(model, **context))


# -- FastServe ------------------------------------------------------------------------------------------------------


def test_fastserve_lets_a_long_prompt_join_below_a_short_one():
    """1,600 tokens of OPT-13B take some 250 ms on an A100, five levels below 20 tokens."""
    state, policy = make_state(999, 16, max_num_seqs=1, tokens=2048), made("fastserve", A100)
    state.add(request(1600, 2, name="long"))
    state.add(request(20, 2, name="short"))
    assert names(step(state, policy, 0.0).scheduled) == ["short"]


@pytest.mark.parametrize(("seconds", "first"), [(0.02, "new"), (0.0001, "old")])
def test_fastserve_counts_what_a_request_was_served_in_seconds(seconds, first):
    """After four tokens the old one has had 80 ms, and sinks below a newcomer, or 0.4 ms, and does not."""
    state, policy = make_state(200, 4, max_num_seqs=1), made("fastserve:first_quantum_ms=10", TINY)
    state.add(request(8, 40, name="old"))
    now = 0.0
    for _ in range(4):
        step(state, policy, now, seconds)
        now += seconds
    state.add(request(8, 5, name="new"))
    assert names(step(state, policy, now, seconds).scheduled) == [first]


def test_fastserve_sinks_nobody_below_the_last_level():
    state, policy = make_state(200, 4), made("fastserve:levels=3", TINY)
    state.add(request(8, 60))
    for k in range(30):
        step(state, policy, float(k), 1.0)
    assert [standing.level for standing in policy._standings.values()] == [2]


def test_fastserve_promotes_who_was_not_served_for_long():
    """One that has sunk is overtaken by ever new ones, until the thousandth iteration finds that it has waited."""
    state, policy = make_state(200, 4, max_num_seqs=1), made("fastserve", TINY)
    state.add(request(8, 200, name="sunken"))
    served = []
    for k in range(1005):
        if k >= 6 and not any(r.request_id != "sunken" for r in (*state.waiting, *state.running)):
            state.add(request(8, 2, name=f"new {k}"))
        served.append(names(step(state, policy, 0.02 * k, 0.02).scheduled) == ["sunken"])
    assert not any(served[10:999]) and any(served[999:])


def roomy_state(host_slots, **options):
    return make_state(
        pool=lambda blocks, size: PrefixPool(blocks, size, host=HostTier(host_slots) if host_slots else None), **options
    )


@pytest.mark.parametrize(("host_slots", "ahead"), [(100, True), (0, False)])
def test_fastserve_frees_blocks_ahead_of_need_where_they_can_be_moved(host_slots, ahead):
    state = roomy_state(host_slots, num_blocks=40, block_size=4, max_num_seqs=8, tokens=64, mode="hidden")
    policy = made("fastserve:free_share=0.25:first_quantum_ms=1", TINY)
    for k in range(6):
        state.add(request(16, 12, name=str(k)))
    plans = [step(state, policy, 0.05 * k, 0.05) for k in range(12)]
    reasons = {entry.reason for plan in plans for entry in plan.preempted}
    assert (Reason.PREEMPTED_AHEAD in reasons) == ahead


def test_fastserve_frees_blocks_of_the_lowest_levels_first_and_none_of_the_top_one():
    """A block for each that runs is to stay free: of five in a pool of 22 blocks one has to go."""
    found = {}
    for levels in ([0, 2, 1, 0, 1], [0, 0, 0, 0, 0]):
        state = roomy_state(100, num_blocks=22, block_size=4, max_num_seqs=8, tokens=400, mode="hidden")
        policy = made("fastserve", TINY)
        for k in range(5):
            state.add(request(14, 40, name=str(k)))
        step(state, policy, 0.0, 0.0)
        assert len(state.running) == 5 and state.pool.num_free == 2
        for each, level in zip(state.running, levels, strict=True):
            policy._standings[each.order].level = level
        plan = policy.schedule(state, 0.0)
        found[max(levels)] = names(plan.preempted)
        state.apply(plan, 0.0)
        assert len(plan.scheduled) + len(plan.preempted) == 5
    assert found == {2: ["1"], 0: []}


def test_fastserve_lets_newcomers_wait_while_the_host_is_full():
    """Two preempted requests of 10 blocks each fill 22 slots beyond nine tenths."""
    found = {}
    for slots in (22, 60):
        state = roomy_state(slots, num_blocks=30, block_size=4, max_num_seqs=8, tokens=64, mode="hidden")
        policy = made("fastserve:free_share=0", TINY)
        for name in ("a", "b", "keeps"):
            state.add(request(36, 40, name=name))
            step(state, policy, 0.0)
        for each in ("a", "b"):
            victim = next(r for r in state.running if r.request_id == each)
            state._preempt(victim)
        state.add(request(8, 4, name="new"))
        found[slots] = names(policy.schedule(state, 0.1).scheduled)
    assert "new" not in found[22] and "new" in found[60]


# -- ALISE ----------------------------------------------------------------------------------------------------------


class Known(LengthPredictor):
    """Answers with `max_new_tokens`."""

    def remaining_of(self, requests, prompt_tokens, generated_tokens):
        return np.maximum(np.array([r.max_new_tokens for r in requests], float) - generated_tokens, 1.0)


def test_alise_serves_the_soonest_done_first_and_preempts_for_it():
    state, policy = make_state(200, 4, max_num_seqs=1), made("alise", A100, predictor=Known())
    state.add(request(8, 400, name="long"))
    step(state, policy, 0.0)
    state.add(request(8, 5, name="short"))
    plan = step(state, policy, 0.03)
    assert names(plan.preempted) == ["long"] and names(plan.scheduled) == ["short"]


def test_alise_takes_no_memory_from_those_of_the_same_queue():
    state, policy = make_state(200, 4, max_num_seqs=1), made("alise", A100, predictor=Known())
    state.add(request(8, 400, name="runs"))
    step(state, policy, 0.0)
    state.add(request(8, 399, name="sooner, but not by a queue"))
    plan = step(state, policy, 0.03)
    assert not plan.preempted and names(plan.scheduled) == ["runs"]


def test_alise_lifts_by_a_queue_for_each_age_since_arrival_and_anew_since_a_preemption():
    state, policy = make_state(2000, 4, max_num_seqs=2), made("alise:age_s=2", A100, predictor=Known())
    waits, preempted = request(8, 400), request(8, 400)
    state.add(waits)
    state.add(preempted)
    fresh = policy._queues(state, 0.0)[waits.order]
    assert [policy._queues(state, now)[waits.order] for now in (1.9, 2.0, 6.5, 0.0)] == [
        fresh, fresh - 1, fresh - 3, fresh - 3,
    ]  # fmt: skip
    step(state, policy, 10.0, 0.0)
    state._preempt(preempted)
    assert policy._queues(state, 10.0)[preempted.order] == fresh - 5, "it keeps what it was lifted by"
    assert policy._queues(state, 21.9)[preempted.order] == fresh - 5
    assert policy._queues(state, 22.1)[preempted.order] == fresh - 6


@pytest.mark.parametrize(("age_s", "old_is_served"), [(1.0, True), (1000.0, False)])
def test_alise_lifts_who_has_waited(age_s, old_is_served):
    """Short ones come for ever; the long one is eight queues below them."""
    state, policy = make_state(400, 4, max_num_seqs=1), made(f"alise:age_s={age_s}", A100, predictor=Known())
    old = request(8, 600, name="old")
    state.add(old)
    for k in range(300):
        if len(state.waiting) < 3:
            state.add(request(8, 4, arrival_s=0.05 * k, name=f"short {k}"))
        step(state, policy, 0.05 * k, 0.05)
    assert bool(old.output_token_ids) == old_is_served


class Straight(CostModel):
    """10 ms for an iteration, 10 us for each token of context, 1 ms for a prompt token."""

    prompt_token_s = 1e-3

    def step_s(self, load):
        return 0.01 + 1e-5 * sum(load.context_tokens)


def test_alise_expects_the_seconds_of_the_prompt_and_of_each_token_with_its_context():
    """T0 s + n (alpha s + beta), in powers of two of 125 ms."""
    state = make_state(2000, 4, max_num_seqs=2, tokens=2048)
    policy = made("alise", Straight(MODELS["opt-13b"], HARDWARE["a100-40gb"]), predictor=Known())
    runs, waits, preempted = request(500, 301, name="runs"), request(1000, 40), request(100, 301, name="preempted")
    state.add(runs)
    state.add(preempted)
    step(state, policy, 0.0)
    state._preempt(preempted)
    state.add(waits)
    found = policy._queues(state, 0.03)
    seconds = {
        runs.order: 300 * (0.01 + 1e-5 * (500 + 1 + 300 / 2)),
        waits.order: 1000 * 1e-3 + 40 * (0.01 + 1e-5 * (1000 + 40 / 2)),
        preempted.order: 101 * 1e-3 + 300 * (0.01 + 1e-5 * (100 + 1 + 300 / 2)),
    }
    assert found == {order: int(np.ceil(np.log2(left_s / 0.125))) for order, left_s in seconds.items()}
    assert sorted(found.values()) == [4, 5, 6]


def test_alise_learns_lengths_as_requests_end():
    policy = made("alise")
    for order in range(40):
        policy.finished(finished(8, 20, order), 0.0)
    assert policy._predictor.remaining_of([request(8, 99)], np.array([8]), np.array([0]))[0] < 50


# -- WAIT -----------------------------------------------------------------------------------------------------------


def test_wait_idles_until_a_request_has_come_or_a_second_has_passed():
    state, policy = make_state(999, 4, max_num_seqs=64), made("wait", TINY, predictor=Known())
    state.add(request(8, 200, name="a"))
    assert names(step(state, policy, 0.0).scheduled) == ["a"]
    ran = 0.0
    for k in range(1, 400):
        plan = policy.schedule(state, 0.01 * k)
        if plan.is_empty:
            assert plan.wake_at_s == pytest.approx(ran + 1.0)
            break
        step(state, policy, 0.01 * k)
        ran = 0.01 * k
    assert plan.is_empty, "one arrival pays for some iterations only"
    state.add(request(8, 200, name="b"))
    assert names(step(state, policy, ran + 0.5).scheduled) == ["a", "b"]
    plan = policy.schedule(state, ran + 0.52)
    forced = step(state, policy, ran + 1.6)
    assert names(forced.scheduled) == ["a", "b"]


def test_wait_gathers_several_where_more_come_than_one_in_an_iteration():
    """64 seats and outputs of 3 tokens: an iteration of a full batch takes 0.9 * 64 / 4 = 14.4 prompts."""
    state, policy = make_state(999, 4, max_num_seqs=64, tokens=2048), made("wait", TINY, predictor=Known())
    for k in range(40):  # so that rates are known
        state.add(request(8, 3, name=f"first {k}"))
    serve_now = 0.0
    while state.num_unfinished:
        plan = step(state, policy, serve_now)
        serve_now += 0.03 if plan.scheduled else 1.0
    counts = []
    for k in range(30):
        state.add(request(8, 3, arrival_s=serve_now, name=str(k)))
        counts.append(len(step(state, policy, serve_now + 0.001 * k).scheduled))
    first = next(k for k, count in enumerate(counts) if count)
    assert 8 <= first <= 20 and counts[first] >= 8


def test_nested_wait_holds_those_that_reach_a_later_segment_until_they_are_enough():
    state, policy = make_state(4000, 4, max_num_seqs=512, tokens=4096), made("nested-wait", TINY)
    for length in [8] * 50 + [100] * 50:
        policy.finished(finished(1, length, 10**6), 0.0)
    stood, past = Counter(), set()
    for k in range(70):  # of the six or seven that enter in an iteration, one at most goes on for more than 8 tokens
        for n in range(20 - len(state.waiting)):
            state.add(request(4, 60 if n == 3 else 8, name=f"{k}.{n}"))
        step(state, policy, 0.02 * k)
        stood.update(r.request_id for r in state.running if r.num_generated_tokens == 16)
        past |= {r.request_id for r in state.running if r.num_generated_tokens > 16}
    assert max(stood[each] for each in past) >= 3, "it takes 3.2 to go on into the second segment, from token 16 on"
    aborted = finished(1, 9, 10**6)
    aborted.finish_reason = FinishReason.ABORT
    policy.finished(aborted, 0.0)
    assert list(policy._lengths)[:100] == [8] * 50 + [100] * 50 and 9 not in policy._lengths


@pytest.mark.parametrize(("mode", "room"), [("hidden", 9), ("kv", 4)])
def test_waiting_policies_know_for_how_many_of_mean_length_there_is_room(mode, room):
    state, policy = make_state(40, 4, max_num_seqs=64, mode=mode, watermark=2), made("wait", TINY, predictor=Known())
    state.add(request(12, 20))
    state.add(request(18, 20))  # 15 tokens in the mean: four pages of 38 blocks
    policy.schedule(state, 0.0)
    assert policy._room(state) == room


@pytest.mark.parametrize("name", ["wait", "nested-wait"])
def test_waiting_policies_end_every_request_and_sleep_between(name):
    requests = [request(5 + k % 7, 3 + k % 9, 0.4 * k) for k in range(20)]
    plans = serve(make_state(60, 4), made(name, TINY), requests)
    times = [now for now, _ in plans]
    assert max(np.diff(times)) > 0.2


def test_the_simulator_sleeps_as_long_as_a_policy_says_and_wakes_for_an_arrival():
    slept = []
    policy = made("wait:force_after_s=0.7", TINY)
    arrivals = [Arrival(0.0, 8, 200), Arrival(20.0, 8, 2)]
    outcome = simulate(
        arrivals, policy, cost_model=TINY, num_blocks=100, limits=make_state(100).limits, slo=Slo(), max_model_len=512,
        on_plan=lambda plan, now: slept.append(now),
    )  # fmt: skip
    gaps = np.diff(slept)
    assert outcome.is_complete and gaps.max() == pytest.approx(0.7, abs=0.01)
    assert any(abs(now - 20.0) < 1e-9 for now in slept), "the second one is served when it comes"


class Sleeper:
    """Never plans anything."""

    def schedule(self, state, now):
        return Plan(wake_at_s=now + 1.0)

    def finished(self, request, now):
        raise AssertionError


def test_a_policy_that_only_sleeps_is_stuck():
    with pytest.raises(Stalled):
        simulate([Arrival(0.0, 8, 2)], Sleeper(), cost_model=TINY, num_blocks=100, limits=make_state(100).limits)
    idling = Idling()
    assert idling.accepts(Plan(wake_at_s=2.0), 1.0) and idling.left_s(1.5) == 0.5 and idling.left_s(9.0) == 0
    assert not idling.accepts(Plan(wake_at_s=1.0), 1.0) and not idling.accepts(Plan(), 1.5)
    assert not idling.accepts(Plan(wake_at_s=99.0), 1.0 + MOST_IDLE_S)
    idling.end()
    assert idling.accepts(Plan(wake_at_s=99.0), 1.0 + MOST_IDLE_S), "somebody came"


# -- semi-PD --------------------------------------------------------------------------------------------------------


def ended(policy, ttft, tpot, count=20):
    """`count` requests that took so many times their SLOs of 1 s, and one that was quick."""
    for a, b in [(ttft, tpot)] * count + [(0.1, 0.1)] * 3:
        one = request(8, 3, slo=Slo(1.0, 1.0))
        one.first_token_s, one.last_token_s, one.output_token_ids = a, a + 2 * b, [5, 5, 5]
        policy.finished(one, 0.0)


@pytest.mark.parametrize(
    ("ttft", "tpot", "change"), [(2.0, 0.5, 1), (0.5, 2.0, -1), (0.5, 0.5, 0), (2.0, 2.0, 0)]
)  # fmt: skip
def test_semi_pd_raises_the_share_of_the_one_that_misses(ttft, tpot, change):
    state, policy = make_state(), made("semi-pd", A100)
    policy.schedule(state, 0.0)
    ended(policy, ttft, tpot)
    policy.schedule(state, 9.0)
    assert policy.shares.share == 0.5, "not before the window is over"
    policy.schedule(state, 10.0)
    assert np.sign(policy.shares.share - 0.5) == change
    if change > 0:  # (2 - 0.1) * 0.5 / x + 0.1 <= 1 from x = 1.06 on, which is more than there is
        assert policy.shares.share == pytest.approx(0.95)


def test_semi_pd_raises_a_share_by_as_many_steps_as_its_estimate_asks_for():
    state, policy = make_state(), made("semi-pd", A100)
    policy.schedule(state, 0.0)
    ended(policy, 1.1, 0.5)  # (1.1 - 0.1) * 0.5 / x + 0.1 <= 1 from x = 0.556 on
    policy.schedule(state, 10.0)
    assert policy.shares.share == pytest.approx(0.6)
    policy = made("semi-pd", A100)
    policy.schedule(state, 0.0)
    ended(policy, 0.5, 1.2)  # (1.2 - 0.1) * 0.5 / y + 0.1 <= 1 from y = 0.611 on
    policy.schedule(state, 10.0)
    assert policy.shares.share == pytest.approx(0.35)


def test_semi_pd_gives_prompts_their_share_of_an_iterations_seconds():
    """As many seconds as the decodes at a half, a third of them at a quarter."""
    sizes = {}
    for share in (0.25, 0.5):
        state = make_state(999, 16, max_num_seqs=8, tokens=2048)
        policy = made(f"semi-pd:share={share}", A100)
        state.add(request(16, 50, name="talks"))
        step(state, policy, 0.0)
        state.add(request(1900, 2, name="long"))
        plan = step(state, policy, 0.03)
        assert names(plan.scheduled) == ["talks", "long"]
        sizes[share] = plan.scheduled[1].num_tokens
    assert sizes[0.5] == pytest.approx(3 * sizes[0.25], rel=0.03)
