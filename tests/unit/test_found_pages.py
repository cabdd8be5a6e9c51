"""What queued requests found in the prefix cache is looked up again when it may have changed, and only then."""

import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import FinishReason
from apt_jax.scheduling import found_pages
from apt_jax.scheduling.found_pages import FoundPages
from apt_jax.scheduling.host_tier import HostTier
from apt_jax.scheduling.plan import Fetched, Plan, Preempted, Reason, Scheduled
from apt_jax.scheduling.prefix_pool import PrefixPool
from tests.support.host_loop import HostLoop, make_state
from tests.unit.test_prefix_pool import ask

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN
KEYS = [bytes([i]) for i in range(9)]


@pytest.fixture
def lookups(monkeypatch):
    """Arrival numbers of those that were looked up, in order."""
    seen, remember = [], FoundPages.remember

    def counted(self, order, *rest):
        seen.append(order)
        remember(self, order, *rest)

    monkeypatch.setattr(FoundPages, "remember", counted)
    return seen


def crowd():
    """A request that runs, one whose pages are all in host memory, and 20 that wait and begin with two other pages."""
    runs = HostLoop(make_state(80, cache_mode="kv", pool=lambda *size: PrefixPool(*size, host=HostTier(100))))
    state = runs.state

    def admit(*requests):
        entries = (Scheduled(r, state.tokens_to_compute(r, KV), KV, Reason.ADMITTED_KV) for r in requests)
        runs.run(Plan(tuple(entries)))

    away, first, busy = ask(range(500, 521), 40), ask(range(9), 40), ask(range(700, 709), 40)
    for each in (away, first, busy):
        state.add(each)
    admit(away)
    runs.run(Plan(preempted=(Preempted(away, Reason.PREEMPTED_NO_BLOCKS),)))
    fills = ask(range(1000, 1158), 1)
    state.add(fills)
    admit(fills)
    admit(first, busy)
    assert state.blocks_away(away, KV) == 10
    many = [ask([*range(8), 100 + i, 3, 4, 5, 6], 5) for i in range(20)]
    for each in many:
        state.add(each)
    return runs, state, away, busy, many


def test_pages_that_come_and_go_have_nobody_else_look_again(lookups):
    runs, state, away, busy, many = crowd()

    def look():
        return [state.cached_tokens(each, KV) for each in (*many, away)]

    assert look() == [8] * 20 + [20]
    lookups.clear()
    look()
    assert lookups == []
    fetch = Fetched(away, KV, 4, Reason.FETCHED_AHEAD)
    runs.run(Plan((Scheduled(busy, 1, KV, Reason.DECODES),), fetched=(fetch,)))
    lookups.clear()
    assert look() == [8] * 20 + [20] and state.blocks_away(away, KV) == 6
    assert lookups == [away.order], "fetched pages are of one request"
    lookups.clear()
    listed, saved = busy.table.num_listed, state.pool.host.num_saved
    while busy.table.num_listed < listed + 3:
        runs.run(Plan((Scheduled(busy, 1, KV, Reason.DECODES),)))
    assert state.pool.host.num_saved == saved, "nothing to evict: what the host has is not saved again"
    look()
    assert lookups == [], "pages of one that runs"


def test_those_whose_next_page_comes_or_whose_pages_go_look_again(lookups):
    runs, state, _, _, many = crowd()
    pages = [state.cached_tokens(each, KV) for each in many]
    lookups.clear()
    twin = ask([*range(8), 100, 3, 4, 5, 99], 5)
    state.add(twin)
    runs.run(Plan((Scheduled(twin, 5, KV, Reason.ADMITTED_KV),)))
    assert [state.cached_tokens(each, KV) for each in many] == [12, *pages[1:]]
    assert [order for order in lookups if order != twin.order] == [many[0].order]
    state.forget_prefixes(twin)
    lookups.clear()
    assert [state.cached_tokens(each, KV) for each in many] == [0] * 20


def test_it_is_known_for_as_many_pages_as_were_looked_for_and_all_if_one_was_missing():
    found = FoundPages[str]()
    found.remember(7, KV, ["a", "b"], KEYS, 2)
    assert found.get(7, KV, 2) == found.get(7, KV, 1) == ["a", "b"] and found.get(7, KV, 3) is None
    assert found.get(7, HIDDEN, 2) is None and found.get(8, KV, 2) is None
    found.changed(KEYS[2])
    assert found.get(7, KV, 2) is not None, "the third was not looked for"
    found.remember(7, KV, ["a", "b"], KEYS, 3)
    assert found.get(7, KV, 9) == ["a", "b"]
    found.changed(KEYS[2])
    assert found.get(7, KV, 2) is None


def test_a_first_page_says_whether_anything_is_cached_until_it_comes_or_goes():
    found = FoundPages[str]()
    found.remember_first(1, KEYS[0], is_cached=False)
    found.remember_first(2, KEYS[1], is_cached=True)
    found.changed(KEYS[5])
    assert (found.cold, found.warm) == ({1}, {2})
    found.changed(KEYS[0])
    found.changed(KEYS[1])
    assert not found.cold and not found.warm


@pytest.mark.parametrize("leaves", ["ended", "admitted"])
def test_of_those_that_leave_the_queue_nothing_is_remembered(leaves):
    runs, state, _, _, many = crowd()
    found, before = state.pool._found, {r.order for r in state.waiting} - {r.order for r in many}
    assert [state.cached_tokens(each, kind) for each in many for kind in (KV, HIDDEN)] == [8, 0] * 20
    assert len(found.warm) >= 20 and found._num_readers >= 60
    for each in many:
        if leaves == "ended":
            state.finish(each, FinishReason.ABORT)
        else:
            runs.run(Plan((Scheduled(each, state.tokens_to_compute(each, KV), KV, Reason.ADMITTED_KV),)))
            state.finish(each, FinishReason.ABORT)
    known = {*found.cold, *found.warm, *(order for order, _ in found._pages), *set().union(*found._readers.values())}
    assert known <= before, "only of those that still wait"
    assert all(found._readers.values()) and sum(map(len, found._readers.values())) == found._num_readers


def test_a_long_queue_with_a_long_common_beginning_is_looked_up_once(lookups):
    state = make_state(400, cache_mode="kv", max_num_batched_tokens=2000, pool=PrefixPool)
    runs, first = HostLoop(state), ask(range(601), 9)
    state.add(first)
    runs.run(Plan((Scheduled(first, 601, KV, Reason.ADMITTED_KV),)))
    many = [ask([*range(600), 1000 + i, 0, 0, 0], 5) for i in range(1500)]  # 226,500 pairs of a page and a reader
    for each in many:
        state.add(each)
    assert {state.cached_tokens(each, KV) for each in many} == {600}
    lookups.clear()
    assert {state.cached_tokens(each, KV) for each in many} == {600} and lookups == []


def test_it_is_bounded(monkeypatch):
    monkeypatch.setattr(found_pages, "MOST_READERS", 6)
    found = FoundPages[str]()
    for order in range(50):
        found.remember(order, KV, ["a"], [KEYS[0], KEYS[1 + order % 5]], 9)
        found.remember_first(order, KEYS[7], is_cached=True)
        assert sum(map(len, found._readers.values())) == found._num_readers < 9
        assert len(found._pages) <= 6 and len(found.warm) <= 6
        found.changed(KEYS[order % 3])
    for _ in range(50):  # the same again is no more
        found.remember(3, KV, ["a"], KEYS, 2)
    assert found.get(3, KV, 1) == ["a"] and found._num_readers <= 8
