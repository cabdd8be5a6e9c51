"""Whether decodes and prompt chunks share an iteration, and whose turn it is if they do not."""

from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.policies.apt.admission import admit
from apt_jax.scheduling.policies.apt.budget import Asked, ask
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.eviction import start_draft
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.lane import admit_lane


def choose_draft(view: View) -> tuple[Draft, Asked | None]:
    """The attempt to carry out: decodes and prefills together where that is faster, else one of the two.

    And, where that was computed on the way, what its prompts ask for.
    """
    if not len(view.waiting) and not view.prefills_r.any():
        return start_draft(view, view.decodes_r, view.prefills_r, mixes=True), None  # nothing to choose
    if view.options.mixed and view.context.cost_model is not None:
        draft = admit(view, start_draft(view, view.decodes_r, view.prefills_r, mixes=True))
        if not len(draft.decode_index) or not (draft.admitted or draft.prefills.any()):
            return draft, None
        asked = ask(view, draft)
        if _gains_by_mixing(view, draft, asked):
            return draft, asked
    return _alternate(view), None


def _gains_by_mixing(view: View, draft: Draft, asked: Asked) -> bool:
    """Whether decodes and prompt chunks take no longer together than one after the other.

    Together the weights are read once, but the tokens are padded to another program's size. Attention costs the
    same. `asked` says what the prompts ask for and get.
    """
    model = view.context.cost_model
    assert model is not None
    decodes = len(draft.decode_index)
    wanted = sum(prompt.uncomputed for prompt in asked.prompts)
    if not wanted:
        return True
    given_s = asked.budget.given_s
    most = min(view.state.limits.max_num_batched_tokens - decodes, given_s / model.prompt_token_s)
    tokens = min(wanted, max(int(most), 1))
    decode, prefill = StepLoad(decode_requests=decodes, samples=decodes), StepLoad(tokens, samples=1)
    both = StepLoad(tokens, decode_requests=decodes, samples=decodes + 1)
    return model.step_s(both) <= model.step_s(decode) + model.step_s(prefill)


def _alternate(view: View) -> Draft:
    """Prefill or decode, by cumulative pending time. Those in the lane run in either case, so that its bound holds."""
    decodes, prefills = view.decodes_r, view.prefills_r
    pending_w = (view.now + view.tick_s - view.waiting.since_s)[~view.late_w]
    pending_r = view.now + view.tick_s - view.running.since_s
    urgent_w = float(pending_w.sum()) + float(pending_r[prefills & ~view.late_r].sum())
    urgent_r = float(pending_r[decodes & ~view.late_r].sum())
    if urgent_w >= urgent_r or not decodes.any():
        draft = admit(view, start_draft(view, decodes & view.lane_r, prefills, mixes=False))
        if draft.admitted or prefills.any():
            return draft
    return admit_lane(view, start_draft(view, decodes, prefills & view.lane_r, mixes=False))
