"""Block accounting: the pool by itself, then a state machine over everything that moves blocks. Host code only."""

import copy

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apt_jax.cache import BlockPool, BlockTable, CacheKind, OutOfBlocks, blocks_for, pages_for
from apt_jax.request import FinishReason, Status
from apt_jax.scheduling.plan import Converted, Plan, Preempted, Reason
from tests.support.host_loop import EOS, STOP_ID, WORD, HostLoop, finish_any, fits, make_request, make_state

KINDS = list(CacheKind)


def test_pages_and_blocks_of_tokens():
    assert [pages_for(tokens, 4) for tokens in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert [blocks_for(5, kind, 4) for kind in (CacheKind.KV, CacheKind.HIDDEN)] == [4, 2]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_pool_needs_blocks_and_a_block_needs_tokens(sizes):
    with pytest.raises(ValueError, match="must both be at least 1"):
        BlockPool(*sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_grows_by_whole_pages_and_never_shrinks(kind):
    pool, table = BlockPool(10, 4), BlockTable(kind)
    for tokens in (0, 1, 4, 5, 12, 3, 0):
        before = [list(blocks) for blocks in table.blocks]
        pool.grow(table, tokens)
        assert [blocks[: len(old)] for blocks, old in zip(table.blocks, before, strict=True)] == before
        assert table.num_pages == max(len(before[0]), pages_for(tokens, 4))
        assert [len(blocks) for blocks in table.blocks] == [table.num_pages] * (2 if kind is CacheKind.KV else 1)
        assert table.num_blocks == 10 - pool.num_free
        pool.check([table])


@pytest.mark.parametrize("kind", KINDS)
def test_growing_past_the_pool_changes_nothing(kind):
    pool, table = BlockPool(5, 4), BlockTable(kind)
    pool.grow(table, 8)
    before = copy.deepcopy(table)
    with pytest.raises(OutOfBlocks, match=r"\d+ blocks wanted, [13] of 5 free"):
        pool.grow(table, 100)
    assert table == before
    pool.check([table])


def test_conversion_keeps_the_hidden_blocks_as_keys_and_adds_values():
    pool, table = BlockPool(4, 4), BlockTable(CacheKind.HIDDEN)
    pool.grow(table, 8)
    (hidden,) = [list(blocks) for blocks in table.blocks]
    pool.convert(table)
    assert (table.kind, table.blocks[0], len(table.blocks[1])) == (CacheKind.KV, hidden, 2)
    assert pool.num_free == 0
    pool.check([table])
    with pytest.raises(ValueError, match="a table of kind kv cannot be converted"):
        pool.convert(table)


def test_conversion_without_room_changes_nothing():
    pool, table = BlockPool(3, 4), BlockTable(CacheKind.HIDDEN)
    pool.grow(table, 8)
    before = copy.deepcopy(table)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted, 1 of 3 free"):
        pool.convert(table)
    assert table == before
    pool.check([table])


def test_released_blocks_are_reused_first_and_releasing_again_is_harmless():
    pool, old, new = BlockPool(20, 4), BlockTable(CacheKind.KV), BlockTable(CacheKind.KV)
    pool.grow(old, 12)
    blocks = copy.deepcopy(old.blocks)
    pool.release(old)
    pool.release(old)
    assert (pool.num_free, old.num_blocks) == (20, 0)
    pool.grow(new, 12)
    assert new.blocks == blocks


def test_check_notices_a_lost_block_and_a_shared_one():
    pool, table = BlockPool(8, 4), BlockTable(CacheKind.KV)
    pool.grow(table, 8)
    for wrong in ([], [table, table], [BlockTable(CacheKind.HIDDEN, [[0, 1, 2]])]):
        with pytest.raises(AssertionError, match="leaked or shared"):
            pool.check(wrong)
    pool.check([table])


@given(st.integers(1, 24), st.sampled_from([1, 2, 4]), st.data())
@settings(max_examples=50)
def test_any_sequence_on_the_pool_keeps_every_block_with_one_owner(num_blocks, block_size, data):
    pool = BlockPool(num_blocks, block_size)
    tables = [BlockTable(kind) for kind in (*KINDS, *KINDS)]
    for _ in range(data.draw(st.integers(1, 15))):
        table = data.draw(st.sampled_from(tables))
        before, free = copy.deepcopy(table), pool.num_free
        try:
            match data.draw(st.sampled_from(["grow", "grow", "convert", "release"])):
                case "grow":
                    pool.grow(table, data.draw(st.integers(0, 20)))
                case "convert" if table.kind is CacheKind.HIDDEN:
                    pool.convert(table)
                case "release":
                    pool.release(table)
        except OutOfBlocks:
            assert (table, pool.num_free) == (before, free)
        assert pool.num_free + sum(t.num_blocks for t in tables) == num_blocks
        pool.check(tables)


numbers = st.integers(0, 11)  # which of those there are, modulo how many


class RequestMachine(RuleBasedStateMachine):
    """Requests come, run, end, are preempted and converted in any order; `mode` and `pool` are set by the subclasses.

    The loop commits as the engine does, at once or one iteration late.
    """

    mode, pool = "hybrid", BlockPool

    @initialize(
        num_blocks=st.integers(4, 40),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 24),
        watermark_blocks=st.integers(0, 2),
        depth=st.integers(0, 1),
    )
    def start(self, depth, **sizes):
        self.state = make_state(cache_mode=self.mode, pool=self.pool, **sizes)
        self.requests = []
        self.tokens = [WORD]
        self.loop = HostLoop(self.state, depth=depth, next_token=self.next_token)

    def next_token(self, request):
        self.tokens.append(self.tokens.pop(0))
        return self.tokens[0]

    @rule(prompt_tokens=st.integers(1, 30), max_new_tokens=st.integers(1, 12))
    def add(self, prompt_tokens, max_new_tokens):
        request = make_request(prompt_tokens, max_new_tokens, arrival_s=self.loop.now)
        if fits(self.state, request):
            self.state.add(request)
            self.requests.append(request)

    @rule(tokens=st.lists(st.sampled_from([WORD, WORD, WORD, EOS, STOP_ID]), min_size=1, max_size=4))
    def step(self, tokens):
        self.tokens = tokens
        held = {r: r.num_computed_tokens for r in self.requests}
        plan = self.loop.step()
        for entry in plan.scheduled:  # unless its end came back in this very step
            moved = entry.request.num_computed_tokens - held[entry.request]
            assert moved == entry.num_tokens or entry.request.status is Status.FINISHED

    @rule(count=st.integers(2, 12))
    def run_on(self, count):
        self.tokens = [WORD]
        for _ in range(count):
            self.loop.step()
            self.state.check()

    @rule()
    def read_back_early(self):
        self.loop.commit()

    @precondition(lambda self: self.requests)
    @rule(number=numbers, reason=st.sampled_from([FinishReason.ABORT, FinishReason.ERROR, FinishReason.STOP]))
    def finish(self, number, reason):
        request = self.requests[number % len(self.requests)]
        held = request.table.num_blocks if request.table else 0
        free = self.state.pool.num_free
        finish_any(self.state, request, reason)
        assert self.state.pool.num_free == free + held

    @precondition(lambda self: self.state.running)
    @rule(number=numbers)
    def preempt(self, number):
        request = self.state.running[number % len(self.state.running)]
        freed = self.state.pool.num_free + request.table.num_blocks
        known, times = request.num_tokens, request.num_preemptions
        self.state.apply(Plan(preempted=(Preempted(request, Reason.PREEMPTED_NO_BLOCKS),)), self.loop.now)
        assert (request.status, request.table, request.num_computed_tokens) == (Status.WAITING, None, 0)
        assert (self.state.pool.num_free, request.num_tokens, request.num_preemptions) == (freed, known, times + 1)
        self.loop.run(Plan())  # the engine reads back all that is in flight when nothing else runs

    @precondition(lambda self: any(r.cache_kind is CacheKind.HIDDEN for r in self.state.running))
    @rule(number=numbers)
    def convert(self, number):
        hidden = [r for r in self.state.running if r.cache_kind is CacheKind.HIDDEN]
        request = hidden[number % len(hidden)]
        plan = Plan(converted=(Converted(request, Reason.CONVERTED_MEMORY_FREE),))
        pages, free = request.table.num_pages, self.state.pool.num_free
        if pages > free:
            with pytest.raises(OutOfBlocks):
                self.state.apply(plan, self.loop.now)
            assert (request.cache_kind, self.state.pool.num_free) == (CacheKind.HIDDEN, free)
        else:
            self.state.apply(plan, self.loop.now)
            assert (request.cache_kind, self.state.pool.num_free) == (CacheKind.KV, free - pages)
            assert request.cache_history[-1] is CacheKind.KV

    @invariant()
    def blocks_are_conserved_and_tables_fit(self):
        state, pool = self.state, self.state.pool
        state.check()
        assert sum(state.blocks_by_kind().values()) == pool.num_blocks
        assert pool.num_free + sum(r.table.num_blocks for r in state.running) == pool.num_blocks
        assert len(state.running) <= state.limits.max_num_seqs
        for request in state.running:
            pages = request.table.num_pages
            assert pages_for(request.num_computed_tokens, pool.block_size) <= pages
            assert pages <= pages_for(request.num_tokens, pool.block_size)
            assert request.table.num_blocks == pages * request.cache_kind.blocks_per_page
            assert request.cache_kind in state.limits.kinds or request.num_conversions

    @invariant()
    def every_request_is_in_one_place_and_ended_ones_hold_nothing(self):
        assert self.state.num_unfinished == sum(r.status is not Status.FINISHED for r in self.requests)
        for request in self.requests:
            places = [request in self.state.waiting, request in self.state.running, request.finish_reason is not None]
            statuses = [Status.WAITING, Status.RUNNING, Status.FINISHED]
            assert places == [request.status is status for status in statuses]
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            assert request.num_generated_tokens <= request.max_new_tokens
            if request.status is Status.FINISHED:
                assert request.table is None and request.num_inflight_tokens == 0

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        self.state.check()
        self.tokens = [WORD]
        self.loop.drain()
        assert self.state.pool.num_free == self.state.pool.num_blocks
        assert all(r.status is Status.FINISHED and r.table is None for r in self.requests)
        for request in self.requests:
            if request.finish_reason is FinishReason.LENGTH and len(request.output_token_ids) < request.max_new_tokens:
                raise AssertionError(f"{request.request_id} ended for its length, but short of it")


class KvMachine(RequestMachine):
    mode = "kv"


class HiddenMachine(RequestMachine):
    mode = "hidden"


MACHINE_SETTINGS = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    report_multiple_bugs=False,  # the first failure shrinks in seconds, several take minutes
)
for machine in (RequestMachine, KvMachine, HiddenMachine):
    machine.TestCase.settings = MACHINE_SETTINGS
TestHybrid = RequestMachine.TestCase
TestKv = KvMachine.TestCase
TestHidden = HiddenMachine.TestCase
