"""The bound on a late request's wait (`facts/lateness.py`): long prompts under a flood that never ends.

Every iteration takes as long as the cost model says. In each of them the oldest eligible request must get on, and none
may be longer than promised.
"""

from dataclasses import replace

import numpy as np
import pytest

from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.step_load import StepLoad, step_load
from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from tests.support.apt_plans import decide
from tests.support.scheduling_loop import make_state, request, step
from tests.support.tiny_states import run, wait

A100 = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], "one-pass")
MODELS_HERE = (A100, replace(A100, hidden_mode="recompute"), CostModel(MODELS["opt-13b"], HARDWARE["h200"]))
FLOOD = 24  # requests that wait at any time, most of them in time
SEATS = 12
LEAST_TOKENS = 16  # that the oldest computes of its prompt in an iteration


def in_time(policy):
    """Those of the last decision that it did not take for late; all, if it took all for late."""
    view, _ = policy._decided
    queues = (view.waiting, view.late_w), (view.running, view.late_r)
    everyone = [(r, late) for queue, lates in queues for r, late in zip(queue.requests, lates, strict=True)]
    return [r for r, late in everyone if not late] or [r for r, _ in everyone]


def longest_s(model, plan, load, binding):
    """What `budget.py` promises for an iteration by the promises of `binding` requests, and what it does not count."""
    promise_s = min(r.slo.ttft_s for r in binding)
    prefix_s = 0.0
    for entry in plan.scheduled:
        request, tokens = entry.request, min(LEAST_TOKENS, entry.num_tokens)
        computed = request.num_computed_tokens - entry.num_tokens  # the plan has been applied
        if entry.reason is Reason.DECODES and request in binding:
            promise_s = min(promise_s, request.slo.tbt_s)
        elif entry.reason is not Reason.DECODES and computed and not prefix_s:  # of the first chunk
            prefix_s = model.prefix_s(entry.kind, tokens, computed)
    alone = replace(load, prefill_tokens=0, prefill_pairs=0, samples=load.decode_requests, chunks=())
    alone_s = model.step_s(alone if load.decode_requests else StepLoad(1))
    least_s = alone_s + LEAST_TOKENS * model.token_s + prefix_s
    uncounted_s = load.prefill_pairs * model.pair_s + load.samples * model.logits_s
    uncounted_s += model.mixing_s(load) - model.mixing_s(alone)
    return max(promise_s / 4, 2 * alone_s, least_s) + uncounted_s


def serve_late_ones(seed):
    rng = np.random.default_rng(seed)
    model, mode = MODELS_HERE[seed % 3], ("kv", "hybrid", "hidden")[seed // 3 % 3]
    slos = [Slo(float(rng.choice([0.3, 1.0, 5.0])), float(rng.choice([0.05, 0.2, 1.0]))) for _ in range(3)]
    options = f"apt:patience_s=2:lane_share={rng.choice([0, 0.3, 1])}:mixed={'off' if seed % 5 == 0 else 'on'}"
    policy = make_policy(options, PolicyContext(model))
    state = make_state(int(rng.integers(160, 500)), 16, SEATS, int(rng.choice([SEATS + 16, 256, 2048])), mode)

    def draw(now, name, most_output):
        prompt, output = int(rng.integers(300, 1200)), int(rng.integers(1, most_output))
        return request(prompt, output, now, slos[int(rng.integers(3))], name=name)

    late = [draw(-30.0, f"late{k}", 12) for k in range(int(rng.integers(1, 4)))]
    for r in late:
        state.add(r)
    bound = sum(-(-r.num_prompt_tokens // LEAST_TOKENS) + r.max_new_tokens for r in late)
    now, iterations = 0.0, 0
    while oldest := next((r for r in late if r.finish_reason is None), None):
        for k in range(FLOOD - len(state.waiting)):
            state.add(draw(now, f"fresh{iterations}.{k}", 40))
        plan = policy.schedule(state, now)
        binding = in_time(policy)
        left = oldest.num_uncomputed_tokens
        spans = state.apply(plan, now)
        load = step_load(plan, spans)
        seconds = model.step_s(load)
        assert seconds <= longest_s(model, plan, load, binding) * (1 + 1e-9)
        computed = {s.request.request_id: s.num_tokens for s in spans}.get(oldest.request_id, 0)
        assert computed >= min(LEAST_TOKENS, left), (iterations, oldest.request_id, left)
        now += seconds
        for span in spans:
            if span.samples and state.commit(span.request, 5, now) is not None:
                policy.finished(span.request, now)
        iterations += 1
    assert iterations <= bound


@pytest.mark.parametrize("seed", range(120))
def test_the_oldest_late_one_gets_on_in_every_iteration_however_long_the_prompts(seed):
    serve_late_ones(seed)


def test_in_the_lane_the_oldest_comes_first_even_if_another_has_begun():
    """16 tokens beside one decode: for the older one, which waits, and not for the prompt under way."""
    for options in ("", ":paced=off", ":mixed=off"):
        state = make_state(400, tokens=17)
        wait(state, "older", 40, arrival_s=-40.0)
        run(state, "begun", 40, computed=20, arrival_s=-30.0)
        run(state, "talker", 7)
        plan = decide(state, 0.5, f"apt:prediction=off:lane_share=1{options}")
        assert [line for line in plan if line.startswith("run")] == [
            "run talker 1 kv DECODES", "run older 16 kv ADMITTED_LONGEST_LATE",
        ]  # fmt: skip


def test_the_lane_comes_before_the_most_urgent_prompt():
    """20 tokens are left beside the decode: 16 of the lane's prompt in time to come, 4 of the urgent one."""
    state = make_state(400, tokens=21)
    run(state, "urgent", 40, computed=20, arrival_s=0.0)
    run(state, "old", 40, computed=24, arrival_s=-30.0)
    run(state, "talker", 7)
    assert decide(state, 0.5) == [
        "run talker 1 kv DECODES", "run old 16 kv CONTINUES_PREFILL", "run urgent 4 kv CONTINUES_PREFILL",
    ]  # fmt: skip


def test_a_stream_that_broke_its_promise_stands_until_its_patience_is_over_and_then_gets_on():
    """More requests than seats: one gap of 1.5 s at 2.1 s, its seat goes to those in time, and comes back at 4 s."""
    policy = make_policy("apt:patience_s=4", PolicyContext(A100))
    state = make_state(1000, 64, 4, 512)
    stream = request(20, 100, 0.0, Slo(1.0, 0.1), name="stream")
    state.add(stream)
    tokens_s, now, others = [], 0.0, 0
    while stream.finish_reason is None:
        while others * 0.2 <= now:  # three times as many as four seats serve
            state.add(request(20, 60, now, Slo(1.0, 1.0), name=f"other{(others := others + 1)}"))
        before = len(stream.output_token_ids)
        step(state, policy, now)
        tokens_s += [now] * (len(stream.output_token_ids) - before)
        now += 1.5 if now == pytest.approx(2.1) else 0.03
    gaps = np.diff(tokens_s)
    stands = int(gaps.argmax())
    assert tokens_s[stands] == pytest.approx(2.1) and 4.0 < tokens_s[stands + 1] < 4.1
    assert np.delete(gaps, stands) == pytest.approx(0.03)


@pytest.mark.parametrize("mode", ["kv", "hidden", "hybrid"])
@pytest.mark.parametrize(("options", "seats"), [("", 256), (":lane_share=1", 8), (":lane_share=1:prediction=off", 8)])
def test_a_lane_that_outgrows_the_pool_sends_its_newest_back(mode, options, seats):
    """80 blocks hold four requests when they enter, and two or one of them at their end. Before, blocks ran out."""
    state = make_state(80, 8, seats, 64, mode)
    policy = make_policy(f"apt:patience_s=1{options}", PolicyContext(A100))
    late = [request(8, 400 if mode == "hidden" else 250, -30.0 + k, name=f"late{k}") for k in range(4)]
    for each in late:
        state.add(each)
    now, ended, sent_back = 0.0, [], []
    while state.num_unfinished:
        plan = step(state, policy, now)
        ended += [each for each in late if each.finish_reason is not None and each not in ended]
        sent_back += [e.request for e in plan.preempted if e.reason is Reason.PREEMPTED_FOR_LONGEST_LATE]
        now += 0.03
        assert now < 120.0
    assert ended == late and late[0].num_preemptions == 0 and sent_back
    assert all(sent_back.count(each) <= number for number, each in enumerate(late))


@pytest.mark.parametrize("options", ["", ":convert=off"])
def test_one_of_the_lane_that_outgrows_the_pool_as_kv_begins_again_as_hidden(options):
    """12 blocks are 24 tokens as KV; all 35 are 9 blocks as hidden. Where hidden is far slower it has KV first.

    Ten iterations bring ten tokens each time: the first computes what is known, 15 or 25 tokens.
    """
    slow = type("Slow", (CostModel,), {"attention_s": (1e-9, 1e-2)})(MODELS["opt-13b"], HARDWARE["h200"])
    state = make_state(12, mode="hybrid")
    policy = make_policy(f"apt:patience_s=1{options}", PolicyContext(slow))
    old = request(15, 20, -5.0, name="old")
    state.add(old)
    kinds, now = [], 0.0
    while old.finish_reason is None:
        state.add(request(8, 2, now))
        plan = step(state, policy, now)
        kinds += [entry.kind.value for entry in plan.scheduled if entry.request is old]
        now += 0.03
        assert now < 3.0
    assert kinds == ["kv"] * 10 + ["hidden"] * 10
