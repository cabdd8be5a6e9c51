"""Which hidden requests are converted to KV: where KV is faster and memory would stay free for everyone's growth."""

from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View

RESERVE_SHARE = 4  # a quarter of the pool stays free


def conversions(view: View, draft: Draft) -> list[int]:
    """Indices of decoding requests to convert, the oldest first; none while anyone waits or has been preempted."""
    limits, pool = view.state.limits, view.state.pool
    if not view.options.convert or len(view.kinds) < 2 or view.context.rho_s < 0 or draft.preempted:
        return []
    if len(view.waiting) > len(draft.admitted):
        return []
    reserve = max(limits.watermark_blocks, pool.num_blocks // RESERVE_SHARE) + 2 * len(view.running)
    room = draft.free_blocks - reserve
    budget = limits.max_num_batched_tokens  # projected tokens, like prefill
    chosen = []
    for i in draft.decode_index[view.running.blocks_per_page[draft.decode_index] == 1]:
        pages, tokens = int(view.pages_r[i]), int(view.running.tokens[i])
        if pages <= room and tokens <= budget:
            chosen.append(int(i))
            room -= pages
            budget -= tokens
    return chosen
