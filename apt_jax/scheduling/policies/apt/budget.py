"""How long the prompts of an iteration may take, in seconds of their matrix products.

Products that are computed while the weights are read cost nothing. An iteration takes as many prompt tokens as that
hides, and more only where a first token (or the next one after a preemption) would come too late otherwise, within a
quarter of the tightest promise. If that is minutes away nobody watches (offline work): then prompts come first, since
few decodes read the weights as often as many.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from apt_jax.cache import KINDS, CacheKind
from apt_jax.request import Request
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.plan import Reason
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View

STEP_SHARE = 0.25  # of the tightest promise, a gap or a first token, that one iteration may last
WATCHED_S = 300.0  # a promise, of a gap or a first token, beyond which nobody waits for the next token
TARGET_SHARE = 0.5  # of what is left of its limit within which a prompt is to be computed


@dataclass(frozen=True)
class Prompt:
    """A request with prompt tokens to compute: one that runs, or one that the draft admits.

    `admission` is its index in the draft's admissions, None for one that runs. `computed` tokens are cached already.
    `slack_s` is what is left of the limit within which its next token is due; infinite for a late one.
    """

    request: Request
    kind: CacheKind
    reason: Reason
    admission: int | None
    uncomputed: int
    computed: int
    slack_s: float
    in_lane: bool

    def prefix_s(self, model: CostModel, tokens: int) -> float:
        """Seconds that a chunk of `tokens` takes for what is cached already."""
        return model.prefix_s(self.kind, tokens, self.computed) if self.computed and tokens else 0.0


@dataclass(frozen=True)
class Budget:
    """Of one iteration, in seconds.

    `free_s` of prompts' products are hidden, `given_s` is what is given to them, free ones included. The iteration may
    become longer by `most_extra_s`, by products and by what chunks pay for their prefixes.
    """

    free_s: float
    given_s: float
    most_extra_s: float


class Asked(NamedTuple):
    """The prompts of a draft in the order in which they are computed, and what its iteration gives to them."""

    prompts: list[Prompt]
    budget: Budget


def ask(view: View, draft: Draft) -> Asked:
    """Of an iteration of `draft`."""
    wanted = prompts(view, draft)
    return Asked(wanted, prefill_budget(view, draft, wanted))


def prompts(view: View, draft: Draft) -> list[Prompt]:
    """Those of the draft: the lane first, the oldest ahead; then, if paced, by what is left of their limits."""
    running, waiting = view.running, view.waiting
    found = [
        Prompt(
            running.requests[i], KINDS[running.kind[i]], Reason.CONTINUES_PREFILL, None, int(running.uncomputed[i]),
            int(running.tokens[i] - running.uncomputed[i]), float(view.slack_r[i]),
            bool(view.lane_r[i]),
        )
        for i in np.flatnonzero(draft.prefills & draft.stays).tolist()
    ]  # fmt: skip
    found += [
        Prompt(
            waiting.requests[i], entry.kind, entry.reason, k, int(waiting.uncomputed[i]) - cached, cached,
            float(view.slack_w[i]), bool(view.lane_w[i]),
        )
        for k, entry in enumerate(draft.admitted)
        for i in [entry.position]
        for cached in [view.state.cached_tokens(waiting.requests[i], entry.kind)]
    ]  # fmt: skip

    def urgency(prompt: Prompt) -> float:
        if prompt.in_lane:
            return prompt.request.order  # the bound on waiting needs its oldest to come first
        return prompt.slack_s if view.options.paced else 0.0

    return sorted(found, key=lambda prompt: (not prompt.in_lane, urgency(prompt)))


def prefill_budget(view: View, draft: Draft, wanted: list[Prompt]) -> Budget:
    """What the iteration of `draft` gives to these prompts; everything if not paced or without a cost model."""
    model, decodes = view.context.cost_model, draft.decode_index
    if model is None or not view.options.paced:
        return Budget(np.inf, np.inf, np.inf)
    free_s = max(0, model.free_tokens - len(decodes)) * model.prompt_token_s
    step_s = view.decode_s(decodes) if len(decodes) else model.step_s(StepLoad(1))
    promise_s = view.tightest_s(decodes)
    extra_s = max(STEP_SHARE * promise_s - step_s, min(step_s, (promise_s - step_s) / 2), 0.0)
    is_watched = len(decodes) > 0 and promise_s <= WATCHED_S
    needed_s = _needed_s(model, wanted, free_s, step_s) if is_watched else np.inf
    return Budget(free_s, min(free_s + extra_s, max(free_s, needed_s)), extra_s)


def _needed_s(model: CostModel, wanted: list[Prompt], free_s: float, step_s: float) -> float:
    """Seconds of products per iteration with which all prompts in time are computed by their targets.

    The first of them need W seconds of products within s seconds. An iteration with b seconds of products lasts
    T + b - F, F of them being free; so s / (T + b - F) iterations are enough if b (s - W) >= W (T - F).
    """
    needed_s = work_s = 0.0
    for prompt in wanted:
        if np.isinf(prompt.slack_s):
            continue
        work_s += prompt.uncomputed * model.prompt_token_s + prompt.prefix_s(model, prompt.uncomputed)
        target_s = TARGET_SHARE * prompt.slack_s - step_s
        if target_s <= work_s:
            return np.inf
        needed_s = max(needed_s, work_s * max(step_s - free_s, 0.0) / (target_s - work_s))
    return needed_s
