"""Pages that are copied back ahead of need, beside an iteration: what a plan may ask for, and which policies do."""

import random

import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason
from apt_jax.scheduling.abandonment import give_up
from apt_jax.scheduling.host_tier import HostTier
from apt_jax.scheduling.plan import Fetched, Plan, Preempted, Reason, Scheduled
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.swap_in import MOST_PUT_OFF, SwapIn
from apt_jax.scheduling.prefix_pool import PrefixPool
from apt_jax.scheduling.state import MOST_FETCHED_BLOCKS
from tests.support.scheduling_loop import TINY, check_moves, make_state, request, step

HIDDEN, KV = CacheKind.HIDDEN, CacheKind.KV


def state_of(num_blocks=40, *, mode="hidden", seats=8, slots=400, block_s=None, watermark=0):
    return make_state(
        num_blocks, 4, seats, 400, mode, watermark,
        pool=lambda blocks, size: PrefixPool(blocks, size, host=HostTier(slots, block_s=block_s)),
    )  # fmt: skip


def asked(begins, tokens, name, output=40, priority=0):
    made = request(tokens, output, name=name, priority=priority)
    made.prompt_token_ids = range(1000 * begins, 1000 * begins + tokens)
    return made


def admit(state, *requests, kind=HIDDEN):
    """Serve them in one iteration, which generates a token of each."""
    for each in requests:
        if each.order < 0:
            state.add(each)
    entries = (Scheduled(r, state.tokens_to_compute(r, kind), kind, Reason.ADMITTED_HIDDEN) for r in requests)
    run(state, Plan(tuple(entries)))


def run(state, plan, now=0.0):
    spans = state.apply(plan, now)
    moves = check_moves(state)
    state.keep(state.written(spans))
    for span in spans:
        if span.samples:
            state.commit(span.request, 5, now + 0.1)
    state.check()
    return moves


def decode(*requests, fetched=(), preempted=()):
    return Plan(
        tuple(Scheduled(r, 1, r.table.kind, Reason.DECODES) for r in requests),
        preempted=tuple(Preempted(r, Reason.PREEMPTED_NO_BLOCKS) for r in preempted), fetched=tuple(fetched),
    )  # fmt: skip


def fetch(who, blocks, kind=HIDDEN):
    return Fetched(who, kind, blocks, Reason.FETCHED_AHEAD)


def moved_away(state):
    """A request whose ten pages are all in host memory, and one that runs and holds ten blocks; the others are free."""
    away, runs = asked(1, 40, "away"), asked(2, 36, "runs")
    admit(state, away, runs)
    run(state, decode(runs, preempted=[away]))
    admit(state, fills := asked(3, 4 * state.pool.num_free, "fills", output=1))
    assert fills.finish_reason is not None and state.blocks_away(away, HIDDEN) == 10
    return away, runs


def test_fetched_pages_are_free_blocks_with_which_their_request_begins():
    state = state_of()
    away, runs = moved_away(state)
    free = state.pool.num_free
    moves = run(state, decode(runs, fetched=[fetch(away, 999)]))
    assert len(moves.fetched) == 10 and not moves.restored
    assert state.pool.num_free == free and state.blocks_away(away, HIDDEN) == 0, "held by nobody"
    assert state.idle_blocks(away, HIDDEN) == 10 == state.blocks_to_admit(away, HIDDEN) - 1
    entry = Scheduled(away, away.num_tokens - 40, HIDDEN, Reason.ADMITTED_HIDDEN)
    assert not run(state, Plan((entry,))).restored
    assert away.num_computed_tokens == 41


def test_they_come_in_parts_from_the_first_page_on_and_stay_in_host_memory():
    state = state_of()
    away, runs = moved_away(state)
    for part in (3, 6):
        run(state, decode(runs, fetched=[fetch(away, 3)]))
        pages = state.pool.find(away, HIDDEN, 10)
        assert [hasattr(page, "blocks") for page in pages] == [True] * part + [False] * (10 - part)
    assert all(state.pool.host.find(key, HIDDEN) for key in away.page_keys[:10])


@pytest.mark.parametrize(("kind", "asked_for", "come"), [(HIDDEN, 5, 5), (KV, 5, 4), (HIDDEN, 0, 0), (HIDDEN, 500, 64)])
def test_no_more_blocks_come_than_the_plan_says_and_beside_one_iteration(kind, asked_for, come):
    state = state_of(400, mode="hybrid")
    away, runs = asked(1, 390, "away", output=2), asked(2, 36, "runs")
    for each in (away, runs):
        admit(state, each, kind=kind)
    run(state, decode(runs, preempted=[away]))
    admit(state, asked(3, 399, "fills", output=1), kind=KV)
    admit(state, asked(4, 399, "fills too", output=1), kind=KV)
    assert state.blocks_away(away, kind) >= 97
    assert len(run(state, decode(runs, fetched=[fetch(away, asked_for, kind)])).fetched) == come
    assert MOST_FETCHED_BLOCKS == 64


def test_they_take_what_the_plan_leaves_free_and_go_when_it_is_needed():
    state = state_of()
    away, runs = moved_away(state)
    big = asked(4, 100, "big", output=9)  # 25 of 30 free blocks
    state.add(big)
    plan = Plan((Scheduled(big, 100, HIDDEN, Reason.ADMITTED_HIDDEN),), fetched=(fetch(away, 99),))
    left = state.pool.num_free - 25
    assert len(run(state, plan).fetched) == left and state.pool.num_free == left
    for _ in range(40):  # both grow until there is nothing left
        if state.pool.num_free < 2 or big.finish_reason:
            break
        run(state, decode(runs, *([] if big.finish_reason else [big])))
    assert state.blocks_away(away, HIDDEN) > 10 - left, "evicted, with its copies where they were"
    state.finish(runs, FinishReason.ABORT)
    state.finish(big, FinishReason.ABORT)
    state.check()
    assert state.pool.num_free == 40


def test_they_are_evicted_after_all_other_pages_that_nobody_holds():
    state = state_of(60)
    away, runs = moved_away(state)
    run(state, decode(runs, fetched=[fetch(away, 99)]))
    admit(state, asked(5, 40, "later", output=1))  # released after these came
    run(state, decode(runs, fetched=[fetch(away, 0)]))  # still wanted
    admit(state, asked(6, 4 * state.pool.num_free - 48, "fills", output=1))
    assert state.blocks_away(away, HIDDEN) == 0 and state.blocks_away(asked(5, 40, "again"), HIDDEN) > 0


@pytest.mark.parametrize("how", ["ends", "is preempted for", "reset"])
def test_nothing_is_lost_when_their_request_ends_or_others_need_the_blocks(how):
    state = state_of()
    away, runs = moved_away(state)
    run(state, decode(runs, fetched=[fetch(away, 99)]))
    if how == "ends":
        state.finish(away, FinishReason.ABORT)
    elif how == "reset":
        state.forget_prefixes()
        assert state.blocks_away(away, HIDDEN) == state.idle_blocks(away, HIDDEN) == 0
    else:
        admit(state, asked(7, 110, "wants all", output=1))
        assert state.blocks_away(away, HIDDEN) > 0
    state.check()
    assert state.pool.num_free == 40 - runs.table.num_blocks


def test_pages_whose_copies_failed_are_forgotten():
    state = state_of()
    away, runs = moved_away(state)
    state.apply(decode(runs, fetched=[fetch(away, 8)]), 0.0)
    state.forget_fetched(state.take_moves())
    state.check()
    assert state.cached_tokens(away, HIDDEN) == 0, "its first pages are nowhere"


def test_who_runs_cannot_be_fetched_and_pages_alone_are_no_plan():
    state = state_of()
    away, runs = moved_away(state)
    assert Plan(fetched=(fetch(away, 9),)).is_empty
    with pytest.raises(AssertionError, match="runs is fetched but does not wait"):
        state.apply(decode(runs, fetched=[fetch(runs, 9)]), 0.0)


def test_plans_say_what_they_fetch():
    state = state_of()
    away, runs = moved_away(state)
    plan = decode(runs, fetched=[fetch(away, 7)])
    run(state, plan)
    assert ("fetched", away, Reason.FETCHED_AHEAD) in plan.decisions()
    shown = state.plans.as_dicts()[-1]
    assert shown["fetched"] == [
        {"request": "away", "blocks": 7, "cache": "hidden", "reason": Reason.FETCHED_AHEAD.value}
    ]
    assert any("copied back ahead" in phrase for phrase in shown["summary"])


@pytest.mark.parametrize(("reason", "abandoned"), [(Reason.FETCHED_AHEAD, True), (Reason.FETCHED_BESIDE, False)])
def test_who_is_overdue_is_abandoned_unless_it_goes_on_next(reason, abandoned):
    state = state_of()
    away, runs = moved_away(state)
    plan = give_up(decode(runs, fetched=[Fetched(away, HIDDEN, 9, reason)]), state, 99.0, 1.0)
    assert [entry.request for entry in plan.abandoned] == [away] * abandoned
    run(state, plan)


# -- what policies do with it ---------------------------------------------------------------------------------------

POLICIES = ["alise", "apt:prediction=off", "fastserve", "fastswitch"]


def returning(policy, block_s=None, **options):
    """A policy that has a preempted request with all its pages in host memory to admit, beside one that decodes."""
    state = state_of(60, block_s=block_s, **options)
    made = make_policy(policy, PolicyContext(TINY))
    away, runs = moved_away(state)
    for each in (away, runs):  # all promises can be kept
        each.slo = type(each.slo)(99.0, 99.0)
    return state, made, away, runs


@pytest.mark.parametrize("policy", POLICIES)
def test_an_admission_waits_for_its_pages_while_others_run(policy):
    state, made, away, runs = returning(policy)
    plan = step(state, made, 0.2)
    assert [(e.request, e.reason) for e in plan.fetched] == [(away, Reason.FETCHED_BESIDE)]
    assert [e.request for e in plan.scheduled] == [runs] and away.table is None
    made_next = made.schedule(state, 0.24)
    assert away in [e.request for e in made_next.scheduled] and not made_next.fetched
    assert not run(state, made_next, 0.24).restored and away.num_computed_tokens > 40


@pytest.mark.parametrize("policy", POLICIES)
def test_without_it_the_copies_come_before_the_iteration(policy):
    state, made, away, _runs = returning(f"{policy}:fetch=off")
    plan = made.schedule(state, 0.2)
    assert away in [e.request for e in plan.scheduled] and not plan.fetched
    assert len(run(state, plan, 0.2).restored) == 10


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_waits_for_pages_if_nobody_else_runs(policy):
    state, made, away, runs = returning(policy)
    state.finish(runs, FinishReason.ABORT)
    plan = made.schedule(state, 0.2)
    assert [e.request for e in plan.scheduled] == [away] and not plan.fetched


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_is_put_off_for_ever(policy):
    """Its pages are thrown out each time before it can join."""
    state, made, away, _ = returning(policy)
    for k in range(40):
        plan = step(state, made, 0.2 + 0.04 * k)
        if any(entry.request is away for entry in plan.scheduled):
            break
        for page in list(state.pool._idle.values()):
            state.pool._unlist(page)
            state.pool._drop_idle(page)
    assert k == MOST_PUT_OFF


def test_as_much_comes_in_an_iteration_as_is_copied_while_it_lasts():
    """40 ms and 10 ms a block: four blocks each; the last two are copied sooner than another iteration ends."""
    state, made, away, _runs = returning("fastswitch", block_s=0.01)
    made.schedule(state, 0.16)
    counts = []
    for k in range(5):
        plan = made.schedule(state, 0.2 + 0.04 * k)
        moves = run(state, plan, 0.2 + 0.04 * k)
        counts.append((len(moves.fetched), len(moves.restored)))
        if away.table is not None:
            break
    assert counts == [(4, 0), (4, 0), (0, 2)]


@pytest.mark.parametrize(("block_s", "put_off"), [(0.005, True), (0.003, False)])
def test_it_is_put_off_if_the_others_would_wait_longer_for_it_than_it_for_them(block_s, put_off):
    """Ten blocks of 5 ms, or of 3, for one that runs, against an iteration of 40 ms."""
    state, made, away, _runs = returning("fastswitch", block_s=block_s)
    made.schedule(state, 0.16)
    plan = made.schedule(state, 0.2)
    assert bool(plan.fetched) == put_off == (away not in [e.request for e in plan.scheduled])


def test_who_comes_second_takes_no_memory_before_the_link_is_free():
    """Two that were preempted go before two that run; one iteration copies pages of the first only."""
    state = state_of(24, seats=4, block_s=0.01)
    made = make_policy("fastswitch:update_every=1")
    made._served, made._active = {(-1, None): 0.0, (1, None): 99.0}, {(-1, None), (1, None)}
    first, second = (asked(k, 40, f"away {k}", priority=-1) for k in (1, 2))
    admit(state, first, second)
    runs = [asked(k, 40, f"runs {k}", priority=1) for k in (3, 4)]
    for each in runs:
        state.add(each)
    entries = (Scheduled(r, 40, HIDDEN, Reason.ADMITTED_HIDDEN) for r in runs)
    preempted = tuple(Preempted(r, Reason.PREEMPTED_NO_BLOCKS) for r in (first, second))
    run(state, Plan(tuple(entries), preempted=preempted))
    assert state.blocks_away(first, HIDDEN) and state.blocks_away(second, HIDDEN)
    made.schedule(state, 0.16)
    plan = made.schedule(state, 0.2)
    assert [e.request for e in plan.fetched] == [first] and len(plan.preempted) == 1
    assert next((w.requests, w.reason) for w in plan.waited) == ((second,), Reason.WAITS_FOR_COPIES)
    run(state, plan, 0.2)
    assert made._swap_in._putting_off == {first.order, second.order}, "both may take their memory when it is their turn"


def test_fastswitch_lets_who_was_put_off_take_its_memory_in_the_next_iteration():
    """Between two changes of priorities nobody is preempted, but for those that a change let in."""
    made = make_policy("fastswitch:update_every=1000")
    state = state_of(24, seats=2)
    away, runs = asked(1, 40, "away", priority=-9), asked(2, 40, "runs", priority=9)
    admit(state, away)
    state.add(runs)
    made._swap_in._putting_off.add(away.order)
    run(state, Plan((Scheduled(runs, 40, HIDDEN, Reason.ADMITTED_HIDDEN),),
                    preempted=(Preempted(away, Reason.PREEMPTED_NO_BLOCKS),)))  # fmt: skip
    state.limits = type(state.limits)(1, 400, "hidden")
    made._iterations = 1
    made._rank = {away.order: (0.0, 0.0), runs.order: (1.0, 1.0)}
    made._served = {(-9, None): 0.0, (9, None): 1.0}
    assert [e.request for e in made.schedule(state, 0.2).preempted] == [runs]
    made._swap_in._putting_off.clear()
    assert not made.schedule(state, 0.3).preempted


def test_fastserve_brings_back_who_is_next_into_blocks_beyond_those_kept_free():
    """One that was preempted waits for a seat. 30 blocks are free, of which 10% of 60 stay so."""
    state, made, away, _runs = returning("fastserve:free_share=0.1", seats=1)
    plan = step(state, made, 0.2)
    assert [(e.request, e.reason) for e in plan.fetched] == [(away, Reason.FETCHED_AHEAD)]
    assert state.blocks_away(away, HIDDEN) == 0 and not plan.preempted
    state, made, away, _runs = returning("fastserve:free_share=0.5", seats=1)
    assert 30 - 10 < state.pool.num_free < 60
    assert sum(e.num_blocks for e in step(state, made, 0.2).fetched) <= max(state.pool.num_free - 30, 0)
    state, made, away, _runs = returning("fastserve:fetch=off", seats=1)
    assert not step(state, made, 0.2).fetched


def test_no_more_is_fetched_ahead_than_there_is_room_for_beside_what_is_there_already():
    state = state_of(60)
    first, second, runs = asked(1, 40, "first"), asked(4, 40, "second"), asked(2, 36, "runs")
    admit(state, first, second, runs)
    run(state, decode(runs, preempted=[first, second]))
    admit(state, asked(3, 4 * state.pool.num_free, "fills", output=1))
    swap_in = SwapIn()
    for there, room, ahead in ((0, 12, [10, 2]), (4, 12, [6, 2]), (0, 3, [])):
        if there:
            run(state, decode(runs, fetched=[fetch(first, there)]))
        swap_in.begin(state, 0.0)
        fetched = swap_in.ahead(state, [first, second], room)
        assert [e.num_blocks for e in fetched] == ahead, (there, room)


def test_random_fetches_lose_no_block():
    """Whatever is fetched whenever, beside any plan of a policy."""
    total = 0
    for seed in range(20):
        draw = random.Random(seed)
        state = state_of(30, mode=draw.choice(["kv", "hidden", "hybrid"]), slots=draw.choice([5, 100]))
        made = make_policy(draw.choice(["fcfs", "fastswitch", "fastserve"]))
        coming = [asked(k % 3, draw.randint(5, 40), str(k), draw.randint(1, 20)) for k in range(14)]
        fetched, now = 0, 0.0
        while coming or state.num_unfinished:
            if coming and draw.random() < 0.4:
                state.add(coming.pop())
            if not state.num_unfinished:
                continue
            plan, now = made.schedule(state, now), now + 0.04
            served = {entry.request.order for entry in (*plan.scheduled, *plan.abandoned)}
            extra = [
                Fetched(r, draw.choice(state.limits.kinds), draw.randint(0, 30), Reason.FETCHED_AHEAD)
                for r in state.waiting if r.order not in served and draw.random() < 0.5
            ]  # fmt: skip
            moves = run(state, type(plan)(**{**vars(plan), "fetched": (*plan.fetched, *extra)}), now)
            fetched += len(moves.fetched)
        assert state.pool.num_free == 30
        total += fetched
    assert total > 100


def test_blocks_per_iteration_without_host_memory_are_none():
    swap_in = SwapIn()
    state = make_state(20)
    swap_in.begin(state, 0.0)
    entries = [Scheduled(request(8, 4), 8, KV, Reason.ADMITTED_KV)]
    assert swap_in.put_off(state, entries, others=5) == (entries, ())
