"""Seconds of iterations that have a share of a chip, by the cost model of the whole one.

Products take 1 / share as long. Memory is read at full speed by `SATURATES` of the processors, and more slowly by
fewer, in proportion: assumed. What prompts read meanwhile, the weights once an iteration, is missing to the decodes,
but no more than half of the bandwidth; prompts are not slowed by decodes, which flatters this form.
"""

from dataclasses import dataclass

from apt_jax.cache import CacheKind
from apt_jax.scheduling.costs.cost_model import CostModel

SATURATES = 0.5


@dataclass(frozen=True)
class ShareCosts:
    """Of KV requests."""

    model: CostModel

    def bandwidth(self, share: float) -> float:
        """Part of the memory's bandwidth that a share of the processors reaches."""
        return min(share / SATURATES, 1.0)

    def prefill_s(self, tokens: int, pairs: float, prompts: int, share: float) -> float:
        """An iteration of whole prompts."""
        m = self.model
        read_s = m.weights_s / self.bandwidth(share)
        products_s = (tokens * m.token_s + prompts * m.logits_s) / share
        return m.overhead_s + max(read_s, products_s) + pairs * m.pair_s / share

    def decode_s(self, requests: int, context_tokens: int, share: float, prefill_s: float) -> float:
        """An iteration of decodes beside a prefill of `prefill_s` seconds; 0: beside none."""
        m, kv = self.model, CacheKind.KV.index
        left = max(1.0 - m.weights_s / prefill_s, 0.5) if prefill_s else 1.0
        bandwidth = min(self.bandwidth(share), left)
        read_s = m.weights_s / bandwidth
        products_s = requests * (m.token_s + m.logits_s) / share
        attention_s = (context_tokens * m.attention_s[kv] + requests * m.request_s[kv]) / bandwidth
        return m.overhead_s + max(read_s, products_s) + attention_s
