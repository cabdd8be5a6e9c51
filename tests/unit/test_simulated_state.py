"""The simulator's columns against the engine's state: every policy, plan by plan and request by request."""

import numpy as np
import pytest

from apt_jax.cache import BlockPool
from apt_jax.request import Request, SamplingParams, Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.step_load import step_load
from apt_jax.scheduling.plan_log import plan_dict
from apt_jax.scheduling.policies.catalogue import make_policy, policy_names
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.progress import progress_of
from apt_jax.scheduling.state import Limits, SchedulerState
from apt_jax.simulation.requests.columns import Columns, SimulatedRequest
from apt_jax.simulation.simulator import simulate
from apt_jax.simulation.workload import Arrival

EOS, TOKEN = 2, 5
COST = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], "recompute")
FIELDS = (
    "status", "finish_reason", "num_prompt_tokens", "num_generated_tokens", "num_tokens", "num_computed_tokens",
    "num_uncomputed_tokens", "is_decoding", "is_exhausted", "num_preemptions", "num_conversions", "num_late_gaps",
    "num_stalls", "first_scheduled_s", "first_token_s", "last_token_s", "ttft_s", "gaps_s", "p99_gap_s",
    "longest_gap_s", "attained", "attained_strictly", "cache_history",
)  # fmt: skip


def by_the_engine(arrivals, policy, limits, num_blocks, slo):
    """The same simulation with `SchedulerState`, token by token; plans, loads' seconds, requests."""
    state, plans, now, coming = SchedulerState(BlockPool(num_blocks, 16), limits), [], 0.0, list(enumerate(arrivals))
    lengths, requests, params = [a.output_tokens for a in arrivals], [], SamplingParams(max_tokens=None)
    while coming or state.num_unfinished:
        if not state.num_unfinished:
            now = max(now, coming[0][1].arrival_s)
        while coming and coming[0][1].arrival_s <= now:
            number, a = coming.pop(0)
            prompt, _ = a.token_ids(number, 2048)
            requests.append(Request(f"r{number}", prompt, params, a.arrival_s, 2048 - len(prompt), {EOS}, slo))
            state.add(requests[-1])
        plan = policy.schedule(state, now)
        if plan.is_empty:
            now = min([plan.wake_at_s, *(a.arrival_s for _, a in coming[:1])])
            continue
        plans.append((now, plan_dict(0, now, plan)))
        spans = state.apply(plan, now)
        progress, running = state.running_progress(), list(state.running)
        assert progress.tokens.tolist() == [r.num_tokens for r in running]
        assert progress.is_decoding.tolist() == [r.is_decoding for r in running]
        now += COST.step_s(step_load(plan, spans))
        for abandoned in plan.abandoned:
            policy.finished(abandoned.request, now)
        for span in spans:
            last = len(span.request.output_token_ids) + 1 >= lengths[span.request.order]
            if span.samples and state.commit(span.request, EOS if last else TOKEN, now) is not None:
                policy.finished(span.request, now)
    return plans, requests


@pytest.mark.parametrize("mode", ["hybrid", "kv", "hidden"])
@pytest.mark.parametrize("policy", policy_names())
def test_columns_do_what_the_engine_s_state_does(policy, mode):
    rng = np.random.default_rng(11)
    times = np.cumsum(rng.exponential(0.09, 50))
    arrivals = [Arrival(float(t), int(rng.integers(3, 250)), int(rng.integers(1, 90))) for t in times]
    limits, slo = Limits(12, 160, mode, watermark_blocks=2), Slo(0.4, 0.05, 0.06)
    made = [make_policy(policy, PolicyContext(COST, seed=3)) for _ in range(2)]
    expected, requests = by_the_engine(arrivals, made[0], limits, 90, slo)
    found = []
    outcome = simulate(
        arrivals, made[1], cost_model=COST, num_blocks=90, limits=limits, slo=slo,
        on_plan=lambda plan, now: found.append((now, plan_dict(0, now, plan))),
    )  # fmt: skip
    assert found == expected
    for simulated, request in zip(outcome.requests, requests, strict=True):
        assert {f: getattr(simulated, f) for f in FIELDS} == {f: getattr(request, f) for f in FIELDS}
        assert len(simulated.output_token_ids) == len(request.output_token_ids)
    # these leave room as long as they have measured lengths
    preempts = policy != "wait" and (policy, mode) != ("nested-wait", "kv")
    assert (sum(r.num_preemptions for r in requests) > 0) == preempts, "the pool was meant to be too small"


def test_columns_grow_and_a_request_s_gaps_are_those_between_its_own_tokens():
    columns, params = Columns(capacity=2), SamplingParams(max_tokens=None)
    requests = [SimulatedRequest(f"r{k}", range(5 + k), params, 0.0, 50, slo=Slo(1.0, 0.5)) for k in range(5)]
    for order, request in enumerate(requests):
        request.order = order
        columns.add(request, 3)
        request.num_inflight_tokens = 1
    columns.commit(np.array([0, 4]), 1.0)
    columns.commit(np.array([4, 1]), 1.25)
    columns.commit(np.array([4, 0]), 3.0)
    assert [r.gaps_s for r in requests] == [[2.0], [], [], [], [0.25, 1.75]]
    assert [r.num_late_gaps for r in requests] == [1, 0, 0, 0, 1]
    assert [r.first_token_s for r in requests] == [1.0, 1.25, None, None, 1.0]
    assert [r.num_prompt_tokens for r in requests] == [5, 6, 7, 8, 9]
    assert requests[4].longest_gap_s == 1.75 and requests[2].longest_gap_s == 0.0


def test_progress_gathered_from_requests_has_none_as_not_a_number():
    waiting = Request("a", range(4), SamplingParams(), 0.0, 9)
    found = progress_of([waiting])
    assert np.isnan(found.first_token_s).all() and np.isnan(found.last_token_s).all()
    assert (found.pages.tolist(), found.kind.tolist(), found.is_decoding.tolist()) == ([0], [0], [False])
