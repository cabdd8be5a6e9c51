"""`apt` asked for one plan, with the lengths it predicts given."""

import numpy as np

from apt_jax.scheduling.policies.apt.facts.ledger import Ledger
from apt_jax.scheduling.policies.apt.facts.view import View
from apt_jax.scheduling.policies.apt.options import AptOptions
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from tests.support.scheduling_loop import TINY
from tests.support.tiny_states import lines


class Foretold:
    """A predictor that knows: `remaining` tokens for each, or by prompt length."""

    def __init__(self, remaining):
        self._remaining = remaining

    def remaining_tokens(self, prompt_tokens, generated):
        if isinstance(self._remaining, dict):
            return np.array([self._remaining[int(n)] for n in prompt_tokens], np.float64)
        return np.full(len(prompt_tokens), self._remaining, np.float64)

    def remaining_of(self, requests, prompt_tokens, generated):
        return self.remaining_tokens(prompt_tokens, generated)


def decide(state, now, options="apt:prediction=off", model=TINY, remaining=256.0):
    return lines(make_policy(options, PolicyContext(model, predictor=Foretold(remaining))).schedule(state, now))


def view_of(state, now, *, model=TINY, remaining=256.0, tick_s=0.0, **options):
    """What `apt` knows of `state` before it decides."""
    context = PolicyContext(model, predictor=Foretold(remaining))
    return View(context, AptOptions(**options), state, *Ledger().update(state), now, tick_s)
