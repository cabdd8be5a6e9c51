"""Which hidden requests are converted to KV: where KV is faster and memory would stay free for everyone's growth."""

from apt_jax.cache import CacheKind
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View

RESERVE_SHARE = 4  # a quarter of the pool stays free
ADDED_PER_PAGE = CacheKind.KV.blocks_per_page - CacheKind.HIDDEN.blocks_per_page


def conversions(view: View, draft: Draft) -> list[int]:
    """Indices of decoding requests to convert, the oldest first; none while anyone waits or has been preempted."""
    limits, pool = view.state.limits, view.state.pool
    if not view.options.convert or not view.is_hybrid or view.context.rho_s < 0 or draft.preempted:
        return []
    if len(view.waiting) > len(draft.admitted):
        return []
    reserve = max(limits.watermark_blocks, pool.num_blocks // RESERVE_SHARE) + CacheKind.KV.blocks_per_page * len(
        view.running
    )
    room = draft.free_blocks - reserve
    budget = limits.max_num_batched_tokens  # projected tokens, like prefill
    chosen = []
    for i in draft.decode_index[view.running.kind[draft.decode_index] == CacheKind.HIDDEN.index].tolist():
        blocks, tokens = int(view.pages_r[i]) * ADDED_PER_PAGE, int(view.running.tokens[i])
        if blocks <= room and tokens <= budget:
            chosen.append(i)
            room -= blocks
            budget -= tokens
    return chosen
