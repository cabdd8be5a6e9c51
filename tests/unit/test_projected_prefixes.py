"""Cached hidden pages of which KV is made: for requests that are converted, and for those admitted with KV."""

import pytest

from apt_jax.cache import OutOfBlocks
from apt_jax.request import FinishReason, Request
from apt_jax.scheduling.costs.cost_model import CostModel, Scales
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.projection import least_projected_tokens
from apt_jax.scheduling.plan import Converted, Plan, Reason, Scheduled
from apt_jax.scheduling.policies.packing import choose_kind
from tests.support.host_loop import HostLoop
from tests.unit.test_prefix_pool import HIDDEN, KV, ask, loop, waiting


def share_hidden(runs: HostLoop) -> tuple[Request, Request]:
    """Two hidden requests that run, of 14 tokens each, the first 12 of which are in three pages of both."""
    requests = ask(range(14), output=9), ask(range(14), output=9)
    for request in requests:
        runs.state.add(request)
        tokens = runs.state.tokens_to_compute(request, HIDDEN)
        runs.run(Plan(scheduled=(Scheduled(request, tokens, HIDDEN, Reason.DECODES),)))
    assert requests[1].num_cached_tokens == 12
    return requests


def test_shared_pages_are_converted_into_new_blocks_and_stay_for_others():
    runs = loop(mode="hybrid")
    state = runs.state
    first, again = share_hidden(runs)
    shared, own, free = list(first.table.blocks[0][:3]), again.table.blocks[0][3], state.pool.num_free
    state.apply(Plan(converted=(Converted(again, Reason.CONVERTED_MEMORY_FREE),)), 0.0)
    state.check()
    assert state.pool.num_free == free - 7, "two for each of three shared pages and one for its own"
    (moved,) = state.projections
    assert moved.sources == [*shared, own] and moved.targets == again.table.blocks
    assert again.table.blocks[0][3] == own and not set(shared) & {b for blocks in again.table.blocks for b in blocks}
    assert first.table.blocks[0][:3] == shared and state.shared_blocks(first) == 0
    assert state.cached_tokens(waiting(runs, range(14)), HIDDEN) == 12
    state.apply(Plan(converted=(Converted(first, Reason.CONVERTED_MEMORY_FREE),)), 0.0)
    state.check()
    assert state.projections[0].targets[0] == state.projections[0].sources
    assert state.cached_tokens(waiting(runs, range(14)), HIDDEN) == 0, "what was converted in place is gone"


@pytest.mark.parametrize(("least", "found"), [(100, 16), (None, 0)])
def test_pages_of_a_converted_request_serve_kv_where_projected_keys_are_those_of_a_prompt(least, found):
    """They are not with int8, and nothing is projected then."""
    runs = loop(mode="hybrid")
    state = runs.state
    state.least_projected_tokens = least
    again = share_hidden(runs)[1]
    state.apply(Plan(converted=(Converted(again, Reason.CONVERTED_MEMORY_FREE),)), 0.0)
    for _ in range(3):
        runs.run(Plan(scheduled=(Scheduled(again, 1, KV, Reason.DECODES),)))
        state.check()
    assert again.num_computed_tokens == 17 and again.num_conversions == 1
    asked = waiting(runs, [*range(14), *again.output_token_ids])
    assert (state.cached_tokens(asked, KV), state.cached_tokens(asked, HIDDEN)) == (found, 12)
    state.finish(again, FinishReason.ABORT)
    state.check()
    assert state.cached_tokens(asked, KV) == found


def test_a_conversion_without_blocks_changes_nothing():
    runs = loop(mode="hybrid", num_blocks=11)  # 5 held, and 7 would be needed
    again = share_hidden(runs)[1]
    with pytest.raises(OutOfBlocks):
        runs.state.apply(Plan(converted=(Converted(again, Reason.CONVERTED_MEMORY_FREE),)), 0.0)
    runs.state.check()
    assert again.cache_kind is HIDDEN and runs.state.shared_blocks(again) == 3


def hidden_prefix(runs: HostLoop, tokens: int) -> None:
    """Cache these tokens as hidden pages, which nobody holds."""
    request = ask(range(tokens), output=1)
    runs.state.add(request)
    runs.run(Plan(scheduled=(Scheduled(request, tokens, HIDDEN, Reason.DECODES),)))
    assert request.finish_reason is FinishReason.LENGTH


def admit_kv(runs: HostLoop, tokens) -> Request:
    request = ask(tokens)
    runs.state.add(request)
    count = runs.state.tokens_to_compute(request, KV)
    runs.run(Plan(scheduled=(Scheduled(request, count, KV, Reason.DECODES),)))
    runs.state.check()
    return request


def test_a_kv_request_takes_a_hidden_prefix_by_projecting_it_into_blocks_of_its_own():
    runs = loop(mode="hybrid")
    state = runs.state
    state.least_projected_tokens = 8
    hidden_prefix(runs, 17)
    request = admit_kv(runs, range(14))
    (moved,) = state.projections
    assert request.num_cached_tokens == 12 and state.num_projected_tokens == 12
    assert moved.targets == [blocks[:3] for blocks in request.table.blocks] and len(moved.sources) == 3
    assert not set(moved.sources) & {block for blocks in moved.targets for block in blocks}
    assert state.cached_tokens(waiting(runs, range(17)), HIDDEN) == 16, "hidden pages stay as they are"
    longer = waiting(runs, range(17))
    assert state.cached_tokens(longer, KV) == 12, "three pages are KV too by now, and one more as hidden is too little"
    state.least_projected_tokens = 4
    assert (state.cached_tokens(longer, KV), state.projected_tokens(longer, KV)) == (16, 4)
    assert admit_kv(runs, range(18)).num_cached_tokens == 16 and state.num_projected_tokens == 4
    state.least_projected_tokens = None
    state.forget_prefixes()
    hidden_prefix(runs, 17)
    assert admit_kv(runs, range(100, 114)).num_cached_tokens == 0


def test_a_prefix_is_projected_as_far_as_there_are_blocks_beside_it():
    runs = loop(mode="hybrid", num_blocks=8)
    runs.state.least_projected_tokens = 4
    hidden_prefix(runs, 17)  # three of its pages are held, five blocks are left
    request = ask(range(14))
    runs.state.add(request)
    runs.run(Plan(scheduled=(Scheduled(request, 2, KV, Reason.DECODES),)))
    runs.state.check()
    assert request.num_cached_tokens == 8, "two pages of four blocks; the fifth is none"
    assert request.num_computed_tokens == 10, "what is missing is computed in later iterations"


def test_kinds_as_which_more_is_cached_go_first():
    runs = loop(mode="hybrid")
    state = runs.state
    hidden_prefix(runs, 17)
    one = waiting(runs, range(14))
    assert [*state.kinds_to_admit(one)] == [HIDDEN, KV]
    assert choose_kind(state, one, 40) == (HIDDEN, Reason.ADMITTED_HIDDEN_CACHED)
    assert choose_kind(state, waiting(runs, range(50, 64)), 40) == (KV, Reason.ADMITTED_KV)
    state.least_projected_tokens = 4
    assert choose_kind(state, one, 40) == (KV, Reason.ADMITTED_KV), "projected it is cached as KV too"
    assert state.projected_tokens(one, KV) == 12 and state.projected_tokens(one, HIDDEN) == 0


def test_projecting_pays_where_one_product_takes_less_than_the_prompt():
    model = CostModel(MODELS["opt-13b"], HARDWARE["tpu-v6e"])
    least = least_projected_tokens(model)
    assert least is not None

    def projects_s(tokens):
        return -(-tokens // 256) * (256 * model.projection_s + model.overhead_s)

    assert projects_s(least) < least * model.token_s and projects_s(least - 1) >= (least - 1) * model.token_s
    assert least_projected_tokens(CostModel(model.model, model.hardware, cache_dtype="int8")) is None
    assert least_projected_tokens(model.with_scales(Scales(overhead=1e6))) is None
