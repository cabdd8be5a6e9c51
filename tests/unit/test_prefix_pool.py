"""Pages that are kept and shared: the pool by itself, the state's accounting, then everything in any order."""

import itertools
from copy import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from apt_jax.cache import BlockPool, BlockTable, CacheKind, OutOfBlocks, pages_for
from apt_jax.request import FinishReason, Request, SamplingParams, Status
from apt_jax.scheduling.host_tier import HostTier
from apt_jax.scheduling.plan import Converted, Plan, Preempted, Reason, Scheduled
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.prefix_pool import PrefixPool
from tests.support.host_loop import EOS, WORD, HostLoop, fits, make_state
from tests.support.scheduling_loop import TINY, serve
from tests.support.scheduling_loop import make_state as policy_state
from tests.unit.test_cache import MACHINE_SETTINGS, RequestMachine
from tests.unit.test_scheduling_policies import VARIANTS

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN


def ask(tokens, output=3, *, salt=None, arrival_s=0.0, **params) -> Request:
    """A request for these prompt tokens."""
    chosen = SamplingParams(max_tokens=output, ignore_eos=True, **params)
    return Request(f"{tokens}", list(tokens), chosen, arrival_s, output, cache_salt=salt)


def loop(num_blocks=40, mode="kv", **options) -> HostLoop:
    return HostLoop(make_state(num_blocks, cache_mode=mode, pool=PrefixPool, **options))


def answer(runs: HostLoop, *requests: Request) -> list[int]:
    """Serve them at once; tokens of each that were cached."""
    for request in requests:
        runs.state.add(request)
    while not runs.is_idle:
        runs.step()
        runs.state.check()
    assert runs.state.pool.num_free == runs.state.pool.num_blocks
    return [request.num_cached_tokens for request in requests]


@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_a_prompt_that_comes_again_is_computed_from_its_last_full_page_on(mode):
    runs = loop(mode=mode)
    assert answer(runs, ask(range(14))) == [0]
    assert answer(runs, ask(range(14))) == [12]  # pages of 4
    assert answer(runs, ask(range(12))) == [8]  # one token must be computed
    assert answer(runs, ask([*range(9), 99, 98, 97, 96])) == [8]
    assert answer(runs, ask(range(1, 14))) == [0]
    assert (runs.state.prefix_queries, runs.state.prefix_hits) == (14 + 14 + 12 + 13 + 13, 12 + 8 + 8)


def test_generated_tokens_are_found_by_the_next_turn():
    runs = loop()
    first = ask(range(6), output=8)
    answer(runs, first)
    turn = [*range(6), *first.output_token_ids]
    assert answer(runs, ask([*turn, 50, 51])) == [12]  # the last token of an answer is never computed
    assert answer(runs, ask([*turn[:-3], 50, 51])) == [8]


def test_salts_divide_the_cache():
    runs = loop()
    answer(runs, ask(range(14), salt="a"))
    assert answer(runs, ask(range(14)), ask(range(14), salt="b")) == [0, 0]
    assert answer(runs, ask(range(14)), ask(range(14), salt="b"), ask(range(14), salt="a")) == [12, 12, 12]
    assert answer(runs, ask(range(14), salt="")) == [0]  # an empty one is a salt too


def test_a_kind_serves_its_own_kind_only():
    runs = loop(mode="hybrid")
    answer(runs, ask(range(14)))
    again = ask(range(14))
    runs.state.add(again)
    assert [runs.state.cached_tokens(again, kind) for kind in (KV, HIDDEN)] == [12, 0]


def test_what_needs_its_whole_prompt_gets_nothing_but_gives():
    runs = loop()
    assert answer(runs, ask(range(14), prompt_logprobs=1)) == [0]
    assert answer(runs, ask(range(14), prompt_logprobs=1)) == [0]
    assert (runs.state.prefix_queries, runs.state.prefix_hits) == (0, 0)
    assert answer(runs, ask(range(14))) == [12]


def test_nothing_of_a_step_is_found_before_it_is_committed():
    state = make_state(40, cache_mode="kv", pool=PrefixPool)
    first, second = ask(range(14)), ask(range(14))
    for request in (first, second):
        state.add(request)
    spans = state.apply(Plan(scheduled=(Scheduled(first, 14, KV, Reason.ADMITTED_KV),)), 0.0)
    assert state.cached_tokens(second, KV) == 0
    state.keep(state.written(spans))
    assert state.cached_tokens(second, KV) == 12


def test_who_finds_nothing_is_asked_again_only_once_a_prompt_begins_as_theirs():
    runs = loop()
    answer(runs, ask(range(14)))
    pool, state = runs.state.pool, runs.state
    cold = [waiting(runs, range(100 * k, 100 * k + 9)) for k in (1, 2, 3)]
    hot, short = waiting(runs, range(9)), waiting(runs, range(4))
    assert [state.cached_tokens(r, KV) for r in (*cold, hot, short)] == [0, 0, 0, 8, 0]
    assert pool.cold == {r.order for r in cold} and pool.is_cold(short) and not pool.is_cold(hot)
    runs.run(Plan(scheduled=(Scheduled(cold[0], 9, KV, Reason.ADMITTED_KV),)))
    again = waiting(runs, range(100, 120))
    assert state.cached_tokens(again, KV) == 8 and pool.cold == {r.order for r in cold[1:]}
    twin = waiting(runs, range(200, 220))
    assert state.cached_tokens(twin, KV) == 0 and len(pool.cold) == 3
    runs.run(Plan(scheduled=(Scheduled(cold[1], 9, KV, Reason.ADMITTED_KV),)))
    assert state.cached_tokens(twin, KV) == 8 and pool.cold == {cold[2].order}


def test_pages_of_one_that_was_preempted_before_the_commit_are_not_kept():
    state = make_state(40, cache_mode="kv", pool=PrefixPool)
    first, other = ask(range(14)), ask(range(30, 44))
    for request in (first, other):
        state.add(request)
    spans = state.apply(Plan(scheduled=(Scheduled(first, 14, KV, Reason.ADMITTED_KV),)), 0.0)
    written = state.written(spans)
    state.apply(Plan(preempted=(Preempted(first, Reason.PREEMPTED_NO_BLOCKS),)), 0.0)
    state.apply(Plan(scheduled=(Scheduled(other, 14, KV, Reason.ADMITTED_KV),)), 0.0)  # the same blocks
    state.keep(written)
    assert state.cached_tokens(first, KV) == 0 and state.pool.num_idle == 0
    state.check()


def test_blocks_to_admit_are_those_not_held_by_others():
    runs = loop(mode="kv")
    runs.state.add(first := ask(range(14), output=9))
    runs.step()
    again = ask(range(14))
    runs.state.add(again)
    assert runs.state.blocks_to_admit(again, KV) == 2  # of 8
    assert runs.state.blocks_to_admit(again, KV, preempts=True) == 8
    free = runs.state.pool.num_free
    runs.state.apply(Plan(scheduled=(Scheduled(again, 2, KV, Reason.ADMITTED_KV),)), 0.0)
    assert runs.state.pool.num_free == free - 2 and runs.state.shared_blocks(first) == 6
    gone: dict[int, int] = {}
    assert [runs.state.blocks_given_back(r, gone) for r in (first, again)] == [2, 8]
    runs.state.finish(first, FinishReason.ABORT)
    assert runs.state.pool.num_free == free and runs.state.shared_blocks(again) == 0
    runs.state.finish(again, FinishReason.ABORT)
    runs.state.add(third := ask(range(14)))
    assert runs.state.blocks_to_admit(third, KV) == 8, "idle pages count as free"


@pytest.mark.parametrize(("start", "first"), [(0, "cached"), (200, "earlier"), (100, "earlier")])
@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_of_two_that_are_worth_the_same_apt_admits_the_one_whose_beginning_is_cached(mode, start, first):
    """Nobody holds it any more, so both take as many blocks."""
    state, policy = (
        policy_state(60, max_num_seqs=1, mode=mode, pool=PrefixPool),
        make_policy("apt", PolicyContext(TINY)),
    )
    serve(state, policy, [ask(range(start, start + 22), output=2)])
    both = {"earlier": ask(range(100, 122), arrival_s=1.0), "cached": ask(range(22), arrival_s=1.0)}
    for request in both.values():
        state.add(request)
    plan = policy.schedule(state, 1.1)
    assert [entry.request for entry in plan.scheduled] == [both[first]]
    assert state.blocks_to_admit(both["cached"], plan.scheduled[0].kind) == (6 if mode == "hidden" else 12)


def test_the_page_released_longest_ago_is_evicted_first_and_the_end_of_a_prompt_before_its_beginning():
    runs = loop(num_blocks=16, mode="hidden")
    for start in (0, 100, 200):
        answer(runs, ask(range(start, start + 14), output=1))
    answer(runs, ask(range(14), output=1))  # used again
    answer(runs, ask(range(300, 335), output=1))  # takes 9 blocks: the 7 besides the idle ones, and 2 of 3 x 3
    assert [runs.state.cached_tokens(waiting(runs, range(s, s + 14)), HIDDEN) for s in (0, 100, 200)] == [12, 4, 12]


def waiting(runs, tokens) -> Request:
    request = ask(tokens)
    runs.state.add(request)
    return request


def test_a_request_that_runs_alone_may_take_the_whole_pool_from_idle_pages():
    runs = loop(num_blocks=8, mode="kv")
    for start in range(0, 500, 100):
        answer(runs, ask(range(start, start + 14), output=2))
    with pytest.raises(OutOfBlocks):
        runs.state.pool.grow(BlockTable(KV), 17)
    assert runs.state.pool.num_idle > 0, "what does not fit evicts nothing"


def test_forgetting_leaves_running_requests_their_pages():
    runs = loop(mode="kv")
    runs.state.add(first := ask(range(14), output=9))
    runs.step()
    runs.state.add(again := ask(range(14), output=9))
    runs.step()
    blocks = [list(column) for column in again.table.blocks]
    runs.state.forget_prefixes()
    assert again.table.blocks == blocks and runs.state.shared_blocks(first) == 6
    runs.state.check()
    assert answer(runs, ask(range(14))) == [0]


@given(
    num_blocks=st.integers(30, 60), mode=st.sampled_from(["hybrid", "kv", "hidden"]), with_model=st.booleans(),
    seconds=st.sampled_from([0.01, 0.4]),
    trace=st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(1, 30), st.integers(0, 10), st.integers(1, 12), st.floats(0, 2, width=32)
        ),
        min_size=1, max_size=14,
    ),
)  # fmt: skip
@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15, deadline=None)
def test_every_policy_serves_everything_from_shared_pages(name, num_blocks, mode, with_model, seconds, trace):
    policy = make_policy(name, PolicyContext(TINY if with_model else None))
    state = policy_state(num_blocks, 4, 6, 32, mode, watermark=1, pool=PrefixPool)
    requests = [
        ask([*range(1000 * begins, 1000 * begins + shared), *range(own)] or [0], output, arrival_s=arrival_s)
        for begins, shared, own, output, arrival_s in trace
    ]
    serve(state, policy, requests, seconds)
    assert all(len(request.output_token_ids) == request.max_new_tokens for request in requests)
    state.forget_prefixes()
    assert state.pool.num_idle == 0


class SharingMachine(RequestMachine):
    """As its base, over a pool that shares, with prompts of three beginnings."""

    pool = PrefixPool

    @rule(prompt_tokens=st.integers(1, 30), max_new_tokens=st.integers(1, 12), begins=st.integers(0, 2))
    def add(self, prompt_tokens, max_new_tokens, begins):
        request = ask(
            range(100 * begins, 100 * begins + prompt_tokens), max_new_tokens, salt="s" if begins == 2 else None
        )
        request.eos_token_ids = frozenset({EOS})
        if fits(self.state, request):
            self.state.add(request)
            self.requests.append(request)

    @rule(tokens=st.lists(st.sampled_from([WORD, WORD, WORD + 1]), min_size=1, max_size=4))
    def step(self, tokens):
        self.tokens = tokens
        self.loop.step()

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 11))
    def finish(self, number):
        self.state.finish(self.requests[number % len(self.requests)], FinishReason.ABORT)

    @precondition(lambda self: self.state.running)
    @rule(number=st.integers(0, 11))
    def preempt(self, number):
        request = self.state.running[number % len(self.state.running)]
        freed = self.state.pool.num_free + self.state.blocks_given_back(request, {})
        self.state.apply(Plan(preempted=(Preempted(request, Reason.PREEMPTED_NO_BLOCKS),)), self.loop.now)
        assert self.state.pool.num_free == freed
        self.loop.run(Plan())

    @precondition(lambda self: any(r.cache_kind is HIDDEN for r in self.state.running))
    @rule(number=st.integers(0, 11))
    def convert(self, number):
        hidden = [r for r in self.state.running if r.cache_kind is HIDDEN]
        request = hidden[number % len(hidden)]
        if self.state.shared_blocks(request) or request.table.num_pages > self.state.pool.num_free:
            return
        free = self.state.pool.num_free
        self.state.apply(Plan(converted=(Converted(request, Reason.CONVERTED_MEMORY_FREE),)), self.loop.now)
        assert self.state.pool.num_free == free - request.table.num_pages

    @rule(everything=st.booleans(), number=st.integers(0, 11))
    def forget(self, everything, number):
        some = self.state.running[number % len(self.state.running)] if self.state.running and not everything else None
        self.state.forget_prefixes(some)

    @invariant()
    def blocks_are_conserved_and_tables_fit(self):
        state, pool = self.state, self.state.pool
        state.check()
        assert sum(state.blocks_by_kind().values()) == pool.num_blocks
        shared = sum(state.shared_blocks(r) for r in state.running) - pool.num_shared
        assert pool.num_free + sum(r.table.num_blocks for r in state.running) - shared == pool.num_blocks
        for request in state.running:
            pages = request.table.num_pages
            assert pages_for(request.num_computed_tokens, pool.block_size) <= pages
            assert pages <= pages_for(request.num_tokens, pool.block_size)
            # what is still to be written is nobody else's, and cannot be found
            for i in range(request.num_computed_tokens // pool.block_size, pages):
                assert request.table.blocks[0][i] not in pool._by_block

    @invariant()
    def what_is_remembered_is_what_would_be_found_now(self):
        pool = self.state.pool
        for request in self.state.waiting:
            anew = copy(request)
            anew.order = -1  # of which nothing is remembered
            assert pool.is_cold(request) is pool.is_cold(anew)
            most = (request.num_tokens - 1) // pool.block_size
            for kind, pages in itertools.product((KV, HIDDEN), range(most, 0, -1)):
                assert pool.find(request, kind, pages) == pool.find(anew, kind, pages)


SharingMachine.TestCase.settings = MACHINE_SETTINGS
TestSharing = SharingMachine.TestCase


class TwoTierMachine(SharingMachine):
    """As its base, with slots in host memory for a few blocks; slots are conserved like blocks (`PrefixPool.check`)."""

    pool = staticmethod(lambda num_blocks, block_size: PrefixPool(num_blocks, block_size, host=HostTier(7)))

    @invariant()
    def copies_are_of_blocks_and_slots_that_exist(self):
        self.loop.started = lambda plan, spans: self.check_moves()  # before anybody of the plan may end
        self.check_moves()

    def check_moves(self):
        host, moves = self.state.pool.host, self.state.take_moves()
        assert host.num_used <= 7 and len({slot for _, slot in moves.saved}) == len(moves.saved)
        restored = [block for _, block in moves.restored]
        held = {block for r in self.state.running for blocks in r.table.blocks for block in blocks}
        assert len(set(restored)) == len(restored) and set(restored) <= held


TwoTierMachine.TestCase.settings = MACHINE_SETTINGS
TestTwoTiers = TwoTierMachine.TestCase


def test_a_page_comes_back_from_host_memory_to_new_blocks():
    host = HostTier(2)
    pool = PrefixPool(3, 4, host=host)
    first, other = ask(range(4), 1), ask(range(50, 62), 1)
    first.order, other.order = 0, 1
    first.table = BlockTable(HIDDEN)
    pool.grow(first.table, 4)
    pool.keep(first, 1)
    pool.release(first.table)
    other.table = BlockTable(HIDDEN)
    pool.grow(other.table, 12)
    assert pool.host.take_moves().saved == [(0, 0)] and host.num_used == 1
    pool.release(other.table)
    (found,) = pool.find(first, HIDDEN, 1)
    assert (found.slots, found.refs) == ((0,), 0) and not pool.find(first, KV, 1)
    pool.share(first.table, [found])
    assert host.take_moves().restored == [(0, first.table.blocks[0][0])] and pool.num_free == 2
    assert pool.find(first, HIDDEN, 1)[0].refs == 1, "from now on it is on the device too"
    pool.check([first.table])
    pool.forget(first.table)
    assert host.num_used == 0 and not pool.find(first, HIDDEN, 1)


def test_what_is_quicker_to_compute_is_not_kept_and_the_oldest_copy_is_lost():
    host = HostTier(3)
    host.restores[KV.index] = False
    host.save(b"a", KV, (0, 1))
    assert host.num_used == 0
    for key, block in ((b"a", 4), (b"b", 5), (b"c", 6), (b"a", 7), (b"d", 8)):
        host.save(key, HIDDEN, (block,))
    assert [pair[0] for pair in host.take_moves().saved] == [4, 6, 8], "b was used longest ago, and a is there already"
    assert host.find(b"b", HIDDEN) is None
    for key in (b"a", b"c", b"d"):
        host.hold(host.find(key, HIDDEN))
    host.save(b"e", HIDDEN, (9,))
    assert host.find(b"e", HIDDEN) is None, "all others are about to be read"
    host.take_moves()
    host.save(b"e", HIDDEN, (9,))
    assert host.find(b"e", HIDDEN) is not None and host.find(b"c", HIDDEN) is None


def test_a_plain_pool_keeps_nothing():
    runs = HostLoop(make_state(40, cache_mode="kv", pool=BlockPool))
    answer(runs, first := ask(range(14)))
    answer(runs, again := ask(range(14)))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (None, None)
    assert first.status is Status.FINISHED and runs.state.prefix_queries == 0
