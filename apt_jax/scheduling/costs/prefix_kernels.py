"""What a prompt's later chunks cost because of the tokens that are cached already, by what the device runs: counts.

A chunk of n tokens over L cached ones, in one layer; its query-key pairs are counted elsewhere. Over a KV prefix it
reads keys and values. Over a hidden prefix it projects the vectors to keys and values again, or with few queries
absorbs these (`apt_jax/attention/prefix.py`; docs/hybrid_cache.md). Letters as in docs/architecture.md.
"""

from dataclasses import dataclass

from apt_jax.cache import KINDS
from apt_jax.model_config import ModelConfig
from apt_jax.scheduling.costs.decode_kernels import NUMBER_BYTES, START_S, Rates
from apt_jax.scheduling.costs.step_load import Chunk

BALANCE_FLOPS_PER_BYTE = 240  # by which attention/prefix.py chooses, on every device
XLA_CHUNK_TOKENS, XLA_CHUNK_STARTS = 128, 10


@dataclass(frozen=True)
class PrefixKernel:
    """Attention of chunks over cached prefixes.

    Attributes:
        name: what runs.
        source: where the counts are from.
        tile: queries that share one read of keys and values.
        absorbed_reads: times that an absorbed query reads the row's vectors for itself, as the choice counts them; 0
            where queries share reads.
        absorbed_tile_bytes: where they share: float32 sums of the queries (pairs of token and head) that do.
        may_absorb: whether hidden prefixes can be absorbed at all.
        loops: XLA's loops instead: every row with a prefix over all tokens of the iteration.
    """

    name: str
    source: str
    tile: int = 256
    absorbed_reads: int = 0
    absorbed_tile_bytes: int = 11 * 2**19
    may_absorb: bool = True
    loops: bool = False

    def seconds(
        self, chunk: Chunk, model: ModelConfig, rates: Rates, slots: int, number_bytes: float = NUMBER_BYTES
    ) -> float:
        """Seconds of a layer; `slots` are all tokens of the iteration, `number_bytes` those of a cached number."""
        if self.loops:
            return self._loop_s(chunk, model, rates, slots, number_bytes)
        D, L = model.hidden_size, chunk.cached_tokens
        keys_values = -(-chunk.tokens // self.tile) * L * 2 * D
        if not KINDS[chunk.kind].is_projected:
            return keys_values * number_bytes / rates.bytes_per_s
        if self.absorbs(chunk, model):
            return self._absorbed_s(chunk, model, rates, number_bytes)
        # vectors read, keys and values written, then read
        moved = L * D * number_bytes + (2 * L * D + keys_values) * NUMBER_BYTES
        return _projection_s(L, model, rates) + moved / rates.bytes_per_s

    def absorbs(self, chunk: Chunk, model: ModelConfig) -> bool:
        """Whether a hidden prefix is absorbed: `absorbing_is_cheaper` of attention/prefix.py."""
        if not self.may_absorb:
            return False
        N, L = model.num_attention_heads, chunk.cached_tokens
        own_reads = self.absorbed_reads * L * BALANCE_FLOPS_PER_BYTE // (2 * N)
        return chunk.tokens * (model.head_dim + L + 2 * BALANCE_FLOPS_PER_BYTE + own_reads) < L * model.head_dim

    def _absorbed_s(self, chunk: Chunk, model: ModelConfig, rates: Rates, number_bytes: float) -> float:
        n, L, D, N = chunk.tokens, chunk.cached_tokens, model.hidden_size, model.num_attention_heads
        flops = 4.0 * n * D**2 + 4.0 * n * L * (N - 1) * D  # one head's worth is counted as pairs
        shared = N * D * 4 / self.absorbed_tile_bytes  # of a token's queries, of those that share a read
        reads = self.absorbed_reads or max(shared, 1 / n)
        moved = (8 * n * N * D) + n * reads * L * D * number_bytes
        return max(flops / rates.flops_per_s, moved / rates.bytes_per_s)

    def _loop_s(self, chunk: Chunk, model: ModelConfig, rates: Rates, slots: int, number_bytes: float) -> float:
        """A step for 128 cached tokens: 10 programs; scores are written and read about five times in float32."""
        L, N = chunk.cached_tokens, model.num_attention_heads
        steps, is_projected = -(-L // XLA_CHUNK_TOKENS), KINDS[chunk.kind].is_projected
        if is_projected and slots <= model.head_dim:  # absorbed: wide contexts go to and fro instead
            moved = steps * 5 * slots * N * model.hidden_size * 4
            flops = 4.0 * slots * steps * XLA_CHUNK_TOKENS * N * model.hidden_size
            return max(moved / rates.bytes_per_s, flops / rates.flops_per_s, steps * XLA_CHUNK_STARTS * START_S)
        read = steps * 5 * slots * N * XLA_CHUNK_TOKENS * 4 + 4 * L * model.hidden_size * number_bytes
        seconds = max(read / rates.bytes_per_s, steps * XLA_CHUNK_STARTS * START_S)
        return seconds + (_projection_s(L, model, rates) if is_projected else 0.0)


def _projection_s(tokens: int, model: ModelConfig, rates: Rates) -> float:
    """Seconds to project cached vectors in one layer: products, or reading Wk and Wv for every 512 tokens."""
    weights = -(-tokens // 512) * 2 * model.hidden_size**2 * rates.weight_bytes
    return max(4.0 * tokens * model.hidden_size**2 / rates.flops_per_s, weights / rates.bytes_per_s)


HOPPER = PrefixKernel(
    "Mosaic GPU",
    "pallas_kernels/gpu/kv_prefix.py: 128 queries a tile; gpu/hidden_prefix.py: an absorbed query reads twice",
    tile=128,
    absorbed_reads=2,
)
TPU = PrefixKernel(
    "Pallas TPU", "pallas_kernels/tpu/kv_prefix.py: 256 queries a tile; tpu/hidden_prefix.py: TILE_BYTES"
)
XLA = PrefixKernel(
    "XLA",
    "apt_jax/attention/paged.py; 10 programs for 128 tokens and scores written and read about five times: "
    "docs/log/2026-11-30-gpu-kernels.md, prefill over a cached prefix",
    loops=True,
)
ONE_READ = PrefixKernel("one read", "a kernel of which all queries of a chunk share one read", tile=1 << 20)
PROJECTED = PrefixKernel("one read, projected", "Apt-Serve (arXiv 2504.07494)", tile=1 << 20, may_absorb=False)
