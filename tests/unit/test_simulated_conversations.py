"""Conversations in the simulator: turns follow answers, beginnings are equal where they should be, and are cached."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason, Request, SamplingParams, Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.projection import least_projected_tokens
from apt_jax.scheduling.costs.step_load import step_load
from apt_jax.scheduling.plan_log import plan_dict
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.prefix_pool import PrefixPool
from apt_jax.scheduling.state import Limits, SchedulerState
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.requests.conversations import Conversations
from apt_jax.simulation.simulator import simulate
from apt_jax.simulation.workload import Arrival, Lengths, load_lengths

EOS, CONTEXT = 2, 2048
COST = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], "recompute")
FEW = Conversations(think_s=0.5)


def arrivals_of(shape=FEW, *, rate=4.0, seed=0, duration_s=10.0, table=None):
    return shape.arrivals(
        table, rate=rate, num_requests=1, cv=1.0, seed=seed, duration_s=duration_s, max_model_len=CONTEXT, slo=Slo()
    )


def served(arrivals, *, on, mode="kv", blocks=4000, policy="fcfs", **more):
    limits = Limits(64, 2048, mode, watermark_blocks=2)
    return simulate(
        arrivals, make_policy(policy, PolicyContext(COST, seed=3)), cost_model=COST, num_blocks=blocks, limits=limits,
        prefix_caching=on, **more,
    )  # fmt: skip


def test_each_turn_repeats_the_turns_before_it_and_all_conversations_share_their_beginning():
    first, second = arrivals_of()[:2]
    prompts = [[list(turn.token_ids(k, CONTEXT)[0]) for k, turn in enumerate(a.turns)] for a in (first, second)]
    for arrival, sent in zip((first, second), prompts, strict=True):
        assert len(sent) == 4 and [len(p) for p in sent] == [t.prompt_tokens for t in arrival.turns]
        for turn, before, after in zip(arrival.turns, sent, sent[1:], strict=False):
            answer = range(turn.token_ids(0, CONTEXT)[1], turn.token_ids(0, CONTEXT)[1] + turn.output_tokens)
            assert after[: len(before) + len(answer)] == [*before, *answer]
            assert 120 <= len(after) - len(before) - len(answer) <= 160
    assert prompts[0][0][:500] == prompts[1][0][:500]
    assert not set(prompts[0][3][500:]) & set(prompts[1][3][500:])


def test_plain_requests_share_no_token():
    arrivals = [Arrival(float(k), 40, 3) for k in range(3)]
    ids = [set(arrival.token_ids(k, CONTEXT)[0]) for k, arrival in enumerate(arrivals)]
    assert all(len(own) == 40 for own in ids) and not (ids[0] & ids[1] or ids[1] & ids[2] or ids[0] & ids[2])
    assert all(r.num_cached_tokens == 0 for r in served(arrivals, on=True).requests)


def test_a_turn_comes_after_its_think_time_and_computes_only_what_is_new():
    chain = Arrival(0.5, 130, 20, None, 2048, 0, Arrival(2.0, 200, 30, None, 2048))
    alone, cached = (served([chain], on=on).requests for on in (False, True))
    for first, second in (alone, cached):
        assert second.arrival_s == first.last_token_s + 2.0 and len(second.gaps_s) == 29
    assert [r.num_cached_tokens for r in alone] == [None, None]
    # 130 and 19 tokens of the answer were computed: 9 pages of 16
    assert [r.num_cached_tokens for r in cached] == [0, 144]
    assert cached[0].ttft_s == alone[0].ttft_s and cached[1].ttft_s < 0.8 * alone[1].ttft_s


@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_what_a_quiet_server_caches_of_conversations_is_all_but_the_newest_pages(mode):
    requests = served(arrivals_of(rate=0.5, duration_s=100.0), on=True, mode=mode, blocks=40_000).requests
    turns = Counter(r.class_name for r in requests)
    assert len(turns) == 4 and len(set(turns.values())) == 1
    assert [r.num_cached_tokens for r in requests][:1] == [0]
    for request in requests[1:]:
        if request.class_name == "turn 1":
            assert request.num_cached_tokens == 496, "31 pages of the 500 tokens that all share"
        else:  # a question, part of a page, and the answer's last token
            assert 120 <= request.num_prompt_tokens - request.num_cached_tokens <= 160 + 16


def test_a_refused_turn_is_followed_by_the_next_one_all_the_same():
    chain = Arrival(0.0, 130, 20, None, 2048, 0, Arrival(1.0, 200, 30, None, 2048))
    outcome = served([replace(chain, first_token_id=2048 * k) for k in range(1, 4)], on=True, max_num_queued_reqs=1)
    assert len(outcome.requests) == 6 and outcome.is_complete
    # of three at once two are refused; the turns after these come a second later, and one of them is refused
    assert [r.arrival_s for r in outcome.requests[:5]] == [0, 0, 0, 1, 1]
    assert [r.finish_reason is FinishReason.ERROR for r in outcome.requests] == [False, True, True, False, True, False]


def test_equal_seeds_begin_alike_and_a_table_s_conversations_end_before_the_context():
    table = load_lengths("sharegpt")
    shape = Conversations(turns=6, lengths="sharegpt")
    few, many = (shape.draw(n, table, seed=5, max_model_len=CONTEXT) for n in (20, 50))
    assert many[: len(few)] == few
    assert all(t.prompt_tokens + t.output_tokens <= CONTEXT for turns in many for t in turns)
    assert {len(turns) for turns in many} > {2, 6}


@pytest.mark.parametrize(
    "text", ["conversations:turns=0", "conversations:turns=x", "conversations:t=4", "conversations:"]
)
def test_a_bad_option_is_refused(text):
    with pytest.raises(ValueError, match=r"turns=0 must be|must be a number|known, with defaults: turns=4"):
        Conversations.parse(text)


def test_conversations_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match="have up to 2620, and the context is 2048; lower turns"):
        Experiment(workload="conversations:system_tokens=1500").arrivals(1.0)


def by_the_engine(arrivals, policy, limits, num_blocks):
    """The same simulation with `SchedulerState`, token by token; plans and requests."""
    state, plans, now = SchedulerState(PrefixPool(num_blocks, 16), limits), [], 0.0
    state.least_projected_tokens = least_projected_tokens(COST)
    coming, requests, turns = [(a.arrival_s, i, a) for i, a in enumerate(arrivals)], [], {}
    while coming or state.num_unfinished:
        if not state.num_unfinished:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            at_s, _, turn = coming.pop(0)
            prompt, _ = turn.token_ids(len(requests), CONTEXT)
            params = SamplingParams(max_tokens=None)
            requests.append(
                Request(
                    f"r{len(requests)}", list(prompt), params, at_s, CONTEXT - len(prompt), {EOS}, slo=turn.terms.slo
                )
            )
            turns[requests[-1].request_id] = turn
            state.add(requests[-1])
        plan = policy.schedule(state, now)
        if plan.is_empty:
            now = min([plan.wake_at_s, *(at_s for at_s, _, _ in coming[:1])])
            continue
        plans.append((now, plan_dict(0, now, plan)))
        spans = state.apply(plan, now)
        written = state.written(spans)
        now += COST.step_s(step_load(plan, spans, state.num_projected_tokens))
        for abandoned in plan.abandoned:
            policy.finished(abandoned.request, now)
        state.keep(written)
        for span in spans:
            turn = turns[span.request.request_id]
            made = len(span.request.output_token_ids) + 1
            token = EOS if made >= turn.output_tokens else turn.token_ids(0, CONTEXT)[1] + made - 1
            if span.samples and state.commit(span.request, token, now) is not None:
                policy.finished(span.request, now)
                if turn.then is not None:
                    coming.append((now + turn.then.arrival_s, len(arrivals) + len(coming), turn.then))
                    coming.sort(key=lambda entry: entry[0])
        state.check()
    return plans, requests, state


@pytest.mark.parametrize("mode", ["hybrid", "kv", "hidden"])
@pytest.mark.parametrize("policy", policy_names())
def test_with_a_prefix_cache_columns_do_what_the_engine_s_state_does(policy, mode):
    shape = Conversations(turns=3, system_tokens=40, think_s=0.3, lengths="table")
    table = Lengths("table", np.array([9, 30, 61]), np.array([2, 17, 40]))
    arrivals = arrivals_of(shape, rate=14.0, duration_s=4.0, table=table)
    limits = Limits(12, 160, mode, watermark_blocks=2)
    made = [make_policy(policy, PolicyContext(COST, seed=3)) for _ in range(2)]
    expected, requests, state = by_the_engine(arrivals, made[0], limits, 60)
    found = []
    outcome = simulate(
        arrivals, made[1], cost_model=COST, num_blocks=60, limits=limits, slo=Slo(), prefix_caching=True,
        on_plan=lambda plan, now: found.append((now, plan_dict(0, now, plan))),
    )  # fmt: skip
    assert found == expected
    fields = ("num_cached_tokens", "num_preemptions", "num_conversions", "ttft_s", "gaps_s", "cache_history")
    for simulated, request in zip(outcome.requests, requests, strict=True):
        assert {f: getattr(simulated, f) for f in fields} == {f: getattr(request, f) for f in fields}
    assert state.prefix_hits > 0.2 * state.prefix_queries
    assert state.pool.num_free == 60 and all(state.pool.num_held(kind) == 0 for kind in CacheKind)


@pytest.mark.parametrize(("policy", "mode"), [("sarathi", "hidden"), ("apt", "hybrid"), ("fcfs", "kv")])
def test_where_no_prompt_begins_like_another_and_nobody_is_preempted_the_cache_changes_nothing(policy, mode):
    """Some chunks are a single token of a newcomer, which is no decode."""
    found = []
    for caching in (False, True):
        experiment = Experiment(
            num_requests=1, duration_s=60.0, max_num_batched_tokens=96, num_blocks=20_000,
            enable_prefix_caching=caching,
        )  # fmt: skip
        found.append(experiment.run(policy, mode, "one-pass", 3.0)[1].as_dict())
    assert found[0] == found[1] and found[0]["preemptions"] == 0
