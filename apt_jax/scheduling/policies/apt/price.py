"""Which cache kind a newcomer may have: the price of memory, beyond the single iteration of the formulation.

The formulation weighs a hidden request's delay against one iteration's memory, but both last as long as the request.
So two questions are asked first. Would a pool full of hidden requests bring more tokens per second than one full of KV?
Then memory is worth the delay once it is scarce. And is it scarce: would this request as KV leave less than half of the
pool expected free? Until then KV, which is faster, costs nobody anything.
"""

import math

import numpy as np

from apt_jax.cache import CacheKind, per_kind
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.knapsack.problem import Bools, Floats, Ints

SCARCE_SHARE = 0.5  # of the pool, expected to be held at some time: beyond it memory has a price


def allowed_kinds(view: View, draft: Draft, candidates: Ints) -> tuple[Bools, Bools]:
    """`[n]` whether each waiting request may be admitted as KV, and as hidden. One of them is always true."""
    kv, hidden, model = view.kv_kind, view.hidden_kind, view.context.cost_model
    as_kv, as_hidden = np.full(len(candidates), kv is not None), np.full(len(candidates), hidden is not None)
    if kv is None or hidden is None or model is None or not view.options.sustained:
        return as_kv, as_hidden
    as_kv, as_hidden = _by_memory(view, draft, candidates, kv, model)
    prefers = _cached_as_hidden(view, candidates, kv, hidden, model)
    return as_kv & ~prefers, as_hidden | prefers


def _by_memory(view: View, draft: Draft, candidates: Ints, kv: CacheKind, model: CostModel) -> tuple[Bools, Bools]:
    """`allowed_kinds` as if nothing were cached."""
    as_kv, as_hidden = np.full(len(candidates), True), np.full(len(candidates), True)
    tokens = _mean_tokens(view, candidates)
    at_none_s = model.hidden_delay_s(0)  # linear in tokens
    delay_s = at_none_s + (model.hidden_delay_s(1) - at_none_s) * tokens
    slower = delay_s > 0
    if not slower.any():
        return as_kv, as_hidden
    if not hidden_pays(view):
        scarce = view.pages_w[candidates] * kv.blocks_per_page > view.state.pool.num_blocks  # not even alone
    elif _is_worth_mixing(view, model, float(delay_s[slower].mean())):
        scarce = _scarce_as_kv(view, draft, candidates, kv)
    else:
        scarce = np.ones(len(candidates), np.bool_)
    return ~(slower & scarce), ~(slower & ~scarce)


def _cached_as_hidden(view: View, candidates: Ints, kv: CacheKind, hidden: CacheKind, model: CostModel) -> Bools:
    """`[n]` whether so much more of it is cached as hidden that computing the rest as KV takes longer than its delay.

    The delay is that of all its decodes to come; what is cached as hidden and would be projected for KV is no delay.
    """
    missing = view.cached_of(kv)[candidates] < view.cached_of(hidden)[candidates]
    if not missing.any():
        return missing
    more = (view.cached_of(hidden) - view.cached_of(kv))[candidates]
    decodes = 1.0 if view.remaining_w is None else view.remaining_w[candidates]
    at_none_s = model.hidden_delay_s(0)
    delay_s = at_none_s + (model.hidden_delay_s(1) - at_none_s) * _mean_tokens(view, candidates)
    return np.asarray(missing & (more * model.prompt_token_s > delay_s * decodes))


def _is_worth_mixing(view: View, model: CostModel, delay_s: float) -> bool:
    """Whether KV saves the running requests more than an iteration with both kinds costs."""
    both = StepLoad(decode_requests=2, decodes=per_kind(lambda kind: int(kind in (view.kv_kind, view.hidden_kind))))
    hidden = StepLoad(decode_requests=2, decodes=per_kind(lambda kind: 2 * (kind is view.hidden_kind)))
    mixing_s = model.scales.mixing * (model.mixing_s(both) - model.mixing_s(hidden))
    return max(1, int(view.running.decoding.sum())) * delay_s >= mixing_s


def lane_kind(view: View, pages: int) -> CacheKind:
    """The kind of a request of the lane: the smallest, unless its delay costs more than its memory is worth."""
    kv = view.kv_kind
    if kv is None or hidden_pays(view) or pages * kv.blocks_per_page > view.state.pool.num_blocks:
        return view.kinds[-1]
    return kv


def hidden_pays(view: View) -> bool:
    """Whether memory that is saved is worth the delay of hidden attention, for requests such as those that wait."""
    kv, hidden, model = view.kv_kind, view.hidden_kind, view.context.cost_model
    if kv is None or hidden is None or model is None or not view.options.sustained or not len(view.waiting):
        return True
    tokens = float(_mean_tokens(view, np.arange(len(view.waiting))).mean())
    return hidden_brings_more(model, kv, hidden, tokens, view.state.pool.num_blocks, view.block_size)


def hidden_brings_more(
    model: CostModel, kv: CacheKind, hidden: CacheKind, tokens: float, num_blocks: int, block_size: int
) -> bool:
    """Whether a pool full of hidden requests of `tokens` tokens brings more tokens per second than one full of KV."""

    def tokens_per_s(kind: CacheKind) -> float:
        requests = num_blocks / (kind.blocks_per_page * (tokens / block_size + 0.5))  # half a page of rounding
        decodes = math.ceil(requests)
        counts = per_kind(lambda other: decodes if other is kind else 0)
        contexts = per_kind(lambda other: int(requests * tokens) if other is kind else 0)
        load = StepLoad(decode_requests=decodes, samples=decodes, context_tokens=contexts, decodes=counts)
        return requests / model.step_s(load)

    return tokens_per_s(hidden) > tokens_per_s(kv)


def _mean_tokens(view: View, candidates: Ints) -> Floats:
    """`[n]` mean context over the rest of each one's life, as far as it is predicted."""
    tokens = view.waiting.tokens[candidates].astype(np.float64)
    return tokens if view.remaining_w is None else tokens + view.remaining_w[candidates] / 2


def _scarce_as_kv(view: View, draft: Draft, candidates: Ints, kv: CacheKind) -> Bools:
    """`[n]` whether too much of the pool would be held at some time with this one, and those before it, as KV."""
    per_page = np.full(len(candidates), kv.blocks_per_page)
    staying = np.flatnonzero(draft.stays)
    if view.remaining_w is None:
        held = np.array([draft.claims[staying].sum()], np.float64)
        more = (view.pages_w[candidates] * per_page)[:, None].astype(np.float64)
    else:
        held, more = view.expected_r(staying).sum(axis=0), view.expected_w(candidates, per_page)
    expected = held + np.cumsum(more, axis=0)
    return np.asarray(expected.max(axis=1) > SCARCE_SHARE * view.state.pool.num_blocks)
