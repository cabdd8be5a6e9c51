"""How many prompt tokens an iteration may compute, and whom they reach."""

from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View

STEP_SHARE = 0.25  # of the tightest gap SLO that one iteration may last
MIN_PREFILL_TOKENS = 16


def prefill_budget(view: View, draft: Draft) -> int:
    """Prompt tokens that fit together with the draft's decodes: within the token limit and every gap SLO."""
    index = draft.decode_index
    budget = view.state.limits.max_num_batched_tokens - len(index)
    model = view.context.cost_model
    if model is None or not len(index):
        return max(budget, 0)
    limit_s = STEP_SHARE * float(view.running.tbt_slo_s[index].min())
    per_token_s = max(model.token_s * model.scales.compute * model.scales.dense, 1e-12)
    free = max(0, model.free_tokens - len(index))  # computed while the weights are read
    affordable = free + int(max(0.0, limit_s - view.decode_s(index)) / per_token_s)
    return max(min(budget, max(affordable, MIN_PREFILL_TOKENS)), 0)


def within_budget(view: View, draft: Draft) -> tuple[Draft, int]:
    """`draft` without the last admissions that the prefill budget does not reach, and its budget.

    Those preempted for them stay, which takes tokens of the budget: hence the loop.
    """
    while True:
        budget = prefill_budget(view, draft)
        left = budget - int(view.running.uncomputed[draft.prefills & draft.stays].sum())
        reached = 0
        for entry in draft.admitted:
            if left <= 0:
                break
            left -= int(view.waiting.uncomputed[entry.position])
            reached += 1
        if reached == len(draft.admitted):
            return draft, budget
        draft = draft.without_last(len(draft.admitted) - reached)
