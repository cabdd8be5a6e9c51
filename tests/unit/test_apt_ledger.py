"""The columns that `apt` keeps of its requests, and what an attempt has decided, in figures worked out by hand.

Blocks are of 4 tokens, 2 a KV page. A request that `run` puts there has its last token at time 0.
"""

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason, Slo
from apt_jax.scheduling.plan import Plan, Preempted, Reason, Scheduled
from apt_jax.scheduling.policies.apt.draft import Admission, Draft
from apt_jax.scheduling.policies.apt.facts.ledger import Ledger
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import run, wait

# -- the ledger ----------------------------------------------------------------------------------------------------


def test_nothing_is_there_yet():
    assert [len(queue) for queue in Ledger().update(make_state())] == [0, 0]


def test_columns_of_a_waiting_and_a_running_request():
    state = make_state()
    ran = run(state, "ran", 5, 3, slo=Slo(2.0, 0.5), arrival_s=-1.0, output=7, priority=-2)
    ran.num_late_gaps = 2
    wait(state, "new", 6, slo=Slo(3.0, 0.25, 0.75), arrival_s=0.5, output=8, priority=3)
    waiting, running = Ledger().update(state)
    for queue, expected in (
        # a stall is a gap over the smaller of 1 s and the first token's limit, but never less than a gap's
        (running, (0.0, -1.0, 2.0, 0.5, 1.0, 5, 7, 8, 1, 2, True, False, False, -2, 2, 0, 2)),
        (waiting, (0.5, 0.5, 3.0, 0.25, 0.75, 6, 8, 6, 6, 0, False, False, False, 3, 0, 0, 0)),
    ):
        found = (
            queue.since_s, queue.arrival_s, queue.ttft_slo_s, queue.tbt_slo_s, queue.stall_slo_s,
            queue.prompt_tokens, queue.max_new_tokens, queue.tokens, queue.uncomputed, queue.late_gaps,
            queue.started, queue.missed, queue.given_up, queue.priority, queue.pages_held, queue.kind,
            queue.blocks_per_page,
        )  # fmt: skip
        assert tuple(column.tolist()[0] for column in found) == expected and len(queue) == 1


def test_a_first_token_as_late_as_its_slo_is_in_time():
    for arrival_s, missed in ((-1.0, False), (-1.001, True)):
        state = make_state()
        run(state, "a", 4, arrival_s=arrival_s)
        assert Ledger().update(state)[1].missed.tolist() == [missed]


def test_a_stall_is_missed_too():
    state = make_state()
    for name, stalls in (("a", 0), ("b", 1)):
        run(state, name, 4).num_stalls = stalls
    assert Ledger().update(state)[1].missed.tolist() == [False, True]


@pytest.mark.parametrize("capacity", [1, 2, 3, 64])
def test_a_small_table_grows_and_forgets_those_that_ended(capacity):
    """Requests come and end one by one, but for one that waits all the time."""
    state, ledger = make_state(64), Ledger(capacity)
    wait(state, "stays", 7, arrival_s=-2.0)
    for k in range(12):
        run(state, f"r{k}", 4 + k % 3, arrival_s=k / 8)
        waiting, running = ledger.update(state)
        assert waiting.prompt_tokens.tolist() == [7] and waiting.arrival_s.tolist() == [-2.0]
        assert running.prompt_tokens.tolist() == [len(r.prompt_token_ids) for r in state.running]
        assert running.arrival_s.tolist() == [r.arrival_s for r in state.running]
        if k >= 2:
            state.finish(state.running[0], FinishReason.STOP)


@pytest.mark.parametrize("capacity", [2, 3, 64])
def test_the_table_moves_on_with_the_oldest(capacity):
    """One comes, the oldest waiting one starts and the oldest running one ends, round after round; two wait."""
    state, ledger = make_state(64), Ledger(capacity)
    for k in range(12):
        wait(state, f"w{k}", 4 + k % 3, arrival_s=k / 8, slo=Slo(1.0 + k, 2.0 + k), output=9 + k)
        if k >= 2:
            first = state.waiting[0]
            state.apply(Plan((Scheduled(first, first.num_tokens, CacheKind.KV, Reason.ADMITTED_KV),)), k)
        if k >= 4:
            state.finish(state.running[0], FinishReason.STOP)
        queues = ledger.update(state)
        for queue, requests in zip(queues, (state.waiting, state.running), strict=True):
            assert queue.requests == requests and queue.tokens.tolist() == [r.num_tokens for r in requests]
            assert queue.max_new_tokens.tolist() == [r.max_new_tokens for r in requests]
            assert queue.ttft_slo_s.tolist() == [r.slo.ttft_s for r in requests]
            assert queue.tbt_slo_s.tolist() == [r.slo.tbt_s for r in requests]
            assert queue.since_s.tolist() == queue.arrival_s.tolist() == [r.arrival_s for r in requests]


def test_one_that_was_preempted_keeps_what_it_was():
    state, ledger = make_state(), Ledger()
    wait(state, "before", 5)
    late = run(state, "late", 4, 3, arrival_s=-5.0)
    wait(state, "after", 6, arrival_s=0.5)
    ledger.update(state)
    late.num_late_gaps = 2
    state.apply(Plan((), preempted=(Preempted(late, Reason.PREEMPTED_LATE),)), 1.0)
    waiting, running = ledger.update(state)
    assert len(running) == 0 and waiting.tokens.tolist() == waiting.uncomputed.tolist() == [5, 7, 6]
    assert waiting.started.tolist() == waiting.missed.tolist() == [False, True, False]
    assert waiting.late_gaps.tolist() == [0, 2, 0] and waiting.since_s.tolist() == [0.0, 0.0, 0.5]


def test_one_that_was_aborted_while_it_waited_is_gone():
    state, ledger = make_state(), Ledger()
    first, _ = wait(state, "first", 4), wait(state, "second", 5)
    ledger.update(state)
    state.finish(first, FinishReason.ABORT)
    assert ledger.update(state)[0].prompt_tokens.tolist() == [5]


# -- drafts --------------------------------------------------------------------------------------------------------


def drafted(*victims, free=10, seats=4):
    """Admissions of 2, 6 and 4 blocks for which these running requests, of 3, 5 and 7, are preempted."""
    entries = [
        Admission(k, CacheKind.KV, Reason.ADMITTED_KV, blocks, mine)
        for k, (blocks, mine) in enumerate(zip((2, 6, 4), victims, strict=True))
    ]
    preempted = dict.fromkeys((v for mine in victims for v in mine), Reason.PREEMPTED_LATE)
    decodes = np.ones(3, np.bool_)
    return Draft(decodes, ~decodes, True, np.array([3, 5, 7]), free, seats, preempted, tuple(entries))


def test_a_draft_without_its_last_admissions():
    """The last two took 6 and 4 blocks; for one of them the second running request gave 5 and its seat."""
    draft = drafted((0,), (1,), ())
    assert draft.decode_index.tolist() == [2] and draft.runs_any
    less = draft.without([1, 2])
    assert (less.free_blocks, less.seats) == (10 + 6 + 4 - 5, 4 + 2 - 1)
    assert less.admitted == draft.admitted[:1] and list(less.preempted) == [0]
    assert less.stays.tolist() == [False, True, True] and less.decode_index.tolist() == [1, 2]
    same = draft.without([])
    assert (same.free_blocks, same.seats, len(same.admitted), len(same.preempted)) == (10, 4, 3, 2)


@pytest.mark.parametrize(
    ("victims", "free", "seats", "dropped", "spared", "left"),
    [
        (((0,), (1,), ()), 0, 0, [0], [], (2, 1)),  # 2 blocks for one of 3
        (((0,), (1,), ()), 1, 0, [0], [0], (0, 0)),
        (((), (0,), (1,)), 0, 0, [1], [0], (3, 0)),  # from the middle
        (((), (0, 1), ()), 0, 0, [1], [0], (3, 0)),  # 6 blocks, 3 of them taken back: too few for 5
        (((), (0, 1), ()), 2, 0, [1], [0], (5, 0)),  # room for both, but one seat
        (((), (0, 1), ()), 2, 1, [1], [0, 1], (0, 0)),
        (((0,), (), (2,)), 0, 0, [0, 2], [0], (3, 1)),  # 2 and 4 blocks: too few for 7
        (((0,), (), (1,)), 0, 0, [0, 2], [1], (1, 1)),  # that of the last admission first
        (((0,), (), (1,)), 2, 0, [0, 2], [1, 0], (0, 0)),
    ],
)  # fmt: skip
def test_who_is_spared_with_a_dropped_admission(victims, free, seats, dropped, spared, left):
    draft = drafted(*victims, free=free, seats=seats)
    less = draft.without(dropped)
    assert set(draft.preempted) - set(less.preempted) == set(spared)
    assert (less.free_blocks, less.seats) == left
    assert [entry.position for entry in less.admitted] == [k for k in range(3) if k not in dropped]


def test_whether_any_runs():
    none = np.zeros(0, np.bool_)
    assert not Draft(none, none, True, np.zeros(0, np.int64), 10, 4).runs_any
    one = np.ones(1, np.bool_)
    assert Draft(one, one, True, np.array([2]), 10, 4).runs_any
    assert not Draft(one, one, True, np.array([2]), 10, 4, {0: Reason.PREEMPTED_LATE}).runs_any
    entry = Admission(0, CacheKind.KV, Reason.ADMITTED_KV, 2)
    assert Draft(one, one, True, np.array([2]), 10, 4, {0: Reason.PREEMPTED_LATE}, (entry,)).runs_any
