"""Which prompts an iteration computes, and how many tokens of each: the lane's first, then the most urgent.

A cached hidden prefix is projected to keys and values again in every later chunk. Up to a length that costs less than
what the chunk hides behind reading the weights; beyond it the rest of the prompt is computed in one piece.
"""

from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.plan import Scheduled
from apt_jax.scheduling.policies.apt.budget import Asked, Budget, Prompt, ask
from apt_jax.scheduling.policies.apt.draft import Draft
from apt_jax.scheduling.policies.apt.facts.view import View

MIN_PREFILL_TOKENS = 16  # of the first prompt, whatever the budget
PREFIX_SHARE = 0.5  # of the free seconds that a prefix may take before the rest is computed in one piece


def share_out(view: View, draft: Draft, asked: Asked | None = None) -> tuple[Draft, list[Scheduled]]:
    """Chunks of the iteration, and `draft` without the admissions that get none.

    Those preempted for them stay, which takes seconds of the budget: hence the loop. `asked` is of `draft`, if known.
    """
    while True:
        chunks = _chunks(view, draft, asked or ask(view, draft))
        asked = None
        admitted = {prompt.admission for prompt, _ in chunks}
        unreached = [k for k in range(len(draft.admitted)) if k not in admitted]
        if not unreached:
            return draft, [Scheduled(p.request, tokens, p.kind, p.reason) for p, tokens in chunks]
        draft = draft.without(unreached)


def _chunks(view: View, draft: Draft, asked: Asked) -> list[tuple[Prompt, int]]:
    model = view.context.cost_model if view.options.paced else None
    tokens = view.state.limits.max_num_batched_tokens - len(draft.decode_index)
    left = None if model is None else _Left(model, asked.budget)
    chunks: list[tuple[Prompt, int]] = []
    for prompt in asked.prompts:
        if tokens <= 0:
            break
        size = min(prompt.uncomputed, tokens)
        if left is not None:
            size = min(size, left.size_of(prompt, is_first=not chunks))
            left.take(prompt, size)
        if size:
            chunks.append((prompt, size))
            tokens -= size
    return chunks


class _Left:
    """What is left of an iteration's budget, in seconds: for products in all, of them free, and to make it longer."""

    def __init__(self, model: CostModel, budget: Budget):
        self._model, self._budget, self._token_s = model, budget, model.prompt_token_s
        self._given_s, self._free_s, self._extra_s = budget.given_s, budget.free_s, budget.most_extra_s

    def size_of(self, prompt: Prompt, *, is_first: bool) -> int:
        """Tokens that a chunk of the prompt gets; 0 if that is too few to be worth it. The first one always gets on."""
        least, most = self._least(prompt), self._affordable(prompt)
        size = min(most, int(self._given_s / self._token_s + 1e-9))
        if size >= least:
            return size
        return max(min(MIN_PREFILL_TOKENS, prompt.uncomputed), min(least, most)) if is_first else 0

    def take(self, prompt: Prompt, size: int) -> None:
        """Take a chunk's seconds."""
        if size:
            self._extra_s -= self._extra_of(prompt, size)
            self._given_s -= size * self._token_s
            self._free_s = max(0.0, self._free_s - size * self._token_s)

    def _least(self, prompt: Prompt) -> int:
        """Tokens that a chunk of it has at least."""
        hidden_tokens = min(prompt.uncomputed, int(self._budget.free_s / self._token_s))
        if prompt.prefix_s(self._model, hidden_tokens) > PREFIX_SHARE * self._budget.free_s:
            return prompt.uncomputed
        return min(prompt.uncomputed, MIN_PREFILL_TOKENS)

    def _affordable(self, prompt: Prompt) -> int:
        """Tokens with which the iteration does not become too long."""
        fits, too_many = 0, prompt.uncomputed + 1
        if self._extra_of(prompt, prompt.uncomputed) <= self._extra_s:
            return prompt.uncomputed
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self._extra_of(prompt, middle) <= self._extra_s else (fits, middle)
        return fits

    def _extra_of(self, prompt: Prompt, size: int) -> float:
        """Seconds by which a chunk of `size` tokens makes the iteration longer."""
        return max(0.0, size * self._token_s - self._free_s) + prompt.prefix_s(self._model, size)
