"""Seconds of prefills and decodes over several instances, each of which has all weights and a part of the sequence.

LoongServe (arXiv 2404.09526, sections 3 and 5): a prefill over u instances passes keys and values around a ring,
behind the attention; a decode sends queries to whoever holds keys, and partial results back, and its masters share the
requests. All other figures are the cost model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from apt_jax.cache import CacheKind
from apt_jax.scheduling.costs.cost_model import BYTES, CostModel


@dataclass(frozen=True)
class ElasticCosts:
    """Of instances with one device each, between any two of which there is a link of the hardware's bandwidth."""

    model: CostModel

    @property
    def token_bytes(self) -> float:
        """Of a token's keys and values, over all layers."""
        c = self.model.model
        return 2.0 * c.num_hidden_layers * c.hidden_size * self.model.number_bytes

    def prefill_s(self, lengths: Sequence[int], instances: int) -> float:
        """An iteration of these prompts over so many instances: A + B sum(len) + C sum(len^2) in the paper."""
        m, tokens = self.model, sum(lengths)
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        dense_s = m.dense_s(tokens * m.token_s / instances + len(lengths) * m.logits_s)
        ring_s = tokens * self.token_bytes * (instances - 1) / instances / m.hardware.link_bytes_per_s
        latency_s = (instances - 1) * m.model.num_hidden_layers * m.hardware.link_latency_s
        return m.overhead_s + dense_s + max(pairs * m.pair_s / instances, ring_s) + latency_s

    def decode_s(self, tokens_by_instance: Sequence[int], requests: int, masters: int) -> float:
        """An iteration of so many requests whose contexts lie on these instances."""
        m, c = self.model, self.model.model
        kv = CacheKind.KV.index
        mine = -(-requests // masters)
        dense_s = m.dense_s(mine * (m.token_s + m.logits_s))
        attention_s = max(tokens_by_instance) * m.attention_s[kv] + mine * m.request_s[kv]
        if len(tokens_by_instance) == 1:
            return m.overhead_s + dense_s + attention_s
        sent = 2 * requests * c.hidden_size * 2 * BYTES * c.num_hidden_layers  # queries, and float32 results with sums
        latency_s = 2 * c.num_hidden_layers * m.hardware.link_latency_s
        return m.overhead_s + dense_s + attention_s + sent / m.hardware.link_bytes_per_s + latency_s

    def move_s(self, tokens: int) -> float:
        """Of moving a context from one instance to another."""
        return tokens * self.token_bytes / self.model.hardware.link_bytes_per_s
