"""Which hidden requests are converted to KV: where KV is faster and memory would stay free for everyone's growth."""

from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View

RESERVE_SHARE = 4  # a quarter of the pool stays free


def conversions(view: View, draft: Draft) -> list[int]:
    """Indices of decoding requests to convert, the oldest first; none while anyone waits or has been preempted."""
    limits, pool, kv, hidden = view.state.limits, view.state.pool, view.kv_kind, view.hidden_kind
    if kv is None or hidden is None or hidden.converts_to is not kv or view.rho_s < 0:
        return []
    if not view.options.convert or draft.preempted or len(view.waiting) > len(draft.admitted):
        return []
    reserve = max(limits.watermark_blocks, pool.num_blocks // RESERVE_SHARE) + kv.blocks_per_page * len(view.running)
    room = draft.free_blocks - reserve
    added_per_page = kv.blocks_per_page - hidden.blocks_per_page
    budget = limits.max_num_batched_tokens  # projected tokens, like prefill
    chosen = []
    for i in draft.decode_index[view.running.kind[draft.decode_index] == hidden.index].tolist():
        blocks, tokens = int(view.pages_r[i]) * added_per_page, int(view.running.tokens[i])
        if blocks <= room and tokens <= budget:
            chosen.append(i)
            room -= blocks
            budget -= tokens
    return chosen
