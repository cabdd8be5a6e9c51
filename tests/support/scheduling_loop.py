"""A driver for policy tests: a fixed iteration time, and every invariant checked after every plan."""

from apt_jax.cache import BlockPool
from apt_jax.request import Request, SamplingParams, Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.idling import Idling
from apt_jax.scheduling.state import MOST_FETCHED_BLOCKS, Limits, SchedulerState

TINY = CostModel(MODELS["opt-125m"], HARDWARE["h200"])
PARAMS = SamplingParams(max_tokens=None, ignore_eos=True)


def request(prompt=8, output=4, arrival_s=0.0, slo=None, priority=0, name=None, user=None):
    return Request(
        name or f"p{prompt}o{output}@{arrival_s:g}", range(prompt), PARAMS, arrival_s, output,
        slo=slo or Slo(), priority=priority, user=user,
    )  # fmt: skip


def make_state(num_blocks=16, block_size=4, max_num_seqs=8, tokens=64, mode="kv", watermark=0, pool=BlockPool):
    return SchedulerState(pool(num_blocks, block_size), Limits(max_num_seqs, tokens, mode, watermark))


def step(state, policy, now, seconds=0.03):
    """One iteration, checked; returns its plan."""
    plan = policy.schedule(state, now)
    limits = state.limits
    assert plan.num_tokens <= limits.max_num_batched_tokens
    named = [r for w in plan.waited for r in w.requests]
    spans = state.apply(plan, now)
    state.check()
    check_moves(state)
    assert len(state.running) <= limits.max_num_seqs
    assert len({id(s.request) for s in spans}) == len(spans)
    assert not {id(s.request) for s in spans} & {id(r) for r in named}, "planned to wait and to run"
    state.keep(state.written(spans))
    for span in spans:
        if span.samples and state.commit(span.request, 5, now + seconds) is not None:
            policy.finished(span.request, now + seconds)
    state.check()
    return plan


def check_moves(state):
    """Copies go to blocks that somebody begins with, or, beside the iteration, to such as nobody holds."""
    moves = state.take_moves()
    held = {block for r in state.running for blocks in r.table.blocks for block in blocks}
    restored, fetched = ([block for _, block in pairs] for pairs in (moves.restored, moves.fetched))
    assert set(restored) <= held and not set(fetched) & held
    assert len({*restored, *fetched}) == len(restored) + len(fetched) and len(fetched) <= MOST_FETCHED_BLOCKS
    return moves


def serve(state, policy, requests, seconds=0.03, max_steps=20_000):
    """Serve all to the end; returns (now, plan) of every iteration. Fails on an idle plan, unless it is on purpose."""
    idling = Idling()
    now, plans, coming = 0.0, [], sorted(requests, key=lambda r: r.arrival_s)
    while coming or state.num_unfinished:
        while coming and coming[0].arrival_s <= now:
            state.add(coming.pop(0))
        if not state.num_unfinished:
            now = coming[0].arrival_s
            continue
        plan = step(state, policy, now, seconds)
        if plan.is_empty and idling.accepts(plan, now):
            now = min([plan.wake_at_s, *(r.arrival_s for r in coming[:1])])
            continue
        idling.end()
        assert plan.scheduled, f"nothing ran at {now}: {len(state.waiting)} wait, {len(state.running)} run"
        plans.append((now, plan))
        now += seconds
        assert len(plans) < max_steps, "no end in sight"
    assert state.pool.num_free == state.pool.num_blocks
    return plans
